"""Training rows: blends of sources, encoding into model inputs, and packing into rows (paper 3.1.8).

A source is a JSONL file of `{"messages": [...]}` rows or `nano:<skill>`, a task of `nano_data` made on the fly. Which
row stands at which place is a function of (seed, place) alone, so training resumes at the exact row without reading
what went before, and every worker can work out its own share.
"""

import json
import random
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .media import OmniInputError

# Inputs whose first dimension is items or patches of the whole batch, not rows.
FLAT_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "video_keep_tokens",
    "audio_clip_counts",
)


class JsonlRows:
    """Rows of a JSONL file by number, found through an index of line starts (the file is never held in memory)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.starts = []
        with open(self.path, "rb") as file:
            position = 0
            for line in file:
                if line.strip():
                    self.starts.append(position)
                position += len(line)
        if not self.starts:
            raise OmniInputError(f"{self.path}: no rows")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.starts[number])
            try:
                row = json.loads(file.readline())
                messages = row["messages"]
            except (ValueError, KeyError, TypeError) as error:
                raise OmniInputError(
                    f"{self.path}, row {number + 1}: not a JSON object with 'messages' ({error})"
                ) from error
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            for part in content if isinstance(content, list) else ():
                for key in ("path", part.get("type")):  # {"path": ...} or {"image": ...}, relative to the file's folder
                    source = part.get(key)
                    if isinstance(source, str) and key != "text" and "://" not in source and source[:5] != "data:":
                        part[key] = str(self.path.parent / source)
        return row


class Blend(Dataset):
    """An endless blend of sources; place -> row, with each source drawn by its weight.

    Args:
        sources: [{"path": "nano:<skill>" or a .jsonl file, "weight": share of rows}].
        split: split of the `nano:` sources.
    """

    def __init__(self, sources: list[dict], seed: int = 0, split: str = "train"):
        unknown = {key for source in sources for key in source} - {"path", "weight", "limit"}
        if unknown:
            raise ValueError(f"unknown keys in data: {sorted(unknown)}; a source has path, weight and limit")
        self.sources, self.seed, self.split = sources, seed, split
        self.weights = [float(source.get("weight", 1.0)) for source in sources]
        self.files = {s["path"]: JsonlRows(s["path"]) for s in sources if not s["path"].startswith("nano:")}

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, place: int) -> dict:
        rng = random.Random(f"{self.seed}/{place}")
        source = rng.choices(self.sources, self.weights)[0]
        path, number = source["path"], rng.getrandbits(32)
        if path.startswith("nano:"):
            from .nano_data import make_sample

            return make_sample(path.removeprefix("nano:"), number, self.split)
        rows = self.files[path]
        return rows[number % min(len(rows), source.get("limit") or len(rows))]


def encode_row(row: dict, processor) -> dict[str, torch.Tensor]:
    """One row -> model inputs with labels, each [1, ...] as the processor returns them (no padding)."""
    return processor.apply_chat_template(
        row["messages"],
        tools=row.get("tools"),
        tokenize=True,
        return_dict=True,
        return_labels=True,
        return_tensors="pt",
    )


def pack_greedily(lengths: list[int], capacity: int) -> list[list[int]]:
    """Puts items into rows of at most `capacity`, longest first, each into the fullest row it fits.

    Returns the numbers of the items of each row. An item longer than `capacity` gets a row of its own.
    """
    rows, room = [], []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row in range(len(rows)) if room[row] >= lengths[item]]
        if fits:
            row = min(fits, key=lambda r: room[r])
            rows[row].append(item)
            room[row] -= lengths[item]
        else:
            rows.append([item])
            room.append(capacity - lengths[item])
    return rows


def collate_packed(samples: list[dict[str, torch.Tensor]], row_tokens: int) -> dict[str, torch.Tensor]:
    """Packs encoded samples into rows; `seq_idx` tells the model where one document ends (see `OmniLanguageModel`).

    Returns input_ids, labels, attention_mask, mm_token_type_ids, seq_idx [rows, longest row] and the media of all
    samples in their new order.
    """
    rows = pack_greedily([sample["input_ids"].shape[1] for sample in samples], row_tokens)
    length = max(sum(samples[item]["input_ids"].shape[1] for item in row) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0, "mm_token_type_ids": 0, "seq_idx": -1}
    batch = {name: torch.full((len(rows), length), value) for name, value in fill.items()}
    for number, row in enumerate(rows):
        start = 0
        for document, item in enumerate(row):
            sample = samples[item]
            stop = start + sample["input_ids"].shape[1]
            for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
                if name in sample:  # text alone has no mm_token_type_ids
                    batch[name][number, start:stop] = sample[name][0]
            batch["labels"][number, start] = -100  # the first token of a document follows nothing
            batch["seq_idx"][number, start:stop] = document
            start = stop
    ordered = [samples[item] for row in rows for item in row]
    for name in FLAT_INPUTS:
        parts = [sample[name] for sample in ordered if name in sample]
        if parts:
            batch[name] = torch.cat(parts)
    features = [sample["input_features"] for sample in ordered if "input_features" in sample]
    if features:
        masks = [sample["input_features_mask"] for sample in ordered if "input_features" in sample]
        frames = max(feature.shape[1] for feature in features)
        pad = torch.nn.functional.pad
        batch["input_features"] = torch.cat([pad(f, (0, 0, 0, frames - f.shape[1])) for f in features])
        batch["input_features_mask"] = torch.cat([pad(m, (0, frames - m.shape[1])) for m in masks])
    return batch


class PackedBatches(Dataset):
    """Batch number -> a packed batch of `rows_per_batch` encoded rows of the blend."""

    def __init__(self, blend: Blend, processor, rows_per_batch: int, row_tokens: int, num_batches: int):
        self.blend, self.processor = blend, processor
        self.rows_per_batch, self.row_tokens, self.num_batches = rows_per_batch, row_tokens, num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        first = number * self.rows_per_batch
        rows = [self.blend[place] for place in range(first, first + self.rows_per_batch)]
        return collate_packed([encode_row(row, self.processor) for row in rows], self.row_tokens)
