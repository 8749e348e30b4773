"""Metrics of evaluation against values worked out by hand, their own definitions written twice, and jiwer."""

import json
import random

import jiwer
import pytest
from test_rewards import PIECES, timed_score

from modeling_omni import OmniInputError
from modeling_omni.metrics import (
    METRICS,
    bootstrap_interval,
    corpus_wer,
    final_answer,
    mean_interval,
    option_in,
    wilson_interval,
    word_errors,
)
from modeling_omni.metrics_instructions import INSTRUCTIONS, count_sentences
from modeling_omni.rewards import VERIFIERS, check_gold, score
from modeling_omni.rewards_speech import normalise_speech

FRUIT = ["apple", "red apple", "pear", "none of these"]
BOX = [0.1, 0.2, 0.5, 0.6]

CASES = {
    "exact_match": [
        ("Paris", "paris", 1.0),
        (" Paris\n", "Paris", 1.0),
        ("Paris.", "Paris", 0.0),
        ("paris", "Paris", 0.0, {"case": True}),
        ("New\u00a0York", "new  york", 1.0),
        ("", "", 0.0),
        ("b", ["a", "b"], 1.0),
    ],
    "contains": [
        ("The sign says STOP here.", "stop", 1.0),
        ("The sign says go.", "stop", 0.0),
        ("anything", "", 0.0),
        ("x ^ 2", "x^2", 0.0),
        ("x ^ 2", "x^2", 1.0, {"spaces": False}),
        ("X ^ 2", "x^2", 0.0, {"spaces": False}),
        ("two words", ["one", "two"], 1.0),
    ],
    "numeric": [
        ("42", 42, 1.0),
        ("There are 3 red and 4 blue, so 7.", "7", 1.0),
        ("There are 3 red and 4 blue, so 7.", "4", 0.0),
        ("1,234.5 km", "1234.5", 1.0),
        ("12%", "12", 1.0),
        ("-3", "3", 0.0),
        ("1e3", "1000", 1.0),
        ("0.33", "0.3333", 0.0),
        ("0.33", "0.3333", 1.0, {"abs_tol": 0.01}),
        ("103", "100", 1.0, {"rel_tol": 0.03}),
        ("103.1", "100", 0.0, {"rel_tol": 0.03}),
        ("seven", "7", 0.0),
        ("COVID19", "19", 0.0),  # part of a word
        ("$5 and 6 people", ["5", "6"], 1.0),
    ],
    "relaxed_accuracy": [
        ("105", "100", 1.0),
        ("105.1", "100", 0.0),
        ("95", "100", 1.0),
        ("94.9", "100", 0.0),
        ("12%", "12", 1.0),
        ("0.12", "12%", 1.0),
        ("12", "12%", 1.0),
        ("1.2", "12%", 0.0),
        ("0", "0", 1.0),
        ("0.01", "0", 0.0),
        ("Blue", "blue", 1.0),
        ("blue line", "blue", 0.0),
        ("2013", "2012", 1.0),  # the known weakness of the field's rule
        ("1,050", "1000", 1.0),
    ],
    "anls": [
        ("kitten", "sitting", 1 - 3 / 7),  # three edits of seven letters
        ("Kitten ", "kitten", 1.0),
        ("abcd", "abxy", 0.5),
        ("abc", "axy", 0.0),  # one of three letters is right: below the threshold
        ("abc", "axy", 1 / 3, {"threshold": 0.0}),
        ("a" * 10, "a" * 21, 0.0),
        ("sittin", ["kitten", "sitting"], 1 - 1 / 7),
        ("", "a", 0.0),
        ("a", "", 0.0),
    ],
    "vqa_accuracy": [
        ("yes", ["yes"] * 10, 1.0),
        ("yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7 * 1) / 10),
        ("yes", ["yes"] + ["no"] * 9, (0 + 9 / 3) / 10),
        ("yes", ["yes"] * 2 + ["no"] * 8, (2 / 3 + 8 * 2 / 3) / 10),
        ("no", ["yes"] * 10, 0.0),
        ("The dog.", ["a dog", "dog"] * 5, 1.0),
        ("two", ["2"] * 10, 1.0),
        ("3.5", ["35"] * 10, 0.0),
        ("1,000", ["1000"] * 10, 1.0),
        ("it's", ["its"] * 10, 1.0),
        ("7:25 p.m.", ["7:25 pm"] * 10, 1.0),
        ("$5", ["5"] * 10, 0.0),
        ("50", ["50%"] * 10, 0.0),
        ("coca-cola", ["coca cola"] * 10, 1.0),
        ("black - white t-shirt", ["black white tshirt"] * 10, 1.0),
    ],
    "option_accuracy": [
        ("B", "B", 1.0),
        ("(b)", "B", 1.0),
        ("The answer is (B) because the picture shows it.", "B", 1.0),
        ("I first thought the answer is A, but the correct answer is C.", "C", 1.0),
        ("Answer: **D**", "D", 1.0),
        ("B. It is green.", "B", 1.0),
        ("Both A and B look fine.", "A", 0.0),
        ("A or B", "A", 0.0),
        ("I think it is green", "I", 0.0),
        ("The answer is a dog", "A", 0.0),
        ("Answer: I cannot tell", "I", 0.0),
        ("Looking at it closely, (C) fits best.", "C", 1.0),
        ("(A) is wrong and (C) is right", "C", 0.0),  # two in brackets: not decided
        ("It is a pear, clearly.", "C", 1.0, {"options": FRUIT}),
        ("It is a pear, clearly.", "C", 0.0),
        ("the red apple", "B", 1.0, {"options": FRUIT}),  # the longer option of two that stand there
        ("apple or pear", "A", 0.0, {"options": FRUIT}),
        ("pineapple", "A", 0.0, {"options": FRUIT}),
        ("D", "none of these", 1.0, {"options": FRUIT}),
        ("E", "E", 0.0, {"options": FRUIT}),
        ("Let me see.\n\nB", "B", 1.0),
        ("A, C", "A, C", 1.0),
        ("A", "A, C", 0.0),
        ("", "A", 0.0),
    ],
    "iou": [
        ("[100, 200, 500, 600]", BOX, 1.0),
        ("<box>(100,200),(500,600)</box>", BOX, 1.0),
        ("[0.1, 0.2, 0.5, 0.6]", BOX, 1.0, {"scale": 1}),
        ("[300, 200, 700, 600]", BOX, 0.2 * 0.4 / (0.16 + 0.16 - 0.08)),
        ("[600, 700, 900, 900]", BOX, 0.0),
        ("[200, 300, 400, 500]", BOX, 0.04 / 0.16),  # inside
        ("[500, 600, 100, 200]", BOX, 0.0),  # corners swapped
        ("[10, 20, 50, 60]", [100, 200, 500, 600], 1.0, {"scale": 100, "size": [1000, 1000]}),
        ("a box", BOX, 0.0),
        ("2. [100, 200, 500, 600]", BOX, 1.0),
        ('{"bbox_2d": [\n 100,\n 200,\n 500,\n 600\n]}', BOX, 1.0),
        ("[[100, 200], [500, 600]]", BOX, 1.0),
        ("1 2 3", BOX, 0.0),
        ("[100, 200, 500, 600]", "0.1,0.2,0.5,0.6", 1.0),
        ("[100, 200, 500, 600]", [0.5, 0.5, 0.1, 0.1], 0.0),
    ],
    "grounding_accuracy": [
        ("[100, 200, 500, 600]", BOX, 1.0),
        ("[100, 200, 500, 400]", BOX, 1.0),  # half of it: IoU is 0.5
        ("[100, 200, 500, 396]", BOX, 0.0),
        ("[100, 200, 500, 396]", BOX, 1.0, {"threshold": 0.4}),
    ],
    "click_accuracy": [
        ("<point>[(300, 400)]</point>", BOX, 1.0),
        ("<point>[(100, 200)]</point>", BOX, 1.0),  # on the corner
        ("<point>[(99, 400)]</point>", BOX, 0.0),
        ("(300, 400)", BOX, 1.0),
        ("300 400", BOX, 1.0),
        ("Click at (300, 400) to go on.", BOX, 1.0),
        ("[250, 350, 350, 450]", BOX, 1.0),  # middle of a box
        ("<point>[(1300, 400)]</point>", BOX, 0.0),
        ("<point>[(3, 4)]</point>", [10, 20, 50, 60], 1.0, {"scale": 10, "size": [100, 100]}),
        ("no idea", BOX, 0.0),
        ("(3..0, 4)", BOX, 0.0),
    ],
    # test_grounding.py has their parts
    "document_parse": [
        ("<x_1><y_2>A<x_5><y_6><class_Text>", "<x_1><y_2>A<x_5><y_6><class_Text>", 1.0, {"scale": 10}),
        ("<x_1><y_2>A<x_5><y_6><class_Text>", [{"text": "A", "box": BOX, "class": "Text"}], 1.0, {"scale": 10}),
        ("<x_0.1><y_0.2>A<x_0.5><y_0.4><class_text>", [{"text": "A", "box": BOX, "class": "Text"}], 0.75),
        ("A", [{"text": "A", "box": BOX, "class": "Text"}], 0.5),
        ("", [{"text": "A", "box": BOX, "class": "Text"}], 0.0),
    ],
    "timed_speech": [
        ("[0.0-1.0] yes", "[0.0-1.0] yes", 1.0),
        ("[0.0-0.5] Yes.", [{"text": "yes", "start": 0, "end": 1}], 0.75),
        ("yes", "[0.0-1.0] yes", 0.5),
        ("[0.0-1.0] no", "[0.0-1.0] yes", 0.5),
    ],
}


def test_every_metric_is_a_verifier_and_has_cases():
    assert set(CASES) | {"ifeval"} == set(METRICS) and set(METRICS) < set(VERIFIERS)


@pytest.mark.parametrize("verifier", CASES)
def test_cases(verifier):
    wrong = []
    for prediction, gold, expected, *args in CASES[verifier]:
        found = timed_score(verifier, prediction, gold, **(args[0] if args else {}))
        if found != pytest.approx(expected, abs=1e-9):
            wrong.append((prediction, gold, expected, found))
    assert not wrong


def test_vqa_equals_its_definition():
    """Leaving out every person in turn, counted rather than reasoned."""
    rng = random.Random(0)
    for _ in range(50):
        people = [rng.choice("abc") for _ in range(10)]
        subsets = [people[:i] + people[i + 1 :] for i in range(10)]
        expected = sum(min(1, subset.count("b") / 3) for subset in subsets) / 10
        assert score("vqa_accuracy", "b", people) == pytest.approx(expected)


def test_iou_equals_counted_pixels():
    rng = random.Random(0)
    for _ in range(30):
        boxes = []
        for _ in range(2):
            (left, right), (top, bottom) = (sorted(rng.sample(range(21), 2)) for _ in range(2))
            boxes.append((left, top, right, bottom))
        pixels = [{(x, y) for x in range(a, c) for y in range(b, d)} for a, b, c, d in boxes]
        expected = len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])
        found = score("iou", str(list(boxes[0])), list(boxes[1]), scale=20, size=[20, 20])
        assert found == pytest.approx(expected)


