"""The 30B stages against the paper's tables, and the memory estimate against what autograd really holds."""

import functools
import math
from pathlib import Path

import pytest
import torch
import yaml
from tiny_model import collate, make_sample, randomize

from modeling_omni import kernels, ssd
from modeling_omni.configuration_omni import OmniConfig
from modeling_omni.modeling_audio import OmniAudioModel
from modeling_omni.modeling_language import OmniBlock
from modeling_omni.modeling_omni import OmniForConditionalGeneration, OmniProjector
from modeling_omni.modeling_vision import PackedItems, VisionBlock
from modeling_omni.packing import PackedRows
from modeling_omni.planning import (
    GIB,
    PEAK,
    activation_phases,
    block_bytes,
    count_parameters,
    fits_table,
    highest,
    input_bytes,
    largest_layer,
    memory_estimate,
    plan,
    plan_command,
    sorted_row_bytes,
    stage_memory,
)
from modeling_omni.training import SFTArguments

STAGES = Path(__file__).parents[1] / "configs/30b"
ALL = ["language", "embeddings", "head", "router", "vision", "vision_projector", "audio", "audio_projector"]
NO_AUDIO = ALL[:6]

# Table 6 (context 16K = 16,384 and so on; a cell that the paper merges with its left neighbour is written out):
# context, frames, batch, CP, LR, minimum LR, warm-up, weight decay, trainable modules, CPE eval (3.1.8)
TABLE_6 = [
    (16384, None, 128, 1, 1e-3, 1e-5, 0.1, 0.01, ["vision_projector"], False),
    (16384, 64, 256, 1, 5e-5, 0, 0.1, 0.05, NO_AUDIO, True),
    (16384, None, 512, 1, 1e-3, 1e-5, 0.1, 0.01, ["audio_projector"], None),
    (16384, None, 512, 1, 2.5e-5, 0, 0.1, 0.05, ["audio", "audio_projector"], None),
    (16384, 64, 512, 1, 1e-5, 1e-7, 0.1, 0.05, ALL, True),
    (49152, 256, 256, 2, 1e-6, 0, 0.01, 0.05, ALL, True),
    (262144, 256, 128, 16, 1e-6, 0, 0.1, 0.05, NO_AUDIO, False),
]
TABLE_1 = [(9.35e6, 15.5e9), (86.3e6, 214.8e9), (59.2e6, 11.4e9), (242.0e6, 100.5e9)]  # samples, tokens
TABLE_1 += [(30.5e6, 57.3e9), (6.08e6, 33.5e9), (623e3, 34.0e9)]
# Tables 2 to 5: samples, percent of tokens, tokens
TABLE_2 = [(113.8e6, 22.7, 22.8e9), (61.0e6, 24.4, 24.5e9), (19.8e6, 43.3, 43.5e9), (47.5e6, 9.6, 9.6e9)]
TABLE_3 = [(14.6e6, 53.4, 30.6e9), (948e3, 6.1, 3.5e9), (14e3, 0.02, 10.4e6), (9e3, 0.02, 10.0e6)]
TABLE_3 += [(1.3e6, 11.0, 6.3e9), (388e3, 4.2, 2.4e9), (251e3, 2.8, 1.6e9), (2.9e6, 1.1, 640e6)]
TABLE_3 += [(765e3, 4.4, 2.5e9), (9.3e6, 16.9, 9.7e9)]
TABLE_4 = [(650e3, 0.4, 0.12e9), (2.84e6, 11.3, 3.80e9), (1.17e6, 9.8, 3.28e9), (101e3, 7.2, 2.42e9)]
TABLE_4 += [(45e3, 0.1, 0.04e9), (25e3, 0.6, 0.21e9), (96e3, 5.8, 1.95e9), (74e3, 3.3, 1.11e9)]
TABLE_4 += [(167e3, 10.2, 3.42e9), (6e3, 0.3, 0.09e9), (710e3, 39.1, 13.10e9), (198e3, 11.8, 3.94e9)]
TABLE_5 = [(508e3, 90.9, 30.9e9), (63e3, 7.3, 2.5e9), (2.2e3, 1.5, 506e6), (50e3, 0.3, 106e6)]
BLENDS = [[(samples, 100, tokens)] for samples, tokens in TABLE_1[:3]] + [TABLE_2, TABLE_3, TABLE_4, TABLE_5]
# 3.1.8: the first stage of each; the paper spares Mamba of `language`, see test_paper_recompute_fits
RECOMPUTED_FROM = {"language": 0, "vision": 0, "audio": 4, "vision_projector": 5, "audio_projector": 5}


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
    context, frames, batch, cp, rate, low, warmup, decay, groups, cpe = TABLE_6[number]
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
        "recompute": [part for part, first in RECOMPUTED_FROM.items() if number >= first],
        "optimizer": "adamw",
        "train_tokens": TABLE_1[number][1],
        "steps": math.ceil(TABLE_1[number][1] / (batch * context)),
    }
    assert {key: values[key] for key in expected} == expected
    assert values.get("max_frames") == frames
    assert values.get("patches_per_frame") == (frames and [256, 512, 768, 1024])
    assert values.get("cpe_eval") == cpe
    blend = [(share, round(tokens / samples)) for samples, share, tokens in BLENDS[number]]
    assert [(source["weight"], source["mean_tokens"]) for source in values["data"]] == blend
    assert len({source["path"] for source in values["data"]}) == len(blend)
    assert values["model"] == ("checkpoints/30b-start" if number == 0 else f"runs/30b/stage{number - 1}/final")
    assert stage(number).learning_rate == rate
    assert values["expert_parallel"] == (8 if "language" in groups else 1)  # frozen experts: see lora.py


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
    assert in_gib(full["weights"] + full["gradients"] + full["optimizer"]) == 69.2
    # expert parallelism and ZeRO-3 hold the same states; only what is gathered differs
    alone = stage_memory(config, stage(4, expert_parallel=1), released_counts(), gpus=8)
    assert alone["optimizer"] == full["optimizer"]
    assert in_gib(alone["buffers"] - full["buffers"]) == in_gib(2 * 2 * (29_374_808_064 / 23 - 131072 * 2688))
    offload = stage_memory(config, stage(4), released_counts(), gpus=8, offload=True)
    assert in_gib(offload["weights"]) == 7.7 and offload["gradients"] == offload["optimizer"] == 0
    # 369 of masters and moments, 2 x 123 of gradients; 64 x 7 rows at the workers and 8 x 64 / 2 of a step, 0.2 each
    assert round((offload["host"] - full["host"]) / GIB) == 615
    assert full["host"] == (64 * 7 + 8 * 64 / 2) * 16384 * 4 * 3 * 16 * 16 * 4
    for number, cp, gib in ((4, 1, 4.3), (5, 1, 12.8), (5, 2, 6.4), (6, 8, 8.5)):
        args = stage(number, context_parallel=cp)
        kept = activation_phases(config, args, {"language"}, 2, context_parallel=cp)[0][1]
        tokens = args.row_tokens / cp
        assert in_gib(kept - tokens * 4 * 2688) == gib
    for number, gib in ((4, 5.0), (5, 15.0)):
        phases = activation_phases(config, stage(number), {"vision", "language"}, 2)
        assert [phase[0] for phase in phases] == ["vision", "vision_projector", "language", "loss"]
        assert in_gib(phases[0][1]) == gib


