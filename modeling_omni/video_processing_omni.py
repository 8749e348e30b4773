"""Video front end of the vision tower: frames of one size, paired into tubelets (paper sections 2 and 4.6).

Every frame of a video is resized to a grid of about `video_target_num_patches` patches that keeps the aspect ratio; two
frames make a tubelet, which the tower embeds as one. A last odd frame is paired with itself, video by video.

Shapes: T frames, t = ceil(T / 2) tubelets, h, w patches, P2 = 2 * 3 * 16 * 16 values of a tubelet's patch: the first
frame's (channel, y, x), then the second's.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import VideoProcessorMixin

from .evs import kept_tokens
from .image_processing_omni import MERGE_SIZE, MIN_BUDGET_PATCHES, fit_media_budget, resize_frames, write_patches
from .media import OmniInputError, VideoClip, load_video

TUBELETS_AT_ONCE = 4  # resized before their patches are written: they stay in the cache, and memory small
SECONDS_PER_AUDIO_TOKEN = 0.08  # 8 mel frames of 10 ms; 375 tokens in a clip of 30 s


def video_grid(
    height: int,
    width: int,
    target_patches: int = 1024,
    maintain_aspect_ratio: bool = True,
    merge_size: int = MERGE_SIZE,
) -> tuple[int, int]:
    """Patch grid (h, w) of the frames of a `height` x `width` video: even sides, about `target_patches` patches."""
    if not maintain_aspect_ratio:
        side = max(merge_size, int(math.sqrt(target_patches)) // merge_size * merge_size)
        return side, side
    aspect = width / height
    h = max(1, round(math.sqrt(target_patches / aspect)))
    w = max(1, round(math.sqrt(target_patches * aspect)))
    h_up, w_up = -(-h // merge_size) * merge_size, -(-w // merge_size) * merge_size
    if h_up * w_up <= target_patches:
        return h_up, w_up
    h = max(merge_size, h // merge_size * merge_size)
    w = max(merge_size, w // merge_size * merge_size)
    if h * w > target_patches:  # sides of more than about 500:1; the released processor would overshoot without limit
        longest = max(merge_size, target_patches // merge_size // merge_size * merge_size)
        h, w = min(h, longest), min(w, longest)
    return h, w


def num_tubelets(num_frames: int, temporal_patch_size: int = 2) -> int:
    return -(-num_frames // temporal_patch_size)


def as_video_list(videos) -> list:
    """One video or any nesting of lists of videos -> flat list. A list of pictures (PIL or [H, W, 3]) is one video."""
    if videos is None:
        return []
    if isinstance(videos, list) and not _is_frame_list(videos):
        return [video for item in videos for video in as_video_list(item)]
    return [videos]


def _is_frame_list(value) -> bool:
    if not isinstance(value, list) or not value:
        return False
    first = value[0]
    return hasattr(first, "getbands") or (isinstance(first, (np.ndarray, torch.Tensor)) and first.ndim == 3)


def frame_labels(clip: VideoClip, frames_per_tubelet: int = 2) -> list[str]:
    """Text in front of each tubelet, e.g. "Frame 1 sampled at 0.00 seconds and frame 2 sampled at 0.50 seconds: ".

    The time is the source frame's index times the frame duration cut to whole milliseconds, as the model was trained;
    without a frame rate there is no time.
    """
    times = [""] * len(clip.frames)
    if clip.fps:
        frame_ms = int(1000.0 / clip.fps)
        indices = clip.frame_indices if clip.frame_indices is not None else range(len(times))
        times = [f" sampled at {int(index) * frame_ms / 1000.0:.2f} seconds" for index in indices]
    labels = []
    for first in range(0, len(times), frames_per_tubelet):
        frames = range(first, min(first + frames_per_tubelet, len(times)))
        labels.append(" and ".join(f"{'Frame' if i == first else 'frame'} {i + 1}{times[i]}" for i in frames) + ": ")
    return labels


def tubelet_audio_counts(
    clip: VideoClip, audio_tokens: int, sound_start: float = 0.0, frames_per_tubelet: int = 2
) -> list[int]:
    """Sound tokens that follow each tubelet when sound and frames are interleaved in order of time.

    A token goes after the last tubelet that has begun by then: tokens before the second tubelet's first frame follow
    the first tubelet, and so on; the last tubelet takes the rest. Without a frame rate the tubelets are spread evenly
    over the sound.
    """
    firsts = range(0, len(clip.frames), frames_per_tubelet)
    if clip.fps:
        indices = clip.frame_indices if clip.frame_indices is not None else range(len(clip.frames))
        starts = [indices[i] / clip.fps - sound_start for i in firsts]
    else:
        seconds = audio_tokens * SECONDS_PER_AUDIO_TOKEN
        starts = [i * seconds / len(firsts) for i in range(len(firsts))]
    # tokens before a time: index * 0.08 < time; 30 s hold exactly 375, so clips need no case of their own
    bounds = [min(audio_tokens, max(0, int(np.ceil(round(time / SECONDS_PER_AUDIO_TOKEN, 6))))) for time in starts[1:]]
    bounds = [0, *np.maximum.accumulate(bounds).tolist(), audio_tokens] if bounds else [0, audio_tokens]
    return [end - begin for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


class OmniVideoProcessorKwargs(VideosKwargs, total=False):
    patch_size: int
    downsample_ratio: float
    norm_mean: list[float]
    norm_std: list[float]
    video_target_num_patches: int
    video_maintain_aspect_ratio: bool
    video_temporal_patch_size: int


class OmniVideoProcessor(VideoProcessorMixin):
    """Videos to flat tubelet patches. The defaults are the released model's.

    Args:
        patch_size, downsample_ratio, norm_mean, norm_std: as for `OmniImageProcessor`.
        video_target_num_patches (`int`): patches of a frame, about.
        video_maintain_aspect_ratio (`bool`): `False` makes every frame square.
        video_temporal_patch_size (`int`): frames of a tubelet.
    """

    valid_kwargs = OmniVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __init__(
        self,
        patch_size: int = 16,
        downsample_ratio: float = 0.5,
        norm_mean: Sequence[float] | None = None,
        norm_std: Sequence[float] | None = None,
        video_target_num_patches: int = 1024,
        video_maintain_aspect_ratio: bool = True,
        video_temporal_patch_size: int = 2,
        **kwargs,
    ):
        norm_mean = norm_mean or kwargs.get("image_mean") or OPENAI_CLIP_MEAN
        norm_std = norm_std or kwargs.get("image_std") or OPENAI_CLIP_STD
        super().__init__()
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        self.norm_mean = list(norm_mean)
        self.norm_std = list(norm_std)
        self.video_target_num_patches = video_target_num_patches
        self.video_maintain_aspect_ratio = video_maintain_aspect_ratio
        self.video_temporal_patch_size = video_temporal_patch_size

    @property
    def merge_size(self) -> int:
        return round(1 / self.downsample_ratio)

    def grid(
        self,
        num_frames: int,
        height: int,
        width: int,
        scale: float = 1.0,
        target_patches: int | None = None,
        max_patches: int | None = None,
    ) -> tuple[int, int, int]:
        """(t, h, w) of a video; `scale` < 1 shrinks every frame to that share of its patches, of which it has no more
        than `max_patches` to begin with.

        `target_patches` stands in for `video_target_num_patches` for this video.
        """
        target = self.video_target_num_patches if target_patches is None else target_patches
        h, w = video_grid(height, width, target, self.video_maintain_aspect_ratio, self.merge_size)
        limit = int(scale * min(h * w, h * w if max_patches is None else max_patches))
        if limit < h * w:
            target = min(h * w, max(MIN_BUDGET_PATCHES, limit))
            h, w = video_grid(height, width, target, self.video_maintain_aspect_ratio, self.merge_size)
        return num_tubelets(num_frames, self.video_temporal_patch_size), h, w

    def num_tokens(
        self,
        num_frames: int,
        height: int,
        width: int,
        pruning_rate: float = 0.0,
        scale: float = 1.0,
        target_patches: int | None = None,
        max_patches: int | None = None,
    ) -> int:
        """Language-model tokens of a video, after EVS when `pruning_rate` is more than 0."""
        t, h, w = self.grid(num_frames, height, width, scale, target_patches, max_patches)
        return kept_tokens(t, h * w // self.merge_size**2, pruning_rate)

    def patches(self, videos: Sequence[tuple[np.ndarray, int, int]]) -> torch.Tensor:
        """uint8 RGB [T, H, W, 3] and the grid h, w of every video -> normalised tubelets float32 [sum t * h * w, P2].

        An odd number of frames is filled up with the last one.
        """
        p, s = self.patch_size, self.video_temporal_patch_size
        sizes = [num_tubelets(len(frames), s) * h * w for frames, h, w in videos]
        patches = torch.empty(sum(sizes), s * 3 * p * p)
        for (frames_THWC, h, w), part in zip(videos, patches.split(sizes)):
            frames_THWC = torch.from_numpy(np.require(frames_THWC, requirements=["C", "W"]))
            pieces = zip(frames_THWC.split(TUBELETS_AT_ONCE * s), part.split(TUBELETS_AT_ONCE * h * w))
            for piece_THWC, piece in pieces:
                pixels_TCHW = resize_frames(piece_THWC, h * p, w * p)
                if missing := -len(pixels_TCHW) % s:
                    pixels_TCHW = torch.cat([pixels_TCHW, pixels_TCHW[-1:].expand(missing, -1, -1, -1)])
                write_patches(pixels_TCHW, self.norm_mean, self.norm_std, p, piece)
        return patches

    def preprocess(
        self, videos, return_tensors: str | None = "pt", max_media_tokens: int | None = None, **kwargs
    ) -> BatchFeature:
        """Tubelet patches of one video or any nesting of lists of videos.

        Args:
            videos: paths, bytes, arrays [T, H, W, 3], lists of pictures, (frames, fps) tuples or `VideoClip`s.
            max_media_tokens (`int`, *optional*): tokens that all videos together may cost (`fit_media_budget`).
            kwargs: any constructor option, for this call only; `num_frames` and `fps` go to `media.load_video`.

        Returns:
            `pixel_values_videos` float32 [sum t * h * w, P2] and `video_grid_thw` long [n, 3].

        Raises:
            OmniInputError: no video, an unreadable one, or a budget too small.
        """
        options = {key: value for key, value in kwargs.items() if key in self.__dict__ and value is not None}
        processor = type(self)(**{**self.to_dict(), **options}) if options else self
        sampling = {key: kwargs[key] for key in ("num_frames", "fps") if kwargs.get(key) is not None}
        clips = [
            video if isinstance(video, VideoClip) else load_video(video, audio="off", **sampling)
            for video in as_video_list(videos)
        ]
        if not clips:
            raise OmniInputError("no video was given: pass a video or a list of videos")
        sizes = [clip.frames.shape[:3] for clip in clips]
        scale = fit_media_budget(
            [lambda s, size=size: processor.num_tokens(*size, scale=s) for size in sizes], max_media_tokens
        )
        grids = [processor.grid(*size, scale) for size in sizes]
        items = [(clip.frames, h, w) for clip, (_, h, w) in zip(clips, grids, strict=True)]
        data = {
            "pixel_values_videos": processor.patches(items),
            "video_grid_thw": torch.tensor(grids),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def __call__(self, videos, **kwargs) -> BatchFeature:
        return self.preprocess(videos, **kwargs)

    def to_dict(self) -> dict:
        names = ("patch_size", "downsample_ratio", "norm_mean", "norm_std", "video_target_num_patches")
        names += ("video_maintain_aspect_ratio", "video_temporal_patch_size")
        return {name: getattr(self, name) for name in names} | {"video_processor_type": type(self).__name__}


__all__ = ["OmniVideoProcessor", "frame_labels", "num_tubelets", "tubelet_audio_counts", "video_grid"]
