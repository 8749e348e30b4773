"""Two models on the same held-out prompts: what changed, and whether chance would do as much.

Accuracies of two models on the same prompts are not independent: only the prompts that one answers and the other does
not tell them apart. McNemar's exact test asks whether these are evenly shared; the interval of the difference is Bonett
and Price's (2012): Wald's with one prompt added to either kind, which keeps its level where few prompts differ. With
many skills some pass 5 % by chance alone, so p-values corrected after Holm stand beside the plain ones.

Sampled answers are compared by their scores: the mean of a prompt's rollouts, and over the prompts the paired
difference with its normal interval (`rollouts_table`).
"""

import math
import statistics
from pathlib import Path

from .filtering import rollout_records
from .media import OmniInputError

Z = 1.959964  # of a 95 % interval
POWERED = 1000  # prompts below which small changes cannot be told from chance


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided p-value that of gained + lost prompts so uneven a share was gained by chance (half is expected)."""
    total, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)  # integers: exact whatever the size


def paired_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same `total` prompts."""
    up, down, size = gained + 1, lost + 1, total + 2
    middle = (up - down) / size
    half = Z * math.sqrt(max(0.0, (up + down) / size - middle**2) / size)
    return max(-1.0, middle - half), min(1.0, middle + half)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979), in their order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, most = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = most
    return corrected


def paired_row(skill: str, first: list[bool], second: list[bool]) -> dict:
    """The change from the first model to the second.

    Returns:
        {"skill", "samples", "first", "second" (accuracies), "gained", "lost" (prompts), "difference", "low", "high"
        (95 %), "p"}
    """
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    total = len(first)
    low, high = paired_interval(gained, lost, total)
    row = {"skill": skill, "samples": total, "first": sum(first) / total, "second": sum(second) / total}
    row |= {"gained": gained, "lost": lost, "difference": (gained - lost) / total, "low": low, "high": high}
    return row | {"p": mcnemar_exact(gained, lost)}


def paired_table(first: list[dict], second: list[dict]) -> list[dict]:
    """Two tables of `heldout_table(outcomes=True)` on the same samples -> a `paired_row` per skill and one for "all".

    Skills that either could not be tested on are left out. Rows of skills have "p_holm".
    """
    outcomes = [{row["skill"]: row["outcomes"] for row in table if "outcomes" in row} for table in (first, second)]
    skills = [skill for skill in outcomes[0] if skill in outcomes[1]]
    rows = [paired_row(skill, outcomes[0][skill], outcomes[1][skill]) for skill in skills]
    for row, p in zip(rows, holm([row["p"] for row in rows])):
        row["p_holm"] = p
    if rows:
        every = [[one for skill in skills for one in table[skill]] for table in outcomes]
        rows.append(paired_row("all", *every))
    return rows


def interval_cell(row: dict) -> str:
    """ "low" and "high" of a difference between shares, in points."""
    return f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"


def paired_markdown(rows: list[dict], first: str, second: str) -> str:
    """`paired_table` as Markdown; changes that hold after Holm's correction (and that of "all") are in bold."""
    lines = [
        f"| skill | prompts | {first} | {second} | change | 95 % interval | gained / lost | p | p, Holm |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        change = f"{100 * row['difference']:+.1f}"
        change = f"**{change}**" if row.get("p_holm", row["p"]) < 0.05 else change
        accuracies = " | ".join(f"{100 * row[name]:.1f} %" for name in ("first", "second"))
        holm_p = f"{row['p_holm']:.2g}" if "p_holm" in row else ""
        lines.append(
            f"| {row['skill']} | {row['samples']} | {accuracies} | {change} | {interval_cell(row)} | {row['gained']} /"
            f" {row['lost']} | {row['p']:.2g} | {holm_p} |"
        )
    return "\n".join(lines)


def read_rollouts(folder: str | Path) -> dict[str, tuple[str, float]]:
    """id -> (source, mean score) of the rollouts that `train.py filter` has left in a folder.

    Raises:
        OmniInputError: there are none, or one without an id or scores.
    """
    found = {}
    for where, record in rollout_records(Path(folder)):
        if not isinstance(record.get("id"), (str, int)):
            raise OmniInputError(
                f"{where}: this prompt has no 'id', by which it would be found in the other folder; give the prompts "
                "ids and run train.py filter again"
            )
        try:
            found[record["id"]] = str(record.get("source") or ""), statistics.fmean(record["scores"])
        except (KeyError, TypeError, ValueError, statistics.StatisticsError) as error:
            raise OmniInputError(f"{where}: 'scores' must be a list of numbers; run train.py filter again") from error
    if not found:
        raise OmniInputError(f"{folder} holds no rollouts (pass_rates-*.jsonl): run train.py filter")
    return found


def rollouts_table(first: str | Path, second: str | Path) -> list[dict]:
    """Mean scores of two policies' sampled answers to the same prompts, per source and for "all".

    Returns:
        [{"skill", "samples" (prompts), "first", "second", "difference", "low", "high" (95 %, of the difference)}]

    Raises:
        OmniInputError: a folder without rollouts, or no two prompts in common.
    """
    before, after = read_rollouts(first), read_rollouts(second)
    common = [name for name in before if name in after]
    if len(common) < 2:
        raise OmniInputError(f"{first} and {second} have {len(common)} prompts in common")
    rows = []
    for source in [*dict.fromkeys(before[name][0] for name in common), None]:
        names = [name for name in common if source is None or before[name][0] == source]
        changes = [after[name][1] - before[name][1] for name in names]
        middle = statistics.fmean(changes)
        half = Z * statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
        means = [statistics.fmean(scores[name][1] for name in names) for scores in (before, after)]
        row = {"skill": "all" if source is None else source, "samples": len(names), "first": means[0]}
        rows.append(row | {"second": means[1], "difference": middle, "low": middle - half, "high": middle + half})
    return rows


def rollouts_markdown(rows: list[dict], first: str, second: str) -> str:
    """`rollouts_table` as Markdown; differences whose interval leaves 0 out are in bold."""
    lines = [
        f"| sampled answers | prompts | {first} | {second} | change | 95 % interval |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        change = f"{100 * row['difference']:+.1f}"
        change = f"**{change}**" if row["low"] > 0 or row["high"] < 0 else change
        scores = f"{100 * row['first']:.1f} | {100 * row['second']:.1f}"
        lines.append(f"| {row['skill']} | {row['samples']} | {scores} | {change} | {interval_cell(row)} |")
    return "\n".join(lines)


__all__ = [
    "holm",
    "interval_cell",
    "mcnemar_exact",
    "paired_interval",
    "paired_markdown",
    "paired_row",
    "paired_table",
    "rollouts_markdown",
    "rollouts_table",
]
