"""Requests larger than their budget: frames and pixels give way by rule, text and sound never do.

After the two sampling rules of Eagle 2.5 (Chen et al. 2025): Automatic Degrade Sampling keeps all text and fits what is
seen into the tokens that are left; Image Area Preservation keeps a picture's aspect ratio and 60 % of its area where it
can. Eagle counts tiles, this model has one grid of patches per picture or frame, so the rule here is a line of steps,
taken one after the other and only as far as needed:

1. the longest videos lose frames, evenly spread, down to 8 (Eagle's least),
2. all frames lose patches, down to a quarter of their own,
3. all pictures lose patches, down to 60 % of their own,
4. to 6. the same again, as far down as 2 frames, and 4 tokens of a frame or picture.

Everything is known from sizes, before any pixel is resized and any tower runs.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .call_inputs import OPTION_NAMES, CallOptions
from .evs import kept_tokens
from .image_processing_omni import MIN_BUDGET_PATCHES
from .media import OmniInputError, VideoClip
from .prompt_omni import prepare_messages, replace_media, source_keys
from .sample_media import SampleMedia, audio_tokens, load_media, pruning_rate
from .video_processing_omni import frame_labels, num_tubelets, tubelet_audio_counts

STEPS = (("frames", 8), ("frame", 0.25), ("picture", 0.6), ("frames", 2), ("frame", 0.0), ("picture", 0.0))
SHRINK = 0.97  # from one size that is tried to the next


class PromptTooLong(OmniInputError):
    """A prompt does not fit, whatever is lowered."""


@dataclass(frozen=True)
class Visual:
    """A picture or a video as the rule sees it.

    Attributes:
        frames: of a video; 0 for a picture.
        patches: of the picture, or of one frame.
        tokens: (frames, patches) -> tokens of the prompt, the labels of frames included.
    """

    frames: int
    patches: int
    tokens: Callable[[int, int], int]


def degrade(visuals: list[Visual], budget: int) -> list[tuple[int, int]] | None:
    """(frames, patches) of every item, so that all of them together have at most `budget` tokens.

    A larger budget never gives any item fewer frames or patches. None: even the smallest sizes do not fit.
    """
    longest = max((visual.frames for visual in visuals), default=0)
    largest = max((visual.patches for visual in visuals), default=1)
    state = {"frames": longest, "frame": 1.0, "picture": 1.0}

    def sizes() -> list[tuple[int, int]]:
        found = []
        for visual in visuals:
            share = state["frame" if visual.frames else "picture"]
            patches = min(visual.patches, max(MIN_BUDGET_PATCHES, int(share * visual.patches)))
            found.append((min(visual.frames, state["frames"]), patches))
        return found

    def fits() -> bool:
        return sum(visual.tokens(*size) for visual, size in zip(visuals, sizes(), strict=True)) <= budget

    if fits():
        return sizes()
    for what, least in STEPS:
        if what == "frames":
            low, high = least // 2, max(least // 2, (state["frames"] - 1) // 2)  # tubelets of two frames
            while low < high:  # the most that fits: tokens rise with frames
                middle = (low + high + 1) // 2
                state["frames"] = 2 * middle
                low, high = (middle, high) if fits() else (low, middle - 1)
            state["frames"] = min(longest, 2 * low)
            if fits():
                return sizes()
        elif any(bool(visual.frames) == (what == "frame") for visual in visuals):
            least = max(least, MIN_BUDGET_PATCHES / largest)
            while state[what] > least:
                state[what] = max(least, state[what] * SHRINK)
                if fits():
                    return sizes()
    return None


def thin_clip(clip: VideoClip, frames: int, copy: bool = True) -> VideoClip:
    """A clip with `frames` of its frames, evenly spread from the first to the last; its sound stays whole.

    Without `copy` the pixels are those of other frames: enough for labels and counts.
    """
    places = np.linspace(0, len(clip.frames) - 1, frames).round().astype(np.int64)
    indices = clip.frame_indices
    if indices is None and clip.fps:
        indices = range(len(clip.frames))
    indices = None if indices is None else [int(indices[place]) for place in places]
    return replace(clip, frames=clip.frames[places] if copy else clip.frames[:frames], frame_indices=indices)


def video_visual(processor, clip: VideoClip, sound, grid: tuple[int, int, int], call: CallOptions) -> Visual:
    """A video of that grid (t, h, w), and what it would cost at fewer frames and patches; `sound` is float32 [L]."""
    rate, target = pruning_rate(processor, call), call.video_target_num_patches
    front, full = processor.video_processor, grid[1] * grid[2]
    height, width = clip.frames.shape[1:3]
    size, merge = front.video_temporal_patch_size, front.merge_size**2

    @functools.cache
    def marks(frames: int) -> int:
        thin = thin_clip(clip, frames, copy=False)
        labels = frame_labels(thin, size)
        count = sum(len(processor.encode("\n" * (k > 0) + label)) + 2 for k, label in enumerate(labels))
        if sound is not None and processor.audio_in_video == "interleave":
            counts = tubelet_audio_counts(thin, audio_tokens(processor, sound), clip.start, size)
            count += 2 * sum(1 for tokens in counts if tokens)
        return count

    def tokens(frames: int, patches: int) -> int:
        if patches >= full:
            seen = kept_tokens(num_tubelets(frames, size), full // merge, rate)
        else:
            seen = front.num_tokens(frames, height, width, rate, target_patches=target, max_patches=patches)
        return seen + marks(frames)

    return Visual(len(clip.frames), full, tokens)


def picture_visual(processor, image, grid: tuple[int, int], pictures: int) -> Visual:
    """The same for one of the pictures of a request, uint8 [H, W, 3]."""
    front, full = processor.image_processor, grid[0] * grid[1]
    size, merge = image.shape[:2], front.merge_size**2

    def tokens(frames: int, patches: int) -> int:
        return full // merge if patches >= full else front.num_tokens(*size, pictures, max_patches=patches)

    return Visual(0, full, tokens)


def fit_request(
    processor, messages: list[dict], max_prompt_tokens: int, target: int | None = None, **options
) -> tuple[list[dict], list[str]]:
    """The messages with their media decoded and, where the prompt is too long, lowered by the rule of this module.

    Args:
        max_prompt_tokens: of the whole prompt: text, media and the marks around them.
        target: what a prompt that is longer is lowered to, if possible (default: to `max_prompt_tokens`). A
            conversation leaves room here, so that its next turns need not be lowered again, which would change what
            is cached.
        options: of `OmniProcessor.apply_chat_template`.

    Returns:
        messages, whose parts hold decoded media and, when lowered, "max_patches" and fewer frames: they encode to at
        most `max_prompt_tokens` with the same options, now and in later turns; and what was lowered, one line an item.

    Raises:
        PromptTooLong: text and sound alone are too long, or the smallest size of everything is; it gives the numbers.
    """

    def count(messages: list[dict]) -> dict[str, int]:
        return processor.count_tokens(messages, add_generation_prompt=True, **options)

    parts = prepare_messages(messages, {}, False)[1]
    call = CallOptions(**{name: value for name, value in options.items() if name in OPTION_NAMES})
    media = load_media(processor, parts, call)
    parts = opened_parts(parts, media, processor.feature_extractor.sampling_rate)
    messages = replace_media(messages, parts)
    counts = count(messages)
    if counts["total"] <= max_prompt_tokens:
        return messages, []

    pictures = iter(zip(media.images, media.image_grids, strict=True))
    videos = iter(zip(media.videos, media.sounds, media.video_grids, strict=True))
    places = [i for i, part in enumerate(parts) if part["type"] != "audio"]
    visuals = []
    for i in places:
        if parts[i]["type"] == "image":
            visuals.append(picture_visual(processor, *next(pictures), len(media.images)))
        else:
            visuals.append(video_visual(processor, *next(videos), call))
    fixed = counts["total"] - sum(visual.tokens(visual.frames, visual.patches) for visual in visuals)
    if fixed > max_prompt_tokens or not visuals:
        sound = f" and {counts['audio']} of sound" if counts["audio"] else ""
        raise PromptTooLong(
            f"the prompt may have {max_prompt_tokens} tokens, but {fixed - counts['audio']} of text{sound}, which are "
            "never cut, are more; shorten it, ask for fewer new tokens or raise max_prompt_tokens"
        )
    for goal in (max_prompt_tokens if target is None else min(target, max_prompt_tokens), max_prompt_tokens):
        spare = 0
        while (sizes := degrade(visuals, goal - fixed - spare)) is not None:
            lowered = list(parts)
            for i, size in zip(places, sizes, strict=True):
                lowered[i] = lowered_part(parts[i], *size)
            fitted = replace_media(messages, lowered)
            over = count(fitted)["total"] - goal
            if over <= 0:
                after = load_media(processor, [(part["type"], part) for part in lowered], call)
                costs = [
                    (visual.tokens(visual.frames, visual.patches), visual.tokens(*size))
                    for visual, size in zip(visuals, sizes, strict=True)
                ]
                return fitted, lowered_lines([parts[i] for i in places], media, after, costs)
            spare += over  # a label that is tokenised otherwise next to other text
    least = fixed + sum(visual.tokens(min(2, visual.frames), MIN_BUDGET_PATCHES) for visual in visuals)
    raise PromptTooLong(
        f"the prompt may have {max_prompt_tokens} tokens, but needs {least} even with its pictures and videos at their "
        f"smallest ({fixed} of them are text, sound and marks); send fewer items or raise max_prompt_tokens"
    )


def opened_parts(parts: list[tuple[str, dict]], media: SampleMedia, hertz: int) -> list[dict]:
    """Media parts (kind, part) with what was decoded in place of their sources, and a name."""
    images, videos, audios = iter(media.images), iter(media.videos), iter(media.audios)
    opened = []
    for number, (kind, part) in enumerate(parts, 1):
        source = next((part[key] for key in ("path", kind, "url") if isinstance(part.get(key), (str, os.PathLike))), "")
        name = os.path.basename(os.fspath(source)) if str(source)[:5].lower() != "data:" else ""
        decoded = next(images) if kind == "image" else next(videos) if kind == "video" else (next(audios), hertz)
        kept = {key: value for key, value in part.items() if key not in source_keys(kind)}
        opened.append({"name": name or str(number)} | kept | {"type": kind, kind: decoded})
    return opened


def lowered_part(part: dict, frames: int, patches: int) -> dict:
    part = part | {"max_patches": patches}
    if part["type"] == "video" and frames < len(part["video"].frames):
        part["video"] = thin_clip(part["video"], frames)
    return part


def lowered_lines(parts: list[dict], before: SampleMedia, after: SampleMedia, costs: list[tuple]) -> list[str]:
    """What happened to every picture and video that changed, for people; `costs`: tokens of each, before and after."""
    pictures = iter(zip(before.image_grids, after.image_grids, strict=True))
    grids = iter(zip(before.video_grids, after.video_grids, strict=True))
    clips = iter(zip(before.videos, after.videos, strict=True))
    lines = []
    for part, (tokens, left) in zip(parts, costs, strict=True):
        changes = []
        if part["type"] == "image":
            (h, w), (low_h, low_w) = next(pictures)
        else:
            (_, h, w), (_, low_h, low_w) = next(grids)
            frames, fewer = (len(clip.frames) for clip in next(clips))
            changes += [f"{frames} -> {fewer} frames"] * (fewer < frames)
        if (h, w) != (low_h, low_w):
            each = " a frame" if part["type"] == "video" else ""
            changes.append(f"{w}x{h} -> {low_w}x{low_h} patches{each}")
        if changes:
            lines.append(f"{part['type']} {part['name']}: {', '.join(changes)}, {tokens} -> {left} tokens")
    return lines


def prompt_limit(model, max_new_tokens: int, max_prompt_tokens: int | None = None) -> int:
    """Tokens that a prompt may have: as given, else the model's context less the room for the answer, which takes half
    of it at most."""
    if max_prompt_tokens is not None:
        return max_prompt_tokens
    context = model.config.get_text_config().max_position_embeddings
    return context - min(max_new_tokens, context // 2)


__all__ = ["PromptTooLong", "Visual", "degrade", "fit_request", "prompt_limit", "thin_clip"]
