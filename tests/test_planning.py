"""The 30B stages against the paper's tables, and the memory estimate against what autograd really holds."""

import functools
import math
from pathlib import Path

import pytest
import torch
import yaml
from tiny_model import collate, make_sample, randomize

from modeling_omni.configuration_omni import OmniConfig
from modeling_omni.modeling_audio import OmniAudioModel
from modeling_omni.modeling_language import OmniBlock
from modeling_omni.modeling_omni import OmniForConditionalGeneration, OmniProjector
from modeling_omni.modeling_vision import PackedItems, VisionBlock
from modeling_omni.planning import (
    GIB,
    PEAK,
    activation_phases,
    block_bytes,
    count_parameters,
    fits_table,
    highest,
    largest_layer,
    memory_estimate,
    plan,
    plan_command,
    stage_memory,
)
from modeling_omni.training import SFTArguments

STAGES = Path(__file__).parents[1] / "configs/30b"
ALL = ["language", "embeddings", "head", "router", "vision", "vision_projector", "audio", "audio_projector"]
NO_AUDIO = ALL[:6]

# Table 6 (context 16K = 16,384 and so on; a cell that the paper merges with its left neighbour is written out):
# context, frames, batch, CP, LR, minimum LR, warm-up, weight decay, trainable modules, recomputed and CPE eval (3.1.8)
LANGUAGE_VISION = ["language", "vision"]
EVERY_PART = ["language", "vision", "audio", "vision_projector", "audio_projector"]
TABLE_6 = [
    (16384, None, 128, 1, 1e-3, 1e-5, 0.1, 0.01, ["vision_projector"], LANGUAGE_VISION, False),
    (16384, 64, 256, 1, 5e-5, 0, 0.1, 0.05, NO_AUDIO, LANGUAGE_VISION, True),
    (16384, None, 512, 1, 1e-3, 1e-5, 0.1, 0.01, ["audio_projector"], LANGUAGE_VISION, None),
    (16384, None, 512, 1, 2.5e-5, 0, 0.1, 0.05, ["audio", "audio_projector"], LANGUAGE_VISION, None),
    (16384, 64, 512, 1, 1e-5, 1e-7, 0.1, 0.05, ALL, ["language", "vision", "audio"], True),
    (49152, 256, 256, 2, 1e-6, 0, 0.01, 0.05, ALL, EVERY_PART, True),
    (262144, 256, 128, 16, 1e-6, 0, 0.1, 0.05, NO_AUDIO, EVERY_PART, False),
]
TABLE_1 = [15.5e9, 214.8e9, 11.4e9, 100.5e9, 57.3e9, 33.5e9, 34.0e9]
SHARES = [  # Tables 2 to 5, percent of tokens; none are given for stages 0 to 2
    [100],
    [100],
    [100],
    [22.7, 24.4, 43.3, 9.6],
    [53.4, 6.1, 0.02, 0.02, 11.0, 4.2, 2.8, 1.1, 4.4, 16.9],
    [0.4, 11.3, 9.8, 7.2, 0.1, 0.6, 5.8, 3.3, 10.2, 0.3, 39.1, 11.8],
    [90.9, 7.3, 1.5, 0.3],
]


def arguments(values: dict) -> SFTArguments:
    return SFTArguments(**{"output_dir": "run"} | values)


@functools.cache
def values_of(stage: int) -> dict:
    return yaml.safe_load((STAGES / f"stage{stage}.yaml").read_text())


def stage(number: int, **changes) -> SFTArguments:
    return arguments(values_of(number) | changes)


def in_gib(value: float) -> float:
    return round(value / GIB, 1)


# ---- the files ----


