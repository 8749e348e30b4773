"""Metrics of the paper's Tables 7 to 10 as verifiers in [0, 1], beside those that training rewards (`rewards.py`).

    verifier             used by                               gold
    exact_match          short answers                         text, or several of which one counts
    contains             OCRBench                              text(s), one of which stands in the answer
    numeric              AIME, counts, MathVista               a number; `rel_tol`, `abs_tol`
    relaxed_accuracy     ChartQA                               a number (within 5 %) or a text
    anls                 DocVQA, InfoVQA                       text(s); normalised Levenshtein similarity, 0 below 0.5
    vqa_accuracy         TextVQA                               the answers of ten people
    option_accuracy      MMMU, AI2D, MMAU, Video-MME, ...      a letter; the option is looked for in the answer
    iou                  boxes                                 [left, top, right, bottom]
    grounding_accuracy   RefCOCO                               such a box; IoU of 0.5 or more
    click_accuracy       ScreenSpot                            such a box; the point lies in it
    asr_wer              OpenASR, TED-LIUM (`rewards.py`)      a transcript; here also over a corpus (`word_errors`)
    ifeval               IFEval (`metrics_instructions.py`)    instructions and their arguments
    document_parse       pages with boxes and classes          tags or blocks (`metrics_grounding.py`)
    timed_speech         speech with times                     lines or phrases (`metrics_grounding.py`)

`rewards.score` is the entry for all of them. What needs a judge model (AlpacaEval, WildVoice, MMLongBench-Doc's
extraction), runs code (LiveCodeBench, SciCode) or a machine (OSWorld, TauBench) is not here: lmms-eval and VLMEvalKit
have those.

Gold boxes are shares of the picture's width and height unless `size` names it in pixels; predicted numbers count to
`scale` (1000: the paper's `<point>` coordinates). A prediction may be anything: nothing here raises because of it.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from .metrics_grounding import document_parse, timed_speech
from .metrics_instructions import instruction_following
from .rewards_answers import chosen_letters, first_point, options_of, plain_number
from .rewards_speech import asr_wer, language_of, normalise_speech
from .rewards_text import plain_form, visible

MAX_CHARS = 20_000  # of an answer that is searched; of longer ones the end is
RESAMPLES = 1000  # of a bootstrap

# ---------------------------------------------------------------------------------------------------- texts


def one_line(text: str) -> str:
    return " ".join(visible(text).casefold().split())


def exact_match(prediction: str, gold: str, case: bool = False) -> float:
    """1 if both are the same but for blanks, invisible characters and (without `case`) case; nothing else differs."""
    if case:
        return float(bool(gold.strip()) and " ".join(visible(prediction).split()) == " ".join(visible(gold).split()))
    return float(bool(gold.strip()) and one_line(prediction) == one_line(gold))


def contains(prediction: str, gold: str, spaces: bool = True) -> float:
    """1 if the gold stands anywhere in the answer, but for case (OCRBench's rule); `spaces=False` leaves blanks out and
    looks at case, as it does for handwritten formulas."""
    answer, wanted = one_line(prediction), one_line(gold)
    if not spaces:
        answer, wanted = ("".join(visible(text).split()) for text in (prediction, gold))
    return float(bool(wanted) and wanted in answer)


def anls(prediction: str, gold: str, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity of an answer (Biten et al. 2019): 1 - edits / longer length, but 0 where it is
    below `threshold`. Case and repeated blanks do not count. Of several golds `score` takes the best.

    A similarity of exactly 0.5 counts, as in the benchmarks' scripts (the definition in the paper drops it).
    """
    answer, wanted = one_line(prediction), one_line(gold)
    longest = max(len(answer), len(wanted))
    if not wanted or min(len(answer), len(wanted)) < threshold * longest or longest > MAX_CHARS:
        return 0.0  # so many letters are missing at least
    from rapidfuzz.distance import Levenshtein

    similarity = 1 - Levenshtein.distance(answer, wanted) / longest
    return similarity if similarity >= threshold else 0.0


ARTICLES = ("a", "an", "the")
NUMBER_WORDS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11))))
NUMBER_WORDS["none"] = "0"
VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # other signs, such as $ and %, are part of an answer


