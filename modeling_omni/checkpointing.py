"""Checkpoints of a training run: written whole or not at all, the newest two kept, resumed exactly.

A checkpoint is a folder `step-N` with the weights (or adapters) in the released layout, the optimizers' state as
safetensors and, for every process, `state-RANK.json`: the step and the position in the data. Nothing is pickled.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import distributed
from .checkpoint import read_header
from .lora import save_adapter
from .media import OmniInputError
from .modeling_omni import OmniForConditionalGeneration

logger = logging.getLogger(__name__)

# What a resumed run may change; everything else decides what the saved state means.
CHANGEABLE = (
    *("output_dir", "steps", "train_tokens", "learning_rate", "group_learning_rates", "min_learning_rate"),
    *("warmup_fraction", "weight_decay", "max_grad_norm", "max_skipped", "max_bad_share", "recompute", "save_every"),
    *("final_dtype", "eval_every", "eval_skills", "eval_samples", "eval_data", "eval_rows", "previews", "log_every"),
    *("report_to", "log_samples", "max_starved"),
)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder` that is whole, if any.

    Files that are missing, truncated or something else are found here, by their headers; changed bytes of weights are
    not.

    Raises:
        OmniInputError: there are checkpoints, all of them damaged.
    """
    problem = None
    for path in sorted(filter(is_checkpoint, folder.iterdir()), key=step_of, reverse=True):
        if not (path / "state-0.json").is_file():
            logger.warning("%s is not complete and is passed over", path)
            continue
        try:
            for state in path.glob("state-*.json"):
                json.loads(state.read_text())
            for file in path.rglob("*.safetensors"):
                read_header(file)
            return path
        except (OmniInputError, ValueError) as error:
            problem = error if isinstance(error, OmniInputError) else f"{path}: its state is no JSON ({error})"
            logger.warning("%s is damaged and is passed over: %s", path, problem)
    if problem is not None:
        raise OmniInputError(f"no checkpoint in {folder} is whole ({problem}); take it away to start anew")
    return None


def is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"step-\d+", path.name) is not None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoint(accelerator, folder: Path, context_parallel: int = 1) -> tuple[Path | None, dict]:
    """The checkpoint to go on from, the same on every process, and what this process wrote into it.

    Args:
        accelerator: of accelerate, or its PartialState.
    """
    from accelerate.utils import broadcast_object_list

    if accelerator.is_main_process:
        for leftover in folder.glob("partial-*"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
    resumed = newest_checkpoint(folder) if accelerator.is_main_process else None
    if accelerator.num_processes > 1:
        resumed = broadcast_object_list([resumed])[0]
    if resumed is None:
        return None, {"step": 0, "data": None}
    file = resumed / f"state-{accelerator.process_index}.json"
    saved = json.loads(file.read_text()) if file.is_file() else {"processes": None}
    if saved["processes"] != [accelerator.num_processes, context_parallel]:
        raise OmniInputError(
            f"{resumed} was not written by {accelerator.num_processes} processes with context_parallel "
            f"{context_parallel} on a disk that all of them see: resume as it was started, or start a new run "
            "from its weights (`model:`)"
        )
    return resumed, saved


def resume_settings(args, path: Path) -> None:
    """Takes the data with its measured lengths from the first start; raises if what must stay was changed."""
    before = yaml.safe_load(path.read_text())

    def plain(settings):
        data = [{key: value for key, value in source.items() if key != "mean_tokens"} for source in settings["data"]]
        return {key: value for key, value in settings.items() if key not in CHANGEABLE} | {"data": data}

    now, old = plain(dataclasses.asdict(args)), plain(before)
    changed = [key for key in now if now[key] != old.get(key, now[key])]
    if changed:
        raise OmniInputError(
            f"{path.parent} holds a run with other settings: {', '.join(changed)}. Set them back to go on with it, or "
            "give another output_dir to start anew"
        )
    args.data = before["data"]


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_checkpoint(
    accelerator, folder: Path, model, optimizers: list, state: dict, files: dict[str, str] | None = None
) -> None:
    """Writes `folder/step-N` under another name first, so that a kill or a full disk leaves the last good one.

    Args:
        state: "step" and the position in the data ("data": one per process), saved as JSON.
        files: name -> text of further files.
    """
    target, partial = folder / f"step-{state['step']}", folder / f"partial-{state['step']}"
    sharded = distributed.is_sharded(accelerator)
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    accelerator.wait_for_everyone()
    try:
        if hasattr(model_inside(model), "peft_config"):
            save_adapter(model_inside(model), partial)
        else:
            distributed.save_released(accelerator, model, partial)
        if sharded:
            distributed.save_state(model, partial)
        elif accelerator.is_main_process:
            save_optimizers(optimizers, partial / "optimizer.safetensors")
        if accelerator.is_main_process:
            for name, text in (files or {}).items():
                (partial / name).write_text(text)
        (partial / f"state-{accelerator.process_index}.json").write_text(json.dumps(state))
    except (OSError, SafetensorError) as error:
        if accelerator.num_processes == 1:
            shutil.rmtree(partial, ignore_errors=True)
        raise OmniInputError(
            f"checkpoint {target} could not be written ({error}); the last good one is {newest_checkpoint(folder)}. "
            "Free the disk and start the same command again"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        put_in_place(partial, target)
    accelerator.wait_for_everyone()


def put_in_place(partial: Path, target: Path) -> None:
    """Gives a finished checkpoint its name and removes all but the newest two."""
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in sorted(filter(is_checkpoint, target.parent.iterdir()), key=step_of)[:-2]:
        shutil.rmtree(old)


def model_inside(model):
    """The model in an engine's or DDP's wrapper; adapters stay around it."""
    return getattr(model, "module", model)


def save_optimizers(optimizers: list, path: Path) -> None:
    """The state of all optimizers as one safetensors file: "number of the optimizer.number of the parameter.key"."""
    tensors = {
        f"{number}.{index}.{key}": value.contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    save_file(tensors, path)


def load_optimizers(optimizers: list, path: Path) -> None:
    """Reads what `save_optimizers` wrote."""
    tensors = load_file(path)
    for number, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        saved["state"] = {}
        for name, value in tensors.items():
            owner, index, key = name.split(".", 2)
            if int(owner) == number:
                saved["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(saved)


def save_final(accelerator, model, folder: Path, dtype: str | None) -> None:
    """The released layout, in `dtype` where one is asked for."""
    distributed.save_released(accelerator, model, folder)
    if dtype is not None and accelerator.is_main_process:
        whole = OmniForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
        whole.save_pretrained(folder)
    accelerator.wait_for_everyone()
