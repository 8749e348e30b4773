"""Where and when: pages read with boxes and classes as in Eclair, speech with times as in Audio Flamingo Next.

    image_document   <x_05><y_04>HELLO<x_61><y_27><class_Title><x_05><y_41>AB OX<x_44><y_55><class_Text>...
    speech_times     [0.3-0.9] one two
                     [1.6-2.1] red

Blocks stand in reading order (title, then column by column), boxes in percent of the page (00 to 99) around the ink of
letters, the frame of a table and the ground of a picture. Tags are those that Nemotron-Parse publishes
(`metrics_grounding.py` reads both). Times are seconds of the sound, which is joined from words and so known exactly.
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import fonts, images, scenes, speech, text
from .vocabulary import COLOURS, COMMAND_WORDS, DIGIT_WORDS, PRINTED_WORDS, SHAPES

PAGE_SIZES = ((128, 128), (128, 128), (160, 128), (128, 160))  # height and width
MARGIN = 5
PAGE_QUESTIONS = (
    "Read the text and show where it is.",
    "Read the picture and show where the words are.",
    "What text is where in the picture?",
)
TIMES_QUESTIONS = (
    "What words are spoken and at what time?",
    "Write the words with the time of the voice.",
    "Which words are said at which time?",
)


@dataclass
class PageBlock:
    """A block of a page; box (left, top, right, bottom) in pixels."""

    kind: str  # Title, Text, Table or Picture
    text: str
    box: tuple[int, int, int, int]


def tagged(blocks: list[PageBlock], height: int, width: int) -> str:
    """A page's blocks as text with tags, boxes in percent."""
    pieces = []
    for block in blocks:
        across, down = (
            [min(99, round(100 * value / side)) for value in block.box[first::2]]
            for first, side in ((0, width), (1, height))
        )
        start, end = (f"<x_{x:02d}><y_{y:02d}>" for x, y in zip(across, down))
        pieces.append(f"{start}{block.text}{end}<class_{block.kind}>")
    return "".join(pieces)


def _word(rng: random.Random, split: str, most: int) -> str:
    """A real word, a random string of letters or a number of at most `most` characters."""
    how = rng.random()
    fitting = [word for word in PRINTED_WORDS[split] if len(word) <= most]
    if how < 0.45 and fitting:
        return rng.choice(fitting)
    letters = "0123456789" if how > 0.8 else text.LETTERS_UPPER
    return text.random_string(rng, letters, min(2, most), min(most, 5), split)


def _write_line(picture, words: list[str], left: int, top: int, right: int, cap: float, face, tone) -> tuple:
    """Paints words side by side, smaller where they do not fit; returns the box of their ink in pixels."""
    for _ in range(3):
        pen, placed = 0.0, []
        for word in words:
            masks = fonts.word_masks(face, word, cap, 0.08)
            placed += [(int(pen) + x, y, mask) for x, y, mask in masks]
            pen += masks[-1][0] + masks[-1][2].shape[1] + 0.7 * cap
        wide = placed[-1][0] + placed[-1][2].shape[1]
        if wide <= right - left:
            break
        cap *= (right - left - 1) / (wide + 2)
    boxes = []
    for x, y, mask in placed:
        images.paint(picture, mask.astype(np.float32) / 255, left + x, top + y, tone)
        rows, columns = np.flatnonzero(mask.max(1) > 96), np.flatnonzero(mask.max(0) > 96)
        if len(rows):
            boxes.append((left + x + columns[0], top + y + rows[0], left + x + columns[-1] + 1, top + y + rows[-1] + 1))
    return _around(boxes)


def _around(boxes: list[tuple]) -> tuple[int, int, int, int]:
    columns = list(zip(*boxes))
    return min(columns[0]), min(columns[1]), max(columns[2]), max(columns[3])


def _line_height(face, cap: float) -> int:
    glyphs = fonts.glyph_set(face)
    return round(cap * glyphs.height / glyphs.cap_height)


# Every kind of block is painted at (left, top) with `right` and `room` (pixels below) as its limits, or is None where
# there is no room for it.


