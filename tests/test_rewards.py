"""The verifiers: how every family scores, and that no string makes one slow, large, wrong beside others, or fail.

Time limits are CPU seconds of the calling thread, so a busy machine does not matter.
"""

import json
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

from modeling_omni.media import OmniInputError
from modeling_omni.metrics import METRICS
from modeling_omni.rewards import VERIFIERS, check_gold, is_abstention, parse_tool_calls, score
from modeling_omni.rewards_math import math_equal
from modeling_omni.rewards_speech import normalise_speech

LIMIT = 3.0  # CPU seconds of one call, import of a normaliser included
OPTIONS = {"A": "cat", "B": "dog", "C": "E. coli", "D": "None of the above"}

CALL = '{"name": "move", "arguments": {"x": 3, "fast": true, "to": "the door", "path": [1, 2.5]}}'
XML_CALL = (
    "<tool_call>\n<function=move>\n<parameter=x>\n3\n</parameter>\n<parameter=fast>\nTrue\n</parameter>\n"
    "<parameter=to>\nthe door\n</parameter>\n<parameter=path>\n[1, 2.5]\n</parameter>\n</function>\n</tool_call>"
)
JSON_CALL = f"<tool_call>{CALL}</tool_call>"
TOOL_CALL = [
    (XML_CALL, f"[{CALL}]", 1.0),
    (JSON_CALL, f"[{CALL}]", 1.0),
    (XML_CALL, CALL, 1.0),
    (XML_CALL, [{"type": "function", "function": {"name": "move", "arguments": json.loads(CALL)["arguments"]}}], 1.0),
    ("I move now.\n" + XML_CALL + "\n<|im_end|>", CALL, 1.0),
    ("thought</think>\n" + XML_CALL, CALL, 1.0, {"prompt_opened_think": True}),
    ("<think>thought</think>" + XML_CALL, CALL, 1.0),
    (XML_CALL, CALL, 0.0, {"prompt_opened_think": True}),
    ("a</think>b</think>" + XML_CALL, CALL, 0.0, {"prompt_opened_think": True}),
    (XML_CALL + " done", CALL, 0.0),
    (XML_CALL.replace("the door", "the window"), CALL, 0.0),
    (XML_CALL.replace("=move", "=stop"), CALL, 0.0),
    (XML_CALL.replace("</function>", ""), CALL, 0.0),
    (XML_CALL.replace("<tool_call>", ""), CALL, 0.0),
    (XML_CALL.replace("\n3\n", "\nthree\n"), CALL, 0.0),
    (JSON_CALL.replace("true", '"true"'), CALL, 0.0),
    (JSON_CALL.replace("true", "1"), CALL, 0.0),
    (JSON_CALL.replace('"x": 3', '"x": 3.0'), CALL, 1.0),
    (JSON_CALL.replace('"x": 3', '"x": 3, "x": 3'), CALL, 0.0),
    (JSON_CALL.replace('"x": 3, ', ""), CALL, 0.0),
    (JSON_CALL.replace('"x": 3', '"x": 3, "y": 1'), CALL, 0.0),
    (JSON_CALL * 2, CALL, 0.0),
    (JSON_CALL + '<tool_call>{"name": "stop", "arguments": {}}</tool_call>', [{"name": "stop"}, json.loads(CALL)], 1.0),
    ("It rains.", "[]", 1.0),
    (JSON_CALL, "[]", 0.0),
    ("It rains.", CALL, 0.0),
    ("<tool_call>{}</tool_call>", CALL, 0.0),
    ("<tool_call>" + "[" * 50_000, CALL, 0.0),
    ('<tool_call>{"name": "move", "arguments": ' + '{"a":' * 50_000 + "}</tool_call>", CALL, 0.0),
    ("<tool_call><function=move>" + "<parameter=x>1</parameter>" * 2 + "</function></tool_call>", CALL, 0.0),
]
ABSTENTION = [
    ("unanswerable", "unanswerable", 1.0),
    ("Unanswerable.", "unanswerable", 1.0),
    ("[IDK]", "unanswerable", 1.0),
    ("I don't know", "unanswerable", 1.0),
    ("This question cannot be answered from the image.", "unanswerable", 1.0),
    ("It cannot be determined.", "unanswerable", 1.0),
    ("Not enough information", "unanswerable", 1.0),
    ("insufficient evidence", "I cannot tell", 1.0),
    ("unanswerable, but perhaps 5", "unanswerable", 0.0),
    ("5", "unanswerable", 0.0),
    ("", "unanswerable", 0.0),
    ("unanswerable", "5", 0.0),
]
MORE = {
    "math": [
        ("8", [7, 8], 1.0),
        ("12", 12, 1.0),
        (r"\frac{x}{0}", "0", 0.0),
        ("x", "y", 0.0),
        (r"e^{\pi\sqrt{163}}", "262537412640768744", 0.0),
        ("3." + "14159265358979323846264338327950288419716939937510582097494459230781", r"\pi", 0.0),
        (r"\sqrt[3]{-8}", "-2", 1.0),
        (r"\left|-\frac{3}{4}\right|", "0.75", 1.0),
        (r"\lfloor 2.7 \rfloor", "2", 1.0),
        ("import os", "0.5", 0.0),
        ("lambda: 1", "0.5", 0.0),
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", 1.0),
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{5}}", 0.0),
        ("5 apples", "5 books", 0.0),
        ("2, 3", "2", 0.0),
        ("x = 2 = 3", "2", 0.0),
        ("1/2 = 0.5", "0.5", 1.0),
    ],
    "string_match": [("b", ["a", "b"], 1.0), ("7", 7, 1.0), ("10.5", "10", 1.0, {"rel_tol": 0.05})],
    "multiple_choice": [("B", ["A", "B"], 1.0), ("dog", "B", 1.0, {"options": ["cat", "dog"]})],
    "gui_coordinate": [
        ("<point>[(500,500)]</point>", [0.5, 0.5], 1.0),
        ("<point>[(500,500)]</point>", "left", 0.0),
        ("<point>[(500,500)]</point>", "0.5,nan", 0.0),
        ("<point>[(" + "9" * 500 + ",1)]</point>", "0,0", 0.0),
    ],
    "format": [
        ("a</think>\\boxed{0.5}", "mathruler:1/2", 1.0),
        ("a</think>" + XML_CALL, "tool-call:" + CALL, 1.0),
        ("a</think>" + JSON_CALL + "!", "tool-call:" + CALL, 0.0),
        ("a</think>\\boxed{B}", "B", 0.0),
        ("a</think>\\boxed{x}\\boxed{", "string-match:x", 0.81),
        ("a</think>\\boxed{\\frac{1}{2}} or \\boxed{2}", "math:0.5", 0.405),
        ("a</think><point>[(575,500)]</point>", "gui-coordinate:0.5,0.5", 0.325),
    ],
}
CASES = {name: list(rows) for name, rows in MORE.items()} | {
    "tool_call": TOOL_CALL,
    "abstention": ABSTENTION,
    "asr_wer": [],
}
for line in (Path(__file__).parent / "data" / "reward_cases.jsonl").read_text().splitlines():
    row = json.loads(line)
    CASES[row["verifier"]].append((row["prediction"], row["gold"], row["score"], row.get("args", {})))


