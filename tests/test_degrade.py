"""Requests over their budget: the rule on sizes alone, and on real requests with the shipped nano's processor."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model

from modeling_omni import OmniFeatureExtractor, OmniImageProcessor, OmniInputError, OmniProcessor, OmniVideoProcessor
from modeling_omni.call_inputs import CallOptions
from modeling_omni.degrade import Visual, degrade, fit_request, picture_visual, prompt_limit, thin_clip, video_visual
from modeling_omni.inference import encode
from modeling_omni.media import VideoClip
from modeling_omni.sample_media import SampleMedia, plan_grids

NANO = OmniProcessor.from_pretrained("nano")
# the released sizes
BIG = OmniProcessor(OmniImageProcessor(), OmniVideoProcessor(), OmniFeatureExtractor(), NANO.tokenizer)
SIDES = st.integers(8, 4000)


def clip(frames: int, height=64, width=96, sound: int = 0) -> VideoClip:
    pixels = np.arange(frames, dtype=np.uint8)[:, None, None, None].repeat(height, 1).repeat(width, 2).repeat(3, 3)
    audio = np.zeros(sound, np.float32) if sound else None
    return VideoClip(pixels, list(range(0, 2 * frames, 2)), 4.0, frames / 2, audio)


def blank(frames: int, height: int, width: int) -> VideoClip:
    """A clip of any size that takes no memory."""
    return VideoClip(np.broadcast_to(np.uint8(0), (frames, height, width, 3)), list(range(frames)), 2.0, frames / 2)


# ------------------------------------------------------------------------------------------------------ the rule


@st.composite
def requests(draw) -> list[Visual]:
    """Pictures and videos of any size, planned by the released sizes, with and without EVS."""
    call = CallOptions(video_pruning_rate=draw(st.sampled_from([0.0, 0.5, 0.7])))
    pictures = [
        np.broadcast_to(np.uint8(0), (*size, 3)) for size in draw(st.lists(st.tuples(SIDES, SIDES), max_size=4))
    ]
    videos = [blank(*size) for size in draw(st.lists(st.tuples(st.integers(1, 300), SIDES, SIDES), max_size=3))]
    media = SampleMedia(pictures, videos, image_limits=[None] * len(pictures), video_limits=[None] * len(videos))
    plan_grids(BIG, media, call)
    visuals = [picture_visual(BIG, *pair, len(pictures)) for pair in zip(pictures, media.image_grids)]
    return visuals + [video_visual(BIG, video, None, grid, call) for video, grid in zip(videos, media.video_grids)]


def cost(visuals, sizes) -> int:
    return sum(visual.tokens(*size) for visual, size in zip(visuals, sizes, strict=True))


@settings(max_examples=25, deadline=None)
@given(requests(), st.lists(st.floats(0.001, 1.1), min_size=2, max_size=2))
def test_never_over_budget_and_monotone(visuals, shares):
    full = cost(visuals, [(v.frames, v.patches) for v in visuals])
    least = cost(visuals, [(min(2, v.frames), min(16, v.patches)) for v in visuals])
    budgets = sorted(int(share * full) for share in shares)
    plans = [degrade(visuals, budget) for budget in budgets]
    for budget, plan in zip(budgets, plans):
        if plan is None:
            assert budget < least  # it gives up only where nothing helps
            continue
        assert cost(visuals, plan) <= budget
        for visual, (frames, patches) in zip(visuals, plan):
            assert min(2, visual.frames) <= frames <= visual.frames and 0 < patches <= visual.patches
        if budget >= full:
            assert plan == [(v.frames, v.patches) for v in visuals]
    small, large = plans
    if small is not None:  # more budget never gives less of anything
        assert all(a <= b for one, two in zip(small, large) for a, b in zip(one, two))


@settings(max_examples=25, deadline=None)
@given(requests(), st.floats(0.01, 1.0))
def test_frames_give_way_first_then_their_patches_then_pictures(visuals, share):
    plan = degrade(visuals, int(share * cost(visuals, [(v.frames, v.patches) for v in visuals])))
    for visual, (_, patches) in zip(visuals, plan or ()):
        others = [(v, size) for v, size in zip(visuals, plan) if v.frames > 8]
        if visual.frames and patches < visual.patches:
            assert all(size[0] <= 8 for _, size in others)  # every long video has given its frames
        if not visual.frames and patches < visual.patches:
            assert all(size[0] <= 8 and size[1] <= max(16, v.patches // 4) for v, size in others)
    caps = {frames for visual, (frames, _) in zip(visuals, plan or ()) if frames < visual.frames}
    assert len(caps) <= 1  # one cap for all: the longest give most


@settings(max_examples=60, deadline=None)
@given(st.integers(200, 4000), st.integers(200, 4000), st.integers(16, 13312), st.booleans())
def test_aspect_ratio_is_kept(height, width, patches, is_video):
    """As far as even sides can: both differ by less than a pair of patches and a tenth from the exact ones."""
    front, frames = (BIG.video_processor, [2]) if is_video else (BIG.image_processor, [])
    whole = front.grid(*frames, height, width)[-2:]
    h, w = front.grid(*frames, height, width, max_patches=patches)[-2:]
    if patches >= math.prod(whole):
        assert (h, w) == whole
    elif 4 * max(height, width) <= patches * min(height, width):  # else the short side would be less than a token
        area = patches if is_video else min(patches, height * width / 256)  # a picture is not enlarged here
        exact = (area * height / width) ** 0.5
        assert h % 2 == w % 2 == 0
        assert all(abs(side - best) < 2 + best / 10 for side, best in ((h, exact), (w, area / exact)))
        assert is_video or h * w <= patches


def test_the_steps_of_a_line():
    """One video of 64 frames and one picture, by hand: 10 tokens a patch make every step visible."""
    video = Visual(64, 256, lambda frames, patches: frames * patches)
    picture = Visual(0, 1000, lambda frames, patches: patches)
    both = [video, picture]
    assert degrade(both, 64 * 256 + 1000) == [(64, 256), (0, 1000)]
    assert degrade(both, 40 * 256 + 1000) == [(40, 256), (0, 1000)]
    assert degrade(both, 41 * 256 + 1000) == [(40, 256), (0, 1000)]  # whole tubelets
    (frames, patches), rest = degrade(both, 8 * 128 + 1000)
    assert frames == 8 and 120 <= patches <= 128 and rest == (0, 1000)
    (frames, patches), (_, left) = degrade(both, 8 * 64 + 700)
    assert (frames, patches) == (8, 64) and 680 <= left <= 700
    (frames, patches), (_, left) = degrade(both, 4 * 64 + 600)
    assert (frames, patches, left) == (4, 64, 600)
    assert degrade(both, 2 * 16 + 16) == [(2, 16), (0, 16)] and degrade(both, 2 * 16 + 15) is None


def test_thin_clip_keeps_ends_order_times_and_sound():
    source = clip(10, sound=800)
    thin = thin_clip(source, 4)
    assert thin.frames[:, 0, 0, 0].tolist() == [0, 3, 6, 9] and thin.frame_indices == [0, 6, 12, 18]
    assert thin.audio is source.audio and (thin.fps, thin.duration) == (4.0, 5.0) and len(source.frames) == 10
    assert thin_clip(VideoClip(source.frames, None, None, None), 2).frame_indices is None
    assert thin_clip(VideoClip(source.frames, None, 2.0, 5.0), 2).frame_indices == [0, 9]


# ------------------------------------------------------------------------------------------------------ requests


def request(text="What moves? \u00e9", frames=40, sound=16000) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "video", "name": "a.mp4", "video": clip(frames, sound=sound)},
                {"type": "text", "text": "and"},
                {"type": "image", "name": "b.png", "image": rng.integers(0, 255, (200, 300, 3), dtype=np.uint8)},
                {"type": "audio", "name": "c.wav", "audio": (np.zeros(16000, np.float32), 16000)},
                {"type": "text", "text": text},
            ],
        },
    ]


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("place", ["interleave", "after"])
def test_requests_fit_and_text_and_sound_are_untouched(rate, place):
    processor = OmniProcessor.from_pretrained("nano", audio_in_video=place)
    messages, options = request(), {"enable_thinking": False, "video_pruning_rate": rate}
    whole = processor.count_tokens(messages, add_generation_prompt=True, **options)
    same, lines = fit_request(processor, messages, whole["total"], **options)
    assert lines == [] and processor.count_tokens(same, add_generation_prompt=True, **options) == whole
    totals, labels = [], processor.apply_chat_template(messages, enable_thinking=False)
    for limit in range(whole["total"] - 1, 100, -97):
        try:
            fitted, lines = fit_request(processor, messages, limit, **options)
        except OmniInputError as error:
            assert f"may have {limit} tokens" in str(error) and limit < 330
            continue
        counts = processor.count_tokens(fitted, add_generation_prompt=True, **options)
        assert counts["total"] <= limit and counts["audio"] == whole["audio"] and lines
        assert processor.apply_chat_template(fitted, enable_thinking=False) == labels
        totals.append(counts["total"])
        video = fitted[1]["content"][0]["video"]
        assert video.audio is messages[1]["content"][0]["video"].audio
        inputs = processor.apply_chat_template(
            fitted, add_generation_prompt=True, tokenize=True, return_tensors="pt", **options
        )
        assert inputs["input_ids"].shape[1] == counts["total"]
        again, lines = fit_request(processor, fitted, limit, **options)  # what fits is not lowered again
        assert lines == [] and again[1]["content"][0]["video"].frames.shape == video.frames.shape
    assert totals == sorted(totals, reverse=True) and len(totals) > 5


def test_what_was_done_is_said():
    fitted, lines = fit_request(NANO, request(), 500, enable_thinking=False)
    (line,) = lines
    assert line.startswith("video a.mp4: 40 -> ") and " frames, " in line and line.endswith(" tokens")
    _, lines = fit_request(NANO, request(), 200, enable_thinking=False)
    assert len(lines) == 2 and " patches a frame, " in lines[0] and lines[1].startswith("image b.png: ")
    parts = [{"type": "image", "path": "modeling_omni/nano/examples/shapes.png"}, {"type": "text", "text": "?"}]
    total = NANO.count_tokens([{"role": "user", "content": parts}], add_generation_prompt=True)["total"]
    _, (line,) = fit_request(NANO, [{"role": "user", "content": parts}], total - 1)
    assert line.startswith("image shapes.png: ")


def test_text_and_sound_that_do_not_fit_are_an_error_with_numbers():
    messages = request("word " * 200)
    counts = NANO.count_tokens(messages, add_generation_prompt=True)
    with pytest.raises(OmniInputError, match=rf"may have 150 tokens, but \d+ of text and {counts['audio']} of sound"):
        fit_request(NANO, messages, 150)
    with pytest.raises(OmniInputError, match="of text, which are never cut"):
        fit_request(NANO, [{"role": "user", "content": "word " * 200}], 100)


def test_a_target_leaves_room_for_the_next_turns():
    fitted, lines = fit_request(NANO, request(), 500, target=450, enable_thinking=False)
    total = NANO.count_tokens(fitted, add_generation_prompt=True, enable_thinking=False)["total"]
    assert 400 < total <= 450
    later = [*fitted, {"role": "assistant", "content": "x"}, {"role": "user", "content": "and?"}]
    assert fit_request(NANO, later, 500, target=450, enable_thinking=False)[1] == []


def test_max_media_tokens_and_the_limit_together():
    options = {"enable_thinking": False, "max_media_tokens": 500}
    whole = NANO.count_tokens(request(), add_generation_prompt=True, **options)
    fitted, lines = fit_request(NANO, request(), whole["total"] - 100, **options)
    counts = NANO.count_tokens(fitted, add_generation_prompt=True, **options)
    assert lines and counts["total"] <= whole["total"] - 100


def test_prompt_limit():
    model = tiny_model()  # a context of 4096
    assert prompt_limit(model, 96) == 4000 and prompt_limit(model, 10**6) == 2048 and prompt_limit(model, 5, 70) == 70


def test_max_patches_of_a_part():
    parts = [{"type": "image", "image": np.zeros((256, 256, 3), np.uint8), "max_patches": 64}]
    inputs = encode(tiny_model(mels=80), NANO, [{"role": "user", "content": parts}])
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert math.prod(inputs["pixel_values"].shape) == 64 * 768
    for wrong in (0, "many", True):
        with pytest.raises(OmniInputError, match="max_patches"):
            NANO.count_tokens([{"role": "user", "content": [parts[0] | {"max_patches": wrong}]}])
