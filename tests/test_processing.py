"""Processors: golden token counts, pixels against transformers' native classes, placeholders, files, budgets."""

import base64
import json
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_tokenizer import SPECIALS, build_tokenizer
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoVideoProcessor,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
)
from transformers.models.nemotron_h_omni.image_processing_nemotron_h_omni import (
    NemotronH_Omni_Reasoning_V3ImageProcessor as NativeImageProcessor,
)
from transformers.models.nemotron_h_omni.image_processing_nemotron_h_omni import get_patch_grid_size
from transformers.models.nemotron_h_omni.processing_nemotron_h_omni import (
    NemotronH_Omni_Reasoning_V3Processor as NativeProcessor,
)
from transformers.models.nemotron_h_omni.video_processing_nemotron_h_omni import (
    NemotronH_Omni_Reasoning_V3VideoProcessor as NativeVideoProcessor,
)
from transformers.video_utils import VideoMetadata

from modeling_omni.configuration_omni import MODEL_TYPE, OmniConfig
from modeling_omni.data import cost_of, encode_row
from modeling_omni.evs import kept_tokens
from modeling_omni.fuzzing import check_inputs
from modeling_omni.image_processing_omni import OmniImageProcessor, fit_media_budget, image_grid, resize_frames
from modeling_omni.media import OmniInputError, VideoClip
from modeling_omni.packing import collate_rows, pack_rows
from modeling_omni.processing_omni import OmniProcessor, register_auto_processors
from modeling_omni.video_processing_omni import (
    OmniVideoProcessor,
    frame_labels,
    tubelet_audio_counts,
    video_grid,
)

TOKENIZER = build_tokenizer()
RELEASED = OmniProcessor(tokenizer=TOKENIZER)
SMALL = OmniProcessor(  # as the released one, with small pictures
    OmniImageProcessor(min_num_patches=16, max_num_patches=256),
    OmniVideoProcessor(video_target_num_patches=64),
    tokenizer=TOKENIZER,
)
INTERLEAVED = OmniProcessor(
    SMALL.image_processor, SMALL.video_processor, tokenizer=TOKENIZER, audio_in_video="interleave"
)
IMAGE, AUDIO = SPECIALS.index("<image>"), SPECIALS.index("<so_embedding>")
NORM = {"norm_mean": [0.48145466, 0.4578275, 0.40821073], "norm_std": [0.26862954, 0.26130258, 0.27577711]}
RNG = np.random.default_rng(0)


def picture(height=64, width=64):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def frames(count, height=64, width=64):
    return RNG.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def sound(seconds=1.0):
    return RNG.uniform(-0.5, 0.5, int(seconds * 16000)).astype(np.float32)


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def image_part(*size):
    return {"type": "image", "image": picture(*size)}


def video_part(count, fps=None, audio=None, size=(64, 64)):
    clip = VideoClip(frames(count, *size), None if fps is None else list(range(count)), fps, None, audio)
    return {"type": "video", "video": clip}


def audio_part(seconds=1.0):
    return {"type": "audio", "array": sound(seconds), "sampling_rate": 16000}


def media_runs(types):
    """Runs of placeholders: [kind, length] each."""
    runs = []
    for kind, before in zip(types[1:], types[:-1], strict=True):
        if kind and kind != before:
            runs.append([kind, 0])
        if kind:
            runs[-1][1] += 1
    return runs


def encode(messages, processor=SMALL, **options):
    return processor.apply_chat_template(messages, tokenize=True, return_tensors="pt", **options)


# ------------------------------------------------------------------------------------------------- golden numbers

IMAGE_GRIDS = {
    (224, 224): (32, 32),
    (480, 640): (30, 40),
    (500, 1000): (32, 64),
    (1024, 1024): (64, 64),
    (1080, 1920): (68, 120),
    (4096, 4096): (114, 116),
}


