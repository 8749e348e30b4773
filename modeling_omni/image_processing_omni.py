"""Image front end of the vision tower: dynamic resolution, normalisation and patches (paper section 2).

An image keeps its aspect ratio and gets a grid of 16 x 16 patches between `min_num_patches` and `max_num_patches`; both
sides of the grid are even because the projector merges 2 x 2 patches into one language-model token. The token count is
known from the height and width alone. A whole request can be held to a token budget (`fit_media_budget`).

Shapes: H, W pixels; h, w patches; P = 3 * 16 * 16 values of a patch, ordered (channel, y, x); C = 3.
"""

import math
from collections.abc import Callable, Sequence

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
# Pixels resized in one call: float32 copies of large videos are made in pieces of about 200 MB.
PIXELS_PER_RESIZE = 16_000_000


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


def normalize_pixels(pixels_TCHW: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Pixels in 0..255 -> zero mean, unit variance per channel."""
    return (pixels_TCHW / 255.0 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def resize_frames(frames_TCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 or float [T, 3, H, W] in 0..255 -> float32 [T, 3, height, width]: bicubic, antialiased, not clamped.

    The overshoot of the bicubic filter is kept, as in the released processor. Frames of that size are not resampled.
    """
    if frames_TCHW.shape[-2:] == (height, width):
        return frames_TCHW.float()
    step = max(1, PIXELS_PER_RESIZE // (frames_TCHW.shape[-2] * frames_TCHW.shape[-1]))
    pieces = [
        F.interpolate(piece.float(), size=(height, width), mode="bicubic", align_corners=False, antialias=True)
        for piece in frames_TCHW.split(step)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def fit_media_budget(tokens_at: Sequence[Callable[[float], int]], budget: int | None) -> float:
    """Share of its own resolution that every image and video of a request may keep so that all fit into a token budget.

    `tokens_at` holds one function per item: tokens of the item when its patch budget is scaled by a factor in (0, 1].
    The rule: one factor for all items, the largest of 1, 0.97, 0.97 ** 2, ... whose total fits. So large items give
    most, small ones keep at least 4 tokens.

    Raises:
        OmniInputError: even the smallest size of every item does not fit.
    """
    scale = 1.0
    if budget is None or not tokens_at:
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

    def patches(self, image_HWC: np.ndarray, h: int, w: int) -> torch.Tensor:
        """uint8 RGB [H, W, 3] -> normalised patches float32 [h * w, P], row by row."""
        p = self.patch_size
        pixels_1CHW = torch.from_numpy(np.require(image_HWC, requirements=["C", "W"])).permute(2, 0, 1)[None]
        pixels_CHW = normalize_pixels(resize_frames(pixels_1CHW, h * p, w * p), self.norm_mean, self.norm_std)[0]
        return pixels_CHW.view(3, h, p, w, p).permute(1, 3, 0, 2, 4).reshape(h * w, 3 * p * p)

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
        patches = [processor.patches(array, *grid) for array, grid in zip(arrays, grids, strict=True)]
        data = {
            "pixel_values": torch.cat(patches),
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
