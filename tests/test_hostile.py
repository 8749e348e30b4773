"""Hostile input: every item of the corpus gives a value or an OmniInputError that names item and limit, in bounded
memory; limits can be set; what the processor promises holds for any media; a stretch of fuzzing finds nothing."""

import io
import json
import os
import resource
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_omni import OmniInputError, OmniProcessor
from modeling_omni.configuration_omni import resolve_checkpoint
from modeling_omni.data import Source, encode_row
from modeling_omni.fuzzing import PATHS, check_inputs, draw, run_case
from modeling_omni.fuzzing import World as FuzzWorld
from modeling_omni.fuzzing_corpus import (
    CHECKPOINTS,
    EITHER,
    MEDIA,
    READ,
    TEXTS,
    flac_of_unknown_length,
    hostile_messages,
    hostile_parts,
    jpeg_of_scans,
    lying_rows,
    matroska,
    mp4,
    nested,
    picture,
    png,
    sound,
)
from modeling_omni.inference import load
from modeling_omni.limits import VARIABLE, MediaLimits, ServerLimits, default_limits, server_media_limits, with_limits
from modeling_omni.media import load_audio, load_image, load_video
from modeling_omni.packing import collate_rows, pack_rows

LOAD = {"image": load_image, "audio": load_audio, "video": load_video}


@pytest.fixture(scope="module")
def processor():
    return OmniProcessor.from_pretrained("nano")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------------ media


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MEDIA)
def test_every_item_of_the_corpus(kind):
    limits, before = server_media_limits(), peak()
    for name, (data, wanted) in MEDIA[kind]().items():
        try:
            LOAD[kind](data, limits=limits)
            got = READ
        except OmniInputError as error:
            got = "refused"
            assert ";" in str(error) and "\n" not in str(error) and len(str(error)) < 600, (name, error)
        assert wanted in (EITHER, got), name
    assert peak() - before < 400 * 1024**2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MEDIA)
def test_errors_tell_a_path_once(kind, tmp_path):
    """In front, where a server or the demo can put a name in its place; libraries repeat it."""
    refused = 0
    for name, (data, wanted) in MEDIA[kind]().items():
        if wanted == "refused" and len(data) < 50_000:
            (tmp_path / "file").write_bytes(data)
            with pytest.raises(OmniInputError) as error:
                LOAD[kind](tmp_path / "file", limits=replace(server_media_limits(), allow_paths=True))
            assert str(error.value).rfind(str(tmp_path)[:20]) == 0, name
            refused += 1
    assert refused > 10


