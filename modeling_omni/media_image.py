"""Image decoding with Pillow: any file, PIL image or array to uint8 RGB [H, W, 3] (paper section 2, vision input)."""

from __future__ import annotations

import re
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from .limits import MediaLimits, default_limits
from .media_source import Deadline, TimedFile, decoding, is_tensor, open_source, refuse, to_numpy

Image.init()
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd8]")  # of a segment or the end; neither data nor a restart
# No format that runs a program (EPS) or is rare enough for its decoder to be little tested; AVIF is a build option.
IMAGE_FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF") if f in Image.OPEN)


def load_image(source: Any, limits: MediaLimits | None = None) -> np.ndarray:
    """Decode one image to uint8 RGB [H, W, 3].

    source: path, bytes, binary file object, data: URL (http(s) when allowed), PIL image, or array / tensor: uint8,
    bool, uint16 or float in [0, 1], [H, W], [H, W, 1|3|4] or [1|3|4, H, W]. EXIF orientation is applied, transparency
    is laid on white, 16 bits are scaled to 8, of an animation the first frame is read. Raises OmniInputError.
    """
    limits = limits or default_limits()
    if isinstance(source, Image.Image):
        with decoding("PIL image", "an image"):
            return _pil_to_rgb(source, "PIL image", limits)
    if isinstance(source, np.ndarray) or is_tensor(source):
        return _array_to_rgb(source, "image array", limits)
    with open_source(source, "image", limits) as (name, file), decoding(name, "an image"):
        try:
            image = Image.open(TimedFile(file, Deadline(name, limits.timeout)), formats=IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            limit = f"{limits.max_image_pixels} pixels (MediaLimits.max_image_pixels)"
            do = "make it smaller, or raise it and PIL.Image.MAX_IMAGE_PIXELS too"
            raise refuse(name, "has too many pixels", limit, do) from error
        except Image.UnidentifiedImageError as error:
            do = "give one of " + ", ".join(IMAGE_FORMATS)
            raise refuse(name, "is not an image that can be read", do=do) from error
        with image:
            if image.format in ("JPEG", "MPO"):
                _check_scans(file, name, limits)
            return _pil_to_rgb(image, name, limits)


def _check_scans(file: BinaryIO, name: str, limits: MediaLimits) -> None:
    """Refuses JPEGs of very many scans: 66 KB of them took 13 s inside one call of the decoder."""
    place, scans = file.tell(), 0
    file.seek(0)
    data = file.read(1 << 28)
    file.seek(place)
    at = 2
    while (mark := MARKER.search(data, at)) is not None:
        code, at = data[mark.start() + 1], mark.end()
        if code == 0xD9:  # the end; phones append whole clips behind it
            break
        scans += code == 0xDA
        if code != 0x01:  # a segment: its content may look like anything
            at += int.from_bytes(data[at : at + 2], "big")
        if scans > limits.max_image_scans:
            limit = f"{limits.max_image_scans} (MediaLimits.max_image_scans)"
            raise refuse(name, "is a JPEG of too many scans", limit, "save it again")


def _check_image_size(width: int, height: int, name: str, limits: MediaLimits) -> None:
    size = f"is {width} x {height} pixels"
    if width < 1 or height < 1:
        raise refuse(name, size, do="give an image with pixels")
    if max(width, height) > limits.max_image_side:
        limit = f"{limits.max_image_side} pixels a side (MediaLimits.max_image_side)"
        raise refuse(name, size, limit, "make it smaller or raise it")
    if width * height > limits.max_image_pixels:
        limit = f"{limits.max_image_pixels} pixels (MediaLimits.max_image_pixels)"
        raise refuse(name, size, limit, "make it smaller or raise it")


def _pil_to_rgb(image: Image.Image, name: str, limits: MediaLimits) -> np.ndarray:
    _check_image_size(*image.size, name, limits)  # before load(): the header only
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block is no reason to refuse good pixels
        image = image.copy()
    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        gray = _scale_gray(np.asarray(image), name)
        if image.mode.startswith("I;16") and isinstance(transparency, int):
            gray = np.where(np.asarray(image) == transparency, np.uint8(255), gray)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparency is not None:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.array(image.convert("RGB"))


def _scale_gray(gray: np.ndarray, name: str) -> np.ndarray:
    """uint8 [H, W] of 16-bit, 32-bit-container or float gray values."""
    if gray.dtype.kind == "f":
        low, high = (float(gray.min()), float(gray.max())) if np.isfinite(gray).all() else (0.0, np.inf)
        if low < 0 or high > 255:
            raise refuse(name, "is a float image outside [0, 1] and [0, 255]", do="scale it to [0, 1]")
        return np.rint(gray * (255.0 if high <= 1 else 1.0)).astype(np.uint8)
    if gray.dtype == np.uint8:
        return gray
    if gray.min() < 0 or gray.max() > 65535:
        raise refuse(name, "is a 32-bit integer image outside [0, 65535]", do="save it with 8 or 16 bits")
    return ((gray.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _array_to_rgb(source: Any, name: str, limits: MediaLimits) -> np.ndarray:
    with decoding(name, "an image"):
        array = to_numpy(source)
    shape = tuple(array.shape)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and shape[0] in (1, 3, 4) and (shape[2] not in (1, 3, 4) or is_tensor(source)):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise refuse(name, f"has shape {list(shape)}", do="give [H, W], [H, W, 1|3|4] or [1|3|4, H, W]")
    _check_image_size(array.shape[1], array.shape[0], name, limits)
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
            raise refuse(name, "float values lie outside [0, 1]", do="divide by 255, or give uint8")
        array = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
            raise refuse(name, f"has dtype {array.dtype} outside [0, 255]", do="give uint8 or float in [0, 1]")
        array = array.astype(np.uint8)
    if array.shape[2] == 4:
        return _pil_to_rgb(Image.fromarray(np.ascontiguousarray(array)), name, limits)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
