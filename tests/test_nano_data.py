"""The nano tasks: deterministic, answers that the rendered content bears out, splits that share nothing, token ids."""

import importlib.util
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from modeling_omni import nano_data
from modeling_omni.nano_data import fonts, images, scenes, speech, text, video
from modeling_omni.nano_data.tokenizer import SPECIAL_TOKENS, build_tokenizer, save_tokenizer
from modeling_omni.nano_data.vocabulary import (
    COLOURS,
    MOTIONS,
    PLACES,
    PRINTED_WORDS,
    SHAPES,
    SPOKEN_WORDS,
    in_split,
    sample_random,
)

HAS_FONTS = all(importlib.util.find_spec(p.replace("-", "_")) for p in fonts.FONT_PACKAGES)
HAS_ESPEAK = importlib.util.find_spec("espeakng_loader") is not None
needs_fonts = pytest.mark.skipif(not HAS_FONTS, reason="font packages of the nano extra (fontpkg-*) are not installed")
needs_espeak = pytest.mark.skipif(not HAS_ESPEAK, reason="espeakng-loader (nano extra) is not installed")

READING = ("image_word", "image_digits")
HEARING = tuple(s for s in nano_data.SKILLS if s.startswith("speech_") or s in ("video_heard_motion", "heard_picture"))
SILENT = tuple(s for s in nano_data.SKILLS if s not in HEARING and s not in READING)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A small real cache: two training and two held-out espeak-ng voices, all words."""
    folder = tmp_path_factory.mktemp("speech")
    every = {split: [v for v in speech.voices(split) if v.engine == "espeak"] for split in nano_data.SPLITS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech, "voices", lambda split: every[split][:8:4])
        speech.build_cache(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(speech.FOLDER_VARIABLE, str(folder))
        yield folder


def flat(sample):
    """A sample as comparable bytes."""
    parts = []
    for message in sample["messages"]:
        content = message["content"]
        parts += [content] if isinstance(content, str) else [_bytes(part) for part in content]
        parts.append(message.get("reasoning_content", ""))
    return parts


def _bytes(part):
    value = part[part["type"]]
    if part["type"] == "image":
        return value.tobytes()
    if part["type"] == "audio":
        return value[0].tobytes()
    if part["type"] == "video":
        return value.frames.tobytes() + (b"" if value.audio is None else value.audio.tobytes())
    return value


def question_of(sample):
    content = sample["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def answer_of(sample):
    return sample["messages"][-1]["content"]


def check_sample(skill):
    for split in nano_data.SPLITS:
        one, again = (nano_data.make_sample(skill, 5, split) for _ in range(2))
        assert flat(one) == flat(again)
        assert one["skill"] == skill and [m["role"] for m in one["messages"]] == ["user", "assistant"]
        assert nano_data.score(one, f" {answer_of(one)}.\n") and not nano_data.score(one, answer_of(one) + " x")
    assert len({str(flat(nano_data.make_sample(skill, seed))) for seed in range(12)}) > 5
    assert flat(nano_data.make_sample(skill, 5, "train")) != flat(nano_data.make_sample(skill, 5, "heldout"))
    assert "reasoning_content" in nano_data.make_sample(skill, 1, think=True)["messages"][-1]
    assert "reasoning_content" not in nano_data.make_sample(skill, 1, think=False)["messages"][-1]


@pytest.mark.parametrize("skill", SILENT)
def test_samples_are_functions_of_their_arguments(skill):
    check_sample(skill)


@needs_fonts
@pytest.mark.parametrize("skill", READING)
def test_reading_samples_are_functions_of_their_arguments(skill):
    check_sample(skill)


@needs_espeak
@pytest.mark.parametrize("skill", HEARING)
def test_hearing_samples_are_functions_of_their_arguments(skill, spoken):
    check_sample(skill)


def test_samples_do_not_depend_on_each_other():
    alone = flat(nano_data.make_sample("image_where", 8))
    for seed in range(3):
        nano_data.make_sample("video_direction", seed)
    assert flat(nano_data.make_sample("image_where", 8)) == alone


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown skill 'image_smell'"):
        nano_data.make_sample("image_smell", 0)
    with pytest.raises(ValueError, match="split is one of"):
        nano_data.make_sample("text_copy", 0, "test")


# answers


def test_sums_and_their_thoughts_are_right():
    for skill in ("text_math", "text_sum"):
        for seed in range(300):
            sample = nano_data.make_sample(skill, seed, think=True)
            a, sign, b = re.search(r"(\d+) ([+-]) (\d+)", question_of(sample)).groups()
            assert int(answer_of(sample)) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
            steps = sample["messages"][-1]["reasoning_content"].split(": ")[1].split(", ")
            columns = [step.split(" = ") for step in steps]
            assert all(eval(left) == int(right) for left, right in columns)  # noqa: S307 (digits and signs only)
            written = columns[-1][1] + "".join(right[-1] for _, right in columns[-2::-1])
            assert int(written) == int(answer_of(sample))  # the digits of the answer stand in the thought


def parse(description):
    """ "red circle top left, blue star moves up" -> [(colour, shape, place or motion)]."""
    found = []
    for sentence in re.split(r", | and |\. ", description):
        match = re.fullmatch(r"(?:There is |You see )?(?:an? )?(\w+) (\w+) (?:moves )?(.+)", sentence)
        found.append(match.groups())
    assert all(c in COLOURS and s in SHAPES and p in (*PLACES, *MOTIONS, scenes.STILL) for c, s, p in found)
    return found


def expected_answer(question, things):
    """An independent reading of the questions over still shapes; None for a form that it does not know."""
    q = question.lower().rstrip("?.").replace("colour", "color")
    named = [t for t in things if t[1] in q] or (things if len(things) == 1 else [])
    coloured = [t for t in things if re.search(rf"\b{t[0]}\b", q)]
    if q.startswith(("how many", "count")):
        shapes = [s for s in SHAPES if s in q]
        colours = [c for c in COLOURS if re.search(rf"\b{c}\b", q)]
        return str(sum((not shapes or t[1] in shapes) and (not colours or t[0] in colours) for t in things))
    if match := re.match(r"is the (\w+) (left of|right of|above|below) the (\w+)", q):
        one, other = (divmod(PLACES.index(next(t[2] for t in things if t[1] == n)), 3) for n in match.group(1, 3))
        word = match.group(2)
        true = {"left of": one[1] < other[1], "right of": one[1] > other[1],
                "above": one[0] < other[0], "below": one[0] > other[0]}[word]  # fmt: skip
        return "yes" if true else "no"
    if match := re.match(r"is there an? (\w+) (\w+)", q):
        return "yes" if any(t[:2] == match.groups() for t in things) else "no"
    if match := re.match(r"which shape is (left of|right of|above|below) the (\w+)", q):
        return next(t[1] for t in things if t[1] != match.group(2))
    if "where" in q or "which part" in q:
        return ([t for t in named if t in coloured] or named or coloured)[0][2]
    if match := re.search(r"shape is at the (.+)", q):
        return next(t[1] for t in things if t[2] == match.group(1))
    if "color" in q:
        return named[0][0]
    if "shape" in q:
        return (coloured or things)[0][1]
    return None


@pytest.mark.parametrize("kind", [k for k in scenes.SHAPE_KINDS if k != "describe"])
@pytest.mark.parametrize("medium", ["text", "image"])
def test_answers_about_shapes_follow_from_the_scene(kind, medium):
    for seed in range(150):
        sample = nano_data.make_sample(f"{medium}_{kind}", seed, "heldout" if seed % 2 else "train", think=True)
        things = parse(sample["messages"][-1]["reasoning_content"])
        question = question_of(sample)
        if medium == "text":
            fact, question = question.split(".\n")
            assert sorted(parse(fact)) == sorted(things)
        assert expected_answer(question, things) == answer_of(sample), (question, things)


def nearest_colour(pixels):
    return min(COLOURS, key=lambda name: float(np.abs(np.median(pixels, 0) - np.array(COLOURS[name])).sum()))


def test_shapes_are_where_and_what_the_scene_says():
    """Colour from the pixels and place from the ink's centre, in a third of the picture each."""
    for seed in range(80):
        rng = sample_random("test", seed, "train")
        things = scenes.random_things(rng, rng.randint(1, 3))
        picture, inks = images.draw_things(things, rng)
        height, width, _ = picture.shape
        for thing, ink in zip(things, inks, strict=True):
            ys, xs = np.nonzero(ink.mask > 0.99)
            ys, xs = ys + ink.y, xs + ink.x
            assert ys.min() >= -1 and xs.min() >= -1 and ys.max() <= height and xs.max() <= width
            row, column = int(3 * ys.mean() / height), int(3 * xs.mean() / width)
            assert PLACES[3 * row + column] == PLACES[thing.place]
            inside = (ys >= 0) & (xs >= 0) & (ys < height) & (xs < width)
            assert nearest_colour(picture[ys[inside], xs[inside]]) == thing.colour
            area = ink.mask.sum() / (ink.mask.shape[0] * ink.mask.shape[1])
            assert 0.15 < area < 0.85  # a cross is thin, a square full