def test_names_that_are_no_files_and_names_that_forge_lines(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    os.symlink("/dev/zero", tmp_path / "endless")
    (tmp_path / "a\nb\x1b[31m\x9b").write_bytes(b"x")
    names = ("pipe", "loop", "endless", ".", "a\nb\x1b[31m\x9b", "none\r\nhere", "a" * 5000, "a\0b", "\u202egnp.a")
    for name in names:
        for read in LOAD.values():
            with pytest.raises(OmniInputError) as error:
                read(str(tmp_path / name))
            assert str(error.value).isascii() and str(error.value).isprintable() and len(str(error.value)) < 500


def test_sound_is_read_to_its_end():
    """Of an Ogg file also what stands behind its first recording, of a FLAC also without a length in its header."""
    assert len(load_audio(flac_of_unknown_length())) == 4000
    for subtype in ("VORBIS", "OPUS"):
        chained = sound(kind="OGG", subtype=subtype) + sound(kind="OGG", subtype=subtype)
        assert 7800 < len(load_audio(chained)) < 8200  # of each, FFmpeg pads or trims a block
    for kind, name in (("audio", "codec that nobody knows"), ("video", "frames in another file")):
        with pytest.raises(OmniInputError, match="codec that is not known"):
            LOAD[kind](MEDIA[kind]()[name][0])


def test_files_with_the_wrong_ending(tmp_path):
    (tmp_path / "picture.wav").write_bytes(picture())
    assert load_image(tmp_path / "picture.wav").shape == (30, 40, 3)  # what it is counts, not what it is called
    (tmp_path / "song.png").write_bytes(sound())
    with pytest.raises(OmniInputError, match="song.png.*not an image"):
        load_image(tmp_path / "song.png")


def test_a_clip_is_what_its_tables_say():
    """The corpus is built by hand: without lies it decodes to the frames that went in."""
    frames = []
    for shade in range(0, 250, 50):
        file = io.BytesIO()
        Image.new("RGB", (64, 48), (shade, 120, 250 - shade)).save(file, "JPEG")
        frames.append(file.getvalue())
    clip = load_video(mp4(frames), num_frames=5)
    assert clip.frames.shape == (5, 48, 64, 3) and clip.frame_indices == [0, 1, 2, 3, 4] and clip.fps == 10
    for decoded, frame in zip(clip.frames, frames):
        assert np.abs(decoded.astype(int) - load_image(frame).astype(int)).max() < 8
    assert load_video(mp4([*frames[:2], picture(30, 90, "JPEG")]), num_frames=3).frames.shape == (3, 48, 64, 3)


# ------------------------------------------------------------------------------------------------------ limits

BIG = picture(60, 40)
CLIP = mp4([picture(64, 48, "JPEG", seed) for seed in range(8)])
OVER = [  # a limit, what it is set to, and something over it
    ("max_bytes", 100, load_image, BIG),
    ("max_image_pixels", 1000, load_image, BIG),
    ("max_image_side", 50, load_image, BIG),
    ("max_image_scans", 5, load_image, jpeg_of_scans(9)),
    ("timeout", 0, load_image, BIG),
    ("max_video_pixels", 1000, load_video, CLIP),
    ("max_video_frames", 1, partial(load_video, num_frames=8), CLIP),
    ("max_video_bytes", 1000, load_video, CLIP),
    ("max_video_packets", 5, load_video, CLIP),
    ("max_video_edits", 2, load_video, mp4([picture(64, 48, "JPEG")] * 8, edits=[(800, 0)] * 3)),
    ("max_video_seconds", 0.5, load_video, CLIP),
    ("max_audio_seconds", 0.1, load_audio, sound()),
    ("max_audio_channels", 1, load_audio, sound(np.zeros((4000, 2)))),
    ("min_audio_rate", 20_000, load_audio, sound()),
    ("max_audio_rate", 8_000, load_audio, sound()),
    ("allow_paths", False, load_image, "a.png"),
    ("allow_urls", False, load_image, "http://example.org/a.png"),
    ("private_hosts", "10.0.0.1:80", load_image, "http://127.0.0.1:9/a.png"),
]


@pytest.mark.parametrize("name, value, read, source", OVER, ids=[case[0] for case in OVER])
def test_limits_are_named_and_can_be_set(name, value, read, source):
    limits = with_limits(MediaLimits(allow_urls=name == "private_hosts"), [f"{name}={value}"])
    with pytest.raises(OmniInputError, match=f"MediaLimits.*{name}|{name}"):
        read(source, limits=limits)


def test_limits_of_a_conversation(processor):
    parts = [{"type": "image", "bytes": BIG}] * 3 + [{"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}]
    for name, value in (("max_decoded_bytes", 15_000), ("total_timeout", 0), ("max_text_chars", 20)):
        with pytest.raises(OmniInputError, match=f"MediaLimits.{name}"):
            processor.count_tokens(messages, media_limits=with_limits(MediaLimits(), [f"{name}={value}"]))
    assert processor.count_tokens(messages, media_limits=MediaLimits())["image"] == 36
    with pytest.raises(OmniInputError, match="max_text_chars"):
        processor(text="abc " * 10, media_limits=MediaLimits(max_text_chars=30))


def test_limits_of_the_environment_and_what_cannot_be_one(processor, monkeypatch):
    monkeypatch.setenv(VARIABLE, "max_image_pixels=1e3 timeout=7.5")
    assert (default_limits().max_image_pixels, default_limits().timeout) == (1000, 7.5)
    assert ServerLimits().media.max_image_pixels == 1000 and ServerLimits().media.allow_paths is False
    with pytest.raises(OmniInputError, match="max_image_pixels"):
        load_image(BIG)
    with pytest.raises(OmniInputError, match="max_image_pixels"):
        processor.count_tokens([{"role": "user", "content": [{"type": "image", "bytes": BIG}]}])
    for text in (
        "max_pixels=3",
        "timeout",
        "timeout=x",
        "timeout=-1",
        "timeout=nan",
        "max_bytes=1.5",
        "allow_urls=maybe",
    ):
        with pytest.raises(OmniInputError, match="limit"):
            with_limits(MediaLimits(), [text])
    monkeypatch.setenv(VARIABLE, "nonsense=1")
    with pytest.raises(OmniInputError, match="known: max_bytes"):
        load_image(BIG)


def test_limits_of_the_command_line(tmp_path, capsys):
    import infer

    (tmp_path / "a.png").write_bytes(BIG)
    asked = ["ask", "--image", str(tmp_path / "a.png"), "--limit", "max_image_side=50", "what?"]
    assert infer.main(asked) == 2 and "max_image_side" in capsys.readouterr().err
    assert infer.main(["ask", "--limit", "nothing=1", "--image", "x", "what?"]) == 2
    assert "known: max_bytes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ prompts, rows


def test_malformed_conversations(processor):
    for messages in hostile_messages():
        if len(str(messages)[:2000]) >= 2000:
            continue
        try:
            ids = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)["input_ids"][0]
        except OmniInputError:
            continue
        opened = ids.count(processor.codec.special_ids["<|im_start|>"])
        assert opened == len(messages) + 1 + (messages[0]["role"] != "system"), messages


def test_megabytes_of_text_are_read_or_refused_in_time(processor):
    longest = [text for text in TEXTS if len(text) > 10_000]
    assert len(longest) == 3
    for text in longest:
        assert processor.decode(processor.encode(text[:20_000])) == text[:20_000]
    with pytest.raises(OmniInputError, match="characters of text"):
        processor.count_tokens([{"role": "user", "content": "a" * 16_000_001}])


def test_tools_that_are_none_or_too_deep(processor):
    user = [{"role": "user", "content": "a"}]
    for tools in (7, "f", {"a": 1}, [7], [{}], [{"function": "f"}], [{"function": {"name": 7}}], [{"function": None}]):
        with pytest.raises(OmniInputError):
            processor.apply_chat_template(user, tools=tools, tokenize=True)
    deep = [{"type": "function", "function": {"name": "f", "parameters": nested(900)}}]
    with pytest.raises(OmniInputError, match="64 levels"):
        processor.apply_chat_template(user, tools=deep, tokenize=True)


@pytest.mark.parametrize(
    "template",
    ["{% if %}", "{{ '{0}'.format() }}", "{{ '%(a)s' % {} }}", "{{ 'a'.encode('x') }}", "{{ 'a' * 10**17 }}",
     "{{ 10**5000 }}", "{{ '\ud800' }}", "{{ '\\ud800' }}", "\ufdd0<image>", "{{ cycler().next() }}", "{{ 1 / 0 }}",
     "{% include '/etc/passwd' %}", "{{ messages.__class__.__mro__ }}", "{{ ''|attr('x').y }}",
     "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{% for i in range(10**9) %}{% endfor %}", 7],
)  # fmt: skip
def test_templates_that_fail(processor, template):
    """Of a checkpoint, whose template is compiled and rendered in a sandbox."""
    with pytest.raises(OmniInputError) as error:
        processor.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=True)
    assert len(str(error.value)) < 400


def test_errors_are_short(processor):
    call = {"function": {"name": "f" * 10_000, "arguments": "x"}}
    for message in (
        {"role": "x" * 10_000, "content": "a"},
        {"role": "user", "content": [{"type": "x" * 10_000}]},
        {"role": "assistant", "tool_calls": [call]},
    ):
        with pytest.raises(OmniInputError) as error:
            processor.count_tokens([message, {"role": "user", "content": "a"}])
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("kind", MEDIA)
def test_parts_whose_options_lie(processor, kind):
    good = {"image": picture(), "audio": sound(), "video": CLIP}[kind]
    refused = 0
    for part in hostile_parts(kind):
        has_source = any(part.get(key) for key in ("path", kind, "bytes", "url", "data") if key != "audio")
        part = part if has_source else {"bytes": good} | part
        try:
            processor.count_tokens([{"role": "user", "content": [part]}])
        except OmniInputError:
            refused += 1
    assert refused > 60


def test_rows_that_lie_about_their_media(processor, tmp_path):
    (tmp_path / "whole.png").write_bytes(picture())
    (tmp_path / "sound.wav").write_bytes(sound())
    rows = lying_rows()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source({"path": str(tmp_path / "rows.jsonl")})
    for number in range(len(rows)):
        with pytest.raises(OmniInputError):
            encode_row(source[number], processor, row_tokens=500)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_broken_checkpoints(name, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(resolve_checkpoint("nano"), folder, ignore=shutil.ignore_patterns("examples", "*.png"))
    CHECKPOINTS[name](folder)
    before = peak()
    with pytest.raises(OmniInputError, match="copy.*(cannot be loaded|config.json)"):
        load(str(folder))
    assert peak() - before < 400 * 1024**2


def test_nobody_is_asked_to_run_code_of_a_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(resolve_checkpoint("nano"), folder, ignore=shutil.ignore_patterns("examples", "*.png"))
    code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | code))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Evil: pass\n")
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr("sys.stdin", answers)
    with pytest.raises(OmniInputError, match="copy: cannot be loaded"):
        load(str(folder))
    assert answers.tell() == 0 and not (tmp_path / "owned").exists()


