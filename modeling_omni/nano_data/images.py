"""Pictures of the nano world: shapes, printed words and numbers, handwritten digits, on varied backgrounds.

A picture is float32 [H, W, 3] in 0..255 while it is painted, a PIL image when it is done; sides are 96 or 128 pixels
(multiples of 32: an even number of 16-pixel patches). Handwriting is scikit-learn's (1,797 digits of 13 people).
"""

import io
import random
from dataclasses import dataclass
from functools import cache, lru_cache
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

from . import fonts, scenes, text
from .vocabulary import CHARACTERS, COLOURS, PLACES, SHAPES, in_split, sample_random

CELL = 4  # pixels per side of one dense label
CAP_HEIGHTS = (16, 32)  # pixels of printed capitals; the tower learns all of them, or it reads none of the others
IGNORE = -100
# dense labels, channel 0: 0 background, then shapes, then characters; channel 1: 0 none, then colours; channels 2, 3:
# 0 none, then the column and the row of the thing's centre in tenths of the picture
THING_CLASSES = ("background", *SHAPES, *CHARACTERS)
COLOUR_CLASSES = ("none", *COLOURS)
PLACE_CLASSES = ("none", *map(str, range(10)))
# The file of handwritten digits holds blocks of about 130, one writer after the other: blocks are never divided.
HELDOUT_WRITERS_FROM = 1415
_GREYS = ((40, 40, 44), (96, 96, 96), (128, 128, 128), (168, 168, 168), (215, 215, 215), (245, 245, 245), (20, 20, 22))


@dataclass
class Ink:
    """What was painted, for dense labels: a mask at (x, y) with its class ids."""

    mask: np.ndarray  # [h, w] float32, 0..1
    x: int
    y: int
    thing: int
    colour: int


def random_size(rng: random.Random) -> tuple[int, int]:
    """Height and width."""
    return (96, 96) if rng.random() < 0.6 else (rng.choice((96, 128)), rng.choice((96, 128)))


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((320, 320, 3), dtype=np.float32)


def noise(rng: random.Random, height: int, width: int) -> np.ndarray:
    y, x = rng.randrange(320 - height), rng.randrange(320 - width)
    return _noise_bank()[y : y + height, x : x + width]


