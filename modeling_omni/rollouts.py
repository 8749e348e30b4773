"""Answers sampled from a policy, and the commands that choose prompts by them: `train.py filter` (and pairs.py).

What is sampled for a prompt is a function of the policy, the settings, the seed and that prompt alone: not of the batch
it stands in, the number of processes or where a killed run went on (up to rounding). Every answer has a random
generator of its own, and the likeliest token after Gumbel noise has been added to the logits is a sample of the
softmax. A prompt's media are decoded once and run through the towers once, for all its answers.

Shape legend: P prompts, n answers to each, S prompt tokens, T new tokens, V vocabulary.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LogitsProcessor

from .checkpointing import write_atomically
from .configuration_omni import resolve_checkpoint
from .conversation import end_tokens
from .data import Source, check_sources, hashed, row_error
from .data_adapters import KINDS, adapt_prompt
from .distributed import make_accelerator
from .filtering import (
    ABSTAIN_SHARE,
    BANDS,
    ROLLOUTS,
    markdown_report,
    measure_pass_rates,
    mismatched_rows,
    select_prompts,
)
from .inference import load, suppressed_tokens
from .media import OmniInputError
from .packing import join_media
from .processing_omni import OmniProcessor
from .prompt_omni import source_keys
from .rewards import check_gold
from .rl_training import check_bad_share, encode_media, encode_prompt
from .training import _key

REWARDS = ("format", "answer", "text")
PROMPTS_FILE, BAD_ROWS_FILE = "prompts.jsonl", "bad_rows.jsonl"


# ---------------------------------------------------------------------------------------------------- sampling


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling with a seed for every row.

    Args:
        seeds: one per row of the batch.
        temperature: above 0.
        top_p: sample among the likeliest tokens that add up to this share.
        top_k: sample among so many of the likeliest; 0: all.
    """

    def __init__(self, seeds: list[int], temperature: float, top_p: float, device: torch.device, top_k: int = 0):
        self.generators = [torch.Generator(device).manual_seed(seed % 2**63) for seed in seeds]
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.float() / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, places = scores.softmax(-1).sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the token that crosses the share stays
            scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, places, beyond), -torch.inf)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


def padded_prompts(prompts: list[dict], pad_id: int, device) -> dict[str, torch.Tensor]:
    """Prompts of `encode_prompt`, one per row -> input_ids, attention_mask, with media mm_token_type_ids, [B, S]."""
    width = max(len(prompt["ids"]) for prompt in prompts)

    def left(rows: list[list[int]], fill: int = 0) -> torch.Tensor:
        return torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=device)

    batch = {
        "input_ids": left([prompt["ids"] for prompt in prompts], pad_id),
        "attention_mask": left([[1] * len(prompt["ids"]) for prompt in prompts]),
    }
    if any(prompt["media"] for prompt in prompts):
        batch["mm_token_type_ids"] = left([prompt["types"] for prompt in prompts])
    return batch


