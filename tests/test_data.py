"""Rows, adapters, blends by share of tokens, streams, and the check of data before training."""

import functools
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from modeling_omni import data
from modeling_omni.data import Blend, Source, Stream, TooLong, encode_row, frame_patches, measure_mean_tokens
from modeling_omni.data_adapters import adapt_row, question_messages
from modeling_omni.data_check import check_data
from modeling_omni.media import OmniInputError
from modeling_omni.processing_omni import OmniProcessor

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def processor():
    return OmniProcessor.from_pretrained("nano")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Arrow copies of Parquet files go into a folder of the test."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def text_row(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(path, rows: list):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def question_of(row: dict):
    return row["messages"][0]["content"]


# ------------------------------------------------------------------------------------------------- adapters


def test_media_columns_fill_empty_parts_in_order_and_text_stays_text(tmp_path, processor):
    for name, side in (("a.png", 96), ("b.png", 128)):
        Image.new("RGB", (side, side), "red").save(tmp_path / name)
    content = [{"type": "image"}, {"type": "text", "text": "not a place: <image>"}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row | {"images": ["a.png", "b.png"]}])
    row = Source({"path": path})[0]
    parts = row["messages"][0]["content"]
    assert [part.get("image") for part in parts] == [str(tmp_path / "a.png"), None, str(tmp_path / "b.png")]
    sample = encode_row(row, processor)
    assert sample["image_grid_thw"].tolist() == [[1, 6, 6], [1, 8, 8]]
    text = processor.decode(sample["input_ids"][0][sample["mm_token_type_ids"][0] == 0].tolist())
    assert "not a place: <image>" in text
    with pytest.raises(OmniInputError, match="1 image.* 2 empty"):
        adapt_row({"messages": [{"role": "user", "content": content}], "images": ["a.png"]})
    plain = adapt_row(text_row("look", "red") | {"image": "a.png"})  # no part at all: in front, as TRL has it
    assert plain["messages"][0]["content"] == [{"type": "image", "image": "a.png"}, {"type": "text", "text": "look"}]


