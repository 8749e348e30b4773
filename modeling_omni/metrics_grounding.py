"""Documents read with boxes and classes, and speech with times: how such answers are read and scored.

    verifier         gold and answer
    document_parse   <x_0.05><y_0.04>HELLO<x_0.61><y_0.27><class_Title>... in reading order, as NVIDIA publishes it for
                     Nemotron-Parse (Eclair): text between its box's corners, then the class
    timed_speech     [0.0-1.2] one two, a line per phrase (Audio Flamingo Next grounds its answers so), in seconds

An answer may be anything and is never refused: text of broken blocks counts as text, a box that is broken counts as a
block that fits nothing. Neither paper says how to add its scores up to one number; the verifiers take the mean of the
text's and the places' score. All parts are in `document_scores` and `timed_scores`, which evaluations write down too.
"""

import re
from dataclasses import dataclass

import numpy as np

from .rewards_speech import asr_wer, normalise_speech
from .rewards_text import visible

MAX_TEXT = 20_000  # characters of a document that are compared; the rest counts as missing or too much
MAX_BLOCKS = 1000  # blocks or phrases that are matched; more are counted as wrong
PAIRED_TEXT = 200  # characters by which blocks are paired
BOX_THRESHOLD = 0.5  # IoU from which on a box, or a phrase, is found


def one_to_one(scores: np.ndarray, threshold: float = 0.0) -> list[tuple[int, int, float]]:
    """(row, column, score) of pairs, each row and column once, the highest scores (above `threshold`) first."""
    rows, columns = np.nonzero(scores > threshold)
    values, pairs = scores[rows, columns], []
    free_rows, free_columns = np.ones(len(scores), bool), np.ones(scores.shape[1], bool)
    for place in np.argsort(-values, kind="stable"):
        row, column = int(rows[place]), int(columns[place])
        if free_rows[row] and free_columns[column]:
            free_rows[row] = free_columns[column] = False
            pairs.append((row, column, float(values[place])))
    return pairs


# ---------------------------------------------------------------------------------------------------- documents

TAG = re.compile(r"<([xy])_([0-9]{1,9}(?:\.[0-9]{1,9})?)>")
CLASS = re.compile(r"<class_([^<>\n]{1,40})>")


@dataclass(frozen=True)
class DocumentBlock:
    """A block of a document; box (left, top, right, bottom) in shares of the page, None where it has no right one."""

    text: str
    box: tuple[float, float, float, float] | None
    kind: str  # its class, "" where it has none


def parse_document(text: str, scale: float | tuple[float, float] = 1.0) -> tuple[list[DocumentBlock], int]:
    """Text with tags -> its blocks, in the order of the text, and how many of them are broken.

    Args:
        text: anything; no text raises.
        scale: what coordinates count to, for both directions or (across, down): 1 for Nemotron-Parse 1.1 and later,
            (1024, 1280) for Eclair, 100 for nano.

    Raises:
        TypeError: a scale that is no number above 0 and no pair of them.
    """
    across, down = scale if isinstance(scale, (list, tuple)) and len(scale) == 2 else (scale, scale)
    if not (across > 0 and down > 0):
        raise TypeError(f"scale is {scale!r}")
    blocks, broken, position = [], 0, 0
    ends = [(match.start(), match.end(), match.group(1).strip()) for match in CLASS.finditer(text)]
    for start, end, kind in [*ends, (len(text), len(text), "")]:
        piece, position = text[position:start], end
        tags, pieces = list(TAG.finditer(piece)), TAG.split(piece)[::3]
        if not kind and not piece.strip():
            continue
        whole = [tag.group(1) for tag in tags] == ["x", "y", "x", "y"]
        box = None
        if whole:
            left, top, right, bottom = (float(tag.group(2)) for tag in tags)
            box = left / across, top / down, right / across, bottom / down
            box = box if box[0] < box[2] <= 1 + 1e-6 and box[1] < box[3] <= 1 + 1e-6 else None
        outside = [pieces[place] for place in (0, 1, 3, 4)] if whole else ["?"]
        broken += not kind or box is None or any(part.strip() for part in outside)
        blocks.append(DocumentBlock(" ".join(" ".join(pieces).split()), box, kind))
    return blocks, broken


def gold_blocks(gold, scale=1.0, size=None) -> list[DocumentBlock] | None:
    """A gold document: text with tags, or [{"text", "box", "class"}] with boxes in shares of the page or in pixels of
    `size` (width, height); None where it is neither."""
    from .metrics import box_of

    if isinstance(gold, str):
        blocks, broken = parse_document(visible(gold), scale)
        return blocks if blocks and not broken else None
    try:
        texts = [" ".join(str(one["text"]).split()) for one in gold]
        blocks = [DocumentBlock(t, box_of(one["box"], size), str(one["class"])) for t, one in zip(texts, gold)]
    except (TypeError, KeyError):
        return None
    return blocks if blocks and all(block.box for block in blocks) else None


