"""Every limit on what comes from outside, with its default and how to set it; and the one exception type for input.

`MediaLimits` bounds one conversation wherever it is read: library, command line, server, demo and training;
`ServerLimits` and `DemoLimits` bound `infer.py serve` and `app.py`, with stricter `MediaLimits` of their own. What is
over a limit is refused with an `OmniInputError` that names the item, the limit and its field here. Ways to set one:

- in Python: `media_limits=MediaLimits(timeout=60)` of the processor's calls, `limits=` of loaders, `Server` and `Demo`;
- on the command line: `--limit timeout=60 --limit max_image_pixels=2e7` of ask, chat, batch, serve, eval and app.py;
- for every process, training too: OMNI_LIMITS="timeout=60 max_image_side=4096" in the environment.

`MAX_NESTING` is fixed. Limits that are part of a meaning stand with it: tokens of a prompt (`degrade.prompt_limit`),
of a training row (`row_tokens`), stop strings and tools of a request (`openai_request.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

VARIABLE = "OMNI_LIMITS"
MAX_NESTING = 64  # levels of lists and objects in tools, their arguments and results


class OmniInputError(ValueError):
    """Input that is refused: item, what was wrong, the limit, what to do next."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was asked for that is not there: Python's error, a GPU's, or a plain RuntimeError on the CPU."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return "MemoryError" in names or "OutOfMemoryError" in names or "can't allocate memory" in str(error)


@dataclass
class MediaLimits:
    """Every limit of media decoding and of a conversation, with its default. One instance is passed around; None
    anywhere means `default_limits()`."""

    max_bytes: int = 4 * 1024**3  # of a file, bytes object or data: URL
    max_url_bytes: int = 512 * 1024**2  # of a download
    max_decoded_bytes: int = 16 * 1024**3  # of all pixels and samples of a conversation, before they are resized
    max_text_chars: int = 16_000_000  # of a conversation (about a second of CPU a million)
    max_image_pixels: int = 80_000_000  # width * height of an image
    max_image_side: int = 32_768  # longer side of an image, in pixels
    max_image_scans: int = 100  # of a JPEG, each of which goes over all its pixels; cameras write about ten
    max_video_pixels: int = 8192 * 4320  # width * height of a video frame
    max_video_frames: int = 2048  # frames kept of one video
    max_video_bytes: int = 4 * 1024**3  # of the kept frames, uint8 RGB
    max_video_packets: int = 2_000_000  # frames of a video (5.5 hours at 100 fps), samples that a track claims
    max_video_edits: int = 100  # entries of an MP4's edit list, which may show one piece many times
    max_video_seconds: float = 5.5 * 3600  # of the chosen window of a video
    max_audio_seconds: float = 5.5 * 3600
    max_audio_channels: int = 64
    min_audio_rate: int = 1_000  # Hz
    max_audio_rate: int = 768_000  # Hz
    timeout: float = 300.0  # seconds of wall clock that decoding one item may take
    total_timeout: float = 1800.0  # and all items of a conversation together
    url_timeout: float = 30.0  # seconds that one download may take, redirects included
    max_redirects: int = 5
    allow_paths: bool = True  # False: strings are never file names (a server with foreign requests)
    allow_urls: bool = False  # http and https; data: URLs are always allowed
    private_hosts: tuple[str, ...] = ()  # "host:port" that may be loopback, private or link-local; others never


@dataclass
class ServerLimits:
    """What a server takes on, with the defaults."""

    max_body_bytes: int = 64 * 1024**2
    max_bodies_bytes: int = 512 * 1024**2  # of all requests that wait to be encoded
    body_seconds: float = 60.0  # for a request to arrive
    max_messages: int = 1024
    max_media: int = 64  # items of a request
    max_new_tokens: int | None = None  # of a request; None: as far as the context goes
    context: int | None = None  # tokens of prompt and answer; None: max_position_embeddings
    seconds: float = 600.0  # from arrival to the last token
    max_batch: int = 8
    batch_tokens: int = 65_536
    max_waiting: int = 64
    encoders: int = 2  # requests decoded and encoded at a time
    media: MediaLimits = field(default_factory=lambda: server_media_limits())


@dataclass
class DemoLimits:
    """What the demo takes on, with the defaults; the size of a file is `media.max_bytes`."""

    disk_bytes: int = 4 * 1024**3  # of the files of all sessions
    files: int = 8  # of a message
    characters: int = 20_000  # of a message
    turns: int = 50  # of a conversation
    sessions: int = 64
    idle_seconds: float = 3600.0  # a session that nobody has touched for so long is forgotten
    new_tokens: int = 16_384  # of reasoning and answer
    seconds: float = 300.0  # from sending to the last token
    waiting: int = 16  # answers that wait for the model
    batch: int = 4  # answers that run at a time
    decoders: int = 2  # messages decoded and encoded at a time
    decoded_bytes: int = 8 * 1024**3  # of the pictures, frames and sounds that all sessions hold
    cache_bytes: int = 1024**3  # states of conversations, and as much for features of media
    media: MediaLimits = field(default_factory=lambda: replace(server_media_limits(), allow_paths=True))  # of uploads


def server_media_limits() -> MediaLimits:
    """Of foreign requests: stricter than `MediaLimits()`, and no files."""
    return with_limits(
        MediaLimits(
            max_bytes=64 * 1024**2,
            max_url_bytes=64 * 1024**2,
            max_decoded_bytes=2 * 1024**3,
            max_text_chars=4_000_000,
            max_video_bytes=1024**3,
            max_video_frames=512,
            max_video_packets=500_000,
            max_audio_seconds=3600.0,
            max_video_seconds=3600.0,
            timeout=60.0,
            total_timeout=120.0,
            allow_paths=False,  # a client's "path" is never a file of the server
        ),
        os.environ.get(VARIABLE, "").split(),
    )


def default_limits() -> MediaLimits:
    """`MediaLimits` with what the environment variable OMNI_LIMITS says."""
    return _of_environment(os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=8)
def _of_environment(text: str) -> MediaLimits:
    return with_limits(MediaLimits(), text.split())


def with_limits(limits: MediaLimits, settings: list[str]) -> MediaLimits:
    """Sets fields from "name=value" texts, in place; 2e7 and 64_000 are numbers too.

    Raises:
        OmniInputError: an unknown name, or a value of another kind.
    """
    kinds = {entry.name: type(entry.default) for entry in fields(MediaLimits)}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in kinds:
            raise OmniInputError(f"there is no limit {name!r}; known: {', '.join(kinds)}")
        kind, value = kinds[name], None
        if kind is tuple:
            value = tuple(part for part in text.split(",") if part)
        elif kind is bool:
            value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
        else:
            try:
                number = float(text)
                value = kind(number) if number >= 0 and kind(number) == number else None
            except (ValueError, OverflowError):
                pass
        if value is None:
            wanted = {bool: "true or false", int: "a whole number of 0 or more"}.get(kind, "a number of 0 or more")
            raise OmniInputError(f"limit {name} is {text!r:.40}; give {wanted}")
        setattr(limits, name, value)
    return limits


__all__ = [
    "DemoLimits",
    "MediaLimits",
    "OmniInputError",
    "ServerLimits",
    "default_limits",
    "is_out_of_memory",
    "server_media_limits",
    "with_limits",
]
