"""Decoding of images, audio and video from path, bytes, file object, array, PIL or (when allowed) URL, under limits.

The first step of the pipeline (paper section 2): whatever a user hands over becomes plain arrays here, and every later
step may trust their shape, dtype and size. Limits are read from headers before pixels or samples are decoded, every
decode loop has a wall-clock guard, and every failure is one `OmniInputError` that names the item, the limit and the
next step.

image uint8 [H, W, 3] RGB; frames uint8 [T, H, W, 3] RGB; audio float32 [L] mono in [-1, 1].
"""

from .limits import MediaLimits, OmniInputError, default_limits
from .media_audio import load_audio, save_audio
from .media_image import load_image
from .media_video import VideoClip, load_video, sample_indices, save_video

__all__ = [
    "MediaLimits",
    "OmniInputError",
    "VideoClip",
    "default_limits",
    "load_audio",
    "load_image",
    "load_video",
    "sample_indices",
    "save_audio",
    "save_video",
]