def text_similarity(one: str, other: str) -> float:
    """1 - Levenshtein distance / the longer length; what is beyond MAX_TEXT counts as wrong."""
    from rapidfuzz.distance import Levenshtein

    longest = max(len(one), len(other))
    if not longest:
        return 1.0
    beyond = longest - min(longest, MAX_TEXT)
    return max(0.0, 1 - (Levenshtein.distance(one[:MAX_TEXT], other[:MAX_TEXT]) + beyond) / longest)


def box_ious(boxes: list[tuple], others: list[tuple]) -> np.ndarray:
    """Intersection over union of every box with every other: float64 [n, m]."""
    one = np.array(boxes, np.float64).reshape(-1, 1, 4)
    two = np.array(others, np.float64).reshape(1, -1, 4)
    sides = np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2])
    shared = np.clip(sides, 0, None).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (one, two)]
    return shared / np.maximum(areas[0] + areas[1] - shared, 1e-12)


def in_order(numbers: list[int]) -> int:
    """Length of the longest rising part of distinct numbers (patience sorting)."""
    import bisect

    tops: list[int] = []
    for number in numbers:
        place = bisect.bisect_left(tops, number)
        tops[place : place + 1] = [number]
    return len(tops)


def order_f1(blocks: list[DocumentBlock], wanted: list[DocumentBlock]) -> float:
    """F1 of the blocks that are there and in the right order.

    Blocks are paired by their text (similarity of 0.5 or more; without text by class and box), boxes break ties; of the
    pairs the most that stand in the gold's order count.
    """
    likeness = np.zeros((min(len(blocks), MAX_BLOCKS), min(len(wanted), MAX_BLOCKS)))
    overlap = np.zeros_like(likeness)
    placed = [[i for i, b in enumerate(side[:MAX_BLOCKS]) if b.box] for side in (blocks, wanted)]
    if all(placed):
        own = box_ious(*([side[i].box for i in numbers] for side, numbers in zip((blocks, wanted), placed)))
        overlap[np.ix_(*placed)] = own
    for i, block in enumerate(blocks[:MAX_BLOCKS]):
        for j, other in enumerate(wanted[:MAX_BLOCKS]):
            if block.text or other.text:
                shorter, longer = sorted((len(block.text), len(other.text)))
                if 2 * shorter >= longer:
                    likeness[i, j] = text_similarity(block.text[:PAIRED_TEXT], other.text[:PAIRED_TEXT])
            elif block.kind.casefold() == other.kind.casefold():
                likeness[i, j] = overlap[i, j]
    pairs = sorted(one_to_one(np.where(likeness >= 0.5, likeness + 0.01 * overlap, 0.0)))
    found = in_order([column for _, column, _ in pairs])
    return 2 * found / (len(blocks) + len(wanted))


def document_scores(prediction: str, gold, scale: float | tuple[float, float] = 1.0, size=None) -> dict[str, float]:
    """A document's answer against the gold one (of `gold_blocks`).

    Returns:
        "text": similarity of all text in reading order (`text_similarity`, blanks do not count);
        "order_f1": `order_f1`;
        "box_iou": mean IoU of boxes paired within their class, highest first; a block too many or too few counts 0;
        "box_f1": F1 of the boxes with an IoU of 0.5 or more;
        "broken": share of blocks that are not whole.
    """
    wanted = gold_blocks(gold, scale, size)
    blocks, broken = parse_document(visible(prediction), scale)
    if wanted is None:
        return {"text": 0.0, "order_f1": 0.0, "box_iou": 0.0, "box_f1": 0.0, "broken": broken / max(1, len(blocks))}
    ious = []
    for kind in {block.kind.casefold() for block in wanted}:
        own, golds = (
            [b.box for b in side[:MAX_BLOCKS] if b.box and b.kind.casefold() == kind] for side in (blocks, wanted)
        )
        if own and golds:
            ious += [iou for _, _, iou in one_to_one(box_ious(own, golds))]
    texts = [" ".join(block.text for block in side if block.text) for side in (blocks, wanted)]
    return {
        "text": text_similarity(*texts),
        "order_f1": order_f1(blocks, wanted),
        "box_iou": sum(ious) / max(len(blocks), len(wanted)),
        "box_f1": 2 * sum(iou >= BOX_THRESHOLD for iou in ious) / (len(blocks) + len(wanted)),
        "broken": broken / max(1, len(blocks)),
    }


def document_parse(prediction: str, gold, scale: float | tuple[float, float] = 1.0, size=None) -> float:
    """Mean of "text" and "box_iou" of `document_scores`."""
    scores = document_scores(prediction, gold, scale, size)
    return (scores["text"] + scores["box_iou"]) / 2


# ---------------------------------------------------------------------------------------------------- speech

CLOCK = r"(?:[0-9]{1,3}:){0,2}[0-9]{1,6}(?:\.[0-9]{1,6})?"
SPAN = re.compile(rf"[\[(<]\s{{0,3}}({CLOCK})\s?s?\s{{0,3}}(?:-->|-|\u2013|to)\s{{0,3}}({CLOCK})\s?s?\s{{0,3}}[\])>]:?")


@dataclass(frozen=True)
class Phrase:
    """What is said from `start` to `end`, in seconds; both None for words without a time."""

    text: str
    start: float | None
    end: float | None


