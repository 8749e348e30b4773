"""Pass-rate filtering of reinforcement-learning prompts (paper sections 3.2.3 and 3.2.4).

Every prompt is answered eight times by the stage's initial policy, graded by the verifier it is trained with, and kept
if its pass rate lies in the band of the stage and its kind of media. Scores go to JSONL as they come, so a killed run
goes on where it was, and other bands can be tried without new rollouts. Unanswerable and mismatched prompts are exempt
from the bands (a policy that never abstains passes none of them) but capped; how often the policy abstains wrongly on
answerable prompts is reported, because abstaining is a cheap local optimum.

A row is {"prompt": messages, "answer", "verifier"} with optional "id", "source", "group", "args" (of the verifier),
"prompt_opened_think" (default True) and "unanswerable".
"""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm.auto import tqdm

from .data_adapters import KINDS
from .media_source import OmniInputError
from .rewards import answer_of, is_abstention, score, verifier_name

ROLLOUTS = 8
UNANSWERABLE = "unanswerable"
ABSTAIN_SHARE = 4 / 120  # of the prompts of a stage: 4K of 120K in the paper

# (least, below which): least <= pass rate < most. With eight rollouts 0..6, 1..7 and 3..5 of them pass.
BANDS = {
    "image_rl": {"default": (0.0, 0.8)},
    "omni_rl": {"default": (0.1, 0.9), "audio_qa": (0.3, 0.7)},
}


# ---------------------------------------------------------------------------------------------------- rows


def media_parts(prompt: str | list[dict]) -> list[dict]:
    """The media parts of a prompt's messages, in order."""
    messages = [] if isinstance(prompt, str) else prompt
    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    return [part for content in contents for part in content if part.get("type") in KINDS]


def group_of(row: dict) -> str:
    """The row's "group", else text, image, video, omni (several kinds of media), asr or audio_qa."""
    if row.get("group"):
        return row["group"]
    kinds = {part["type"] for part in media_parts(row["prompt"])}
    if len(kinds) > 1:
        return "omni"
    kind = kinds.pop() if kinds else "text"
    if kind == "audio":
        return "asr" if verifier_name(row["verifier"]) == "asr_wer" else "audio_qa"
    return kind


def is_unanswerable(row: dict) -> bool:
    """A prompt whose right answer is to abstain."""
    if "unanswerable" in row:
        return bool(row["unanswerable"])
    golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    abstains = bool(golds) and all(is_abstention(str(gold)) for gold in golds)
    return verifier_name(row["verifier"]) in ("string_match", "abstention") and abstains


def row_key(row: dict, policy: str, settings: dict) -> str:
    """Name of a row's scores: changes with the prompt, gold answer, verifier, policy and sampling settings."""
    names = ("id", "prompt", "answer", "verifier", "args", "prompt_opened_think")

    def in_memory(part):
        if row.get("id") is None:
            kind = type(part).__name__
            raise OmniInputError(f"a row with media in memory ({kind}) needs an 'id' to remember its pass rate by")
        return "media"

    text = json.dumps([{name: row.get(name) for name in names}, policy, settings], sort_keys=True, default=in_memory)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def mismatched_rows(
    rows: list[dict], count: int, seed: int = 0, fits: Callable[[dict, dict], bool] | None = None
) -> list[dict]:
    """Unanswerable prompts made of two: the words of one row with the media of another that has the same kinds.

    Meant for questions about what is in the medium; a question that any picture answers stays answerable.

    Args:
        fits: (row with the words, row with the media) -> whether these words cannot be answered from those media.

    Returns:
        Up to `count` new rows, with gold answer "unanswerable" and verifier abstention, which takes any words for it.
    """
    rng, pools = random.Random(seed), {}
    for row in rows:
        if parts := media_parts(row["prompt"]):
            pools.setdefault(tuple(part["type"] for part in parts), []).append(row)
    made = []
    for _, pool in sorted(pools.items()):
        order = rng.sample(pool, len(pool))
        for row, other in zip(order, order[1:] + order[:1]):
            donors = media_parts(other["prompt"])
            if other is row or donors == media_parts(row["prompt"]) or (fits is not None and not fits(row, other)):
                continue
            left, prompt = iter(donors), []
            for message in row["prompt"]:
                content = message.get("content")
                if isinstance(content, list):
                    content = [next(left) if part.get("type") in KINDS else part for part in content]
                prompt.append(message | {"content": content})
            kept = {k: v for k, v in row.items() if k not in ("id", "args")}
            new = {"prompt": prompt, "answer": UNANSWERABLE, "verifier": "abstention", "unanswerable": True}
            if row.get("id") is not None and other.get("id") is not None:
                new["id"] = f"{row['id']}|{other['id']}"
            made.append(kept | new)
    return rng.sample(made, min(count, len(made)))


