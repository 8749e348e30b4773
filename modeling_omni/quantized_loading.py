"""Loads checkpoints in FP8 and NVFP4 as published: transformers' `from_pretrained` finds this under "modelopt".

Which layers are packed is read off the files: a layer with a `weight_scale` is, in FP8 or NVFP4 by its weight's dtype.
So no list of names in a config is needed, and a checkpoint of any mix loads. `save_pretrained` writes the same tensors
back; `model.dequantize(dtype)` puts plain layers in.
"""

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming, apply_renamings
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import packed_layers
from .modeling_language import Experts
from .quantization import FP8, METHOD, QuantizedExperts, QuantizedLinear, buffer_name

TENSORS = ("weight", "weight_scale", "weight_scale_2", "input_scale")


@register_quantization_config(METHOD)
class ModelOptConfig(QuantizationConfigMixin):
    """`quantization_config` of a released config.json, kept as it is."""

    def __init__(self, quant_method: str = METHOD, **keys):
        self.quant_method = quant_method
        self.__dict__ |= keys


def pack_modules(model: nn.Module, layers: dict[str, tuple[str, bool]], kv: Iterable[tuple[str, str]] = ()) -> None:
    """Puts empty packed modules in place of those in `layers`, which has our names, experts as `....experts.3.up_proj`.

    kv: (layer, "k_scale" or "v_scale") of the scales of the KV cache.

    Raises:
        ValueError: a layer that is none of ours, or experts of one layer in several formats.
    """
    experts = {}
    for name, (kind, input_scale) in layers.items():
        stack = re.fullmatch(r"(.*\.mixer\.experts)\.\d+\.(?:up|down)_proj", name)
        if stack:
            experts.setdefault(stack[1], set()).add((kind, input_scale))
            continue
        module = model.get_submodule(name)
        if type(module) is not nn.Linear:
            raise ValueError(f"{name} is packed in the checkpoint, but is no linear layer of this model")
        model.set_submodule(name, QuantizedLinear(module, kind, model.config.llm_config, input_scale))
    for name, kinds in experts.items():
        module = model.get_submodule(name)
        if len(kinds) > 1 or type(module) is not Experts:
            raise ValueError(f"{name}: experts in several formats ({kinds}), or a {type(module).__name__}")
        model.set_submodule(name, QuantizedExperts(module, *kinds.pop()))
    for name, scale in kv:
        module = model.get_submodule(name)
        module.register_buffer(scale, torch.empty((), dtype=torch.float32, device=module.weight.device))


def unpack_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts plain layers of `dtype` in place of the packed ones; the KV cache's scales go."""
    for name, module in list(model.named_modules()):
        for scale in ("k_scale", "v_scale"):
            module._buffers.pop(scale, None)
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            plain.weight = nn.Parameter(module.dense(dtype))
            plain.bias = module.bias
        elif isinstance(module, QuantizedExperts):
            with torch.device("meta"):
                plain = Experts(model.config.llm_config)
            plain.up_proj, plain.down_proj = (nn.Parameter(module.dense(p, dtype)) for p in ("up_proj", "down_proj"))
        else:
            continue
        model.set_submodule(name, plain.train(module.training))


@register_quantizer(METHOD)
class ModelOptQuantizer(HfQuantizer):
    """What `from_pretrained` asks of a quantisation method."""

    requires_calibration = True
    is_trainable = True  # of adapters in layers that are not packed

    def is_serializable(self):
        return True

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if checkpoint_files is None:
            raise ValueError("a checkpoint in FP8 or NVFP4 is loaded from its files, not from a state_dict")
        renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        layers, kv = packed_layers(checkpoint_files)
        present = dict(model.named_modules())

        def ours(layer):
            name = apply_renamings(layer, renamings)
            return name if name.split(".experts.")[0] in present else name.removeprefix("model.")

        kv = [(ours(layer), scale) for layer, _, scale in (name.rpartition(".") for name in kv)]
        kv = [(layer, scale) for layer, scale in kv if layer in present]
        pack_modules(model, {ours(layer): kind for layer, kind in layers.items()}, kv)

    def update_weight_conversions(self, weight_conversions, model):
        """Stacks the tensors of packed experts into the buffers of `QuantizedExperts`."""
        if not any(isinstance(module, QuantizedExperts) for module in model.modules()):
            return weight_conversions
        stacks = [
            WeightConverter(
                source_patterns=f"mixer.experts.*.{part}.{name}",
                target_patterns=f"mixer.experts.{buffer_name(part, name)}",
                operations=[MergeModulelist(dim=0)],
            )
            for part in ("up_proj", "down_proj")
            for name in TENSORS[1:]
        ]
        return weight_conversions + stacks

    def param_needs_quantization(self, model, param_name, **kwargs):
        return param_name.endswith("_scale") or param_name.endswith("_scale_2")  # scalars may be [] or [1] on disk

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            for key, buffer in list(module._buffers.items()):
                packed = isinstance(module, QuantizedExperts)
                scalar = key.endswith(("_scale_2", "input_scale")) or key in ("k_scale", "v_scale")
                scalar = scalar or key.endswith("_scale") and getattr(module, "kind", None) == FP8
                if buffer is not None and scalar:
                    shape = (module.num_experts,) if packed else ()
                    if buffer.numel() != (module.num_experts if packed else 1):
                        raise ValueError(f"{name}.{key} has {buffer.numel()} elements; one a weight was expected")
                    module._buffers[key] = buffer.reshape(shape)
        return model

    def _dequantize(self, model, dtype=None):
        unpack_modules(model, dtype)
        return model


__all__ = ["ModelOptConfig", "ModelOptQuantizer", "pack_modules", "packed_layers", "unpack_modules"]