def _text_block(picture, rng, split, left, top, right, room, face, tone) -> PageBlock | None:
    cap = rng.uniform(15, 18)
    most, high = max(2, int((right - left) / (0.95 * cap))), _line_height(face, cap) + 3
    boxes, said = [], []
    for _ in range(min(rng.choice((1, 1, 2)), room // high)):
        words = [_word(rng, split, min(5, most))]
        if most - len(words[0]) >= 4 and rng.random() < 0.5:
            words.append(_word(rng, split, min(5, most - len(words[0]) - 2)))
        boxes.append(_write_line(picture, words, left, top, right, cap, face, tone))
        said += words
        top += high
    return PageBlock("Text", " ".join(said), _around(boxes)) if boxes else None


def _table_block(picture, rng, split, left, top, right, room, face, tone) -> PageBlock | None:
    """Cells of one or two digits in a ruled frame; cells and rows are divided as in LaTeX."""
    cap = rng.uniform(14, 16)
    columns = 2 if right - left < 110 else rng.choice((2, 3))
    wide, high = min(int(rng.uniform(2.3, 2.7) * cap), (right - left) // columns), _line_height(face, cap) + 6
    rows = []
    for row in range(min(rng.choice((1, 2)), room // (high + 1))):
        cells = [text.random_string(rng, "0123456789", 1, 2, split) for _ in range(columns)]
        for column, cell in enumerate(cells):
            x, y = left + column * wide, top + row * high
            _write_line(picture, [cell], x + 4, y + 3, x + wide - 3, cap, face, tone)
        rows.append(" & ".join(cells))
    if not rows:
        return None
    right, bottom = left + columns * wide + 1, top + len(rows) * high + 1
    picture[top:bottom, left:right:wide] = tone
    picture[top:bottom:high, left:right] = tone
    return PageBlock("Table", " \\\\ ".join(rows), (left, top, right, bottom))


def _picture_block(picture, rng, split, left, top, right, room, face, tone) -> PageBlock | None:
    """A coloured ground with a shape on it; it has no text."""
    wide, high = rng.randint(36, min(80, right - left)), rng.randint(26, 40)
    if high > room:
        return None
    ground, colour = rng.sample(list(COLOURS), 2)
    picture[top : top + high, left : left + wide] = images.jittered(ground, rng)
    mask = images.shape_mask(rng.choice(SHAPES), 0.36 * high, rng)
    x, y = left + (wide - mask.shape[1]) // 2, top + (high - mask.shape[0]) // 2
    images.paint(picture, mask, x, y, images.jittered(colour, rng))
    return PageBlock("Picture", "", (left, top, left + wide, top + high))


_BLOCKS = {_text_block: 6, _table_block: 2, _picture_block: 2}  # how often they are tried


def draw_page(rng: random.Random, split: str) -> tuple[np.ndarray, list[PageBlock]]:
    """A page float32 [H, W, 3] of one to four blocks in one or two columns, and the blocks in reading order."""
    height, width = rng.choice(PAGE_SIZES)
    picture, ground = images.background(rng, height, width, [])
    face, tone = rng.choice(fonts.faces(split)), images.jittered(images.contrasting(ground, rng), rng)
    top, end, blocks = MARGIN + rng.randint(0, 10), width - MARGIN, []
    if rng.random() < 0.6:
        cap, left = rng.uniform(22, 27), MARGIN + rng.randint(0, 30)
        word = _word(rng, split, min(5, max(2, int((end - left) / (0.9 * cap)))))
        box = _write_line(picture, [word], left, top, end, cap, face, tone)
        blocks.append(PageBlock("Title", word, box))
        top = box[3] + rng.randint(6, 12)
    two = width == 160 and rng.random() < 0.7
    for left, right in ((MARGIN, width // 2 - 3), (width // 2 + 4, end)) if two else ((MARGIN, end),):
        y = top + rng.randint(0, 6)
        for _ in range(min(2 if two else 3, 4 - len(blocks))):
            x = left + rng.randint(0, 4 if two else 20)
            paint = rng.choices(list(_BLOCKS), list(_BLOCKS.values()))[0]
            block = paint(picture, rng, split, x, y, right, height - MARGIN - y, face, tone)
            if block is None:
                break
            blocks.append(block)
            y = block.box[3] + rng.randint(8, 15)
    return picture, blocks


def document_sample(rng: random.Random, split: str) -> tuple[Image.Image, str, str, str]:
    """A page to read with boxes and classes; the thought is its text alone."""
    picture, blocks = draw_page(rng, split)
    height, width, _ = picture.shape
    thought = ", ".join(block.text for block in blocks if block.text) or "none"
    question = scenes.vary(rng.choice(PAGE_QUESTIONS), rng)
    return images.finish(picture, rng), question, tagged(blocks, height, width), thought


def times_sample(rng: random.Random, split: str) -> tuple[np.ndarray, str, str, str]:
    """One to three spoken phrases with silence between them, and when each is said; the thought is the words alone."""
    phrases = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        words = DIGIT_WORDS if rng.random() < 0.5 else COMMAND_WORDS
        phrases.append(rng.choices(words, k=rng.randint(1, 2)))
    silences = []  # before every word
    for number, phrase in enumerate(phrases):
        silences.append(rng.uniform(0.4, 1.1) if number else rng.uniform(0.05, 0.9))
        silences += [rng.uniform(0.02, 0.1) for _ in phrase[1:]]
    words = [word for phrase in phrases for word in phrase]
    audio, _, spans = speech.spoken_utterance(rng, split, words, silences=silences)
    lines, first = [], 0
    for phrase in phrases:
        own = spans[first : first + len(phrase)]
        lines.append(f"[{own[0][0] / speech.RATE:.1f}-{own[-1][1] / speech.RATE:.1f}] {' '.join(phrase)}")
        first += len(phrase)
    question = scenes.vary(rng.choice(TIMES_QUESTIONS), rng)
    return audio, question, "\n".join(lines), " ".join(words)
