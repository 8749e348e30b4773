"""The whole model: media in their places in any mix, EVS, generation, losses, memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_model import (
    AUDIO,
    IMAGE,
    IMAGE_ID,
    VIDEO,
    collate,
    make_sample,
    prompt_of,
    tiny_model,
)

from modeling_omni.evs import evs_keep_indices, reserve_kept_tokens
from modeling_omni.feature_extraction_omni import num_audio_tokens
from modeling_omni.media import OmniInputError, VideoClip
from modeling_omni.modeling_audio import plan_passes
from modeling_omni.modeling_omni import (
    OmniForConditionalGeneration,
    chunked_cross_entropy,
)
from modeling_omni.processing_omni import OmniProcessor

ROWS = [
    [5, ("image", 2, 4), 3, ("image", 4, 4), 2],
    [3, ("video", 1, 2, 4), 2, ("image", 2, 2), 4, ("video", 3, 4, 2), 3],
    [2, ("audio", [57, 100, 33]), 3],
    [6],
    [1, ("video", 2, 2, 2), ("audio", [40]), ("image", 6, 2), 2, ("audio", [100, 17]), 5],
]
VIDEO_ROWS = [
    [3, ("video", 6, 2, 6), 2, ("image", 2, 2), 3],
    [2, ("video", 3, 4, 2), 4, ("audio", [57]), ("video", 5, 2, 2), 6],
    [7],
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def make_batch(rows=ROWS, left=True, prune=0.0):
    return collate([make_sample(row, i, prune) for i, row in enumerate(rows)], left)


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def greedy_of(model, tokens, batch):
    """Argmax at every generated place from one pass without a cache over prompt and answer."""
    prompt = prompt_of(batch)
    new = tokens.shape[1] - prompt["input_ids"].shape[1]
    mask = F.pad(prompt["attention_mask"], (0, new), value=1)
    inputs = prompt | {"input_ids": tokens, "attention_mask": mask}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return logits[:, -new - 1 : -1].argmax(-1), logits[:, -new - 1 : -1]


# --- fusion


@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_batch_equals_rows(model, left):
    batch = make_batch(left=left)
    logits = model(**batch).logits
    assert logits.dtype == torch.float32
    for i, row in enumerate(ROWS):
        alone = collate([make_sample(row, i)])
        close(logits[i][batch["attention_mask"][i].bool()], model(**alone).logits[0])


@torch.no_grad()
def test_every_feature_lands_in_its_place(model):
    batch = make_batch()
    prompt = prompt_of(batch)
    mask = prompt.pop("attention_mask")
    embeds = model.model.embed_multimodal(**prompt)
    types = batch["mm_token_type_ids"]
    inner = model.model
    images = inner.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    videos = inner.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"])
    clips = [clip for i, row in enumerate(ROWS) for audio in make_sample(row, i)["audios"] for clip in audio]
    audio = [inner.get_audio_features(c[None], torch.ones(1, len(c), dtype=torch.bool))[0] for c in clips]
    close(embeds[types == IMAGE], images, 1e-6)
    close(embeds[types == VIDEO], videos, 1e-6)
    close(embeds[types == AUDIO], torch.cat(audio), 1e-5)
    text = (types == 0) & mask.bool()
    assert torch.equal(embeds[text], inner.get_input_embeddings()(batch["input_ids"][text]))


@torch.no_grad()
def test_an_item_changes_only_what_comes_after_it(model):
    batch = make_batch()
    before = model(**batch).logits
    types = batch["mm_token_type_ids"]
    # second image of row 0, last video of row 1, second audio item of row 4
    grids = batch["image_grid_thw"].prod(-1).tolist()
    changed = {name: value.clone() for name, value in batch.items()}
    changed["pixel_values"][grids[0] : grids[0] + grids[1]] += 1
    video = int(batch["video_grid_thw"][0].prod())
    changed["pixel_values_videos"][video : video + 24] += 1
    changed["input_features"][-1, :17] += 1  # the last clip
    after = model(**changed).logits
    starts = [
        (types[0] == IMAGE).nonzero()[2].item(),
        (types[1] == VIDEO).nonzero()[2].item(),
        None,
        None,
        (types[4] == AUDIO).nonzero()[-3].item(),  # the last clip of 17 frames has 3 tokens
    ]
    for row, start in enumerate(starts):
        close(after[row, :start], before[row, :start], 1e-5)
        if start is not None:
            assert ((after[row, start:] - before[row, start:]).abs().amax(-1) > 1e-3).all(), row


@torch.no_grad()
def test_moving_the_media_changes_the_loss(model):
    same_size = [[3, ("image", 2, 4), 2, ("image", 2, 4), 6], [2, ("audio", [57]), 2, ("audio", [57]), 6]]
    batch = make_batch(same_size)
    loss = model(**batch).loss
    pixels = batch["pixel_values"]
    swapped = model(**batch | {"pixel_values": torch.cat([pixels[8:], pixels[:8]])}).loss
    flipped = model(**batch | {"input_features": batch["input_features"].flip(0)}).loss
    assert (swapped - loss).abs() > 1e-3 and (flipped - loss).abs() > 1e-3


@torch.no_grad()
def test_types_are_found_by_id_when_there_is_no_doubt(model):
    for row in ([3, ("image", 2, 4), 4], [3, ("video", 2, 2, 4), 4], [2, ("image", 2, 2), ("audio", [57]), 3]):
        batch = make_batch([row])
        without = {name: value for name, value in batch.items() if name != "mm_token_type_ids"}
        assert torch.equal(model(**without).logits, model(**batch).logits)


def edit_prompt(batch, row, start, remove=0, insert=(), kind=0):
    """Replaces tokens of one row of an unpadded batch of one."""
    edited = dict(batch)
    for name, values in (("input_ids", list(insert)), ("mm_token_type_ids", [kind] * len(insert))):
        old = batch[name][row]
        edited[name] = torch.cat([old[:start], torch.tensor(values, dtype=torch.long), old[start + remove :]])[None]
    edited["attention_mask"] = torch.ones_like(edited["input_ids"])
    del edited["labels"]
    return edited


def test_counts_that_do_not_fit_name_the_item(model):
    batch = make_batch([[2, ("image", 2, 4), 2, ("image", 4, 4), 2, ("audio", [57]), 3, ("video", 2, 2, 4), 2]])
    types = batch["mm_token_type_ids"][0]
    images, audio = (types == IMAGE).nonzero().flatten(), (types == AUDIO).nonzero().flatten()

    def refused(message, inputs):
        with pytest.raises(OmniInputError, match=message), torch.no_grad():
            model(**inputs)

    few = edit_prompt(batch, 0, int(images[3]), remove=1)
    refused("image 2 of 2: its features need 4 placeholder tokens, the prompt has 3", few)
    many = edit_prompt(batch, 0, int(images[3]), insert=[IMAGE_ID], kind=IMAGE)
    refused("image 2 of 2: its features need 4 placeholder tokens, the prompt has 5", many)
    another = edit_prompt(batch, 0, len(types), insert=[19, IMAGE_ID, IMAGE_ID, 20], kind=IMAGE)
    another["mm_token_type_ids"][0, -4:] = torch.tensor([0, 1, 1, 0])
    refused(r"8 image placeholder tokens but the 2 image item\(s\) given need 6", another)
    # cut inside an item, at either end of the prompt
    head = edit_prompt(batch, 0, 0, remove=int(images[0]) + 1)
    refused("image 1 of 2: its features need 2 placeholder tokens, the prompt has 1", head)
    tail = edit_prompt(batch, 0, int(audio[-1]), remove=len(types))
    del tail["pixel_values_videos"], tail["video_grid_thw"]
    refused("audio 1 of 1: its features need 8 placeholder tokens, the prompt has 7", tail)
    first_tubelet = int((types == VIDEO).nonzero()[2])
    tail = edit_prompt(batch, 0, first_tubelet, remove=len(types))
    refused("video 1 of 1: its features need 4 placeholder tokens, the prompt has 2", tail)
    # media on one side only
    for name in ("pixel_values", "pixel_values_videos", "input_features"):
        kind = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio"}[name]
        refused(f"{kind} placeholder tokens but no {kind} was given", {k: v for k, v in batch.items() if k != name})
    text = {"input_ids": torch.full((1, 9), 50)}
    pixels = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    refused("image 1 of 2: its features need 2 placeholder tokens, the prompt has 0", text | pixels)
    refused("mm_token_type_ids", {k: v for k, v in batch.items() if k != "mm_token_type_ids"})
    with pytest.raises(OmniInputError, match="image 2 of 2"):
        model.generate(**few, max_new_tokens=2)


# --- EVS


def kept_by_definition(tokens, keep):
    """EVS in float64 numpy, sorted by hand: most unlike first, the earlier of equals first."""
    tokens = tokens.double().numpy()
    flat = []
    for t in range(tokens.shape[0]):
        for p in range(tokens.shape[1]):
            if t == 0:
                flat.append(255.0)
            else:
                a, b = tokens[t, p], tokens[t - 1, p]
                flat.append(1 - float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)))
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    return sorted(order[:keep])


@pytest.mark.parametrize("shape", [(1, 6, 8), (4, 6, 8), (7, 15, 5), (9, 1, 16)])
def test_evs_keeps_what_the_definition_keeps(shape):
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    size = shape[0] * shape[1]
    for keep in sorted({shape[1], shape[1] + 1, size // 2, size - 1, size} & set(range(shape[1], size + 1))):
        assert evs_keep_indices(tokens, keep).tolist() == kept_by_definition(tokens, keep)
    for keep in (shape[1] - 1, size + 1):
        with pytest.raises(OmniInputError, match=f"keep {shape[1]} to {size} tokens of this video, not {keep}"):
            evs_keep_indices(tokens, keep)


def test_evs_keeps_the_earlier_of_equals():
    """One-hot tokens: every dissimilarity is exactly 0 or 1, so nearly all are ties."""
    hot = torch.randint(0, 3, (6, 10), generator=torch.Generator().manual_seed(0))
    tokens = F.one_hot(hot, 4).float()
    for keep in range(10, 61):
        assert evs_keep_indices(tokens, keep).tolist() == kept_by_definition(tokens, keep)


def hand_built(model, rows, prune):
    """The same prompts with each video's kept tokens written into their own tubelets: embeddings, mask, labels."""
    inner = model.model
    samples = []
    for i, row in enumerate(rows):
        sample = make_sample(row, i)
        ids, types, features = list(sample["ids"]), list(sample["types"]), []
        keeps = list(make_sample(row, i, prune)["keep"])
        place = 0
        for (pixels, grid), keep in zip(sample["videos"], keeps):
            tokens = inner.get_video_features(pixels, torch.tensor([grid])).unflatten(0, (grid[0], -1))
            kept = kept_by_definition(tokens, keep)
            features.append(tokens.flatten(0, 1)[kept])
            place = types.index(VIDEO, place)
            for tubelet in range(grid[0]):
                place = types.index(VIDEO, place)
                count = sum(k // tokens.shape[1] == tubelet for k in kept)
                drop = tokens.shape[1] - count
                del ids[place : place + drop], types[place : place + drop]
                place += count
        samples.append(sample | {"ids": ids, "types": types, "features": features})
    batch = collate([s | {"videos": [], "keep": []} for s in samples])
    embeds = inner.get_input_embeddings()(batch["input_ids"])
    embeds[batch["mm_token_type_ids"] == VIDEO] = torch.cat([f for s in samples for f in s["features"]])
    for kind, features in (
        (IMAGE, inner.get_image_features(batch["pixel_values"], batch["image_grid_thw"])),
        (AUDIO, inner.get_audio_features(batch["input_features"], batch["input_features_mask"])[0]),
    ):
        embeds[batch["mm_token_type_ids"] == kind] = features
    return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}, batch


