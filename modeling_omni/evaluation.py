"""Held-out accuracy of the nano model's skills: real prompts through `generate`, exact match on the answer.

    python -m modeling_omni.evaluation --keep 0.5 0.25

tells what dropping visual tokens costs (token_reduction.py), against random, uniform and EVS-only reduction at the same
budget.
"""

import argparse
import dataclasses
import json
import logging

import torch
from tqdm.auto import tqdm

from .evs import reserve_kept_tokens
from .inference import encode, generation_options, split_tokens
from .media import OmniInputError
from .metrics import wilson_interval

logger = logging.getLogger(__name__)

THOUGHT_SKILLS = ("text_math",)  # these need a thought; the others are asked for the answer alone
ANSWER_TOKENS = {"image_document": 224, "speech_times": 64}  # room for an answer; 40 for other skills
FIRST_SEED = 10**6


@torch.no_grad()
def answer_batch(
    model,
    processor,
    conversations: list[list[dict]],
    thinking: bool,
    max_new_tokens: int,
    reasoning_budget: int | None = None,
    reasoning_grace: int | None = None,
    **options,
) -> list[str]:
    """Greedy answers (text after the reasoning) to conversations that end with a user's turn; options of `generate`.

    The reasoning budget is that of `reasoning_limits`.
    """
    inputs = encode(model, processor, conversations, thinking, padding=True)
    rate = options.pop("video_pruning_rate", None)
    if rate and "video_grid_thw" in inputs:  # `generate` would return the shortened prompt
        inputs = reserve_kept_tokens(inputs, rate, model.config.merge_size)
    limits = {"reasoning_budget": reasoning_budget, "reasoning_grace": reasoning_grace}
    options |= generation_options(model, processor, max_new_tokens, prompt_ids=inputs["input_ids"], **limits)
    ids = model.generate(**inputs, do_sample=False, **options)
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    pieces = [split_tokens(processor, row, thinking) for row in rows]
    return ["".join(text for section, text in row if section == "answer") for row in pieces]


def taken_away(content: str | list[dict], part: str) -> str | list[dict]:
    """A message's content without its "sound" (spoken parts, and the sound of clips) or without its "picture" (images,
    and the frames of clips, whose sound stays as a spoken part)."""
    if isinstance(content, str):
        return content
    kept = []
    for one in content:
        if part == "sound" and one["type"] == "video":
            kept.append(one | {"video": dataclasses.replace(one["video"], audio=None)})
        elif part == "picture" and one["type"] == "video" and one["video"].audio is not None:
            kept.append({"type": "audio", "audio": (one["video"].audio, 16000)})
        elif one["type"] not in ({"sound": ("audio",), "picture": ("image", "video")}[part]):
            kept.append(one)
    return kept


def heldout_table(
    model,
    processor,
    skills: list[str],
    samples: int = 100,
    batch_size: int = 25,
    first_seed: int = FIRST_SEED,
    thinking: bool | None = None,
    progress: bool = False,
    without: str | None = None,
    options: dict | None = None,
    outcomes: bool = False,
) -> list[dict]:
    """One row per skill, on `samples` held-out samples of the seeds from `first_seed` on.

    Args:
        thinking: whether the model thinks before it answers; None: only in THOUGHT_SKILLS.
        progress: show a bar on stderr.
        without: "sound" or "picture": take it out of the prompts, to see what an answer rests on (`taken_away`).
        options: further arguments of `generate`.
        outcomes: add "outcomes", whether each answer is right, in the order of the seeds.

    Returns:
        [{"skill", "samples", "right", "accuracy", "low", "high" (95 %), "thinking"}], or {"skill", "skipped": reason}
        where the skill's data (spoken words, fonts) are not on this machine.

    Raises:
        OmniInputError: an unknown skill, or a number of samples below 1.
    """
    from .nano_data import GROUNDING_SKILLS, SKILLS, make_sample, score

    known = (*SKILLS, *GROUNDING_SKILLS)
    unknown = [skill for skill in skills if skill not in known]
    if unknown:
        raise OmniInputError(f"unknown skills {', '.join(unknown)}; known: {', '.join(known)}")
    if samples < 1 or batch_size < 1:
        raise OmniInputError(f"samples is {samples} and batch_size {batch_size}; give at least 1")
    table = []
    with tqdm(total=len(skills) * samples, unit="sample", disable=not progress, leave=False) as bar:
        for skill in skills:
            bar.set_description(skill)
            think = skill in THOUGHT_SKILLS if thinking is None else thinking
            passed, skipped = [], None
            for start in range(0, samples, batch_size):
                seeds = range(first_seed + start, first_seed + min(start + batch_size, samples))
                try:
                    rows = [make_sample(skill, seed, "heldout") for seed in seeds]
                except (OSError, ImportError) as error:  # no spoken words, no fonts, no package with the real digits
                    skipped = " ".join(str(error).split())
                    break
                prompts = [row["messages"][:-1] for row in rows]
                if without:
                    prompts = [[m | {"content": taken_away(m["content"], without)} for m in one] for one in prompts]
                room = ANSWER_TOKENS.get(skill, 40) + 24 * think
                answers = answer_batch(model, processor, prompts, think, room, **(options or {}))
                passed += [score(row, answer) for row, answer in zip(rows, answers)]
                bar.update(len(rows))
            if skipped is not None:
                bar.total -= samples
                bar.refresh()
                table.append({"skill": skill, "skipped": skipped})
                continue
            right = sum(passed)
            low, high = wilson_interval(right, samples)
            row = {"skill": skill, "samples": samples, "right": right, "accuracy": right / samples}
            row |= {"low": low, "high": high, "thinking": think}
            table.append(row | ({"outcomes": passed} if outcomes else {}))
    return table


