"""Training rows: sources, blends by share of tokens, and encoding into model inputs (paper 3.1, Tables 1-5).

A source is a JSONL, JSON or Parquet file (or a pattern of them), `datasets:<name>` (anything that library opens), or
`nano:<skill>`, a task of `nano_data` made on the fly. Which row stands at which place of a blend is a function of
(seed, place), weights and numbers of rows alone, so training resumes at the exact row without reading what went before,
and every process works out its own share. Streamed sources have no places; there the reader's own position is kept
(`Stream`).
"""

import copy
import glob
import hashlib
import json
import logging
import math
import os
from array import array
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .data_adapters import FORMATS, TEMPLATES, adapt_row
from .data_adapters import KINDS as MEDIA_KINDS
from .media import OmniInputError
from .prompt_omni import part_kind

logger = logging.getLogger(__name__)

KINDS = ("text", *MEDIA_KINDS)  # by value of mm_token_type_ids

# Keys of a source (the `data` of a configuration).
SOURCE_KEYS = {
    "path": "file or pattern (.jsonl, .json, .parquet), datasets:<name>, or nano:<skill>",
    "weight": "share of the blend's tokens (of its rows where mean_tokens is not known)",
    "limit": "use the first so many rows only",
    "mean_tokens": "tokens of a row on average (measured when not given); with it, weights are shares of tokens",
    "streaming": "read in order instead of at random places",
    "format": f"form of the rows, one of {', '.join(FORMATS)}; see adapt_row",
    "template": f"for questions with options, one of {', '.join(TEMPLATES)}",
    "subset": "datasets: name of the configuration",
    "split": "datasets: name of the split",
}


class TooLong(OmniInputError):
    """A row over the tokens or the media cost that one packed row may have."""


class NothingToLearn(OmniInputError):
    """A row without any trained token."""


class JsonlRows:
    """Rows of a JSONL file by number, found through an index of line starts (8 bytes each).

    Making the index reads the file through once; `streaming: true` starts at once.
    """

    def __init__(self, path: str):
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or device may never end
            raise OmniInputError(f"{path}: is not a regular file; give the path of a .jsonl file")
        self.path, self.starts, position = path, array("q"), 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    self.starts.append(position)
                position += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.starts[number])
            return parse_line(file.readline())


def parse_line(line: bytes) -> dict:
    try:
        return json.loads(line)
    except ValueError as error:
        raise OmniInputError(f"not JSON ({error})") from error


class TableRows:
    """Rows of a `datasets.Dataset` by number; media stay undecoded.

    `datasets` keeps an Arrow copy of what it opens, of about the same size, in its cache (HF_DATASETS_CACHE). Arrow
    gives every row all fields, so null fields are dropped; a null that means something (in the arguments of a tool
    call, say) must stand in JSON text, which messages and tools may be.
    """

    def __init__(self, table):
        self.table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> dict:
        return without_nulls(self.table[int(number)].to_pylist()[0])


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class NanoRows:
    """A nano task: every number below 2^32 is a row."""

    def __init__(self, skill: str, split: str):
        self.skill, self.split = skill, split

    def __len__(self) -> int:
        return 2**32

    def __getitem__(self, number: int) -> dict:
        from .nano_data import make_sample

        return make_sample(self.skill, number, self.split)


def source_files(path: str) -> list[str]:
    files = sorted(glob.glob(path, recursive=True)) or [path]
    for file in files:
        if not Path(file).is_file():
            hint = "'nano:<skill>' or 'datasets:<name>' for other sources"
            raise OmniInputError(f"data source {path!r}: there is no such file; give a file, a pattern, or {hint}")
        if Path(file).suffix not in (".jsonl", ".json", ".parquet"):
            raise OmniInputError(
                f"{file}: a data file must end in .jsonl (an object per line), .json (a list) or .parquet"
            )
    return files


