"""The released layout <-> our modules, in transformers' own conversion mechanism.

`from_pretrained` reads the released names (checkpoint of nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning: 7,349
tensors) shard by shard; `save_pretrained` applies the same rules backwards and writes exactly those names, so vLLM and
NVIDIA's tools take a fine-tune as they take the original. Experts are one tensor each on disk and two stacked
parameters per layer in memory.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from .limits import OmniInputError
from .quantization import FP8, METHOD, NVFP4, packed_shapes

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100_000_000  # bytes of a safetensors header, as the library has it
KINDS = {"F8_E4M3": FP8, "U8": NVFP4}  # of packed weights, by their dtype in safetensors
DTYPES = {torch.float8_e4m3fn: ("F8_E4M3",), torch.uint8: ("U8",), torch.float32: ("F32", "BF16", "F16")}

# (released name, our name). Order matters when saving: the first rule that fits wins.
RENAMES = [
    (r"^language_model\.lm_head\.", r"lm_head."),
    (r"^language_model\.backbone\.", r"model.language_model."),
    (r"^language_model\.mtp\.", r"mtp."),
    (r"^vision_model\.radio_model\.input_conditioner\.", r"model.vision_tower.input_conditioner."),
    (r"^vision_model\.radio_model\.model\.patch_generator\.", r"model.vision_tower.patch_generator."),
    (r"^vision_model\.radio_model\.model\.blocks\.", r"model.vision_tower.blocks."),
    (r"^mlp1\.0\.", r"model.vision_projector.norm."),
    (r"^mlp1\.1\.", r"model.vision_projector.linear1."),
    (r"^mlp1\.3\.", r"model.vision_projector.linear2."),
    (r"^sound_encoder\.encoder\.", r"model.audio_tower."),
    (r"^sound_projection\.", r"model.audio_projector."),
]

# The language models of the family that are released alone (Nemotron 3 Nano, Super, Ultra); `lm_head.` and `mtp.` are
# called the same here.
TEXT_RENAMES = [(r"^backbone\.", r"model.language_model.")]

# Group name -> what its parameters' names begin with; the longest that fits decides. The router is told by its place,
# a draft head's own is part of the head.
GROUPS = {
    "language": "model.language_model.",
    "embeddings": "model.language_model.embeddings.",
    "head": "lm_head.",
    "router": ".mixer.gate.",
    "vision": "model.vision_tower.",
    "vision_projector": "model.vision_projector.",
    "audio": "model.audio_tower.",
    "audio_projector": "model.audio_projector.",
    "mtp": "mtp.",
}

# Written by transformers' native class for parts that this architecture does not have: LayerScale (ones) and indices
# of summary tokens. `mtp.` are draft heads (modeling_mtp.py), left out where the config says 0 of them.
IGNORED_ON_LOAD = [r"layer_scale[12]\.lambda1$", r"\.ls[12]\.", r"summary_idxs$", r"(^|\.)mtp\."]


def register_released_layout(name: str, renames: list[tuple[str, str]] = RENAMES) -> None:
    """Registers the rules for a model type or a class, by its name; a second call changes nothing."""
    rules = [WeightRenaming(released, ours) for released, ours in renames]
    for part in ("up_proj", "down_proj"):
        rules.append(
            WeightConverter(
                source_patterns=[f"mixer.experts.*.{part}.weight"],
                target_patterns=f"mixer.experts.{part}",
                operations=[MergeModulelist(dim=0)],
            )
        )
    register_checkpoint_conversion_mapping(name, rules, overwrite=True)


def released_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One of our parameters -> released name and tensor, as `save_pretrained` writes them; stacked experts one by one.

    For engines that take weights by name while training goes on (vLLM).
    """
    for released, ours in RENAMES:
        if name.startswith(ours):
            name = re.sub(r"\\(.)", r"\1", released.strip("^")) + name[len(ours) :]
            break
    layer, stacked, part = name.partition(".mixer.experts.")
    if stacked and tensor.dim() == 3:
        for number in range(len(tensor)):  # one at a time: a configuration may claim any number
            yield f"{layer}{stacked}{number}.{part}.weight", tensor[number]
    else:
        yield name, tensor


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, those of its index where it has shards; none is read yet.

    Raises:
        OmniInputError: no safetensors file, an index that is broken or points outside the folder, a missing shard.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        found = f"only {pickled[0]}, which is pickled and is never read" if pickled else "none"
        raise OmniInputError(f"{folder}: has no model.safetensors or its index ({found}); save it as safetensors")
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        plain = bool(names) and all(isinstance(name, str) and name == os.path.basename(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OmniInputError(f"{index}: is no index of weights ({type(error).__name__}); copy it again") from error
    if not plain or not all(name.endswith(".safetensors") for name in names):
        raise OmniInputError(f"{index}: names files that are no safetensors files of this folder; copy it again")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise OmniInputError(f"{folder}: {len(missing)} of {len(names)} shards are missing ({missing[0]}); copy them")
    return [folder / name for name in sorted(names)]


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of a safetensors file, whose size is checked against them; no weight is read.

    Raises:
        OmniInputError: it is truncated or something else.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"its header would have {length} of {size} bytes")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size:
            raise ValueError(f"{size} of {end} bytes")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise OmniInputError(f"{path}: is truncated or no safetensors file ({reason}); copy it again") from error
    except OSError as error:
        raise OmniInputError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    return tensors


def check_code(folder: str | Path) -> None:
    """Refuses a config.json that names code of a hub ("owner/kernel") for attention or experts, which transformers
    would fetch and run. Where it is wanted, `attn_implementation` of `from_pretrained` asks for it."""

    def named(node) -> list[str]:
        nested = [one for value in node.values() if isinstance(value, dict) for one in named(value)]
        keys = [key for key in node if key.removesuffix("_internal").endswith("_implementation")]
        return nested + [f"{key} {node[key]!r:.200}" for key in keys if "/" in str(node[key])]

    try:
        config = json.loads((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError):
        return  # loading it says what is wrong
    if isinstance(config, dict) and (found := named(config)):
        problem = f"in its config.json {found[0]} names code of others, which is not run; take it out"
        raise OmniInputError(f"{folder}: {problem}")


def packed_layers(files: Iterable[str | Path]) -> tuple[dict[str, tuple[str, bool]], list[str]]:
    """Packed layers of safetensors files: {released name: (FP8 or NVFP4, has an input scale)}, and names of KV scales.

    Raises:
        OmniInputError: a packed layer that is not whole, or whose tensors do not fit each other.
    """
    tensors = {name: entry for path in files for name, entry in read_header(Path(path)).items()}
    layers = {}
    for name in sorted(tensors):
        layer, _, part = name.rpartition(".")
        dtype, shape = tensors.get(f"{layer}.weight", (None, ()))
        if part != "weight_scale" and (part != "weight" or dtype not in KINDS):
            continue
        kind = KINDS.get(dtype)
        if kind is None or len(shape) != 2:
            raise OmniInputError(f"{layer} has a weight_scale, but its weight is {dtype}; known: {', '.join(KINDS)}")
        for key, (wanted, stored_as) in packed_shapes((shape[0], shape[1] * (2 if kind == NVFP4 else 1)), kind).items():
            dtype, shape = tensors.get(f"{layer}.{key}", (None, ()))
            if dtype is None:
                raise OmniInputError(f"{layer} is in {kind}, but has no {key}; copy or download the checkpoint again")
            if dtype not in DTYPES[stored_as] or shape != wanted and (wanted, shape) != ((), (1,)):
                raise OmniInputError(
                    f"{layer}.{key} is {dtype} {list(shape)}; in {kind} it is {stored_as} {list(wanted)}"
                )
        layers[layer] = kind, f"{layer}.input_scale" in tensors
    return layers, sorted(name for name in tensors if name.endswith((".k_scale", ".v_scale")))


def check_weights(folder: str | Path, model: torch.nn.Module) -> None:
    """Compares the names and shapes in a folder with those of `model` (on the meta device) before anything is loaded,
    so that a configuration that lies about sizes reserves no memory. Draft heads may be missing, and what
    `IGNORED_ON_LOAD` says may be more.

    Packed layers (FP8, NVFP4) are compared by what they hold. Of checkpoints in formats of others only the files
    themselves are looked at.

    Raises:
        OmniInputError: see `weight_files`, `read_header` and `packed_layers`; tensors that are missing, of another
            shape, or unknown; packed weights whose configuration does not say so.
    """
    files = weight_files(folder)
    found = {name: (shape, path) for path in files for name, (_, shape) in read_header(path).items()}
    method = getattr(model.config, "quantization_config", None)
    method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    if method not in (None, METHOD):
        return
    layers, _ = packed_layers(files)
    if layers and method is None:
        raise OmniInputError(
            f"{folder}: its weights are packed (FP8, NVFP4), but its config.json has no quantization_config of "
            f"{METHOD!r}; take config.json and weights from one checkpoint"
        )
    if method:  # scales of inputs, of the KV cache, of what else a machine may compute in 8 bits
        found = {name: own for name, own in found.items() if not name.endswith("_scale") or math.prod(own[0]) > 1}
    for layer, (kind, _) in layers.items():
        (rows, columns), path = found[f"{layer}.weight"]
        found[f"{layer}.weight"] = (rows, columns * (2 if kind == NVFP4 else 1)), path
        for key in ("weight_scale", "weight_scale_2"):
            found.pop(f"{layer}.{key}", None)
    expected = {}
    for ours, tensor in model.state_dict().items():
        parts = islice(released_tensors(ours, tensor), len(found) + 1)  # one more than there can be
        expected.update((name, tuple(part.shape)) for name, part in parts)
    for name, shape in expected.items():
        if name in found and found[name][0] != shape:
            raise OmniInputError(
                f"{found[name][1]}: {name} has shape {list(found[name][0])}, by its config.json it is {list(shape)}; "
                "take config.json and weights from one checkpoint"
            )
    if len(expected.keys() & found.keys()) < len(expected) // 2:
        return  # another layout, such as that of transformers' native class
    skipped = [re.compile(pattern) for pattern in (*IGNORED_ON_LOAD, *(model._keys_to_ignore_on_load_missing or ()))]
    for names, problem in (
        (expected.keys() - found.keys(), "lacks {} tensors, such as {}; copy or download it again"),
        (found.keys() - expected.keys(), "has {} tensors that this model does not have, such as {}; take them out"),
    ):
        names = sorted(name for name in names if not any(pattern.search(name) for pattern in skipped))
        if names:
            raise OmniInputError(f"{folder}: " + problem.format(len(names), names[0]))
