"""FP8 and NVFP4 against NVIDIA ModelOpt (bytes it made, itself where it is installed), ml_dtypes and plain casts."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layout import released_tensors
from tiny_model import LLM, make_sample, prompt_of, tiny_config, tiny_model
from tiny_model import collate as collate_samples
from transformers import DynamicCache

from modeling_omni import OmniForConditionalGeneration, OmniInputError
from modeling_omni.lora import add_lora
from modeling_omni.modeling_language import Experts
from modeling_omni.quantization import (
    CODES,
    FP8,
    NVFP4,
    QuantizedExperts,
    QuantizedLinear,
    decode_cache,
    dequantize,
    encode_cache,
    fake_quantize,
    fake_quantize_input,
    form_weights,
    has_fp8_product,
    pack_e2m1,
    packed_shapes,
    quantize,
    scaled_linear,
    set_input_quantization,
    unpack_e2m1,
)
from modeling_omni.quantized_export import (
    calibrate,
    export_checkpoint,
    hf_quant_config,
    quantization_config,
    stored_as,
)
from modeling_omni.quantized_loading import packed_layers

ml_dtypes = pytest.importorskip("ml_dtypes")

# widths that NVFP4 can hold
SIZES = {"llm_config": LLM | {"hybrid_override_pattern": "ME*M-", "moe_intermediate_size": 32}}


def example(rows=2) -> torch.Tensor:
    """Values of many sizes, deterministic, the last group all zeros: [rows, 64 / rows]."""
    steps = torch.arange(64).float()
    x = ((steps * 0.7).sin() * (steps + 1).log()).reshape(rows, -1)
    x[-1, -16:] = 0
    return x


def random_weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- formats


def test_bytes_are_those_of_modelopt():
    """Made by nvidia-modelopt 0.47 (NVFP4QTensor.quantize, FP8QTensor.quantize) from `example()`."""
    found = quantize(example(), NVFP4)
    assert found["weight"].numpy().tobytes().hex() == "2055b3ee0d7647fcdf6067c3ff1e7647ecdf6167c3ff1d760000000000000000"
    assert found["weight_scale"].view(torch.uint8).numpy().tobytes().hex() == "797c7e38"
    assert found["weight_scale_2"].item() == float.fromhex("0x1.781d8a0000000p-10")
    found = quantize(example(), FP8)
    expected = (
        "0065707168e9f4f7f2497379786ceef9faf554777b796ef1fafcf65a787c7a6ef2fbfdf75e797d7b6ff3fcfdf8617a7e" + "00" * 16
    )
    assert found["weight"].view(torch.uint8).numpy().tobytes().hex() == expected
    assert found["weight_scale"].item() == float.fromhex("0x1.1a16280000000p-7")


def test_equals_modelopt_where_it_is_installed():
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    weight = 0.02 * random_weight(48, 160)
    tensor, scales, scale_2 = module.NVFP4QTensor.quantize(weight.clone(), 16)
    ours = quantize(weight, NVFP4)
    assert torch.equal(tensor._quantized_data, ours["weight"])
    assert torch.equal(scales.view(torch.uint8), ours["weight_scale"].view(torch.uint8))
    assert torch.equal(scale_2, ours["weight_scale_2"])
    back = tensor.dequantize(torch.float32, scale=scales, double_scale=scale_2, block_sizes={-1: 16})
    assert torch.equal(back, dequantize(ours))


def test_codes_equal_ml_dtypes():
    values = torch.cat([torch.linspace(-7, 7, 4097)[:-1], torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0])])
    codes = values.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(unpack_e2m1(pack_e2m1(values)).numpy(), codes.astype(np.float32))
    assert pack_e2m1(torch.tensor([0.5, -6.0])).tolist() == [0x1 | 0xF << 4]  # the even column in the low nibble
    weight = random_weight(32, 24)
    scale = np.float32(weight.abs().max().item()) / np.float32(448)
    expected = (weight.numpy() / scale).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(quantize(weight, FP8)["weight"].view(torch.uint8).numpy(), expected)


def test_nvfp4_equals_numpy():
    """The whole of it again, with numpy and ml_dtypes, for a stack of weights."""
    stack = random_weight(3, 16, 48) * torch.tensor([1e-3, 1.0, 30.0])[:, None, None]
    found = quantize(stack, NVFP4)
    for i, weight in enumerate(stack.numpy()):
        scale_2 = np.abs(weight).max() / np.float32(6 * 448)
        groups = weight.reshape(16, 3, 16)
        scales = (np.abs(groups).max(-1) / (6 * scale_2)).astype(ml_dtypes.float8_e4m3fn)
        step = scales.astype(np.float32) * scale_2
        codes = (groups / step[..., None]).astype(ml_dtypes.float4_e2m1fn)
        assert np.array_equal(found["weight_scale"][i].view(torch.uint8).numpy(), scales.view(np.uint8))
        expected = (codes.astype(np.float32) * step[..., None]).reshape(16, 48)
        assert np.array_equal(dequantize({name: t[i] for name, t in found.items()}).numpy(), expected)
        nibbles = codes.view(np.uint8).reshape(16, 48)
        assert np.array_equal(found["weight"][i].numpy(), nibbles[:, ::2] | nibbles[:, 1::2] << 4)


@pytest.mark.parametrize("kind", [FP8, NVFP4])
def test_what_is_packed_again_stays_what_it_is(kind):
    """Values that a format holds stay: in FP8 by the same codes, in NVFP4 perhaps by another scale of their group."""
    first = quantize(random_weight(64, 64), kind)
    again = quantize(dequantize(first), kind)
    assert torch.equal(dequantize(first), dequantize(again))
    if kind == FP8:
        assert torch.equal(first["weight"].view(torch.uint8), again["weight"].view(torch.uint8))


@pytest.mark.parametrize("kind", [FP8, NVFP4])
def test_fake_quantisation_is_the_packed_value_with_a_straight_gradient(kind):
    weight = random_weight(32, 32).requires_grad_()
    fake = fake_quantize(weight, kind)
    assert torch.equal(fake, dequantize(quantize(weight, kind))) and not torch.equal(fake, weight)
    if kind == NVFP4:
        codes = CODES["nvfp4_coarse"]
        packed = quantize(weight, kind, codes)
        assert torch.equal(fake_quantize(weight, kind, codes), dequantize(packed))
        assert set(unpack_e2m1(packed["weight"]).abs().unique().tolist()) == set(codes)
    grad = random_weight(32, 32, seed=1)
    fake.backward(grad)
    assert torch.equal(weight.grad, grad)


def test_inputs_are_rounded_with_calibrated_scales():
    x = 3 * random_weight(5, 32)
    scale = torch.tensor(2.0 / 448)
    expected = (x.numpy() / np.float32(scale)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(fake_quantize_input(x, FP8, scale).numpy(), expected * np.float32(scale))
    fake = fake_quantize_input(x, NVFP4, x.abs().max() / (6 * 448))
    assert torch.equal(fake, dequantize(quantize(x, NVFP4)))  # the same scales when calibration saw just these


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_configs_are_those_that_modelopt_makes(recipe):
    module = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    layers = {f"language_model.backbone.layers.{i}.mixer.in_proj": FP8 for i in (0, 4)}
    if recipe == "nvfp4":
        layers |= {f"language_model.backbone.layers.1.mixer.experts.{i}.up_proj": NVFP4 for i in range(12)}
    config = quantization_config(layers, recipe)
    assert module.convert_hf_quant_config_format(hf_quant_config(config)) == config


# ---- sizes


@pytest.mark.parametrize("recipe, tensors, size, gib", [
    ("fp8", 19_369, 35_166_885_448, 32.8), ("nvfp4", 25_221, 22_389_724_600, 20.9),
])  # fmt: skip
def test_sizes_at_full_size_are_the_papers(recipe, tensors, size, gib):
    stored, parts, kinds = {}, {}, {}
    for name, (shape, dtype) in released_tensors().items():
        own = stored_as(name, tuple(shape), dtype, recipe)
        stored |= own
        count = sum(math.prod(s) * d.itemsize for s, d in own.values())
        part, elements = name.split(".")[0], math.prod(shape)
        before = parts.get(part, (0, 0))
        parts[part] = before[0] + count, before[1] + elements
        for key, (_, own_dtype) in own.items():
            if key == name and own_dtype in (torch.uint8, torch.float8_e4m3fn):
                kinds[own_dtype] = kinds.get(own_dtype, 0) + 1
    total, elements = (sum(values) for values in zip(*parts.values()))
    assert len(stored) == tensors and total == size
    assert total / 2**30 == pytest.approx(gib, rel=0.01)
    bits, language = 8 * total / elements, 8 * parts["language_model"][0] / parts["language_model"][1]
    # the paper's two numbers have different denominators: all weights, and those of the language model
    assert (bits if recipe == "fp8" else language) == pytest.approx(8.5 if recipe == "fp8" else 4.98, rel=0.01)
    expected = {torch.float8_e4m3fn: 6004} if recipe == "fp8" else {torch.uint8: 5888, torch.float8_e4m3fn: 98}
    assert kinds == expected
    shapes = [
        stored[f"language_model.backbone.layers.1.mixer.experts.0.{p}.weight"][0] for p in ("up_proj", "down_proj")
    ]
    assert shapes == ([(1856, 2688), (2688, 1856)] if recipe == "fp8" else [(1856, 1344), (2688, 928)])


# ---- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint in bfloat16, its model in float32, and the scales of one batch."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(**SIZES).save_pretrained(folder / "fp32")
    OmniForConditionalGeneration.from_pretrained(folder / "fp32", dtype=torch.bfloat16).save_pretrained(folder / "bf16")
    model = OmniForConditionalGeneration.from_pretrained(folder / "bf16", dtype=torch.float32).eval()
    return folder, model, calibrate(model, [text_batch()])


def text_batch():
    return collate_samples([make_sample([9, ("image", 4, 6), 5], 0), make_sample([20, ("audio", [40])], 1)])


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_exported_checkpoints_load_packed_and_are_saved_as_they_were(checkpoint, recipe, tmp_path):
    folder, plain, scales = checkpoint
    about = export_checkpoint(folder / "bf16", tmp_path / "packed", recipe, scales, shard_bytes=60_000)
    assert len(list((tmp_path / "packed").glob("model-*.safetensors"))) > 2  # written shard by shard, with an index
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    layers = model.model.language_model.layers
    assert type(layers[0].mixer.in_proj) is QuantizedLinear and type(layers[1].mixer.experts) is QuantizedExperts
    assert layers[0].mixer.in_proj.weight.dtype == torch.float8_e4m3fn
    assert layers[1].mixer.experts.up_proj.dtype == (torch.float8_e4m3fn if recipe == "fp8" else torch.uint8)
    assert (type(layers[2].mixer.q_proj) is QuantizedLinear) == (recipe == "fp8")
    assert layers[1].mixer.gate.weight.dtype == model.lm_head.weight.dtype == torch.float32
    stored = {}
    for path in (tmp_path / "packed").glob("*.safetensors"):
        stored |= load_file(path)
    assert about["bytes"] == sum(t.nbytes for t in stored.values())
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    found, kv = packed_layers(list((tmp_path / "packed").glob("*.safetensors")))
    assert len(kv) == 2 and config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    if recipe == "nvfp4":
        assert {name: kind for name, (kind, _) in found.items()} == {
            name: value["quant_algo"] for name, value in config["quantized_layers"].items()
        }
    # what is saved is what was loaded, bit for bit
    bf16 = OmniForConditionalGeneration.from_pretrained(tmp_path / "packed")
    assert bf16.dtype == torch.bfloat16
    bf16.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert sorted(again) == sorted(stored)
    for name, tensor in stored.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape, name
        assert torch.equal(again[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == config
    # plain weights from it: by file, and in memory
    assert (tmp_path / "packed" / "hf_quant_config.json").is_file()
    export_checkpoint(tmp_path / "packed", tmp_path / "plain", "bf16")
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    unpacked = OmniForConditionalGeneration.from_pretrained(tmp_path / "plain")
    state = unpacked.state_dict()
    in_memory = bf16.dequantize(torch.bfloat16).state_dict()
    assert sorted(in_memory) == sorted(state) == sorted(plain.state_dict())
    assert all(torch.equal(state[name], in_memory[name]) for name in state)
    layer = "language_model.backbone.layers.1.mixer.experts.3.down_proj"
    own = {
        key: stored[f"{layer}.{key}"]
        for key in ("weight", "weight_scale", "weight_scale_2")
        if f"{layer}.{key}" in stored
    }
    expert = state["model.language_model.layers.1.mixer.experts.down_proj"][3]
    assert torch.equal(dequantize(own, torch.bfloat16), expert)
    # and it computes what plain weights of the same values compute
    values = OmniForConditionalGeneration(plain.config)
    exact = {name: tensor.float() for name, tensor in state.items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            exact[f"{name}.weight"] = module.dense(torch.float32)
        elif isinstance(module, QuantizedExperts):
            exact |= {f"{name}.{part}": module.dense(part, torch.float32) for part in ("up_proj", "down_proj")}
    values.load_state_dict(exact)
    batch = prompt_of(text_batch())
    with torch.no_grad():
        expected, logits = values.eval()(**batch, use_cache=False).logits, model(**batch, use_cache=False).logits
        original = plain(**batch, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert 1e-3 < (logits - original).norm() / original.norm() < 0.5


def test_scalars_with_a_dimension_and_without_input_scales_load(checkpoint, tmp_path):
    """As some exporters write them: scales of shape [1], weights alone quantised."""
    folder, _, scales = checkpoint
    export_checkpoint(folder / "bf16", tmp_path / "a", "nvfp4", scales)
    path = tmp_path / "a" / "model.safetensors"
    stored = {n: t.reshape(1) if t.dim() == 0 and t.dtype == torch.float32 else t for n, t in load_file(path).items()}
    save_file({name: t for name, t in stored.items() if not name.endswith("input_scale")}, path, {"format": "pt"})
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "a", dtype=torch.float32)
    layers = model.model.language_model.layers
    assert layers[0].mixer.in_proj.weight_scale.shape == layers[2].mixer.k_proj.k_scale.shape == ()
    assert layers[1].mixer.experts.up_proj_scale_2.shape == (8,) and not hasattr(layers[0].mixer.in_proj, "input_scale")
    set_input_quantization(model, True)  # has nothing to go by, and changes nothing
    assert model(**prompt_of(text_batch())).logits.isfinite().all()
    layer = "language_model.backbone.layers.0.mixer.in_proj"
    save_file(stored | {f"{layer}.weight": stored[f"{layer}.weight"].view(torch.int8)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="its weight is I8"):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "a")


def test_packed_folders_that_are_broken_are_refused(checkpoint, tmp_path):
    """Each of these loaded, with weights of noise or wrong numbers, or raised something that says nothing."""
    folder, _, scales = checkpoint
    for recipe in ("fp8", "nvfp4"):
        export_checkpoint(folder / "bf16", tmp_path / recipe, recipe, scales)
    layers = "language_model.backbone.layers"
    expert, proj = f"{layers}.1.mixer.experts.3.up_proj", f"{layers}.0.mixer.in_proj"

    def without(name):
        return lambda stored: stored.pop(name)

    def changed(name, change):
        return lambda stored: stored.update({name: change(stored[name])})

    for recipe, edit, match in (
        ("fp8", without(f"{proj}.weight_scale"), "has no weight_scale"),  # codes were taken for weights
        ("fp8", without(f"{expert}.weight_scale"), "has no weight_scale"),
        ("nvfp4", without(f"{expert}.weight_scale_2"), "has no weight_scale_2"),
        ("nvfp4", without(f"{layers}.0.norm.weight"), "lacks 1 tensors"),  # random weights instead
        ("nvfp4", without("language_model.backbone.embeddings.weight"), "lacks 1 tensors"),
        ("nvfp4", changed(f"{expert}.weight_scale", lambda scale: scale.view(torch.uint8)), "weight_scale is U8"),
        ("nvfp4", changed(f"{expert}.weight_scale", lambda scale: scale[:, :1]), r"weight_scale is F8_E4M3 \[32, 1\]"),
        ("nvfp4", changed(f"{expert}.weight", lambda weight: weight[:-1]), "weight_scale is F8_E4M3"),
        ("fp8", changed(f"{proj}.weight_scale", lambda scale: scale.repeat(8)), r"weight_scale is F32 \[8\]"),
        ("nvfp4", lambda stored: stored.update({f"{proj}.pre_quant_scale": torch.full((32,), 2.0)}), "does not have"),
    ):
        stored = load_file(tmp_path / recipe / "model.safetensors")
        edit(stored)
        broken = tmp_path / "broken"
        shutil.copytree(tmp_path / recipe, broken)
        save_file({name: t.contiguous() for name, t in stored.items()}, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(OmniInputError, match=match):
            OmniForConditionalGeneration.from_pretrained(broken)
        if "has no" in match:  # neither do they become plain
            with pytest.raises(OmniInputError, match=match):
                export_checkpoint(broken, tmp_path / "plain", "bf16")
        shutil.rmtree(broken)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    for wrong in (config | {"quantization_config": {}}, {k: v for k, v in config.items() if k[:5] != "quant"}):
        (tmp_path / "fp8" / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(OmniInputError, match="its weights are packed"):
            OmniForConditionalGeneration.from_pretrained(tmp_path / "fp8")
        with pytest.raises(OmniInputError, match="packed already"):
            export_checkpoint(tmp_path / "fp8", tmp_path / "again", "nvfp4", scales)
    # scales that nothing here reads do no harm
    stored = load_file(tmp_path / "nvfp4" / "model.safetensors") | {f"{layers}.2.mixer.q_proj.q_scale": torch.ones(1)}
    save_file(stored, tmp_path / "nvfp4" / "model.safetensors", {"format": "pt"})
    assert OmniForConditionalGeneration.from_pretrained(tmp_path / "nvfp4").dtype == torch.bfloat16


def test_casting_a_model_leaves_codes_and_scales_alone(checkpoint, tmp_path):
    folder, _, scales = checkpoint
    export_checkpoint(folder / "bf16", tmp_path / "a", "nvfp4", scales)
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "a", dtype=torch.float32)
    modules = [module for module in model.modules() if isinstance(module, (QuantizedLinear, QuantizedExperts))]
    before = [{name: buffer.clone() for name, buffer in module.named_buffers()} for module in modules]
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for module, buffers in zip(modules, before, strict=True):
        for name, buffer in module.named_buffers():
            codes, expected = (t.reshape(-1).view(torch.uint8) for t in (buffer, buffers[name]))
            assert buffer.dtype == buffers[name].dtype and torch.equal(codes, expected), name
    assert model.to("meta").model.language_model.layers[1].mixer.experts.up_proj.device.type == "meta"


def test_exports_that_cannot_be(checkpoint, tmp_path):
    folder, _, scales = checkpoint
    with pytest.raises(OmniInputError, match="unknown"):
        export_checkpoint(folder / "bf16", tmp_path / "a", "int3", scales)
    with pytest.raises(OmniInputError, match="calibration saw no"):
        export_checkpoint(folder / "bf16", tmp_path / "a", "fp8", {})
    with pytest.raises(OmniInputError, match="its weights are plain"):
        export_checkpoint(folder / "bf16", tmp_path / "a", "bf16")
    export_checkpoint(folder / "bf16", tmp_path / "a", "fp8", scales)
    with pytest.raises(OmniInputError, match="packed already"):
        export_checkpoint(tmp_path / "a", tmp_path / "b", "nvfp4", scales)
    with pytest.raises(OmniInputError, match="already there"):
        export_checkpoint(folder / "bf16", tmp_path / "a", "fp8", scales)
    with pytest.raises(OmniInputError, match="multiple of 16"):
        stored_as("backbone.layers.1.mixer.experts.0.down_proj.weight", (32, 24), torch.bfloat16, "nvfp4")
    with pytest.raises(OmniInputError, match="calibration saw values that are not finite"):
        export_checkpoint(folder / "bf16", tmp_path / "b", "nvfp4", {name: amax / 0 for name, amax in scales.items()})
    broken, layer = tmp_path / "broken", "language_model.backbone.layers.1.mixer.experts.0.up_proj.weight"
    shutil.copytree(folder / "bf16", broken)
    stored = load_file(broken / "model.safetensors")
    stored[layer][0, 0] = torch.nan  # which 4 bits cannot hold
    save_file(stored, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(OmniInputError, match="up_proj.weight has values that are not finite"):
        export_checkpoint(broken, tmp_path / "b", "nvfp4", scales)
    (broken / "model.safetensors").rename(broken / "shard.safetensors")
    (broken / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(OmniInputError, match="is no index of weights"):
        export_checkpoint(broken, tmp_path / "b", "nvfp4", scales)
    (broken / "config.json").write_text("{")
    with pytest.raises(OmniInputError, match="is no JSON"):
        export_checkpoint(broken, tmp_path / "b", "nvfp4", scales)
    assert not list(tmp_path.glob("*.partial"))


def test_draft_heads_stay_as_they_are(tmp_path):
    """Calibration runs the trunk; neither the head's weights nor its keys and values are in 8 bits."""
    heads = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    model = tiny_model(llm_config=SIZES["llm_config"] | heads)
    model.save_pretrained(tmp_path / "plain")
    scales = calibrate(model, [text_batch()])
    about = export_checkpoint(tmp_path / "plain", tmp_path / "packed", "fp8", scales)
    loaded = OmniForConditionalGeneration.from_pretrained(tmp_path / "packed")
    assert about["layers"][FP8] == sum(name.endswith("input_scale") for name in scales)
    assert type(loaded.mtp.layers[0].mixer.k_proj) is torch.nn.Linear
    assert [name for name, _ in loaded.named_buffers() if name.endswith("k_scale")] == [
        "model.language_model.layers.2.mixer.k_proj.k_scale"
    ]