def vqa_form(text: str) -> str:
    """An answer as VQA compares it: no case, articles or punctuation, small numbers as digits.

    A mark becomes a blank, or nothing where it stands beside a blank anywhere, or the text has a number such as 1,000.
    """
    text = one_line(text).replace("'", "")
    given, has_thousands = text, re.search(r"\d,\d", text) is not None
    for mark in VQA_MARKS:
        joins = has_thousands or f" {mark}" in given or f"{mark} " in given
        text = text.replace(mark, "" if joins else " ")
    words = re.sub(r"\.(?!\d)", "", text).split()
    return " ".join(NUMBER_WORDS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, gold: Sequence[str]) -> float:
    """min(1, people who said so / 3), averaged over leaving out one person at a time (Antol et al. 2015).

    VQA's table of contractions is not applied: apostrophes are dropped on both sides instead.
    """
    people = [vqa_form(one) for one in gold] if not isinstance(gold, str) else [vqa_form(gold)]
    agreed = people.count(vqa_form(prediction))
    if len(people) < 2:
        return float(bool(agreed))
    # leaving out one who agrees leaves agreed - 1, one who does not leaves agreed
    left = agreed * min(1.0, (agreed - 1) / 3) + (len(people) - agreed) * min(1.0, agreed / 3)
    return left / len(people)


# ---------------------------------------------------------------------------------------------------- numbers

ANY_NUMBER = re.compile(
    r"(?<![\w.])[+-]?[$\u20ac\u00a3\u00a5]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.?[0-9]+)?(?:e[+-]?[0-9]{1,3})? ?%?"
)


def number_in(text: str) -> tuple[Fraction, str] | None:
    """(value, currency or percent sign): of a text that is a number, else of the last number in it."""
    form = plain_form(text[-MAX_CHARS:])
    whole = plain_number(form)
    if whole is not None:
        return whole
    found = [plain_number(match.group().strip()) for match in ANY_NUMBER.finditer(form) if match.group().strip()]
    found = [number for number in found if number is not None]
    return found[-1] if found else None


def numeric(prediction: str, gold: str, rel_tol: float = 0.0, abs_tol: float = 0.0) -> float:
    """1 if the last number of the answer is the gold's, within `rel_tol` of it or `abs_tol`; units and % are not looked
    at."""
    answer, wanted = number_in(prediction), plain_number(plain_form(gold))
    if answer is None or wanted is None:
        return 0.0
    allowed = max(Fraction(str(rel_tol)) * abs(wanted[0]), Fraction(str(abs_tol)))
    return float(abs(answer[0] - wanted[0]) <= allowed)


def relaxed_accuracy(prediction: str, gold: str, rel_tol: float = 0.05) -> float:
    """ChartQA's relaxed accuracy: numbers within 5 % of the gold (of 0: exactly 0), texts equal but for case.

    Where one side alone has a percent sign, 12 % may be 12 or 0.12. Years have no rule of their own, as in the field.
    """
    answer, wanted = plain_number(plain_form(prediction)), plain_number(plain_form(gold))
    if answer is None or wanted is None:
        return float(bool(plain_form(gold)) and plain_form(prediction) == plain_form(gold))
    values = {answer[0]}
    if (answer[1] == "%") != (wanted[1] == "%"):
        values.add(answer[0] / 100 if answer[1] == "%" else answer[0] * 100)
    return float(any(abs(value - wanted[0]) <= Fraction(str(rel_tol)) * abs(wanted[0]) for value in values))


# ---------------------------------------------------------------------------------------------------- options

