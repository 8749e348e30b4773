"""Context parallelism: two and four gloo ranks equal one process; tokens, media and work are dealt out as told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from context_parallel_worker import IMAGE, SOUND, VIDEO, border_rows, media_rows
from tiny_model import collate, make_sample, prompt_of, tiny_model

from modeling_omni.context_parallel import context_group, set_context_parallel, shard_batch
from modeling_omni.media import OmniInputError

CHECKS = [
    "float32",
    "packed rows with media",
    "documents at borders",
    "left padding, not packed",
    "one document",
    "shorter than the slices",
    "labels on one rank",
    "gradient checkpointing",
    "projectors alone",
    "data parallel engine",
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """World size -> check -> largest differences from one process."""
    folder = tmp_path_factory.mktemp("context_parallel")
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(here / "context_parallel_worker.py"), str(folder), "2", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return {size: json.loads((folder / str(size) / "errors.json").read_text()) for size in (2, 4)}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one_process(errors, size, check):
    found = errors[size][check]
    # rounding of float32 alone moves the gradients of this model by 1e-4; in float64 nothing may differ
    hidden, gradient = (3e-4, 1e-3) if check == "float32" else (1e-10, 1e-10)
    assert found["loss"] < 1e-5 and found["hidden"] < hidden and found["gradient"] < gradient, found
    assert found["gradients"] >= {"projectors alone": 8}.get(check, 51)


def test_groups_split_the_world(errors):
    """Two groups of two ranks, another batch each: the gradient averaged over all four is that of both batches."""
    found = errors[4]["two groups"]
    assert max(found["loss"], found["hidden"], found["gradient"]) < 1e-10, found


@pytest.mark.parametrize("size", [2, 3, 16])
def test_slices_make_up_the_rows(size):
    batch = media_rows()
    shards = [shard_batch(batch, rank, size) for rank in range(size)]
    length = shards[0]["input_ids"].shape[1]
    rows = torch.zeros(2, 2 * size, length, dtype=torch.long)
    targets = torch.zeros_like(rows)
    for rank, shard in enumerate(shards):
        for part, values in ((rows, shard["input_ids"]), (targets, shard["labels"][:, 1:])):
            part[:, rank], part[:, 2 * size - 1 - rank] = values[0::2], values[1::2]
    total = batch["input_ids"].shape[1]
    assert torch.equal(rows.flatten(1)[:, :total], batch["input_ids"])
    assert torch.equal(targets.flatten(1)[:, : total - 1], batch["labels"][:, 1:])
    assert (targets.flatten(1)[:, total - 1 :] == -100).all()
    assert sum(int((shard["labels"][:, 1:] != -100).sum()) for shard in shards) == shards[0]["context"].num_items
    for modality in (1, 2, 3):
        tokens = shards[0]["context"].media_tokens[modality]
        index = torch.cat([shard["context"].media_index[modality] for shard in shards]).sort().values
        expected = [rank * max(tokens) + i for rank in range(size) for i in range(tokens[rank])]
        assert index.tolist() == expected  # every token of every rank has exactly one place


@pytest.mark.parametrize("size", [2, 16])
def test_attention_is_balanced(size):
    """In a document as long as the row the token at place p attends to p + 1 keys."""
    batch = {"input_ids": torch.arange(64 * size)[None]}
    shards = [shard_batch(batch, rank, size) for rank in range(size)]
    assert all(shard["context"].spans == [(0, [32]), (0, [32])] for shard in shards)
    pairs = [int((shard["input_ids"] + 1).sum()) for shard in shards]
    assert len(set(pairs)) == 1 and sum(pairs) == 64 * size * (64 * size + 1) // 2


def test_media_are_dealt_out_by_cost():
    clips = collate([make_sample([3, ("audio", [80] * 8), ("video", 4, 4, 4), ("image", 4, 4), 2], 0)])
    for rank in range(4):
        shard = shard_batch(clips, rank, 4)
        assert torch.equal(shard["input_features"], clips["input_features"][2 * rank : 2 * rank + 2])
        assert shard["video_grid_thw"].tolist() == [[1, 4, 4]]  # one tubelet each
        assert torch.equal(shard["pixel_values_videos"], clips["pixel_values_videos"][16 * rank : 16 * rank + 16])
        # the one image belongs to rank 2, the others run it as well, for nothing
        assert torch.equal(shard["pixel_values"], clips["pixel_values"])
        assert shard["context"].media_tokens[1] == [0, 0, 4, 0]


def test_a_prepared_model_still_runs_whole_batches():
    model = tiny_model()
    batch = collate([make_sample([5, IMAGE, 4, SOUND, VIDEO, 3], 0)])
    prompt = prompt_of(batch)
    loss = model(**batch).loss
    tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    set_context_parallel(torch.nn.ModuleDict({"adapters": model}), object())
    assert torch.equal(model(**batch).loss, loss)
    assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), tokens)
    with pytest.raises(ValueError, match="attention_mask"):
        model(**shard_batch(batch, 0, 2), attention_mask=batch["attention_mask"])
    set_context_parallel(model, None)
    assert "forward" not in vars(model)


def test_what_cannot_be_split_is_refused():
    batch = media_rows()
    with pytest.raises(OmniInputError, match="video_keep_tokens"):
        shard_batch(batch | {"video_keep_tokens": torch.tensor([4])}, 0, 2)
    with pytest.raises(OmniInputError, match="no audio was given"):
        shard_batch({name: value for name, value in batch.items() if "input_features" not in name}, 0, 2)
    with pytest.raises(OmniInputError, match="image 2 of 3"):
        shard_batch(batch | {"image_grid_thw": batch["image_grid_thw"].roll(1, 0)}, 0, 2)
    with pytest.raises(OmniInputError, match="context_parallel is 2, but 1 processes"):
        context_group(2)
    assert context_group(1) is None
    assert border_rows(2)["seq_idx"].shape == (2, 64)