def test_calibration_sees_the_largest_inputs(checkpoint):
    _, model, scales = checkpoint
    seen, layers = {}, model.model.language_model.layers
    moe, attention = layers[1].mixer, layers[2].mixer
    handles = [
        module.register_forward_hook(lambda m, inputs, output, name=name: seen.update({name: (inputs, output)}))
        for name, module in {"experts": moe.experts, "up": moe.shared_experts.up_proj, "k": attention.k_proj}.items()
    ]
    batch = prompt_of(text_batch())
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    prefix = "language_model.backbone.layers"
    assert scales[f"{prefix}.1.mixer.shared_experts.up_proj.input_scale"] == seen["up"][0][0].abs().max()
    assert scales[f"{prefix}.2.mixer.k_proj.k_scale"] == seen["k"][1].abs().max()
    hidden, experts, _ = seen["experts"][0]
    reached = set(experts.flatten().tolist())
    for expert in range(8):
        rows = hidden[(experts == expert).any(-1)] if expert in reached else hidden
        up = scales[f"{prefix}.1.mixer.experts.{expert}.up_proj.input_scale"]
        assert up == rows.abs().max() if expert in reached else up > 0
        if expert in reached:
            inner = (rows @ moe.experts.up_proj[expert].t()).relu().square().abs().max()
            down = scales[f"{prefix}.1.mixer.experts.{expert}.down_proj.input_scale"]
            torch.testing.assert_close(down, inner.detach())