@pytest.mark.parametrize(("size", "grid"), IMAGE_GRIDS.items())
def test_image_grids(size, grid):
    assert image_grid(*size) == grid
    assert RELEASED.image_processor.num_tokens(*size) == grid[0] * grid[1] // 4


@pytest.mark.parametrize(("size", "grid"), [((720, 1280), (24, 42)), ((480, 640), (28, 36)), ((512, 512), (32, 32))])
def test_video_grids(size, grid):
    assert video_grid(*size) == grid
    assert video_grid(*size[::-1]) == grid[::-1]
    assert video_grid(*size, maintain_aspect_ratio=False) == (32, 32)


def test_long_video_and_evs_counts():
    assert RELEASED.video_processor.num_tokens(256, 512, 512) == 32768
    assert RELEASED.video_processor.num_tokens(256, 512, 512, pruning_rate=0.5) == 16384
    assert kept_tokens(3, 252, 0.7) == 252
    assert kept_tokens(10, 252, 0.7) == int(2520 * (1 - 0.7))


@pytest.mark.parametrize(("seconds", "tokens"), [(1, 13), (5, 63), (35, 438)])
def test_audio_counts(seconds, tokens):
    output = encode(user(audio_part(seconds)))
    assert (output["input_ids"] == AUDIO).sum() == tokens == (output["mm_token_type_ids"] == 3).sum()
    assert SMALL.count_tokens(user(audio_part(seconds)))["audio"] == tokens
    assert output["audio_clip_counts"].tolist() == [-(-seconds // 30)]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 20000), st.integers(1, 20000), st.integers(16, 13312), st.integers(4, 1024)
)  # fmt: skip
def test_image_grid_properties(height, width, budget, floor):
    h, w = image_grid(height, width, budget, floor)
    assert h >= 2 and w >= 2 and h % 2 == 0 and w % 2 == 0 and h * w <= budget


@settings(max_examples=100, deadline=None)
@given(st.integers(8, 6000), st.floats(1 / 60, 60))
def test_image_grid_equals_native(height, aspect):
    width = max(8, round(height * aspect))
    native = get_patch_grid_size(height, width, 16, 2, 1024, 13312)
    assert image_grid(height, width) == native


@settings(max_examples=100, deadline=None)
@given(st.integers(8, 4000), st.integers(8, 4000), st.sampled_from([256, 512, 768, 1024]))
def test_video_grid_equals_native(height, width, target):
    native = NativeVideoProcessor(video_target_num_patches=target)._compute_target_patches(height, width)
    h, w = video_grid(height, width, target)
    assert (w, h) == native or h * w < native[0] * native[1]  # the native one may leave the target behind


# ------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [(224, 224), (48, 64), (300, 201), (480, 640), (512, 512), (333, 1200)])
def test_image_pixels_equal_native(size):
    image = picture(*size)
    ours = RELEASED.image_processor(image)
    native = NativeImageProcessor(**NORM)(Image.fromarray(image), return_tensors="pt")
    assert ours["image_grid_thw"].tolist() == [[1, *native["image_grid_hw"][0].tolist()]]
    torch.testing.assert_close(ours["pixel_values"], native["pixel_values"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(72, 128), (512, 512), (90, 51)])
def test_video_pixels_equal_native(size):
    video = frames(4, *size)
    ours = RELEASED.video_processor(video)
    native = NativeVideoProcessor(**NORM)(
        [torch.from_numpy(video).permute(0, 3, 1, 2)], do_sample_frames=False, return_tensors="pt"
    )["pixel_values_videos"]
    t, h, w = ours["video_grid_thw"][0].tolist()
    ours_TCHW = ours["pixel_values_videos"].view(t, h, w, 2, 3, 16, 16).permute(0, 3, 4, 1, 5, 2, 6)
    torch.testing.assert_close(ours_TCHW.reshape(2 * t, 3, 16 * h, 16 * w), native, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("size", "target"), [((720, 1280), (384, 672)), ((301, 499), (32, 80)), ((40, 5000), (16, 640))]
)
def test_frames_that_shrink_much(size, target):
    video = torch.from_numpy(frames(3, *size))
    expected = F.interpolate(video.permute(0, 3, 1, 2).float(), target, mode="bicubic", antialias=True)
    torch.testing.assert_close(resize_frames(video, *target), expected, atol=1e-3, rtol=0)  # of 255


def test_patch_order_and_exact_size():
    """An image of exactly the target size is not resampled: its patches are its pixels."""
    image = picture(64, 96)
    output = SMALL.image_processor(image)
    assert output["image_grid_thw"].tolist() == [[1, 4, 6]]
    mean, std = np.float32(NORM["norm_mean"]), np.float32(NORM["norm_std"])
    normal = ((image / np.float32(255)) - mean) / std
    second_row = normal[16:32, 32:48].transpose(2, 0, 1).reshape(-1)  # patch (1, 2): (channel, y, x)
    np.testing.assert_allclose(output["pixel_values"][1 * 6 + 2].numpy(), second_row, atol=1e-6)


def test_odd_video_repeats_its_last_frame():
    clips = [frames(3), frames(5)]
    odd = SMALL.video_processor(clips)
    even = SMALL.video_processor([np.concatenate([clip, clip[-1:]]) for clip in clips])
    assert odd["video_grid_thw"].tolist() == [[2, 8, 8], [3, 8, 8]]
    assert torch.equal(odd["pixel_values_videos"], even["pixel_values_videos"])


def test_bicubic_overshoot_is_kept():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    values = SMALL.image_processor(image)["pixel_values"].view(-1, 3, 256)[:, 0]
    white = (1 - NORM["norm_mean"][0]) / NORM["norm_std"][0]
    assert values.max() > white + 0.05


# ------------------------------------------------------------------------------------------------- prompts


def test_expanded_prompt_forms():
    messages = user(image_part(), "and", audio_part(), video_part(3, fps=29.97), "!")
    ids = encode(messages)["input_ids"][0].tolist()
    image, video = "<img>" + "<image>" * 4 + "</img>", "<img>" + "<image>" * 16 + "</img>"
    audio = "<so_start>" + "<so_embedding>" * 13 + "<so_end>"
    assert TOKENIZER.decode(ids) == (
        f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{image}and{audio}"
        f"Frame 1 sampled at 0.00 seconds and frame 2 sampled at 0.03 seconds: {video}\n"
        f"Frame 3 sampled at 0.07 seconds: {video}!<|im_end|>\n"
    )


def native_processor():
    front_ends = NativeImageProcessor(**NORM), NativeVideoProcessor(**NORM)
    return NativeProcessor(*front_ends, TOKENIZER, ParakeetFeatureExtractor())


def test_video_text_equals_native():
    native = native_processor()
    for count, fps, indices in ((5, 29.97, [0, 30, 61, 90, 119]), (4, 2.0, [0, 1, 2, 3]), (3, None, None)):
        clip = VideoClip(frames(count), indices, fps, None)
        metadata = VideoMetadata(total_num_frames=200, fps=fps, frames_indices=indices)
        expected = native.replace_video_token(
            {"num_tokens": [256]}, 0, num_frames=count, video_metadata=metadata if fps else None
        )
        assert frame_labels(clip) == [piece.split("<img>")[0] for piece in expected.split("\n")]


def test_ids_equal_native_for_images():
    native = native_processor()
    prompt = "<|im_start|>user\nsee <image> and\n<image> there<|im_end|>\n"
    images = [Image.fromarray(picture(64, 64)), Image.fromarray(picture(300, 400))]
    expected = native(images=images, text=prompt, return_tensors="pt")
    ours = RELEASED(images=images, text=prompt, return_tensors="pt")
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], atol=2e-6, rtol=0)