def test_llava_sharegpt_and_swift_rows():
    llava = {
        "image": "x.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "an <image>"}],
    }
    messages = adapt_row(llava)["messages"]
    assert messages[0]["content"] == [{"type": "image", "image": "x.png"}, {"type": "text", "text": "\nWhat is it?"}]
    assert messages[1] == {"role": "assistant", "content": "an <image>"}
    sharegpt = {
        "system": "be kind",
        "tools": '[{"name": "add", "parameters": {}}]',
        "conversations": [
            {"from": "human", "value": "1+1"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2"},
        ],
    }
    row = adapt_row(sharegpt)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert row["messages"][2]["tool_calls"][0]["arguments"] == {"a": 1, "b": 1} and row["tools"][0]["name"] == "add"
    swift = text_row("<audio>what? <video>", "a dog") | {"audios": ["a.wav"], "videos": ["v.mp4"]}
    assert adapt_row(swift, "swift")["messages"][0]["content"] == [
        {"type": "audio", "audio": "a.wav"},
        {"type": "text", "text": "what? "},
        {"type": "video", "video": "v.mp4"},
    ]
    literal = adapt_row(text_row("<image> is a tag", "yes"))  # the same spelling in a row of our own
    assert question_of(literal) == "<image> is a tag"
    html = {"conversations": [{"from": "human", "value": "what does <video> do?"}, {"from": "gpt", "value": "play"}]}
    assert question_of(adapt_row(html)) == "what does <video> do?"  # no video in this row: a word
    seen = {"image": "x.png", "conversations": [{"from": "human", "value": "<image>is <audio> shown?"}]}
    assert question_of(adapt_row(seen))[1] == {"type": "text", "text": "is <audio> shown?"}
    marked = [text_row("<audio>what?", "a dog"), text_row([{"type": "text", "text": "<audio>what?"}], "a dog")]
    for row in marked:  # would be trained on the mark's letters otherwise
        with pytest.raises(OmniInputError, match="format: swift"):
            adapt_row(row | {"audios": ["a.wav"]})
    with pytest.raises(OmniInputError, match="'prompt' is plain text"):
        adapt_row({"prompt": "1+1=", "completion": "2"})
    for broken in (
        {"conversations": [{"from": "nobody", "value": "x"}]},
        {"conversations": [{"from": "human", "value": "<image> and <image>"}], "image": "one.png"},
        {"text": "no messages"},
        {"messages": 3},
        {"messages": ["hello"]},
    ):
        with pytest.raises(OmniInputError):
            adapt_row(broken)


def test_questions_become_multiple_choice_and_open():
    row = {"question": "What gas do plants take in?", "options": ["oxygen", "carbon dioxide", "argon"], "answer": "B"}
    user, reply = question_messages(row, "multiple_choice")
    letter = reply["content"]
    assert f"{letter}. carbon dioxide" in user["content"] and question_messages(row, "multiple_choice")[1] == reply
    assert question_messages(row, "open") == text_row(row["question"], "carbon dioxide")["messages"]
    assert question_messages(row | {"answer": 1}, "open") == question_messages(row, "open")
    needs = row | {"question": "Which of the following is a noble gas?", "answer": "argon", "reasoning": "Group 18."}
    assert "Answer with the letter" in question_messages(needs, "mixed")[0]["content"]
    assert question_messages(needs, "mixed")[1]["reasoning_content"] == "Group 18."
    forms = [question_messages(row | {"question": f"What is {i}?"})[0]["content"] for i in range(40)]
    assert 8 < sum("\n" in form for form in forms) < 32
    letters = Counter(
        question_messages(row | {"question": f"Q{i}?"}, "multiple_choice")[1]["content"] for i in range(60)
    )
    assert set(letters) == {"A", "B", "C"} and max(letters.values()) < 35
    for broken, template in ((needs, "open"), ({"question": "q", "answer": "a"}, "multiple_choice")):
        with pytest.raises(OmniInputError):
            question_messages(broken, template)
    with pytest.raises(OmniInputError, match="none of the 3 options"):
        question_messages(row | {"answer": "neon"})


def test_the_right_option_is_never_guessed():
    def answer(options, answer):
        return question_messages({"question": "q", "options": options, "answer": answer}, "open")[1]["content"]

    blood = {"A": "O", "B": "A", "C": "B", "D": "AB"}
    assert [answer(blood, letter) for letter in "ABCD"] == ["O", "A", "B", "AB"] and answer(blood, "AB") == "AB"
    assert answer({"a": "x", "b": "y"}, "b") == answer({"a": "x", "b": "y"}, "(B)") == "y"
    assert answer({"1": "x", "2": "y"}, 1) == "x"
    assert answer([10, 20, 30], 20) == "20" and answer([10, 20, 30], 2) == "30" and answer(["no", "yes"], "b.") == "yes"
    assert answer(["True", "False"], True) == "True"
    for options, unclear in (([1, 2, 3], 1), (["O", "A", "B", "AB"], "A")):
        with pytest.raises(OmniInputError, match="could be 2"):
            answer(options, unclear)


# ------------------------------------------------------------------------------------------------- sources


def test_parquet_by_file_and_by_name(tmp_path, processor):
    Image.new("RGB", (96, 96), "blue").save(tmp_path / "blue.png")
    picture = {"type": "image", "image": {"path": "blue.png", "bytes": None}, "text": None}
    inside = picture | {"image": {"path": None, "bytes": (tmp_path / "blue.png").read_bytes()}}
    question = {"type": "text", "text": "colour?", "image": None}
    rows = [
        {"messages": [{"role": "user", "content": [first, question]}, {"role": "assistant", "content": [answer]}]}
        for first in (picture, inside)
        for answer in [{"type": "text", "text": "blue", "image": None}]
    ]
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_list(rows * 3)
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_parquet(tmp_path / "set" / "train.parquet")
    source = Source({"path": str(tmp_path / "*.parquet"), "limit": 4})
    assert len(source) == 4 and source.name(3) == (str(tmp_path / "rows.parquet"), 4)
    for number in (0, 1):
        assert encode_row(source[number], processor)["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert source[0]["messages"][1]["content"] == [{"type": "text", "text": "blue"}]  # Arrow's nulls are gone
    named = Source({"path": f"datasets:{tmp_path / 'set'}"})
    assert len(named) == 6 and named[1]["messages"] == source[1]["messages"]
    stream = Stream({"path": f"datasets:{tmp_path / 'set'}", "streaming": True})
    assert next(stream)[2]["messages"] == named[0]["messages"]


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(OmniInputError, match="no such file"):
        Source({"path": str(tmp_path / "none.jsonl")})
    (tmp_path / "rows.csv").write_text("a")
    with pytest.raises(OmniInputError, match="must end in"):
        Source({"path": str(tmp_path / "rows.csv")})
    source = Source({"path": write_jsonl(tmp_path / "rows.jsonl", [text_row("a", "b"), "", "{", '{"message": 1}'])})
    assert len(source) == 3 and question_of(source[0]) == "a"
    for number, reason in ((1, "row 2: not JSON"), (2, "row 3: no 'messages'")):
        with pytest.raises(OmniInputError, match=reason):
            source[number]
    for wrong in ({"path": "x", "wieght": 1}, {"path": "x", "weight": 0}, {"path": "x", "format": "lava"}, {}):
        with pytest.raises(ValueError):
            Blend([wrong])
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(OmniInputError, match="rows.parquet: datasets cannot open it"):
        Source({"path": str(tmp_path / "rows.parquet")})
    (tmp_path / "list.json").write_text(json.dumps([text_row("c", "d"), None]))
    source = Source({"path": str(tmp_path / "list.json")})
    assert question_of(source[0]) == "c"
    with pytest.raises(OmniInputError, match="row 2: a JSON object is needed"):
        source[1]
    deep = write_jsonl(tmp_path / "deep.jsonl", ["[" * 100_000])
    with pytest.raises(OmniInputError, match="row 1: RecursionError"):
        Source({"path": deep})[0]
    assert isinstance(next(Stream({"path": deep, "streaming": True}))[2], OmniInputError)
    (tmp_path / "one" / "two").mkdir(parents=True)
    write_jsonl(tmp_path / "one" / "two" / "rows.jsonl", [text_row("e", "f")])
    assert question_of(Source({"path": str(tmp_path / "one" / "**" / "*.jsonl")})[0]) == "e"


@pytest.mark.parametrize(
    "source,reason",
    [
        ("rows.jsonl", "a source in data is 'rows.jsonl'"),
        ({"path": 3}, "a source in data is"),
        ({"path": "x", "limit": -5}, "limit is -5"),
        ({"path": "x", "limit": 2.5}, "limit is 2.5"),
        ({"path": "x", "mean_tokens": -5}, "mean_tokens is -5"),
        ({"path": "x", "weight": "much"}, "weight is 'much'"),
        ({"path": "nano:typo"}, "nano:typo: no such nano task; known: text_copy"),
    ],
)
def test_wrong_sources_are_named_before_anything_is_read(source, reason):
    with pytest.raises(OmniInputError, match=reason):
        data.check_sources([source])


def test_a_moved_file_keeps_its_order(tmp_path):
    orders = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        path = write_jsonl(tmp_path / name / "rows.jsonl", [text_row(f"q{i}", "a") for i in range(50)])
        orders.append([question_of(Blend([{"path": path}])[place]) for place in range(50)])
    assert orders[0] == orders[1] != sorted(orders[0])


def test_local_urls_start_at_the_folder_of_the_file(tmp_path):
    parts = [{"type": "image", "url": "a.png"}, {"type": "image_url", "image_url": {"url": "b.png"}}]
    parts += [{"type": "image", "url": "https://host/c.png"}, {"type": "image", "path": "/d.png"}]
    found = {"role": "tool", "content": [{"name": "README", "path": "a.md"}]}  # a tool's result, no medium
    row = adapt_row({"messages": [*text_row(parts, "x")["messages"], found]}, folder=tmp_path)
    assert row["messages"][-1] == found
    one, two, three, four = question_of(row)
    assert one["url"] == str(tmp_path / "a.png") and two["image_url"]["url"] == str(tmp_path / "b.png")
    assert three["url"] == "https://host/c.png" and four["path"] == "/d.png"


# ------------------------------------------------------------------------------------------------- blends


def test_places_are_even_shares_and_every_row_comes_once_an_epoch(tmp_path):
    sizes = {"a": 7, "b": 20, "c": 300}
    sources = [
        {
            "path": write_jsonl(tmp_path / f"{name}.jsonl", [text_row(f"{name}{i}", "x") for i in range(size)]),
            "weight": weight,
        }
        for (name, size), weight in zip(sizes.items(), (1, 3, 0.02))
    ]
    blend = Blend(sources, seed=5)
    places = [question_of(blend[place]) for place in range(1000)]
    seen = {name: [q for q in places if q[0] == name] for name in sizes}
    for name, share in zip(sizes, (1 / 4.02, 3 / 4.02, 0.02 / 4.02)):
        assert abs(len(seen[name]) - 1000 * share) <= 2
        for epoch in range(len(seen[name]) // sizes[name]):
            rows = seen[name][epoch * sizes[name] : (epoch + 1) * sizes[name]]
            assert len(set(rows)) == sizes[name]
    assert seen["a"][:7] != seen["a"][7:14]  # another order every epoch
    again = Blend(sources, seed=5)
    assert [question_of(again[place]) for place in (999, 3, 500)] == [places[999], places[3], places[500]]
    assert places[:50] != [question_of(Blend(sources, seed=6)[place]) for place in range(50)]
    far = 10**12 + 17
    assert question_of(blend[far]) == question_of(again[far])


def test_floor_sum_and_shuffle_against_brute_force():
    rng = np.random.default_rng(0)
    for n, m, a, b in rng.integers(1, 60, (200, 4)).tolist():
        assert data.floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))
    for count in (1, 2, 3, 100, 1000):
        assert sorted(data.shuffled(i, count, "key") for i in range(count)) == list(range(count))


def test_weights_are_shares_of_tokens(tmp_path, processor):
    """Sources of very different lengths, one with rows that are refused: token shares come out as the weights."""
    rng = np.random.default_rng(0)
    sources = []
    for name, median, weight in (("short", 15, 1), ("long", 150, 2), ("holed", 60, 1)):
        lengths = np.minimum(rng.lognormal(np.log(median), 0.5, 400), 330).astype(int)
        rows = [text_row(f"{name} {i}", "ab " * length) for i, length in enumerate(lengths.tolist())]
        if name == "holed":
            rows[::3] = ["{"] * len(rows[::3])
        sources.append({"path": write_jsonl(tmp_path / f"{name}.jsonl", rows), "weight": weight})
    measured = measure_mean_tokens(sources, processor, row_tokens=1200)
    assert measure_mean_tokens(sources, processor, row_tokens=1200) == measured
    wild = [
        text_row("hi", "ab " * 50) | {"tools": [{"function": None}]},
        text_row("hi", "ab " * 50),
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": 3}]},
    ]
    path = write_jsonl(tmp_path / "wild.jsonl", wild)
    usable = encode_row(wild[1], processor)["input_ids"].shape[1]
    assert measure_mean_tokens([{"path": path}], processor)[0]["mean_tokens"] == pytest.approx(usable / 3, abs=0.01)
    blend, tokens = Blend(measured), Counter()

    @functools.cache
    def length(source, number):
        try:
            return encode_row(blend.sources[source][number], processor)["input_ids"].shape[1]
        except OmniInputError:
            return 0

    for place in range(4000):
        source, number = blend.locate(place)
        tokens[source] += length(source, number)
    shares = [tokens[i] / sum(tokens.values()) for i in range(3)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], rel=0.05)
    with pytest.raises(ValueError, match="every source in data or for none"):
        Blend([measured[0], sources[1]])


