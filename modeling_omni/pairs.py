"""Preference pairs by rejection sampling (paper 3.2.1): `train.py pairs`.

A policy answers every prompt several times, the row's verifier grades the answers, and the best is preferred to the
worst where their scores are at least `margin` apart. Answers that were cut off are left out of both sides: a pair would
teach an end that was never written. The rollouts are those of `train.py filter` (resumed and reused in the same way).

A pair is {"prompt", "chosen", "rejected", "prompt_opened_think", "chosen_score", "rejected_score"} with "id" and
"source" where the row has them; answers are whole: what the policy wrote after the generation prompt, without the end
mark.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .filtering import group_of
from .media import OmniInputError
from .rewards import END_MARKS, without_end_marks
from .rollouts import RolloutArguments, answer_seed, left_out, measured_rows, read_rows, write_rows
from .training import _key

PAIRS_FILE = "pairs.jsonl"
REASONS = ("none_right", "none_wrong", "too_close", "cut_off")


@dataclass
class PairsArguments(RolloutArguments):
    """Every key of a YAML file for `train.py pairs`."""

    margin: float = _key(0.5, "the least difference between the scores of the chosen and the rejected answer")


def choose_pair(row: dict, completions: list[str], scores: list[float], margin: float, seed: int) -> dict | str:
    """A pair, or why there is none (one of REASONS); among equally good answers one is drawn.

    Args:
        completions: whole answers with their end marks. scores: of each, in [0, 1].
    """
    ended = [
        (score, without_end_marks(text))
        for text, score in zip(completions, scores, strict=True)
        if text.rstrip().endswith(END_MARKS)
    ]
    ended = [(score, text) for score, text in ended if text.strip()]
    if len(ended) < 2:
        return "cut_off"
    best, worst = max(score for score, _ in ended), min(score for score, _ in ended)
    if best - worst < margin or best == worst:
        return "none_right" if best < margin else "none_wrong" if worst > 1 - margin else "too_close"
    rng = random.Random(answer_seed(seed, row, -1))
    chosen = rng.choice(sorted({text for score, text in ended if score == best}))
    rejected = rng.choice(sorted({text for score, text in ended if score == worst}))
    pair = {name: row[name] for name in ("id", "source", "group", "tools") if row.get(name) is not None}
    pair |= {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
    pair |= {"prompt_opened_think": row.get("prompt_opened_think", True)}
    return pair | {"chosen_score": best, "rejected_score": worst}


def build_pairs(rows: list[dict], measured: list[dict], margin: float = 0.5, seed: int = 0) -> tuple[list, dict]:
    """Pairs of all rows that have one, and a report.

    Args:
        measured: {"scores", "completions"} of every row (`measure_pass_rates` with `texts`); rows with "error" are
            left out.

    Returns:
        pairs, {(source, group): {"prompts", "pairs", *REASONS, "chosen_score", "rejected_score", "chosen_length",
        "rejected_length" (means over the pairs; lengths in characters)}}
    """
    pairs, report = [], {}
    for row, record in zip(rows, measured, strict=True):
        if "error" in record:
            continue
        counts = report.setdefault((row.get("source") or "", group_of(row)), Counter())
        counts["prompts"] += 1
        pair = choose_pair(row, record["completions"], record["scores"], margin, seed)
        if isinstance(pair, str):
            counts[pair] += 1
            continue
        pairs.append(pair)
        counts["pairs"] += 1
        for side in ("chosen", "rejected"):
            counts[f"{side}_score"] += pair[f"{side}_score"]
            counts[f"{side}_length"] += len(pair[side])
    names = ("prompts", "pairs", *REASONS)
    means = [f"{side}_{what}" for side in ("chosen", "rejected") for what in ("score", "length")]
    return pairs, {
        key: {name: counts[name] for name in names} | {name: counts[name] / max(1, counts["pairs"]) for name in means}
        for key, counts in report.items()
    }


def pairs_markdown(report: dict) -> str:
    """`build_pairs`' report as a Markdown table, with a last line for all."""
    names = ("prompts", "pairs", *REASONS)
    lines = [
        "| source | group | " + " | ".join(name.replace("_", " ") for name in names) + " | scores | characters |",
        "|---|---|" + "---:|" * (len(names) + 2),
    ]
    for (source, group), row in sorted(report.items()):
        scores = f"{row['chosen_score']:.2f} / {row['rejected_score']:.2f}"
        lengths = f"{row['chosen_length']:.0f} / {row['rejected_length']:.0f}"
        cells = [*(str(row[name]) for name in names), *((scores, lengths) if row["pairs"] else ("", ""))]
        lines.append(f"| {source} | {group} | " + " | ".join(cells) + " |")
    sums = [str(sum(row[name] for row in report.values())) for name in names]
    return "\n".join([*lines, "| all | | " + " | ".join(sums) + " | | |"])


def make_pairs(args: PairsArguments) -> str | None:
    """Writes `pairs.jsonl`, with the report beside it; returns the report (on process 0).

    Raises:
        OmniInputError: fewer pairs than `at_least`.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not 0 < args.margin <= 1:
        raise OmniInputError(f"margin is {args.margin}; scores are in [0, 1]: give more than 0 and at most 1")
    rows, names, bad = read_rows(args.data)
    measured = measured_rows(args, rows, names, bad, texts=True)
    if measured is None:
        return None
    pairs, report = build_pairs(rows, measured, args.margin, args.seed)
    text = pairs_markdown(report) + left_out(bad)
    (folder / "report.md").write_text(text + "\n")
    (folder / "report.json").write_text(json.dumps([{"source": s, "group": g} | r for (s, g), r in report.items()]))
    if len(pairs) < args.at_least:
        raise OmniInputError(
            f"{len(pairs)} pairs of {len(rows)} prompts, at_least {args.at_least}; see {folder}/report.md"
        )
    write_rows(folder / PAIRS_FILE, pairs)
    return text


__all__ = ["PairsArguments", "build_pairs", "choose_pair", "make_pairs", "pairs_markdown"]