@pytest.mark.parametrize("row_tokens", [16384, 49152])
def test_pixels_on_the_host_follow_the_window(row_tokens):
    args = arguments({"row_tokens": row_tokens, "workers": 3})
    rows = input_bytes(OmniConfig(), args, accumulation=5, rows=2) / (row_tokens * 4 * 3 * 16 * 16 * 4)
    assert rows == 3 * (PackedRows(None, None, 2, row_tokens).window + 2 + 2 * 2) + 5 * 2
    args.media_tokens = row_tokens
    assert input_bytes(OmniConfig(), args, 5, 2) == rows * row_tokens * 3 * 16 * 16 * 4


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
    # 256k takes 4 GPUs a row, and a small host takes offload away
    short = plan(stage(6, context_parallel=1))
    assert short["best"]["how"] == "offload, CP 4"
    assert not next(row for row in short["rows"] if row["how"] == "offload")["fits"]
    assert next(row for row in short["rows"] if row["nodes"] > 1)["changes"]["context_parallel"] == 8
    poor = plan(stage(4), host_gib=256)
    assert poor["best"]["how"] == "2 nodes" and poor["best"]["data_parallel"] == 16
    lora = next(row for row in poor["rows"] if row["lora"])
    assert lora["fits"] and lora["changes"]["expert_parallel"] == 1 and lora["host"] / GIB < 200
    assert in_gib(lora["weights"]) == 7.7 and lora["gradients"] + lora["optimizer"] < 0.1 * GIB
    assert plan(stage(4), gpus=1, gpu_gib=24, host_gib=64)["best"] is None


