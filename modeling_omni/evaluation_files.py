"""Benchmarks as JSONL files: answered by the batch tool, scored by the verifiers of training (paper section 4).

Rows are those of reinforcement learning, {"prompt" (text or messages), "answer", "verifier", "args", "source", "id"}
with media parts or columns; "messages" that end with the right answer; or IFEval's own ("instruction_id_list",
"kwargs"). "metric" is another word for "verifier". Verifiers: `rewards.py` and `metrics.py`.

A folder holds, for every file and run, `NAME.predictions.jsonl` (a line per row, written as it goes: answer, reasoning,
prompt, tokens of every kind of media), `NAME.scores.jsonl` (what was graded, against what, the score) and
`NAME.settings.json` (what the predictions depend on) and `NAME.starts.jsonl` (a line per start: date, commit, versions,
device, decoding as the checkpoint left it). Started again with the same settings an evaluation goes on where
it was; with others it refuses. `results.json` and `results.md` are written at the end.
"""

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from itertools import groupby
from pathlib import Path

import torch

from .batch_inference import read_results, request_of, row_keys, run_batch
from .checkpointing import write_atomically
from .configuration_omni import TYPE_TEXT, resolve_checkpoint
from .data import JsonlRows
from .data_adapters import KINDS, adapt_prompt
from .inference import default_max_new_tokens, default_thinking
from .media import OmniInputError
from .metrics import bootstrap_interval, corpus_wer, final_answer, mean_interval, word_errors
from .metrics_grounding import PARTS, SECONDS
from .rewards import check_gold, score, verifier_name

PACKAGES = ("transformers", "numpy", "jiwer", "rapidfuzz", "av", "soundfile")
GRIDS = ("image_grid_thw", "video_grid_thw", "video_keep_tokens", "audio_clip_counts")


# ---------------------------------------------------------------------------------------------------- rows


def graded_by(row: dict, metric: str | None = None) -> dict:
    """What a row of a benchmark is graded by: {"verifier", "gold", "args", "source"}.

    Args:
        metric: the verifier of rows that name none.

    Raises:
        OmniInputError: no verifier or gold, or a gold that no answer can reach.
    """
    if not isinstance(row, dict):
        raise OmniInputError(f"a JSON object is needed, not {type(row).__name__}")
    name, gold, args = row.get("verifier") or row.get("metric"), row.get("answer"), row.get("args") or {}
    if "instruction_id_list" in row and gold is None:
        name, gold = name or "ifeval", {key: row.get(key) for key in ("instruction_id_list", "kwargs")}
    if gold is None and (last := answered_by(row.get("messages"))):
        gold = last.get("content")
    name, args = name or metric, json.loads(args) if isinstance(args, str) else args
    if not isinstance(name, str) or gold is None:
        raise OmniInputError("a row needs an 'answer' and a 'verifier' (or give --metric)")
    name = verifier_name(name)
    if name == "format":
        raise OmniInputError("'format' grades whole completions in training; name the verifier of the answer")
    try:
        check_gold(name, gold, **args)
    except TypeError as error:
        raise OmniInputError(f"'args' do not fit {name}: {error}") from error
    return {"verifier": name, "gold": gold, "args": args, "source": str(row.get("source", ""))}


def answered_by(messages) -> dict | None:
    """The last message, where it is the assistant's."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return last if isinstance(last, dict) and last.get("role") == "assistant" else None


def question_of(row: dict, folder: Path, system: str | None = None, video_sound: str = "auto"):
    """Messages and tools of a benchmark's row, without the answer (see `batch_inference.request_of`)."""
    if isinstance(row.get("messages"), list):
        messages = row["messages"][:-1] if answered_by(row["messages"]) else row["messages"]
        own = {key: row[key] for key in row if key.removesuffix("s") in KINDS}
        return request_of({"messages": messages, "tools": row.get("tools")} | own, folder, system, video_sound)
    adapted = adapt_prompt(row, folder=folder)
    return request_of({"messages": adapted["prompt"], "tools": row.get("tools")}, folder, system, video_sound)


def prompt_text(processor, inputs: dict) -> str:
    """A prompt as the model gets it, the places of a medium as "<video 64>": its kind and number of tokens."""
    ids = inputs["input_ids"][0].tolist()
    types = inputs["mm_token_type_ids"][0].tolist() if "mm_token_type_ids" in inputs else [TYPE_TEXT] * len(ids)
    pieces = []
    for kind, run in groupby(zip(types, ids), key=lambda pair: pair[0]):
        own = [token for _, token in run]
        text = f"<{KINDS[kind - 1]} {len(own)}>" if kind != TYPE_TEXT else processor.decode(own)
        pieces.append(text)
    return "".join(pieces)


