"""LoRA: what each preset adapts, gradients, reloading with stock PEFT, merging to equal outputs, 4-bit experts."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_model import LLM, collate, make_sample, prompt_of, tiny_model
from tiny_tokenizer import build_tokenizer
from torch import nn

import infer
from modeling_omni import OmniForConditionalGeneration, OmniInputError, OmniProcessor
from modeling_omni.inference import load
from modeling_omni.lora import (
    PRESETS,
    adapted_layers,
    add_lora,
    base_name,
    check_adapter_gradients,
    load_adapter,
    lora_config,
    lora_table,
    merge_adapter,
    part_of,
    quantize_experts_4bit,
    save_adapter,
    start_lora,
    watch_adapter_gradients,
)
from modeling_omni.modeling_audio import ConvolutionModule, OmniAudioModel, Subsampling
from modeling_omni.modeling_language import Mamba2Mixer, MoE, OmniAttention, OmniMLP
from modeling_omni.modeling_omni import OmniProjector
from modeling_omni.modeling_vision import OmniVisionModel, PatchGenerator

ROOT = Path(__file__).parents[1]
ALL = ["attention_mamba", "shared_experts", "routed_experts", "projectors", "towers"]
MIXED_ROW = [4, ("image", 2, 4), 3, ("video", 2, 2, 2), 3, ("audio", [60, 30]), 9]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def batch_of(*rows):
    return collate([make_sample(row, i) for i, row in enumerate(rows)])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A checkpoint folder with a processor; every kind of layer.

    Its matrices are half of `tiny_model`'s: those amplify one rounding of the weights to 1e-4 of the logits, these to
    3e-6, so that equal outputs can be told at 1e-5.
    """
    folder = tmp_path_factory.mktemp("base")
    model = tiny_model(seed=1)
    for parameter in model.parameters():
        parameter.data *= 0.5 if parameter.dim() > 1 else 1
    model.save_pretrained(folder)
    OmniProcessor(tokenizer=build_tokenizer()).save_pretrained(folder)
    return str(folder)


def fresh(base, dtype=torch.float32):
    return OmniForConditionalGeneration.from_pretrained(base, dtype=dtype)


def linears(model, owners, without=()):
    """Names of the linear layers inside modules of the classes `owners`, found by class and not by name."""
    inside = lambda kinds: {  # noqa: E731
        f"{name}.{inner}".removesuffix(".")
        for name, owner in model.named_modules()
        if isinstance(owner, kinds)
        for inner, layer in owner.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return inside(owners) - (inside(without) if without else set())


def expected_targets(model) -> dict[str, set[str]]:
    mamba_out = {f"{n}.out_proj" for n, m in model.named_modules() if isinstance(m, Mamba2Mixer)}
    vision = linears(model, OmniVisionModel, PatchGenerator)
    audio = linears(model, OmniAudioModel, (ConvolutionModule, Subsampling))
    return {
        "attention_mamba": linears(model.model.language_model, (OmniAttention, Mamba2Mixer)),
        "shared_experts": linears(model.model.language_model, OmniMLP),
        "routed_experts": {
            f"{n}.experts.{p}" for n, m in model.named_modules() if isinstance(m, MoE) for p in ("up_proj", "down_proj")
        },
        "projectors": linears(model, OmniProjector),
        "vision": vision,
        "audio": audio,
        "towers": vision | audio,
        "excluded": mamba_out,
    }


# --- what is adapted


def test_presets_adapt_what_they_say(base):
    model = fresh(base)
    expected = expected_targets(model)
    prefix = "model.language_model."
    for preset in ("attention_mamba", "shared_experts"):
        expected[preset] = {prefix + name for name in expected[preset]} - expected["excluded"]
    assert set(PRESETS) == set(expected) - {"excluded"} and all(expected.values())
    untouched = copy.deepcopy(model)
    for preset in PRESETS:
        model = add_lora(copy.deepcopy(untouched), {"presets": [preset], "r": 2})
        assert set(adapted_layers(model)) == expected[preset], preset
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * len(expected[preset]) and all(".lora_" in name for name in trained)
    both = add_lora(copy.deepcopy(untouched), {"presets": ["routed_experts", "vision"], "target_modules": ["lm_head"]})
    assert set(adapted_layers(both)) == expected["routed_experts"] | expected["vision"] | {"lm_head"}
    default = add_lora(untouched, {})
    assert set(adapted_layers(default)) == expected["attention_mamba"] | expected["shared_experts"]


def test_options_reach_peft(base):
    model = fresh(base)
    settings = {"presets": "vision", "r": 4, "alpha": 12, "dropout": 0.1, "rslora": True, "dora": True, "bias": "none"}
    config = lora_config(model, settings)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.1)
    assert config.use_rslora and config.use_dora and config.base_model_name_or_path == base
    layer = next(iter(adapted_layers(add_lora(model, settings | {"rank_pattern": {".*qkv": 9}})).values()))
    assert layer.r == {"default": 9} and layer.scaling == {"default": 12 / 3}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"presets": ["attention"]}, "unknown presets ['attention']; known: attention_mamba, "),
        ({"rank": 8}, "unknown option 'rank'; known: presets, "),
        ({"alpha": 8, "lora_alpha": 8}, "same option"),
        ({"presets": []}, "nothing to adapt"),
        ({"target_modules": ["q_porj"]}, "target_modules 'q_porj' matches no module"),
        ({"target_parameters": ["mixer.experts.gate_up_proj"]}, "gate_up_proj' matches no parameter"),
        ({"target_modules": ".*(out_proj|qkv)"}, "layers.0.mixer.out_proj cannot be a target: fused"),
        ({"target_modules": ["conv1d"]}, "layers.0.mixer.conv1d cannot be a target"),
        ({"target_parameters": ["out_proj.weight"]}, "layers.0.mixer.out_proj.weight cannot be a target"),
        ({"target_modules": ["pointwise_conv1"]}, "is a PointwiseConv1d; only linear layers"),
        ({"target_modules": "(("}, "not a regular expression"),
        ({"presets": ["routed_experts"], "dropout": 0.1}, "dropout must be 0 with routed_experts"),
        ({"presets": ["routed_experts"], "dora": True}, "PEFT refuses these settings"),
        ({"r": 0}, "PEFT refuses these settings"),
        ({"presets": ["routed_experts"], "base_4bit": True}, "leave out routed_experts, or base_4bit"),
    ],
)
def test_settings_at_fault(settings, message):
    with pytest.raises(OmniInputError, match=re.escape(message)):
        add_lora(tiny_model(), settings)