# ---- modules


@pytest.mark.parametrize("kind", [FP8, NVFP4])
def test_packed_experts_equal_plain_ones_forward_and_backward(kind):
    config = tiny_config(**SIZES).llm_config
    plain = Experts(config)
    packed = QuantizedExperts(plain, kind)
    for part in ("up_proj", "down_proj"):
        tensors = quantize(random_weight(*getattr(plain, part).shape) / 5, kind)
        for name, tensor in tensors.items():
            getattr(packed, packed.names[part, name]).copy_(tensor)
        getattr(plain, part).data.copy_(dequantize(tensors))
    hidden = random_weight(13, 32)
    experts = torch.stack([torch.randperm(8)[:3] for _ in range(13)])
    weights = torch.rand(13, 3)
    results = []
    for module in (plain, packed):
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        y = module(x, experts, w)
        y.backward(hidden)
        results.append((y, x.grad, w.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed(hidden[:1], experts[:1], weights[:1]), results[0][0][:1], rtol=1e-5, atol=1e-5)
    form_weights(packed, torch.float32)
    assert torch.equal(packed(hidden, experts, weights), results[1][0])


def test_the_product_for_gpus_rounds_inputs_as_the_plain_one_does():
    weight, x = quantize(random_weight(48, 32), FP8), random_weight(2, 7, 32)
    scale = x.abs().max() / 448
    y = scaled_linear(x, weight["weight"], weight["weight_scale"], scale)
    expected = fake_quantize_input(x, FP8, scale) @ dequantize(weight).t()
    assert y.shape == (2, 7, 48) and y.dtype == x.dtype
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-3)  # it gives bfloat16