def distance(one, other) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def background(rng: random.Random, height: int, width: int, colours: list[tuple]) -> tuple[np.ndarray, tuple]:
    """A plain, shaded, cloudy, striped or two-tone ground on which `colours` stand out; also its mean colour."""
    best, best_distance = None, -1.0
    for _ in range(12):
        grey, tint = rng.choice(_GREYS), 34
        tone = tuple(min(255, max(0, g + rng.randint(-tint, tint))) for g in grey)
        nearest = min((distance(tone, c) for c in colours), default=999.0)
        if nearest > best_distance:
            best, best_distance = tone, nearest
        if nearest > 125:
            break
    tone = np.array(best, np.float32)
    ground = np.empty((height, width, 3), np.float32)
    ground[:] = tone
    kind, strength = rng.random(), rng.uniform(6, 22)
    if kind < 0.3:
        dy, dx = rng.uniform(-1, 1), rng.uniform(-1, 1)
        ramp = dy * np.linspace(-1, 1, height, dtype=np.float32)[:, None] + dx * np.linspace(
            -1, 1, width, dtype=np.float32
        )
        ground += strength * ramp[..., None]
    elif kind < 0.5:
        cells = Image.fromarray((noise(rng, 5, 5)[..., 0] * 40 + 128).clip(0, 255).astype(np.uint8))
        cloud = np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        ground += strength * ((cloud - 128) / 60)[..., None]
    elif kind < 0.65:
        period, phase = rng.uniform(6, 30), rng.uniform(0, 6)
        along = (
            np.arange(width, dtype=np.float32)[None]
            if rng.random() < 0.5
            else np.arange(height, dtype=np.float32)[:, None]
        )
        ground += 0.6 * strength * np.sign(np.sin(along * (2 * pi / period) + phase))[..., None]
    elif kind < 0.75:
        if rng.random() < 0.5:
            ground[rng.randrange(height // 4, height) :] += strength
        else:
            ground[:, rng.randrange(width // 4, width) :] -= strength
    return ground, best


def finish(picture: np.ndarray, rng: random.Random) -> Image.Image:
    """Sensor noise, brightness and contrast, sometimes the traces of JPEG, then bytes."""
    height, width, _ = picture.shape
    picture = picture * rng.uniform(0.9, 1.06) + rng.uniform(-10, 8)
    if rng.random() < 0.7:
        picture += rng.uniform(1, 9) * noise(rng, height, width)
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return through_jpeg(image, rng.randint(55, 95)) if rng.random() < 0.15 else image


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """What JPEG (or a video codec) leaves of an image: coarse chroma, ringing."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def paint(picture: np.ndarray, mask: np.ndarray, x: int, y: int, colour) -> None:
    """Blends `colour` into the picture where mask (float32 [h, w], 0..1) lies; parts outside are cut off."""
    height, width, _ = picture.shape
    top, left = max(0, -y), max(0, -x)
    bottom, right = min(mask.shape[0], height - y), min(mask.shape[1], width - x)
    if bottom <= top or right <= left:
        return
    alpha = mask[top:bottom, left:right, None]
    region = picture[y + top : y + bottom, x + left : x + right]
    region += alpha * (np.asarray(colour, np.float32) - region)


def jittered(colour: str, rng: random.Random) -> tuple:
    return tuple(min(255, max(0, c + rng.randint(-16, 16))) for c in COLOURS[colour])


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The shape's corners around (0, 0), within the unit circle or nearly."""
    if shape == "circle":
        return tuple((0.9 * cos(2 * pi * k / 40), 0.9 * sin(2 * pi * k / 40)) for k in range(40))
    if shape == "square":
        return ((-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78))
    if shape == "triangle":
        return tuple((sin(2 * pi * k / 3), 0.15 - cos(2 * pi * k / 3)) for k in range(3))
    if shape == "star":
        return tuple(
            ((0.42 if k % 2 else 1.05) * sin(pi * k / 5), -(0.42 if k % 2 else 1.05) * cos(pi * k / 5))
            for k in range(10)
        )
    if shape == "cross":
        a, b = 0.3, 0.95
        return (
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        )
    steps = [2 * pi * k / 40 for k in range(40)]  # heart
    return tuple(
        (sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.05) for t in steps
    )


_TURN = {"circle": 0, "square": 18, "triangle": 25, "star": 36, "cross": 18, "heart": 20}  # degrees either way


def shape_mask(shape: str, radius: float, rng: random.Random) -> np.ndarray:
    """An anti-aliased mask float32 [2r, 2r] of a slightly turned and stretched shape."""
    side = int(2 * radius + 4)
    turn, stretch = rng.uniform(-1, 1) * _TURN[shape] * pi / 180, rng.uniform(0.9, 1.1)
    c, s, middle = cos(turn) * radius * 4, sin(turn) * radius * 4, side * 2
    corners = [(middle + stretch * (c * x - s * y), middle + (s * x + c * y)) for x, y in _outline(shape)]
    drawn = Image.new("L", (side * 4, side * 4))
    ImageDraw.Draw(drawn).polygon(corners, fill=255)
    return np.asarray(drawn.reduce(4), np.float32) / 255


def centre_of(place: int, radius: float, height: int, width: int, rng: random.Random) -> tuple[float, float]:
    """A point (x, y) well inside the named ninth of the picture."""
    row, column = divmod(place, 3)
    # ninths end at 1/3 and 2/3; centres keep clear of the borders between them
    bands = ((0.13, 0.25), (0.43, 0.57), (0.75, 0.87))
    y, x = rng.uniform(*bands[row]) * height, rng.uniform(*bands[column]) * width
    return min(max(x, radius), width - radius), min(max(y, radius), height - radius)


def draw_things(things: list[scenes.Thing], rng: random.Random) -> tuple[np.ndarray, list[Ink]]:
    """Paints shapes at their places."""
    height, width = random_size(rng)
    colours = {thing.colour: jittered(thing.colour, rng) for thing in things}
    picture, _ = background(rng, height, width, list(colours.values()))
    side, inks = min(height, width), []
    for thing in things:
        largest = (
            0.15 if len(things) > 3 else 0.17 if len(things) > 1 else 0.4 if PLACES[thing.place] == "center" else 0.22
        )
        radius = rng.uniform(0.1, largest) * side
        x, y = centre_of(thing.place, radius, height, width, rng)
        mask = shape_mask(thing.shape, radius, rng)
        left, top = int(x - mask.shape[1] / 2), int(y - mask.shape[0] / 2)
        if rng.random() < 0.15:  # a rim or a shadow
            paint(picture, mask, left + rng.choice((-1, 1)), top + 1, [rng.choice((20, 235))] * 3)
        paint(picture, mask, left, top, colours[thing.colour])
        inks.append(Ink(mask, left, top, 1 + SHAPES.index(thing.shape), 1 + list(COLOURS).index(thing.colour)))
    return picture, inks


def _write(picture, ground, word: str, box: tuple, rng: random.Random, split: str) -> list[Ink]:
    """Paints a word or a number within box (left, top, right, bottom) in a random face, size and colour."""
    face = rng.choice(fonts.faces(split))
    left, top, right, bottom = box
    cap_height, spacing = rng.uniform(*CAP_HEIGHTS), rng.uniform(0.0, 0.22)
    cap_height = min(cap_height, 0.8 * (bottom - top))
    for _ in range(2):  # the second pass fits the width
        placed = fonts.word_masks(face, word, cap_height, spacing)
        width = placed[-1][0] + placed[-1][2].shape[1]
        if width <= right - left:
            break
        cap_height *= (right - left - 1) / (width + 2)
    height = placed[0][2].shape[0]
    x0 = left + int(rng.random() * max(0, right - left - width))
    y0 = top + int(rng.random() * max(0, bottom - top - height))
    colour = contrasting(ground, rng)
    tone, slope = jittered(colour, rng), rng.uniform(-0.14, 0.14) if rng.random() < 0.5 else 0.0
    inks = []
    for index, (x, y, mask) in enumerate(placed):
        drift = round(slope * (x - width / 2)) if bottom - top - height > abs(slope) * width else 0
        thing = 1 + len(SHAPES) + CHARACTERS.index(word[index])
        ink = Ink(mask.astype(np.float32) / 255, x0 + x, y0 + y + drift, thing, 1 + list(COLOURS).index(colour))
        paint(picture, ink.mask, ink.x, ink.y, tone)
        inks.append(ink)
    return inks


def contrasting(ground, rng: random.Random) -> str:
    """A colour of the palette that is readable on `ground`."""
    light = 0.3 * ground[0] + 0.59 * ground[1] + 0.11 * ground[2]
    readable = []
    for name, (r, g, b) in COLOURS.items():
        if abs(0.3 * r + 0.59 * g + 0.11 * b - light) > 70:
            readable.append(name)
    return rng.choice(readable or ["black" if light > 128 else "white"])


def draw_word(word: str, rng: random.Random, split: str) -> tuple[np.ndarray, list[Ink]]:
    """A picture with one printed word or number, sometimes on a sign."""
    height, width = random_size(rng)
    if len(word) > 3 and width == 96 and rng.random() < 0.7:
        width = 128
    picture, ground = background(rng, height, width, [])
    if rng.random() < 0.25:
        ground = tuple(rng.choice(_GREYS[:-1]))
        margin = rng.randint(3, 12)
        picture[margin : height - margin, margin : width - margin] = ground
    return picture, _write(picture, ground, word, (6, 6, width - 6, height - 6), rng, split)


@lru_cache
def handwriting(split: str) -> dict[str, list[np.ndarray]]:
    """Digit -> its images (uint8 [8, 8], ink is 255) by the split's writers."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = range(HELDOUT_WRITERS_FROM) if split == "train" else range(HELDOUT_WRITERS_FROM, len(data.target))
    found: dict[str, list[np.ndarray]] = {str(d): [] for d in range(10)}
    for row in rows:
        found[str(data.target[row])].append((data.images[row] * (255 / 16)).astype(np.uint8))
    return found


def _handwrite(picture, ground, digits: str, box: tuple, rng: random.Random, split: str) -> list[Ink]:
    """Paints handwritten digits side by side within box (left, top, right, bottom)."""
    left, top, right, bottom = box
    side = min(rng.uniform(24, 44), (right - left) / (len(digits) * 0.85), bottom - top)
    x = left + rng.random() * max(0, right - left - side * 0.85 * len(digits))
    y = top + rng.random() * max(0, bottom - top - side)
    colour = contrasting(ground, rng)
    tone, inks, level = jittered(colour, rng), [], rng.uniform(0.2, 0.4)
    for digit in digits:
        source = Image.fromarray(np.pad(rng.choice(handwriting(split)[digit]), 1))
        size = int(side * rng.uniform(0.92, 1.0))
        turned = source.resize((size, size), Image.Resampling.BICUBIC).rotate(
            rng.uniform(-9, 9), Image.Resampling.BILINEAR
        )
        mask = np.clip((np.asarray(turned, np.float32) / 255 - level) * 2.2, 0, 1)
        ink = Ink(
            mask, int(x), int(y + rng.uniform(-2, 2)), 1 + len(SHAPES) + int(digit), 1 + list(COLOURS).index(colour)
        )
        paint(picture, mask, ink.x, ink.y, tone)
        inks.append(ink)
        x += side * rng.uniform(0.78, 0.88)
    return inks


def draw_handwriting(digits: str, rng: random.Random, split: str) -> tuple[np.ndarray, list[Ink]]:
    height, width = random_size(rng)
    if len(digits) > 3:
        width = 128
    picture, ground = background(rng, height, width, [])
    return picture, _handwrite(picture, ground, digits, (4, 6, width - 4, height - 6), rng, split)


def draw_lines(rng: random.Random, split: str, handwritten: bool) -> tuple[np.ndarray, list[Ink], list[str]]:
    """A picture full of lines of characters, its ink, and what the lines say from top to bottom."""
    height, width = random_size(rng)
    picture, ground = background(rng, height, width, [])
    inks, lines, top = [], [], rng.randint(2, 8)
    while top + 22 < height:
        line = rng.randint(22, 40) if not handwritten else rng.randint(24, 44)
        box = (3, top, width - 3, min(height - 1, top + line))
        if handwritten:
            lines.append("".join(rng.choices("0123456789", k=rng.randint(2, width // 30))))
            inks += _handwrite(picture, ground, lines[-1], box, rng, split)
        else:
            letters = CHARACTERS[:10] if rng.random() < 0.3 else CHARACTERS[10:]
            most = round(width / (0.75 * line))  # more of them would be squeezed to a smaller size
            lines.append("".join(rng.choices(letters, k=rng.randint(2, max(2, most)))))
            inks += _write(picture, ground, lines[-1], box, rng, split)
        top += line + rng.randint(0, 6)
    return picture, inks, lines


def lines_sample(rng: random.Random, split: str) -> tuple[Image.Image, str, str, str]:
    """Every line of a picture full of characters: more to learn from one picture than a single word."""
    picture, _, lines = draw_lines(rng, split, handwritten=rng.random() < 0.25)
    answer = ", ".join(lines)
    return finish(picture, rng), scenes.vary(rng.choice(text.READ_LINES_QUESTIONS), rng), answer, answer


def recall_sample(rng: random.Random, split: str) -> tuple[Image.Image, str, str, str]:
    """Several look-ups in one picture (see `text.recall`)."""
    things = text.split_scene(lambda: scenes.random_things(rng, rng.randint(2, 5)), split)
    picture, _ = draw_things(things, rng)
    return finish(picture, rng), *text.ask_recall(things, rng), scenes.describe(things)


def shapes_sample(kind: str, rng: random.Random, split: str) -> tuple[Image.Image, str, str, str]:
    """Picture, question, answer and thought of one question kind of `scenes`."""
    things = text.split_scene(lambda: scenes.scene_of(kind, rng), split)
    question, answer = scenes.ask_scene(kind, things, rng, rng.choice(("picture", "image")))
    picture, _ = draw_things(things, rng)
    return finish(picture, rng), scenes.vary(question, rng), answer, scenes.describe(things)


def reading_sample(kind: str, rng: random.Random, split: str) -> tuple[Image.Image, str, str, str]:
    """kind "word", "digits" or "handwritten"."""
    if kind == "word":
        shown, questions, noun = text.printed_word(rng, split), text.READ_WORD_QUESTIONS, "word"
        picture, _ = draw_word(shown, rng, split)
    elif kind == "digits":
        shown, questions, noun = (
            text.random_string(rng, "0123456789", 1, 4, split),
            text.READ_DIGITS_QUESTIONS,
            "number",
        )
        picture, _ = draw_word(shown, rng, split)
    else:
        shown, noun = text.random_string(rng, "0123456789", 1, 4, split), "number"
        questions = text.READ_HANDWRITING_QUESTIONS + text.READ_DIGITS_QUESTIONS[:2]
        picture, _ = draw_handwriting(shown, rng, split)
    answer = shown
    if rng.random() < 0.12:
        question, answer = rng.choice(("Describe the picture.", "What is in the picture?")), f"{noun} {shown}"
    else:
        question = rng.choice(questions)
    return finish(picture, rng), scenes.vary(question, rng), answer, " ".join(shown)


@dataclass
class Button:
    """A button of a drawn screen; box (left, top, right, bottom) and centre (x, y) in percent of the picture."""

    colour: str
    label: str
    box: tuple[int, int, int, int]

    @property
    def point(self) -> str:
        left, top, right, bottom = self.box
        return f"{(left + right) // 2} {(top + bottom) // 2}"


def random_buttons(rng: random.Random, split: str) -> list[Button]:
    """Two to four buttons of different colours and labels that do not touch, in a 2 x 3 raster with play."""
    count = rng.randint(2, 4)
    while True:
        colours, labels = rng.sample(list(COLOURS), count), [random_label(rng, split) for _ in range(count)]
        if len(set(labels)) == count and in_split(" ".join(colours + labels), split):
            break
    buttons = []
    cells = rng.sample([(row, column) for row in range(3) for column in range(2)], count)
    for (row, column), colour, label in zip(cells, colours, labels, strict=True):
        width, height = rng.randint(30, 42), rng.randint(18, 25)
        left, top = 4 + 48 * column + rng.randint(0, 44 - width), 4 + 32 * row + rng.randint(0, 28 - height)
        buttons.append(Button(colour, label, (left, top, left + width, top + height)))
    return buttons


def random_label(rng: random.Random, split: str) -> str:
    """What stands on a button: one or two characters, or a short printed word."""
    if rng.random() < 0.7:
        return "".join(rng.choices(CHARACTERS, k=rng.randint(1, 2)))
    return rng.choice([word for word in text.PRINTED_WORDS[split] if len(word) <= 4])


def draw_buttons(buttons: list[Button], rng: random.Random, split: str) -> np.ndarray:
    """Paints a screen: a plain ground, round-cornered buttons and their labels."""
    height, width = random_size(rng)
    tones = {button.colour: jittered(button.colour, rng) for button in buttons}
    picture, _ = background(rng, height, width, list(tones.values()))
    for button in buttons:
        left, right = (round(button.box[i] * width / 100) for i in (0, 2))
        top, bottom = (round(button.box[i] * height / 100) for i in (1, 3))
        mask = Image.new("L", (4 * (right - left), 4 * (bottom - top)))
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), rng.randint(0, 24), fill=255)
        paint(picture, np.asarray(mask.reduce(4), np.float32) / 255, left, top, tones[button.colour])
        inside = (left + 2, top + 2, right - 2, bottom - 2)
        _write(picture, tones[button.colour], button.label, inside, rng, split)
    return picture


def button_sample(rng: random.Random, split: str) -> tuple[Image.Image, str, str, str]:
    """A screen and the button to press, named by its colour or its label; the answer is its centre in percent."""
    buttons = random_buttons(rng, split)
    question, answer, thought = text.ask_button(buttons, rng)
    return finish(draw_buttons(buttons, rng, split), rng), scenes.vary(question, rng), answer, thought


def pages_sample(rng: random.Random, split: str) -> tuple[list[Image.Image], str, str, str]:
    """A document of several pages, a picture each, with one word or number on every page."""
    pages = text.random_pages(rng, split)
    question, answer, thought = text.ask_pages(pages, rng)
    pictures = [finish(draw_word(page, rng, split)[0], rng) for page in pages]
    return pictures, scenes.vary(question, rng), answer, thought


def dense_labels(inks: list[Ink], height: int, width: int) -> np.ndarray:
    """Labels int64 [4, height / 4, width / 4] of every 4x4 cell: thing (THING_CLASSES), its colour (COLOUR_CLASSES) and
    the column and the row of its centre (PLACE_CLASSES), without which a tower forgets where it sees what.

    A cell belongs to the thing with the most ink in it if that fills half of it, is IGNOREd with less ink, and is
    background with next to none. Cells this small show a tower the outline of things, which it learns first.
    """
    rows, columns = height // CELL, width // CELL
    labels = np.zeros((4, rows, columns), np.int64)
    if not inks:
        return labels
    full = np.zeros((len(inks), height, width), np.float32)
    for layer, ink in zip(full, inks, strict=True):
        paint(layer[..., None], ink.mask, ink.x, ink.y, (1.0,))
    held = full.reshape(len(inks), rows, CELL, columns, CELL).mean((2, 4))  # share of the cell that is ink
    best = held.argmax(0)
    most = np.take_along_axis(held, best[None], 0)[0]
    centres = [(ink.x + ink.mask.shape[1] / 2, ink.y + ink.mask.shape[0] / 2) for ink in inks]
    tenths = [(min(9, int(10 * max(x, 0) / width)), min(9, int(10 * max(y, 0) / height))) for x, y in centres]
    ids = np.array([[ink.thing, ink.colour, 1 + x, 1 + y] for ink, (x, y) in zip(inks, tenths, strict=True)])
    for channel in range(4):
        labels[channel] = np.where(most >= 0.5, ids[best, channel], np.where(most >= 0.1, IGNORE, 0))
    return labels


def dense_image_sample(seed: int, split: str = "train") -> tuple[Image.Image, np.ndarray]:
    """A busy picture and its `dense_labels`, to teach the vision tower before there is any text.

    Most hold lines of printed characters (about ten of them), the others shapes or handwritten digits.
    """
    rng = sample_random("dense_image", seed, split)
    how = rng.random()
    if how < 0.2:
        picture, inks = draw_things(scenes.random_things(rng, rng.randint(1, 5), distinct=False), rng)
        if rng.random() < 0.5:
            picture, inks = draw_things(scenes.random_things(rng, rng.randint(1, 4)), rng)
    else:
        picture, inks, _ = draw_lines(rng, split, handwritten=how > 0.8)
    height, width, _ = picture.shape
    return finish(picture, rng), dense_labels(inks, height, width)