def test_the_six_shapes_are_different_masks():
    means = {}
    for shape in SHAPES:
        rng = sample_random("test", 0, "train")
        means[shape] = np.mean([images.shape_mask(shape, 20, rng) for _ in range(20)], 0)
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a < b]
    assert min(np.abs(means[a] - means[b]).mean() for a, b in pairs) > 0.04


def centre(ink):
    ys, xs = np.nonzero(ink.mask > 0.5)
    return xs.mean() + ink.x, ys.mean() + ink.y


def test_what_moves_moves_as_said():
    for seed in range(60):
        rng = sample_random("test", seed, "train")
        things = scenes.moving_things(rng)
        frames, inks = video.draw_clip(things, rng, *video.random_shape(rng))
        assert (
            frames.dtype == np.uint8 and len(frames) == len(inks) and frames.shape[1] % 32 == frames.shape[2] % 32 == 0
        )
        assert sum(t.motion != scenes.STILL for t in things) <= 1
        for number, thing in enumerate(things):
            (x0, y0), (x1, y1) = centre(inks[0][number]), centre(inks[-1][number])
            dx, dy = MOTIONS.get(thing.motion, (0, 0))
            along, across = (x1 - x0) * dx + (y1 - y0) * dy, abs((x1 - x0) * dy) + abs((y1 - y0) * dx)
            if thing.motion == scenes.STILL:
                assert abs(x1 - x0) <= 2 and abs(y1 - y0) <= 2
            else:
                assert along >= 0.15 * min(frames.shape[1:3]) and across <= 2


