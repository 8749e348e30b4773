"""Held-out accuracy of the nano model's skills: real prompts through `generate`, exact match on the answer."""

import dataclasses
import logging
import math

import torch
from tqdm.auto import tqdm

from .inference import split_tokens, suppressed_tokens
from .media import OmniInputError

logger = logging.getLogger(__name__)

THOUGHT_SKILLS = ("text_math",)  # these need a thought; the others are asked for the answer alone
FIRST_SEED = 10**6


@torch.no_grad()
def answer_batch(model, processor, conversations: list[list[dict]], thinking: bool, max_new_tokens: int) -> list[str]:
    """Greedy answers (text after the reasoning) to conversations that end with a user's turn."""
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        enable_thinking=thinking,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    suppressed = suppressed_tokens(model, processor)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, suppress_tokens=suppressed)
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    pieces = [split_tokens(processor, row, thinking) for row in rows]
    return ["".join(text for section, text in row if section == "answer") for row in pieces]


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default; sensible at 0 and 1 and for small samples too."""
    share, spread = right / total, z**2 / total
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


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
) -> list[dict]:
    """One row per skill, on `samples` held-out samples of the seeds from `first_seed` on.

    Args:
        thinking: whether the model thinks before it answers; None: only in THOUGHT_SKILLS.
        progress: show a bar on stderr.
        without: "sound" or "picture": take it out of the prompts, to see what an answer rests on (`taken_away`).

    Returns:
        [{"skill", "samples", "right", "accuracy", "low", "high" (95 %), "thinking"}], or {"skill", "skipped": reason}
        where the skill's data (spoken words, fonts) are not on this machine.

    Raises:
        OmniInputError: an unknown skill, or a number of samples below 1.
    """
    from .nano_data import SKILLS, make_sample, score

    unknown = [skill for skill in skills if skill not in SKILLS]
    if unknown:
        raise OmniInputError(f"unknown skills {', '.join(unknown)}; known: {', '.join(SKILLS)}")
    if samples < 1 or batch_size < 1:
        raise OmniInputError(f"samples is {samples} and batch_size {batch_size}; give at least 1")
    table = []
    with tqdm(total=len(skills) * samples, unit="sample", disable=not progress, leave=False) as bar:
        for skill in skills:
            bar.set_description(skill)
            think = skill in THOUGHT_SKILLS if thinking is None else thinking
            right, skipped = 0, None
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
                answers = answer_batch(model, processor, prompts, think, 64 if think else 40)
                right += sum(score(row, answer) for row, answer in zip(rows, answers))
                bar.update(len(rows))
            if skipped is not None:
                bar.total -= samples
                bar.refresh()
                table.append({"skill": skill, "skipped": skipped})
                continue
            low, high = wilson_interval(right, samples)
            row = {"skill": skill, "samples": samples, "right": right, "accuracy": right / samples}
            table.append(row | {"low": low, "high": high, "thinking": think})
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


__all__ = ["answer_batch", "heldout_accuracy", "heldout_table", "markdown_table", "wilson_interval"]
