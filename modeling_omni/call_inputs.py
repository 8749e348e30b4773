"""What callers pass beside messages: call options, and media in every nesting that is in use.

One list over a batch or one list per sample, single items, arrays with their metadata, transformers' nested groups of
keyword arguments: all of it is brought into one form here.
"""

import os
from dataclasses import dataclass, fields

import numpy as np

from .image_processing_omni import as_image_list
from .media import MediaLimits, OmniInputError, VideoClip, load_video
from .prompt_omni import escape_tree
from .video_processing_omni import as_video_list


@dataclass
class CallOptions:
    """Options of one call that are not variables of the template (documented in `apply_chat_template`)."""

    padding: bool | str | None = None
    padding_side: str = "left"
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    truncation: bool = False
    return_tensors: str | None = None
    return_labels: bool = False
    return_assistant_tokens_mask: bool = False
    sampling_rate: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    use_audio_in_video: bool | None = None
    video_pruning_rate: float | None = None
    video_target_num_patches: int | None = None
    max_media_tokens: int | None = None
    media_limits: MediaLimits | None = None
    count_only: bool = False


OPTION_NAMES = frozenset(option.name for option in fields(CallOptions))
# Options of transformers that change nothing here: prompts hold all their special tokens, supplied text is always kept
# apart from them, and mm_token_type_ids always come with media.
IGNORED_OPTIONS = frozenset(
    ("add_special_tokens", "sanitize_control_tokens", "return_mm_token_type_ids", "return_attention_mask")
    + ("return_token_type_ids", "return_metadata", "do_sample_frames", "common_kwargs")
)


def split_options(kwargs: dict, variables: frozenset[str] = frozenset()) -> tuple[CallOptions, dict]:
    """Keyword arguments -> call options and template variables; transformers' nested groups are flattened."""
    flat = {}
    for key, value in kwargs.items():
        group = key in ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "chat_template_kwargs")
        flat |= value or {} if group else {key: value}
    if "load_audio_from_video" in flat:
        flat.setdefault("use_audio_in_video", flat.pop("load_audio_from_video"))
    options, rest = {}, {}
    for key, value in flat.items():
        if key in OPTION_NAMES:
            options[key] = value
        elif key in variables:
            rest[key] = escape_tree(value)
        elif key not in IGNORED_OPTIONS:
            raise OmniInputError(f"unknown option {key!r}; known: {', '.join(sorted(OPTION_NAMES | variables))}")
    options = CallOptions(**options)
    if options.padding_side not in ("left", "right"):
        raise OmniInputError(f"padding_side is {options.padding_side!r}; use 'left' or 'right'")
    if options.return_tensors not in (None, "pt"):
        raise OmniInputError(f"return_tensors is {options.return_tensors!r}; use 'pt', or None for lists")
    if options.video_pruning_rate is not None:
        check_pruning_rate(options.video_pruning_rate)
    target = options.video_target_num_patches
    if target is not None and (not isinstance(target, int) or target < 4):
        raise OmniInputError(f"video_target_num_patches is {target!r}; give a whole number of patches, 4 or more")
    return options, rest


def check_pruning_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise OmniInputError(f"video_pruning_rate is {rate}; give a share from 0 (off) to below 1")


def as_audio_list(audio) -> list:
    """One audio or any nesting of lists of them -> flat list. A (waveform, rate) tuple is one audio."""
    if audio is None:
        return []
    if isinstance(audio, list) and not (audio and isinstance(audio[0], (int, float))):
        return [item for part in audio for item in as_audio_list(part)]
    return [np.asarray(audio, np.float32) if isinstance(audio, list) else audio]


AS_LIST = {"image": as_image_list, "video": as_video_list, "audio": as_audio_list}


def share_out(kind: str, items, places: list[int]) -> list[list]:
    """Media given as one list over a batch, or as one list per sample -> one list per sample, as many as it has places.

    Raises:
        OmniInputError: another number of items than places, naming sample, kind, places and items.
    """
    flatten = AS_LIST[kind]
    if isinstance(items, (list, tuple)) and len(places) > 1 and len(items) == len(places):
        nested = [flatten(own) for own in items]
        if [len(own) for own in nested] == places:
            return nested
        if all(own is None or isinstance(own, (list, tuple)) for own in items) and kind != "video":
            i = next(i for i, own in enumerate(nested) if len(own) != places[i])
            raise OmniInputError(
                f"sample {i}: the prompt has {places[i]} {kind} place(s) but {len(nested[i])} {kind} item(s) were "
                "given; give one per place"
            )
    flat = flatten(items)
    if len(flat) != sum(places):
        raise OmniInputError(
            f"the {len(places)} prompt(s) have {sum(places)} {kind} place(s) but {len(flat)} {kind} item(s) were "
            "given; give one per place"
        )
    shared = []
    for count in places:
        shared.append(flat[:count])
        flat = flat[count:]
    return shared


def with_metadata(videos: list, metadata) -> list:
    """Videos given as frames, with transformers' metadata (`fps`, `frames_indices`) -> clips."""
    metadata = metadata if isinstance(metadata, (list, tuple)) else [metadata]
    flat = [item for entry in metadata for item in (entry if isinstance(entry, (list, tuple)) else [entry])]
    if len(flat) != len(videos):
        raise OmniInputError(f"{len(videos)} video(s) but {len(flat)} video_metadata were given; give one per video")
    clips = []
    for video, entry in zip(videos, flat, strict=True):
        entry = entry if isinstance(entry, dict) or entry is None else vars(entry)
        if entry is not None:
            if isinstance(video, (str, bytes, os.PathLike)):
                raise OmniInputError("video_metadata is for videos given as frames; a file brings its own")
            clip = load_video(video)
            indices = entry.get("frames_indices")
            if indices is not None and len(indices) != len(clip.frames):
                raise OmniInputError(f"video_metadata names {len(indices)} frames but the video has {len(clip.frames)}")
            indices = list(range(len(clip.frames))) if indices is None else [int(index) for index in indices]
            video = VideoClip(clip.frames, indices, entry.get("fps"), entry.get("duration"), clip.audio)
        clips.append(video)
    return clips
