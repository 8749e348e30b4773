"""Glyphs for words and digits in pictures: open fonts from PyPI (`fontpkg-*`, licence OFL), split by family.

Fonts come from packages, not from the system, so that a sample is the same on every machine. Nothing is shipped here.
"""

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .vocabulary import CHARACTERS

FAMILIES = {
    "train": (
        "abel albert-sans alegreya-sans archivo arvo asap barlow barlow-condensed bebas-neue bitter cabin chivo "
        "comfortaa crimson-text dm-mono dosis exo-2 fjalla-one hind ibm-plex-mono inconsolata inter josefin-sans kanit "
        "libre-baskerville lora montserrat nunito open-sans oswald overpass play playfair-display poppins pt-sans "
        "pt-serif quicksand rajdhani roboto roboto-mono rubik signika source-sans-3 space-mono teko titillium-web "
        "work-sans zilla-slab"
    ).split(),
    "heldout": "cardo domine karla mulish sanchez share-tech space-grotesk spectral varela-round".split(),
}
FONT_PACKAGES = tuple(f"fontpkg-{family}" for split in FAMILIES for family in FAMILIES[split])
_SIZE = 48  # glyphs are rendered once at this size and scaled from it


@dataclass(frozen=True)
class Face:
    """One cut of a family: a font file and, for a variable font, its weight."""

    family: str
    path: str
    weight: int | None


@dataclass
class Glyph:
    mask: np.ndarray  # [H, w] uint8, H common to the face
    left: int
    advance: float


@dataclass
class GlyphSet:
    glyphs: dict[str, Glyph]
    height: int  # H: from the top of the highest character to the bottom of the lowest
    cap_height: int  # of "H"


@lru_cache
def faces(split: str) -> tuple[Face, ...]:
    """Every face of the split's families: regular, bold and (where there is one) italic."""
    missing = [family for family in FAMILIES[split] if find_spec(_module(family)) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{len(missing)} font packages of the nano {split} data are not installed; "
            f"run: pip install {' '.join('fontpkg-' + family for family in missing)}"
        )
    return tuple(face for family in FAMILIES[split] for face in _faces_of(family))


def _module(family: str) -> str:
    return "fontpkg_" + family.replace("-", "_")


def _faces_of(family: str) -> list[Face]:
    folder = Path(next(iter(find_spec(_module(family)).submodule_search_locations)))
    files = json.loads((folder / "metadata.json").read_text())["files"]
    found = []
    for style, weights in (("normal", (400, 700)), ("italic", (500,))):
        candidates = [f for f in files if f.get("style", "normal") == style]
        variable = [f for f in candidates if f.get("variable")]
        for weight in weights if candidates else ():
            if variable:
                face = Face(family, str(folder / variable[0]["path"]), weight)
            else:
                nearest = min(candidates, key=lambda f: abs(f.get("weight", 400) - weight))
                face = Face(family, str(folder / nearest["path"]), None)
            if face not in found:
                found.append(face)
    return found


@cache
def glyph_set(face: Face) -> GlyphSet:
    """Renders the face's characters (0-9, A-Z)."""
    font = ImageFont.truetype(face.path, _SIZE, layout_engine=ImageFont.Layout.BASIC)
    if face.weight is not None:
        values = []
        for axis in font.get_variation_axes():
            name = axis["name"] if isinstance(axis["name"], str) else axis["name"].decode(errors="replace")
            wanted = face.weight if name.strip("\0") == "Weight" else axis["default"]
            values.append(min(max(wanted, axis["minimum"]), axis["maximum"]))
        font.set_variation_by_axes(values)
    boxes = {c: font.getbbox(c, anchor="ls") for c in CHARACTERS}  # y from the baseline, up is negative
    top, bottom = min(b[1] for b in boxes.values()), max(b[3] for b in boxes.values())
    glyphs = {}
    for character, (left, _, right, _) in boxes.items():
        mask = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(mask).text((-left, -top), character, font=font, fill=255, anchor="ls")
        glyphs[character] = Glyph(np.asarray(mask), left, font.getlength(character))
    return GlyphSet(glyphs, bottom - top, -boxes["H"][1])


def word_masks(face: Face, word: str, cap_height: float, spacing: float) -> list[tuple[int, int, np.ndarray]]:
    """The word's characters at `cap_height` pixels, as (x, y, mask [h, w] uint8) with the word's left end at x = 0.

    `spacing` is added between characters, in cap heights.
    """
    glyphs = glyph_set(face)
    scale = cap_height / glyphs.cap_height
    placed, pen, first_left = [], 0.0, None
    for character in word:
        glyph = glyphs.glyphs[character]
        first_left = glyph.left if first_left is None else first_left
        height, width = glyph.mask.shape
        x = (pen + glyph.left - first_left) * scale
        # the fraction of a pixel goes into the box that is resized, so that glyphs do not snap to the pixel grid
        start = int(np.floor(x))
        out_width, out_height = max(1, int(np.ceil(x - start + width * scale))), max(1, int(round(height * scale)))
        box = ((start - x) / scale, 0, (start - x) / scale + out_width / scale, height)
        placed.append((start, 0, _resized(glyph.mask, box, out_width, out_height)))
        pen += glyph.advance + spacing * glyphs.cap_height
    return placed


def _resized(mask: np.ndarray, box: tuple, width: int, height: int) -> np.ndarray:
    """Resizes the part `box` (left, top, right, bottom; it may stick out to left and right) of a mask."""
    left, right = max(0, int(np.ceil(-box[0]))), max(0, int(np.ceil(box[2] - mask.shape[1])))
    if left or right:
        mask = np.pad(mask, ((0, 0), (left, right)))
    image = Image.fromarray(mask)
    box = (box[0] + left, box[1], min(box[2] + left, mask.shape[1]), box[3])
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))
