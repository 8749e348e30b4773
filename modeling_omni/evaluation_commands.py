"""`infer.py eval` and `infer.py compare`: held-out skills, benchmarks in files, the paper's tables, paired comparisons.

`options` are the parsed flags, `load_model(options)` gives model and processor, `note(text)` writes to stderr; results
go to stdout as Markdown.
"""

import functools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from .comparison import POWERED, paired_markdown, paired_table, rollouts_markdown, rollouts_table
from .configuration_omni import resolve_checkpoint
from .evaluation import heldout_table, markdown_table
from .evaluation_files import evaluate_file, named_files, provenance, results_markdown, save_results
from .evaluation_tables import make_tables, table_markdown
from .limits import default_limits, with_limits
from .media import OmniInputError

MEASURED = ("suite", "samples", "seed", "think", "dtype", "without", "reasoning_budget", "reasoning_grace")  # settings


def measure_skills(options, load_model, outcomes: bool = False) -> tuple[list[dict], str]:
    """Held-out table of `options.model`, and the device it was made on."""
    from .nano_data import SKILLS

    skills = [skill.strip() for skill in options.skills.split(",")] if options.skills else list(SKILLS)
    model, processor = load_model(options)
    table = heldout_table(
        model, processor, skills, options.samples, options.batch_size, options.seed, options.think, progress=True,
        without=options.without, outcomes=outcomes,
        options={"reasoning_budget": options.reasoning_budget, "reasoning_grace": options.reasoning_grace},
    )  # fmt: skip
    return table, str(model.device)


def check_writable(path: str | None) -> None:
    """Before the work, not after it."""
    if path:
        try:
            open(path, "a").close()
        except OSError as error:
            raise OmniInputError(f"--out {path}: cannot be written ({error.strerror})") from error


def write_result(options, names: tuple[str, ...], started: float, device: str, **result) -> None:
    """The result as JSON, with the settings under `names`, versions, date and commit."""
    about = {name: getattr(options, name) for name in names}
    about |= {"seconds": round(time.monotonic() - started, 1), "device": device, "decoding": "greedy"}
    with open(options.out, "w") as file:
        json.dump(about | provenance() | result, file, indent=1)


ASKING = ("max_new_tokens", "temperature", "top_p", "frames", "fps", "video_pruning_rate", "max_media_tokens")
ASKING += ("max_prompt_tokens", "prefill_chunk_size", "metric", "system")


def refuse_flags(options, names: tuple[str, ...], suite: str) -> None:
    """Raises an OmniInputError where a flag is given that a suite would not look at."""
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        raise OmniInputError(f"--{given[0].replace('_', '-')} is for other evaluations, not for --suite {suite}")


def run_eval(options, load_model, note) -> int:
    if options.suite == "quantization":
        refuse_flags(options, (*ASKING, "think", "reasoning_budget", "reasoning_grace", "without"), options.suite)
        return run_quantization(options, note)
    if options.data or options.suite == "tables":
        return run_benchmarks(options, load_model, note)
    refuse_flags(options, ASKING, options.suite)
    check_writable(options.out)
    options.samples = options.samples or 100
    started = time.monotonic()
    table, device = measure_skills(options, load_model)
    print(markdown_table(table), flush=True)
    if options.out:
        names = ("model", *MEASURED)
        write_result(options, names, started, device, table=table)
    return 0