# ---------------------------------------------------------------------------------------------------- rollouts


def rollout_records(folder: Path) -> Iterator[tuple[str, dict]]:
    """("file:line", what `measure_pass_rates` has written there); a line cut off by a kill is left out."""
    for path in sorted(folder.glob("pass_rates-*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield f"{path}:{number}", record


def read_scores(folder: Path) -> dict[str, dict]:
    """key -> {"scores", "abstained", "completions" (where kept)} of all files."""
    found = {}
    for _, record in rollout_records(folder):
        try:
            scores = {"scores": record["scores"], "abstained": record["abstained"]}
            kept = {"completions": record["completions"]} if "completions" in record else {}
            found[record["key"]] = found.get(record["key"], {}) | scores | kept
        except (KeyError, TypeError):
            continue
    return found


def measure_pass_rates(
    rows: list[dict],
    generate: Callable[[list[dict], int], list[list[str] | OmniInputError]],
    folder: str | Path,
    policy: str,
    settings: dict | None = None,
    rollouts: int = ROLLOUTS,
    batch_size: int = 16,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    reward: str = "answer",
    texts: bool = False,
) -> list[dict | None]:
    """Scores of every row's rollouts, generated where the folder does not hold them yet.

    Args:
        generate: (rows, n) -> n whole completions of each row, with their thinking tags, as the trainer samples them;
            for a row that cannot be used, an OmniInputError.
        folder: of the JSONL files; each process appends to its own and reads all.
        policy: what the initial policy is known by, such as a hash of its weights.
        settings: sampling settings, as the scores depend on them.
        rank, world_size: this process works on every `world_size`-th row; once all have finished, `measure_pass_rates`
            called again returns the scores of all rows from the files.
        reward: what is graded, see `grade`.
        texts: keep the completions too.

    Returns:
        {"scores": [rollouts], "abstained": int} per row, with "completions" [rollouts] if `texts`; {"error": text} for
        rows that cannot be used, None for rows that other processes have not finished.

    Raises:
        OmniInputError: rows that cannot be told apart later, an unknown verifier, too few completions.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"rollouts": rollouts, "reward": reward} | (settings or {})
    keys = [row_key(row, policy, settings) for row in rows]
    for row in rows:
        verifier_name(row["verifier"])
    found = {key: record for key, record in read_scores(folder).items() if not texts or "completions" in record}
    # equal rows share their scores
    missing = list({keys[i]: i for i in range(rank, len(rows), world_size) if keys[i] not in found}.values())
    path = folder / f"pass_rates-{rank}.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:  # a line cut off by a kill must not swallow the next
            file.write("\n")
    with path.open("a") as file, tqdm(total=len(missing), unit="prompt", disable=not progress, leave=False) as bar:
        for start in range(0, len(missing), batch_size):
            places = missing[start : start + batch_size]
            completions = generate([rows[i] for i in places], rollouts)
            counts = [rollouts if isinstance(samples, OmniInputError) else len(samples) for samples in completions]
            if counts != [rollouts] * len(places):
                raise OmniInputError(f"generate must return {rollouts} completions for each of {len(places)} prompts")
            for i, samples in zip(places, completions):
                if isinstance(samples, OmniInputError):  # not written down: it may be mended before the next run
                    found[keys[i]] = {"error": str(samples)}
                    continue
                found[keys[i]] = grade(rows[i], samples, reward) | ({"completions": samples} if texts else {})
                record = {"key": keys[i], "id": rows[i].get("id"), "source": rows[i].get("source")} | found[keys[i]]
                file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(places))
    return [found.get(key) for key in keys]


def grade(row: dict, completions: list[str], reward: str = "answer") -> dict:
    """Scores of the answers (format does not count) and how many of them abstain.

    Args:
        reward: the trainer's (gspo.py): "answer" or "format" grade the boxed answer, "text" all text after thinking.
    """
    opened, args = row.get("prompt_opened_think", True), row.get("args") or {}
    answers = [answer_of(text, row["verifier"], opened, whole=reward == "text") for text in completions]
    scores = [score(row["verifier"], answer, row["answer"], **args) for answer in answers]
    # a refusal may stand without the box that an answer needs
    said = [
        answer or answer_of(text, row["verifier"], opened, whole=True) for answer, text in zip(answers, completions)
    ]
    return {"scores": [round(s, 6) for s in scores], "abstained": sum(map(is_abstention, said))}


# ---------------------------------------------------------------------------------------------------- selection


def pass_rate(scores: list[float], threshold: float | None = None) -> float:
    """Share of scores from the threshold on; without one, the mean (the same for scores of 0 and 1)."""
    return sum(scores if threshold is None else [s >= threshold for s in scores]) / len(scores)


def select_prompts(
    rows: list[dict],
    measured: list[dict | None],
    bands: dict[str, tuple[float, float]],
    pass_thresholds: dict[str, float] | None = None,
    abstain_share: float = ABSTAIN_SHARE,
    at_least: int = 1,
    seed: int = 0,
) -> tuple[list[dict], dict]:
    """The rows to train on, in their order, and a report; rows that cannot be used ("error") are left out of both.

    Args:
        bands: group -> (least, below which) pass rate, with "default"; BANDS has the paper's per stage.
        pass_thresholds: verifier -> score that passes, for graded verifiers (gui_coordinate, asr_wer), for which the
            paper does not say what passing is; without one the mean score stands for the pass rate.
        abstain_share: of the kept rows, how many may be unanswerable or mismatched.
        at_least: rows the stage needs (one generation batch).

    Returns:
        rows, {"groups": {(source, group): {"prompts", "kept", "too_easy", "too_hard", "pass_rate"}}, "exempt",
        "exempt_kept", "false_abstention": share of the answerable prompts' rollouts that abstain}.

    Raises:
        OmniInputError: a row without scores, a group without band, fewer rows than `at_least`.
    """
    thresholds = {verifier_name(name): value for name, value in (pass_thresholds or {}).items()}
    groups, kept, exempt, abstained, rollouts = {}, [], [], 0, 0
    for place, (row, record) in enumerate(zip(rows, measured, strict=True)):
        if record is not None and "error" in record:
            continue
        if is_unanswerable(row):
            exempt.append(place)
            continue
        if record is None:
            raise OmniInputError(f"row {place} has no scores yet; let every process finish and measure again")
        group = group_of(row)
        band = bands.get(group, bands.get("default"))
        if band is None:
            raise OmniInputError(f"no band for {group!r} prompts; give one, or a default")
        rate = pass_rate(record["scores"], thresholds.get(verifier_name(row["verifier"])))
        abstained, rollouts = abstained + record["abstained"], rollouts + len(record["scores"])
        counts = groups.setdefault((row.get("source") or "", group), Counter())
        counts["prompts"] += 1
        counts["pass_rate"] += rate
        if rate < band[0] or rate >= band[1]:
            counts["too_hard" if rate < band[0] else "too_easy"] += 1
            continue
        counts["kept"] += 1
        kept.append(place)
    # share s of all kept rows: s / (1 - s) of the answerable ones
    limit = int(len(kept) * abstain_share / (1 - abstain_share) + 1e-9) if abstain_share < 1 else len(exempt)
    chosen = random.Random(seed).sample(exempt, min(limit, len(exempt)))
    for counts in groups.values():
        counts["pass_rate"] /= counts["prompts"]
    names = ("prompts", "kept", "too_easy", "too_hard", "pass_rate")
    report = {
        "groups": {key: {name: counts[name] for name in names} for key, counts in groups.items()},
        "exempt": len(exempt),
        "exempt_kept": len(chosen),
        "false_abstention": abstained / rollouts if rollouts else 0.0,
    }
    if len(kept) + len(chosen) < at_least:
        raise OmniInputError(
            f"{len(kept) + len(chosen)} of {len(rows)} prompts are left, the stage needs {at_least}: "
            + markdown_report(report).replace("\n", "; ")
        )
    return [rows[place] for place in sorted(kept + chosen)], report


def markdown_report(report: dict) -> str:
    """`select_prompts`' report as a Markdown table and two lines."""
    lines = [
        "| source | group | prompts | kept | too easy | too hard | pass rate |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (source, group), row in sorted(report["groups"].items()):
        cells = [row["prompts"], row["kept"], row["too_easy"], row["too_hard"]]
        lines.append(f"| {source} | {group} | " + " | ".join(map(str, cells)) + f" | {row['pass_rate']:.3f} |")
    lines += ["", f"unanswerable or mismatched: {report['exempt_kept']} of {report['exempt']} kept"]
    return "\n".join([*lines, f"false abstention: {100 * report['false_abstention']:.1f} % of answerable rollouts"])


__all__ = [
    "BANDS",
    "group_of",
    "is_unanswerable",
    "markdown_report",
    "measure_pass_rates",
    "mismatched_rows",
    "pass_rate",
    "select_prompts",
]