# ------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("kind", ["jsonl", "jsonl files", "parquet"])
def test_streams_share_out_rows_and_resume_at_the_exact_one(tmp_path, kind, monkeypatch):
    rows = [text_row(f"q{i}", "a") for i in range(24)]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        spec = {"path": str(tmp_path / "rows.parquet"), "streaming": True}
    else:
        files = 3 if kind == "jsonl files" else 1
        for i in range(files):
            write_jsonl(tmp_path / f"{i}.jsonl", rows[i::files])
        spec = {"path": str(tmp_path / "*.jsonl"), "streaming": True}
    streams = [Stream(spec, lane, 3) for lane in range(3)]
    read = [[question_of(row) for _, _, row in itertools.islice(stream, 8)] for stream in streams]
    assert sorted(sum(read, [])) == sorted(question_of(row) for row in rows)
    stream = Stream(spec, 1, 3)
    whole, states = [], []
    for _ in range(20):  # over the end of an epoch
        states.append(json.loads(json.dumps(stream.state_dict())))
        whole.append(question_of(next(stream)[2]))
    assert whole[:8] == read[1] and set(whole[8:16]) == set(read[1])
    parsed = []
    monkeypatch.setattr(data, "parse_line", lambda line, parse=data.parse_line: parsed.append(1) or parse(line))
    for start in (0, 5, 7, 8, 13):
        resumed = Stream(spec, 1, 3)
        resumed.load_state_dict(states[start])
        again = Stream(spec, 1, 3)  # from a position that was only passed on
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        resumed = again
        assert [question_of(next(resumed)[2]) for _ in range(20 - start)] == whole[start:]
    assert len(parsed) == (0 if kind == "parquet" else sum(20 - start for start in (0, 5, 7, 8, 13)))
    resumed = Stream(spec, 1, 3)
    for start in (2, 3, 7, 8, 13, 4):  # forward, over the end of an epoch, and back
        resumed.go_to(states[start])
        assert question_of(next(resumed)[2]) == whole[start]