def test_questions_about_motion():
    for medium in ("text_motion", "video_direction", "video_mover", "video_describe_motion"):
        for seed in range(100):
            sample = nano_data.make_sample(medium, seed, think=True)
            things = parse(sample["messages"][-1]["reasoning_content"])
            q, answer = question_of(sample).split("\n")[-1].lower(), answer_of(sample)
            mover = next((t for t in things if t[2] != scenes.STILL), None)
            if q.startswith("does"):
                asked = next(t for t in things if t[1] in q)
                assert answer == ("no" if asked[2] == scenes.STILL else "yes")
            elif q.startswith(("describe", "what happens", "what moves where")):
                assert parse(answer) == things
            elif mover is None:
                assert answer == "none"
            elif "way" in q or "direction" in q or q.startswith("where"):
                assert answer == mover[2]
            else:
                assert answer in (mover[0], mover[1], f"{mover[0]} {mover[1]}")


@needs_fonts
def test_printed_characters_stand_in_order_and_inside():
    for seed in range(60):
        rng = sample_random("test", seed, "train")
        word = text.printed_word(rng, "train")
        picture, inks = images.draw_word(word, rng, "train")
        assert "".join(images.THING_CLASSES[ink.thing] for ink in inks) == word
        height, width, _ = picture.shape
        lefts = []
        for ink in inks:
            ys, xs = np.nonzero(ink.mask > 0.4)
            assert 0 <= ys.min() + ink.y and ys.max() + ink.y < height
            assert 0 <= xs.min() + ink.x and xs.max() + ink.x < width
            lefts.append(xs.mean() + ink.x)
        assert lefts == sorted(lefts)


@needs_fonts
def test_every_face_draws_every_character_differently():
    for split in nano_data.SPLITS:
        for face in fonts.faces(split)[::4]:
            masks = [glyph.mask for glyph in fonts.glyph_set(face).glyphs.values()]
            assert all(mask.max() > 200 for mask in masks)
            assert len({mask.tobytes() for mask in masks}) == 36  # no missing-character boxes


def test_handwriting_is_read_as_scikit_learn_labels_it():
    from sklearn.datasets import load_digits

    data = load_digits()
    for split, rows in (("train", range(0, 1415)), ("heldout", range(1415, 1797))):
        known = images.handwriting(split)
        assert sum(map(len, known.values())) == len(rows)
        first = next(row for row in rows if data.target[row] == 7)
        assert np.array_equal(known["7"][0], (data.images[first] * 255 / 16).astype(np.uint8))
    # the writers' files begin with 0..9 twice over; the split cuts where one of them begins
    assert list(data.target[1415:1435]) == list(range(10)) * 2