def load_table(source: dict, files: str | list[str] | None = None):
    """`datasets` on Parquet files, or on the name that a source gives; no code of others is run."""
    try:
        import datasets
    except ImportError as error:
        raise OmniInputError(f"{source['path']}: needs the package datasets (pip install datasets)") from error
    streaming, name = bool(source.get("streaming")), source["path"].removeprefix("datasets:")
    try:
        if files is not None:
            return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
        return datasets.load_dataset(
            name, source.get("subset"), split=source.get("split", "train"), streaming=streaming
        )
    except Exception as error:  # of many kinds, from Arrow, fsspec and the hub
        reason = " ".join(str(error).split())[:300]
        raise OmniInputError(f"{files or name}: datasets cannot open it ({type(error).__name__}: {reason})") from error


def open_file(file: str, spec: dict):
    if file.endswith(".parquet"):
        return TableRows(load_table(spec, file))
    if file.endswith(".jsonl"):
        return JsonlRows(file)
    try:
        rows = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise OmniInputError(f"{file}: not JSON ({error}); one object per line goes into a .jsonl file") from error
    if not isinstance(rows, list):
        raise OmniInputError(f"{file}: a .json file must hold one list of rows")
    return rows


class Source:
    """Rows of one source by number, as {"messages", "tools"}, or as another function than `adapt_row` makes them.

    Raises:
        OmniInputError: a file that is not there, without rows, or (for one row) what is wrong with it, by file and row.
    """

    def __init__(self, spec: dict, split: str = "train", adapt=adapt_row):
        self.spec, self.adapt, path = spec, adapt, spec["path"]
        if path.startswith("nano:"):
            self.parts = [(path, NanoRows(path.removeprefix("nano:"), split))]
        elif path.startswith("datasets:"):
            self.parts = [(path, TableRows(load_table(spec)))]
        else:
            self.parts = [(file, open_file(file, spec)) for file in source_files(path)]
        self.ends = list(accumulate(len(rows) for _, rows in self.parts))
        if not self.ends[-1]:
            raise OmniInputError(f"{path}: no rows")

    def __len__(self) -> int:
        return min(self.ends[-1], self.spec.get("limit") or self.ends[-1])

    def name(self, number: int) -> tuple[str, int]:
        """(file, row in it from 1 on)."""
        part = bisect_right(self.ends, number)
        return self.parts[part][0], number - (self.ends[part - 1] if part else 0) + 1

    def __getitem__(self, number: int) -> dict:
        file, row = self.name(number)
        rows = self.parts[bisect_right(self.ends, number)][1]
        return finish_row(lambda: rows[row - 1], self.spec, file, row, self.adapt)


def finish_row(read, spec: dict, file: str, row: int, adapt=adapt_row) -> dict:
    """A row read and adapted; whatever is wrong with it is said with its file and number."""
    folder = None if file.startswith(("nano:", "datasets:")) else Path(file).parent
    try:
        return adapt(read(), spec.get("format"), spec.get("template", "mixed"), folder)
    except Exception as error:  # RecursionError of json, Arrow's errors, ...: one row does not end a run
        raise OmniInputError(f"{file}, row {row}: {row_error(error)}") from error


def row_error(error: Exception, name: str = "") -> str:
    """What is wrong with a row, without its name in front; of what is not ours, with its kind."""
    kind = "" if isinstance(error, OmniInputError) else f"{type(error).__name__}: "
    return kind + str(error).removeprefix(name)