@pytest.mark.parametrize(("number", "gpus", "cp", "ep"), [(6, 6, 6, 2), (5, 7, 1, 1), (4, 12, 1, 4), (4, 3, 1, 1)])
def test_degrees_divide_the_gpus_and_the_experts(number, gpus, cp, ep):
    rows = plan(stage(number), gpus=gpus)["rows"]
    assert rows[0]["context_parallel"] == cp and rows[0]["changes"].get("expert_parallel", 8) == ep
    for row in rows:
        assert row["data_parallel"] * row["context_parallel"] == gpus * row["nodes"]
        assert gpus * row["nodes"] % row["changes"].get("expert_parallel", 8) == 0


def test_paper_recompute_fits():
    """What the paper recomputes of the language model: everything but Mamba, whose scan keeps little."""
    kept = stage(4, recompute=["attention", "moe", "mlp", "vision", "audio"])
    row = stage_memory(OmniConfig(), kept, released_counts(), gpus=8, offload=True)
    assert 23 * block_bytes(OmniConfig(), "M", 2) == pytest.approx(1.68e6, rel=0.01)
    assert row["kept"] > 23 * 16384 * block_bytes(OmniConfig(), "M", 2) > 25 * GIB
    assert row["total"] < 60 * GIB


def test_tables(capsys, monkeypatch):
    table = fits_table([(f"stage{number}", stage(number)) for number in (0, 4)]).splitlines()
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


@pytest.fixture
def small_blocks(monkeypatch):
    """What runs in blocks of rows does so at small sizes too: a block is nothing next to a layer."""
    monkeypatch.setattr(kernels, "BLOCK_ELEMENTS", {"cpu": 2**13})
    monkeypatch.setattr(ssd, "SCAN_ELEMENTS", 2**13)
    monkeypatch.setattr(ssd, "CONV_ELEMENTS", 2**13)


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
    """(module, a forward pass, tokens of it) for one kind of block."""
    torch.manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape).to(dtype).requires_grad_()

    if kind in "ME*-":
        tokens = 1024
        module = OmniBlock(config.llm_config, config.llm_config.hybrid_override_pattern.index(kind))
        module.mixer.config = config.llm_config
        config.llm_config._attn_implementation = "sdpa"
        seq_idx = torch.arange(tokens)[None] // 300
        attention = {"documents": [[300, 300, 300, 124]]}
        x = tensor(1, tokens, config.llm_config.hidden_size)
        run = functools.partial(module, x, seq_idx=seq_idx, attention=attention)
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
    return module.to(dtype), run, tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["M", "E", "*", "-", "vision", "audio", "subsampling", "vision_projector"])
def test_saved_bytes_of_a_block(config, kind, dtype, small_blocks):
    module, run, tokens = block_of(config, kind, dtype)
    measured, estimated = saved_bytes(module, run) / tokens, block_bytes(config, kind, dtype.itemsize)
    assert measured == pytest.approx(estimated, rel=0.02), kind

    def forward_and_backward():
        output = run()
        output.backward(torch.ones_like(output))

    forward_and_backward()
    module.zero_grad(set_to_none=True)
    gradients = sum(parameter.nbytes for parameter in module.parameters())
    peak = (max(allocations(forward_and_backward)) - gradients) / tokens
    highest_estimate = estimated * PEAK.get(kind, PEAK["projector"]) + sorted_row_bytes(config, kind, dtype.itemsize)
    assert 0.75 < peak / highest_estimate < 1.05, kind


@pytest.mark.parametrize("recompute", [[], [*RECOMPUTED_FROM]], ids=["kept", "recomputed"])
def test_activations_of_the_whole_model(config, recompute, small_blocks):
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