def timed_score(verifier: str, prediction: str, gold, **args) -> float:
    """The score, which must come in time and lie in [0, 1]."""
    start = time.thread_time()
    value = score(verifier, prediction, gold, **args)
    spent = time.thread_time() - start
    assert spent < LIMIT, f"{verifier} took {spent:.1f} s for {prediction[:40]!r}"
    assert isinstance(value, float) and 0.0 <= value <= 1.0
    return value


TRAINED = [name for name in VERIFIERS if name not in METRICS]  # the others: test_metrics.py


@pytest.mark.parametrize("verifier", TRAINED)
def test_cases(verifier):
    wrong = []
    for prediction, gold, expected, *args in CASES[verifier]:
        value = timed_score(verifier, prediction, gold, **(args[0] if args else {}))
        if abs(value - expected) > 1e-6:
            wrong.append((prediction, gold, expected, value))
    assert not wrong


def test_every_family_has_cases():
    assert {name for name in TRAINED if len(CASES[name]) >= 12} == set(TRAINED)
    assert sum(map(len, CASES.values())) > 300


# ------------------------------------------------------------------------------------------------- hostile strings

PIECES = r"""( ) [ ] { } < > \boxed{ \text{ <think> </think> <point> </point> <tool_call> </tool_call> $ $$ \( " ' ` **
__ , ; . ... ! ? 9 1, 0. ^ 9^ - + \pm / \frac \frac{ \sqrt \sqrt{ x x^ sin \sin log_ | % \% \\ \ & B (B) B,
<function= {"a": [[ null, = <= : 9! _ 1_ 0.\overline{ <|im_end|> </s> ° ^\circ \begin{pmatrix} 1& é ² ½ √ ∞ 你 가 ﷺ
1st $9 ¢ don't"""
PIECES = PIECES.split() + [
    " ", "\n", ",", " and ", " or ", "million ", "nine ", "double ", "point ", "and a half ", "um ", "'s ", "cm ",
    "e\u0301", "\u0301\u0323", "\u200b", "\x00", "\ud800", "\u202e",
]  # fmt: skip
CALLS = [
    ("string_match", "1, 2", {"rel_tol": 0.05}),
    ("math", "x^2 + 1", {}),
    ("multiple_choice", "B", {"options": OPTIONS}),
    ("gui_coordinate", "0.5,0.5", {}),
    ("asr_wer", "hello world " * 200, {}),
    ("asr_wer", "你好", {}),
    ("asr_wer", "ความเร็ว " * 20, {"lang": "th"}),
    ("asr_wer", "हिन्दी भाषा", {"lang": "hi"}),
    ("format", "math:0.5", {}),
    ("format", "gui-coordinate:0.5,0.5", {}),
    ("tool_call", CALL, {}),
    ("abstention", "unanswerable", {}),
]


