"""`infer.py export`: a checkpoint in FP8, NVFP4 or, from either, back in bfloat16 (paper 4.7), in the published layout.

    calibrate           the model reads some rows; the largest inputs, keys and values of every layer are noted
    export_checkpoint   tensor by tensor from the files of the checkpoint: packed, with scales, into new shards; memory
                        is that of one shard, beside what calibration needs

The recipe is the paper's (`quantization.RECIPES`); `quantization_config` is ModelOpt's, as released. The largest
magnitude of a tensor or group sets its scale ("max" calibration). How NVIDIA calibrated its own is not published.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .checkpoint import packed_layers, released_tensors, weight_files
from .configuration_omni import resolve_checkpoint
from .kernels import relu2
from .media import OmniInputError
from .modeling_language import Experts, OmniAttention
from .quantization import (
    CODES,
    FP8,
    GROUP,
    METHOD,
    NVFP4,
    RECIPES,
    dequantize,
    format_of,
    packed_shapes,
    quantize,
    scale_of,
)
from .quantized_loading import TENSORS

SHARD_BYTES = 5 * 10**9
# parts that no recipe touches, and layers of the language model that stay as they are, as vLLM's wildcards
IGNORED = ("vision_model*", "mlp1*", "sound_encoder*", "sound_projection*", "*embeddings*", "*lm_head", "*.mixer.gate",
           "*.mixer.conv1d", "*mtp*")  # fmt: skip


# ---- calibration


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[dict]) -> dict[str, torch.Tensor]:
    """Largest magnitudes that the language model's layers see.

    Args:
        model: plain, in any dtype. batches: arguments of its `forward`; labels are not needed.

    Returns:
        {released name + ".input_scale", or k_proj.k_scale, v_proj.v_scale: amax, float32 []}. Experts that no token
        reached have the largest of their layer.
    """
    found: dict[str, torch.Tensor] = {}

    def note(name, amax):
        found[name] = torch.maximum(found[name], amax.float()) if name in found else amax.float()

    def linear_hook(name):
        return lambda module, inputs: note(f"{name}.weight", inputs[0].abs().amax())

    def experts_hook(name):
        def hook(module, inputs):
            hidden, experts, _ = inputs
            shape = (module.num_experts,)
            up, down = hidden.new_zeros(shape), hidden.new_zeros(shape)
            up.scatter_reduce_(0, experts.flatten(), hidden.abs().amax(-1).repeat_interleave(experts.shape[1]), "amax")
            for expert in experts.unique().tolist():
                rows = hidden[(experts == expert).any(-1)]
                down[expert] = relu2(rows @ module.up_proj[expert].t()).abs().amax()
            note(f"{name}.up_proj", up)
            note(f"{name}.down_proj", down)

        return hook

    def cache_hook(name):
        return lambda module, inputs, output: note(name, output.abs().amax())

    language, handles = model.model.language_model, []
    prefix = next(name for name, module in model.named_modules() if module is language)
    for name, module in language.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(linear_hook(name)))
        elif isinstance(module, Experts):
            handles.append(module.register_forward_pre_hook(experts_hook(name)))
        elif isinstance(module, OmniAttention):
            for part in ("k", "v"):
                proj = getattr(module, f"{part}_proj")
                handles.append(proj.register_forward_hook(cache_hook(f"{name}.{part}_proj.{part}_scale")))
    seen = 0
    try:
        for batch in batches:
            model.model(
                **{name: value for name, value in batch.items() if name not in ("labels", "info")}, use_cache=False
            )
            seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise OmniInputError("calibration needs at least one row")
    scales = {}
    for name, amax in found.items():
        if amax.dim():  # experts
            amax = torch.where(amax > 0, amax, amax.max())[:, None, None]
        for released, value in released_tensors(name, amax):
            released = released.removesuffix(".weight") + ".input_scale" if released.endswith(".weight") else released
            scales[released] = value.reshape(()).cpu()
    return scales


def calibration_batches(processor, sources: list[dict], rows: int, row_tokens: int, seed: int = 0) -> Iterator[dict]:
    """`rows` packed rows of training data (`data:` of a stage: JSONL files, "nano:<skill>", ...)."""
    from .data import Blend
    from .packing import PackedRows

    packed = iter(PackedRows(Blend(sources, seed), processor, 1, row_tokens, cut_long=True))
    for _ in range(rows):
        yield next(packed)


def calibration_sources(model: str, paths: list[str] | None) -> list[dict]:
    """Sources of `calibration_batches`; without paths nano's skills whose data are on this machine.

    Raises:
        OmniInputError: another model than nano without paths.
    """
    if paths:
        return [{"path": path} for path in paths]
    if model != "nano":
        raise OmniInputError("calibration rows are needed: --data FILE.jsonl ... (rows as for training)")
    from .nano_data import SKILLS, make_sample

    sources = []
    for skill in SKILLS:
        try:
            make_sample(skill, 0, "train")
        except (OSError, ImportError):  # no spoken words, no fonts
            continue
        sources.append({"path": f"nano:{skill}"})
    return sources


# ---- what a checkpoint becomes


def stored_as(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, recipe: str
) -> dict[str, tuple[tuple, torch.dtype]]:
    """Names, shapes and dtypes of the tensors that the tensor `name` of a bfloat16 checkpoint becomes.

    Raises:
        OmniInputError: NVFP4 and a width that is no multiple of 16.
    """
    layer, _, part = name.rpartition(".")
    kind = format_of(layer, recipe) if part == "weight" else None
    stored = {name: (tuple(shape), dtype)}
    if kind is not None:
        if kind == NVFP4 and shape[-1] % GROUP:
            raise OmniInputError(f"{name}: NVFP4 needs a multiple of {GROUP} columns, it has {shape[-1]}")
        stored = {f"{layer}.{key}": value for key, value in packed_shapes(tuple(shape), kind).items()}
        stored[f"{layer}.input_scale"] = ((), torch.float32)
    # of the trunk's attention: what draft heads and towers keep stays as it is
    if part == "weight" and layer.endswith((".k_proj", ".v_proj")) and format_of(layer, "fp8"):
        stored[f"{layer}.{layer[-6]}_scale"] = ((), torch.float32)
    return stored


def quantization_config(layers: dict[str, str], recipe: str) -> dict:
    """`quantization_config` of config.json as ModelOpt writes it. layers: released name -> FP8 or NVFP4."""
    from . import __version__

    def group(kind):
        numbers = {"dynamic": False, "num_bits": 8, "type": "float"}
        if kind == NVFP4:
            numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}
        return {"input_activations": dict(numbers), "weights": dict(numbers)}

    config = {"quant_method": METHOD, "producer": {"name": "modeling-omni", "version": __version__}}
    config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    kinds = list(dict.fromkeys(layers.values()))
    if kinds == [FP8] and recipe == "fp8":
        groups = {"group_0": group(FP8) | {"targets": ["Linear"]}}
        return config | {"quant_algo": FP8, "config_groups": groups, "ignore": list(IGNORED)}
    named = {
        name: {"quant_algo": kind} | ({"group_size": GROUP} if kind == NVFP4 else {}) for name, kind in layers.items()
    }
    groups = {
        f"group_{i}": group(kind) | {"targets": sorted(name for name in layers if layers[name] == kind)}
        for i, kind in enumerate(kinds)
    }
    config |= {"quant_algo": "MIXED_PRECISION", "config_groups": groups, "quantized_layers": named}
    return config | {"ignore": []}


def hf_quant_config(config: dict) -> dict:
    """`quantization_config` -> hf_quant_config.json, which ModelOpt writes beside it and TensorRT-LLM reads."""
    quantization = {"quant_algo": config["quant_algo"], "kv_cache_quant_algo": FP8}
    if "quantized_layers" in config:
        quantization["quantized_layers"] = config["quantized_layers"]
    else:
        quantization["exclude_modules"] = config["ignore"]
    return {"producer": config["producer"], "quantization": quantization}


# ---- files


class StoredTensors:
    """The tensors of a checkpoint folder by name, read when asked for."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.files = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise OmniInputError(f"{path}: cannot be read: {error}") from error
            self.files |= {name: file for name in file.keys()}

    def __iter__(self):
        return iter(self.files)  # file by file: each is read once

    def __contains__(self, name):
        return name in self.files

    def __getitem__(self, name) -> torch.Tensor:
        return self.files[name].get_tensor(name)

    def shape(self, name) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, limit: int = SHARD_BYTES) -> int:
    """Writes safetensors files of about `limit` bytes, and an index where there are several -> bytes of all tensors."""
    shards, own, size, total, places = [], {}, 0, 0, {}

    def flush():
        path = folder / f"shard-{len(shards)}.safetensors"
        save_file(own, path, metadata={"format": "pt"})
        shards.append(path)
        own.clear()

    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if own and size + count > limit:
            flush()
            size = 0
        own[name], places[name] = tensor.contiguous(), len(shards)
        size, total = size + count, total + count
    flush()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for path, name in zip(shards, names):
        os.replace(path, folder / name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: names[i] for n, i in sorted(places.items())}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def packed_stream(stored: StoredTensors, recipe: str, scales: dict, layers: dict[str, str]) -> Iterator:
    """(name, tensor) of the packed checkpoint; notes the format of every packed layer in `layers`."""
    for name in stored:
        shapes = stored_as(name, stored.shape(name), None, recipe)
        layer = name.removesuffix(".weight")
        kind = format_of(layer, recipe) if name.endswith(".weight") else None
        tensor = stored[name]
        if kind is None:
            yield name, tensor
        else:
            layers[layer] = kind
            if not tensor.isfinite().all():
                raise OmniInputError(f"{name} has values that are not finite; the checkpoint is broken")
            for key, value in quantize(tensor, kind, CODES.get(recipe)).items():
                yield f"{layer}.{key}", value
        for scale in shapes:
            if scale.endswith((".input_scale", ".k_scale", ".v_scale")):
                amax = scales.get(scale, scales.get(f"language_model.{scale}"))  # text checkpoints have no prefix
                if amax is None:
                    raise OmniInputError(f"calibration saw no {scale}: it is of another model")
                if not amax.isfinite():
                    raise OmniInputError(f"calibration saw values that are not finite ({scale}); try --dtype float32")
                yield scale, scale_of(amax, kind if scale.endswith(".input_scale") else FP8)


