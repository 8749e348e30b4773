"""Verifiers: rule-based rewards in [0, 1] for reinforcement learning and evaluation (paper section 3.2).

`score(verifier, prediction, gold, **args)` is the one entry; every verifier is a plain function. Sections 3.2.3 and
3.2.4 name string-match, mathruler, multiple-choice, gui-coordinate and ASR, and a format score; their formulas follow
NVIDIA's public code (`0.9 * accuracy + 0.1 * format`, `(1 - d / 0.15)^2`, 0.9 per extra block or box), its
mistakes do not. Tool calls are binary as in Nemotron-Research-Tool-N1; abstention serves unanswerable prompts.

A prediction is what a policy wrote and may be anything: every verifier takes time linear in its length (or bounded),
never raises because of it, needs no clock, signal or process, and may run in any thread. A gold answer is data:
`check_gold` says what is wrong with it when the data is read; scored nevertheless, it gives 0.

The metrics of evaluation alone are in `metrics.py`; their names are verifiers too.
"""

import json
import re
from collections.abc import Callable
from fractions import Fraction

from .media_source import OmniInputError
from .metrics import BEST_OF, METRICS, STRUCTURED, box_of
from .metrics_grounding import gold_blocks, gold_phrases
from .metrics_instructions import check_instructions
from .rewards_answers import chosen_letters, first_point, is_abstention, options_of, plain_number, point_of
from .rewards_math import math_equal
from .rewards_speech import asr_wer
from .rewards_text import pair_up, plain_form

MAX_CHARS = 1_000_000  # of a prediction; longer ones score 0
MAX_ANSWER_CHARS = 100_000  # of an answer compared as text
FORMAT_WEIGHT = 0.1
EXTRA_FACTOR = 0.9  # accuracy is multiplied by it for every extra thinking tag, box or point
GRADED_BOXES = 5
MAX_CLICK_DISTANCE = 0.15  # in units of the picture's sides
END_MARKS = ("<|im_end|>", "<|endoftext|>", "<|end|>", "<|eot_id|>", "</s>", "<unk>", "<pad>")

# ---------------------------------------------------------------------------------------------------- string match

STATES = """
AL Alabama|AK Alaska|AZ Arizona|AR Arkansas|CA California|CO Colorado|CT Connecticut|DE Delaware|FL Florida|GA Georgia|
HI Hawaii|ID Idaho|IL Illinois|IN Indiana|IA Iowa|KS Kansas|KY Kentucky|LA Louisiana|ME Maine|MD Maryland|
MA Massachusetts|MI Michigan|MN Minnesota|MS Mississippi|MO Missouri|MT Montana|NE Nebraska|NV Nevada|NH New Hampshire|
NJ New Jersey|NM New Mexico|NY New York|NC North Carolina|ND North Dakota|OH Ohio|OK Oklahoma|OR Oregon|PA Pennsylvania|
RI Rhode Island|SC South Carolina|SD South Dakota|TN Tennessee|TX Texas|UT Utah|VT Vermont|VA Virginia|WA Washington|
WV West Virginia|WI Wisconsin|WY Wyoming|DC District of Columbia
"""
STATE_NAMES = dict(row.split(" ", 1) for row in STATES.casefold().replace("\n", "").split("|"))


def same_text(a: str, b: str, rel_tol: Fraction = Fraction(0)) -> bool:
    """Whether two plain forms are equal as text or as numbers. A missing % or currency sign is no difference."""
    if a == b:
        return bool(a)
    one, two = plain_number(a), plain_number(b)
    if one is None or two is None or (one[1] and two[1] and one[1] != two[1]):
        return False
    return abs(one[0] - two[0]) <= rel_tol * abs(two[0])


def text_items(text: str) -> list[str]:
    """The items of "red, green, and blue", without quotes; a text without separators is one item."""
    return [item for item in (item.strip("\"'` ") for item in re.split(r" ?, ?and | ?[,;] ?| and | & ", text)) if item]


def without_list_brackets(text: str, other: str) -> str:
    """[red, blue] as red, blue where the other answer has no brackets; parentheses are part of a point or interval."""
    inner = text[1:-1].strip()
    bracketed = text[:1] + text[-1:] in ("[]", "{}") and not re.search(r"[\[\]{}\\]", inner + other[:1])
    return inner if bracketed and not other.startswith("(") else text