@pytest.mark.parametrize("verifier,gold,args", CALLS, ids=[f"{c[0]}-{c[1][:6]}" for c in CALLS])
def test_runs_of_one_piece_stay_linear(verifier, gold, args):
    for piece in PIECES:
        for length in (300, 6000):
            text = piece * (length // len(piece))
            timed_score(verifier, ("a</think>" if verifier == "format" else "") + text, gold, **args)


def test_random_mixtures_of_pieces():
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choice(PIECES) * rng.choice((1, 1, 1, 40)) for _ in range(rng.choice((3, 10, 60))))
        for verifier, gold, args in CALLS:
            timed_score(verifier, text, gold, **args)
        timed_score("math", text, text)


def test_an_answer_that_is_too_long_scores_nothing():
    for verifier, gold, args in CALLS:
        assert timed_score(verifier, "B" * 2_000_000, gold, **args) == 0.0


@pytest.mark.parametrize("piece", ["1 ", "की "])
def test_the_longest_transcripts_that_are_read(piece):
    """Whole speeches are as long as the verifier reads them, in CPU seconds; longer ones are not read at all."""
    gold = "2 " * 49_000
    score("asr_wer", "a", "a")  # imports
    start = time.thread_time()
    for length in (216_000, 800_000):
        assert score("asr_wer", piece * (length // len(piece)), gold) == 0.0
    assert time.thread_time() - start < 2.0


MONSTERS = [
    "9^9^9^9", "10^{10^{10}}", "2^{2^{2^{2^{2^{2}}}}}", "((9!)!)!", "99999999!", "500!^500", "e^{e^{e^{e}}}",
    "exp(1e300)", "(x+1)^{99999999}", "x**9**9**9", r"\binom{10^9}{10^8}", "1e99999", "1e-99999", r"\sqrt[999999]{2}",
    "tan(1e300)",
    r"\sin(10^{10^{10}})", "(" * 3000, "-" * 999, "1/" * 499 + "1", "x^" * 499 + "2", "1+" * 499 + "1",
    r"\sqrt" * 190 + "2", "|" * 900, "9" * 990, "0." + "3" * 990, "1,2," * 240 + "1", "x=" * 400 + "1", r"\pm1" * 200,
    r"\frac" * 190 + "12",
    r"\int_0^1 e^{x^{x^x}} dx", r"\sum_{n=1}^{10^9} n", "__import__('os').system('exit')", "().__class__.__bases__[0]",
    "(lambda: 0)()", "x if x else y", "1_000_000", r"\begin{pmatrix}" + "1&" * 400, "500!" * 200,
    r"\ln(" * 38 + "9" + ")" * 38,
]  # fmt: skip


@pytest.mark.parametrize("text", MONSTERS, ids=[text[:14] for text in MONSTERS])
def test_mathematics_that_would_not_end(text):
    for gold in ("0.5", "x/2", r"\sqrt{2}", "(1, 2)", r"\{1, 2, 3\}", "x = 7"):
        assert timed_score("math", text, gold) == 0.0
        assert timed_score("math", gold, text) == 0.0
    assert timed_score("math", text, text) == 1.0  # as text


def test_large_numbers_are_exact():
    big = "12345678901234567890123456789"
    assert score("math", big, big[:-1] + "8") == 0.0
    assert score("string_match", big, big[:-1] + "8") == 0.0
    assert score("string_match", "9" * 5000, "9" * 5000) == 1.0
    assert score("math", "2^{100}", str(2**100)) == 1.0
    assert score("math", "2^{100}", str(2**100 + 1)) == 0.0


# ------------------------------------------------------------------------------------------------- threads

THREADED = [
    ("math", r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", 1.0),
    ("math", r"\ln(xy)", r"\ln x+\ln y", 1.0),
    ("math", r"\sin^2 x+\cos^2 x", "1", 1.0),
    ("math", r"\pi", "3.1415926535897932384626433832795", 0.0),
    ("math", r"e^{1/3}", "1.395612425086089528628125319602", 0.0),
    ("math", "9^9^9^9", "0.5", 0.0),
    ("asr_wer", "twenty one colours", "21 colors", 1.0),
    ("string_match", "red and blue", "red, blue", 1.0),
    ("format", "a</think>\\boxed{\\sqrt{8}}", "math:2\\sqrt{2}", 1.0),
    ("tool_call", XML_CALL, CALL, 1.0),
    ("multiple_choice", "(b)", "B", 1.0),
]


def test_concurrent_callers_score_as_one_does():
    """Digits of precision differ from call to call, so shared state of the numeric library would show."""
    rows = [(v, p, g + (" " * (i % 3)), e) for i in range(30) for v, p, g, e in THREADED]
    random.Random(0).shuffle(rows)
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda row: timed_score(*row[:3]), rows))
    assert scores == [row[3] for row in rows]


def test_a_thread_other_than_the_main_one_and_no_traces():
    import mpmath

    before = mpmath.mp.dps, sys.getrecursionlimit(), threading.active_count()
    result = []
    thread = threading.Thread(target=lambda: result.extend(score(*row[:3]) for row in THREADED))
    thread.start()
    thread.join(120)
    assert result == [row[3] for row in THREADED]
    assert before == (mpmath.mp.dps, sys.getrecursionlimit(), threading.active_count())


# ------------------------------------------------------------------------------------------------- oracles


def random_expression(sympy, rng, depth: int):
    x, y = sympy.symbols("x y")
    if depth == 0:
        return rng.choice(
            [x, y, sympy.Integer(rng.randint(1, 9)), sympy.Rational(rng.randint(1, 9), rng.randint(2, 9))]
        )
    a, b = random_expression(sympy, rng, depth - 1), random_expression(sympy, rng, depth - 1)
    kind = rng.randrange(7)
    if kind == 0:
        return a + b
    if kind in (1, 2):
        return a * b
    if kind == 3:
        return a - b
    if kind == 4:
        return a ** rng.randint(2, 3)
    if kind == 5:
        return sympy.sqrt(rng.randint(2, 30)) * a + b
    return a / (b**2 + 1)


def test_against_sympy():
    """LaTeX as sympy writes it, expanded, factored and changed: equal exactly where sympy's difference is zero."""
    sympy = pytest.importorskip("sympy")
    rng = random.Random(1)
    for _ in range(25):
        expression = random_expression(sympy, rng, 2)
        changed = expression + sympy.Rational(1, rng.randint(2, 1000))
        text = sympy.latex(expression)
        for other in (sympy.expand(expression), sympy.together(expression)):
            assert math_equal(text, sympy.latex(other)), (text, sympy.latex(other))
            assert not math_equal(text, sympy.latex(changed)), text
    rng = random.Random(2)
    for _ in range(15):
        a, b, c = rng.randint(1, 9), rng.randint(1, 9), rng.randint(2, 12)
        root = sympy.latex(sympy.sqrt(a + b * sympy.sqrt(c)))
        assert math_equal(root, rf"\sqrt{{{a}+\sqrt{{{b * b * c}}}}}")
        assert not math_equal(root, rf"\sqrt{{{a}+\sqrt{{{b * b * c + 1}}}}}")


def test_word_errors_against_an_edit_distance_by_hand():
    """1 - (substitutions + deletions + insertions) / words on random sentences, by dynamic programming."""
    rng = random.Random(0)
    for _ in range(40):
        gold = [rng.choice("red green blue cat dog".split()) for _ in range(rng.randint(1, 8))]
        said = [rng.choice("red green blue cat dog".split()) for _ in range(rng.randint(0, 10))]
        row = list(range(len(said) + 1))
        for i, word in enumerate(gold, 1):
            previous, row = row, [i]
            for j, other in enumerate(said, 1):
                row.append(min(row[-1] + 1, previous[j] + 1, previous[j - 1] + (word != other)))
        expected = max(Fraction(0), 1 - Fraction(row[-1], len(gold)))
        assert score("asr_wer", " ".join(said), " ".join(gold)) == pytest.approx(float(expected))


def test_the_format_formula():
    """0.9 * accuracy + 0.1 * format with 0.9 for every extra box, over numbers of boxes and of right ones."""
    for total in range(1, 8):
        for right in range(total + 1):
            text = "a</think>" + "\\boxed{x}" * right + "\\boxed{y}" * (total - right)
            expected = 0.9 * min(right, 5) / total * 0.9 ** (total - 1) + 0.1 * (total == 1)
            assert score("format", text, "string-match:x") == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------- the rest


def test_spoken_words():
    assert normalise_speech("The colours of the theatre") == "the colors of the theater".split()
    assert normalise_speech("今天 天气。") == list("今天天气")
    assert normalise_speech("[noise] Grüße, Welt!", "de") == ["grüße", "welt"]
    assert normalise_speech("किताब, पढ़ो।", "hi") == normalise_speech("किताब पढ़ो") == ["किताब", "पढ़ो"]
    assert len(normalise_speech("สวัสดี", "th")) == 4  # letters with their vowels
    assert normalise_speech("كِتَابٌ", "ar") == ["كتاب"]  # points that may be left out


def test_tool_calls_are_read_with_their_types():
    assert parse_tool_calls("Well. " + JSON_CALL)[0][1:] == (json.loads(CALL)["arguments"], True)
    assert parse_tool_calls(XML_CALL)[0] == (
        "move", {"x": "3", "fast": "True", "to": "the door", "path": "[1, 2.5]"}, False
    )  # fmt: skip
    with pytest.raises(ValueError, match="behind"):
        parse_tool_calls(XML_CALL + "x")


def test_names_and_gold_answers_are_checked_when_data_is_read():
    with pytest.raises(OmniInputError, match="string_match"):
        score("stringmatch", "a", "a")
    with pytest.raises(TypeError):
        score("math", "1", "1", rel_tol=0.1)
    assert score("string-match", None, "a") == 0.0
    check_gold("mathruler", r"\frac{1}{2}")
    check_gold("format", "gui-coordinate:0.5,0.25", prompt_opened_think=False)
    check_gold("multiple-choice", "B", options=OPTIONS)
    check_gold("tool_call", [json.loads(CALL)])
    check_gold("abstention", "unanswerable")
    check_gold("abstention", ["I do not know. I am a small model.", "unanswerable"])
    check_gold("asr", "")
    for verifier, gold, args in [
        ("math", "", {}),
        ("format", "B", {}),
        ("format", "mathruler:", {}),
        ("gui_coordinate", "0.5", {}),
        ("gui_coordinate", "5,7", {}),
        ("multiple_choice", "Z", {"options": OPTIONS}),
        ("multiple_choice", "", {}),
        ("tool_call", "{", {}),
        ("tool_call", [{"arguments": {}}], {}),
        ("abstention", "Paris", {}),
        ("string_match", "  ", {}),
    ]:
        with pytest.raises(OmniInputError):
            check_gold(verifier, gold, **args)


def test_abstention_is_the_whole_answer():
    assert is_abstention("The question cannot be answered from the given information.")
    assert not is_abstention("The answer cannot be smaller than 5")
    assert not is_abstention("unknown soldier")
    assert score("abstention", "Unable to determine.", ["I do not know", "unanswerable"]) == 1.0
    assert score("abstention", "unanswerable", ["Paris", "Rome"]) == score("abstention", "unanswerable", []) == 0.0
