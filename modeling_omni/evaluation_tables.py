"""The paper's Tables 11 to 13 and its reasoning columns as one command: `infer.py eval --suite tables`.

On nano the benchmarks are its held-out tasks, written to files; any other model gets its own with `--data NAME=FILE`.
Every cell of a table is an evaluation of its own (`evaluation_files.py`): cells that tables share are made once, a cell
that is done is read, one that was killed goes on where it was.

    modes   reasoning off and on
    11      reasoning budgets, from none to 13/16 of the new tokens (the paper's 13,312 of 16,384) down to nothing
    12      tubelets and EVS on and off: accuracy and time to first token
    13      EVS rates: accuracy and time to first token
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from .checkpointing import write_atomically
from .data import JsonlRows
from .evaluation import FIRST_SEED
from .evaluation_files import check_settings, checkpoint_fingerprint, evaluate_file, question_of
from .inference import encode, stream_answer, token_counts, user_message
from .media import OmniInputError, VideoClip
from .video_processing_omni import OmniVideoProcessor

TABLES = ("modes", "11", "12", "13")
# the skills of nano whose held-out tasks stand in for the paper's benchmarks; of text_math every sample taught a
# thought, of the others one in four
REASONED = ("text_math", "text_relation", "image_relation", "image_count", "video_turns")
EVERY_KIND = ("text_math", "text_chat", "image_where", "image_count", "image_word", "speech_digits", "speech_words")
EVERY_KIND += ("video_mover", "video_turns", "video_heard_motion", "heard_picture")
VIDEOS = ("video_direction", "video_mover", "video_describe_motion", "video_turns", "video_heard_motion")
BUDGETS = (13 / 16, 1 / 2, 1 / 4, 1 / 8, 0)  # of the new tokens
GRACE = 1 / 16  # likewise: 1,024 of 16,384
RATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ON_OFF_RATE = 0.5  # of Table 12


# ---------------------------------------------------------------------------------------------------- single frames


class SingleFrames(OmniVideoProcessor):
    """Videos frame by frame for a tower of two-frame tubelets: every frame is paired with itself.

    So the tower takes the last frame of an odd video in training. Needs `video_temporal_patch_size=1`.
    """

    def patches(self, videos: Sequence[tuple[np.ndarray, int, int]]) -> torch.Tensor:
        """uint8 RGB [T, H, W, 3] and the grid h, w of every video -> float32 [sum T * h * w, 2 * P], halves alike."""
        return super().patches(videos).repeat(1, 2)


def without_tubelets(processor):
    """A copy of a processor that lays videos out frame by frame: twice the tokens."""
    if processor.video_processor.video_temporal_patch_size != 2:
        raise OmniInputError("this model's tubelets are not of two frames; there is nothing to turn off")
    changed = copy.copy(processor)
    changed.video_processor = SingleFrames(**video_options(processor) | {"video_temporal_patch_size": 1})
    return changed


def video_options(processor) -> dict:
    return {k: v for k, v in processor.video_processor.to_dict().items() if k != "video_processor_type"}


# ---------------------------------------------------------------------------------------------------- data


def nano_files(folder: Path, skills, samples: int) -> tuple[dict[str, str], dict[str, str]]:
    """Held-out samples of nano's skills as benchmark files, written once.

    Returns:
        {skill: file}, and {skill: why not} for those whose data (spoken words, fonts) are not on this machine.
    """
    from .nano_data.prompts import save_prompts

    files, missing = {}, {}
    for skill in skills:
        place = folder / f"{skill}-{samples}"
        if not (place / "prompts.jsonl").is_file():
            try:
                save_prompts(place, [skill], samples, "heldout", FIRST_SEED)
            except (OSError, ImportError) as error:
                missing[skill] = " ".join(str(error).split())
                continue
        files[skill] = str(place / "prompts.jsonl")
    return files, missing


def has_video(file: str) -> bool:
    """Whether any of a file's first rows holds a video."""
    rows = JsonlRows(file)
    for number in range(min(len(rows), 20)):
        try:
            messages, _ = question_of(rows[number], Path(file).absolute().parent)
        except OmniInputError:
            continue
        parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
        if any(str(part.get("type")).removesuffix("_url") == "video" for part in parts):
            return True
    return False