def test_random_access_reads_only_what_is_asked_for(tmp_path, monkeypatch):
    blend = Blend([{"path": write_jsonl(tmp_path / "rows.jsonl", [text_row(f"q{i}", "a") for i in range(50)])}])
    expected = question_of(blend[10**6])
    read = []
    monkeypatch.setattr(data, "parse_line", lambda line, parse=data.parse_line: read.append(1) or parse(line))
    assert question_of(Blend(blend.specs)[10**6]) == expected and len(read) == 1


# ------------------------------------------------------------------------------------------------- samples


def test_limits_of_a_row(processor):
    long = text_row("count", "one two " * 60)
    tokens = encode_row(long, processor)["input_ids"].shape[1]
    with pytest.raises(TooLong, match=f"{tokens} tokens; limit 100"):
        encode_row(long, processor, row_tokens=100)
    cut = encode_row(long, processor, row_tokens=100, cut_long=True)
    assert all(value.shape == (1, 100) for value in cut.values())
    video = data.Source({"path": "nano:video_direction"})[3]
    with pytest.raises(TooLong):  # a cut would go through the clip
        encode_row(video, processor, row_tokens=30, cut_long=True)
    with pytest.raises(TooLong, match="media cost"):
        encode_row(video, processor, media_tokens=20)
    many = {"messages": [{"role": "user", "content": [{"type": "image", "path": "never_opened.png"}] * 400}]}
    with pytest.raises(TooLong, match="400 media items"):
        encode_row(many, processor, row_tokens=300)
    with pytest.raises(OmniInputError, match="nothing to learn"):
        encode_row({"messages": long["messages"][:1]}, processor)