@torch.no_grad()
def sample_ids(
    model,
    processor: OmniProcessor,
    prompts: list[dict],
    features: list[dict],
    seeds: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> list[list[int]]:
    """Answers to encoded prompts.

    Args:
        model: `OmniForConditionalGeneration`, without dropout.
        prompts: P of `encode_prompt`. features: of each, from `encode_media`.
        seeds: n of each prompt.

    Returns:
        P * n lists of tokens, the end mark included; without one the answer was cut off at `max_new_tokens`.
    """
    if not temperature > 0 or not 0 < top_p <= 1:
        raise OmniInputError(f"temperature {temperature} must be above 0 and top_p {top_p} in (0, 1]")
    places = [i for i, own in enumerate(seeds) for _ in own]
    pad = processor.tokenizer.pad_token_id or 0
    batch = padded_prompts([prompts[i] for i in places], pad, model.device)
    sampling = SeededSampling([seed for own in seeds for seed in own], temperature, top_p, model.device, top_k)
    ends = answer_ends(model, processor)
    ids = model.generate(
        **batch,
        **join_media([features[i] for i in places]),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        suppress_tokens=suppressed_tokens(model, processor),
        logits_processor=[sampling],
        prompt_rows=torch.tensor(places),
        pad_token_id=pad,
        eos_token_id=ends,
    )
    return [up_to_end(row, ends) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]


def answer_ends(model, processor: OmniProcessor) -> list[int]:
    """Tokens that end an answer: the tokenizer's mark and those of generation_config.json."""
    return sorted(end_tokens(model) | {processor.tokenizer.eos_token_id})


def up_to_end(ids: list[int], ends: list[int]) -> list[int]:
    """Tokens up to the first end mark, which stays."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def answer_seed(seed: int, row: dict, number: int) -> int:
    """Seed of the `number`-th answer to a row: of its id, or of its prompt."""
    name = row.get("id")
    name = json.dumps(row["prompt"], sort_keys=True, default=lambda part: type(part).__name__) if name is None else name
    return hashed(seed, name, number)


def sample_completions(model, processor, rows: list[dict], n: int, args) -> list[list[str] | OmniInputError]:
    """n whole answers of each row, decoded with their thinking and end marks (an answer that was cut off has none).

    Args:
        rows: with "prompt", "prompt_opened_think" (default True: the generation prompt opens `<think>`).
        args: `RolloutArguments`.

    Returns:
        for a row that cannot be used, what is wrong with it.
    """
    answers, prompts, seeds = [], [], []
    for row in rows:
        try:
            thinking = row.get("prompt_opened_think", True)
            prompts.append(encode_prompt(row, processor, args, thinking, args.prompt_tokens))
        except Exception as error:  # whatever one row does, it is named and the others go on
            answers.append(OmniInputError(row_error(error)))
            continue
        seeds.append([answer_seed(args.seed, row, number) for number in range(n)])
        answers.append([])
    if not prompts:
        return answers
    with torch.no_grad():
        features = [encode_media(model, prompt) for prompt in prompts]
    ids = sample_ids(
        model, processor, prompts, features, seeds, args.completion_tokens, args.temperature, args.top_p
    )  # fmt: skip
    texts = iter([processor.decode(one, skip_special_tokens=False) for one in ids])
    return [one if isinstance(one, OmniInputError) else [next(texts) for _ in range(n)] for one in answers]


# ---------------------------------------------------------------------------------------------------- rows


def read_rows(sources: list[dict]) -> tuple[list[dict], list[tuple], list[dict]]:
    """Every row of RL data, in order, with absolute media paths.

    Returns:
        the rows that have prompt, answer, verifier and a gold that can be reached; (file, row) of each of them; of the
        others {"file", "row", "reason"}.
    """
    check_sources(sources)
    rows, names, bad = [], [], []
    for spec in sources:
        is_file = not spec["path"].startswith(("nano:", "datasets:"))
        source = Source(spec | {"path": os.path.abspath(spec["path"])} if is_file else spec, adapt=adapt_prompt)
        for number in range(len(source)):
            name = source.name(number)
            try:
                row = source[number]
                if row.get("answer") is None or not isinstance(row.get("verifier"), str):
                    raise OmniInputError("a row needs an 'answer' and a 'verifier'")
                check_gold(row["verifier"], row["answer"], **(row.get("args") or {}))
            except Exception as error:
                reason = row_error(error, "{}, row {}: ".format(*name))
                bad.append({"file": name[0], "row": name[1], "reason": reason})
                continue
            rows.append(row)
            names.append(name)
    return rows, names, bad


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSONL, whole or not at all; paths of media become relative to the file, so that both can move together."""
    lines = [json.dumps(row | {"prompt": relative_paths(row["prompt"], path.parent)}) for row in rows]
    write_atomically(path, "".join(line + "\n" for line in lines))


def relative_paths(messages: list[dict], folder: Path) -> list[dict]:
    """Messages whose absolute media paths start from `folder`."""

    def moved(part):
        if not isinstance(part, dict) or part.get("type") not in KINDS:
            return part
        keys = [key for key in source_keys(part["type"]) if isinstance(part.get(key), str) and os.path.isabs(part[key])]
        return part | {key: os.path.relpath(part[key], folder) for key in keys}

    return [
        m | {"content": [moved(part) for part in m["content"]]} if isinstance(m.get("content"), list) else m
        for m in messages
    ]


# ---------------------------------------------------------------------------------------------------- commands


@dataclass
class RolloutArguments:
    """Keys of the commands that sample answers to prompts."""

    output_dir: str = field(metadata={"help": "folder for the result, its report and the rollouts"})
    model: str = _key("nano", "the initial policy of the stage: a folder, hub id or 'nano'")
    dtype: str = _key("auto", "of the weights: auto (as stored; nano on a CPU: float32), float32 or bfloat16")
    data: list[dict] = _key([], "files of RL rows: {path, limit}")
    media_tokens: int | None = _key(None, "the most media that a row may hold, in patches and 80 ms of sound")
    max_frames: int | None = _key(None, "frames of a video at most")
    prompt_tokens: int = _key(4096, "tokens of a prompt at most; longer rows are left out")
    max_bad_share: float = _key(0.05, "share of rows that cannot be used above which nothing is written")
    # sampling: as the stage that follows will sample
    completion_tokens: int = _key(1024, "tokens of an answer at most")
    rollouts: int = _key(ROLLOUTS, "answers to a prompt")
    temperature: float = _key(1.0, "of sampling")
    top_p: float = _key(1.0, "share of probability that is sampled from")
    reward: str = _key("format", "what the verifier grades: format or answer: the boxed answer; text: the whole text "
                       "after thinking")  # fmt: skip
    batch_size: int = _key(16, "prompts sampled at a time")
    seed: int = _key(0, "seed of the sampling and of what is drawn afterwards")
    at_least: int = _key(1, "rows that must come out (one generation batch of the stage)")


@dataclass
class FilterArguments(RolloutArguments):
    """Every key of a YAML file for `train.py filter`."""

    bands: dict = _key(BANDS["image_rl"], "group (text, image, video, audio_qa, asr, omni) or default -> [least, below "
                       "which] pass rate; Omni-RL: {default: [0.1, 0.9], audio_qa: [0.3, 0.7]}")  # fmt: skip
    pass_thresholds: dict = _key({}, "verifier -> score that passes; without one the mean score is the pass rate")
    mismatched: int = _key(0, "unanswerable prompts to make of the rows, by giving them each other's media")
    abstain_share: float = _key(ABSTAIN_SHARE, "share of unanswerable prompts in the result, at most")


def policy_name(model: str) -> str:
    """A hash of a checkpoint's weights; the name itself where there is no folder."""
    files = sorted(Path(resolve_checkpoint(model)).glob("*.safetensors"))
    if not files:
        return model
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def measured_rows(
    args: RolloutArguments, rows: list[dict], names: list[tuple], bad: list[dict], texts: bool = False
) -> list[dict] | None:
    """Scores of all rows' rollouts (`measure_pass_rates`), shared out over the processes; None but on process 0.

    Args:
        names, bad: of `read_rows`. Rows that cannot be sampled from are added to `bad`, which comes to
            `bad_rows.jsonl`; `rows` may go on behind the last of `names`.

    Raises:
        OmniInputError: an unknown reward, more bad rows than `max_bad_share`.
    """
    if args.reward not in REWARDS:
        raise OmniInputError(f"reward is {args.reward!r}; use one of {', '.join(REWARDS)}")
    state = make_accelerator()
    check_bad_rows(args, bad, len(names) + len(bad), write=state.is_main_process)
    folder = Path(args.output_dir)
    settings = {name: getattr(args, name) for name in ("temperature", "top_p", "completion_tokens", "seed")}
    settings |= {name: getattr(args, name) for name in ("max_frames", "dtype")}
    generate = lazy_policy(args, str(state.device))
    options = {"policy": policy_name(args.model), "settings": settings, "rollouts": args.rollouts}
    options |= {"batch_size": args.batch_size, "reward": args.reward, "texts": texts}
    place = {"rank": state.process_index, "world_size": state.num_processes, "progress": state.is_main_process}
    measured = measure_pass_rates(rows, generate, folder, **options, **place)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    if state.num_processes > 1:
        measured = measure_pass_rates(rows, generate, folder, **options)
    count = len(names) + len(bad)
    errors = [(name, record["error"]) for name, record in zip(names, measured) if "error" in record]
    bad += [{"file": file, "row": row, "reason": reason} for (file, row), reason in errors]
    check_bad_rows(args, bad, count, write=True)
    return measured


def check_bad_rows(args: RolloutArguments, bad: list[dict], count: int, write: bool) -> None:
    """Writes the rows that cannot be used to `bad_rows.jsonl`; raises if of `count` rows these are too many."""
    path = Path(args.output_dir) / BAD_ROWS_FILE
    if write and (bad or path.exists()):
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in bad))
    check_bad_share(bad, count, args.max_bad_share, path)