def test_frame_times_follow_the_metadata():
    video = frames(4)
    metadata = VideoMetadata(total_num_frames=100, fps=25.0, frames_indices=[0, 25, 50, 75])
    output = SMALL(text="<video>", videos=[video], video_metadata=[metadata], return_tensors="pt")
    text = TOKENIZER.decode(output["input_ids"][0].tolist())
    assert "Frame 3 sampled at 2.00 seconds and frame 4 sampled at 3.00 seconds: " in text


def test_sound_of_a_video_after_its_frames():
    messages = user(video_part(4, fps=2.0, audio=sound(2)), "x", video_part(2, fps=1.0), audio_part(1))
    output = encode(messages)
    types = output["mm_token_type_ids"][0]
    assert [kind for kind, _ in media_runs(types.tolist())] == [2, 2, 3, 2, 3]
    assert output["audio_clip_counts"].tolist() == [1, 1]
    assert output["input_features_mask"].sum(-1).tolist() == [200, 100]  # in order of appearance
    silent = encode(messages, use_audio_in_video=False)
    assert silent["audio_clip_counts"].tolist() == [1]
    off = user({**video_part(4, fps=2.0, audio=sound(2)), "audio": "off"})
    assert "input_features" not in encode(off)


def test_sound_interleaved_in_order_of_time():
    clip = VideoClip(frames(6), [0, 5, 10, 15, 20, 25], 10.0, 3.0, sound(3))  # tubelets start at 0, 1 and 2 s
    output = encode(user({"type": "video", "video": clip}), INTERLEAVED)
    runs = media_runs(output["mm_token_type_ids"][0].tolist())
    # token k begins at 0.08 k seconds: 13 before 1 s (0.96 is the last), 12 more before 2 s, the rest after
    assert runs == [[2, 16], [3, 13], [2, 16], [3, 12], [2, 16], [3, 13]]
    after = encode(user({"type": "video", "video": clip}))
    assert (after["input_ids"] == AUDIO).sum() == (output["input_ids"] == AUDIO).sum() == 38
    text = TOKENIZER.decode(output["input_ids"][0].tolist())
    assert "<so_end>\nFrame 3 sampled" in text and text.count("<so_start>") == 3


