"""Low-rank adapters (LoRA, Hu et al., 2021): chosen by intent, checked, saved as plain PEFT folders, merged back.

The paper trains whole weights on many nodes; adapters are for one. Experts in 4 bits below them follow QLoRA (Dettmers
et al., 2023).

A settings dict, the `lora:` key of a training YAML:

    presets: [attention_mamba, shared_experts]    # names in PRESETS; these two if not given
    r: 16                                         # rank (of every expert, for routed_experts)
    alpha: 32                                     # scale: alpha / r, with rslora alpha / sqrt(r)
    dropout: 0.0                                  # of the adapters' input; must be 0 with routed_experts
    rslora: false
    target_modules: [lm_head]                     # more modules: ends of names, or one regex
    target_parameters: []                         # more 2-D or 3-D parameters: ends of names
    base_4bit: false                              # routed experts in 4 bits (bitsandbytes and a GPU)
    modules_to_save: [vision_projector]           # trained in full and saved with the adapter; as any other option
                                                  # of peft.LoraConfig

What holds where:
- Call `add_lora` before an engine or DDP takes the model, and after `prepare_expert_parallel`.
- ZeRO-3 takes every preset. Expert parallelism takes all but routed_experts (a process would train adapters of its own
  experts, which the engine takes for copies of each other). Both tested on two CPU processes, against one.
- `routed_experts` makes PEFT add `B A` to all experts of a layer in every pass (2.4 GiB of bfloat16 per layer at 30B),
  and autograd keeps the sum: recompute the language blocks, or these sums alone are 55 GiB.
- Mamba's `out_proj` and `conv1d` and convolutions anywhere carry no adapter, see `check_target`.

Shape legend: r rank, E experts, D, I widths; an adapter of W [out, in] is B [out, r] A [r, in].
"""

import dataclasses
import json
import os
import re
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from .checkpoint import GROUPS
from .configuration_omni import resolve_checkpoint
from .media import OmniInputError
from .modeling_language import Experts
from .modeling_omni import OmniForConditionalGeneration
from .processing_omni import OmniProcessor

_MIXER = r"model\.language_model\.layers\.\d+\.mixer\."
_VISION = r"model\.vision_tower\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
_AUDIO = r"model\.audio_tower\.layers\.\d+\.(self_attn\.(q|k|v|o|relative_k)_proj|feed_forward[12]\.linear[12])"

# Preset -> regex of full names. `attention_mamba` alone has been seen to fall back late in training on this family of
# models, and the dense MLPs to cure it; hence the default.
PRESETS = {
    "attention_mamba": _MIXER + r"([qkvo]_proj|in_proj)",
    "shared_experts": _MIXER + r"((shared_experts\.)?(up_proj|down_proj)|fc[12]_latent_proj)",  # all dense MLPs
    "routed_experts": _MIXER + r"experts\.(up_proj|down_proj)",  # 3-D parameters, not modules
    "projectors": r"model\.(vision|audio)_projector\.linear[12]",
    "vision": _VISION,
    "audio": _AUDIO,
    "towers": f"({_VISION}|{_AUDIO})",
}
DEFAULT_PRESETS = ("attention_mamba", "shared_experts")
ROUTED = ("mixer.experts.up_proj", "mixer.experts.down_proj")
SHORT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}

# Part of a name, in this order; and the inputs without which a part gets no gradient.
PARTS = {
    part: GROUPS[part] for part in ("vision", "vision_projector", "audio", "audio_projector", "head", "language", "mtp")
}
MEDIA_OF_PART = {
    "vision": ("pixel_values", "pixel_values_videos"),
    "vision_projector": ("pixel_values", "pixel_values_videos"),
    "audio": ("input_features",),
    "audio_projector": ("input_features",),
}


def base_name(name: str) -> str:
    """The name in the model without adapters of what a PEFT model calls `name`, so that prefixes and groups fit it."""
    name = name.removeprefix("base_model.model.")
    name = re.sub(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.|$)", "", name)
    return re.sub(r"\.lora_\w+\.\w+(?=\.|$)", "", name)


def part_of(name: str) -> str:
    """The part (a key of PARTS) of a parameter or module of a model with or without adapters."""
    name = base_name(name) + "."
    return next(part for part, prefix in PARTS.items() if name.startswith(prefix))


# --- adding


