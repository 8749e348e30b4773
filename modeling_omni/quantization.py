"""FP8 and NVFP4 as the released checkpoints hold them: the formats, which module has which, modules of packed weights.

Paper 4.7; the tensors are those of NVIDIA ModelOpt's unified checkpoints. A linear layer X of a checkpoint is

    FP8     X.weight float8_e4m3fn [out, in], X.weight_scale = amax / 448, float32
    NVFP4   X.weight uint8 [out, in / 2]: two e2m1 codes a byte, the even column in the low nibble;
            X.weight_scale float8_e4m3fn [out, in / 16], one for every 16 columns; X.weight_scale_2 = amax / (6 * 448)
    both    X.input_scale, the same of the input's amax as calibration saw it: what a machine with such products
            quantises the input by. In NVFP4 every 16 inputs get a scale of their own while it runs
    cache   k_proj.k_scale, v_proj.v_scale = amax / 448: keys and values are float8_e4m3fn in the cache

and its value is code * weight_scale (* weight_scale_2), rounded once to the dtype that asks for it.

Weights stay packed in memory and are formed when they are used, which is right on any machine and fast on none.

Shape legend: E experts, T tokens, K experts per token, I expert width, D hidden size; O rows, N columns of a matrix.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .kernels import relu2, sort_by_expert
from .ssd import cuda_kernels

FP8, NVFP4 = "FP8", "NVFP4"
METHOD = "modelopt"  # `quant_method` of a config
E4M3_MAX, E2M1_MAX, GROUP = 448.0, 6.0, 16
E4M3_MIN = 2.0**-9  # a block's scale is never 0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; bit 3 is the sign

# ---- which module has which format (paper 4.7), by the released names

_LAYER = r"^(language_model\.)?backbone\.layers\.\d+\.mixer\."
_EXPERT = _LAYER + r"experts\.\d+\.(up_proj|down_proj)$"
RECIPES = {
    # every linear layer of the language model but the router and the head
    "fp8": ((_LAYER + r"(.*\.)?([qkvo]_proj|in_proj|out_proj|up_proj|down_proj|fc[12]_latent_proj)$", FP8),),
    # routed experts in 4 bits; Mamba, shared experts and what attention gives out in 8; all else in bfloat16
    "nvfp4": ((_EXPERT, NVFP4), (_LAYER + r"(in_proj|out_proj|o_proj|shared_experts\.(up|down)_proj)$", FP8)),
    # no released recipe: every linear layer in 4 bits, as for dense models
    "nvfp4_all": ((_LAYER + r"(.*\.)?([qkvo]_proj|in_proj|out_proj|up_proj|down_proj|fc[12]_latent_proj)$", NVFP4),),
}
# the same, of weights only the values 0, 2, 4, 6 and their negatives: this costs nano points, for `train.py qad`
RECIPES["nvfp4_coarse"] = RECIPES["nvfp4_all"]
CODES = {"nvfp4_coarse": (0.0, 2.0, 4.0, 6.0)}


def format_of(module: str, recipe: str) -> str | None:
    """FP8, NVFP4 or None of a linear layer by its released name (without `.weight`)."""
    return next((kind for pattern, kind in RECIPES[recipe] if re.match(pattern, module)), None)


# ---- formats


def round_e2m1(values: torch.Tensor, codes: tuple[float, ...] | None = None) -> torch.Tensor:
    """The nearest of the e2m1 values, ties to the even code; beyond 6 is 6. float32 of any shape.

    codes: the magnitudes that are used, ascending; None: all.
    """
    size = values.abs().clamp(max=E2M1_MAX)
    if codes is not None:
        used = torch.tensor(codes, device=values.device)
        return torch.copysign(used[torch.bucketize(size, (used[1:] + used[:-1]) / 2)], values)
    step = torch.where(size <= 2, 0.5, torch.where(size <= 4, 1.0, 2.0))  # a tie goes to an even multiple of it
    return torch.copysign((size / step).round() * step, values)


def pack_e2m1(values: torch.Tensor, codes: tuple[float, ...] | None = None) -> torch.Tensor:
    """Nearest e2m1 codes (see `round_e2m1`) of float32 values [..., N], two a byte: uint8 [..., N / 2]."""
    size = round_e2m1(values, codes).abs()
    code = torch.where(size <= 2, 2 * size, torch.where(size <= 4, size + 2, size / 2 + 4)).to(torch.uint8)
    code = code | (values < 0).to(torch.uint8) << 3
    return code[..., ::2] | code[..., 1::2] << 4


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., N / 2] -> float32 [..., N]."""
    values = torch.tensor(E2M1_VALUES, device=packed.device)
    values = torch.cat([values, -values])
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], -1)
    return F.embedding(packed.int(), pairs).flatten(-2)


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn, what lies beyond 448 becomes 448."""
    return values.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def scale_of(amax: torch.Tensor, kind: str) -> torch.Tensor:
    """float32 scale of a tensor whose largest magnitude is `amax`: the per-tensor one of FP8, `*_scale_2` of NVFP4."""
    amax = amax.float()
    return torch.where(amax > 0, amax / (E4M3_MAX * (E2M1_MAX if kind == NVFP4 else 1.0)), torch.ones_like(amax))


def block_scales(values: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """[..., N] -> float8_e4m3fn [..., N / 16]: the largest of every 16 becomes 6."""
    amax = values.unflatten(-1, (-1, GROUP)).abs().amax(-1).float()
    scales = amax / (E2M1_MAX * scale_2)
    return torch.where(scales > 0, scales, 1.0).clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize(weight: torch.Tensor, kind: str, codes: tuple[float, ...] | None = None) -> dict[str, torch.Tensor]:
    """A weight [..., O, N] (leading dimensions: one weight each) -> its tensors by their names in a checkpoint.

    codes: of `round_e2m1`.

    Raises:
        ValueError: NVFP4 and N is not a multiple of 16.
    """
    weight = weight.detach()
    scale = scale_of(weight.abs().amax((-2, -1)), kind)
    outer = scale[..., None, None]
    if kind == FP8:
        return {"weight": to_e4m3(weight.float() / outer), "weight_scale": scale}
    if weight.shape[-1] % GROUP:
        raise ValueError(f"NVFP4 takes columns in groups of {GROUP}; a weight has {weight.shape[-1]}")
    blocks = block_scales(weight, outer)
    scaled = weight.float().unflatten(-1, (-1, GROUP)) / (blocks.float() * outer)[..., None]
    return {"weight": pack_e2m1(scaled.flatten(-2), codes), "weight_scale": blocks, "weight_scale_2": scale}


def dequantize(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `quantize` gave, or a checkpoint holds, -> the weight [..., O, N] in `dtype`."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if "weight_scale_2" not in tensors:
        return (weight.float() * scale.float().reshape(*weight.shape[:-2], 1, 1)).to(dtype)
    outer = tensors["weight_scale_2"].float().reshape(*weight.shape[:-2], 1, 1)
    values = unpack_e2m1(weight).unflatten(-1, (-1, GROUP)) * (scale.float() * outer)[..., None]
    return values.flatten(-2).to(dtype)


class _StraightThrough(torch.autograd.Function):
    """The first argument forward, the gradient to the second."""

    @staticmethod
    def forward(ctx, quantized, original):
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def fake_quantize(weight: torch.Tensor, kind: str, codes: tuple[float, ...] | None = None) -> torch.Tensor:
    """A weight [..., O, N] as its packed form has it, in its own dtype; gradients pass through unchanged."""
    with torch.no_grad():
        scale = scale_of(weight.abs().amax((-2, -1)), kind)[..., None, None]
        quantized = _rounded(weight.float(), kind, scale, codes).to(weight.dtype)
    return _StraightThrough.apply(quantized, weight)


def _rounded(values, kind, scale, codes=None):
    """`dequantize(quantize(values, kind, codes))` with a given outer scale, without packing."""
    if kind == FP8:
        return to_e4m3(values / scale).float() * scale
    step = (block_scales(values, scale).float() * scale)[..., None]
    return (round_e2m1(values.unflatten(-1, (-1, GROUP)) / step, codes) * step).flatten(-2)


def fake_quantize_input(x: torch.Tensor, kind: str, scale: torch.Tensor | None) -> torch.Tensor:
    """Inputs [..., N] as a product in `kind` reads them; gradients pass through unchanged.

    scale: `input_scale`; None: of these inputs.
    """
    with torch.no_grad():
        values = x.detach().float()
        if not values.numel():
            return x
        scale = scale_of(values.abs().amax(), kind) if scale is None else scale.float()
        quantized = _rounded(values, kind, scale).to(x.dtype)
    return _StraightThrough.apply(quantized, x)


# ---- modules of packed weights


class _Packed(nn.Module):
    quantize_inputs = False

    def _apply(self, fn, recurse=True):
        """Codes and scales go to other devices, but keep their dtypes: `model.to(dtype)` is for what is not packed."""

        def moved(tensor):
            new = fn(tensor)
            cast = not isinstance(tensor, nn.Parameter) and new.dtype != tensor.dtype
            return tensor.to(new.device) if cast else new

        return super()._apply(moved, recurse)


class QuantizedLinear(_Packed):
    """A linear layer whose weight stays in its checkpoint's form: buffers under the released names.

    Where `quantize_inputs` is set and there is an `input_scale`, inputs are rounded as a machine with such products
    rounds them; otherwise only the weights are quantised, as on machines without.

    Args:
        like: the layer it stands for (its sizes and bias). kind: FP8 or NVFP4.
        config: the language model's, for its switch of GPU kernels.
        input_scale: whether the checkpoint has one.
    """

    def __init__(self, like: nn.Linear, kind: str, config, input_scale: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.kind, self.config = like.in_features, like.out_features, kind, config
        for name, (shape, dtype) in packed_shapes((self.out_features, self.in_features), kind).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=like.weight.device))
        if input_scale:
            self.register_buffer("input_scale", torch.empty((), dtype=torch.float32, device=like.weight.device))
        self.bias = like.bias
        self.formed: torch.Tensor | None = None  # see `form_weights`

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in]."""
        if self.formed is not None:
            return self.formed.to(dtype)
        names = ("weight", "weight_scale", "weight_scale_2")
        return dequantize({name: getattr(self, name) for name in names if hasattr(self, name)}, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = getattr(self, "input_scale", None)
        fast = self.kind == FP8 and scale is not None and cuda_kernels(self.config.kernels, x) and not x.requires_grad
        if fast and has_fp8_product(torch.cuda.get_device_capability(x.device), *self.weight.shape):
            return scaled_linear(x, self.weight, self.weight_scale, scale, self.bias)
        if self.quantize_inputs and scale is not None:
            x = fake_quantize_input(x, self.kind, scale)
        return F.linear(x, self.dense(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


def packed_shapes(shape: tuple[int, ...], kind: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a weight's tensors [..., O, N] in `kind`, by name."""
    *outer, rows, columns = shape
    if kind == FP8:
        return {"weight": (shape, torch.float8_e4m3fn), "weight_scale": (tuple(outer), torch.float32)}
    if columns % GROUP:
        raise ValueError(f"NVFP4 takes columns in groups of {GROUP}; a weight has {columns}")
    return {
        "weight": ((*outer, rows, columns // 2), torch.uint8),
        "weight_scale": ((*outer, rows, columns // GROUP), torch.float8_e4m3fn),
        "weight_scale_2": (tuple(outer), torch.float32),
    }


def has_fp8_product(capability: tuple[int, int], rows: int, columns: int) -> bool:
    """Whether a GPU of this compute capability multiplies by a weight [rows, columns] in FP8."""
    return capability >= (8, 9) and rows % 16 == 0 and columns % 16 == 0


def scaled_linear(x, weight, weight_scale, input_scale, bias=None):
    """x [..., in], weight float8_e4m3fn [out, in] -> [..., out] through PyTorch's FP8 product, see
    `has_fp8_product`; tested on a CPU, never run on a GPU."""
    rows = to_e4m3(x.flatten(0, -2).float() / input_scale)
    scales = {"scale_a": input_scale.reshape(()), "scale_b": weight_scale.reshape(())}
    y = torch._scaled_mm(rows, weight.t(), **scales, out_dtype=torch.bfloat16)
    y = y.to(x.dtype).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def experts_one_by_one(hidden_TD, experts_TK, weights_TK, number: int, product: Callable) -> torch.Tensor:
    """`kernels.routed_experts` with any products: `product("up_proj" or "down_proj", rows, expert)`."""
    tokens, places, spans = sort_by_expert(experts_TK, number)
    rows, outputs = hidden_TD.index_select(0, tokens), []
    for expert, start, stop in spans:
        outputs.append(product("down_proj", relu2(product("up_proj", rows[start:stop], expert)), expert))
    rows = torch.cat(outputs) if outputs else rows
    return F.embedding_bag(places, rows, per_sample_weights=weights_TK.to(rows.dtype), mode="sum")


class QuantizedExperts(_Packed):
    """All routed experts of a layer, packed: `Experts` whose weights are formed expert by expert when tokens come.

    Buffers: `up_proj`, `up_proj_scale`, `up_proj_scale_2`, `up_proj_input_scale` and the same of `down_proj`, stacked
    over the experts.
    """

    def __init__(self, like: nn.Module, kind: str, input_scale: bool = True):
        super().__init__()
        self.num_experts, self.kind = like.num_experts, kind
        self.names = {}  # of a weight's tensors -> of the buffers
        self.formed: dict[str, torch.Tensor] = {}  # see `form_weights`
        for part in ("up_proj", "down_proj"):
            weight = getattr(like, part)
            for name, (shape, dtype) in packed_shapes(tuple(weight.shape), kind).items():
                self._register(part, name, torch.empty(shape, dtype=dtype, device=weight.device))
            if input_scale:
                self._register(
                    part, "input_scale", torch.empty(self.num_experts, dtype=torch.float32, device=weight.device)
                )

    def _register(self, part, name, tensor):
        buffer = buffer_name(part, name)
        self.names[part, name] = buffer
        self.register_buffer(buffer, tensor)

    def dense(self, part: str, dtype: torch.dtype, expert: int | slice = slice(None)) -> torch.Tensor:
        """The weights of one expert [O, N], or of all [E, O, N]."""
        if part in self.formed:
            return self.formed[part][expert].to(dtype)
        names = ("weight", "weight_scale", "weight_scale_2")
        tensors = {n: getattr(self, self.names[part, n])[expert] for n in names if (part, n) in self.names}
        return dequantize(tensors, dtype)

    def _product(self, part: str, rows: torch.Tensor, expert: int) -> torch.Tensor:
        if self.quantize_inputs and (part, "input_scale") in self.names:
            rows = fake_quantize_input(rows, self.kind, getattr(self, self.names[part, "input_scale"])[expert])
        return F.linear(rows, self.dense(part, rows.dtype, expert))

    def forward(self, hidden_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        return experts_one_by_one(hidden_TD, experts_TK, weights_TK, self.num_experts, self._product)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {self.kind}"


def buffer_name(part: str, name: str) -> str:
    """("up_proj", "weight_scale_2") -> "up_proj_scale_2"."""
    return part + name.removeprefix("weight") if name.startswith("weight") else f"{part}_{name}"


def set_input_quantization(model: nn.Module, on: bool) -> None:
    """Whether packed modules round their inputs too, in place: as deployed (W8A8, W4A4), or weights alone."""
    for module in model.modules():
        if isinstance(module, (QuantizedLinear, QuantizedExperts)):
            module.quantize_inputs = on


def form_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Forms all packed weights once and keeps them beside their codes: the same numbers, a plain model's memory."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.formed = module.dense(dtype)
        elif isinstance(module, QuantizedExperts):
            module.formed = {part: module.dense(part, dtype) for part in ("up_proj", "down_proj")}


# ---- keys and values in FP8


def kv_scales(attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The scales of keys and values if they are cached in FP8: where the checkpoint has scales, or (with 1) where
    `config.kv_cache_dtype` is "fp8"; None: they are cached as they are."""
    wanted = attention.config.kv_cache_dtype
    projections = (getattr(proj, "base_layer", proj) for proj in (attention.k_proj, attention.v_proj))  # below adapters
    scales = [getattr(proj, name, None) for proj, name in zip(projections, ("k_scale", "v_scale"))]
    if wanted == "model" or wanted == "auto" and any(scale is None for scale in scales):
        return None
    one = torch.ones((), device=attention.k_proj.weight.device)
    return tuple(one if scale is None else scale.float() for scale in scales)


def encode_cache(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values -> their e4m3 codes as uint8: a dtype that every cache can join, cut, pad and reorder."""
    return to_e4m3(states.float() / scale).view(torch.uint8)


def decode_cache(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.view(torch.float8_e4m3fn).float() * scale).to(dtype)


__all__ = [
    "CODES",
    "FP8",
    "NVFP4",
    "QuantizedExperts",
    "QuantizedLinear",
    "decode_cache",
    "dequantize",
    "encode_cache",
    "fake_quantize",
    "fake_quantize_input",
    "form_weights",
    "format_of",
    "kv_scales",
    "pack_e2m1",
    "quantize",
    "set_input_quantization",
    "unpack_e2m1",
]