def test_options_in_words():
    options = {"A": "a cat", "B": "a dog", "C": "a cat on a mat"}
    said = {
        "I see fur. So the final answer is: B": "B",
        "It shows a cat on a mat.": "C",
        "It shows a dog and a cat.": "",
        "The choice would be option (c).": "C",
        "Answer: A because it purrs": "A",
        "I can't answer that.": "",
        "The correct answer is B. Option A is incorrect, as it purrs.": "B",
        "**Answer:** B\n\nOption A shows fur. Option C shows a mat.": "B",
        "B\n\nOption A shows a cat, which is not there.": "B",
        "Option A is wrong, so option B.": "B",
        "Option A is wrong, option C, too: option B was not correct.": "C",
    }
    assert {text: option_in(text, options) for text in said} == said


# ------------------------------------------------------------------------------------------------------ speech


def test_word_errors_equal_jiwer():
    rng = random.Random(0)
    words = "the cat sat on mat and two dogs colour don't mister".split()
    pairs = []
    for _ in range(40):
        gold = [rng.choice(words) for _ in range(rng.randint(1, 12))]
        said = [word for word in gold if rng.random() > 0.2] + [rng.choice(words) for _ in range(rng.randint(0, 3))]
        pairs.append((" ".join(said), " ".join(gold)))
    counts = [word_errors(*pair) for pair in pairs]
    normal = [[" ".join(normalise_speech(text, "en")) for text in pair] for pair in pairs]
    measured = [jiwer.process_words(gold, said) for said, gold in normal if gold]
    assert [errors for errors, _ in counts] == [m.substitutions + m.deletions + m.insertions for m in measured]
    assert corpus_wer(counts) == pytest.approx(jiwer.wer([gold for _, gold in normal], [said for said, _ in normal]))