def heldout_accuracy(model, processor, skills: list[str], samples: int = 100, **options) -> dict[str, float]:
    """Share of right answers per skill (see `heldout_table`); skills without data are left out with a warning."""
    accuracy = {}
    for row in heldout_table(model, processor, skills, samples, **options):
        if "skipped" in row:
            logger.warning("no held-out test of %s: %s", row["skill"], row["skipped"])
        else:
            accuracy[row["skill"]] = row["accuracy"]
    return accuracy


def reduction_table(
    model, processor, skills: list[str], keeps: list[float], samples: int = 100, progress: bool = False, **options
) -> list[dict]:
    """Accuracy with fewer visual tokens: rows of `heldout_table` with "keep" and "how".

    How: "all" (keep 1); "query", "random", "uniform" (`generate(visual_keep=keep, visual_scoring=how)`: a mean over the
    layers); "evs" (`video_pruning_rate=1 - keep`: the same share in every layer, and never less than a video's first
    tubelet; videos only).

    Args:
        options: of `heldout_table`.
    """
    rows = []
    ways = [("all", 1.0, {})]
    for keep in keeps:
        ways += [(how, keep, {"visual_keep": keep, "visual_scoring": how}) for how in ("query", "random", "uniform")]
        ways.append(("evs", keep, {"video_pruning_rate": 1 - keep}))
    for how, keep, more in ways:
        torch.manual_seed(0)
        chosen = [skill for skill in skills if how != "evs" or skill.startswith("video")]
        table = heldout_table(model, processor, chosen, samples, progress=progress, options=more, **options)
        rows += [row | {"keep": keep, "how": how} for row in table]
    return rows


def reduction_markdown(rows: list[dict]) -> str:
    """`reduction_table` as Markdown: a line per skill and a column per way, and the means of pictures and of videos."""
    ways = list(dict.fromkeys((row["keep"], row["how"]) for row in rows))
    found = {(row["skill"], row["keep"], row["how"]): row["accuracy"] for row in rows if "accuracy" in row}
    skills = list(dict.fromkeys(row["skill"] for row in rows if "accuracy" in row))
    lines = ["| skill | " + " | ".join(f"{how} {keep:g}" for keep, how in ways) + " |", "|---|" + "--:|" * len(ways)]
    for skill in skills:
        cells = [found.get((skill, *way)) for way in ways]
        lines.append(f"| {skill} | " + " | ".join("" if c is None else f"{100 * c:.0f} %" for c in cells) + " |")
    for kind in ("image", "video"):  # apart, since EVS is for videos only
        own = [skill for skill in skills if skill.startswith(kind)]
        means = [[found[(skill, *way)] for skill in own if (skill, *way) in found] for way in ways]
        cells = [f"{100 * sum(mean) / len(mean):.1f} %" if mean else "" for mean in means]
        lines.append(f"| mean of {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    from transformers.utils import logging as transformers_logging

    from .inference import load
    from .nano_data import SKILLS

    transformers_logging.disable_progress_bar()
    seen = [s for s in SKILLS if s.startswith(("image_", "video_"))]
    parser = argparse.ArgumentParser(prog="python -m modeling_omni.evaluation", description=reduction_table.__doc__)
    parser.add_argument("--model", default="nano", help="nano (the default) or a checkpoint folder")
    parser.add_argument(
        "--skills", default=",".join(seen), help="comma-separated (default: all with pictures or video)"
    )
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25], help="shares of visual tokens to keep")
    parser.add_argument("--samples", type=int, default=100, help="of every skill (default: 100)")
    parser.add_argument("--out", help="also write the rows as JSON")
    given = parser.parse_args(argv)
    model, processor = load(given.model)
    rows = reduction_table(model, processor, given.skills.split(","), given.keep, given.samples, progress=True)
    print(reduction_markdown(rows))
    if given.out:
        with open(given.out, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


def markdown_table(table: list[dict]) -> str:
    """`heldout_table` as Markdown."""
    lines = ["| skill | held-out accuracy | 95 % interval | samples |", "|---|---:|---:|---:|"]
    for row in table:
        if "skipped" in row:
            lines.append(f"| {row['skill']} | skipped: {row['skipped'].replace('|', '/')} | | |")
        else:
            interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
            lines.append(f"| {row['skill']} | {100 * row['accuracy']:.1f} % | {interval} | {row['samples']} |")
    return "\n".join(lines)


__all__ = [
    "answer_batch",
    "heldout_accuracy",
    "heldout_table",
    "markdown_table",
    "reduction_markdown",
    "reduction_table",
    "wilson_interval",
]

if __name__ == "__main__":
    raise SystemExit(main())
