"""Online sequence packing with a balanced greedy knapsack (paper 3.1.8), and the loader that training iterates over.

Every reader (data-parallel rank x loader worker) has its own lane of the blend's places. It holds a window of encoded
samples, packs the whole window into rows that are equally full in tokens and equally loaded with media, and gives out
the fixed number of rows of a step; the rest waits for the next. All steps and ranks so get rows of one shape and of
about the same work. Documents stay apart in attention, convolution and Mamba state by `seq_idx`.

Shapes: R rows of S = row_tokens places.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset, get_worker_info

from .data import KINDS, TOKEN_INPUTS, Blend, Stream, cost_of, encode_row, frame_patches, hashed, row_error
from .media import OmniInputError
from .modeling_omni import MEDIA_FEATURES

# Inputs whose first dimension is items, patches or tokens of the whole batch, not rows.
FLAT_INPUTS = (
    *("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "video_keep_tokens"),
    *("audio_clip_counts", *MEDIA_FEATURES),
)
BAD_ROWS_BASE = 1000  # the share of bad rows is taken of at least so many rows of a lane
BAD_ROWS_SPAN = 10_000  # and of about the last so many
LONG_ROW = 32768  # tokens from which rows are not held back by default


def pack_rows(
    costs: list[tuple[int, int]], row_tokens: int, num_rows: int | None = None, media_tokens: int | None = None
) -> tuple[list[list[int]], list[int]]:
    """Balanced greedy knapsack: items into rows that are about equally full in tokens and in media cost.

    Big items first, each into the row whose present load has least in common with it (the product of load and item over
    tokens and media): text goes where tokens are few, media where media are few.

    Args:
        costs: (tokens, media cost) of every item.
        row_tokens, media_tokens: the most that a row may hold.
        num_rows: rows to fill; when not given, as many as it takes to hold every item.

    Returns:
        The items of every row, and the items that found no room; all in order.
    """
    items = np.array(costs, np.float64).reshape(-1, 2)
    tokens = items[:, 0].sum()
    opened = num_rows or max(1, int(-(-tokens // row_tokens)))
    caps = np.array([row_tokens, media_tokens or np.inf])
    fair = np.array([row_tokens, max(1.0, items[:, 1].sum() * min(1.0, row_tokens / max(tokens, 1)))])
    sizes = items / fair
    loads = np.zeros((opened, 2))
    rows, left = [[] for _ in range(opened)], []
    for item in np.argsort(-sizes.max(1), kind="stable").tolist():
        fits = (loads + items[item] <= caps).all(1)
        if not fits.any() and num_rows is None:  # one more row, even for an item that is over the caps
            loads, fits = np.vstack([loads, np.zeros(2)]), np.append(fits, True)
            rows.append([])
        if not fits.any():
            left.append(item)
            continue
        row = int(np.argmin(np.where(fits, (loads / fair) @ sizes[item], np.inf)))
        rows[row].append(item)
        loads[row] += items[item]
    return sorted(sorted(row) for row in rows if row), sorted(left)


def collate_rows(rows: list[list[dict]], length: int | None = None) -> dict[str, torch.Tensor]:
    """Encoded samples, already dealt out to rows -> one batch.

    Returns input_ids, labels, attention_mask, mm_token_type_ids, seq_idx [R, length] (the longest row when not given;
    seq_idx is the document's number in its row, -1 on padding) and the media of all samples in the order of the rows.
    """
    length = length or max(sum(sample["input_ids"].shape[1] for sample in row) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0, "mm_token_type_ids": 0, "seq_idx": -1}
    batch = {name: torch.full((len(rows), length), value) for name, value in fill.items()}
    for number, row in enumerate(rows):
        start = 0
        for document, sample in enumerate(row):
            stop = start + sample["input_ids"].shape[1]
            for name in TOKEN_INPUTS:
                if name in sample:  # text alone has no mm_token_type_ids
                    batch[name][number, start:stop] = sample[name][0]
            batch["labels"][number, start] = -100  # the first token of a document follows nothing
            batch["seq_idx"][number, start:stop] = document
            start = stop
    return batch | join_media([sample for row in rows for sample in row])


def join_media(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Media of encoded samples, or their features, in order -> those of one batch; sound is padded to the longest."""
    media = {}
    for name in FLAT_INPUTS:
        parts = [sample[name] for sample in samples if name in sample]
        if parts:
            media[name] = torch.cat(parts)
    for name in ("input_features", "input_features_mask"):
        parts = [sample[name] for sample in samples if name in sample]
        if parts:
            frames, rest = max(part.shape[1] for part in parts), (0, 0) * (parts[0].dim() - 2)
            media[name] = torch.cat([F.pad(part, (*rest, 0, frames - part.shape[1])) for part in parts])
    return media


def row_limits(args) -> dict:
    """The limits on a row that a stage's arguments set, for `encode_row` and `PackedRows`."""
    limits = {"row_tokens": args.row_tokens, "media_tokens": args.media_tokens, "cut_long": args.cut_long}
    return limits | ({} if args.max_frames is None else {"max_frames": args.max_frames})


class PackedRows(IterableDataset):
    """Endless batches of exactly `rows` packed rows; resumable to the exact row.

        packed = PackedRows(blend, processor, rows=2, row_tokens=16384, rank=rank, world=world, bad_rows="bad.jsonl")
        packed.load_state_dict(saved)                                   # when resuming
        for batch in DataLoader(packed, batch_size=None, num_workers=workers):
            info = packed.consumed(batch.pop("info"))                   # then saved = packed.state_dict()

    Args:
        blend: what stands at which place.
        rows, row_tokens: shape of a batch.
        rank, world: of the data-parallel processes (context-parallel peers, which share a batch, share a rank).
        patches_per_frame: target patches of video frames; each sample draws one of them, for all its videos.
        window: rows' worth of samples that are held back to choose from, with their pixels (up to 24 KB a token in
            every loader worker). Default: 4; 1 for rows of 32,768 tokens and more, which hold many samples anyway.
        bad_rows: JSONL file that names every row left out: file, row, reason.
        max_bad_share: of rows left out among a reader's last 5,000 to 10,000, above which training stops.
        limits: of `encode_row`: `media_tokens`, `cut_long`, `max_frames`.

    A batch has the tensors of `collate_rows` and "info": samples, names (file and row of each), packing (share of
    places that are not padding), trained (tokens with a label), tokens of each kind, media (cost of every row), read
    and bad (rows so far in this lane).
    """

    def __init__(
        self,
        blend: Blend,
        processor,
        rows: int,
        row_tokens: int,
        rank: int = 0,
        world: int = 1,
        patches_per_frame: list[int] | None = None,
        window: int | None = None,
        bad_rows: str | Path | None = None,
        max_bad_share: float = 0.05,
        **limits,
    ):
        self.blend, self.processor, self.rows, self.row_tokens = blend, processor, rows, row_tokens
        self.rank, self.world = rank, world
        self.window = (4 if row_tokens < LONG_ROW else 1) if window is None else window
        self.limits = {"row_tokens": row_tokens, **limits}
        self.patches_per_frame, self.bad_rows, self.max_bad_share = patches_per_frame, bad_rows, max_bad_share
        self.state = {"batches": 0, "workers": None, "world": world, "lanes": {}}

    def state_dict(self) -> dict:
        """Where this rank stands after the batches that were given to `consumed`; plain numbers, strings and lists."""
        return {**self.state, "lanes": dict(self.state["lanes"])}

    def load_state_dict(self, state: dict) -> None:
        self.state = {**state, "lanes": {int(lane): position for lane, position in state["lanes"].items()}}

    def consumed(self, info: dict) -> dict:
        """Notes that a batch was trained on; returns what is to be logged of it."""
        info = dict(info)
        self.state["lanes"][info.pop("lane")] = info.pop("position")
        self.state["workers"] = info.pop("workers")
        self.state["batches"] += 1
        return info

    def __iter__(self):
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        before = (self.state["workers"] or workers, self.state["world"])
        if before != (workers, self.world):
            raise OmniInputError(
                f"the data position was saved with {before[0]} reader(s) on each of {before[1]} process(es), now "
                f"there are {workers} on each of {self.world}: resume with the same numbers (0 and 1 workers are alike)"
            )
        # batches come from the workers in turn, so the first one now is the one whose turn it was
        lane = self.rank * workers + (number + self.state["batches"]) % workers
        for batch in self._batches(lane, workers * self.world):
            batch["info"] |= {"lane": lane, "workers": workers}
            yield batch

    def _batches(self, lane: int, lanes: int):
        blend, position = self.blend, self.state["lanes"].get(lane, {})
        turn, counts = position.get("turn", 0), {"read": position.get("read", 0), "bad": position.get("bad", 0)}
        recent = Counter(position.get("recent", counts))
        streams = {i: Stream(blend.specs[i], lane, lanes) for i, source in enumerate(blend.sources) if source is None}
        waiting = []  # samples, each with its place and, of a stream, the position it was read at
        for place, at in position.get("waiting", ()):
            if at is not None:
                streams[blend.source_at(place)].go_to(at)
            file, row, sample = self._read(place, streams)
            if isinstance(sample, Exception):  # usable when it was read first, and gone since
                self._report(file, row, sample, counts, recent)
                continue
            waiting.append((place, at, file, row, sample))
        for source, at in position.get("streams", {}).items():
            streams[int(source)].go_to(at)
        while True:
            costs = [cost_of(sample) for *_, sample in waiting]
            tokens = sum(cost for cost, _ in costs)
            while tokens < (self.rows + self.window) * self.row_tokens:
                # lanes take turns within a block of places, or a lane could meet one source for long
                place = turn * lanes + (lane + hashed(blend.seed, turn)) % lanes
                source = blend.source_at(place)
                at = streams[source].state_dict() if source in streams else None
                turn, counts["read"] = turn + 1, counts["read"] + 1
                recent["read"] += 1
                if recent["read"] > BAD_ROWS_SPAN:  # what is long past counts ever less
                    recent = Counter({name: count // 2 for name, count in recent.items()})
                file, row, sample = self._read(place, streams)
                if isinstance(sample, Exception):
                    self._report(file, row, sample, counts, recent)
                    continue
                waiting.append((place, at, file, row, sample))
                costs.append(cost_of(sample))
                tokens += costs[-1][0]
            packed, _ = pack_rows(costs, self.row_tokens, tokens // self.row_tokens, self.limits.get("media_tokens"))
            fill = [sum(costs[item][0] for item in row) for row in packed]
            # the fullest rows, but the oldest sample waits no more
            order = sorted(range(len(packed)), key=lambda row: (0 not in packed[row], -fill[row]))
            taken = [packed[row] for row in order[: self.rows]]
            batch = collate_rows([[waiting[item][-1] for item in row] for row in taken], self.row_tokens)
            gone = {item for row in taken for item in row}
            names = [f"{waiting[item][2]}, row {waiting[item][3]}" for item in sorted(gone)]
            waiting = [entry for item, entry in enumerate(waiting) if item not in gone]
            kinds = batch["mm_token_type_ids"][batch["attention_mask"].bool()].bincount(minlength=len(KINDS)).tolist()
            batch["info"] = {
                "samples": len(gone),
                "names": names,
                "packing": sum(kinds) / batch["input_ids"].numel(),
                "trained": int((batch["labels"] != -100).sum()),
                "tokens": dict(zip(KINDS, kinds)),
                "media": [sum(costs[item][1] for item in row) for row in taken],
                **counts,
                "position": {
                    "turn": turn,
                    **counts,
                    "recent": dict(recent),
                    "waiting": [[place, at] for place, at, *_ in waiting],
                    "streams": {str(source): stream.state_dict() for source, stream in streams.items()},
                },
            }
            yield batch

    def _read(self, place: int, streams: dict[int, Stream]) -> tuple[str, int, dict | Exception]:
        """(file, row, encoded sample or why there is none)."""
        stream = streams.get(self.blend.source_at(place))
        file, row, content = next(stream) if stream else self.blend.read(place)
        try:
            if isinstance(content, OmniInputError):
                raise content
            options = frame_patches(self.patches_per_frame, self.blend.seed, place)
            return file, row, dict(encode_row(content, self.processor, **self.limits, **options))
        except Exception as error:  # whatever one row does, it is named and the run goes on
            return file, row, error

    def _report(self, file: str, row: int, error: Exception, counts: dict[str, int], recent: Counter) -> None:
        counts["bad"] += 1
        recent["bad"] += 1
        reason = row_error(error, f"{file}, row {row}: ")
        if self.bad_rows is not None:
            with open(self.bad_rows, "a") as report:  # one short write each, so that readers may share the file
                report.write(json.dumps({"file": file, "row": row, "reason": reason}) + "\n")
        if recent["bad"] > self.max_bad_share * max(recent["read"], BAD_ROWS_BASE):
            raise OmniInputError(
                f"{recent['bad']} of the last {recent['read']} rows cannot be used; limit {self.max_bad_share:.1%} "
                f"(max_bad_share; at least {BAD_ROWS_BASE} rows count); the last one, {file}, row {row}: {reason}; "
                f"{'see ' + str(self.bad_rows) if self.bad_rows else 'check the data'}"
            )


__all__ = ["PackedRows", "collate_rows", "join_media", "pack_rows", "row_limits"]
