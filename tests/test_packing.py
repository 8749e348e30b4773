"""The balanced knapsack, packed against unpacked rows, and the loader that resumes to the exact row."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from tiny_model import collate, collate_packed, make_sample, tiny_model
from torch.utils.data import DataLoader

from modeling_omni import packing
from modeling_omni.data import Blend, cost_of
from modeling_omni.media import OmniInputError
from modeling_omni.packing import PackedRows, collate_rows, pack_rows
from modeling_omni.processing_omni import OmniProcessor


@pytest.fixture(scope="module")
def processor():
    return OmniProcessor.from_pretrained("nano")


@pytest.fixture
def rows_file(tmp_path):
    """120 rows of text, each known by its number; every tenth broken, one far too long."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(120):
        answer = "ab " * (2000 if i == 55 else int(rng.integers(3, 60)))
        user, reply = {"role": "user", "content": f"row {i}"}, {"role": "assistant", "content": answer}
        lines.append("{" if i % 10 == 0 else json.dumps({"messages": [user, reply]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "rows.jsonl")


def rows_of(batch: dict, processor) -> list[str]:
    """What the documents of a batch are called."""
    names = []
    for ids, documents in zip(batch["input_ids"], batch["seq_idx"]):
        for document in range(int(documents.max()) + 1):
            text = processor.decode(ids[documents == document].tolist())
            names.append(text.split("row ")[1].split("<")[0].strip() if "row " in text else text[:40])
    return names


# ------------------------------------------------------------------------------------------------- knapsack


def mixed_costs(count: int, row_tokens: int, seed: int) -> list[tuple[int, int]]:
    """Text, pictures, sound and clips in about the proportions of Table 3."""
    rng = np.random.default_rng(seed)
    costs = []
    for kind in rng.choice(4, count, p=(0.4, 0.3, 0.2, 0.1)):
        middle, spread, share = ((0.04, 1, 0), (0.09, 0.8, 3.2), (0.025, 0.8, 0.8), (0.5, 0.3, 3.6))[kind]
        tokens = int(min(row_tokens, max(8, row_tokens * rng.lognormal(np.log(middle), spread))))
        costs.append((tokens, int(tokens * share)))
    return costs


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_full_and_balanced_in_tokens_and_media(seed):
    costs = mixed_costs(150, 4096, seed)
    tokens = sum(cost for cost, _ in costs)
    rows, left = pack_rows(costs, 4096, tokens // 4096)
    assert sorted(sum(rows, []) + left) == list(range(150)) and len(rows) == tokens // 4096
    fill = np.array([sum(costs[item][0] for item in row) for row in rows])
    media = np.array([sum(costs[item][1] for item in row) for row in rows])
    assert fill.max() <= 4096 and fill.mean() / 4096 > 0.98 and fill.min() / 4096 > 0.9
    in_order, room = [0], 4096  # what packing in order of arrival would give
    for cost, load in costs:
        if cost > room:
            in_order, room = [*in_order, 0], 4096
        in_order[-1] += load
        room -= cost
    assert media.std() / media.mean() < 0.6 * np.std(in_order) / np.mean(in_order)


def test_caps_hold_and_nothing_is_lost():
    costs = mixed_costs(80, 1000, 9)
    costs = [(tokens, min(media, 2000)) for tokens, media in costs]
    rows, left = pack_rows(costs, 1000, media_tokens=2000)
    assert not left and sorted(sum(rows, [])) == list(range(80))
    assert all(sum(costs[i][0] for i in row) <= 1000 and sum(costs[i][1] for i in row) <= 2000 for row in rows)
    rows, left = pack_rows([(6, 0), (6, 0), (6, 0), (5, 0), (4, 0)], 10, 2)
    assert rows == [[0, 4], [1]] and left == [2, 3]


# ------------------------------------------------------------------------------------------------- packed = unpacked


def test_packed_rows_equal_single_rows_in_loss_and_every_gradient():
    """Text, picture, clip, sound and all of them in one document, through every kind of layer, in float32."""
    recipes = [
        [9],
        [3, ("image", 4, 6), 5],
        [4, ("video", 2, 4, 4), 6],
        [5, ("audio", [40, 24]), 4],
        [2, ("image", 4, 4), ("audio", [56]), 3, ("video", 1, 4, 4), 7],
        [14],
        [3, ("audio", [16]), 8],
    ]
    samples = [collate([make_sample(recipe, seed)]) for seed, recipe in enumerate(recipes)]
    packed = collate_packed(samples, 90)
    assert packed["input_ids"].shape[0] < len(samples) and (packed["seq_idx"].amax(1) > 0).any()
    model = tiny_model().train()
    model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.endswith(
            "dt_bias"
        ):  # steps of about 0.05, as trained models take them; float32 itself blurs steps of 1
            parameter.data.fill_(-3.0)
    names, parameters = zip(*model.named_parameters())
    loss = model(**packed, use_cache=False, skip_logits=True).loss
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    trained = int((packed["labels"] != -100).sum())
    assert trained == sum(int((sample["labels"][:, 1:] != -100).sum()) for sample in samples)
    single = sum(model(**s, use_cache=False, skip_logits=True, num_items_in_batch=trained).loss for s in samples)
    expected = torch.autograd.grad(single, parameters, allow_unused=True)
    torch.testing.assert_close(loss, single, atol=1e-5, rtol=1e-5)
    learnt = 0
    for name, ours, other in zip(names, grads, expected):
        ours, other = (torch.zeros(1) if grad is None else grad for grad in (ours, other))
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        learnt += bool(other.any())
    assert learnt > 0.9 * len(names)
    mixed = packed | {"seq_idx": torch.where(packed["seq_idx"] < 0, -1, 0)}  # the test would notice mixed documents
    assert abs((model(**mixed, use_cache=False, skip_logits=True).loss - loss).item()) > 1e-4


def test_media_follow_their_places():
    samples = [
        collate([make_sample(recipe, i)]) for i, recipe in enumerate([[3, ("image", 4, 4), 2], [2, ("image", 2, 4)]])
    ]
    batch = collate_rows([[samples[1], samples[0]]], 32)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4], [1, 4, 4]] and batch["input_ids"].shape == (1, 32)
    assert torch.equal(batch["pixel_values"][:8], samples[1]["pixel_values"])
    assert cost_of(samples[0]) == (11, 16) and cost_of(collate([make_sample([("audio", [40, 24])], 0)])) == (10, 8)


# ------------------------------------------------------------------------------------------------- the loader


def test_batches_have_one_shape_and_are_nearly_full(processor, tmp_path):
    """Every kind of media: nano tasks and sounds from files."""
    lines = []
    for i in range(12):
        soundfile.write(tmp_path / f"{i}.wav", np.sin(np.arange(8000 + 1000 * i) / (5 + i)) / 2, 16000)
        content = [{"type": "audio", "path": f"{i}.wav"}, {"type": "text", "text": "high or low?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "low" if i > 5 else "high"}]
        lines.append(json.dumps({"messages": messages}))
    (tmp_path / "sounds.jsonl").write_text("\n".join(lines))
    paths = ["nano:text_math", "nano:image_colour", "nano:video_direction", str(tmp_path / "sounds.jsonl")]
    blend = Blend([{"path": path} for path in paths], seed=1)
    packed = PackedRows(blend, processor, rows=2, row_tokens=512, patches_per_frame=[16, 36], max_frames=6)
    filled, kinds, costs, grids = [], Counter(), [], set()
    for batch, _ in zip(packed, range(6)):
        info = packed.consumed(batch.pop("info"))
        assert batch["input_ids"].shape == batch["seq_idx"].shape == (2, 512)
        assert info["packing"] == pytest.approx(float(batch["attention_mask"].float().mean()))
        assert info["trained"] == (batch["labels"] != -100).sum() > 0
        filled.append(info["packing"])
        kinds.update(info["tokens"])
        costs += info["media"]
        if "video_grid_thw" in batch:
            assert len(batch["pixel_values_videos"]) == batch["video_grid_thw"].prod(1).sum()
            grids.update(batch["video_grid_thw"][:, 1].tolist())
    assert np.mean(filled) > 0.95 and all(kinds.values()) and len(grids) > 1  # targets differ
    assert np.std(costs) / np.mean(costs) < 0.35
    assert json.loads(json.dumps(packed.state_dict()))["batches"] == 6


def test_bad_rows_are_named_counted_and_replaced(rows_file, processor, tmp_path):
    report = tmp_path / "bad.jsonl"
    blend = Blend([{"path": rows_file}])
    packed = PackedRows(blend, processor, 2, 400, bad_rows=report, max_bad_share=0.2)
    names = []
    for batch in packed:
        info = packed.consumed(batch["info"])
        names += rows_of(batch, processor)
        if info["read"] > 120:
            break
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    first_epoch = lines[:13]
    assert {line["row"] for line in first_epoch} == {56, *range(1, 121, 10)} and info["bad"] == len(lines)
    assert {line["file"] for line in lines} == {rows_file}
    assert all(
        "tokens; limit 400" in line["reason"] if line["row"] == 56 else "not JSON" in line["reason"] for line in lines
    )
    assert not {"0", "10", "55"} & set(names)
    strict = PackedRows(blend, processor, 2, 400, max_bad_share=0.01)
    with pytest.raises(OmniInputError, match=r"11 of the last \d+ rows cannot be used; limit 1.0%.*row \d+: "):
        for _ in zip(DataLoader(strict, batch_size=None, num_workers=1), range(100)):
            pass


@pytest.mark.parametrize("workers,stream", [(0, None), (2, None), (0, "jsonl"), (2, "jsonl"), (2, "parquet")])
def test_resuming_gives_the_same_batches(rows_file, processor, workers, stream):
    """Three batches, a state that went through JSON, three more: as six in one go, on each of two ranks."""
    if stream == "parquet":
        datasets = pytest.importorskip("datasets")
        with open(rows_file) as file:
            rows = [json.loads(line) for line in file if len(line) > 2]
        rows_file = rows_file.replace("jsonl", "parquet")
        datasets.Dataset.from_list(rows).to_parquet(rows_file)
    sources = [{"path": rows_file, "streaming": bool(stream), "weight": 2}, {"path": "nano:image_colour"}]
    ranks = []
    for rank in range(2):

        def loader(rank=rank):
            packed = PackedRows(
                Blend(sources), processor, 1, 600, rank, 2, patches_per_frame=[16, 36], window=1, max_bad_share=0.5
            )
            return packed, lambda: iter(DataLoader(packed, batch_size=None, num_workers=workers))

        packed, start = loader()
        whole = [batch for batch, _ in zip(start(), range(6))]
        packed, start = loader()
        for batch, _ in zip(start(), range(3)):
            packed.consumed(batch.pop("info"))
        state = json.loads(json.dumps(packed.state_dict()))
        packed, start = loader()
        packed.load_state_dict(state)
        for batch, expected in zip(start(), whole[3:]):
            ours, other = batch.pop("info"), expected.pop("info")
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in batch)
            if stream == "parquet":  # `datasets` writes one position in several ways
                ours, other = ({**info, "position": info["position"]["turn"]} for info in (ours, other))
            assert ours == other
        ranks.append([name for batch in whole for name in rows_of(batch, processor) if name.isdigit()])
        packed.load_state_dict(state | {"workers": 3})
        with pytest.raises(OmniInputError, match="saved with 3 reader"):
            next(iter(packed))
    assert not set(ranks[0]) & set(ranks[1]) and min(map(len, ranks)) > 10  # no row twice, over ranks and workers
    assert all(len(set(names)) == len(names) for names in ranks)


def test_resuming_reads_only_the_rows_that_wait(rows_file, processor, monkeypatch):
    packed = PackedRows(Blend([{"path": rows_file}]), processor, 2, 400, max_bad_share=0.5)
    for batch, _ in zip(packed, range(4)):
        packed.consumed(batch["info"])
    (position,) = packed.state_dict()["lanes"].values()
    encoded = []
    real = packing.encode_row
    monkeypatch.setattr(packing, "encode_row", lambda row, *a, **k: encoded.append(row) or real(row, *a, **k))
    resumed = PackedRows(Blend([{"path": rows_file}]), processor, 2, 400, max_bad_share=0.5)
    resumed.load_state_dict(packed.state_dict())
    next(iter(resumed))
    new = len(encoded) - len(position["waiting"])
    assert 0 < new < 20 and position["turn"] > 40


def test_resuming_passes_over_a_waiting_row_that_went_bad(rows_file, processor, tmp_path):
    blend = Blend([{"path": rows_file}])
    packed = PackedRows(blend, processor, 2, 400, max_bad_share=0.5)
    packed.consumed(next(iter(packed))["info"])
    state = packed.state_dict()
    (position,) = state["lanes"].values()
    number = blend.locate(position["waiting"][0][0])[1]
    with open(rows_file, "r+b") as file:
        file.seek(blend.sources[0].parts[0][1].starts[number])
        file.write(b"?")
    resumed = PackedRows(Blend([{"path": rows_file}]), processor, 2, 400, bad_rows=tmp_path / "b", max_bad_share=0.5)
    resumed.load_state_dict(state)
    info = next(iter(resumed))["info"]
    assert json.loads((tmp_path / "b").read_text().splitlines()[0])["row"] == number + 1
    assert info["bad"] > position["bad"] and info["samples"]


def test_a_source_that_breaks_late_is_noticed_soon(rows_file, processor, monkeypatch):
    monkeypatch.setattr(packing, "BAD_ROWS_BASE", 20)
    monkeypatch.setattr(packing, "BAD_ROWS_SPAN", 60)
    packed = PackedRows(Blend([{"path": rows_file, "weight": 1}]), processor, 1, 400, window=1, max_bad_share=0.3)
    packed.load_state_dict(packed.state_dict() | {"lanes": {0: {"turn": 0, "read": 10**6, "bad": 10}}})
    real, calls = packing.encode_row, []

    def breaks(*args, **options):
        calls.append(1)
        if len(calls) > 80:
            raise RuntimeError("the disk is gone")
        return real(*args, **options)

    monkeypatch.setattr(packing, "encode_row", breaks)
    with pytest.raises(OmniInputError, match="of the last .*RuntimeError: the disk is gone"):
        for _ in packed:
            pass
    assert len(calls) < 120


def test_long_text_can_be_cut(rows_file, processor):
    blend = Blend([{"path": rows_file}])
    packed = PackedRows(blend, processor, 2, 400, cut_long=True, max_bad_share=0.5)
    names, read = [], 0
    for batch in packed:
        read = packed.consumed(batch["info"])["read"]
        names += rows_of(batch, processor)
        if read > 140:
            break
    assert "55" in names
