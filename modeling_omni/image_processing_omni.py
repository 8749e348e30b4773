"""Image front end of the vision tower: dynamic resolution, normalisation and patches (paper section 2).

An image keeps its aspect ratio and gets a grid of 16 x 16 patches between `min_num_patches` and `max_num_patches`; both
sides of the grid are even because the projector merges 2 x 2 patches into one language-model token. The token count is
known from the height and width alone. A whole request can be held to a token budget (`fit_media_budget`).

Shapes: H, W pixels; h, w patches; P = 3 * 16 * 16 values of a patch, ordered (channel, y, x); C = 3.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import ImagesKwargs

from .media import OmniInputError, load_image

MERGE_SIZE = 2  # patches per side that the projector merges into one token
MIN_BUDGET_PATCHES = 16  # a token budget never shrinks an image or tubelet below this (4 tokens)
RESIZE_BLOCK = 32  # outputs that one product of a resize makes


def image_grid(
    height: int,
    width: int,
    budget: int = 13312,
    min_patches: int = 1024,
    patch_size: int = 16,
    merge_size: int = MERGE_SIZE,
) -> tuple[int, int]:
    """Patch grid (h, w) that an image of `height` x `width` pixels is resized to.

    Both sides are multiples of `merge_size`, h * w is at most `budget`, and at least about `min_patches` when the
    budget is larger than that. The arithmetic, its rounding and its order are the released processor's; only images
    with sides so unequal (about 800:1 and more) that it would fail or leave the budget are treated otherwise: their
    long side is cut to fit.
    """
    # Python rounds halves to even: a side of exactly k patches stays k when k is even and becomes k + 1 when odd.
    h = round(height / patch_size + 0.5)
    w = round(width / patch_size + 0.5)
    shrink = min(math.sqrt(budget / (h * w)), 1.0)
    h = max(1, math.floor(shrink * h))
    w = max(1, math.floor(shrink * w))
    if budget > min_patches > h * w:
        grow = math.sqrt(min_patches / (h * w))
        h = math.ceil(grow * h)
        w = math.ceil(grow * w)
    if h % merge_size:
        up, down = h + merge_size - h % merge_size, h - h % merge_size
        h = up if up * w <= budget else max(merge_size, down)
    if w % merge_size:
        up, down = w + merge_size - w % merge_size, w - w % merge_size
        w = up if h * up <= budget else max(merge_size, down)
    if h * w > budget:
        if h > w:
            h = max(merge_size, budget // w // merge_size * merge_size)
        else:
            w = max(merge_size, budget // h // merge_size * merge_size)
    return h, w


@lru_cache(maxsize=64)
def _resampling(size: int, target: int) -> list[tuple[int, int, int, int, torch.Tensor]]:
    """Bicubic, antialiased resampling of a side of `size` pixels to `target`, as a banded matrix.

    Returns:
        (start, stop, first, last, weights [stop - start, last - first]) of every block of outputs start..stop: the
        block is `weights` times the inputs first..last. Weights as PIL's and PyTorch's: Keys' cubic with a = -0.5,
        stretched when shrinking, cut off and renormalised at the edges.
    """
    scale = torch.tensor(size / target, dtype=torch.float32)  # float32 throughout, as in `interpolate`
    stretch = scale.clamp(min=1)
    centers = (torch.arange(target) + 0.5) * scale
    first = (centers - 2 * stretch + 0.5).long().clamp(min=0)  # of the inputs that an output reads
    last = (centers + 2 * stretch + 0.5).long().clamp(max=size)
    inputs = first[:, None] + torch.arange(int((last - first).max()))
    x = ((inputs - centers[:, None] + 0.5) / stretch).abs()
    cubic = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    cubic = cubic * ((x < 2) & (inputs < last[:, None]))
    cubic /= cubic.sum(1, keepdim=True)
    blocks = []
    for start in range(0, target, RESIZE_BLOCK):
        stop = min(start + RESIZE_BLOCK, target)
        low, high = int(first[start]), int(last[stop - 1])
        columns = inputs[start:stop] - low
        weights = torch.zeros(stop - start, max(high - low, int(columns.max()) + 1))
        weights.scatter_(1, columns, cubic[start:stop])
        blocks.append((start, stop, low, high, weights[:, : high - low]))
    return blocks


def resize_frames(frames_THWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 or float [T, H, W, 3] in 0..255 -> float32 [T, 3, height, width]: bicubic, antialiased, not clamped.

    The overshoot of the bicubic filter is kept, as in the released processor. Frames of that size are not resampled.
    Frames that shrink much read many pixels for one: as banded products that is twice as fast as `interpolate`.
    """
    count, old_height, old_width = frames_THWC.shape[:3]
    frames_TCHW = frames_THWC.permute(0, 3, 1, 2)
    if (old_height, old_width) == (height, width):
        return frames_TCHW.float()
    if min(old_height / height, old_width / width) < 1.5:
        resized = [
            F.interpolate(frame[None].float(), (height, width), mode="bicubic", antialias=True) for frame in frames_TCHW
        ]
        return torch.cat(resized) if count > 1 else resized[0]
    resized = torch.empty(count, 3, height, width)
    shorter = torch.empty(height, old_width * 3)
    for frame_HWC, target in zip(frames_THWC, resized):
        rows = frame_HWC.reshape(old_height, -1).float()
        for start, stop, first, last, weights in _resampling(old_height, height):
            torch.mm(weights, rows[first:last], out=shorter[start:stop])
        lines = shorter.view(height, old_width, 3).permute(2, 0, 1).reshape(-1, old_width)  # [3 height, W]
        target = target.view(-1, width)
        for start, stop, first, last, weights in _resampling(old_width, width):
            torch.mm(lines[:, first:last], weights.t(), out=target[:, start:stop])
    return resized