def test_interleaving_without_times_and_beyond_the_end():
    clip = VideoClip(frames(8), None, None, None)
    assert tubelet_audio_counts(clip, 40) == [10, 10, 10, 10]
    clip = VideoClip(frames(4), [0, 10, 20, 30], 1.0, None)
    assert tubelet_audio_counts(clip, 38) == [38, 0]  # sound of 3 s, second tubelet at 20 s
    assert tubelet_audio_counts(clip, 38, sound_start=18.0) == [25, 13]
    assert tubelet_audio_counts(VideoClip(frames(1), [0], 1.0, None), 7) == [7]


def test_evs_reserves_in_the_first_tubelet():
    messages = user(video_part(8, fps=2.0), "x", video_part(2, fps=2.0))
    output = encode(messages, video_pruning_rate=0.5)
    assert output["video_keep_tokens"].tolist() == [32, 16]
    assert (output["input_ids"] == IMAGE).sum() == 48
    text = TOKENIZER.decode(output["input_ids"][0].tolist())
    assert "0.50 seconds: <img>" + "<image>" * 32 + "</img>\nFrame 3" in text and text.count("<img></img>") == 3
    assert SMALL.count_tokens(messages, video_pruning_rate=0.5)["video"] == 48
    assert "video_keep_tokens" not in encode(messages)


# ------------------------------------------------------------------------------------------------- properties

part_strategy = st.one_of(
    st.tuples(st.just("text"), st.sampled_from(["hi", "<image>", "\n", "<so_embedding> <video>"])),
    st.tuples(st.just("image"), st.integers(8, 150), st.integers(8, 150)),
    st.tuples(st.just("video"), st.integers(1, 6), st.sampled_from([None, 1.0, 29.97]), st.booleans()),
    st.tuples(st.just("audio"), st.floats(0.05, 2.5)),
)