@pytest.mark.parametrize("number", range(7))
def test_stages_are_table_6(number):
    context, frames, batch, cp, rate, low, warmup, decay, groups, recompute, cpe = TABLE_6[number]
    values = values_of(number)
    expected = {
        "row_tokens": context,
        "global_batch_size": batch,
        "context_parallel": cp,
        "learning_rate": rate,
        "min_learning_rate": low,
        "warmup_fraction": warmup,
        "weight_decay": decay,
        "train": groups,
        "recompute": recompute,
        "optimizer": "adamw",
        "train_tokens": TABLE_1[number],
        "steps": math.ceil(TABLE_1[number] / (batch * context)),
    }
    assert {key: values[key] for key in expected} == expected
    assert values.get("max_frames") == frames
    assert values.get("patches_per_frame") == (frames and [256, 512, 768, 1024])
    assert values.get("cpe_eval") == cpe
    assert [source["weight"] for source in values["data"]] == SHARES[number]
    assert len({source["path"] for source in values["data"]}) == len(SHARES[number])
    assert values["model"] == ("checkpoints/30b-start" if number == 0 else f"runs/30b/stage{number - 1}/final")
    assert stage(number).learning_rate == rate
    assert values["expert_parallel"] == (8 if "language" in groups else 1)  # frozen experts: see lora.py


def test_every_key_of_the_files_has_a_comment():
    for file in STAGES.glob("*.yaml"):
        previous = ""
        for line in file.read_text().splitlines():
            key = line.split("#")[0].strip()
            assert not key or "#" in line or key.endswith(":") or previous.startswith("#"), f"{file}: {line}"
            previous = line


# ---- the released sizes: the paper estimate of the states ----


@functools.cache
def released_counts(groups=tuple(ALL)):
    return count_parameters(OmniConfig(), groups)


def test_parameters_of_the_released_model():
    counts = released_counts()
    assert sum(pair[0] for pair in counts.values()) == 33_015_546_816
    language = sum(counts.get(group, (0,))[0] for group in ("language", "router", "embeddings", "head"))
    assert language == 31_577_940_288 - 23 * 128  # the checkpoint's number holds the routers' correction biases
    assert counts["vision"][0] == 653_611_520
    assert counts["vision_projector"][0] == 159_912_960
    assert counts["audio"][0] == 608_879_616
    assert counts["audio_projector"][0] == 15_205_376
    assert largest_layer(OmniConfig()) == 29_374_808_064 // 23
    assert sum(pair[1] for pair in released_counts(("vision",)).values()) == 33_015_546_816 - 653_611_520


def test_states_and_block_inputs_of_the_released_model():
    config = OmniConfig()
    full = stage_memory(config, stage(4), released_counts(), gpus=8)
    assert in_gib(full["weights"] + full["gradients"] + full["optimizer"]) == 61.5
    # expert parallelism and ZeRO-3 hold the same states; only what is gathered differs
    alone = stage_memory(config, stage(4, expert_parallel=1), released_counts(), gpus=8)
    assert alone["optimizer"] == full["optimizer"]
    assert in_gib(alone["buffers"] - full["buffers"]) == in_gib(2 * 2 * (29_374_808_064 / 23 - 131072 * 2688))
    offload = stage_memory(config, stage(4), released_counts(), gpus=8, offload=True)
    assert in_gib(offload["weights"]) == 7.7 and offload["gradients"] == offload["optimizer"] == 0
    assert round(offload["host"] / GIB) == 492  # 369 of masters and moments, 123 of float32 gradients
    for number, cp, gib in ((4, 1, 4.3), (5, 1, 12.8), (5, 2, 6.4), (6, 8, 8.5)):
        args = stage(number, context_parallel=cp)
        kept = activation_phases(config, args, {"language"}, 2, context_parallel=cp)[0][1]
        tokens = args.row_tokens / cp
        mask = tokens * args.row_tokens if cp == 1 else 0
        assert in_gib(kept - mask - tokens * 8 * 2688) == gib
    for number, gib in ((4, 5.0), (5, 15.0)):
        phases = activation_phases(config, stage(number), {"vision", "language"}, 2)
        assert [phase[0] for phase in phases] == ["vision", "vision_projector", "language", "loss"]
        assert in_gib(phases[0][1]) == gib