@pytest.mark.parametrize("prune", [0.25, 0.5, 0.7])
@torch.no_grad()
def test_evs_tokens_move_to_their_tubelets(model, prune):
    batch = make_batch(VIDEO_ROWS, prune=prune)
    expected_inputs, expected_batch = hand_built(model, VIDEO_ROWS, prune)
    assert batch["input_ids"].shape == expected_batch["input_ids"].shape  # EVS never changes the length
    assert not torch.equal(batch["input_ids"], expected_batch["input_ids"])
    output, expected = model(**batch), model(**expected_inputs)
    valid = batch["attention_mask"].bool()
    close(output.logits[valid], expected.logits[valid])
    for row, labels in zip(VIDEO_ROWS, batch["labels"]):  # after the last item, labels are where they were
        assert torch.equal(labels[-row[-1] :], expected_batch["labels"][VIDEO_ROWS.index(row)][-row[-1] :])
    tail = -min(row[-1] for row in VIDEO_ROWS)
    labels = torch.full_like(batch["labels"], -100)
    labels[:, tail:] = batch["labels"][:, tail:]
    close(model(**batch | {"labels": labels}).loss, model(**expected_inputs | {"labels": labels}).loss)


@torch.no_grad()
def test_evs_that_drops_nothing_changes_nothing(model):
    plain = make_batch(VIDEO_ROWS)
    everything = make_batch(VIDEO_ROWS, prune=1e-9)
    everything["video_keep_tokens"] = plain["video_grid_thw"].prod(-1) // 4
    # K = int(n (1 - q)) is n - 1 for the tiniest q: give each video its last place back
    samples = []
    for i, row in enumerate(VIDEO_ROWS):
        sample = make_sample(row, i, prune=1e-9)
        for grid in [g for _, g in sample["videos"]][::-1]:
            last = max(j for j in range(len(sample["types"])) if sample["types"][j] == VIDEO)
            if len(sample["videos"]) > 1 and grid == sample["videos"][0][1]:
                last = next(j for j in range(len(sample["types"])) if sample["types"][j : j + 2] == [VIDEO, 0])
            sample["ids"].insert(last, IMAGE_ID)
            sample["types"].insert(last, VIDEO)
        sample["keep"] = [t * h * w // 4 for _, (t, h, w) in sample["videos"]]
        samples.append(sample)
    everything = collate(samples)
    valid = plain["attention_mask"].bool()
    assert not torch.equal(plain["input_ids"], everything["input_ids"])
    close(model(**everything).logits[valid], model(**plain).logits[valid])


def test_evs_on_a_prompt_laid_out_without_it_raises(model):
    plain = make_batch(VIDEO_ROWS)
    counts = plain["video_grid_thw"].prod(-1) // 4
    with pytest.raises(OmniInputError, match="one run of placeholders"):
        model(**plain, video_keep_tokens=counts)
    batch = make_batch([[3, ("video", 4, 2, 6), 2]], prune=0.5)
    cut = int((batch["mm_token_type_ids"][0] == VIDEO).nonzero()[-1]) + 2  # the text of tubelets 2 to 4 is cut away
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    short = prompt_of(batch) | {name: batch[name][:, :cut] for name in per_token}
    with pytest.raises(OmniInputError, match="4 tubelets with EVS needs 3 empty <img></img>.*has 0"):
        model(**short)


# --- generate


@pytest.mark.parametrize("rows, prune", [(ROWS, 0), (VIDEO_ROWS, 0.5)], ids=["mix", "evs"])
def test_greedy_equals_a_loop_without_cache(model, rows, prune):
    batch = make_batch(rows, prune=prune)
    tokens = model.generate(**prompt_of(batch), max_new_tokens=8, do_sample=False)
    size = batch["input_ids"].shape[1]
    assert torch.equal(tokens[:, :size], batch["input_ids"]) and tokens.shape[1] == size + 8
    assert torch.equal(tokens[:, size:], greedy_of(model, tokens, batch)[0])
    assert len(set(tokens[:, size:].flatten().tolist())) > 8  # not one token over and over
    again = model.generate(**prompt_of(batch), max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(again, tokens)
    by_position = model.generate(batch["input_ids"], max_new_tokens=8, do_sample=False, **{
        name: value for name, value in prompt_of(batch).items() if name != "input_ids"
    })  # fmt: skip
    assert torch.equal(by_position, tokens)


def test_decode_logits_equal_one_pass(model):
    batch = make_batch()
    output = model.generate(
        **prompt_of(batch), max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    close(torch.stack(output.logits, 1), greedy_of(model, output.sequences, batch)[1])


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
def test_chunked_prefill_equals_one_pass(model, chunk):
    batch = make_batch()
    expected = model.generate(**prompt_of(batch), max_new_tokens=6, do_sample=False)
    actual = model.generate(**prompt_of(batch), max_new_tokens=6, do_sample=False, prefill_chunk_size=chunk)
    assert torch.equal(actual, expected)
    with torch.no_grad():
        logits = model(**prompt_of(batch)).logits
        pieces = model(**prompt_of(batch), prefill_chunk_size=chunk, use_cache=True).logits
        last = model(**prompt_of(batch), prefill_chunk_size=chunk, use_cache=True, logits_to_keep=4).logits
        hidden = model.model(**prompt_of(batch), prefill_chunk_size=chunk, use_cache=True, hidden_to_keep=4)
    valid = batch["attention_mask"].bool()
    close(pieces[valid], logits[valid])
    close(last[valid[:, -4:]], logits[:, -4:][valid[:, -4:]])
    assert hidden.last_hidden_state.shape[1] < 4 + chunk  # what nobody reads is not kept


def test_chunked_prefill_needs_a_cache(model):
    with pytest.raises(ValueError, match="prefill_chunk_size needs use_cache=True"):
        model(**prompt_of(make_batch()), prefill_chunk_size=4, use_cache=False)


def test_sampling_and_return_sequences(model):
    batch = make_batch()
    size = batch["input_ids"].shape[1]
    greedy = model.generate(**prompt_of(batch), max_new_tokens=5, do_sample=False)
    top1 = model.generate(**prompt_of(batch), max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(top1, greedy.repeat_interleave(3, 0))
    torch.manual_seed(0)
    sampled = model.generate(**prompt_of(batch), max_new_tokens=5, do_sample=True, top_k=0, num_return_sequences=3)
    assert sampled.shape == (15, size + 5)
    assert torch.equal(sampled[:, :size], batch["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row) for row in sampled[:, size:].tolist()}) > 5
    torch.manual_seed(0)
    again = model.generate(**prompt_of(batch), max_new_tokens=5, do_sample=True, top_k=0, num_return_sequences=3)
    assert torch.equal(again, sampled)


def test_beams_carry_their_own_states(model):
    """The score of every beam equals the log-probability of its tokens in one pass without a cache."""
    batch = make_batch()
    output = model.generate(
        **prompt_of(batch), max_new_tokens=5, do_sample=False, num_beams=3, num_return_sequences=2, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    size = batch["input_ids"].shape[1]
    for beam in range(2):
        tokens = output.sequences[beam::2]
        logits = greedy_of(model, tokens, batch)[1].log_softmax(-1)
        scores = logits.gather(-1, tokens[:, size:, None]).sum((1, 2))
        close(output.sequences_scores[beam::2], scores, 1e-3)
    greedy = model.generate(**prompt_of(batch), max_new_tokens=5, do_sample=False)
    logits = greedy_of(model, greedy, batch)[1].log_softmax(-1)
    assert (output.sequences_scores[::2] >= logits.max(-1).values.sum(1) - 1e-3).sum() >= 4


def test_assisted_decoding_is_refused_clearly(model):
    batch = make_batch([[6]])
    for option in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(**prompt_of(batch), max_new_tokens=4, **option)


@pytest.mark.parametrize("pattern", ["ME*M-", "M*M*"])  # generate prepares the masks itself for the second one
def test_static_cache(pattern):
    model = tiny_model(pattern=pattern)
    batch = make_batch()
    expected = model.generate(**prompt_of(batch), max_new_tokens=6, do_sample=False)
    static = model.generate(**prompt_of(batch), max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)


def test_static_cache_filled_in_pieces(model):
    batch = make_batch()  # the shortest row is padded by more than one piece
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**prompt_of(batch), **options)
    assert torch.equal(model.generate(**prompt_of(batch), **options, prefill_chunk_size=5), expected)


# --- start values


def test_each_part_starts_from_its_own_values(tmp_path):
    config = tiny_model().config
    config.llm_config.initializer_range, config.vision_config.initializer_range = 0.05, 0.01
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(config)

    def check(model):
        inner = model.model
        assert 0.045 < inner.language_model.layers[2].mixer.q_proj.weight.std() < 0.055
        assert 0.045 < inner.vision_projector.linear1.weight.std() < 0.055
        assert 0.008 < inner.vision_tower.blocks[1].attn.qkv.weight.std() < 0.010  # normal, cut at two deviations
        block = inner.audio_tower.layers[1]
        assert 0.8 < block.feed_forward1.linear1.weight.std() * 32**0.5 < 1.2  # fan-in scaling
        assert inner.audio_tower.feature_extractor.featurizer.fb.std() > 0
        assert all(t.isfinite().all() for t in model.state_dict().values())

    check(model)
    # what a file lacks gets start values, what it has is kept
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith(("sound_encoder", "vision_model"))}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    again, info = OmniForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[1] for name in info["missing_keys"]} == {"audio_tower", "vision_tower"}
    check(again)
    for name, tensor in again.state_dict().items():
        if "_tower." not in name:
            assert torch.equal(tensor, model.state_dict()[name]), name


# --- training


def gradients(model, batch, **kwargs):
    model.zero_grad()
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = tiny_model().train()
    batch = make_batch()
    loss, expected = gradients(model, batch)
    assert set(expected) == {name for name, p in model.named_parameters()}  # all towers, both embedders, all experts
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    if reentrant:
        model.enable_input_require_grads()
    again, actual = gradients(model, batch)
    close(again, loss, 1e-6)
    assert set(actual) == set(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)
    assert model(**batch, use_cache=True).past_key_values is None  # a layer that runs again would fill the cache twice


@torch.no_grad()
def test_eager_equals_sdpa():
    eager, sdpa = tiny_model(attn_implementation="eager"), tiny_model(attn_implementation="sdpa")
    for model, name in ((eager, "eager"), (sdpa, "sdpa")):
        parts = (model.config.llm_config, model.config.vision_config, model.config.sound_config)
        assert {part._attn_implementation for part in parts} == {name}
    batch = make_batch()
    valid = batch["attention_mask"].bool()
    expected = sdpa(**batch).logits[valid]
    close(eager(**batch).logits[valid], expected)
    sdpa.set_attn_implementation("eager")
    assert sdpa.model.language_model.config._attn_implementation == "eager"
    assert sdpa.model.vision_tower.config._attn_implementation == "eager"
    close(sdpa(**batch).logits[valid], expected)


@pytest.mark.parametrize("chunk", [4, 1000])
@pytest.mark.parametrize("num_items", [None, 37, torch.tensor(5)])
def test_chunked_cross_entropy_is_cross_entropy(chunk, num_items):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30, bias=False)
    hidden = torch.randn(3, 11, 8, requires_grad=True)
    labels = torch.randint(0, 30, (3, 11))
    labels[torch.rand(3, 11) < 0.4] = -100
    logits = head(hidden)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    expected = expected / ((labels[:, 1:] != -100).sum() if num_items is None else num_items)
    wanted = torch.autograd.grad(expected, (hidden, head.weight))
    actual = chunked_cross_entropy(hidden, head, labels, num_items, chunk)
    close(actual, expected, 1e-5)
    for ours, theirs in zip(torch.autograd.grad(actual, (hidden, head.weight)), wanted):
        close(ours, theirs, 1e-5)
    nothing = chunked_cross_entropy(hidden, head, torch.full_like(labels, -100))
    nothing.backward()  # a batch without a trained token still reaches every parameter
    assert nothing == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_loss_of_the_model(model):
    batch = make_batch()
    output = model(**batch)
    logits, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    close(output.loss, F.cross_entropy(logits, labels), 1e-5)
    total = F.cross_entropy(logits, labels, reduction="sum")
    close(model(**batch, num_items_in_batch=torch.tensor(100)).loss, total / 100, 1e-5)


def test_logits_are_formed_only_when_asked(model, monkeypatch):
    batch = make_batch()
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    try:
        with torch.no_grad():
            output = model(**batch, skip_logits=True)
            trained = int((batch["labels"][:, 1:] != -100).sum())
            assert output.logits is None and sizes == [trained]
            close(output.loss, model(**batch).loss, 1e-6)
            last = model(**prompt_of(batch), logits_to_keep=2)
            close(last.logits, model(**batch).logits[:, -2:], 1e-6)
            some = torch.tensor([0, 5])
            close(model(**prompt_of(batch), logits_to_keep=some).logits, model(**batch).logits[:, some], 1e-6)
    finally:
        hook.remove()


@torch.no_grad()
def test_tuples_and_hidden_states(model):
    batch = make_batch()
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == 1 + model.config.llm_config.num_hidden_layers
    close(model.lm_head(output.hidden_states[-1]), output.logits, 1e-6)
    loss, logits = model(**batch, return_dict=False)[:2]
    close(loss, output.loss, 1e-6)
    close(logits, output.logits, 1e-6)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@torch.no_grad()
def test_bfloat16_stays_near_float32():
    batch = make_batch()
    valid = batch["attention_mask"].bool()
    model = tiny_model()
    expected = model(**batch).logits[valid]
    output = model.to(torch.bfloat16)(**batch)
    assert output.logits.dtype == torch.float32 and output.logits.isfinite().all()
    similarity = F.cosine_similarity(output.logits[valid], expected, dim=-1)
    # a token near a tie of the router takes another expert in bfloat16; most must be close
    assert similarity.median() > 0.999 and similarity.mean() > 0.98, similarity


# --- long input


def test_five_hours_of_audio_are_counted_and_planned_in_bounded_passes():
    assert num_audio_tokens(5 * 3600 * 16000) == 600 * 375
    passes = plan_passes([3000] * 600)
    assert sum(map(len, passes)) == 600 and max(len(group) * 3000 for group in passes) <= 48000


def test_memory_of_the_encoders_grows_linearly():
    """Peak memory over the inputs' own, for 1x and 4x frames and clips, in a fresh process (a quadratic term: 16x)."""
    code = """
import ctypes, sys, torch
sys.path.insert(0, TESTS)
from tiny_model import MELS, PATCH_DIM, tiny_model

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))

def peak(run):
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier runs left
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = memory("VmRSS")
    run()
    return memory("VmHWM") - before

torch.set_num_threads(1)
model = tiny_model().model
model.vision_tower.max_patches_per_pass = 4096
model.audio_tower.max_frames_per_pass = 4000
with torch.no_grad():
    for name, few in (("video", 32), ("audio", 12)):
        sizes = []
        for number in (few, few, 4 * few):  # the first run warms up
            if name == "video":
                args = torch.zeros(number * 256, 2 * PATCH_DIM), torch.tensor([[number, 16, 16]])
                sizes.append(peak(lambda: model.get_video_features(*args)))
            else:
                args = torch.zeros(number, 1000, MELS), torch.ones(number, 1000, dtype=torch.bool)
                sizes.append(peak(lambda: model.get_audio_features(*args)))
        print(name, *sizes[1:])
"""
    code = code.replace("TESTS", repr(str(Path(__file__).parent)))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300
    )
    assert result.returncode == 0, result.stderr
    sizes = [line.split() for line in result.stdout.splitlines()]
    assert [name for name, *_ in sizes] == ["video", "audio"]
    for name, once, four_times in sizes:
        assert int(four_times) < 5 * max(int(once), 4096), (name, once, four_times)


def test_a_shortened_prompt_is_the_one_the_processor_makes():
    """`generate(video_pruning_rate=...)` on a full prompt = the processor's own EVS layout, in batches, with labels."""
    processor = OmniProcessor.from_pretrained("nano")
    rng = np.random.default_rng(0)

    def clip(frames, height, width, seconds=0.0):
        sound = rng.uniform(-0.1, 0.1, int(16000 * seconds)).astype(np.float32) if seconds else None
        pixels = rng.integers(0, 255, (frames, height, width, 3), np.uint8)
        return {"type": "video", "video": VideoClip(pixels, list(range(frames)), 4.0, frames / 4, sound)}

    picture = {"type": "image", "image": np.zeros((96, 96, 3), np.uint8)}
    rows = [[clip(8, 64, 96, 2.0), picture, clip(5, 96, 64)], [{"type": "text", "text": "none"}], [clip(2, 64, 64)]]
    conversations = [
        [{"role": "user", "content": row}, {"role": "assistant", "content": "a square moves"}] for row in rows
    ]
    options = {"tokenize": True, "return_labels": True, "return_tensors": "pt"}
    full = processor.apply_chat_template(conversations, **options)
    expected = processor.apply_chat_template(conversations, video_pruning_rate=0.6, **options)
    shortened = reserve_kept_tokens(dict(full), 0.6, 2)
    assert shortened.keys() == expected.keys() and full["input_ids"].shape[1] > expected["input_ids"].shape[1]
    for name, value in expected.items():
        assert torch.equal(shortened[name], value), name