def build_part(kind, *values):
    if kind == "text":
        return {"type": "text", "text": values[0]}
    if kind == "image":
        return image_part(*values)
    if kind == "video":
        count, fps, has_sound = values
        return video_part(count, fps, sound(1.0) if has_sound else None, (40, 56))
    return audio_part(*values)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(part_strategy, max_size=5), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from(["after", "interleave"]),
    st.sampled_from([None, 60, 200]),
    st.sampled_from(["left", "right"]),
)
def test_placeholders_equal_features(conversations, rate, order, budget, side):
    processor = SMALL if order == "after" else INTERLEAVED
    options = {"max_media_tokens": budget, "video_pruning_rate": rate}
    batch = [user(*(build_part(*part) for part in parts)) for parts in conversations]
    try:
        output = encode(batch, processor, padding_side=side, return_labels=True, **options)
    except OmniInputError as error:
        assert budget is not None and "budget" in str(error)
        return
    ids, attention = output["input_ids"], output["attention_mask"]
    types = output.get("mm_token_type_ids", torch.zeros_like(ids))
    assert torch.equal((types == 1) | (types == 2), ids == IMAGE) and torch.equal(types == 3, ids == AUDIO)
    assert not types[attention == 0].any()
    images = output.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))
    videos = output.get("video_grid_thw", torch.zeros(0, 3, dtype=torch.long))
    assert (types == 1).sum() == images.prod(-1).sum() // 4
    assert len(output.get("pixel_values", ())) == images.prod(-1).sum()
    assert len(output.get("pixel_values_videos", ())) == videos.prod(-1).sum()
    kept = output.get("video_keep_tokens", videos.prod(-1) // 4)
    assert (types == 2).sum() == kept.sum() and (len(videos) == 0 or (rate > 0) == ("video_keep_tokens" in output))
    mask = output.get("input_features_mask", torch.zeros(0, 8, dtype=torch.bool))
    valid = mask.sum(-1)
    for _ in range(3):
        valid = (valid - 1) // 2 + 1
    assert (types == 3).sum() == valid.sum() and output.get("audio_clip_counts", torch.zeros(0)).sum() == len(mask)
    counts = processor.count_tokens(batch, **options)
    assert [count["total"] for count in counts] == attention.sum(-1).tolist()
    for i, count in enumerate(counts):
        assert [count[k] for k in ("image", "video", "audio")] == [int((types[i] == t).sum()) for t in (1, 2, 3)]
        assert budget is None or count["image"] + count["video"] + count["audio"] <= budget
    if not any(part[0] != "text" for parts in conversations for part in parts):
        assert set(output) == {"input_ids", "attention_mask", "labels"}


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.lists(part_strategy, max_size=4), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.5]),
    st.integers(1, 3),
)
def test_packing_conserves_tokens_and_features_of_all_kinds(conversations, rate, per_row):
    """Packed rows hold every token, label, kind and feature of their samples, in order, and nothing else."""
    answer = {"role": "assistant", "content": "yes"}
    rows = [{"messages": [*user(*(build_part(*part) for part in parts)), answer]} for parts in conversations]
    samples = [encode_row(row, SMALL, video_pruning_rate=rate) for row in rows]
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    dealt, left = pack_rows([cost_of(sample) for sample in samples], per_row * longest)
    batch = collate_rows([[samples[i] for i in row] for row in dealt])
    ordered = [samples[i] for row in dealt for i in row]
    assert not left and sorted(i for row in dealt for i in row) == list(range(len(rows)))
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["input_ids"][real], torch.cat([sample["input_ids"][0] for sample in ordered]))
    kinds = [sample.get("mm_token_type_ids", torch.zeros_like(sample["input_ids"]))[0] for sample in ordered]
    assert torch.equal(batch["mm_token_type_ids"][real], torch.cat(kinds))
    trained = [sample["input_ids"][0, 1:][sample["labels"][0, 1:] != -100] for sample in ordered]
    assert torch.equal(batch["labels"][batch["labels"] != -100], torch.cat(trained))
    assert not batch["mm_token_type_ids"][~real].any() and (batch["labels"][~real] == -100).all()
    check_inputs(SMALL, batch)  # placeholders of each kind are as many as the features
    for name in ("pixel_values", "pixel_values_videos", "video_keep_tokens", "audio_clip_counts"):
        parts = [sample[name] for sample in ordered if name in sample]
        assert (name in batch) == bool(parts) and (not parts or torch.equal(batch[name], torch.cat(parts)))
    sounds = [s["input_features"][s["input_features_mask"]] for s in ordered if "input_features" in s]
    if sounds:
        assert torch.equal(batch["input_features"][batch["input_features_mask"]], torch.cat(sounds))