def test_corpus_wer_weighs_words():
    """The mean over rows would be (0 + 1) / 2."""
    counts = [word_errors("red dogs bark at night", "Red dogs bark, at night!"), word_errors("no", "yes")]
    assert counts == [(0, 5), (1, 1)] and corpus_wer(counts) == pytest.approx(1 / 6)
    assert corpus_wer([(0, 0)]) == 0.0 and corpus_wer([(2, 0)]) == 1.0
    assert word_errors("\u4f60\u597d", "\u4f60\u4eec", "zh") == (1, 2)  # letters of Chinese
    assert score("wer", "red dogs", "red dogs bark") == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------------------------------ instructions

TEXT = """<<Of cats>>
Cats sleep. Dogs bark, e.g. at Dr. Smith! Do they?

* one
- two
**bold** and *thin* and [name]

P.S. That is ALL, Folks"""

FOLLOWED = {
    "keywords:existence": [({"keywords": ["cats", "BARK"]}, True), ({"keywords": ["cats", "cows"]}, False)],
    "keywords:frequency": [
        ({"keyword": "cats", "frequency": 2, "relation": "at least"}, True),
        ({"keyword": "cats", "frequency": 2, "relation": "less than"}, False),
    ],
    "keywords:forbidden_words": [({"forbidden_words": ["dog"]}, True), ({"forbidden_words": ["dogs"]}, False)],
    "keywords:letter_frequency": [
        ({"letter": "z", "let_frequency": 1, "let_relation": "less than"}, True),
        ({"letter": "A", "let_frequency": 3, "let_relation": "at least"}, True),
    ],
    "length_constraints:number_sentences": [({"num_sentences": 4, "relation": "at least"}, True)],
    "length_constraints:number_paragraphs": [({"num_paragraphs": 1}, True), ({"num_paragraphs": 2}, False)],
    "length_constraints:number_words": [
        ({"num_words": 26, "relation": "at least"}, True),
        ({"num_words": 26, "relation": "less than"}, False),
    ],
    "length_constraints:nth_paragraph_first_word": [
        ({"num_paragraphs": 3, "nth_paragraph": 3, "first_word": "p"}, True),
        ({"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "p"}, False),
    ],
    "detectable_content:number_placeholders": [({"num_placeholders": 1}, True), ({"num_placeholders": 2}, False)],
    "detectable_content:postscript": [({"postscript_marker": "P.S."}, True), ({"postscript_marker": "P.P.S"}, False)],
    "detectable_format:number_bullet_lists": [({"num_bullets": 2}, True), ({"num_bullets": 3}, False)],
    "detectable_format:constrained_response": [({}, False)],
    "detectable_format:number_highlighted_sections": [({"num_highlights": 2}, True), ({"num_highlights": 3}, False)],
    "detectable_format:multiple_sections": [({"section_spliter": "Part", "num_sections": 1}, False)],
    "detectable_format:json_format": [({}, False)],
    "detectable_format:title": [({}, True)],
    "combination:two_responses": [({}, False)],
    "combination:repeat_prompt": [({"prompt_to_repeat": "<<of CATS>>"}, True), ({"prompt_to_repeat": "x"}, False)],
    "startend:end_checker": [({"end_phrase": "all, folks"}, True), ({"end_phrase": "Dogs"}, False)],
    "startend:quotation": [({}, False)],
    "change_case:capital_word_frequency": [
        ({"capital_frequency": 3, "capital_relation": "at least"}, True),  # P, S, ALL
        ({"capital_frequency": 3, "capital_relation": "less than"}, False),
    ],
    "change_case:english_capital": [({}, False)],
    "change_case:english_lowercase": [({}, False)],
    "punctuation:no_comma": [({}, False)],
}
OTHERS = [
    ("Part 1 a\nPart 2 b", "detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}),
    ("My answer is maybe.", "detectable_format:constrained_response", {}),
    ('```json\n{"a": [1, 2]}\n```', "detectable_format:json_format", {}),
    ("one\n******\ntwo", "combination:two_responses", {}),
    ('"said"', "startend:quotation", {}),
    ("ALL BIG 1", "change_case:english_capital", {}),
    ("all small", "change_case:english_lowercase", {}),
    ("no comma", "punctuation:no_comma", {}),
    ("NASA's DON'T ALL-CAPS", "change_case:capital_word_frequency", {"capital_frequency": 4}),
    ("a\n***\nb\n***\nc", "length_constraints:number_paragraphs", {"num_paragraphs": 3}),
]  # fmt: skip


def ask(*instructions) -> dict:
    return {"instruction_id_list": [name for name, _ in instructions], "kwargs": [own for _, own in instructions]}


def test_instructions():
    assert set(FOLLOWED) | {"language:response_language"} == set(INSTRUCTIONS)
    for name, cases in FOLLOWED.items():
        for own, expected in cases:
            assert score("ifeval", TEXT, ask((name, own))) == expected, (name, own)
    for text, name, own in OTHERS:
        assert score("ifeval", text, ask((name, own))) == 1.0, name
    assert score("ifeval", "a\n******\na", ask(("combination:two_responses", {}))) == 0.0  # the same twice
    assert (
        score("ifeval", "a\n***\n***\nc", ask(("length_constraints:number_paragraphs", {"num_paragraphs": 3}))) == 0.0
    )


def test_instructions_together_each_and_loosely():
    both = ask(("punctuation:no_comma", {}), ("startend:quotation", {}))
    assert score("ifeval", "no comma", both) == 0.0 and score("ifeval", "no comma", both, each=True) == 0.5
    assert score("ifeval", '"no comma"', json.dumps(both)) == 1.0
    introduced = 'Sure, here it is:\n"no comma"'
    assert score("ifeval", introduced, both) == 0.0 and score("ifeval", introduced, both, loose=True) == 1.0
    padded = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}  # as datasets pads them
    assert score("ifeval", "fine", padded) == 1.0 and score("ifeval", " ", padded) == 0.0


def test_sentences():
    counts = {
        "One. Two! Three?": 3,
        "Dr. Smith met Mr. J. R. Jones.": 1,
        "He paid 3.50 dollars. Fine.": 2,
        "No end": 1,
        'She said "Stop!" Then left.': 2,
        "Wait... what?": 2,
        "": 0,
        "\u4f60\u597d\u3002\u518d\u89c1\u3002": 2,
    }
    assert {text: count_sentences(text) for text in counts} == counts


# ------------------------------------------------------------------------------------------------------ golds


def test_golds_that_nothing_can_reach_are_told():
    wrong = [
        ("iou", [0.5, 0.5, 0.1, 0.9], {}),
        ("click_accuracy", [10, 10, 20, 20], {}),
        ("ifeval", ask(("startend:nothing", {})), {}),
        ("ifeval", ask(("keywords:existence", {"words": ["a"]})), {}),
        ("ifeval", "nothing", {}),
        ("vqa_accuracy", [], {}),
        ("numeric", "many", {}),
        ("option_accuracy", "E", {"options": FRUIT}),
        ("anls", "", {}),
        ("document_parse", "no tags", {}),
        ("document_parse", "<x_1><y_2>A<x_5><y_6><class_Text>", {}),  # beyond the page, without its scale
        ("document_parse", [{"text": "A", "box": [0, 0, 1], "class": "Text"}], {}),
        ("timed_speech", "[2.0-1.0] yes", {}),
        ("timed_speech", [{"text": "yes", "start": -1, "end": 1}], {}),
    ]
    for verifier, gold, args in wrong:
        with pytest.raises(OmniInputError):
            check_gold(verifier, gold, **args)
        assert score(verifier, "a", gold, **args) == 0.0
    check_gold("click_accuracy", [10, 10, 20, 20], size=[30, 30])
    check_gold("anls", ["a", "b"])
    check_gold("vqa_accuracy", ["a"] * 6 + ["b"] * 4)
    check_gold("ifeval", ask(("punctuation:no_comma", {})))


CALLS = [
    ("anls", "some text of a page", {}),
    ("contains", "9", {}),
    ("numeric", "9", {"rel_tol": 0.05}),
    ("relaxed_accuracy", "9", {}),
    ("vqa_accuracy", ["9"] * 10, {}),
    ("option_accuracy", "B", {"options": FRUIT}),
    ("option_accuracy", "B", {}),
    ("iou", BOX, {}),
    ("click_accuracy", BOX, {}),
    ("document_parse", "<x_1><y_1>some text of a page<x_5><y_5><class_Text>", {"scale": 9}),
    ("timed_speech", "[0.0-1.2] one two", {}),
    ("ifeval", ask(*((name, cases[0][0]) for name, cases in FOLLOWED.items())), {"loose": True}),
]


@pytest.mark.parametrize("verifier,gold,args", CALLS, ids=[f"{c[0]}{len(c[2])}" for c in CALLS])
def test_hostile_answers_take_no_time(verifier, gold, args):
    for piece in PIECES:
        text = piece * (6000 // len(piece))
        timed_score(verifier, text, gold, **args)
        timed_score(verifier, final_answer(text, verifier), gold, **args)


# ------------------------------------------------------------------------------------------------------ answers


def test_final_answer():
    assert final_answer(r"So \boxed{1} or rather \boxed{\frac{1}{2}}.", "math") == r"\frac{1}{2}"
    assert final_answer("The sum is 9.\n**Answer:** 9 apples", "string_match") == "9 apples"
    assert final_answer("Final answer: B\n", "string_match") == "B"
    assert final_answer("  blue ", "anls") == "blue"
    assert final_answer(r"\boxed{hello} there", "asr_wer") == r"\boxed{hello} there"
    assert final_answer("unclosed \\boxed{a", "math") == "unclosed \\boxed{a"


# ------------------------------------------------------------------------------------------------------ intervals


def test_intervals():
    assert mean_interval([1.0, 0.0, 1.0, 1.0])[:2] == wilson_interval(3, 4) and mean_interval([1.0, 0.0])[2] == "wilson"
    rng = random.Random(1)
    scores = [rng.random() for _ in range(400)]
    mean, low, high = sum(scores) / 400, *mean_interval(scores)[:2]
    spread = (sum((s - mean) ** 2 for s in scores) / 399 / 400) ** 0.5
    assert low == pytest.approx(mean - 1.96 * spread, abs=0.2 * spread)
    assert high == pytest.approx(mean + 1.96 * spread, abs=0.2 * spread)
    assert mean_interval(scores) == mean_interval(scores) and mean_interval(scores)[2] == "bootstrap"
    assert bootstrap_interval([(1, 2)] * 5, corpus_wer) == (0.5, 0.5)
