"""The paper's Table 14 on nano: `infer.py eval --suite quantization`, held-out skills in bfloat16, FP8 and NVFP4.

Every format is exported with one calibration and loaded as published: packed weights, inputs rounded, keys and values
cached in FP8. On a CPU everything else runs in float32, for the first row too, so that rows differ by the format alone.
All answer the same prompts: differences are paired.
"""

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .checkpointing import write_atomically
from .comparison import interval_cell, paired_row
from .evaluation import heldout_table
from .flops import cache_bytes
from .inference import load
from .media import OmniInputError
from .quantization import RECIPES, form_weights, set_input_quantization
from .quantized_export import calibrate, calibration_batches, calibration_sources, export_checkpoint
from .rollouts import policy_name

SCALE_NAMES = ("_scale", "_scale_2")
KINDS = {"text": ("text_",), "pictures": ("image_",), "speech": ("speech_",), "clips": ("video_", "heard_")}


def quantization_table(
    model_name: str,
    folder: Path,
    formats: list[str],
    skills: list[str],
    samples: int,
    sources: list[str] | None = None,
    rows: int = 8,
    row_tokens: int = 2048,
    progress: Callable[[str], None] = lambda text: None,
    show: bool = False,
    **options,
) -> list[dict]:
    """One row per format; each is kept in `folder` when it is done, and read from there.

    Args:
        model_name: "nano" or a checkpoint folder. formats: "bf16", keys of RECIPES, or folders of packed checkpoints of
            the same model (such as `train.py qad` leaves).
        skills, samples, options: of `heldout_table`.
        sources, rows, row_tokens: of the calibration; see `calibration_sources`.
    """
    for name in formats:
        if name not in ("bf16", *RECIPES) and not (Path(name) / "config.json").is_file():
            raise OmniInputError(f"format {name!r} is unknown; give bf16, {', '.join(RECIPES)} or a checkpoint folder")
    table, scales, start = [], folder / "scales.safetensors", folder / "start.json"
    about = {"model": policy_name(model_name), "data": sources, "rows": rows, "row_tokens": row_tokens}
    before = json.loads(start.read_text()) if start.is_file() else None
    if before != about:  # exports of other weights or rows
        old = [place for place in (scales, *(folder / name for name in RECIPES)) if place.exists()]
        if old and before is None:
            raise OmniInputError(f"{old[0]} is already there; give a new folder")
        for place in old:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        write_atomically(start, json.dumps(about))
    for number, name in enumerate(formats):
        packed = name if name in ("bf16", *RECIPES) else policy_name(name)
        settings = about | {"format": packed, "skills": skills, "samples": samples} | options
        file = folder / f"{number}-{Path(name).parent.name or ''}{Path(name).name}.json"
        if file.is_file() and (row := json.loads(file.read_text()))["settings"] == settings:
            table.append(row)
            continue
        progress(f"{name}: held-out skills")
        place = name
        if name in RECIPES:
            place = folder / name
            if not (place / "config.json").is_file():
                if not scales.is_file():  # one calibration for all formats
                    model, processor = load(model_name, "float32", "cpu")
                    batches = calibration_batches(processor, calibration_sources(model_name, sources), rows, row_tokens)
                    save_file(calibrate(model, batches), scales)
                shutil.rmtree(place, ignore_errors=True)
                export_checkpoint(model_name, place, name, load_file(scales))
        model, processor = load(model_name if name == "bf16" else str(place), "float32", "cpu")
        set_input_quantization(model, True)
        form_weights(model, torch.float32)  # small enough, and many times as fast
        # as stored: what is neither packed nor a scale is in bfloat16
        codes = sum(t.nbytes for n, t in model.named_buffers() if t.element_size() == 1 or n.endswith(SCALE_NAMES))
        plain = sum(p.numel() for p in model.parameters())
        row = {"name": name, "settings": settings, "bytes": codes + 2 * plain}
        row["cache"] = cache_bytes(
            model.config.llm_config, any(n.endswith("k_scale") for n, _ in model.named_buffers())
        )
        row["table"] = heldout_table(model, processor, skills, samples, progress=show, outcomes=True, **options)
        write_atomically(file, json.dumps(row))
        table.append(row)
    return table


def quantization_markdown(table: list[dict]) -> str:
    """`quantization_table` as Markdown: sizes, means over the skills of a kind, and the change from the first row."""
    first = {row["skill"]: row["outcomes"] for row in table[0]["table"] if "outcomes" in row}
    heads = ["format", "weights, MB", "cache, bytes a token", *KINDS, "all skills", "change", "95 % interval", "median"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for row in table:
        found = {r["skill"]: r["outcomes"] for r in row["table"] if "outcomes" in r}
        rates = {skill: 100 * sum(values) / len(values) for skill, values in found.items()}
        cells = [row["name"], f"{row['bytes'] / 1e6:.2f}", f"{row['cache'][0]:,}"]
        for starts in KINDS.values():
            own = [rate for skill, rate in rates.items() if skill.startswith(starts)]
            cells.append(f"{sum(own) / len(own):.1f}" if own else "")
        cells.append(f"{sum(rates.values()) / len(rates):.1f}")
        if row is table[0]:
            cells += ["", "", ""]
        else:
            paired = paired_row("all", sum(first.values(), []), sum((found[skill] for skill in first), []))
            median = statistics.median(rates[skill] - 100 * sum(first[skill]) / len(first[skill]) for skill in first)
            cells += [f"{100 * paired['difference']:+.1f}", interval_cell(paired), f"{median:+.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    samples = table[0]["settings"]["samples"]
    lines += ["", f"{len(first)} skills, {samples} held-out samples each; accuracies in percent, change in points."]
    skipped = [r["skill"] for r in table[0]["table"] if "skipped" in r]
    return "\n".join(lines + ([f"Left out, no data on this machine: {', '.join(skipped)}."] if skipped else []))


__all__ = ["quantization_markdown", "quantization_table"]