def run_benchmarks(options, load_model, note) -> int:
    """`eval --data` and `eval --suite tables`."""
    if not options.out:
        raise OmniInputError("--data and --suite tables need --out, a folder for predictions and scores")
    if options.skills or options.without:
        raise OmniInputError("--skills and --without are for --suite nano alone")
    data, folder = named_files(options.data or []), Path(options.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OmniInputError(f"--out {folder}: cannot be made ({error.strerror})") from error
    load = functools.cache(lambda: load_model(options))  # a run that is done needs no model
    sampling = {"num_frames": options.frames, "fps": options.fps}
    sampling |= {"video_pruning_rate": options.video_pruning_rate, "max_media_tokens": options.max_media_tokens}
    names = ("metric", "errors", "runs", "seed", "system", "batch_tokens", "batch_size", "retry_errors")
    names += ("max_new_tokens", "temperature", "top_p", "prefill_chunk_size", "reasoning_budget", "reasoning_grace")
    names += ("max_prompt_tokens",)
    chosen = {name: getattr(options, name) for name in names} | {"progress": sys.stderr.isatty()}
    chosen |= {"video_sound": options.audio_from_video, "model_name": options.model}
    limits = replace(default_limits())
    limits.allow_urls = options.allow_urls or limits.allow_urls
    with_limits(limits, options.limit)
    chosen["encode_options"] = sampling | {"media_limits": limits}
    if options.suite == "tables":
        return run_tables(options, load, note, folder, data, chosen)
    table, settings = [], {}
    for name, file in data.items():
        rows, settings[name] = evaluate_file(
            load, name, file, folder, options.samples, thinking=options.think, **chosen
        )  # fmt: skip
        table += rows
    about = {"model": options.model, "settings": settings} | provenance()
    save_results(folder, table, about)
    print(results_markdown(table), flush=True)
    for row in table:
        if row["errors"]:
            counted = "counted as wrong" if options.errors == "wrong" else "left out"
            note(f"{row['data']} ({row['verifier']}): {row['errors']} of {row['rows']} rows had errors, {counted}")
    return 0


def is_nano(name: str) -> bool:
    """Whether a checkpoint is nano, or one trained like it: its folder holds nano's tokenizer."""
    own, shipped = (Path(resolve_checkpoint(model)) / "tokenizer.json" for model in (str(name), "nano"))
    return own.is_file() and json.loads(own.read_text()) == json.loads(shipped.read_text())


def run_tables(options, load, note, folder: Path, data: dict[str, str], chosen: dict) -> int:
    nano = is_nano(options.model)
    if not data and not nano:
        raise OmniInputError("the tables of another model than nano need benchmarks: --data NAME=FILE ...")
    if options.think is not None or options.frames is not None or options.video_pruning_rate is not None:
        raise OmniInputError("--suite tables sets --think, --frames and --video-pruning-rate itself")
    chosen["max_new_tokens"] = options.max_new_tokens or (64 if nano else 16384)
    frames = options.table_frames or ([4, 8] if nano else [128, 256])
    clip = tuple(options.ttft_clip or ((64, 64) if nano else (512, 512)))
    tables = make_tables(
        load, folder, chosen.pop("model_name"), list(options.tables), data or None, options.samples or 100,
        chosen.pop("max_new_tokens"), frames, clip, options.ttft_runs, chosen.pop("runs"), options.budgets,
        progress=lambda text: note(text, dim=True), show=chosen.pop("progress"), **chosen,
    )  # fmt: skip
    about = {"model": options.model, "samples": options.samples or 100, "seed": options.seed} | provenance()
    markdown = "\n\n".join(table_markdown(table) for table in tables)
    save_results(folder, tables, about, markdown)
    print(markdown, flush=True)
    return 0


def run_quantization(options, note) -> int:
    """`eval --suite quantization`."""
    from .evaluation_quantization import quantization_markdown, quantization_table
    from .nano_data import SKILLS

    if not options.out:
        raise OmniInputError("--suite quantization needs --out, a folder for the packed checkpoints and scores")
    skills = [skill.strip() for skill in options.skills.split(",")] if options.skills else list(SKILLS)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    table = quantization_table(
        options.model, folder, options.formats, skills, options.samples or 100, options.data,
        progress=lambda text: note(text, dim=True), show=sys.stderr.isatty(), batch_size=options.batch_size,
        first_seed=options.seed,
    )  # fmt: skip
    markdown = quantization_markdown(table)
    save_results(folder, table, {"model": options.model} | provenance(), markdown)
    print(markdown, flush=True)
    return 0


def run_compare(options, load_model, note) -> int:
    check_writable(options.out)
    if options.rollouts:
        first, *others = options.rollouts
        tables = [rollouts_table(first, other) for other in others]
        for other, rows in zip(others, tables):
            print(rollouts_markdown(rows, first, other), flush=True)
        if options.out:
            found = [{"first": first, "second": other, "table": rows} for other, rows in zip(others, tables)]
            Path(options.out).write_text(json.dumps(provenance() | {"comparisons": found}, indent=1))
        return 0
    if len(options.models or ()) < 2:
        raise OmniInputError("--models needs two or more, the first is the one that the others are compared with")
    options.samples = options.samples or 100
    started, tables, comparisons = time.monotonic(), [], []
    for name in options.models:  # one in memory at a time
        options.model = name
        table, device = measure_skills(options, load_model, outcomes=True)
        tables.append(table)
    for row in tables[0]:
        if "skipped" in row:
            note(f"{row['skill']} is left out: {row['skipped']}")
    for name, table in zip(options.models[1:], tables[1:]):
        rows = paired_table(tables[0], table)
        print(paired_markdown(rows, options.models[0], name), flush=True)
        comparisons.append({"first": options.models[0], "second": name, "table": rows})
        if rows and rows[-1]["samples"] < POWERED:
            note(f"{rows[-1]['samples']} prompts; give {POWERED} or more to tell small changes from chance")
    if options.out:
        names = ("models", *MEASURED)
        write_result(options, names, started, device, comparisons=comparisons)
    return 0


__all__ = ["run_compare", "run_eval"]