class Stream:
    """Rows of a `streaming: true` source one after the other, over and over: every `lanes`-th row from `lane` on.

    Whole files or shards are dealt out to the lanes where their number allows it. `state_dict` holds the exact
    position, which is found again without reading (JSONL) or decoding (`datasets`) what lies before it.
    """

    def __init__(self, spec: dict, lane: int = 0, lanes: int = 1):
        self.spec, self.lane, self.lanes, self.path = spec, lane, lanes, spec["path"]
        self.files = None if self.path.startswith("datasets:") else source_files(self.path)
        self.is_jsonl = self.files is not None and not self.files[0].endswith(".parquet")
        if not self.is_jsonl:
            from datasets.distributed import split_dataset_by_node

            tables = load_table(spec, self.files)
            self.table = split_dataset_by_node(tables, rank=lane, world_size=lanes).with_format("arrow")
        elif len(self.files) % lanes == 0:
            self.files, self.lane, self.lanes = self.files[lane::lanes], 0, 1
        self.position = {"epoch": 0, "rows": 0} | ({"file": 0, "offset": 0, "line": 0} if self.is_jsonl else {})
        self.iterator = self.table_state = None  # the latter: where the tables are before the first row is read

    def __iter__(self):
        return self

    def __next__(self) -> tuple[str, int, dict | OmniInputError]:
        """(file, row, the row or what is wrong with it). Row numbers of `datasets` sources count within the lane."""
        if self.iterator is None:
            self.iterator = self._lines() if self.is_jsonl else self._tables()
        limit = self.spec.get("limit")
        limit = limit and max(1, limit // self.lanes)
        try:
            item = None if limit and self.position["rows"] >= limit else next(self.iterator, None)
        except Exception as error:  # a reader that failed cannot go on behind the place
            raise OmniInputError(
                f"{self.path}: reader {self.lane + 1} of {self.lanes} fails after {self.position['rows']} rows "
                f"({type(error).__name__}: {error}); repair the file, or drop streaming to pass over such rows"
            ) from error
        if item is None:
            if not self.position["rows"]:
                raise OmniInputError(
                    f"{self.path}: no rows for reader {self.lane + 1} of {self.lanes}; use fewer workers"
                )
            restart = {"file": 0, "offset": 0, "line": 0} if self.is_jsonl else {"table": None}
            self.load_state_dict({"epoch": self.position["epoch"] + 1, "rows": 0} | restart)
            return next(self)
        file, row, read = item
        self.position["rows"] += 1
        try:
            return file, row, finish_row(read, self.spec, file, row)
        except OmniInputError as error:
            return file, row, error

    def _lines(self):
        at = self.position
        while at["file"] < len(self.files):
            name = self.files[at["file"]]
            with open(name, "rb") as file:
                file.seek(at["offset"])
                for line in file:
                    at["offset"] += len(line)
                    if line.strip():
                        at["line"] += 1
                        if at["line"] % self.lanes == (self.lane + 1) % self.lanes:
                            yield name, at["line"], lambda line=line: parse_line(line)
            at.update(file=at["file"] + 1, offset=0, line=0)

    def _tables(self):
        for batch in self.table.iter(batch_size=1):  # `iter` leaves the split over workers to us
            yield self.path, self.position["rows"] + 1, lambda batch=batch: without_nulls(batch.to_pylist()[0])

    def state_dict(self) -> dict:
        if self.is_jsonl:
            return dict(self.position)
        return {**self.position, "table": copy.deepcopy(self.table.state_dict()) if self.iterator else self.table_state}

    def load_state_dict(self, state: dict) -> None:
        state = copy.deepcopy(state)
        table = self.table_state = state.pop("table", None)
        self.position, self.iterator = state, None
        if not self.is_jsonl:
            self.table.set_epoch(state["epoch"])
            if table is not None:
                self.table.load_state_dict(copy.deepcopy(table))

    def go_to(self, state: dict) -> None:
        """`load_state_dict`, but reads on to a position ahead where loading would skip through the shard again."""
        here, there = ((at["epoch"], at["rows"]) for at in (self.position, state))
        if self.is_jsonl or self.iterator is None or here > there:
            self.load_state_dict(state)
            return
        while (self.position["epoch"], self.position["rows"]) < there:
            next(self)


# --------------------------------------------------------------------------------------------------- blends

TURN = 2**64  # a full turn of the circle on which a blend's sources have their arcs
STEP = 11400714819323198485  # golden ratio of a turn: consecutive places lie as evenly as any sequence can


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """sum of (a * i + b) // m over i in range(n), for a, b >= 0, in O(log m) steps."""
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        n, b, m, a = top // m, top % m, a, m
    return total


def shuffled(position: int, count: int, key: str) -> int:
    """Image of `position` under a permutation of range(count) drawn from `key` (a Feistel network, cycle-walked)."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            left, right = right, left ^ (hashed(key, turn, right) & mask)
        position = left << half | right
        if position < count:
            return position


def hashed(*values) -> int:
    """64 bits that depend on nothing but the values."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


class Blend:
    """An endless blend of sources; place -> row.

    The places of a source are spread evenly and its rows come in a new random order every epoch, each row once. Row
    shares are exact to a few rows at any time: weight / mean_tokens, so that weights are shares of tokens, where the
    sources have `mean_tokens` (`measure_mean_tokens`), and otherwise the weights themselves.

    Args:
        sources: dicts with the keys of SOURCE_KEYS.
        seed: of the order.
        split: split of the `nano:` sources.
        adapt: what makes rows of what is read (`adapt_row`, `adapt_prompt`).
    """

    def __init__(self, sources: list[dict], seed: int = 0, split: str = "train", adapt=adapt_row):
        check_sources(sources)
        measured = [source for source in sources if source.get("mean_tokens")]
        if measured and len(measured) < len(sources):
            raise OmniInputError("mean_tokens must be given for every source in data or for none")
        self.specs, self.seed = sources, seed
        shares = [float(source.get("weight") or 1.0) / float(source.get("mean_tokens") or 1.0) for source in sources]
        ends = [int(end / sum(shares) * TURN) for end in accumulate(shares)]
        self.bounds = [0, *ends[:-1], TURN]
        self.offset = hashed(seed) % TURN
        self.sources = [None if source.get("streaming") else Source(source, split, adapt) for source in sources]

    def source_at(self, place: int) -> int:
        return bisect_right(self.bounds, (place * STEP + self.offset) % TURN) - 1

    def locate(self, place: int) -> tuple[int, int]:
        """(source, its row)."""
        source = self.source_at(place)
        rows = self.sources[source]
        if rows is None:
            raise TypeError(f"{self.specs[source]['path']} is streamed: its rows have no places")
        turn = self._places_below(place, source + 1) - self._places_below(place, source)  # this source's earlier rows
        epoch, turn = divmod(turn, len(rows))
        return source, shuffled(turn, len(rows), f"{self.seed}/{source}/{epoch}")

    def _places_below(self, place: int, bound: int) -> int:
        """How many places before `place` lie on the circle before `bounds[bound]`."""
        if bound == 0:
            return 0
        beyond = floor_sum(place, TURN, STEP, self.offset + TURN - self.bounds[bound]) - place
        return floor_sum(place, TURN, STEP, self.offset) - beyond

    def read(self, place: int) -> tuple[str, int, dict | OmniInputError]:
        """(file, row, the row at a place or what is wrong with it)."""
        source, number = self.locate(place)
        file, row = self.sources[source].name(number)
        try:
            return file, row, self.sources[source][number]
        except OmniInputError as error:
            return file, row, error

    def __getitem__(self, place: int) -> dict:
        source, number = self.locate(place)
        return self.sources[source][number]


def check_sources(sources: list[dict]) -> None:
    """Raises OmniInputError for keys and values that no source has."""
    if not sources:
        raise OmniInputError("data is empty: give at least one source {path, weight}")
    for source in sources:
        if not isinstance(source, dict) or not isinstance(source.get("path"), str):
            raise OmniInputError(f"a source in data is {source!r:.80}; give {{path: ..., weight: ...}}")
        unknown = set(source) - set(SOURCE_KEYS)
        if unknown:
            raise OmniInputError(f"unknown keys in data: {sorted(unknown)}; a source has any of {list(SOURCE_KEYS)}")
        for key in ("weight", "limit", "mean_tokens"):
            value = source.get(key)
            try:  # YAML reads 1e-3 as text
                right = value is None or 0 < float(value) < math.inf and (key != "limit" or isinstance(value, int))
            except (TypeError, ValueError):
                right = False
            if not right:
                kind = "whole" if key == "limit" else "positive"
                raise OmniInputError(f"{source['path']}: {key} is {value!r}; give a {kind} number above 0 or drop it")
        for key, known in (("format", FORMATS), ("template", TEMPLATES)):
            if source.get(key) is not None and source[key] not in known:
                raise OmniInputError(f"{source['path']}: {key} is {source[key]!r}; use one of {', '.join(known)}")
        if source["path"].startswith("nano:"):
            from .nano_data import GROUNDING_SKILLS, SKILLS

            known = (*SKILLS, *GROUNDING_SKILLS)
            if source["path"].removeprefix("nano:") not in known:
                raise OmniInputError(f"{source['path']}: no such nano task; known: {', '.join(known)}")
            if source.get("streaming"):
                raise OmniInputError(f"{source['path']}: nano tasks are made at random places; drop streaming")
        if source.get("streaming") and source["path"].endswith(".json"):
            raise OmniInputError(
                f"{source['path']}: one JSON list cannot be streamed; write a row per line into a .jsonl"
            )


# --------------------------------------------------------------------------------------------------- samples


def encode_row(
    row: dict,
    processor,
    row_tokens: int | None = None,
    media_tokens: int | None = None,
    cut_long: bool = False,
    **options,
) -> dict[str, torch.Tensor]:
    """One row -> model inputs with labels, each [1, ...] as the processor returns them (no padding).

    Args:
        row: {"messages", "tools"}.
        row_tokens, media_tokens: the most that a row may have (see `cost_of`).
        cut_long: cut the end of too long text off instead; never inside or before a media item.
        options: of `OmniProcessor.apply_chat_template`, e.g. `max_frames`, `video_target_num_patches`.

    Raises:
        TooLong: over `row_tokens` or `media_tokens`.
        NothingToLearn: no trained token.
        OmniInputError: a malformed row, media that cannot be read.
    """
    kinds = media_kinds(row["messages"])
    images = processor.image_processor  # every picture has at least its smallest grid: too many are not even decoded
    least = len(kinds) + kinds.count("image") * (images.min_num_patches // images.merge_size**2 // 2)
    if row_tokens is not None and least > row_tokens and not options.get("max_media_tokens"):
        raise TooLong(f"{len(kinds)} media items are over {least} tokens; limit {row_tokens} of a packed row")
    sample = processor.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        tokenize=True,
        return_dict=True,
        return_labels=True,
        return_tensors="pt",
        **options,
    )
    tokens, cost = cost_of(sample)
    if row_tokens is not None and tokens > row_tokens:
        types = sample.get("mm_token_type_ids")
        if not cut_long or (types is not None and bool(types[:, row_tokens:].any())):
            raise TooLong(f"{tokens} tokens; limit {row_tokens} of a packed row; raise row_tokens or lower max_frames")
        for name in TOKEN_INPUTS:
            if name in sample:
                sample[name] = sample[name][:, :row_tokens]
    if media_tokens is not None and cost > media_tokens:
        raise TooLong(f"media cost {cost} (patches and sound frames); limit {media_tokens} of a packed row")
    if not (sample["labels"][:, 1:] != -100).any():
        raise NothingToLearn("nothing to learn: no assistant text")
    return sample


def media_kinds(messages: list[dict]) -> list[str]:
    """Kind of every media part of a row, as far as its messages are well formed."""
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [kind for kind in map(part_kind, parts) if kind in MEDIA_KINDS]


TOKEN_INPUTS = ("input_ids", "labels", "attention_mask", "mm_token_type_ids")


def cost_of(sample: dict[str, torch.Tensor]) -> tuple[int, int]:
    """(tokens in the language model, positions in the towers: patches of images and tubelets, sound in 80 ms)."""
    cost = sum(len(sample[name]) for name in ("pixel_values", "pixel_values_videos") if name in sample)
    if "input_features_mask" in sample:
        cost += int(sample["input_features_mask"].sum()) // 8
    return sample["input_ids"].shape[1], cost


def frame_patches(choices: list[int] | None, seed: int, place: int) -> dict[str, int]:
    """The random target patches of video frames (paper 3.1: 256, 512, 768 or 1,024), as a processor option.

    One is drawn for each row, for all its videos.
    """
    return {"video_target_num_patches": choices[hashed(seed, place, "patches") % len(choices)]} if choices else {}


class _Lengths(Dataset):
    """Number -> tokens that this row of a source brings into training; 0 for rows that are refused."""

    def __init__(self, spec: dict, processor, numbers: list[int], patches: list[int] | None, limits: dict):
        self.spec, self.processor, self.numbers, self.patches, self.limits = spec, processor, numbers, patches, limits
        self.rows = Stream(spec) if spec.get("streaming") else Source(spec)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> int:
        streamed = next(self.rows)[2] if isinstance(self.rows, Stream) else None
        try:
            if isinstance(streamed, OmniInputError):
                raise streamed
            row = streamed
            if row is None:
                row = self.rows[shuffled(self.numbers[index], len(self.rows), "lengths")]
            options = frame_patches(self.patches, 0, self.numbers[index])
            return encode_row(row, self.processor, **self.limits, **options)["input_ids"].shape[1]
        except Exception:  # as in training, where it is named
            return 0


def measure_mean_tokens(
    sources: list[dict],
    processor,
    patches_per_frame: list[int] | None = None,
    workers: int = 0,
    accuracy: float = 0.02,
    samples: tuple[int, int] = (64, 1024),
    **limits,
) -> list[dict]:
    """The sources with `mean_tokens`, measured where it is not given, on random rows or the first of a stream.

    Rows are drawn until the standard error is below `accuracy` of the mean (at least `samples[0]`, at most
    `samples[1]`, or all rows). Refused rows count with 0 tokens, as in training. Store the result (the resolved
    configuration) and start from it again: resuming is exact then.

    Args:
        limits: of `encode_row` (`row_tokens`, `media_tokens`, `cut_long`, `max_frames`), as in training.
    """
    check_sources(sources)
    measured = []
    for spec in sources:
        if spec.get("mean_tokens"):
            measured.append(spec)
            continue
        rows = _Lengths(spec, processor, list(range(samples[1])), patches_per_frame, limits)
        if isinstance(rows.rows, Source):
            rows.numbers = rows.numbers[: len(rows.rows)]
        lengths = []
        streamed = isinstance(rows.rows, Stream)  # read in order, by one reader
        for tokens in DataLoader(rows, batch_size=None, num_workers=0 if streamed else workers):
            lengths.append(int(tokens))
            if len(lengths) >= samples[0] and len(lengths) % 16 == 0:
                if np.std(lengths) / math.sqrt(len(lengths)) < accuracy * np.mean(lengths):
                    break
        mean = float(np.mean(lengths))
        if not mean:
            raise OmniInputError(
                f"{spec['path']}: none of {len(lengths)} rows can be used; see `train.py sft --check-data`"
            )
        logger.info("%s: %.1f tokens a row (%d rows measured)", spec["path"], mean, len(lengths))
        measured.append({**spec, "mean_tokens": round(mean, 2)})
    return measured


__all__ = ["Blend", "SOURCE_KEYS", "Source", "Stream", "encode_row", "measure_mean_tokens"]