def test_plan_of_the_30b_stages():
    best = {}
    for number in range(7):
        result = plan(stage(number))
        assert "released" in result["sizes"]
        assert result["steps"] == values_of(number)["steps"]
        best[number] = result["best"]
        assert best[number]["accumulation"] * best[number]["data_parallel"] == values_of(number)["global_batch_size"]
        for row in result["rows"]:
            parts = ("weights", "gradients", "optimizer", "kept", "peak", "buffers")
            assert row["total"] == pytest.approx(sum(row[part] for part in parts))
    assert [best[number]["how"] for number in (0, 2, 3)] == ["as configured"] * 3
    assert [best[number]["how"] for number in (1, 4, 5, 6)] == ["offload"] * 4
    assert best[6]["changes"] == {"context_parallel": 8} and best[6]["accumulation"] == 128
    # 256k takes 8 GPUs a row, and a small host takes offload away
    short = plan(stage(6, context_parallel=1))
    assert short["best"]["how"] == "offload, CP 8"
    assert not next(row for row in short["rows"] if row["how"] == "offload")["fits"]
    assert next(row for row in short["rows"] if row["nodes"] > 1)["changes"]["context_parallel"] == 8
    poor = plan(stage(4), host_gib=256)
    assert poor["best"]["how"] == "2 nodes" and poor["best"]["data_parallel"] == 16
    lora = next(row for row in poor["rows"] if row["lora"])
    assert lora["fits"] and lora["changes"]["expert_parallel"] == 1 and lora["host"] == 0
    assert in_gib(lora["weights"]) == 7.7 and lora["gradients"] + lora["optimizer"] < 0.1 * GIB
    assert plan(stage(4), gpus=1, gpu_gib=24, host_gib=64)["best"] is None


def test_tables(capsys, monkeypatch):
    table = fits_table([(f"stage{number}", stage(number)) for number in (0, 6)]).splitlines()
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert "as configured" in table[2] and "offload" in table[3] and "2 nodes" in table[3]
    paths = [str(STAGES / f"stage{number}.yaml") for number in (0, 5)]
    plan_command(["--config", *paths, "--gpus", "8", "--gpu_memory", "80"])
    text = capsys.readouterr().out
    assert "33.016 B, trained 0.160 B" in text and "4 (data parallel) x 64 (accumulated)" in text
    assert "configs/accelerate/zero3_experts.yaml train.py sft --config " + paths[1] in text


# ---- the formulas against this package's code, at small sizes ----

SIZES = {
    "llm_config": {
        "vocab_size": 160,
        "hidden_size": 168,
        "hybrid_override_pattern": "ME*-M",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "intermediate_size": 300,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 116,
        "moe_shared_expert_intermediate_size": 232,
        "eos_token_id": None,
    },
    "vision_config": {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 380,
        "num_prefix_tokens": 2,
        "max_resolution": 512,
    },
    "sound_config": {
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 380,
        "subsampling_conv_channels": 32,
        "num_mel_bins": 16,
        "projection_hidden_size": 200,
    },
    "projector_hidden_size": 500,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def config():
    return OmniConfig(**SIZES)


def saved_bytes(module, run) -> int:
    """Bytes that autograd saves in one pass, each storage once, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    storages = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that none is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run()
    assert output is not None
    return sum(storage.nbytes() for storage in storages.values())


def allocations(run) -> list[int]:
    """Running sum of the CPU allocator's bytes during `run()`, after every allocation and release."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total, sums = 0, []
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        sums.append(total)
    return sums


def block_of(config, kind, dtype):
    """(module, a forward pass, tokens of it, keys of the mask) for one kind of block."""
    torch.manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    if kind in "ME*-":
        tokens = 1024
        module = OmniBlock(config.llm_config, config.llm_config.hybrid_override_pattern.index(kind))
        module.mixer.config = config.llm_config
        config.llm_config._attn_implementation = "sdpa"
        seq_idx = torch.arange(tokens)[None] // 300
        mask = (seq_idx[:, :, None] == seq_idx[:, None]).tril()[:, None]
        x = tensor(1, tokens, config.llm_config.hidden_size)
        run = functools.partial(module, x, seq_idx=seq_idx, attention_mask=mask)
    elif kind == "vision":
        tokens = 4 * 258
        module, x = VisionBlock(config.vision_config), tensor(tokens, config.vision_config.hidden_size)
        run = functools.partial(module, x, PackedItems([(4, 258)]))
    elif kind in ("audio", "subsampling"):
        tokens = 2 * 375
        tower, x = OmniAudioModel(config.sound_config), tensor(2, 375, config.sound_config.hidden_size)
        module = tower.layers[0] if kind == "audio" else tower.subsampling
        positions = tensor(750, config.sound_config.hidden_size)
        mels, frames = tensor(2, 3000, config.sound_config.num_mel_bins), torch.tensor([3000, 2900])
        valid = torch.ones(2, 375, dtype=torch.bool)
        run = functools.partial(module, *((x, positions, valid) if kind == "audio" else (mels, frames)))
    else:
        tokens, width = 1024, config.vision_config.hidden_size * 4
        module, x = (
            OmniProjector(width, config.projector_hidden_size, config.llm_config.hidden_size),
            tensor(1024, width),
        )
        run = functools.partial(module, x)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.05)
    return module.to(dtype), run, tokens, tokens if kind == "*" else 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["M", "E", "*", "-", "vision", "audio", "subsampling", "vision_projector"])