# splits


def test_splits_share_no_content():
    assert not set(PRINTED_WORDS["train"]) & set(PRINTED_WORDS["heldout"])
    seen = {split: set() for split in nano_data.SPLITS}
    for split in nano_data.SPLITS:
        for seed in range(150):
            for skill in (
                "text_where",
                "image_describe",
                "video_describe_motion",
                "text_math",
                "video_turns",
                "text_turns",
            ):
                sample = nano_data.make_sample(skill, seed, split, think=True)
                thought = sample["messages"][-1]["reasoning_content"]
                seen[split].add(thought.split(":")[0])
    assert not seen["train"] & seen["heldout"]
    assert all(in_split(content, split) for split in seen for content in seen[split])
    for split in nano_data.SPLITS:
        for seed in range(20):
            buttons = images.random_buttons(random.Random(seed), split)
            assert in_split(" ".join([b.colour for b in buttons] + [b.label for b in buttons]), split)


def test_splits_share_no_font_voice_or_writer():
    assert not set(fonts.FAMILIES["train"]) & set(fonts.FAMILIES["heldout"])
    train, heldout = (speech.voices(split) for split in nano_data.SPLITS)
    assert not {v.speaker for v in train} & {v.speaker for v in heldout}
    variants = [{v.name.split("+")[-1] for v in group} for group in (train, heldout)]
    assert not variants[0] & variants[1]
    assert {v.engine for v in heldout} > {v.engine for v in train}  # engines that training never hears
    train_rows, heldout_rows = (
        {mask.tobytes() for group in images.handwriting(split).values() for mask in group} for split in nano_data.SPLITS
    )
    assert not train_rows & heldout_rows


# dense labels