def write_patches(
    pixels_TCHW: torch.Tensor, mean: list[float], std: list[float], patch_size: int, patches: torch.Tensor
) -> None:
    """Pixels in 0..255 -> zero mean, unit variance per channel, in patches, row by row.

    pixels [T, 3, h p, w p] -> patches [t * h * w, T / t * 3 * p * p], which are given and filled.
    """
    _, _, height, width = pixels_TCHW.shape
    p, h, w = patch_size, height // patch_size, width // patch_size
    frames = patches.shape[1] // (3 * p * p)
    view = pixels_TCHW.view(-1, frames, 3, h, p, w, p).permute(0, 3, 5, 1, 2, 4, 6)  # [t, h, w, s, 3, p, p]
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    patches = patches.view(view.shape)
    torch.mul(view, scale.float().view(3, 1, 1), out=patches).add_(shift.float().view(3, 1, 1))


def fit_media_budget(tokens_at: Sequence[Callable[[float], int]], budget: int | None) -> float:
    """Share of its own resolution that every image and video of a request may keep so that all fit into a token budget.

    `tokens_at` holds one function per item: tokens of the item when its patch budget is scaled by a factor in (0, 1].
    The rule: one factor for all items, the largest of 1, 0.97, 0.97 ** 2, ... whose total fits. So large items give
    most, small ones keep at least 4 tokens.

    Raises:
        OmniInputError: even the smallest size of every item does not fit.
    """
    scale = 1.0
    if budget is None or (not tokens_at and budget >= 0):
        return scale
    total = sum(tokens(scale) for tokens in tokens_at)
    while total > budget:
        scale *= 0.97
        if scale < 1e-5:
            raise OmniInputError(
                f"the media need at least {total} tokens but the budget leaves {budget}; raise max_media_tokens, "
                "send fewer items or sample fewer video frames"
            )
        total = sum(tokens(scale) for tokens in tokens_at)
    return scale