def left_out(bad: list[dict]) -> str:
    """A line for reports; none where all rows can be used."""
    return f"\nleft out: {len(bad)} rows that cannot be used, see {BAD_ROWS_FILE}" if bad else ""


def lazy_policy(args: RolloutArguments, device: str) -> Callable[[list[dict], int], list]:
    """`generate` of `measure_pass_rates`; the model is loaded when there is something to sample."""
    loaded = []

    def generate(rows: list[dict], n: int) -> list:
        if not loaded:
            loaded.extend(load(args.model, args.dtype, device))
        return sample_completions(*loaded, rows, n, args)

    return generate


def filter_prompts(args: FilterArguments) -> str | None:
    """Writes the rows to train on to `prompts.jsonl`, the report beside it; returns the report (on process 0)."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows, names, bad = read_rows(args.data)
    rows += mismatched_rows(rows, args.mismatched, args.seed)
    measured = measured_rows(args, rows, names, bad)
    if measured is None:
        return None
    bands = {group: tuple(band) for group, band in args.bands.items()}
    kept, report = select_prompts(
        rows, measured, bands, args.pass_thresholds, args.abstain_share, args.at_least, args.seed
    )  # fmt: skip
    text = markdown_report(report) + left_out(bad)
    (folder / "report.md").write_text(text + "\n")
    write_rows(folder / PROMPTS_FILE, kept)
    return text


__all__ = ["FilterArguments", "RolloutArguments", "filter_prompts", "read_rows", "sample_completions", "sample_ids"]