def test_a_preset_without_its_layers_is_an_error():
    with pytest.raises(OmniInputError, match="preset 'routed_experts' .* matches no parameter"):
        add_lora(tiny_model(pattern="M*"), {"presets": ["routed_experts"]})


def test_names_and_table(base):
    model = fresh(base)
    names = {name for name, _ in model.named_parameters()}
    frozen = sum(p.numel() for p in model.parameters())
    model = add_lora(model, {"presets": ALL, "r": 3, "modules_to_save": ["lm_head"]})
    inside = {base_name(name) for name, p in model.named_parameters() if ".lora_" not in name}
    assert inside == names
    trained = {base_name(name).removesuffix(".weight") for name, p in model.named_parameters() if p.requires_grad}
    experts = re.compile(r"(mixer\.experts)\.\w+$")  # adapters of a parameter bear the name of its module
    assert trained == {experts.sub(r"\1", name) for name in adapted_layers(model)} | {"lm_head"}
    lines = lora_table(model).splitlines()
    rows = {line.split()[0]: [int(n.replace(",", "")) for n in line.split()[1:]] for line in lines[1:8]}
    head = model.base_model.model.lm_head.original_module.weight.numel()
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert rows["all"] == [len(adapted_layers(model)), adapters, adapters + head, frozen]
    assert rows["head"] == [0, 0, head, head]
    vision = [p.numel() for n, p in model.named_parameters() if part_of(n) == "vision" and ".lora_" in n]
    assert rows["vision"][:3] == [len(vision) // 2, sum(vision), sum(vision)] and rows["vision"][3] > 0
    assert "2 x mixer.in_proj (r 3)" in lora_table(model) and "1 x mixer.experts.up_proj (r 3)" in lora_table(model)


# --- gradients


@pytest.fixture
def adapted(base):
    torch.manual_seed(0)
    return add_lora(fresh(base), {"presets": ALL, "r": 2, "alpha": 4})


def test_gradients_of_the_first_step(adapted):
    batch = batch_of(MIXED_ROW)
    watch = watch_adapter_gradients(adapted)
    with pytest.raises(OmniInputError, match="adapters got no gradient"):
        check_adapter_gradients(adapted)
    adapted(**batch).loss.backward()
    assert check_adapter_gradients(adapted, [batch]) == set()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(not g.any() for name, g in gradients.items() if "lora_A" in name)  # B is zero, so this is right
    assert all(g.any() for name, g in gradients.items() if "lora_B" in name)
    adapted.zero_grad()  # as an engine that steps inside `backward`
    with pytest.raises(OmniInputError, match="adapters got no gradient"):
        check_adapter_gradients(adapted, [batch])
    assert watch.handles and check_adapter_gradients(adapted, [batch], watch) == set() and not watch.handles


def test_an_adapter_that_is_passed_by_is_named(adapted):
    name = "model.language_model.layers.2.mixer.v_proj"
    layer = adapted_layers(adapted)[name]
    layer.forward = layer.base_layer.forward  # what a kernel does that is handed the weight
    watch = watch_adapter_gradients(adapted)
    batch = batch_of(MIXED_ROW)
    adapted(**batch).loss.backward()
    for given in (None, watch):
        with pytest.raises(OmniInputError, match=rf"1 of \d+ adapters got no gradient: {re.escape(name)}\. "):
            check_adapter_gradients(adapted, [batch], given)


def test_parts_whose_media_are_absent_wait(adapted):
    watch = watch_adapter_gradients(adapted)
    text, image, mixed = batch_of([12]), batch_of([4, ("image", 2, 4), 6]), batch_of(MIXED_ROW)
    silent = text | {"labels": torch.full_like(text["labels"], -100)}
    waiting = []
    for batch in (silent, text, image, mixed):
        adapted(**batch).loss.backward()
        waiting.append(check_adapter_gradients(adapted, [batch], watch))
        adapted.zero_grad()
    towers = {"vision", "vision_projector", "audio", "audio_projector"}
    assert waiting == [towers | {"language"}, towers, {"audio", "audio_projector"}, set()]
    adapted(**text).loss.backward()
    with pytest.raises(OmniInputError, match="model.vision_tower.blocks.0.attn.qkv"):
        check_adapter_gradients(adapted)  # without the batch everything is judged


# --- the model under PEFT


def train_two_steps(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def test_train_mode_and_recomputation(adapted):
    batch = batch_of(MIXED_ROW, [20, ("image", 4, 4), 3])
    train_two_steps(adapted, batch)
    buffers = {name: value.clone() for name, value in adapted.named_buffers()}
    with torch.no_grad():
        evaluated = adapted(**batch, use_cache=False).logits
        adapted.train()  # batch norm keeps its statistics, nothing is dropped
        assert torch.equal(adapted(**batch, use_cache=False).logits, evaluated)
    adapted(**batch).loss.backward()
    assert all(torch.equal(value, buffers[name]) for name, value in adapted.named_buffers())
    plain = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    adapted.activation_checkpointing_enable()
    recomputed = adapted(**batch)
    assert recomputed.past_key_values is None
    recomputed.loss.backward()
    assert check_adapter_gradients(adapted, [batch]) == set()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, plain[name])
            assert plain[name].abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_dropout_acts_in_training_only(base):
    torch.manual_seed(0)
    batch = batch_of([20])
    model = add_lora(fresh(base), {"r": 4, "dropout": 0.5, "init_lora_weights": False}).train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    assert torch.equal(model.eval()(**batch).logits, model(**batch).logits)


# --- files


@torch.no_grad()
def test_reload_merge_and_generate(base, adapted, tmp_path, capsys):
    batch = batch_of(MIXED_ROW, [20, ("image", 4, 4), 3])
    start = fresh(base)(**batch).logits
    with torch.enable_grad():
        train_two_steps(adapted, batch)
    logits = adapted(**batch).logits
    assert (logits - start).abs().max() > 1e-2
    prompt, options = prompt_of(batch), {"max_new_tokens": 5, "do_sample": False}
    answer = adapted.generate(**prompt, **options)

    adapter = tmp_path / "adapter"
    save_adapter(adapted, adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    close(PeftModel.from_pretrained(fresh(base), adapter)(**batch).logits, logits)
    resumed = load_adapter(fresh(base), adapter, trainable=True)
    trained = {name: p for name, p in resumed.named_parameters() if p.requires_grad}
    expected = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert list(trained) == list(expected)  # an optimizer's state is loaded by order
    assert all(torch.equal(p, expected[name]) for name, p in trained.items())

    merged = tmp_path / "merged"
    assert infer.main(["merge", "--adapter", str(adapter), "--out", str(merged)]) == 0
    assert capsys.readouterr().out == f"{merged}\n"
    model, info = OmniForConditionalGeneration.from_pretrained(merged, output_loading_info=True)
    assert type(model) is OmniForConditionalGeneration and not any(info.values())
    close(model(**batch).logits, logits)
    assert torch.equal(model.generate(**prompt, **options), answer)
    assert {path.name for path in merged.iterdir()} == {path.name for path in Path(base).iterdir()}
    stored, before = load_file(merged / "model.safetensors"), load_file(f"{base}/model.safetensors")
    assert stored.keys() == before.keys()
    assert load(str(merged))[1].tokenizer.get_vocab() == OmniProcessor.from_pretrained(base).tokenizer.get_vocab()
    with pytest.raises(OmniInputError, match="this is a LoRA adapter.*infer.py merge --adapter"):
        load(str(adapter))


@torch.no_grad()
def test_merging_rounds_once(base, tmp_path):
    """Into a bfloat16 base: float32 sums of the stored weights, rounded; everything else bit for bit."""
    folder = tmp_path / "bf16"
    fresh(base, torch.bfloat16).save_pretrained(folder)
    OmniProcessor.from_pretrained(base).save_pretrained(folder)
    torch.manual_seed(0)
    settings = {"presets": ["routed_experts", "attention_mamba"], "r": 2, "init_lora_weights": False}
    model = add_lora(fresh(folder, torch.bfloat16), settings | {"modules_to_save": ["vision_projector"]})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
            parameter.add_(0.1)
    save_adapter(model, tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    before, after = load_file(folder / "model.safetensors"), load_file(merged / "model.safetensors")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    scale, checked = 32 / 2, set()

    def check(name, delta):
        assert torch.equal(after[name], (before[name].float() + scale * delta).to(torch.bfloat16)), name
        assert not torch.equal(after[name], before[name])
        checked.add(name)

    at = "base_model.model.model.language_model.layers."
    for layer, projection in ((0, "in_proj"), (3, "in_proj"), *((2, f"{letter}_proj") for letter in "qkvo")):
        A, B = (saved[f"{at}{layer}.mixer.{projection}.lora_{x}.weight"] for x in "AB")
        check(f"language_model.backbone.layers.{layer}.mixer.{projection}.weight", B @ A)
    # two parameters of one module: PEFT nests them, the first of the module innermost
    for place, projection in ((".base_layer", "up_proj"), ("", "down_proj")):
        A, B = (saved[f"{at}1.mixer.experts{place}.lora_{x}.weight"] for x in "AB")
        for expert in range(8):
            delta = B.view(len(B), 2, 8)[:, :, expert] @ A.view(8, 2, -1)[expert]
            check(f"language_model.backbone.layers.1.mixer.experts.{expert}.{projection}.weight", delta)
    for name in ("mlp1.0.weight", "mlp1.1.weight", "mlp1.3.weight"):
        assert after[name].dtype == torch.bfloat16 and not torch.equal(after[name], before[name])
        checked.add(name)
    for name in before.keys() - checked:
        assert torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype, name


@torch.no_grad()
def test_nano(tmp_path):
    """The shipped checkpoint: adapters on everything, reloaded and merged, all in float32."""
    folder = tmp_path / "nano"
    fresh("nano").save_pretrained(folder)
    OmniProcessor.from_pretrained("nano").save_pretrained(folder)
    torch.manual_seed(0)
    model = add_lora(fresh(folder), {"presets": ALL, "r": 4, "alpha": 1}).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    processor = OmniProcessor.from_pretrained(folder)
    image = torch.randint(0, 255, (64, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    sound = (0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0)).numpy(), 16000)
    content = [{"type": "image", "image": image}, {"type": "audio", "audio": sound}, {"type": "text", "text": "what?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_tensors="pt"
    )
    logits, start = model(**inputs).logits, fresh(folder)(**inputs).logits
    assert (logits - start).abs().max() > 0.1
    save_adapter(model, tmp_path / "adapter")
    close(load_adapter(fresh(folder), tmp_path / "adapter")(**inputs).logits, logits)
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    model, again = load(str(merged))
    assert model.dtype == torch.float32
    close(model(**inputs).logits, logits, 3e-5)  # merged weights round otherwise
    for name in ("chat_template.jinja", "tokenizer.json", "processor_config.json", "generation_config.json"):
        assert (merged / name).is_file()
    assert again.image_processor.max_num_patches == processor.image_processor.max_num_patches


def test_adapters_and_bases_at_fault(base, tmp_path):
    model = add_lora(fresh(base), {"r": 2, "init_lora_weights": False})
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    save_adapter(model, adapter)
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    state, text = load_file(weights), config.read_text()

    def fails(message, **arguments):
        with pytest.raises(OmniInputError, match=message):
            merge_adapter(**{"adapter": adapter, "out": out} | arguments)
        assert not out.exists() and not list(tmp_path.glob("*.partial"))

    fails("adapter_config.json is not there", adapter=tmp_path)
    fails("base /nowhere/at/all: cannot be loaded", base="/nowhere/at/all")
    fails("does not fit the base .*nano", base="nano")
    with pytest.raises(OmniInputError, match="is already there"):
        merge_adapter(adapter, base)
    config.write_text(json.dumps(json.loads(text) | {"base_model_name_or_path": None}))
    fails("does not say what it was trained on")
    config.write_text(text)
    name = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != name}, weights)
    fails(f"1 weights differ, e.g. {re.escape(name)}")
    save_file(state | {name.replace(".0.", ".4."): state[name].clone()}, weights)
    fails("1 weights differ")
    save_file(state | {name: state[name] * torch.nan}, weights)
    fails("in_proj is not finite")
    save_file(state, weights)
    config.write_text(json.dumps({"peft_type": "IA3"}))
    fails("does not describe a LoRA adapter")
    assert infer.main(["merge", "--adapter", str(adapter), "--out", str(out)]) == 2


# --- several processes


def test_zero3(base, tmp_path):
    """Two gloo processes under ZeRO-3 (and expert parallelism below frozen experts) against one process."""
    pytest.importorskip("deepspeed")
    from lora_worker import CASES, ROWS, adapted_model, optimizer_of
    from lora_worker import batch_of as batch_of_process

    from modeling_omni.distributed import trained_tokens

    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/zero3.yaml"]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    command += [str(ROOT / "tests/lora_worker.py"), base, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for case in CASES:
        first, second = (json.loads((tmp_path / f"{case}-{process}.json").read_text()) for process in (0, 1))
        sound = ["audio", "audio_projector"] if case == "adapted" else ["audio_projector"]
        assert (first["waiting"], second["waiting"]) == ([[], []], [sound, []])
        model = adapted_model(base, case)
        assert first["table"] == lora_table(model) or case == "spread"  # a process's own experts are counted
        optimizer = optimizer_of(model)
        for step in range(len(ROWS)):
            batches = [batch_of_process(step, process) for process in (0, 1)]
            tokens = sum(map(trained_tokens, batches))
            loss = sum(model(**batch, num_items_in_batch=tokens).loss for batch in batches)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert loss.item() == pytest.approx(first["losses"][step], abs=1e-5)
        save_adapter(model, tmp_path / "one")
        alone, spread = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", case))
        assert alone.keys() == spread.keys()
        for name, value in alone.items():
            close(spread[name], value)
        load_adapter(fresh(base), tmp_path / case)


# --- 4 bits


@pytest.mark.parametrize("resumed", [None, Path("step-1")])  # every stage resumes above the base that it began on
def test_4bit_needs_bitsandbytes_and_a_gpu(resumed):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(OmniInputError, match="needs bitsandbytes|needs a CUDA GPU"):
        start_lora(tiny_model(), {"base_4bit": True}, resumed, 0)


def test_4bit_experts_train_adapters_above():
    """On the CPU kernels of bitsandbytes: the same as a model whose experts are rounded to 4 bits and back."""
    pytest.importorskip("bitsandbytes")
    batch = batch_of([4, ("image", 2, 4), 20])
    # rows of 64, as bitsandbytes' blocks: its CPU kernel errs by twice as much on shorter ones
    sizes = {"hybrid_override_pattern": "ME*E", "hidden_size": 64, "moe_intermediate_size": 64}
    model = tiny_model(llm_config=LLM | sizes).train()
    rounded = copy.deepcopy(model)
    quantize_experts_4bit(model, "cpu")
    for ours, other in zip(model.model.language_model.layers, rounded.model.language_model.layers):
        if ours.kind == "E":
            for name in ("up_proj", "down_proj"):
                values, plain = getattr(ours.mixer.experts, name), getattr(other.mixer.experts, name)
                assert 0.01 < (values - plain).norm() / plain.norm() < 0.15
                plain.data.copy_(values)
            assert ours.mixer.experts.parametrizations.up_proj.original.dtype == torch.uint8
    results = []
    for one in (model, rounded):
        torch.manual_seed(0)
        one = add_lora(one, {"r": 2})
        one.activation_checkpointing_enable()
        loss = one(**batch).loss
        loss.backward()
        assert check_adapter_gradients(one, [batch]) == set()
        results.append([loss, *(p.grad for p in one.parameters() if p.requires_grad)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