def string_match(prediction: str, gold: str, rel_tol: float = 0.0) -> float:
    """1 if the answers are the same text, number, list (in this order) or US state; else 0.

    Case, width, invisible characters, LaTeX and Markdown wrappers, outer quotes and final punctuation do not count,
    nor do the brackets of a list where the other answer has none.

    Args:
        rel_tol: share of the gold number, or of each of a list, by which a number may be off (ChartQA: 0.05; not for
            years).
    """
    if max(len(prediction), len(gold)) > MAX_ANSWER_CHARS:
        return 0.0
    answer, wanted, tolerance = plain_form(prediction), plain_form(gold), Fraction(str(rel_tol))
    answer, wanted = without_list_brackets(answer, wanted), without_list_brackets(wanted, answer)
    if not answer or not wanted:
        return 0.0
    if same_text(answer, wanted, tolerance):
        return 1.0
    if STATE_NAMES.get(answer, answer) == STATE_NAMES.get(wanted, wanted):
        return 1.0
    items, wanted_items = text_items(answer), text_items(wanted)
    if len(items) != len(wanted_items) or len(items) < 2:
        return 0.0
    return float(all(same_text(a, b, tolerance) for a, b in zip(items, wanted_items)))


def math(prediction: str, gold: str) -> float:
    """1 if the answers are mathematically the same, else 0 (`rewards_math`)."""
    return float(math_equal(prediction, gold))


# ---------------------------------------------------------------------------------------------------- choices


def multiple_choice(prediction: str, gold: str, options: dict[str, str] | list[str] | None = None) -> float:
    """1 if the prediction commits to the gold letter (or, with options, to its text) and to nothing else; else 0.

    Args:
        gold: a letter in any dress ("B", "(b)", "B."), several ("A, C"), or the text of an option.
        options: texts by letter, or in order of the letters.
    """
    options = options_of(options)
    wanted = chosen_letters(gold, options, several=True)
    if not wanted or any(options and letter not in options for letter in wanted):
        return 0.0
    return float(chosen_letters(prediction, options, several=len(wanted) > 1) == wanted)


# ---------------------------------------------------------------------------------------------------- coordinates


def click_score(
    text: str, gold, max_dist: float = MAX_CLICK_DISTANCE, scale: float = 1000, tagged: bool = True
) -> tuple[float, int]:
    """(score of the first point alone, number of extra points); a point outside the picture scores 0."""
    point, extra = first_point(text, scale, tagged)
    target = point_of(gold)
    if point is None or target is None or not max_dist > 0:
        return 0.0, extra
    distance = ((point[0] / scale - target[0]) ** 2 + (point[1] / scale - target[1]) ** 2) ** 0.5
    return max(0.0, 1 - distance / max_dist) ** 2, extra


def gui_coordinate(
    prediction: str, gold, max_dist: float = MAX_CLICK_DISTANCE, scale: float = 1000, tagged: bool = True
) -> float:
    """(1 - d / max_dist)^2 of the first `<point>[(x, y)]</point>`, times 0.9 for every further point.

    Args:
        prediction: x and y in thousandths of the picture's width and height.
        gold: "x,y" (or a pair) as shares of width and height.
        max_dist: Euclidean distance, in the gold's units, from which on the score is 0.
        scale: what the prediction's numbers count to; 100 for percent.
        tagged: False takes two numbers alone ("50 60", "(50, 60)") as a point too.
    """
    score, extra = click_score(prediction, gold, max_dist, scale, tagged)
    return score * EXTRA_FACTOR**extra


# ---------------------------------------------------------------------------------------------------- tool calls


def unique_keys(pairs: list) -> dict:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def read_json(text: str):
    return json.loads(text, object_pairs_hook=unique_keys)


def call_of(entry) -> tuple[str, dict]:
    """A call as JSON, {"name", "arguments"} or {"function": {...}}, -> (name, arguments). Raises ValueError."""
    entry = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise ValueError("a call needs a name")
    arguments = entry.get("arguments", entry.get("parameters"))
    arguments = {} if arguments is None else read_json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise ValueError("arguments must be an object")
    return entry["name"], arguments