def test_the_product_for_gpus_is_taken_where_there_is_one():
    """An A100 has none (8, 0), and none takes sizes that are no multiples of 16: weights are formed there."""
    for capability, rows, columns, expected in (
        ((7, 5), 32, 32, False), ((8, 0), 4096, 2688, False), ((8, 9), 10304, 2688, True),
        ((9, 0), 10304, 2688, True), ((10, 0), 32, 40, False), ((12, 0), 100, 32, False),
    ):  # fmt: skip
        assert has_fp8_product(capability, rows, columns) == expected, (capability, rows, columns)


def test_inputs_are_quantised_only_when_asked(checkpoint, tmp_path):
    folder, plain, scales = checkpoint
    export_checkpoint(folder / "bf16", tmp_path / "a", "nvfp4", scales)
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    layer, x = model.model.language_model.layers[0].mixer.in_proj, random_weight(4, 32)
    expected = x @ layer.dense(torch.float32).t()
    torch.testing.assert_close(layer(x), expected)
    set_input_quantization(model, True)
    rounded = fake_quantize_input(x, FP8, layer.input_scale)
    torch.testing.assert_close(layer(x), rounded @ layer.dense(torch.float32).t())
    batch = prompt_of(text_batch())
    with torch.no_grad():
        error = model(**batch, use_cache=False).logits - plain(**batch, use_cache=False).logits
    assert 0 < error.norm() < plain(**batch, use_cache=False).logits.norm()