def as_image_list(images) -> list:
    """One image or any nesting of lists of them -> flat list. Arrays [N, H, W, 3] count as N images."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in as_image_list(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


class OmniImageProcessorKwargs(ImagesKwargs, total=False):
    patch_size: int
    downsample_ratio: float
    norm_mean: list[float]
    norm_std: list[float]
    min_num_patches: int
    max_num_patches: int
    max_model_len: int | None


class OmniImageProcessor(BaseImageProcessor):
    """Images of any size to flat patches. The defaults are the released model's.

    Args:
        patch_size (`int`): side of a patch in pixels.
        downsample_ratio (`float`): pixel shuffle of the projector; its reciprocal is `merge_size`.
        norm_mean, norm_std (`list[float]`): per channel, for pixels in 0..1.
        min_num_patches, max_num_patches (`int`): patches of an image; a maximum of 0 stands for no maximum.
        max_model_len (`int`, *optional*): context length in tokens; bounds the patches of one image where that is less
            than `max_num_patches`.
    """

    valid_kwargs = OmniImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(
        self,
        patch_size: int = 16,
        downsample_ratio: float = 0.5,
        norm_mean: Sequence[float] | None = None,
        norm_std: Sequence[float] | None = None,
        min_num_patches: int = 1024,
        max_num_patches: int = 13312,
        max_model_len: int | None = 16384,
        **kwargs,
    ):
        # transformers' native class saves the statistics under other names, and its many generic options
        norm_mean = norm_mean or kwargs.get("image_mean") or OPENAI_CLIP_MEAN
        norm_std = norm_std or kwargs.get("image_std") or OPENAI_CLIP_STD
        super().__init__()
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        self.norm_mean = list(norm_mean)
        self.norm_std = list(norm_std)
        self.min_num_patches = min_num_patches
        self.max_num_patches = max_num_patches
        self.max_model_len = max_model_len

    @property
    def merge_size(self) -> int:
        """Patches per side that make one token (the name TRL reads)."""
        return round(1 / self.downsample_ratio)

    def patch_budget(self, num_images: int = 1) -> int:
        """Patches that each of `num_images` images of a request may have."""
        budget = self.max_num_patches or 2**31
        if self.max_model_len is not None:
            context = (self.max_model_len - 4) * self.merge_size**2
            budget = min(budget, max(context, self.min_num_patches * num_images))
        return max(budget, self.min_num_patches)

    def grid(
        self, height: int, width: int, num_images: int = 1, scale: float = 1.0, max_patches: int | None = None
    ) -> tuple[int, int]:
        """Patch grid (h, w) of an image among `num_images`; `scale` < 1 shrinks it to that share of its patches, of
        which it has no more than `max_patches` to begin with."""
        budget, floor = self.patch_budget(num_images), self.min_num_patches
        h, w = image_grid(height, width, budget, floor, self.patch_size, self.merge_size)
        limit = int(scale * min(h * w, h * w if max_patches is None else max_patches))
        if limit < h * w:
            budget = min(h * w, max(MIN_BUDGET_PATCHES, limit))
            h, w = image_grid(height, width, budget, min(floor, budget), self.patch_size, self.merge_size)
        return h, w

    def num_tokens(
        self, height: int, width: int, num_images: int = 1, scale: float = 1.0, max_patches: int | None = None
    ) -> int:
        """Language-model tokens of an image of that many pixels, known before anything is encoded."""
        h, w = self.grid(height, width, num_images, scale, max_patches)
        return h * w // self.merge_size**2

    def patches(self, images: Sequence[tuple[np.ndarray, int, int]]) -> torch.Tensor:
        """uint8 RGB [H, W, 3] and the grid h, w of every image -> normalised patches float32 [sum of h * w, P]."""
        p = self.patch_size
        sizes = [h * w for _, h, w in images]
        patches = torch.empty(sum(sizes), 3 * p * p)
        for (image_HWC, h, w), part in zip(images, patches.split(sizes)):
            pixels_1HWC = torch.from_numpy(np.require(image_HWC, requirements=["C", "W"]))[None]
            write_patches(resize_frames(pixels_1HWC, h * p, w * p), self.norm_mean, self.norm_std, p, part)
        return patches

    def preprocess(
        self, images, return_tensors: str | None = "pt", max_media_tokens: int | None = None, **kwargs
    ) -> BatchFeature:
        """Patches of one image or any nesting of lists of images.

        Args:
            images: paths, bytes, PIL images or arrays [H, W, 3] (see `media.load_image`).
            max_media_tokens (`int`, *optional*): tokens that all images together may cost; their resolution is lowered
                by the rule of `fit_media_budget`.
            kwargs: any constructor option, for this call only.

        Returns:
            `pixel_values` float32 [sum h * w, P] and `image_grid_thw` long [n, 3], rows (1, h, w).

        Raises:
            OmniInputError: no image, an unreadable one, or a budget too small.
        """
        options = {key: value for key, value in kwargs.items() if key in self.__dict__ and value is not None}
        processor = type(self)(**{**self.to_dict(), **options}) if options else self
        arrays = [load_image(image) for image in as_image_list(images)]
        if not arrays:
            raise OmniInputError("no image was given: pass an image or a list of images")
        sizes = [array.shape[:2] for array in arrays]
        count = len(sizes)
        scale = fit_media_budget(
            [lambda s, size=size: processor.num_tokens(*size, count, s) for size in sizes], max_media_tokens
        )
        grids = [processor.grid(*size, count, scale) for size in sizes]
        data = {
            "pixel_values": processor.patches([(array, *grid) for array, grid in zip(arrays, grids, strict=True)]),
            "image_grid_thw": torch.tensor([(1, h, w) for h, w in grids]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def __call__(self, images, **kwargs) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of an image of that many pixels (the name transformers' serving code calls)."""
        h, w = self.grid(height, width)
        return h * w

    def to_dict(self) -> dict:
        names = ("patch_size", "downsample_ratio", "norm_mean", "norm_std", "min_num_patches", "max_num_patches")
        return {name: getattr(self, name) for name in (*names, "max_model_len")} | {
            "image_processor_type": type(self).__name__
        }


class NemotronH_Nano_Omni_Reasoning_V3ImageProcessor(OmniImageProcessor):
    """The name in the released preprocessor_config.json: Auto classes find this code by it, not remote code."""


__all__ = ["OmniImageProcessor", "fit_media_budget", "image_grid"]