def parse_tool_calls(text: str) -> list[tuple[str, dict, bool]]:
    """An assistant's answer -> [(name, arguments, typed)].

    Typed arguments are JSON, others the strings of `<parameter=...>`. Both `<function=name><parameter=p>...` (as the
    chat template has it) and JSON inside `<tool_call>`, one call or a list of them (as Tool-N1's prompt asks for), are
    read. Text may stand before the calls, nothing behind them.

    Raises:
        ValueError: anything about the structure that is not as it must be.
    """
    calls = []
    if text.count("</tool_call>") != text.count("<tool_call>"):
        raise ValueError("calls are not closed")
    for piece in text.split("<tool_call>")[1:]:
        body, closed, behind = piece.partition("</tool_call>")
        body = body.strip()
        if not closed or behind.strip():
            raise ValueError("text behind a call")
        if body.startswith(("{", "[")):
            entries = read_json(body)
            if not entries:
                raise ValueError("no call inside")
            calls += [(*call_of(entry), True) for entry in (entries if isinstance(entries, list) else [entries])]
            continue
        head, found, rest = body.partition(">")
        if not found or not head.startswith("<function=") or not rest.endswith("</function>"):
            raise ValueError("no function inside a call")
        name, rest, arguments = head.removeprefix("<function=").strip(), rest.removesuffix("</function>"), {}
        *parameters, tail = rest.split("</parameter>")
        for parameter in parameters:
            key, found, value = parameter.lstrip().partition(">")
            if not found or not key.startswith("<parameter=") or key in arguments:
                raise ValueError("a parameter without name, or twice")
            arguments[key] = value.removeprefix("\n").removesuffix("\n")
        if not name or tail.strip():
            raise ValueError("a call without name, or with text between parameters")
        calls.append((name, {key.removeprefix("<parameter=").strip(): v for key, v in arguments.items()}, False))
    return calls


def same_json(a, b) -> bool:
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_json(one, two) for one, two in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    return isinstance(a, str) and isinstance(b, str) and a == b


def same_call(call: tuple[str, dict, bool], gold: tuple[str, dict]) -> bool:
    name, arguments, typed = call
    if name != gold[0] or arguments.keys() != gold[1].keys():
        return False
    for key, wanted in gold[1].items():
        value = arguments[key]
        if not typed and isinstance(wanted, str):
            if value.strip() != wanted.strip():
                return False
            continue
        if not typed:
            words = {"True": True, "False": False, "None": None}
            value = words[value.strip()] if value.strip() in words else read_json(value)
        if not same_json(value, wanted):
            return False
    return True


def gold_calls(gold) -> list[tuple[str, dict]]:
    gold = read_json(gold) if isinstance(gold, str) else gold
    return [call_of(entry) for entry in (gold if isinstance(gold, list) else [gold])]


def tool_call(prediction: str, gold, prompt_opened_think: bool | None = None) -> float:
    """1 if the structure is valid and the calls are exactly the gold ones, in any order; else 0.

    Args:
        gold: the calls as a list (or its JSON) of {"name", "arguments"}; [] where no call is right.
        prompt_opened_think: True: there must be exactly one thinking block, opened by the prompt; False: none; None:
            not looked at.
    """
    try:
        thinking = split_thinking(prediction, bool(prompt_opened_think))
        if thinking is None:
            return 0.0
        answer, blocks, extra = thinking
        if prompt_opened_think is not None and (blocks != int(prompt_opened_think) or extra):
            return 0.0
        calls, wanted = parse_tool_calls(without_end_marks(answer)), gold_calls(gold)
        return float(len(calls) == len(wanted) and pair_up(calls, wanted, same_call))
    except (ValueError, RecursionError):
        return 0.0


# ---------------------------------------------------------------------------------------------------- abstention


def abstention(prediction: str, gold: str = "unanswerable") -> float:
    """1 if a prompt that cannot be answered was answered by abstaining, in any words (`is_abstention`); else 0, also
    where the gold is an answer."""
    return float(is_abstention(prediction) and is_abstention(gold))


# ---------------------------------------------------------------------------------------------------- format


def without_end_marks(text: str) -> str:
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        mark = next((mark for mark in END_MARKS if text.endswith(mark, 0, end)), None)
        if mark is None:
            return text[:end]
        end -= len(mark)