def test_random_target_patches_and_frame_caps(processor):
    clip = {"type": "video", "video": (np.zeros((12, 90, 160, 3), np.uint8), 4.0)}
    row = {"messages": [{"role": "user", "content": [clip]}, {"role": "assistant", "content": "black"}]}
    choices = [64, 128, 192, 256]
    drawn = [frame_patches(choices, 1, place)["video_target_num_patches"] for place in range(200)]
    assert {target: drawn.count(target) > 30 for target in choices} == dict.fromkeys(choices, True)
    assert drawn == [frame_patches(choices, 1, place)["video_target_num_patches"] for place in range(200)]
    assert frame_patches(None, 1, 0) == {}
    for target in choices:
        sample = encode_row(row, processor, video_target_num_patches=target, max_frames=6)
        t, h, w = sample["video_grid_thw"][0].tolist()
        assert t == 3 and 0.7 * target < h * w <= target
        assert sample["mm_token_type_ids"].eq(2).sum() == t * h * w // 4
        assert len(sample["pixel_values_videos"]) == t * h * w
    for asked, frames in (
        (12, 6),
        (None, 6),
        (2, 2),
    ):  # a row may ask for fewer frames than the stage has, not for more
        part = {**clip, "max_frames": asked}
        sample = encode_row(
            {"messages": [row["messages"][0] | {"content": [part]}, row["messages"][1]]}, processor, max_frames=6
        )
        assert 2 * sample["video_grid_thw"][0, 0] == frames
    with pytest.raises(OmniInputError, match="video_target_num_patches"):
        encode_row(row, processor, video_target_num_patches=0)