# ---------------------------------------------------------------------------------------------------- cells


def synthetic_clip(frames: int, side: int, fps: float = 30.0) -> VideoClip:
    """A bright square that crosses noise, uint8 [frames, side, side, 3], without sound."""
    rng = np.random.default_rng(0)
    pictures = np.repeat(rng.integers(0, 120, (1, side, side, 3), dtype=np.uint8), frames, 0)
    for number in range(frames):
        left = (side - side // 4) * number // max(1, frames - 1)
        pictures[number, side // 3 : side // 2, left : left + side // 4] = 230
    return VideoClip(frames=pictures, frame_indices=list(range(frames)), fps=fps, duration=frames / fps)


def first_token(model, processor, clip: VideoClip, rate: float | None, repeats: int) -> dict:
    """Time to the first token of a question about a clip, one request at a time: processor, tower, prefill.

    Returns:
        {"seconds" (of every repeat, after one that does not count), "mean", "prompt_tokens", "video_tokens", "device"}.
    """
    seconds, part = [], {"type": "video", "video": clip, "name": "clip"}
    for _ in range(repeats + 1):
        started = time.monotonic()
        inputs = encode(model, processor, [user_message("What moves?", [part])], False, video_pruning_rate=rate)
        encoded = time.monotonic() - started
        end = list(stream_answer(model, processor, inputs, max_new_tokens=1, temperature=0))[-1][1]
        seconds.append(encoded + end["first_token_seconds"])
    tokens = token_counts(inputs)
    found = {"seconds": seconds[1:], "mean": sum(seconds[1:]) / repeats, "prompt_tokens": sum(tokens.values())}
    return found | {"video_tokens": tokens["video"], "device": str(model.device), "dtype": str(model.dtype)}


class Tables:
    """What all cells of a run share.

    Args:
        load: () -> model and processor; called where a cell is not done yet.
        folder: for everything that is written.
        model_name: of the settings.
        samples, runs: of every cell.
        options: of `evaluate_file`, for all cells alike.
    """

    def __init__(self, load: Callable, folder: Path, model_name: str, samples: int, runs: int, options: dict):
        self.load, self.folder, self.model_name = load, folder, model_name
        self.samples, self.runs, self.options = samples, runs, options
        (folder / "cells").mkdir(parents=True, exist_ok=True)

    def cell(self, name: str, file: str, frames: int | None = None, rate: float = 0.0, tubelets: bool = True, **own):
        """One evaluation: {"score", "low", "high", "rows", "errors", "prompt_tokens", ...} of all its rows.

        Args:
            frames: of a video at most. rate: of EVS. own: thinking, reasoning_budget, reasoning_grace.
        """
        slug = name + "".join(f"-{key}{value}" for key, value in sorted(own.items()) if value is not None)
        slug += f"-f{frames}" * (frames is not None) + f"-q{rate:g}" * bool(rate) + "-frames" * (not tubelets)
        options = copy.copy(self.options)
        encode_options = dict(options.pop("encode_options", None) or {})
        if frames is not None:  # a row's own number of frames yields to the cap
            encode_options |= {"num_frames": frames, "max_frames": frames}
        encode_options["video_pruning_rate"] = rate
        table, _ = evaluate_file(
            self.load, slug, file, self.folder / "cells", self.samples, runs=self.runs, model_name=self.model_name,
            adjust=None if tubelets else without_tubelets, encode_options=encode_options, **(options | own),
        )  # fmt: skip
        return merged(table)

    def ttft(self, clip: tuple[int, int], repeats: int, rate: float = 0.0, tubelets: bool = True) -> dict:
        """`first_token`, measured once and kept."""
        frames, side = clip
        path = self.folder / "cells" / f"ttft-{frames}x{side}-q{rate:g}{'' if tubelets else '-frames'}"
        settings = {"fingerprint": checkpoint_fingerprint(self.model_name), "repeats": repeats}
        check_settings(path.with_name(path.name + ".settings.json"), settings)
        found = path.with_name(path.name + ".json")
        if not found.is_file():
            model, processor = self.load()
            processor = processor if tubelets else without_tubelets(processor)
            measured = first_token(model, processor, synthetic_clip(frames, side), rate, repeats)
            write_atomically(found, json.dumps(measured, indent=1))
        return json.loads(found.read_text())


def merged(table: list[dict]) -> dict:
    """`summary_rows` of one file as one line: the row over all sources, the mean over verifiers weighed by rows."""
    verifiers = {row["verifier"]: row for row in table}  # the last of a verifier is that over all sources
    rows = [row for row in verifiers.values() if row["score"] is not None]
    if not rows:
        return {"score": None, "rows": sum(row["rows"] for row in table), "errors": sum(row["errors"] for row in table)}
    total = sum(row["counted"] for row in rows)
    line = {"rows": sum(row["rows"] for row in verifiers.values())}
    line["errors"] = sum(row["errors"] for row in verifiers.values())
    for key in ("score", "low", "high", "prompt_tokens", "generated_tokens", "cut_off", "thought_cut"):
        if all(key in row for row in rows):
            line[key] = sum(row[key] * row["counted"] for row in rows) / total
    return line | {"verifiers": sorted(verifiers)}


def mean_of(cells: list[dict], key: str = "score") -> float | None:
    values = [cell[key] for cell in cells if cell.get(key) is not None]
    return sum(values) / len(values) if values else None


# ---------------------------------------------------------------------------------------------------- tables


def made_table(title: str, columns: list[str], rows: list[dict], notes: list[str]) -> dict:
    """Rows are {"name", "cells": {column: cell}, and further columns as text under "more": {column: text}}."""
    for row in rows:
        row["mean"] = mean_of(list(row["cells"].values()))
    return {"title": title, "columns": columns, "rows": rows, "notes": notes}


def modes_table(tables: Tables, files: dict[str, str]) -> dict:
    """Reasoning off and on (the columns of Tables 7 and 9)."""
    rows = []
    for name, thinking in (("reasoning off", False), ("reasoning on", True)):
        cells = {data: tables.cell(data, file, thinking=thinking) for data, file in files.items()}
        more = {"new tokens": f"{mean_of(list(cells.values()), 'generated_tokens') or 0:.0f}"}
        rows.append({"name": name, "cells": cells, "more": more})
    return made_table("Reasoning off and on", list(files), rows, [])


def budget_table(tables: Tables, files: dict[str, str], max_new_tokens: int, budgets: list[int] | None) -> dict:
    """Table 11: thoughts without a limit, and with budgets."""
    budgets = [round(share * max_new_tokens) for share in BUDGETS] if budgets is None else budgets
    grace = tables.options.get("reasoning_grace")
    grace = round(GRACE * max_new_tokens) if grace is None else grace
    rows = []
    for budget in (-1, *sorted(set(budgets) - {-1}, reverse=True)):
        own = {"thinking": True, "reasoning_budget": budget, "reasoning_grace": None if budget < 0 else grace}
        cells = {data: tables.cell(data, file, **own) for data, file in files.items()}
        every = list(cells.values())
        more = {"new tokens": f"{mean_of(every, 'generated_tokens') or 0:.0f}"}
        more["thoughts cut"] = "" if budget < 0 else f"{100 * (mean_of(every, 'thought_cut') or 0):.0f} %"
        more["answers cut off"] = f"{100 * (mean_of(every, 'cut_off') or 0):.0f} %"
        rows.append({"name": "none" if budget < 0 else str(budget), "cells": cells, "more": more})
    note = f"A budget has a grace period of {grace} tokens; {max_new_tokens} new tokens at most."
    return made_table("Table 11: reasoning budget", list(files), rows, [note])


def video_rows(
    tables: Tables, files: dict[str, str], frames: list[int], ways: list[tuple], clip: tuple[int, int], repeats: int
) -> list[dict]:
    """A row per way (name, tubelets, EVS rate): every file at every number of frames, reasoning off, and the TTFT."""
    rows = []
    for name, tubelets, rate in ways:
        cells = {}
        for data, file in files.items():
            for count in frames:
                own = {"thinking": False, "frames": count, "rate": rate, "tubelets": tubelets}
                cells[f"{data} {count}f"] = tables.cell(data, file, **own)
        more = {f"mean {count}f": mean_text([cells[f"{data} {count}f"] for data in files]) for count in frames}
        ttft = tables.ttft(clip, repeats, rate, tubelets)
        more["prompt tokens"] = f"{mean_of(list(cells.values()), 'prompt_tokens') or 0:.0f}"
        more |= {"TTFT (ms)": f"{1000 * ttft['mean']:.0f}", "its prompt tokens": str(ttft["prompt_tokens"])}
        rows.append({"name": name, "cells": cells, "more": more, "ttft": ttft})
    return rows


def mean_text(cells: list[dict]) -> str:
    mean = mean_of(cells)
    return "" if mean is None else f"{100 * mean:.1f}"


def video_notes(frames: list[int], clip: tuple[int, int], repeats: int, rows: list[dict]) -> list[str]:
    device = rows[0]["ttft"]["device"]
    return [
        f"Frames: {' and '.join(map(str, frames))} at most; a shorter clip has fewer. Reasoning off.",
        f"TTFT: mean of {repeats} requests, one at a time, about a drawn clip of {clip[0]} frames of {clip[1]} x"
        f" {clip[1]}, on {device}: processor, tower and prefill; the clip is in memory, no server is in between.",
        "EVS never drops a video's first tubelet, so a clip of few tubelets keeps more than 1 - q of its tokens.",
    ]


def tubelet_table(tables: Tables, files: dict, frames: list[int], clip: tuple[int, int], repeats: int) -> dict:
    """Table 12: tubelets and EVS, on and off."""
    ways = [("single frames", False, 0.0), ("single frames + EVS", False, ON_OFF_RATE)]
    ways += [("tubelets", True, 0.0), ("tubelets + EVS", True, ON_OFF_RATE)]
    rows = video_rows(tables, files, frames, ways, clip, repeats)
    notes = [
        f"EVS at q = {ON_OFF_RATE}. The video tower embeds two frames at a time and was trained so: a single frame is "
        "paired with itself, as the last frame of an odd clip is in training. Single frames are thus read in a way "
        "that the model was not trained on; their scores say nothing about a model that was.",
        *video_notes(frames, clip, repeats, rows),
    ]
    return made_table("Table 12: tubelets and EVS", list(rows[0]["cells"]), rows, notes)


def rates_table(
    tables: Tables, files: dict, frames: list[int], clip: tuple[int, int], repeats: int, rates: list[float]
) -> dict:
    """Table 13: EVS rates with tubelets."""
    ways = [("none", True, 0.0)] + [(f"{rate:g}", True, rate) for rate in rates]
    rows = video_rows(tables, files, frames, ways, clip, repeats)
    notes = video_notes(frames, clip, repeats, rows)
    return made_table("Table 13: EVS rate q", list(rows[0]["cells"]), rows, notes)


def table_markdown(table: dict) -> str:
    """A table with its notes; scores in percent."""
    more = list(table["rows"][0].get("more", {}))
    with_mean = not any(name.startswith("mean ") for name in more)
    heads = ["", *table["columns"], *["mean"] * with_mean, *more]
    lines = [f"### {table['title']}", "", f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in table["rows"]:
        cells = [mean_text([row["cells"][column]]) for column in table["columns"]]
        cells += [mean_text(list(row["cells"].values()))] * with_mean
        lines.append(f"| {' | '.join([row['name'], *cells, *(row['more'][name] for name in more)])} |")
    cells = [cell for row in table["rows"] for cell in row["cells"].values() if cell.get("score") is not None]
    notes = list(table["notes"])
    if cells:
        widest = max(max(cell["high"] - cell["score"], cell["score"] - cell["low"]) for cell in cells)
        errors = sum(cell["errors"] for cell in cells)
        notes.append(f"95 % intervals reach at most {100 * widest:.0f} points to a side; {errors} rows had errors.")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def make_tables(
    load: Callable,
    folder: Path,
    model_name: str,
    chosen: list[str],
    data: dict[str, str] | None,
    samples: int,
    max_new_tokens: int,
    frames: list[int],
    clip: tuple[int, int],
    repeats: int = 5,
    runs: int = 1,
    budgets: list[int] | None = None,
    rates: list[float] = RATES,
    progress: Callable[[str], None] = lambda text: None,
    show: bool = False,
    **options,
) -> list[dict]:
    """The tables, one after another; each is written to `folder` when it is made, with its plot.

    Args:
        load, folder, model_name: of `Tables`. chosen: of TABLES.
        data: benchmarks by name, those with videos for Tables 12 and 13, all for the others; None: nano's skills.
        samples: rows of every benchmark at most. runs: answers to every row.
        max_new_tokens: of reasoning and answer. frames: numbers of frames of Tables 12 and 13.
        clip: frames and side of the clip whose TTFT is measured, `repeats` times.
        budgets, rates: of Tables 11 and 13; None: BUDGETS.
        progress: told what comes next. show: bars of the cells on stderr.
        options: of `evaluate_file`.

    Raises:
        OmniInputError: an unknown table, no data for one.
    """
    unknown = [name for name in chosen if name not in TABLES]
    if unknown:
        raise OmniInputError(f"unknown tables {', '.join(unknown)}; known: {', '.join(TABLES)}")
    tables = Tables(
        load, folder, model_name, samples, runs, {"max_new_tokens": max_new_tokens, "progress": show, **options}
    )
    made = []
    for name in chosen:
        skills = {"modes": EVERY_KIND, "11": REASONED}.get(name, VIDEOS)
        files, missing = dict(data or {}), {}
        if data is None:
            progress(f"table {name}: held-out tasks of nano")
            files, missing = nano_files(folder / "data", skills, samples)
        elif name in ("12", "13"):
            files = {key: file for key, file in files.items() if has_video(file)}
        if not files:
            raise OmniInputError(f"table {name} has no data: " + ("; ".join(missing.values()) or "no file with videos"))
        progress(f"table {name}: {', '.join(files)}")
        if name == "modes":
            table = modes_table(tables, files)
        elif name == "11":
            table = budget_table(tables, files, max_new_tokens, budgets)
        elif name == "12":
            table = tubelet_table(tables, files, frames, clip, repeats)
        else:
            table = rates_table(tables, files, frames, clip, repeats, list(rates))
        table["notes"] += [f"{skill} is left out: {why}" for skill, why in missing.items()]
        if data is None:
            table["notes"].append(f"Benchmarks are nano's held-out tasks, {samples} samples each, clips as MP4.")
        table["table"] = name
        made.append(table)
        try:
            plot_table(table, folder / f"table-{name}.png")
        except ImportError as error:
            progress(f"no plot: {error}")
        (folder / f"table-{name}.md").write_text(table_markdown(table) + "\n")
    return made


def plot_table(table: dict, path: Path) -> None:
    """Scores of every benchmark over the rows of a table, their mean in bold, and the TTFT on an axis of its own."""
    from .reporting import plot_lines

    names = [row["name"] for row in table["rows"]]
    lines = {c: [row["cells"][c].get("score") for row in table["rows"]] for c in table["columns"]}
    lines = {name: [None if v is None else 100 * v for v in values] for name, values in lines.items()}
    means = [None if row["mean"] is None else 100 * row["mean"] for row in table["rows"]]
    right = [1000 * row["ttft"]["mean"] for row in table["rows"]] if "ttft" in table["rows"][0] else None
    plot_lines(path, table["title"], names, lines | {"mean": means}, "score, %", right, "time to first token, ms")


__all__ = ["make_tables", "table_markdown", "without_tubelets"]