def split_thinking(text: str, prompt_opened_think: bool) -> tuple[str, int, int] | None:
    """Decoded completion -> (what stands outside of thinking, thinking blocks, tags beyond one pair).

    None where thinking never ends. Further blocks are taken out of the answer too.
    """
    if prompt_opened_think and not text.lstrip().startswith("<think>"):
        text = "<think>" + text
    opens, closes = text.count("<think>"), text.count("</think>")
    extra = max(0, opens - 1) + max(0, closes - 1)
    if not opens:  # a closing tag alone: what stands before it was meant as thinking
        return (text.partition("</think>")[2] if closes else text), 0, extra
    answer, blocks, position = [], 0, 0
    while (start := text.find("<think>", position)) >= 0:
        end = text.find("</think>", start)
        if end < 0:
            if not blocks:
                return None
            position = len(text)  # thinking that goes on to the end answers nothing
            break
        if blocks:
            answer.append(text[position:start])
        blocks, position = blocks + 1, end + len("</think>")
    return "".join(answer) + text[position:], blocks, extra


def boxes(text: str) -> tuple[list[str], int]:
    """(contents of the outermost `\\boxed{}` and `\\fbox{}` in order, how many were begun and not closed), one pass."""
    stack, found = [], []
    for match in re.finditer(r"\\f?boxed\s?\{|\\fbox\s?\{|\\[{}\\]|[{}]", text):
        mark = match.group()
        if mark == "}":
            opening = stack.pop() if stack else None
            if opening is not None:
                while found and found[-1][0] > opening:
                    found.pop()
                found.append((opening, match.start()))
        elif mark == "{" or "box" in mark:
            stack.append(None if mark == "{" else match.end())
    return [text[start:end] for start, end in found], sum(opening is not None for opening in stack)


def format_reward(prediction: str, gold: str, prompt_opened_think: bool = True, **args) -> float:
    """0.9 * accuracy + 0.1 * format of a whole completion, as decoded with its thinking tags.

    Format is 1 for one thinking block followed by one box (a point for gui-coordinate, a text for asr). Accuracy is
    the mean over the boxes, of which five are graded, times 0.9 for every extra thinking tag, box or point. A
    completion that never ends its thinking scores 0. Tool calls stay binary.

    Args:
        gold: "verifier:answer", the names with - or _; mathruler and asr are names too.
        prompt_opened_think: the generation prompt ended with `<think>`; False: thinking was off, no format credit.
        args: of the verifier.
    """
    name, found, answer = gold.partition(":")
    if not found or (name := verifier_name(name)) == "format":
        return 0.0
    if name == "tool_call":
        return tool_call(prediction, answer, prompt_opened_think, **args)
    thinking = split_thinking(prediction, prompt_opened_think)
    if thinking is None:
        return 0.0
    text, blocks, extra = thinking
    text = without_end_marks(text)
    contents, dangling = boxes(text)
    if name == "gui_coordinate":
        accuracy, extra_points = click_score(text, answer, **args)
        given = "</point>" in text or (not args.get("tagged", True) and first_point(text, tagged=False)[0] is not None)
        extra, one = extra + extra_points, given and extra_points == 0
    elif name in ("asr_wer", "document_parse", "timed_speech"):
        spoken = contents[0] if len(contents) == 1 else text.replace("</think>", " ")
        accuracy, one = VERIFIERS[name](spoken, answer, **args), bool(text.strip())
        if not one:
            return 0.0
    else:
        graded = [VERIFIERS[name](content, answer, **args) for content in contents[:GRADED_BOXES]]
        accuracy = sum(graded) / max(1, len(contents))
        extra, one = extra + max(0, len(contents) + dangling - 1), len(contents) == 1 and not dangling
    return (1 - FORMAT_WEIGHT) * accuracy * EXTRA_FACTOR**extra + FORMAT_WEIGHT * (blocks == 1 and one)


def answer_of(completion: str, verifier: str, prompt_opened_think: bool = True, whole: bool = False) -> str:
    """What of a whole completion `score(verifier, ...)` grades: the first box; of clicks, speech and calls the text.

    "" where thinking never ends or no box is there. For pass rates and evaluation, where format does not count.
    `whole` takes the text for every verifier: for a policy that was not taught to box its answers.
    """
    thinking = split_thinking(completion, prompt_opened_think) if len(completion) <= MAX_CHARS else None
    if thinking is None:
        return ""
    text = without_end_marks(thinking[0])
    if whole:
        return text.strip()
    if verifier_name(verifier) in ("gui_coordinate", "tool_call", "document_parse", "timed_speech"):
        return text
    contents = boxes(text)[0]
    return contents[0] if contents else text if verifier_name(verifier) == "asr_wer" else ""