# What models write before the option they choose; the last one counts, as they may think aloud before it. A small
# letter counts only where nothing follows it, and "A" or "I" not where a sentence goes on with it ("a dog", "I think").
# Options that are only named ("Option A shows a cat") count where no answer is, and those called wrong do not.
_VERB = r"(?i: is| would be| should be)"
_LETTER = (
    r"(?i: option| choice)?[*_]{0,2}\s{0,2}[:=]?[*_]{0,2}\s{0,2}"
    r"[*_`\"'(\[{<]{0,4}([B-HJ-Z]|[AI](?! [a-z])|A(?= (?:because|since|as|is|for|based|due|given)\b)"
    r"|[a-z](?=[).\]:*]|\s*$))(?![\w'])"
)
SAID = re.compile(rf"(?:(?i:answer){_VERB}?|(?i:option|choice)(?:{_VERB}|(?=[*_]{{0,2}}\s{{0,2}}[:=]))){_LETTER}")
NAMED = re.compile(
    rf"(?<!not )(?i:option|choice){_LETTER}"
    r"(?![)\]}>*_`\"']{0,4},? (?:is|was|would be) (?:wrong|incorrect|not|false)\b)"
)
MARKED = re.compile(r"[(\[]([A-Za-z])[)\]]|(?:\*\*|__)([A-Z])[.):]?(?:\*\*|__)")
LEADING = re.compile(r"[*_(\[]{0,3}([A-Z])[*_)\]]{0,3}(?:[.:)]|\s*$)")


def option_in(text: str, options: dict[str, str], several: bool = False) -> str:
    """The option letter that an answer in sentences commits to; "" where it names none or more than one.

    In this order: what is nothing but a choice; the last "answer is X"; a first line that is only a letter; the last
    "option X" that is not called wrong; the first and the last line that is a choice; the only letter in brackets or in
    bold; the only option whose text stands in the answer.
    """
    text = text[-MAX_CHARS:].strip()
    found = chosen_letters(text, options, several)
    if found:
        return found

    def known(letters) -> list[str]:
        return [letter.upper() for letter in letters if not options or letter.upper() in options]

    lines = [line.strip() for line in text.splitlines() if line.strip()]
    alone = [line.strip("*_`()[]{}.: ") for line in lines[:1]]  # what comes behind it explains
    alone = [letter for letter in alone if re.fullmatch("[A-Z]", letter)]
    for said in (SAID.findall(text), alone, NAMED.findall(text)):
        if (said := known(said)) and not several:
            return said[-1]
    for line in lines[:1] + lines[-1:]:
        found = chosen_letters(line, options, several)
        if not found and (leading := LEADING.match(line)) and known([leading.group(1)]):
            others = set(re.findall(r"(?<![\w'])([B-HJ-Z])(?![\w'])", line[leading.end() :]))
            found = "" if known(others) else leading.group(1).upper()
        if found:
            return found
    marked = set(known(one or two for one, two in MARKED.findall(text)))
    if len(marked) == 1:
        return marked.pop()
    form = plain_form(text)
    named = [letter for letter, option in options.items() if (o := plain_form(option)) and _stands_in(o, form)]
    longest = [a for a in named if not any(a != b and plain_form(options[a]) in plain_form(options[b]) for b in named)]
    return longest[0] if len(longest) == 1 else ""


def _stands_in(part: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def option_accuracy(prediction: str, gold: str, options: dict[str, str] | list[str] | None = None) -> float:
    """1 if the option that the answer commits to (`option_in`) is the gold one; the lenient sister of multiple_choice.

    Args:
        gold: a letter, or the text of an option.
        options: texts by letter, or in order of the letters; without them texts cannot be found, only letters.
    """
    options = options_of(options)
    wanted = chosen_letters(gold, options, several=True)
    if not wanted or any(options and letter not in options for letter in wanted):
        return 0.0
    return float(option_in(prediction, options, several=len(wanted) > 1) == wanted)


# ---------------------------------------------------------------------------------------------------- places

FOUR = re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{1,30})?")
# a box as JSON has it, over several lines or not; a number before it ("2. [") is no part of it
IN_BRACKETS = re.compile(rf"\[\s*(?:{FOUR.pattern}\s*,\s*){{3}}{FOUR.pattern}\s*\]")


