"""Media of one sample: decoded, and their grids planned from sizes alone, before any pixel is resized.

Shapes: H, W pixels; L samples of sound; t, h, w tubelets and patches of a grid.
"""

from dataclasses import dataclass, field

from .call_inputs import CallOptions
from .feature_extraction_omni import num_audio_tokens
from .image_processing_omni import fit_media_budget
from .media import OmniInputError, VideoClip, load_audio, load_image, load_video
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
    limits, hertz = options.media_limits, processor.feature_extractor.sampling_rate
    for kind, part in parts:
        source = media_source(kind, part)
        if kind == "image":
            media.images.append(load_image(source, limits))
            media.image_limits.append(_max_patches(part))
        elif kind == "audio":
            media.audios.append(load_audio(source, hertz, limits, options.sampling_rate or hertz))
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
            media.video_limits.append(_max_patches(part))
    if media.images or media.videos:
        plan_grids(processor, media, options)
    return media


def _max_patches(part: dict) -> int | None:
    patches = part.get("max_patches")
    if patches is not None and (isinstance(patches, bool) or not isinstance(patches, int) or patches < 1):
        raise OmniInputError(f"max_patches of a part is {patches!r:.40}; give a whole number of patches, 1 or more")
    return patches


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