# ------------------------------------------------------------------------------------------------- check


def test_check_data(tmp_path, processor):
    Image.new("RGB", (96, 96)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    see = [{"type": "image"}, {"type": "text", "text": "dark?"}]
    picture = {"messages": [{"role": "user", "content": see}, {"role": "assistant", "content": "yes"}]}
    rows = [
        picture | {"images": ["good.png"]},
        picture | {"images": ["bad.png"]},
        text_row("hello", "a b c d " * 200),
        "{broken",
        {"messages": [{"role": "wizard", "content": "x"}]},
        text_row("hello", "hi"),
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    sources = [{"path": path}, {"path": "nano:text_copy"}, {"path": path, "streaming": True}]
    report = check_data(sources, processor, 200, progress=False, ansi=False, bad_rows=tmp_path / "out" / "bad.jsonl")
    first, nano, stream = report.sources
    assert {key: first[key] for key in ("rows", "usable", "bad", "media", "long")} == {
        "rows": 6,
        "usable": 2,
        "bad": 2,
        "media": 1,
        "long": 1,
    }
    assert first["image"] == 9 and first["tokens"] == first["text"] + 9 and nano["usable"] == 64
    assert {**stream, "path": ""} == {**first, "path": ""}
    assert [(bad["row"], bad["file"]) for bad in report.bad_rows[:4]] == [(row, path) for row in (2, 3, 4, 5)]
    assert [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()] == report.bad_rows
    unanswered = write_jsonl(tmp_path / "one.jsonl", [{"messages": picture["messages"][:1], "images": ["good.png"]}])
    alone = check_data([{"path": unanswered}], processor, 200, progress=False).sources[0]
    assert alone["bad"] == 1 and alone["media"] == 0  # its picture is good
    assert "bad.png" in report.bad_rows[0]["reason"]
    text = str(report)
    assert "<image x 9>" in text and "[[yes<|im_end|>]]" in text and "limit 200" in text
    ansi = check_data([{"path": path}], processor, 200, sample=1, progress=False, ansi=True)
    assert ansi.sources[0]["rows"] == 1 and "\033[7myes<|im_end|>\033[0m" in ansi.first_sample
    with_workers = check_data([{"path": path}], processor, 200, progress=False, ansi=False, workers=2)
    assert with_workers.sources == [first] and with_workers.bad_rows == report.bad_rows[:4]