def box_of(gold, size: Sequence[float] | None = None) -> tuple[float, float, float, float] | None:
    """Four numbers or "x1,y1,x2,y2" -> a box in shares of width and height; None where it is none."""
    try:
        numbers = [float(part) for part in (gold.strip().strip("[]()").split(",") if isinstance(gold, str) else gold)]
        left, top, right, bottom = numbers
        width, height = (1.0, 1.0) if size is None else (float(side) for side in size)
        box = left / width, top / height, right / width, bottom / height
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return box if 0 <= box[0] < box[2] <= 1 + 1e-6 and 0 <= box[1] < box[3] <= 1 + 1e-6 else None


def predicted_box(text: str, scale: float = 1000) -> tuple[float, float, float, float] | None:
    """The last four numbers in brackets of an answer ("[10, 20, 300, 400]"), else in a row, as shares."""
    text = visible(text[-MAX_CHARS:])
    runs = IN_BRACKETS.findall(text) or re.findall(r"-?[0-9][0-9., ()\[\]-]*", text)
    for run in reversed(runs):
        numbers = [float(number) / scale for number in FOUR.findall(run)]
        if len(numbers) == 4:
            left, top, right, bottom = numbers
            return (left, top, right, bottom) if left < right and top < bottom else None
    return None


def iou(prediction: str, gold, scale: float = 1000, size: Sequence[float] | None = None) -> float:
    """Intersection over union of the answer's box and the gold one.

    Args:
        gold: [left, top, right, bottom] in shares of the picture, or in pixels of `size` (width, height).
        scale: what the answer's numbers count to.
    """
    own, wanted = predicted_box(prediction, scale), box_of(gold, size)
    if own is None or wanted is None:
        return 0.0
    width = min(own[2], wanted[2]) - max(own[0], wanted[0])
    height = min(own[3], wanted[3]) - max(own[1], wanted[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (own, wanted)]
    return shared / (sum(areas) - shared)


def grounding_accuracy(
    prediction: str, gold, threshold: float = 0.5, scale: float = 1000, size: Sequence[float] | None = None
) -> float:
    """1 if the answer's box overlaps the gold one by an IoU of `threshold` or more (RefCOCO's Acc@0.5)."""
    return float(iou(prediction, gold, scale, size) >= threshold > 0)


def click_accuracy(prediction: str, gold, scale: float = 1000, size: Sequence[float] | None = None) -> float:
    """1 if the point clicked lies in the gold box (ScreenSpot); of a predicted box its middle is clicked.

    The point is the first `<point>`; without that mark two numbers alone, or in brackets anywhere (the last such).
    """
    wanted = box_of(gold, size)
    point = first_point(prediction, scale, tagged=False)[0]
    if point is None and "<point>" not in prediction:
        box = predicted_box(prediction, 1)
        pairs = re.findall(r"[(\[] ?(-?[0-9.]{1,20}) ?, ?(-?[0-9.]{1,20}) ?[)\]]", visible(prediction[-MAX_CHARS:]))
        if box is not None:
            point = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        elif pairs:
            try:
                point = float(pairs[-1][0]), float(pairs[-1][1])
            except ValueError:
                return 0.0
    if point is None or wanted is None:
        return 0.0
    x, y = point[0] / scale, point[1] / scale
    return float(wanted[0] <= x <= wanted[2] and wanted[1] <= y <= wanted[3])


# ---------------------------------------------------------------------------------------------------- speech


def word_errors(prediction: str, gold: str, lang: str | None = None) -> tuple[int, int]:
    """(substitutions + deletions + insertions, words of the gold transcript) after normalisation (`normalise_speech`).

    Their sums over a corpus give its WER. Letters stand for words in languages written without spaces.
    """
    from rapidfuzz.distance import Levenshtein

    lang = lang or language_of(gold)
    wanted, words = normalise_speech(gold, lang), normalise_speech(prediction, lang)
    return Levenshtein.distance(wanted, words), len(wanted)


# ---------------------------------------------------------------------------------------------------- intervals


def wilson_interval(right: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default; sensible at 0 and 1 and for small samples too."""
    share, spread = right / total, z**2 / total
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def bootstrap_interval(
    values: Sequence, statistic: Callable[[list], float], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap (95 %) of a statistic over rows; the same for the same rows and seed."""
    rng, count = random.Random(seed), len(values)
    found = sorted(statistic(rng.choices(values, k=count)) for _ in range(resamples))
    return found[int(0.025 * resamples)], found[min(resamples - 1, int(0.975 * resamples))]


def mean_interval(scores: Sequence[float]) -> tuple[float, float, str]:
    """95 % interval of a mean of scores, and how it was made: Wilson where all are 0 or 1, else bootstrap."""
    if all(score in (0, 1) for score in scores):
        return *wilson_interval(sum(scores), len(scores)), "wilson"
    return *bootstrap_interval(scores, lambda drawn: sum(drawn) / len(drawn)), "bootstrap"


def corpus_wer(counts: Sequence[tuple[int, int]]) -> float:
    """Word error rate of a corpus from `word_errors` of its rows; nothing said where nothing was to be said is 0."""
    errors, words = (sum(column) for column in zip(*counts))
    return errors / words if words else float(errors > 0)


# ---------------------------------------------------------------------------------------------------- answers

ANSWER_LINE = re.compile(
    r"(?:^|\n)[*_#\s]{0,6}(?:the )?(?:final )?answer(?: is)?[*_]{0,2}\s{0,2}:[*_]{0,2}\s{0,3}(.+)", re.I
)
WHOLE = ("asr_wer", "tool_call", "ifeval", "gui_coordinate", "click_accuracy", "format", "option_accuracy", "contains")


def final_answer(text: str, verifier: str) -> str:
    """What of an answer (text after the reasoning) a verifier grades: the last `\\boxed{}`, else what stands behind the
    last "Answer:" of a line's beginning, else the whole text. Transcripts, documents, clicks, calls and
    instructions: the text."""
    if verifier in ("asr_wer", "tool_call", "ifeval", "document_parse", "timed_speech"):
        return text.strip()
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, position = 1, start + 7
        while position < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        if not depth:
            return text[start + 7 : position - 1].strip()
    if verifier in WHOLE:
        return text.strip()
    found = ANSWER_LINE.findall(text[-MAX_CHARS:])
    return found[-1].strip(" \t\n*_") if found else text.strip()


METRICS: dict[str, Callable[..., float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "numeric": numeric,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
    "vqa_accuracy": vqa_accuracy,
    "option_accuracy": option_accuracy,
    "iou": iou,
    "grounding_accuracy": grounding_accuracy,
    "click_accuracy": click_accuracy,
    "ifeval": instruction_following,
    "document_parse": document_parse,
    "timed_speech": timed_speech,
}
BEST_OF = ("exact_match", "contains", "numeric", "relaxed_accuracy", "anls", "option_accuracy")  # of several golds
# whose gold need not be text
STRUCTURED = ("vqa_accuracy", "iou", "grounding_accuracy", "click_accuracy", "ifeval", "document_parse", "timed_speech")

__all__ = [
    "METRICS",
    "anls",
    "asr_wer",
    "bootstrap_interval",
    "click_accuracy",
    "contains",
    "corpus_wer",
    "exact_match",
    "final_answer",
    "grounding_accuracy",
    "iou",
    "mean_interval",
    "numeric",
    "option_accuracy",
    "option_in",
    "relaxed_accuracy",
    "vqa_accuracy",
    "wilson_interval",
    "word_errors",
]