# ---- cache


def cache_model(dtype=torch.float32):
    """A model whose keys and values are cached in FP8, and the same whose projections give out what FP8 holds."""
    model, rounded = tiny_model(**SIZES).to(dtype), tiny_model(**SIZES).to(dtype)
    for one in (model, rounded):
        mixer = one.model.language_model.layers[2].mixer
        for part in ("k", "v"):
            proj, scale = getattr(mixer, f"{part}_proj"), torch.tensor(0.01 if part == "k" else 0.02)
            if one is model:
                proj.register_buffer(f"{part}_scale", scale)
            else:  # a cast of PyTorch's own
                proj.register_forward_hook(
                    lambda m, i, y, s=scale: ((y.float() / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s).to(
                        y.dtype
                    )
                )
    return model, rounded


def test_fp8_cache_equals_rounded_keys_and_values():
    model, rounded = cache_model()
    batch = prompt_of(text_batch())
    with torch.no_grad():
        expected = rounded(**batch, use_cache=False).logits
        output = model(**batch, use_cache=True)
        torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
        plain = model(**batch, use_cache=False).logits  # nothing is cached: nothing is rounded
        assert not torch.allclose(plain, expected, atol=1e-3)
        step = torch.full((2, 1), 50)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        after = model(input_ids=step, attention_mask=mask, past_key_values=output.past_key_values).logits
        longer = batch | {"input_ids": torch.cat([batch["input_ids"], step], 1), "attention_mask": mask}
        longer["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 1))
        torch.testing.assert_close(after[:, -1], rounded(**longer, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-5)
    cache = output.past_key_values
    keys = cache.layers[2].keys
    assert keys.dtype == torch.uint8 and keys.element_size() == 1
    assert cache.get_recurrent_state(0).dtype == torch.float32


def test_adapters_leave_the_cache_in_fp8():
    model, _ = cache_model()
    add_lora(model, {"presets": [], "target_modules": ["k_proj", "v_proj"]})
    cache = DynamicCache(config=model.config.llm_config)
    model(**prompt_of(text_batch()), past_key_values=cache)
    assert cache.layers[2].keys.dtype == cache.layers[2].values.dtype == torch.uint8


def test_every_way_of_generating_works_with_the_fp8_cache():
    model, rounded = cache_model()
    model.generation_config.eos_token_id = rounded.generation_config.eos_token_id = None
    batch = prompt_of(text_batch())
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = rounded.generate(**batch, **options)
    for more in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}):
        assert torch.equal(model.generate(**batch, **options, **more), expected), more
    # dropping visual tokens scores the keys that it reads from the cache
    kept = model.generate(**batch, **options, visual_keep=0.5)
    assert torch.equal(kept, rounded.generate(**batch, **options, visual_keep=0.5))
    beams = model.generate(**batch, **options, num_beams=2)
    assert torch.equal(beams, rounded.generate(**batch, **options, num_beams=2))


def test_the_cache_in_bfloat16_keeps_mamba_states_in_float32_and_takes_a_switch():
    model, _ = cache_model(torch.bfloat16)
    config = model.config.llm_config
    cache = DynamicCache(config=config)
    model(**prompt_of(text_batch()), past_key_values=cache)
    assert cache.layers[2].values.dtype == torch.uint8 and cache.get_recurrent_state(3).dtype == torch.float32
    config.kv_cache_dtype = "model"
    cache = DynamicCache(config=config)
    model(**prompt_of(text_batch()), past_key_values=cache)
    assert cache.layers[2].values.dtype == torch.bfloat16
    plain = tiny_model(**SIZES)
    plain.config.llm_config.kv_cache_dtype = "fp8"  # scales of 1
    cache = DynamicCache(config=plain.config.llm_config)
    plain(**prompt_of(text_batch()), past_key_values=cache)
    keys = cache.layers[2].keys
    assert keys.dtype == torch.uint8
    assert torch.equal(encode_cache(decode_cache(keys, torch.ones(()), torch.float32), torch.ones(())), keys)
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        tiny_config(llm_config=LLM | {"kv_cache_dtype": "int8"})
    assert "kv_cache_dtype" not in plain.config.llm_config.to_dict()


def test_shapes_of_packed_weights():
    for kind in (FP8, NVFP4):
        tensors = quantize(random_weight(2, 8, 32), kind)
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == packed_shapes((2, 8, 32), kind)