def plain_stream(stored: StoredTensors, dtype: torch.dtype) -> Iterator:
    """(name, tensor) of a packed checkpoint with plain weights in `dtype`."""
    for name in stored:
        layer, _, part = name.rpartition(".")
        if part == "weight" and f"{layer}.weight_scale" in stored:
            names = [key for key in TENSORS[:3] if f"{layer}.{key}" in stored]
            yield name, dequantize({key: stored[f"{layer}.{key}"] for key in names}, dtype)
        elif part not in (*TENSORS[1:], "k_scale", "v_scale"):
            yield name, stored[name]


def check_export(source: str | Path, out: str | Path, format: str) -> tuple[Path, dict]:
    """Folder and config.json of the checkpoint `source`; raises as `export_checkpoint`, before calibration."""
    folder, out = Path(os.path.expanduser(resolve_checkpoint(str(source)))), Path(out)
    if format not in (*RECIPES, "bf16"):
        raise OmniInputError(f"format {format!r} is unknown; give {', '.join(RECIPES)} or bf16")
    if not (folder / "config.json").is_file():
        raise OmniInputError(f"model {source}: no checkpoint folder (download one first, e.g. with `hf download`)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OmniInputError(f"{out} is already there; give a new folder")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise OmniInputError(f"{folder / 'config.json'}: is no JSON ({error}); copy it again") from error
    packed = bool(packed_layers(weight_files(folder))[0])
    if packed != (format == "bf16"):
        what = "is packed already: export it as bf16 first" if packed else "is not packed: its weights are plain"
        raise OmniInputError(f"model {source} {what}")
    return folder, config


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    format: str,
    scales: dict[str, torch.Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict:
    """Writes the checkpoint `source` in another format to a new folder, with all its other files.

    Args:
        source: "nano" or a checkpoint folder. out: must not exist, or be empty.
        format: a key of RECIPES; "bf16" takes a packed checkpoint back to plain weights.
        scales: of `calibrate`; needed by all but "bf16".

    Returns:
        {"bytes" of the tensors, "elements" of the plain checkpoint, "bits_per_weight", "layers": {FP8: n, NVFP4: n}}.

    Raises:
        OmniInputError: source, out or format do not fit, a full disk.
    """
    folder, config = check_export(source, out, format)
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    layers: dict[str, str] = {}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with ExitStack() as stack:
            stored = StoredTensors(folder, stack)
            if format == "bf16":
                stream = plain_stream(stored, torch.bfloat16)
                config.pop("quantization_config", None)
            else:
                stream = packed_stream(stored, format, scales or {}, layers)
            elements = 0

            def counted():
                nonlocal elements
                for name, tensor in stream:
                    if not name.endswith(("_scale", "_scale_2")):
                        elements += tensor.numel() * (2 if tensor.dtype == torch.uint8 else 1)
                    yield name, tensor

            total = write_shards(counted(), partial, shard_bytes)
        if format != "bf16":
            config["quantization_config"] = packing = quantization_config(dict(sorted(layers.items())), format)
            (partial / "hf_quant_config.json").write_text(json.dumps(hf_quant_config(packing), indent=2) + "\n")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for path in folder.iterdir():  # tokenizer, processor, template, licence; no code of others
            kept = path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".md", ".model", "")
            own = path.name in ("model.safetensors.index.json", "hf_quant_config.json")
            if kept and not own and not (partial / path.name).exists():
                shutil.copy2(path, partial / path.name)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        raise OmniInputError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    counts = {kind: list(layers.values()).count(kind) for kind in (FP8, NVFP4)}
    return {"bytes": total, "elements": elements, "bits_per_weight": 8 * total / elements, "layers": counts}


__all__ = [
    "calibrate",
    "calibration_batches",
    "calibration_sources",
    "export_checkpoint",
    "quantization_config",
    "stored_as",
    "write_shards",
]
