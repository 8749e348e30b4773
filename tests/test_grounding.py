"""Documents with boxes and speech with times: reading and scoring by hand-worked values, drawn pages, joined sound."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_nano_data import needs_espeak, needs_fonts, spoken  # noqa: F401
from test_rewards import PIECES
from torchvision.ops import box_iou

from modeling_omni.metrics_grounding import (
    DocumentBlock,
    Phrase,
    box_ious,
    document_parse,
    document_scores,
    parse_document,
    parse_times,
    timed_scores,
)
from modeling_omni.nano_data import GROUNDING_SKILLS, SKILLS, grounding, make_sample, score
from modeling_omni.nano_data.tokenizer import build_tokenizer
from modeling_omni.nano_data.vocabulary import in_split, sample_random

TITLE = "<x_0.1><y_0.1>Big news<x_0.9><y_0.2><class_Title>"
TEXT = "<x_0.1><y_0.3>It rains.<x_0.5><y_0.9><class_Text>"
TABLE = "<x_0.6><y_0.3>1 & 2<x_0.9><y_0.5><class_Table>"
PICTURE = "<x_0.6><y_0.6><x_0.9><y_0.9><class_Picture>"
PAGE = TITLE + TEXT + TABLE + PICTURE


def test_blocks_are_read_with_boxes_and_classes():
    blocks, broken = parse_document(PAGE)
    assert broken == 0 and [block.kind for block in blocks] == ["Title", "Text", "Table", "Picture"]
    assert blocks[0] == DocumentBlock("Big news", (0.1, 0.1, 0.9, 0.2), "Title") and blocks[3].text == ""
    blocks, broken = parse_document("<x_512><y_640>a\n\nb<x_1024><y_1280><class_List-item>\n", scale=(1024, 1280))
    assert (blocks, broken) == ([DocumentBlock("a b", (0.5, 0.5, 1.0, 1.0), "List-item")], 0)
    for scale in (0, -1, (1, 0), "100"):
        with pytest.raises(TypeError):
            parse_document(PAGE, scale)


@pytest.mark.parametrize(
    "text, texts, boxes, broken",
    [
        ("", [], 0, 0),
        ("no tags at all", ["no tags at all"], 0, 1),
        (TITLE + "<x_0.1><y_0.3>cut o", ["Big news", "cut o"], 1, 1),
        (TITLE + "<x_0.1><y_0.3>cut<x_0.5><y_0.9>", ["Big news", "cut"], 2, 1),  # a box without a class
        ("Here it is: " + TITLE, ["Here it is: Big news"], 1, 1),
        ("<x_0.9><y_0.1>a<x_0.1><y_0.2><class_Text>" + TITLE, ["a", "Big news"], 1, 1),  # right is left of left
        ("<x_0.1><y_0.1>a<x_7><y_9><class_Text>", ["a"], 0, 1),  # off the page
        ("<y_0.1><x_0.1>a<x_0.2><y_0.2><class_Text>", ["a"], 0, 1),
        ("<x_0.1><y_0.1>a<x_0.2><y_0.2><x_0.3><y_0.3><class_Text>", ["a"], 0, 1),
        ("<x_><y_0.1>a<x_0.2><y_0.2><class_Text>", ["<x_> a"], 0, 1),
        ("<class_Text><class_>", ["", "<class_>"], 0, 2),
    ],
)  # fmt: skip
def test_broken_documents_are_read_as_far_as_they_go(text, texts, boxes, broken):
    blocks, found = parse_document(text)
    assert [block.text for block in blocks] == texts and found == broken
    assert sum(block.box is not None for block in blocks) == boxes
    scores = document_scores(text, PAGE)
    assert all(0 <= value <= 1 for value in scores.values()) and scores["box_f1"] < 1


def test_document_scores():
    perfect = {"text": 1.0, "order_f1": 1.0, "box_iou": 1.0, "box_f1": 1.0, "broken": 0.0}
    assert document_scores(PAGE, PAGE) == pytest.approx(perfect) and document_parse(PAGE, PAGE) == pytest.approx(1)
    as_rows = [{"text": b.text, "box": [10 * v for v in b.box], "class": b.kind} for b in parse_document(PAGE)[0]]
    assert document_scores(PAGE, as_rows, size=[10, 10]) == pytest.approx(perfect)
    # the order of reading counts in the text and in the order, not in the boxes
    found = document_scores(TEXT + TITLE + TABLE + PICTURE, PAGE)
    assert found["order_f1"] == pytest.approx(3 / 4) and found["box_iou"] == pytest.approx(1) and found["text"] < 0.6
    # a class that is wrong fits nothing; one block too many, one too few
    assert document_scores(PAGE.replace("class_Table", "class_Text"), PAGE)["box_f1"] == pytest.approx(6 / 8)
    assert document_scores(PAGE + TITLE, PAGE)["box_iou"] == pytest.approx(4 / 5)
    assert document_scores(PAGE + TITLE, PAGE)["order_f1"] == pytest.approx(8 / 9)
    fewer = document_scores(TITLE + TEXT + TABLE, PAGE)
    assert fewer["box_f1"] == pytest.approx(6 / 7) and fewer["text"] == 1  # a picture has no text
    # 4 of "Big news It rains. 1 & 2" (24 characters) wrong; half of one box
    assert document_scores(PAGE.replace("rain", "snow"), PAGE)["text"] == pytest.approx(20 / 24)
    half = PAGE.replace("Big news<x_0.9><y_0.2>", "Big news<x_0.9><y_0.15>")
    assert document_scores(half, PAGE)["box_iou"] == pytest.approx(3.5 / 4)
    assert document_scores("", PAGE) == pytest.approx(dict.fromkeys(perfect, 0.0))
    assert document_scores(PAGE, "no tags")["text"] == 0


def test_boxes_overlap_as_torchvision_has_it():
    corners = np.random.default_rng(0).uniform(0, 1, (2, 9, 2, 2))
    one, two = (np.concatenate([side.min(1), side.max(1)], 1) for side in corners)
    found = box_ious(list(map(tuple, one)), list(map(tuple, two)))
    np.testing.assert_allclose(found, box_iou(torch.tensor(one), torch.tensor(two)).numpy(), rtol=0, atol=1e-12)


SAID = "[0.3-0.9] one two\n[1.6-2.1] red"


@pytest.mark.parametrize(
    "text, phrases, broken",
    [
        (SAID, [("one two", 0.3, 0.9), ("red", 1.6, 2.1)], 0),
        ("(0.3 s - 0.9 s): one two [00:01.6 --> 00:02.1] red", [("one two", 0.3, 0.9), ("red", 1.6, 2.1)], 0),
        ("[1:00:00.5 to 1:00:01] late", [("late", 3600.5, 3601.0)], 0),
        ("I hear [0.3-0.9] one", [("I hear", None, None), ("one", 0.3, 0.9)], 1),
        ("[0.9-0.3] one", [("one", None, None)], 1),
        ("[0.3-0.9 one", [("[0.3-0.9 one", None, None)], 1),
        ("[0.3-0.9][1-2] a", [("", 0.3, 0.9), ("a", 1.0, 2.0)], 0),
        ("one two", [("one two", None, None)], 1),
        ("", [], 0),
    ],
)  # fmt: skip
def test_times_are_read(text, phrases, broken):
    assert parse_times(text) == ([Phrase(*phrase) for phrase in phrases], broken)
    assert all(0 <= value <= 1 for name, value in timed_scores(text, SAID).items() if name != "start_offset")


def test_timed_scores():
    perfect = {"words": 1.0, "segment_iou": 1.0, "segment_f1": 1.0, "starts": 1.0, "start_offset": 0.0, "broken": 0.0}
    assert timed_scores(SAID, SAID) == pytest.approx(perfect)
    gold = [{"text": "one two", "start": 0.3, "end": 0.9}, {"text": "red", "start": 1.6, "end": 2.1}]
    assert timed_scores(SAID, gold) == pytest.approx(perfect)
    late = timed_scores("[0.5-0.9] one two\n[1.6-2.1] red", SAID)
    assert late["start_offset"] == pytest.approx(0.1) and late["segment_iou"] == pytest.approx((4 / 6 + 1) / 2)
    # a wrong word at a start: that start is not found, half of the words ("12 red" after normalisation) are wrong
    wrong = timed_scores("[0.3-0.9] one two\n[1.6-2.1] green", SAID)
    assert wrong["words"] == pytest.approx(1 / 2) and wrong["starts"] == 1 / 2 and wrong["segment_f1"] == 1
    joined = timed_scores("[0.3-2.1] one two red", SAID)  # the right words as one phrase
    assert joined["words"] == 1 and joined["starts"] == 1 / 2 and joined["segment_iou"] == pytest.approx(0.6 / 1.8 / 2)
    bare = timed_scores("one two red", SAID)
    assert bare["words"] == 1 and bare["segment_iou"] == bare["starts"] == 0 and "start_offset" not in bare


def test_any_answer_has_scores():
    rng = random.Random(0)
    pieces = [*PIECES, "<x_1>", "<y_2>", "<class_A>", "<class_", "[1-2]", "[3", "\0", TITLE, SAID]
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 30)))
        for found in (document_scores(text, PAGE), timed_scores(text, SAID)):
            assert all(0 <= value <= 1 for name, value in found.items() if name != "start_offset")


# ------------------------------------------------------------------------------------------------------ nano's tasks


def test_all_skills_are_those_of_the_shipped_model():
    assert not set(GROUNDING_SKILLS) & set(SKILLS) and set(GROUNDING_SKILLS) == {"image_document", "speech_times"}


@needs_fonts
def test_boxes_of_pages_hold_all_their_ink_and_blocks_do_not_touch():
    kinds, columns = set(), 0
    for seed in range(40):
        picture, blocks = grounding.draw_page(sample_random("test", seed, "heldout"), "heldout")
        height, width, _ = picture.shape
        assert 1 <= len(blocks) <= 4
        ground = np.median(picture.reshape(-1, 3), 0)
        inside = np.zeros((height, width), bool)
        for block in blocks:
            left, top, right, bottom = block.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert not inside[top:bottom, left:right].any()
            inside[top:bottom, left:right] = True
            edges = [picture[top, left:right], picture[bottom - 1, left:right]]
            edges += [picture[top:bottom, left], picture[top:bottom, right - 1]]
            assert all(np.abs(edge - ground).max() > 25 for edge in edges)  # no box is wider than its block
        wide = np.pad(inside, 2)
        around = np.max([np.roll(wide, (y, x), (0, 1)) for y in (-2, 0, 2) for x in (-2, 0, 2)], 0)[2:-2, 2:-2]
        assert (np.abs(picture - ground).max(-1)[~around] > 90).sum() <= 8  # no ink outside but of faint serifs
        kinds |= {block.kind for block in blocks}
        columns += any(b.box[1] < a.box[1] for a, b in zip(blocks, blocks[1:]))  # the second column starts higher up
    assert kinds == {"Title", "Text", "Table", "Picture"} and columns >= 3


@needs_fonts
def test_pages_are_held_out_written_in_tokens_and_scored():
    tokenizer = build_tokenizer()
    for split in ("train", "heldout"):
        for seed in range(12):
            sample = make_sample("image_document", seed, split)
            answer = sample["messages"][-1]["content"]
            blocks, broken = parse_document(answer, 100)
            ids = tokenizer(answer)["input_ids"]
            assert blocks and not broken and tokenizer.decode(ids) == answer and len(ids) <= 210
            assert "reasoning_content" not in sample["messages"][-1]
            assert score(sample, f" {answer}.\n") and not score(sample, answer + " x") and not score(sample, "")
            for word in " ".join(block.text for block in blocks).split():
                if len(word) >= 3 and word.isdigit():
                    assert in_split(word, split)
    one, two = (make_sample("image_document", 5)["messages"][0]["content"][0]["image"] for _ in range(2))
    assert one.tobytes() == two.tobytes()


@needs_espeak
def test_times_are_those_of_the_sound(spoken):  # noqa: F811
    for seed in range(25):
        sample = make_sample("speech_times", seed, "heldout", think=True)
        audio, rate = sample["messages"][0]["content"][0]["audio"]
        answer = sample["messages"][-1]["content"]
        phrases, broken = parse_times(answer)
        assert not broken and score(sample, answer + ".") and not score(sample, answer + " x")
        assert sample["messages"][-1]["reasoning_content"] == " ".join(phrase.text for phrase in phrases)
        ends = [0.0] + [edge for phrase in phrases for edge in (phrase.start, phrase.end)] + [len(audio) / rate + 0.05]
        assert ends == sorted(ends)
        assert all(b.start - a.end >= 0.25 for a, b in zip(phrases, phrases[1:]))
    # without noise, room and voices' filters: silence before, between and behind the phrases
    rng = sample_random("test", 3, "heldout")
    silences = [0.5, 0.05, 0.8]
    audio, _, spans = grounding.speech.spoken_utterance(rng, "heldout", ["one", "two", "red"], True, silences=silences)
    starts = [start / rate for start, _ in spans]
    assert starts[0] == 0.5 and starts[1] == pytest.approx(spans[0][1] / rate + 0.05, abs=1e-3)
    assert starts[2] == pytest.approx(spans[1][1] / rate + 0.8, abs=1e-3)
    assert not audio[: spans[0][0]].any() and not audio[spans[1][1] : spans[2][0]].any()
    assert all(np.abs(audio[start:end]).max() > 0.01 for start, end in spans)


@needs_fonts
def test_evaluations_write_the_parts_down(tmp_path, capsys):
    """The shipped nano was not taught the tags: rows are answered, scored low, and every part stands in the results."""
    import infer
    from modeling_omni.nano_data.prompts import save_prompts

    (page,) = save_prompts(tmp_path, ["image_document"], 1, "heldout", 7)
    assert page["verifier"] == "document_parse" and page["args"] == {"scale": 100}
    sound = {"id": "said", "prompt": "Which digits are spoken?", "audio": "digits.wav", "verifier": "timed_speech"}
    sound["answer"] = [{"text": "four zero seven", "start": 0.2, "end": 1.9}]
    lost = {"id": "lost", "prompt": "Read", "image": "none.png", "answer": PAGE, "verifier": "document-parse"}
    folder = Path(infer.__file__).parent / "modeling_omni/nano/examples"
    (tmp_path / "digits.wav").write_bytes((folder / "digits.wav").read_bytes())
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (page, sound, lost)))
    given = ["--data", tmp_path / "all.jsonl", "--out", tmp_path / "out", "--max-new-tokens", "12"]
    assert infer.main(["eval", *map(str, given)]) == 0
    shown = capsys.readouterr().out
    assert "| order_f1 |" in shown and "| segment_iou |" in shown
    rows = {row["verifier"]: row for row in json.loads((tmp_path / "out/results.json").read_text())["table"]}
    assert set(rows["document_parse"]["parts"]) == {"text", "order_f1", "box_iou", "box_f1", "broken"}
    assert rows["document_parse"]["rows"] == 2 and rows["document_parse"]["errors"] == 1
    assert rows["timed_speech"]["parts"]["segment_iou"] == 0 and 0 <= rows["timed_speech"]["score"] < 1