@needs_fonts
def test_dense_image_labels():
    kinds = set()
    for seed in range(60):
        image, labels = nano_data.dense_image_sample(seed)
        assert isinstance(image, Image.Image) and labels.shape == (4, image.height // 4, image.width // 4)
        things, colours, columns, rows = labels
        assert set(np.unique(things)) <= {nano_data.IGNORE, *range(len(nano_data.THING_CLASSES))}
        assert np.array_equal(things == nano_data.IGNORE, colours == nano_data.IGNORE)
        assert np.array_equal(things > 0, colours > 0) and (things > 0).any()
        y, x = np.nonzero(columns > 0)  # the centre lies near the cells of its thing
        assert np.abs((columns[y, x] - 0.5) * image.width / 10 - 4 * x).max() < 0.4 * image.width
        assert np.abs((rows[y, x] - 0.5) * image.height / 10 - 4 * y).max() < 0.4 * image.height
        kinds |= set(things[things > 0].tolist())
        again = nano_data.dense_image_sample(seed)
        assert again[0].tobytes() == image.tobytes() and np.array_equal(again[1], labels)
    assert len(kinds) > 36


def test_dense_labels_of_cells():
    ink = images.Ink(np.ones((8, 4), np.float32), x=16, y=32, thing=3, colour=5)  # fills two cells
    faint = images.Ink(np.ones((1, 4), np.float32), x=0, y=15, thing=4, colour=6)  # a quarter of one cell
    labels = images.dense_labels([ink, faint], 64, 96)
    assert labels.shape == (4, 16, 24) and (labels[0] > 0).sum() == 2
    assert (labels[:, 8:10, 4] == [[3], [5], [1 + 1], [1 + 5]]).all()  # centre (18, 36) of 96 x 64
    assert labels[0, 3, 0] == images.IGNORE and (labels[0] == images.IGNORE).sum() == 1


def test_dense_video_labels():
    seen = set()
    for seed in range(30):
        frames, labels = nano_data.dense_video_sample(seed)
        count, height, width, _ = frames.shape
        assert count % 2 == 0 and labels.shape == (5, count // 2, height // 4, width // 4)
        assert np.array_equal(labels[0] > 0, labels[4] > 0) and np.array_equal(labels[0] > 0, labels[2] > 0)
        seen |= set(labels[4].ravel().tolist())
    assert seen == {nano_data.IGNORE, *range(len(nano_data.MOTION_CLASSES))}


# speech


@needs_espeak
def test_utterances_and_their_spans(spoken):
    for split in nano_data.SPLITS:
        for seed in range(30):
            rng = sample_random("test", seed, split)
            audio, words, spans = nano_data.spoken_utterance(rng, split)
            assert audio.dtype == np.float32 and audio.ndim == 1 and np.abs(audio).max() <= 1
            assert 1 <= len(words) == len(spans) <= 4 and set(words) <= set(SPOKEN_WORDS)
            edges = [0, *(edge for span in spans for edge in span), len(audio)]
            assert edges == sorted(edges) and all(end - start > 1200 for start, end in spans)
            loud = [float(np.sqrt(np.mean(audio[start:end] ** 2))) for start, end in spans]
            assert min(loud) > 2 * float(np.sqrt(np.mean(audio[: spans[0][0] // 2] ** 2)))  # words stand out from noise


@needs_espeak
def test_spoken_answers(spoken):
    for seed in range(40):
        digits = nano_data.make_sample("speech_digits", seed, think=True)
        said = digits["messages"][-1]["reasoning_content"].split()
        assert answer_of(digits) == scenes.digits_of(said) and answer_of(digits).isdigit()
        words = nano_data.make_sample("speech_words", seed, think=True)
        assert answer_of(words) == words["messages"][-1]["reasoning_content"]
        both = nano_data.make_sample("video_heard_motion", seed, think=True)
        clip = both["messages"][0]["content"][0]["video"]
        seen, said = both["messages"][-1]["reasoning_content"].split(". a voice says ")
        motions = [t[2] for t in parse(seen)]
        assert clip.audio is not None and len(clip.audio) >= round(clip.duration * 16000)
        if "match" in question_of(both) or "spoken direction" in question_of(both):
            assert answer_of(both) == ("yes" if said in motions else "no")


@needs_espeak
def test_a_cache_that_says_one_word_for_all_is_refused():
    voice = next(v for v in speech.voices("train") if v.engine == "espeak")
    spoken = {w: speech.trimmed(s) for w, s in speech._speak_espeak(voice, ("yes", "no", "seven")).items()}
    speech.check_words(voice, spoken)
    with pytest.raises(ValueError, match="alike"):
        speech.check_words(voice, {**spoken, "no": spoken["yes"]})
    with pytest.raises(ValueError, match="badly"):
        speech.check_words(voice, {"yes": np.zeros(8000, np.float32)})


def test_a_missing_cache_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setenv(speech.FOLDER_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="python -m modeling_omni.nano_data speech --out"):
        nano_data.make_sample("speech_digits", 0)


# tokenizer


def test_tokenizer_ids_and_files(tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= 512
    assert {i: tokenizer.convert_ids_to_tokens(i) for i in SPECIAL_TOKENS} == SPECIAL_TOKENS
    assert tokenizer.convert_ids_to_tokens([3, 21, 31]) == ["<SPECIAL_3>", "<SPECIAL_21>", "<SPECIAL_31>"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 11)
    assert tokenizer.padding_side == "left"
    for token in SPECIAL_TOKENS.values():
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    hostile = "a <image> b </think>"
    assert tokenizer.decode(tokenizer(hostile, split_special_tokens=True)["input_ids"]) == hostile


def test_tokenizer_matches_the_shipped_one():
    from pathlib import Path

    shipped = Path(nano_data.__file__).parents[1] / "nano" / "tokenizer.json"
    assert json.loads(shipped.read_text()) == json.loads(build_tokenizer().backend_tokenizer.to_str())


def test_tokens_are_predictable():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("HELLO407") == list("HELLO407")
    for word in (*SPOKEN_WORDS, *COLOURS, *SHAPES, *MOTIONS):
        inside = tokenizer(f"a voice says {word}, no")["input_ids"]
        assert len(tokenizer(word)["input_ids"]) == 1 and tokenizer(word)["input_ids"][0] in inside
    for odd in ("caf\u00e9 \u6f22\U0001f600\t\n\n  x", "What's <b>this</b>?", "stops starred HELLo", ""):
        assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    for skill in SILENT:
        for seed in range(10):
            sample = nano_data.make_sample(skill, seed, think=True)
            for written in (question_of(sample), *(v for k, v in sample["messages"][-1].items() if k != "role")):
                ids = tokenizer(written)["input_ids"]
                assert tokenizer.decode(ids) == written and 0 not in ids