def spread_out(total: int, count: int | None) -> list[int]:
    """`count` of the numbers below `total`, evenly spread, as files are often sorted; None or too many: all."""
    return list(range(total)) if count is None or count >= total else [i * total // count for i in range(count)]


# ---------------------------------------------------------------------------------------------------- what it was


def checkpoint_fingerprint(name: str) -> str:
    """A hash of a checkpoint's files: names, sizes and 64 samples of every weights file; the name where there are none.

    Reading 61 GB whole would take longer than many an evaluation.
    """
    files = sorted(Path(resolve_checkpoint(str(name))).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for part in range(64):
                file.seek(max(0, size - 65536) * part // 63)
                digest.update(file.read(65536))
    return digest.hexdigest()[:16] if files else str(name)


def provenance() -> dict:
    """Date, versions of the packages that matter, and, where this package lies in a git tree, the commit."""
    from . import __version__

    versions = {"python": platform.python_version(), "modeling_omni": __version__, "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "versions": versions}
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        if git("ls-files", Path(__file__).name):  # of this repository, not of one around an installation
            found |= {
                "commit": git("rev-parse", "HEAD"),
                "changed_files": len(git("status", "--porcelain").splitlines()),
            }
    except (OSError, subprocess.SubprocessError):
        pass
    return found


def check_settings(path: Path, settings: dict) -> None:
    """Writes the settings of predictions, or compares them with those that stand there.

    Raises:
        OmniInputError: they differ, so that old and new predictions would be mixed.
    """
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        before = json.loads(path.read_text())
        keys = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if keys:
            changed = "; ".join(f"{key}: {before.get(key)!r:.80} then, {settings.get(key)!r:.80} now" for key in keys)
            raise OmniInputError(f"{path}: begun with other settings ({changed}); give another --out")
        return
    write_atomically(path, json.dumps(settings, indent=1))


# ---------------------------------------------------------------------------------------------------- answers


def evaluate_file(
    load: Callable[[], tuple],
    name: str,
    file: str,
    folder: Path,
    samples: int | None = None,
    metric: str | None = None,
    errors: str = "wrong",
    runs: int = 1,
    seed: int = 0,
    thinking: bool | None = None,
    model_name: str = "",
    adjust: Callable | None = None,
    **options,
) -> tuple[list[dict], dict]:
    """Answers a benchmark, where that is not done yet, and scores it.

    Args:
        load: () -> model and processor; called only where there is something to answer.
        name, file: of the benchmark. folder: for its files (see above); must exist.
        samples: rows to answer, evenly spread over the file; None: all.
        metric: of `graded_by`. errors: "wrong": rows with errors score 0; "leave out": they do not count.
        runs: answers to every row, each with a seed of its own; their scores are averaged per row.
        seed: of the sampling, of the first run.
        model_name: what the settings say about the model, with its fingerprint.
        adjust: the processor -> the one to use.
        options: of `run_batch`: thinking, decoding, media and batches.

    Returns:
        `summary_rows`, and the settings with the starts of all runs under "starts".
    """
    if errors not in ("wrong", "leave out"):
        raise OmniInputError(f"errors is {errors!r}; use 'wrong' or 'leave out'")
    try:
        rows = JsonlRows(file)
    except OSError as error:
        raise OmniInputError(f"--data {file}: cannot be read ({error.strerror})") from error
    if not len(rows):
        raise OmniInputError(f"--data {file}: it has no rows")
    keys, numbers = row_keys(rows), spread_out(len(rows), samples)
    batches = ("batch_tokens", "batch_size", "workers", "retry_errors", "progress", "prefill_chunk_size")
    settings = {"data": hashlib.sha256(Path(file).read_bytes()).hexdigest(), "model": model_name}
    settings |= {"fingerprint": checkpoint_fingerprint(model_name), "thinking": thinking}
    settings |= {key: value for key, value in options.items() if key not in batches}
    settings.pop("encode_options", None)
    about_media = {k: v for k, v in (options.get("encode_options") or {}).items() if k != "media_limits"}
    settings |= {"media": about_media, "seed": seed, "adjust": getattr(adjust, "__name__", None)}
    graded, starts = [], []
    decoding = {key: options.get(key) for key in ("max_new_tokens", "temperature", "top_p")}
    for run in range(runs):
        stem = folder / (name if runs == 1 else f"{name}.run{run}")
        out = Path(f"{stem}.predictions.jsonl")
        check_settings(Path(f"{stem}.settings.json"), settings | {"seed": seed + run})
        done = read_results(str(out))[1] if out.exists() else {}
        retry = options.get("retry_errors") and not all(done.values())
        if retry or any(keys[number] not in done for number in numbers):
            model, processor = load()
            processor = adjust(processor) if adjust else processor
            with open(f"{stem}.starts.jsonl", "a") as log:
                log.write(json.dumps(provenance() | effective_settings(model, thinking, **decoding)) + "\n")

            def describe(inputs, processor=processor):
                grids = {key: inputs[key].tolist() for key in GRIDS if key in inputs}
                return {"prompt": prompt_text(processor, inputs), "media": grids}

            def request(row, *more):
                graded_by(row, metric)
                return question_of(row, *more)

            run_batch(
                model, processor, file, str(out), thinking=thinking, seed=seed + run, request=request,
                describe=describe, numbers=numbers, **options,
            )  # fmt: skip
        starts += [json.loads(line) for line in Path(f"{stem}.starts.jsonl").read_text().splitlines()]
        graded.append(score_predictions(rows, keys, numbers, out, Path(f"{stem}.scores.jsonl"), metric))
    return summary_rows(name, graded, errors), settings | {"file": str(file), "starts": starts}


def effective_settings(model, thinking: bool | None, **options) -> dict:
    """What was left to the checkpoint's generation_config.json, as it is there: thinking, length, sampling."""
    defaults = model.generation_config
    found = {"thinking": default_thinking(model) if thinking is None else thinking}
    found["max_new_tokens"] = options.get("max_new_tokens") or default_max_new_tokens(model)
    temperature, top_p = options.get("temperature"), options.get("top_p")
    sampled = defaults.do_sample if temperature is None and top_p is None else temperature != 0
    found["decoding"] = "sampled" if sampled else "greedy"
    if sampled:
        found["temperature"] = defaults.temperature if temperature is None else temperature
        found["top_p"] = defaults.top_p if top_p is None else top_p
    return found | {"dtype": str(model.dtype), "device": str(model.device), "threads": torch.get_num_threads()}


# ---------------------------------------------------------------------------------------------------- scores


def score_predictions(
    rows: JsonlRows, keys: list[str], numbers: list[int], out: Path, scores: Path, metric: str | None = None
) -> list[dict]:
    """Grades the lines of a predictions file, in the order of the rows, and writes them down in `scores`.

    Returns:
        [{"id", "verifier", "source", "score", ...}]; with "error" where there is none ("score" is 0 then), and with
        "word_errors", "words" for transcripts and "parts" for verifiers of `metrics_grounding.PARTS`.
    """
    with open(out, "rb") as file:
        whole = (json.loads(line) for line in file if line.endswith(b"\n"))  # a kill may have torn the last
        found = {json.dumps(line["id"]): line for line in whole}
    graded = []
    for number in numbers:
        line, about = found[keys[number]], {"id": json.loads(keys[number])}
        try:
            test = graded_by(rows[number], metric)
        except Exception as error:  # as when it was to be answered: whatever it is, it is this row's
            line, test = {"error": line.get("error", {"message": str(error)})}, {}
        about |= {"verifier": test.get("verifier", metric or ""), "source": test.get("source", "")}
        if "error" in line:
            answer = ""  # nothing was said
            about |= {"score": 0.0, "error": line["error"]["message"]}
        else:
            answer = final_answer(line["answer"], test["verifier"])
            about |= {"score": score(test["verifier"], answer, test["gold"], **test["args"])}
            about |= {"graded": answer, "gold": test["gold"]}
            about |= {key: line[key] for key in ("finish_reason", "generated_tokens", "thought_cut") if key in line}
            about |= {"prompt_tokens": sum(line["tokens"].values()), "tokens": line["tokens"]}
        if test.get("verifier") == "asr_wer":
            about["word_errors"], about["words"] = word_errors(answer, test["gold"], test["args"].get("lang"))
        if test.get("verifier") in PARTS:
            about["parts"] = PARTS[test["verifier"]](answer, test["gold"], **test["args"])
        graded.append(about)
    write_atomically(scores, "".join(json.dumps(one) + "\n" for one in graded))
    return graded


def summary_rows(name: str, runs: list[list[dict]], errors: str = "wrong") -> list[dict]:
    """A line per verifier and source, and one per verifier over all sources where it has several.

    Args:
        runs: of every run, the rows of `score_predictions`.

    Returns:
        [{"data", "verifier", "source", "rows", "errors", "score", "low", "high" (95 %), "interval", "prompt_tokens",
        "generated_tokens" (means), "cut_off", "thought_cut" (shares)}], for transcripts with "wer", "wer_low",
        "wer_high" of the corpus, for verifiers of `metrics_grounding.PARTS` with "parts", their means by name over the
        rows that have them; a "score" of None where nothing could be scored.
    """
    groups: dict[tuple, list[list[dict]]] = {}
    sources: dict[str, set] = {}
    for same in zip(*runs):  # a row in every run
        verifier, source = same[0]["verifier"], same[0]["source"]
        groups.setdefault((verifier, source), []).append(list(same))
        sources.setdefault(verifier, set()).add(source)
    for verifier, own in sources.items():
        if len(own) > 1:
            groups[(verifier, "all")] = [same for (one, _), rows in groups.items() if one == verifier for same in rows]
    table = []
    for (verifier, source), rows in groups.items():
        failed = sum(any("error" in one for one in same) for same in rows)
        line = {"data": name, "verifier": verifier, "source": source, "rows": len(rows), "errors": failed}
        counted = rows if errors == "wrong" else [same for same in rows if not any("error" in one for one in same)]
        line["counted"] = len(counted)
        if not counted:
            table.append(line | {"score": None})
            continue
        means = [sum(one["score"] for one in same) / len(same) for same in counted]
        low, high, how = mean_interval(means)
        line |= {"score": sum(means) / len(means), "low": low, "high": high, "interval": how}
        answered = [one for same in rows for one in same if "error" not in one]
        for key in ("prompt_tokens", "generated_tokens"):
            line[key] = round(sum(one[key] for one in answered) / max(1, len(answered)), 1)
        line["cut_off"] = sum(one["finish_reason"] == "length" for one in answered) / max(1, len(answered))
        if any("thought_cut" in one for one in answered):
            line["thought_cut"] = sum(one.get("thought_cut", False) for one in answered) / len(answered)
        counts = [[(one["word_errors"], one["words"]) for one in same if "words" in one] for same in counted]
        counts = [tuple(map(sum, zip(*runs))) for runs in counts if runs]  # runs of a row are no rows of their own
        if counts:
            line["wer"] = corpus_wer(counts)
            line["wer_low"], line["wer_high"] = bootstrap_interval(counts, corpus_wer)
        parts = [one["parts"] for same in counted for one in same if "parts" in one]
        if parts:
            names = dict.fromkeys(name for one in parts for name in one)
            values = {name: [one[name] for one in parts if name in one] for name in names}
            line["parts"] = {name: sum(found) / len(found) for name, found in values.items()}
        table.append(line)
    return table


def results_markdown(table: list[dict]) -> str:
    """`summary_rows` as Markdown; scores in percent, word error rates beside them."""
    lines = [
        "| data | source | metric | score | 95 % interval | rows | errors | cut off | tokens in / out |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        names = " | ".join(str(row[key]).replace("|", "/") for key in ("data", "source", "verifier"))
        if row["score"] is None:
            lines.append(f"| {names} | | | {row['rows']} | {row['errors']} | | |")
            continue
        value = f"{100 * row['score']:.1f}"
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        more = f"{row['rows']} | {row['errors']} | {100 * row['cut_off']:.0f} %"
        spent = f"{row['prompt_tokens']:.0f} / {row['generated_tokens']:.0f}"
        lines.append(f"| {names} | {value} | {interval} | {more} | {spent} |")
        if "wer" in row:
            names = " | ".join(str(row[key]).replace("|", "/") for key in ("data", "source"))
            interval = f"{100 * row['wer_low']:.1f} to {100 * row['wer_high']:.1f}"
            lines.append(f"| {names} | WER of the corpus | {100 * row['wer']:.2f} | {interval} | {more} | {spent} |")
        for part, value in row.get("parts", {}).items():
            names = " | ".join(str(row[key]).replace("|", "/") for key in ("data", "source"))
            value = f"{value:.2f} s" if part in SECONDS else f"{100 * value:.1f}"
            lines.append(f"| {names} | {part} | {value} | | {more} | {spent} |")
    return "\n".join(lines)


def save_results(folder: Path, table: list[dict], about: dict, markdown: str | None = None) -> None:
    """`results.json` and `results.md` in `folder`."""
    (folder / "results.json").write_text(json.dumps(about | {"table": table}, indent=1))
    (folder / "results.md").write_text((results_markdown(table) if markdown is None else markdown) + "\n")


def named_files(given: list[str]) -> dict[str, str]:
    """["NAME=FILE", "FILE"] -> {name: file}; a file without a name is called after itself.

    Raises:
        OmniInputError: two of one name, a name that makes no file name, a file that is not there.
    """
    files = {}
    for item in given:
        name, found, path = item.partition("=")
        name, path = (name, path) if found and not os.path.exists(item) else (Path(item).stem, item)
        if name in files:
            raise OmniInputError(f"--data: two files are called {name!r}; give NAME=FILE")
        if not name or not all(char.isalnum() or char in "._-" for char in name) or name.startswith("."):
            raise OmniInputError(f"--data: {name!r} makes no file name; use letters, digits, '.', '_' and '-'")
        if not os.path.isfile(path):
            raise OmniInputError(f"--data {path}: no such file")
        files[name] = path
    return files


__all__ = [
    "evaluate_file",
    "named_files",
    "provenance",
    "results_markdown",
    "save_results",
    "summary_rows",
    "graded_by",
]