@pytest.mark.parametrize("part", [None, "llm_config", "vision_config"])
def test_attention_of_a_checkpoint_is_no_code_of_others(part, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(resolve_checkpoint("nano"), folder, ignore=shutil.ignore_patterns("examples", "*.png"))
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config)["_attn_implementation"] = "evil/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OmniInputError, match="_attn_implementation 'evil/kernel' names code of others"):
        load(str(folder))


# ------------------------------------------------------------------------------------------------------ properties

media_strategy = st.one_of(
    st.builds(lambda w, h: {"type": "image", "bytes": png(w, h, bytes(((w + 7) // 8 + 1) * h))},
              st.integers(1, 1500), st.integers(1, 1500)),
    st.builds(lambda n, rate: {"type": "audio", "bytes": sound(np.zeros(n), rate)},
              st.integers(1, 60_000), st.sampled_from([1000, 7999, 16_000, 44_100, 384_000])),
    st.builds(lambda n, w, h: {"type": "video", "bytes": mp4([picture(w, h, "JPEG")] * n)},
              st.integers(0, 9), st.integers(1, 90), st.integers(1, 90)),
    st.builds(lambda hours: {"type": "video", "bytes": matroska(hours)}, st.sampled_from([0.0, 0.01])),
)  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(media_strategy, max_size=3), min_size=1, max_size=2),
    st.sampled_from([None, 12, 60, 700]),
    st.sampled_from([0.0, 0.5, 0.9]),
)
def test_placeholders_equal_features_of_any_file(conversations, budget, rate):
    batch = [[{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}] for parts in conversations]
    processor = OmniProcessor.from_pretrained("nano") if not PROCESSORS else PROCESSORS[0]
    PROCESSORS[:] = [processor]
    try:
        inputs = processor.apply_chat_template(
            batch, tokenize=True, return_tensors="pt", max_media_tokens=budget, video_pruning_rate=rate
        )
    except OmniInputError:
        return  # too short a sound, no frames, or a budget that nothing fits
    if "mm_token_type_ids" in inputs:
        check_inputs(processor, inputs)
    if budget is not None and "mm_token_type_ids" in inputs:
        assert (inputs["mm_token_type_ids"] > 0).sum(-1).max() <= budget


PROCESSORS: list = []


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30)), min_size=1, max_size=25),
    st.integers(20, 80),
    st.one_of(st.none(), st.integers(10, 60)),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_packing_conserves_tokens(sizes, row_tokens, media_tokens, num_rows):
    """Every sample stands once, whole and in order, in one row, or is left; nothing else is in the rows."""
    rows, left = pack_rows(sizes, row_tokens, num_rows, media_tokens)
    assert sorted([item for row in rows for item in row] + left) == list(range(len(sizes)))
    if num_rows is not None:
        assert len(rows) <= num_rows
        for row in rows:
            assert sum(sizes[item][0] for item in row) <= row_tokens
            assert media_tokens is None or sum(sizes[item][1] for item in row) <= media_tokens
    else:
        assert not left
    start, samples = 1, []
    for tokens, media in sizes:
        ids = torch.arange(start, start + tokens)[None]
        start += tokens
        sample = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        samples.append(sample | ({"pixel_values": ids.float().T[:media]} if media else {}))
    if not rows:
        return
    batch = collate_rows([[samples[item] for item in row] for row in rows])
    packed = batch["input_ids"][batch["attention_mask"].bool()]
    kept = [samples[item] for row in rows for item in row]
    assert torch.equal(packed, torch.cat([sample["input_ids"][0] for sample in kept]))
    assert (batch["seq_idx"] >= 0).eq(batch["attention_mask"].bool()).all()
    assert int((batch["labels"] != -100).sum()) == len(packed) - len(kept)  # the first token follows nothing
    pixels = [sample["pixel_values"] for sample in kept if "pixel_values" in sample]
    assert ("pixel_values" in batch) == bool(pixels)
    if pixels:
        assert torch.equal(batch["pixel_values"], torch.cat(pixels))