# ---------------------------------------------------------------------------------------------------- entry

VERIFIERS: dict[str, Callable[..., float]] = {
    "string_match": string_match,
    "math": math,
    "multiple_choice": multiple_choice,
    "gui_coordinate": gui_coordinate,
    "asr_wer": asr_wer,
    "tool_call": tool_call,
    "abstention": abstention,
    "format": format_reward,
    **METRICS,
}
LISTED = ("string_match", "math", "multiple_choice", "abstention", *BEST_OF)  # the gold may be a list of answers
ALIASES = {"mathruler": "math", "asr": "asr_wer", "wer": "asr_wer", "mcq": "multiple_choice"}


def verifier_name(name: str) -> str:
    """The name in VERIFIERS of a verifier as data files write it. Raises OmniInputError."""
    plain = name.strip().lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in VERIFIERS:
        raise OmniInputError(f"no verifier is called {name[:50]!r}; there are {', '.join(VERIFIERS)}")
    return plain


def score(verifier: str, prediction: str | None, gold, **args) -> float:
    """How well a prediction answers, in [0, 1].

    Args:
        verifier: a name of VERIFIERS, with - or _.
        prediction: what the policy wrote: for "format" (and "tool_call") the completion with its thinking tags, for the
            others the answer alone (the content of the box).
        gold: the right answer; a list of them for string_match, math, multiple_choice, abstention and the metrics of
            `metrics.BEST_OF`: the best counts. Points, calls, boxes and instructions have forms of their own.
        args: of the verifier: rel_tol, options, max_dist, scale, tagged, lang, prompt_opened_think, ...

    Raises:
        OmniInputError: an unknown verifier.
        TypeError: an argument that the verifier does not have.
    """
    name = verifier_name(verifier)
    if not isinstance(prediction, str) or len(prediction) > MAX_CHARS:
        return 0.0
    if isinstance(gold, list) and name in LISTED:
        return max((score(name, prediction, one, **args) for one in gold), default=0.0)
    if isinstance(gold, (int, float)):
        gold = str(gold)
    if name not in ("tool_call", "gui_coordinate", *STRUCTURED) and not isinstance(gold, str):
        return 0.0
    return min(1.0, max(0.0, float(VERIFIERS[name](prediction, gold, **args))))


def check_gold(verifier: str, gold, **args) -> None:
    """Raises OmniInputError where a gold answer cannot be reached by any prediction; for the reading of data."""
    name = verifier_name(verifier)
    if name == "format":
        inner, found, answer = str(gold).partition(":")
        if not found:
            raise OmniInputError(f"gold must be 'verifier:answer', got {str(gold)[:80]!r}")
        return check_gold(inner, answer, **{k: v for k, v in args.items() if k != "prompt_opened_think"})
    if name == "gui_coordinate":
        fine = point_of(gold) is not None
    elif name in ("iou", "grounding_accuracy", "click_accuracy"):
        fine = box_of(gold, args.get("size")) is not None
    elif name == "ifeval":
        return check_instructions(gold)
    elif name == "document_parse":
        fine = gold_blocks(gold, **args) is not None
    elif name == "timed_speech":
        fine = gold_phrases(gold) is not None
    elif name == "vqa_accuracy":
        fine = bool(gold) and all(isinstance(one, str) for one in gold)
    elif name == "tool_call":
        try:
            fine = gold_calls(gold) is not None
        except (ValueError, RecursionError):
            fine = False
    elif name == "asr_wer":
        fine = isinstance(gold, str)
    else:
        fine = score(name, gold[0] if isinstance(gold, list) and gold else str(gold), gold, **args) == 1.0
    if not fine:
        raise OmniInputError(f"no prediction can score 1 with {name} and the gold answer {str(gold)[:80]!r}")


__all__ = ["VERIFIERS", "answer_of", "check_gold", "is_abstention", "parse_tool_calls", "score"]