def seconds_of(clock: str) -> float:
    """ "3.5", "1:03.5" or "0:01:03.5" -> seconds."""
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def parse_times(text: str) -> tuple[list[Phrase], int]:
    """ "[0.0-1.2] one two ..." -> phrases, in the order of the text, and how many of them are broken. Never raises.

    Times are seconds, minutes and seconds, or hours too, in any brackets. Words before the first time, and words whose
    time ends before it starts, are phrases without one.
    """
    marks = list(SPAN.finditer(text))
    first = " ".join(text[: marks[0].start() if marks else len(text)].split())
    phrases, broken = [Phrase(first, None, None)] * bool(first), int(bool(first))
    for place, mark in enumerate(marks):
        end_of_text = marks[place + 1].start() if place + 1 < len(marks) else len(text)
        start, end = seconds_of(mark.group(1)), seconds_of(mark.group(2))
        said = " ".join(text[mark.end() : end_of_text].split())
        right = start < end
        broken += not right
        phrases.append(Phrase(said, start if right else None, end if right else None))
    return phrases, broken


def gold_phrases(gold) -> list[Phrase] | None:
    """A gold answer: text with times, or [{"text", "start", "end"}]; None where it is neither."""
    if isinstance(gold, str):
        phrases, broken = parse_times(visible(gold))
        return phrases if phrases and not broken else None
    try:
        phrases = [Phrase(str(one["text"]), float(one["start"]), float(one["end"])) for one in gold]
    except (TypeError, KeyError, ValueError):
        return None
    return phrases if phrases and all(0 <= p.start < p.end < float("inf") for p in phrases) else None


def said_words(phrases: list[Phrase]) -> str:
    return " ".join(phrase.text for phrase in phrases if phrase.text)


def start_offsets(phrases: list[Phrase], wanted: list[Phrase]) -> list[float]:
    """|seconds| between the starts of phrases whose first words are the same one in both (aligned by edit distance)."""
    from rapidfuzz.distance import Levenshtein

    words, starts = [], []
    for side in (phrases, wanted):
        split = [normalise_speech(phrase.text, "other") for phrase in side]
        words.append([word for own in split for word in own])
        starts.append([s for p, own in zip(side, split) for s in [p.start, *[None] * (len(own) - 1)][: len(own)]])
    offsets = []
    for step in Levenshtein.opcodes(*words):
        if step.tag == "equal":
            own, gold = starts[0][step.src_start : step.src_end], starts[1][step.dest_start : step.dest_end]
            offsets += [abs(a - b) for a, b in zip(own, gold) if a is not None and b is not None]
    return offsets


def timed_scores(prediction: str, gold, lang: str | None = None) -> dict[str, float]:
    """Words with times against the sound's own (of `gold_phrases`).

    Returns:
        "words": 1 - WER (`asr_wer`);
        "segment_iou": mean IoU in time of phrases paired one to one, one too many or too few counts 0;
        "segment_f1": F1 of phrases with an IoU of 0.5 or more;
        "starts": share of gold phrases whose first word begins a phrase of the answer too;
        "start_offset": mean |seconds| between their starts (missing where there are none);
        "broken": share of phrases that are not whole.
    """
    wanted = gold_phrases(gold)
    phrases, broken = parse_times(visible(prediction))
    found = {"words": 0.0, "segment_iou": 0.0, "segment_f1": 0.0, "starts": 0.0}
    found["broken"] = broken / max(1, len(phrases))
    if wanted is None:
        return found
    # times as boxes of height 1
    own, golds = (
        [(p.start, 0.0, p.end, 1.0) for p in side[:MAX_BLOCKS] if p.start is not None] for side in (phrases, wanted)
    )
    ious = [iou for _, _, iou in one_to_one(box_ious(own, golds))] if own and golds else []
    found["words"] = asr_wer(said_words(phrases), said_words(wanted), lang)
    found["segment_iou"] = sum(ious) / max(len(phrases), len(wanted))
    found["segment_f1"] = 2 * sum(iou >= BOX_THRESHOLD for iou in ious) / (len(phrases) + len(wanted))
    offsets = start_offsets(phrases, wanted) if len(prediction) <= 10 * MAX_TEXT else []
    found["starts"] = len(offsets) / len(wanted)
    return found | ({"start_offset": sum(offsets) / len(offsets)} if offsets else {})


def timed_speech(prediction: str, gold, lang: str | None = None) -> float:
    """Mean of "words" and "segment_iou" of `timed_scores`."""
    scores = timed_scores(prediction, gold, lang)
    return (scores["words"] + scores["segment_iou"]) / 2


# the parts of a verifier's score that evaluations write down beside it
PARTS = {"document_parse": document_scores, "timed_speech": timed_scores}
SECONDS = ("start_offset",)  # parts that are no shares

__all__ = [
    "PARTS",
    "SECONDS",
    "DocumentBlock",
    "Phrase",
    "document_parse",
    "document_scores",
    "parse_document",
    "parse_times",
    "timed_scores",
    "timed_speech",
]
