"""`train.py sft --check-data`: reads the rows of every source as training would and says what it found."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .data import (
    KINDS,
    NothingToLearn,
    Source,
    Stream,
    TooLong,
    check_sources,
    encode_row,
    frame_patches,
    media_kinds,
    row_error,
)
from .media import OmniInputError

SHOWN = 10  # bad rows that the report names
ENDLESS = 64  # rows read of a source that has no end, when `sample` says nothing
COLUMNS = ("rows", "usable", "bad", "media", "long", "tokens", "mean", "trained", *KINDS)


@dataclass
class DataReport:
    """What `check_data` found; `str()` of it is the table, the first bad rows and the first sample.

    sources: per source its path and COLUMNS: rows read, usable ones, malformed ones, ones with media that fail, ones
        over length, tokens of the usable rows (in all, mean, trained share, of each kind).
    bad_rows: {"file", "row", "reason"} of the first rows that training would leave out.
    first_sample: text of the first usable row with its trained tokens highlighted.
    """

    sources: list[dict] = field(default_factory=list)
    bad_rows: list[dict] = field(default_factory=list)
    first_sample: str = ""

    def __str__(self) -> str:
        width = max(len(source["path"]) for source in self.sources)
        lines = [" ".join([f"{'source':<{width}}", *(f"{name:>10}" for name in COLUMNS)])]
        for source in self.sources:
            cells = [f"{source[name]:>10.1%}" if name == "trained" else f"{source[name]:>10,}" for name in COLUMNS]
            lines.append(" ".join([f"{source['path']:<{width}}", *cells]))
        left_out = sum(source["rows"] - source["usable"] for source in self.sources)
        if left_out:
            lines += ["", f"{left_out} rows would be left out:"]
            lines += [f"  {bad['file']}, row {bad['row']}: {bad['reason']}" for bad in self.bad_rows]
            lines += ["  ..."] * (left_out > len(self.bad_rows))
        return "\n".join([*lines, "", "First sample, trained tokens highlighted:", self.first_sample])


def highlighted(processor, sample: dict, ansi: bool) -> str:
    """A sample as text: trained tokens in reverse video (`ansi`) or [[...]], runs of placeholders as <kind x count>."""
    ids, labels = sample["input_ids"][0].tolist(), sample["labels"][0].tolist()
    types = sample["mm_token_type_ids"][0].tolist() if "mm_token_type_ids" in sample else [0] * len(ids)
    start, pieces = 0, []
    keys = [(kind, label != -100) for kind, label in zip(types, labels)]
    for stop in range(1, len(ids) + 1):
        if stop < len(ids) and keys[stop] == keys[start]:
            continue
        kind, trained = keys[start]
        text = f"<{KINDS[kind]} x {stop - start}>" if kind else processor.decode(ids[start:stop])
        if trained:
            text = f"\033[7m{text}\033[0m" if ansi else f"[[{text}]]"
        pieces.append(text)
        start = stop
    return "".join(pieces)


class _Checked(Dataset):
    """Index -> what became of this row: kind (of the counts of `DataReport`), reason or tokens.

    The first usable row of every worker, one of which is the first of all, comes with its text.
    """

    def __init__(self, rows, processor, numbers, patches, limits, ansi: bool):
        self.rows, self.processor, self.numbers, self.patches = rows, processor, numbers, patches
        self.limits, self.ansi, self.shown = limits, ansi, False

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict:
        number = self.numbers[index]
        file, row = self.rows.name(number)
        try:
            content = self.rows[number]
        except OmniInputError as error:
            content = error
        return self.check(file, row, content, number)

    def check(self, file: str, row: int, content, number: int) -> dict:
        result = {"file": file, "row": row, "kind": "bad"}
        try:
            if isinstance(content, OmniInputError):
                raise content
            options = frame_patches(self.patches, 0, number)
            sample = encode_row(content, self.processor, **self.limits, **options)
        except TooLong as error:
            return result | {"kind": "long", "reason": str(error)}
        except NothingToLearn as error:
            return result | {"reason": str(error)}
        except Exception as error:
            reason = row_error(error, f"{file}, row {row}: ")
            return result | {"kind": "media" if self.media_fail(content) else "bad", "reason": reason}
        types = sample.get("mm_token_type_ids")
        counts = [sample["input_ids"].numel(), 0, 0, 0] if types is None else types[0].bincount(minlength=4).tolist()
        trained = int((sample["labels"] != -100).sum())
        text, self.shown = "" if self.shown else highlighted(self.processor, sample, self.ansi), True
        return result | {"kind": "usable", "tokens": counts, "trained": trained, "text": text}

    def media_fail(self, content) -> bool:
        """Whether a row that fails has media and is well formed without them."""
        if not isinstance(content, dict):
            return False
        try:
            self.processor.apply_chat_template(content["messages"], tools=content.get("tools"), tokenize=False)
            return bool(media_kinds(content["messages"]))
        except Exception:
            return False


def check_data(
    sources: list[dict],
    processor,
    row_tokens: int,
    sample: int | None = None,
    patches_per_frame: list[int] | None = None,
    workers: int = 0,
    ansi: bool | None = None,
    progress: bool = True,
    bad_rows: str | Path | None = None,
    **limits,
) -> DataReport:
    """Reads every row of every source, or `sample` rows spread over each, with training's code and limits.

    Only the target patches of video frames are drawn otherwise than in training, where they depend on the place.

    Args:
        sources: the `data` of a configuration. Of a nano task, which has no end, 64 rows when `sample` says nothing.
        row_tokens: longest row; more is "over length".
        patches_per_frame, limits: as in training (`PackedRows`): `media_tokens`, `cut_long`, `max_frames`.
        ansi: highlight by terminal codes; None: where stdout is a terminal.
        progress: a bar on stderr.
        bad_rows: JSONL file to write (anew) with every row that training would leave out: file, row, reason.
    """
    check_sources(sources)
    report, limits = DataReport(), {"row_tokens": row_tokens, **limits}
    ansi = sys.stdout.isatty() if ansi is None else ansi
    if bad_rows is not None:
        Path(bad_rows).parent.mkdir(parents=True, exist_ok=True)
        Path(bad_rows).write_text("")
    for spec in sources:
        if spec.get("streaming"):
            checked = _Checked(None, processor, (), patches_per_frame, limits, ansi)
            total, results = sample, _check_stream(checked, Stream(spec), sample)
        else:
            rows = Source(spec)
            total = sample or (ENDLESS if spec["path"].startswith("nano:") else len(rows))
            total = min(total, len(rows))
            numbers = [i * len(rows) // total for i in range(total)] if len(rows) < 2**32 else range(total)
            checked = _Checked(rows, processor, numbers, patches_per_frame, limits, ansi)
            results = DataLoader(checked, batch_size=None, num_workers=workers)
        found, tokens, trained = Counter(), [0] * len(KINDS), 0
        for result in tqdm(results, spec["path"], total, disable=not progress, mininterval=1):
            found[result["kind"]] += 1
            if result["kind"] != "usable":
                bad = {key: result[key] for key in ("file", "row", "reason")}
                if len(report.bad_rows) < SHOWN:
                    report.bad_rows.append(bad)
                if bad_rows is not None:
                    with open(bad_rows, "a") as file:
                        file.write(json.dumps(bad) + "\n")
                continue
            tokens = [sum(pair) for pair in zip(tokens, result["tokens"])]
            trained += result["trained"]
            report.first_sample = report.first_sample or result["text"]
        total = sum(tokens)
        report.sources.append(
            {"path": spec["path"], "rows": sum(found.values())}
            | {kind: found[kind] for kind in ("usable", "bad", "media", "long")}
            | {"tokens": total, "mean": round(total / max(1, found["usable"]), 1), "trained": trained / max(1, total)}
            | dict(zip(KINDS, tokens))
        )
    return report


def _check_stream(checked: _Checked, stream: Stream, sample: int | None):
    try:
        for number, (file, row, content) in enumerate(islice(stream, sample)):
            if stream.position["epoch"]:
                return
            yield checked.check(file, row, content, number)
    except OmniInputError as error:  # it cannot be read on
        yield {"file": stream.path, "row": stream.position["rows"] + 1, "kind": "bad", "reason": str(error)}


def check_command(argv: list[str]) -> None:
    """`train.py sft --check-data [ROWS] --config FILE`: prints the report on all rows, or on ROWS of every source."""
    from .configuration_omni import resolve_checkpoint
    from .packing import row_limits
    from .processing_omni import OmniProcessor
    from .training import SFTArguments, load_arguments

    place = argv.index("--check-data")
    sample = int(argv[place + 1]) if argv[place + 1 : place + 2] and argv[place + 1].isdigit() else None
    args = load_arguments(SFTArguments, argv[:place] + argv[place + (1 if sample is None else 2) :])
    processor = OmniProcessor.from_pretrained(resolve_checkpoint(args.processor or args.model))
    options = {"patches_per_frame": args.patches_per_frame, "workers": args.workers}
    bad_rows = Path(args.output_dir) / "check_bad_rows.jsonl"
    print(check_data(args.data, processor, sample=sample, bad_rows=bad_rows, **row_limits(args), **options))
    print(f"\nRows that would be left out are listed in {bad_rows}")


__all__ = ["check_command", "DataReport", "check_data"]