def add_lora(model: OmniForConditionalGeneration, settings: dict):
    """Freezes the model and puts adapters in, in place.

    Args:
        model: loaded by `from_pretrained`; the name it was loaded by is recorded as the adapter's base.
        settings: see the module's docstring.

    Returns:
        `peft.PeftModel` with only adapters (and `modules_to_save`) trainable, adapters in float32.

    Raises:
        OmniInputError: an unknown preset or option, a target that matches nothing or cannot carry an adapter, dropout
            with routed experts, `base_4bit` where it cannot be.
    """
    from peft import get_peft_model

    settings = dict(settings)
    in_4bit = settings.pop("base_4bit", False)
    config = lora_config(model, settings)
    if in_4bit:
        if config.target_parameters:
            raise OmniInputError(
                "lora: adapters of routed experts cannot stand on a 4-bit base (PEFT cannot add to what bitsandbytes "
                "holds in 4 bits); leave out routed_experts, or base_4bit"
            )
        if model.device.type != "meta":  # there, parameters are only counted
            quantize_experts_4bit(model)
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise OmniInputError(f"lora: PEFT refuses these settings: {error}") from error


def lora_config(model: OmniForConditionalGeneration, settings: dict):
    """Settings -> `peft.LoraConfig` whose targets are known to be in the model. Raises as `add_lora`."""
    from peft import LoraConfig

    from .distributed import ParallelExperts

    options = {"r": 16, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for name, value in settings.items():
        option = SHORT_NAMES.get(name, name)
        if name != "presets" and option not in known:
            choices = ["presets", "base_4bit", *SHORT_NAMES, *sorted(known)]
            raise OmniInputError(f"lora: unknown option {name!r}; known: {', '.join(choices)}")
        if option != name and option in settings:
            raise OmniInputError(f"lora: {name} and {option} are the same option; give one of them")
        options[option] = value
    presets = options.pop("presets", DEFAULT_PRESETS) or ()
    presets = [presets] if isinstance(presets, str) else list(presets)
    unknown = [preset for preset in presets if preset not in PRESETS]
    if unknown:
        raise OmniInputError(f"lora: unknown presets {unknown}; known: {', '.join(PRESETS)}")

    modules = {f"preset {p!r}": PRESETS[p] for p in presets if p != "routed_experts"}
    more = options.pop("target_modules", None) or []
    if isinstance(more, str):
        modules[f"target_modules {more!r}"] = more
    else:
        modules |= {f"target_modules {end!r}": rf"(.*\.)?{re.escape(end)}" for end in more}
    parameters = list(options.pop("target_parameters", None) or [])
    ends = {f"target_parameters {end!r}": end for end in parameters}
    if "routed_experts" in presets:
        ends |= {f"preset 'routed_experts' ({end})": end for end in ROUTED}
    if not modules and not ends:
        raise OmniInputError(f"lora: nothing to adapt: name presets ({', '.join(PRESETS)}) or target_modules")

    named_modules = dict(model.named_modules())
    for what, pattern in modules.items():
        try:
            found = [name for name in named_modules if re.fullmatch(pattern, name)]
        except re.error as error:
            raise OmniInputError(f"lora: {what} is not a regular expression: {error}") from error
        if not found:
            raise OmniInputError(f"lora: {what} matches no module of this model; see model.named_modules()")
        for name in found:
            check_target(name, named_modules[name])
    for what, end in ends.items():
        found = [name for name, _ in model.named_parameters() if f".{name}".endswith(f".{end}")]
        if not found:
            raise OmniInputError(f"lora: {what} matches no parameter of this model; see model.named_parameters()")
        for name in found:
            check_target(name, None)
            if isinstance(named_modules[name.rpartition(".")[0]], ParallelExperts):
                raise OmniInputError(f"lora: {what} needs expert_parallel 1: adapters are not cut as experts are")
    if ends and options.get("lora_dropout"):
        raise OmniInputError(
            "lora: dropout must be 0 with routed_experts or target_parameters: their adapters are added to the "
            "weights, not run on the input"
        )
    try:
        return LoraConfig(
            target_modules="|".join(f"({pattern})" for pattern in modules.values()) if modules else [],
            target_parameters=sorted(set(ends.values())) or None,
            base_model_name_or_path=model.name_or_path or None,
            **options,
        )
    except (ValueError, TypeError) as error:
        raise OmniInputError(f"lora: PEFT refuses these settings: {error}") from error


def check_target(name: str, module: nn.Module | None) -> None:
    """Raises for what must not or cannot carry an adapter; `module` is None for a parameter."""
    # Fused GPU kernels of Mamba-2 (convolution, scan, norm and output in one) are handed `out_proj.weight` and
    # `conv1d.weight` and never call the modules: an adapter there trains on the plain path, gets no gradient on the
    # fused one, and is left out without a word where others serve the model with such kernels. PEFT refuses both for
    # `nemotron_h`, but goes by the outer model type, which is another here.
    if re.fullmatch(_MIXER + r"(out_proj|conv1d)(\.\w+)?", name):
        raise OmniInputError(
            f"lora: {name} cannot be a target: fused Mamba kernels read its weight directly, past any adapter; "
            "the preset attention_mamba adapts in_proj instead"
        )
    # The audio tower's pointwise convolutions run as linears over [clips, tokens, channels], where PEFT would convolve
    if module is not None and not isinstance(module, nn.Linear | nn.Embedding):
        kind = type(module).__name__
        raise OmniInputError(f"lora: {name} is a {kind}; only linear layers and embeddings can be adapted")


def adapted_layers(model) -> dict[str, nn.Module]:
    """Name in the model without adapters -> PEFT's layer; for routed experts the name of the parameter."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            end = f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
            layers[base_name(name) + end] = module
    return layers


def adapter_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of one adapted layer's own adapters (its base may hold another one's, see ParamWrapper)."""
    return [p for name, p in layer.named_parameters() if name.startswith("lora_")]


def lora_table(model) -> str:
    """What is adapted, trained and frozen in every part, as text; then what the adapters stand on.

    Whole sizes under ZeRO-3; with expert parallelism, of the routed experts those of this process.
    """
    present = {part_of(name) for name, _ in model.named_parameters()}
    sizes = {part: [0, 0, 0] for part in PARTS if part in present}  # adapters, all trained, frozen
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor on each rank
        counts = sizes[part_of(name)]
        counts[0] += size if ".lora_" in name else 0
        counts[1 if parameter.requires_grad else 2] += size
    kinds = {part: Counter() for part in PARTS}
    for name, layer in adapted_layers(model).items():
        ranks = "/".join(str(rank) for rank in layer.r.values())
        short = re.sub(r"^.*?\.(\d+)\.", "", name.removeprefix(PARTS[part_of(name)]))
        kinds[part_of(name)][f"{short} (r {ranks})"] += 1
    lines = [f"{'part':18}{'adapters':>10}{'adapter weights':>17}{'trained':>15}{'frozen':>17}"]
    for part, (adapter, trained, frozen) in sizes.items():
        lines.append(f"{part:18}{sum(kinds[part].values()):10,}{adapter:17,}{trained:15,}{frozen:17,}")
    totals = [sum(counts[i] for counts in sizes.values()) for i in range(3)]
    adapters = sum(sum(counts.values()) for counts in kinds.values())
    lines.append(f"{'all':18}{adapters:10,}{totals[0]:17,}{totals[1]:15,}{totals[2]:17,}")
    for part, counts in kinds.items():
        if counts:
            lines.append(f"{part}: " + ", ".join(f"{number} x {kind}" for kind, number in sorted(counts.items())))
    return "\n".join(lines)


def start_lora(model: OmniForConditionalGeneration, settings: dict, resumed: Path | None, seed: int):
    """New adapters, drawn from `seed`, or those of the checkpoint `resumed`, to be trained on; see `add_lora`."""
    if resumed is None:
        torch.manual_seed(seed)
        return add_lora(model, settings)
    if settings.get("base_4bit"):
        quantize_experts_4bit(model)
    return load_adapter(model, resumed, trainable=True)


# --- gradients


@dataclass
class AdapterWatch:
    """Which adapters have had a gradient other than zero: name -> bool tensor on the adapter's device."""

    seen: dict[str, torch.Tensor]
    handles: list


def watch_adapter_gradients(model) -> AdapterWatch:
    """Notes every adapter's gradients from now on, for engines that keep them to themselves (DeepSpeed ZeRO-3)."""
    watch = AdapterWatch({}, [])

    def note(name):
        def hook(gradient):
            watch.seen[name].logical_or_(gradient.detach().ne(0).any())

        return hook

    for name, layer in adapted_layers(model).items():
        trained = [p for p in adapter_parameters(layer) if p.requires_grad]
        if trained:
            watch.seen[name] = torch.zeros((), dtype=torch.bool, device=trained[0].device)
        watch.handles += [p.register_hook(note(name)) for p in trained]
    return watch


def check_adapter_gradients(model, batches: list[dict] | None = None, watch: AdapterWatch | None = None) -> set[str]:
    """Raises if an adapter got no gradient; to be called after the first backward pass, before gradients are cleared.

    B starts at zero, so A's gradient is exactly zero in the first step: an adapter counts as reached if any of its
    weights is. One of routed experts is judged as a whole, since no batch reaches every expert.

    Args:
        batches: what this process ran since the last check, as the data have it (no stand-ins for missing media).
            Parts whose media are absent are not judged, nor is anything if no token is trained. None: all are judged.
        watch: of `watch_adapter_gradients`, needed with ZeRO-3; without it, the parameters' `.grad` are read.

    Returns:
        Parts with adapters that could not be judged yet; call again after later steps until the set is empty.

    Raises:
        OmniInputError: naming the adapters that got none.
    """
    if watch is not None:
        reached = {name: bool(flag) for name, flag in watch.seen.items()}
    else:
        reached = {}
        for name, layer in adapted_layers(model).items():
            trained = [p for p in adapter_parameters(layer) if p.requires_grad]
            if trained:
                reached[name] = any(p.grad is not None and bool(p.grad.ne(0).any()) for p in trained)
    if not reached:
        raise OmniInputError("lora: the model has no adapter that trains")
    missed = [name for name, flag in reached.items() if not flag]
    open_parts = set()
    if batches is not None:
        batches = [batch for batch in batches if batch.get("labels") is None or bool((batch["labels"] != -100).any())]
        for part in {part_of(name) for name in missed}:
            media = MEDIA_OF_PART.get(part, ("input_ids",))
            if all(batch.get(key) is None for batch in batches for key in media):
                open_parts.add(part)
    dead = [name for name in missed if part_of(name) not in open_parts]
    if dead:
        raise OmniInputError(
            f"lora: {len(dead)} of {len(reached)} adapters got no gradient: {', '.join(dead[:6])}"
            f"{', ...' if len(dead) > 6 else ''}. Nothing that the loss depends on runs through them: train on "
            "data that uses these parts, or leave them out of `presets`"
        )
    if watch is not None and not open_parts:
        while watch.handles:
            watch.handles.pop().remove()
    return open_parts


# --- files


def save_adapter(model, folder: str | Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained` reads them.

    With several processes call it on all of them: ZeRO-3 gathers the adapters (alone); the first process writes.
    """
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = not spread or torch.distributed.get_rank() == 0
    state = None
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        import deepspeed

        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        state = {name: buffer for name, buffer in model.named_buffers() if "modules_to_save" in name}
        for name, parameter in trained.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if first:
                    state[name] = parameter.detach().cpu().clone()
    if first:
        # not "auto": that asks the hub whether the vocabulary was changed; it never is here
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)


def load_adapter(model: OmniForConditionalGeneration, folder: str | Path, trainable: bool = False):
    """`PeftModel.from_pretrained`, but strict: every weight of the file finds its place and every place its weight.

    Args:
        model: the adapter's base.
        trainable: to train on (all base weights are frozen, as by `add_lora`); else for inference and merging.

    Raises:
        OmniInputError: no adapter there, or one of another base.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open

    read_adapter_config(folder)
    try:
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise OmniInputError(f"adapter {folder}: adapter_model.safetensors cannot be read ({error})") from error
    misfit = f"adapter {folder} does not fit the base {model.name_or_path or 'given'}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*missing adapter keys")  # found and raised below
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (ValueError, RuntimeError, KeyError) as error:
        raise OmniInputError(f"{misfit}: {' '.join(str(error).split())[:400]}") from error
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    placed = {name: list(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in stored.keys() | placed.keys() if stored.get(name) != placed.get(name))
    if wrong:
        raise OmniInputError(f"{misfit}: {len(wrong)} weights differ, e.g. {wrong[0]}")
    return adapted


def read_adapter_config(folder: str | Path) -> dict:
    """The adapter's `adapter_config.json`. Raises OmniInputError unless the folder holds a LoRA adapter."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise OmniInputError(f"adapter {folder}: {name} is not there; give a folder that PEFT has saved")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except ValueError as error:
        raise OmniInputError(f"adapter {folder}: adapter_config.json is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise OmniInputError(f"adapter {folder}: adapter_config.json does not describe a LoRA adapter")
    return config


def merge_adapter(adapter: str | Path, out: str | Path, base: str | None = None, progress: bool = False) -> Path:
    """Adds an adapter to its base's weights and writes a whole checkpoint in the released layout, processor included.

    Every sum is made in float32 and rounded once, to the dtype that the base's weight has on disk. The folder appears
    under its name when it is complete. Runs on the CPU and holds the base in memory in its own dtypes, plus the largest
    adapted weight twice in float32.

    Args:
        adapter: a folder with a PEFT LoRA adapter.
        out: folder to write; must not exist, or be empty.
        base: the checkpoint that the adapter was trained on ("nano", a folder, a hub id); the one it names if None.
        progress: whether to show a progress bar on stderr.

    Returns:
        `out` as a path.

    Raises:
        OmniInputError: adapter, base and out as above do not fit, or there is no room on the disk.
    """
    out, config = Path(out), read_adapter_config(adapter)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise OmniInputError(f"adapter {adapter} does not say what it was trained on: name the base (--model)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OmniInputError(f"{out} is already there; give a new folder")
    folder = os.path.expanduser(resolve_checkpoint(str(base)))
    try:
        processor = OmniProcessor.from_pretrained(folder)
        model = OmniForConditionalGeneration.from_pretrained(folder, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise OmniInputError(f"base {base}: cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < size:
            raise OmniInputError(f"{out}: {size / 1e9:.1f} GB are to be written, the disk has {free / 1e9:.1f} GB left")
        model = load_adapter(model, adapter)
        for name, layer in tqdm(adapted_layers(model).items(), "merging", disable=not progress):
            merge_layer(name, layer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "already merged"; what is left are copies in modules_to_save
            model = model.merge_and_unload()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:  # a full disk is either
        raise OmniInputError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


@torch.no_grad()
def merge_layer(name: str, layer: nn.Module) -> None:
    """Adds one adapter to its weight in float32; the weight keeps its dtype. PEFT's `merge` would round `B A` first."""
    owner = layer.get_base_layer()
    weight = getattr(owner, getattr(layer, "parameter_name", "weight"))
    dtype = weight.dtype
    weight.data = weight.data.float()
    layer.merge()
    weight.data = weight.data.to(dtype)
    if not weight.isfinite().all():
        raise OmniInputError(f"the merged weight {name} is not finite: the adapter is broken (or overflows {dtype})")


# --- 4 bits


def quantize_experts_4bit(model: OmniForConditionalGeneration, device: str | torch.device = "cuda") -> None:
    """Puts the routed experts on `device` in 4 bits (NF4 with nested scales, QLoRA), in place; the rest stays as it is.

    bitsandbytes keeps a parameter of any shape in 4 bits and gives it out dequantized, so the stacked experts need no
    other modules: 29.4 of the 33.0 billion weights of 30B, 58.8 GB -> about 15 GB. Attention, Mamba, shared experts,
    embeddings and towers, 7 GB in bfloat16, are left alone. Load the model on the CPU in bfloat16 first; then only one
    layer's experts are on the GPU in 16 bits at a time. Recompute the language blocks in training: autograd keeps the
    dequantized experts of every layer otherwise. One process or DDP; ZeRO-3 cannot shard 4-bit weights. Merge such an
    adapter into the unquantized base.

    Run by hand on a CPU with small models; its test runs only where bitsandbytes is installed (extra `qlora`). Never
    run on a GPU nor at 30B.

    Raises:
        OmniInputError: bitsandbytes or the device is not there.
    """
    try:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit
    except ImportError as error:
        raise OmniInputError(
            "lora: base_4bit needs bitsandbytes 0.50 or later (pip install bitsandbytes), or set base_4bit: false"
        ) from error
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise OmniInputError("lora: base_4bit needs a CUDA GPU, and none is there; set base_4bit: false")
    for module in model.modules():
        if isinstance(module, Experts):
            module.to(device)
            for name in ("up_proj", "down_proj"):
                replace_parameter_4bit(module, name, compress_statistics=True, quant_type="nf4")


__all__ = [
    "PRESETS",
    "AdapterWatch",
    "adapted_layers",
    "add_lora",
    "base_name",
    "check_adapter_gradients",
    "load_adapter",
    "lora_config",
    "lora_table",
    "merge_adapter",
    "part_of",
    "quantize_experts_4bit",
    "save_adapter",
    "start_lora",
    "watch_adapter_gradients",
]
