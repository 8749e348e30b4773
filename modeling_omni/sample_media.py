"""Media of one sample: decoded, and their grids planned from sizes alone, before any pixel is resized.

Shapes: H, W pixels; L samples of sound; t, h, w tubelets and patches of a grid.
"""

import math
import time
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

from .call_inputs import CallOptions
from .feature_extraction_omni import num_audio_tokens
from .image_processing_omni import fit_media_budget
from .media import MediaLimits, OmniInputError, VideoClip, default_limits, load_audio, load_image, load_video
from .prompt_omni import media_source


@dataclass
class SampleMedia:
    """Media of one sample in order of appearance, with what was planned for them."""

    images: list = field(default_factory=list)  # uint8 [H, W, 3]
    videos: list[VideoClip] = field(default_factory=list)
    audios: list = field(default_factory=list)  # float32 [L]; sounds of videos apart
    sounds: list = field(default_factory=list)  # of each video: float32 [L] or None
    image_limits: list[int | None] = field(default_factory=list)  # patches at most, as the part says
    video_limits: list[int | None] = field(default_factory=list)  # of a frame
    image_grids: list[tuple[int, int]] = field(default_factory=list)  # (h, w)
    video_grids: list[tuple[int, int, int]] = field(default_factory=list)  # (t, h, w)


def load_media(processor, parts: list[tuple[str, dict]], options: CallOptions) -> SampleMedia:
    """Decodes the media parts (kind, part) of one sample and plans their grids.

    Raises:
        OmniInputError: one cannot be read, or all of them do not fit into `max_media_tokens`.
    """
    media = SampleMedia()
    given, hertz = options.media_limits or default_limits(), processor.feature_extractor.sampling_rate
    until, decoded = time.monotonic() + given.total_timeout, 0
    for kind, part in parts:
        check_part(kind, part)
        source = media_source(kind, part)
        limits = replace(given, timeout=min(given.timeout, _time_left(until, len(parts), given)))
        if kind == "image":
            media.images.append(load_image(source, limits))
            media.image_limits.append(part.get("max_patches"))
            decoded += media.images[-1].nbytes
        elif kind == "audio":
            media.audios.append(load_audio(source, hertz, limits, options.sampling_rate or hertz))
            decoded += media.audios[-1].nbytes
        else:
            sound = "off" if options.use_audio_in_video is False else part.get("audio", "auto")
            choice = {
                key: getattr(options, key, None) if part.get(key) is None else part[key]
                for key in ("num_frames", "fps", "max_frames", "start", "end")
            }
            caps = [cap for cap in (choice["max_frames"], options.max_frames) if cap is not None]
            choice["max_frames"] = min(caps, default=None)  # a part may ask for fewer frames, never for more
            clip = load_video(source, audio=sound, limits=limits, **choice)
            media.videos.append(clip)
            media.sounds.append(None if sound == "off" else clip.audio)
            media.video_limits.append(part.get("max_patches"))
            decoded += clip.frames.nbytes + (0 if clip.audio is None else clip.audio.nbytes)
        if decoded > given.max_decoded_bytes:
            raise OmniInputError(
                f"the {len(parts)} media items of a conversation: {decoded} bytes are decoded after "
                f"{len(media.images) + len(media.videos) + len(media.audios)} of them; limit {given.max_decoded_bytes} "
                "(MediaLimits.max_decoded_bytes); send fewer or smaller ones"
            )
    if media.images or media.videos or options.max_media_tokens is not None:
        plan_grids(processor, media, options)
    return media


def _time_left(until: float, count: int, limits: MediaLimits) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise OmniInputError(
            f"the {count} media items of a conversation: decoding takes too long; limit {limits.total_timeout:g} s "
            "(MediaLimits.total_timeout); send fewer or smaller ones"
        )
    return left


# options of a media part: (what they must be, in words, and as a check)
PART_OPTIONS = {
    **dict.fromkeys(
        ("num_frames", "max_frames", "max_patches"),
        ("a whole number, 1 or more", lambda value: isinstance(value, Integral) and value >= 1),
    ),
    "fps": ("a number above 0", lambda value: isinstance(value, Real) and 0 < value < math.inf),
    **dict.fromkeys(
        ("start", "end"),
        ("seconds, 0 or more", lambda value: isinstance(value, Real) and 0 <= value < 1e9),
    ),
    "sampling_rate": ("a rate in Hz", lambda value: isinstance(value, Real) and 0 < value < math.inf),
    "audio": ("'auto', 'on' or 'off'", lambda value: value in ("auto", "on", "off")),
}


def check_part(kind: str, part: dict) -> None:
    """Raises OmniInputError for options of a media part that are of another kind."""
    for key, (wanted, fits) in PART_OPTIONS.items():
        value = part.get(key)
        if value is None or key == "audio" and (kind != "video" or not isinstance(value, (str, bool, int))):
            continue  # "audio" is also where a part of sound has its source
        if isinstance(value, bool) or not fits(value):
            raise OmniInputError(f"{key} of a part of type {kind!r} is {value!r:.40}; give {wanted}")


def plan_grids(processor, media: SampleMedia, options: CallOptions) -> None:
    """Fills `image_grids` and `video_grids`: each item's own size, or what `max_media_tokens` leaves of it."""
    images = [image.shape[:2] for image in media.images]
    videos = [clip.frames.shape[:3] for clip in media.videos]
    rate, count, target = pruning_rate(processor, options), len(images), options.video_target_num_patches
    image_front, video_front = processor.image_processor, processor.video_processor
    budget, scale = options.max_media_tokens, 1.0
    if budget is not None:
        sounds = [*media.audios, *(sound for sound in media.sounds if sound is not None)]
        budget -= sum(audio_tokens(processor, sound) for sound in sounds)
        tokens_at = [
            lambda s, size=size, limit=limit: image_front.num_tokens(*size, count, s, limit)
            for size, limit in zip(images, media.image_limits, strict=True)
        ]
        tokens_at += [
            lambda s, size=size, limit=limit: video_front.num_tokens(*size, rate, s, target, limit)
            for size, limit in zip(videos, media.video_limits, strict=True)
        ]
        scale = fit_media_budget(tokens_at, budget)
    media.image_grids = [
        image_front.grid(*size, count, scale, limit) for size, limit in zip(images, media.image_limits, strict=True)
    ]
    media.video_grids = [
        video_front.grid(*size, scale, target, limit) for size, limit in zip(videos, media.video_limits, strict=True)
    ]


def pruning_rate(processor, options: CallOptions) -> float:
    """Share of video tokens that EVS drops: the call's, else the processor's."""
    return processor.video_pruning_rate if options.video_pruning_rate is None else options.video_pruning_rate


def audio_tokens(processor, waveform) -> int:
    """Tokens of one sound, float32 [L]."""
    extractor = processor.feature_extractor
    return num_audio_tokens(len(waveform), extractor.clip_samples, extractor.min_clip_samples, extractor.hop_length)