def test_batch_equals_single_samples():
    conversations = [
        user(image_part(100, 40), "short"),
        user("text only, and longer than the others"),
        user(video_part(3, 1.0, sound(1)), audio_part(0.4), image_part(30, 60)),
    ]
    batch = encode(conversations)
    singles = [encode(conversation) for conversation in conversations]
    for row, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(batch[name][row, -length:], single[name][0])
        assert not batch["attention_mask"][row, :-length].any()
    for name in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "audio_clip_counts"):
        parts = [single[name] for single in singles if name in single]
        assert torch.equal(batch[name], torch.cat(parts))
    lists = SMALL.apply_chat_template(conversations, tokenize=True)["input_ids"]
    assert lists == [single["input_ids"][0].tolist() for single in singles]


# ------------------------------------------------------------------------------------------------- budgets


def test_media_budget_degrades_resolution():
    messages = user(image_part(256, 256), image_part(64, 128), audio_part(1), video_part(4, 1.0))
    free = SMALL.count_tokens(messages)
    assert free["image"] == 64 + 8 and free["video"] == 32
    tight = SMALL.count_tokens(messages, max_media_tokens=80)
    assert tight["audio"] == free["audio"] and tight["image"] + tight["video"] + tight["audio"] <= 80
    assert tight["image"] + tight["video"] > 50  # and not much below it
    grids = encode(messages, max_media_tokens=80)["image_grid_thw"].prod(-1)
    assert grids[0] > grids[1]  # one rule for all: the larger one stays the larger one
    with pytest.raises(OmniInputError, match="max_media_tokens"):
        encode(messages, max_media_tokens=20)


def test_budget_factor():
    assert fit_media_budget([lambda s: int(100 * s)], None) == 1.0
    assert fit_media_budget([lambda s: int(100 * s)] * 2, 200) == 1.0
    factor = fit_media_budget([lambda s: int(100 * s)] * 2, 100)
    assert 0.48 < factor <= 0.51
    assert SMALL.image_processor([picture(256, 256)] * 3, max_media_tokens=30)["image_grid_thw"].prod(-1).sum() <= 120


def test_context_bounds_the_patches_of_an_image():
    processor = OmniImageProcessor(max_model_len=1028)
    assert processor.patch_budget() == 4096 and processor.patch_budget(8) == 8192
    assert OmniImageProcessor().patch_budget() == 13312
    h, w = processor.grid(4000, 4000)
    assert 3800 < h * w <= 4096


def test_truncation_never_cuts_media():
    messages = user("first", image_part(), "a long tail " * 10)
    whole = encode(messages)["input_ids"].shape[1]
    cut = encode(messages, truncation=True, max_length=whole - 20)
    assert cut["input_ids"].shape[1] == whole - 20 and (cut["input_ids"] == IMAGE).sum() == 4
    first = encode(messages)["input_ids"][0].tolist().index(IMAGE)
    with pytest.raises(OmniInputError, match="media item"):
        encode(messages, truncation=True, max_length=first + 2)


# ------------------------------------------------------------------------------------------------- inputs