def test_saved_bytes_of_a_block(config, kind, dtype):
    module, run, tokens, keys = block_of(config, kind, dtype)
    measured, estimated = saved_bytes(module, run) / tokens, block_bytes(config, kind, dtype.itemsize, keys)
    assert measured == pytest.approx(estimated, rel=0.02), kind

    def forward_and_backward():
        output = run()
        output.backward(torch.ones_like(output))

    forward_and_backward()
    module.zero_grad(set_to_none=True)
    gradients = sum(parameter.nbytes for parameter in module.parameters())
    peak = (max(allocations(forward_and_backward)) - gradients) / tokens
    assert 0.75 < peak / (estimated * PEAK.get(kind, PEAK["projector"])) < 1.05, kind


@pytest.mark.parametrize("recompute", [[], EVERY_PART], ids=["kept", "recomputed"])
def test_activations_of_the_whole_model(config, recompute):
    """A row nearly full of pictures, trained as a whole: memory after the forward pass and at the height."""
    model = randomize(OmniForConditionalGeneration(config)).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sample = make_sample([2, *[("image", 32, 32)] * 3, 200], 1)
    batch = collate([sample])
    tokens = batch["input_ids"].shape[1]
    batch["seq_idx"] = torch.arange(tokens)[None] // 400
    args = arguments({"row_tokens": tokens, "recompute": recompute, "media_tokens": 3 * 1024})
    held = []

    def run(backward=True):
        loss = model(**batch, use_cache=False, skip_logits=True).loss
        held.append(loss)
        if backward:
            loss.backward()

    run()
    model.zero_grad(set_to_none=True)
    held.clear()
    after = allocations(lambda: run(backward=False))[-1]
    held.clear()
    sums = allocations(run)
    held.clear()
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    groups = {"language", "vision", "vision_projector", "embeddings", "head"}
    phases = activation_phases(config, args, groups, 4)
    _, total, _, _ = highest(phases)
    kept = sum(phase[1] for phase in phases)
    assert after == pytest.approx(kept, rel=0.1)
    assert 0.7 * total < max(sums) - gradients < 1.05 * total


def test_memory_estimate(config):
    args = arguments({"row_tokens": 256, "train": ["vision_projector"]})
    counts = count_parameters(config, args.train)
    trained, frozen = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    row = stage_memory(config, args, counts, 1, 1, b=4, sharded=False, gpu=False, rows=2)
    assert row["weights"] == 4 * (trained + frozen)
    assert row["gradients"] == 4 * trained and row["optimizer"] == 8 * trained and row["buffers"] == 0
    assert row["kept"] == 2 * stage_memory(config, args, counts, 1, 1, b=4, sharded=False, gpu=False)["kept"]
    text = memory_estimate(args, config=config, rows=2)
    assert f"{row['total'] / 2**20:.1f} MiB at most" in text and "1 process" in text
    args.lora = {"r": 4}
    adapted = count_parameters(config, args.train, args.lora)
    attention = 4 * (168 + 256) + 2 * 4 * (168 + 64) + 4 * (256 + 168)
    mamba = 2 * 4 * (168 + config.llm_config.mamba_intermediate_size + config.llm_config.mamba_conv_size + 8)
    dense = 2 * 4 * (168 + 232) + 2 * 4 * (168 + 300)
    assert adapted["language"][0] == sum(pair[0] for pair in adapted.values()) == attention + mamba + dense