# ------------------------------------------------------------------------------------------------------ fuzzing


STRETCH = ("media", "prompt", "batch", "demo", "training")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return FuzzWorld(tmp_path_factory.mktemp("fuzz"), STRETCH)


@pytest.mark.filterwarnings("ignore")
def test_a_stretch_of_fuzzing_finds_nothing(world):
    paths = STRETCH
    found = [(number, run_case(world, 1, number, paths)) for number in range(60)]
    assert [case for case in found if case[1][2] is not None] == []
    assert {outcome for _, (_, outcome, _) in found} == {"read", "refused"}
    assert [draw(1, 7, paths)[1] for _ in range(3)] == [draw(1, 7, paths)[1]] * 3 and set(PATHS) > set(paths)


def test_fuzzing_sees_what_it_looks_for(world, processor, monkeypatch):
    """A placeholder taken out, a case that raises, are findings."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "bytes": BIG}]}], tokenize=True, return_tensors="pt"
    )
    check_inputs(processor, inputs)
    place = int((inputs["mm_token_type_ids"] == 1).nonzero()[0, 1])
    inputs["mm_token_type_ids"][0, place] = 0
    with pytest.raises(Exception, match="placeholders"):
        check_inputs(processor, inputs)
    monkeypatch.setattr(world, "processor", None)
    assert "AttributeError" in run_case(world, 1, 0, ("media",))[2]