def test_flat_nested_and_single_media():
    images = [picture() for _ in range(3)]
    prompts = ["<image> a <image>", "b <image>"]
    flat = SMALL(text=prompts, images=images, return_tensors="pt")
    nested = SMALL(text=prompts, images=[images[:2], images[2:]], return_tensors="pt")
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    single = SMALL(text="<image>", images=images[0])
    assert single["image_grid_thw"].tolist() == [[1, 4, 4]] and isinstance(single["input_ids"][0], list)
    mixed = SMALL(text=["x", "<image>"], images=[[], images[0]], padding=True, return_tensors="pt")
    assert (mixed["input_ids"] == IMAGE).sum(-1).tolist() == [0, 4]
    pictures = [Image.fromarray(frame) for frame in frames(4)]
    video = SMALL(text="<video>", videos=pictures)
    assert video["video_grid_thw"].tolist() == [[2, 8, 8]]
    tone = SMALL(text="<so_embedding>", audio=sound(1), sampling_rate=16000)
    assert tone["audio_clip_counts"].tolist() == [1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text": "no place", "images": [picture()]}, "0 image place.* 1 image item"),
        ({"text": "<image><image>", "images": [picture()]}, "2 image place.* 1 image item"),
        ({"text": ["<image>"] * 2, "images": [[picture()] * 2, [picture()]]}, "sample 0: .* 1 image place"),
        ({"text": "<video>"}, "1 video place.* 0 video item"),
        ({"text": "<so_embedding>", "audio": [sound()] * 2, "sampling_rate": 16000}, "1 audio place.* 2 audio item"),
        ({"text": None}, "text must be"),
        ({"text": "x", "video_pruning_rate": 1.0}, "video_pruning_rate"),
        ({"text": "x", "imagez": []}, "unknown option 'imagez'"),
        ({"text": "x", "padding_side": "up"}, "padding_side"),
        ({"text": ["x", "longer"], "padding": False, "return_tensors": "pt"}, "padding"),
    ],
)
def test_mismatches_are_named(kwargs, message):
    with pytest.raises(OmniInputError, match=message):
        SMALL(**kwargs)


def test_media_beside_the_conversation():
    """TRL and others keep sources in columns; parts without a source take them in order."""
    parts = user({"type": "image"}, {"type": "text", "text": "x"}, {"type": "image"})
    images = [picture(64, 64), picture(64, 128)]
    output = encode(parts, images=images)
    assert output["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 8]]
    with pytest.raises(OmniInputError, match="no part for"):
        encode(parts, images=[*images, picture()])
    with pytest.raises(OmniInputError, match="names no source"):
        encode(parts, images=images[:1])
    batch = encode([parts, user({"type": "text", "text": "y"})], images=[images, None])
    assert len(batch["image_grid_thw"]) == 2


def test_openai_style_parts(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(picture()).save(path)
    data = base64.b64encode(path.read_bytes()).decode()
    for part in (
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "image", "path": str(path)},
        {"type": "image", "bytes": path.read_bytes()},
        {"type": "image", "base64": data},
        {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}},
    ):
        assert encode(user(part))["image_grid_thw"].tolist() == [[1, 4, 4]]
    audio = {"type": "audio", "audio": {"array": sound(1), "sampling_rate": 16000}}
    assert encode(user(audio))["audio_clip_counts"].tolist() == [1]


def test_trl_contract():
    assert SMALL.image_processor.merge_size == 2 and SMALL.tokenizer is TOKENIZER
    output = SMALL.apply_chat_template(
        [user(image_part()), user(image_part(80, 80), "longer")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"add_special_tokens": False},
    )
    assert isinstance(output["input_ids"], list) and len(output["input_ids"][0]) != len(output["input_ids"][1])
    assert output["image_grid_thw"].prod(-1).sum() == len(output["pixel_values"])
    assert set(output) <= set(SMALL.model_input_names)


def test_speed_of_small_samples():
    """Training renders thousands of samples a minute; this guards against per-call overhead, not slow machines."""

    messages = [*user(image_part(96, 96), "What is this?"), {"role": "assistant", "content": "A dog"}]
    encode(messages, return_labels=True)
    times = []
    for _ in range(20):
        start = time.process_time()
        encode(messages, return_labels=True)
        times.append(time.process_time() - start)
    assert sorted(times)[len(times) // 2] < 0.01


# ------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def released_folder(tmp_path_factory):
    """What the released folder holds for a processor: its tokenizer, preprocessor_config.json and a template."""
    AutoConfig.register(MODEL_TYPE, OmniConfig, exist_ok=True)
    register_auto_processors()
    folder = tmp_path_factory.mktemp("released")
    TOKENIZER.save_pretrained(folder)
    remote = {
        "AutoImageProcessor": "image_processing.NemotronH_Nano_Omni_Reasoning_V3ImageProcessor",
        "AutoVideoProcessor": "video_processing.NemotronH_Nano_Omni_Reasoning_V3VideoProcessor",
        "AutoProcessor": "processing.NemotronH_Nano_Omni_Reasoning_V3Processor",
    }
    preprocessor = {
        "auto_map": remote,
        "image_processor_type": "NemotronH_Nano_Omni_Reasoning_V3ImageProcessor",
        "patch_size": 16,
        "downsample_ratio": 0.5,
        "min_num_patches": 512,
        "max_num_patches": 13312,
        "max_model_len": 16384,
        **NORM,
    }
    config = {"model_type": MODEL_TYPE, "architectures": [MODEL_TYPE], "auto_map": {"AutoConfig": "configuration.X"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return folder


def test_released_folder_loads_without_remote_code(released_folder):
    for processor in (OmniProcessor.from_pretrained(released_folder), AutoProcessor.from_pretrained(released_folder)):
        assert type(processor) is OmniProcessor
        assert processor.image_processor.min_num_patches == 512
        assert processor.video_pruning_rate == 0.0 and processor.audio_in_video == "after"
        output = encode(user(image_part(), audio_part()), processor)
        assert (output["mm_token_type_ids"] == 1).sum() == output["image_grid_thw"].prod() // 4
    assert type(AutoImageProcessor.from_pretrained(released_folder)) is OmniImageProcessor
    assert type(AutoVideoProcessor.from_pretrained(released_folder)) is OmniVideoProcessor
    assert AutoFeatureExtractor.from_pretrained(released_folder).feature_size == 128


def test_released_template_stays_reachable(released_folder):
    processor = OmniProcessor.from_pretrained(released_folder)
    assert processor.apply_chat_template(user("Hi")).startswith("<|im_start|>system")
    theirs = processor.released_chat_template
    assert processor.apply_chat_template(user(image_part(), "Hi <image>"), theirs, tokenize=True)["image_grid_thw"].shape == (1, 3)  # fmt: skip # noqa: E501
    assert processor.apply_chat_template(user("Hi"), theirs) == "[Hi]"


def test_save_and_load(tmp_path, released_folder):
    processor = OmniProcessor.from_pretrained(released_folder, audio_in_video="interleave", video_pruning_rate=0.5)
    processor.video_processor.video_target_num_patches = 256
    processor.feature_extractor.min_clip_seconds = 0.2
    processor.chat_template = processor.chat_template.replace("# Tools", "# Functions")
    processor.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "processor_config.json").read_text()
    for again in (OmniProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is OmniProcessor and type(again.feature_extractor) is type(processor.feature_extractor)
        assert again.to_dict() == processor.to_dict() and again.chat_template == processor.chat_template
        assert again.audio_in_video == "interleave" and again.video_pruning_rate == 0.5
        assert again.video_processor.video_target_num_patches == 256
        messages = user(image_part(), video_part(4, 2.0, sound(1)), audio_part())
        ours, theirs = encode(messages, processor), encode(messages, again)
        assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_wrong_tokenizer_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(OmniInputError, match="no special token '<image>'"):
        OmniProcessor(tokenizer=bare)
