"""JSONL in, JSONL out, on the shipped nano: mixed media, errors, kills and restarts; and the batches under it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import infer
from modeling_omni import OmniInputError
from modeling_omni.batch_inference import Prepared, Results, batches_of, run_batch
from modeling_omni.generation_rows import Row, RowSampler, collate_prompts, generate_rows, row_settings, row_text
from modeling_omni.inference import AnswerSplitter, encode, load, open_media, stream_answer, user_message

ROOT = Path(__file__).parent.parent
MEDIA = ROOT / "modeling_omni/nano/examples"
SUM = "What is 3 + 4 + 2? Think step by step."


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def answer_of(nano, question: str, *media: tuple[str, str]) -> str:
    parts = [open_media(kind, MEDIA / name) for kind, name in media]
    return list(stream_answer(*nano, encode(*nano, [user_message(question, parts)])))[-1][1]["answer"]


# ------------------------------------------------------------------------------------------------------ the tool


def test_mixed_rows_give_one_line_each(nano, tmp_path, capfd, monkeypatch):
    """Answers are those of single questions; whatever is wrong with a row stays with that row."""
    import modeling_omni.inference as inference

    for name in ("shapes.png", "digits.wav"):
        os.symlink(MEDIA / name, tmp_path / name)  # relative paths start at the file's folder
    where, digits, moves = "Where is the red circle?", "Which digits are spoken?", "What moves where?"
    video = {"type": "video", "path": str(MEDIA / "motion.mp4")}
    rows = [
        {"id": "picture", "prompt": where, "image": "shapes.png", "meta": {"gold": 7}},
        {"prompt": digits, "audio": ["digits.wav"]},
        {"id": "clip", "messages": [{"role": "user", "content": [video, {"type": "text", "text": moves}]}]},
        {"id": 77, "prompt": "Copy: banana split"},
        "{torn",
        {"id": "missing", "prompt": "What?", "image": "nowhere.png"},
        {"id": "typo", "prompt": "What?", "imge": "shapes.png"},
        {"id": "answered", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "[" * 100_000,
        {"id": "surrogate", "prompt": "\udcff"},
        {"id": 1.5, "prompt": "Copy: banana split"},
    ]  # fmt: skip
    source, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    monkeypatch.setattr(inference, "load", lambda *options: nano)
    assert infer.main(["batch", "--in", source, "--out", str(out)]) == 1
    summary = json.loads(capfd.readouterr().out)
    assert (summary["rows"], summary["answered"], summary["errors"], summary["batches"]) == (11, 4, 7, 1)
    found = {record["id"]: record for record in read_lines(out)}
    assert list(sorted(map(str, found))) == sorted(
        ["picture", "1", "clip", "77", "4", "missing", "typo", "answered", "8", "surrogate", "10"]
    )
    assert found["picture"]["answer"] == answer_of(nano, where, ("image", "shapes.png"))
    assert found["picture"]["meta"] == {"gold": 7} and found["picture"]["finish_reason"] == "stop"
    assert found[1]["answer"] == answer_of(nano, digits, ("audio", "digits.wav"))
    assert found["clip"]["answer"] == answer_of(nano, moves, ("video", "motion.mp4"))
    assert found[77]["answer"] == answer_of(nano, "Copy: banana split")
    assert found["clip"]["tokens"]["video"] > 0 and found[1]["tokens"]["audio"] > 0
    assert sum(sum(found[key]["tokens"].values()) for key in ("picture", 1, "clip", 77)) == summary["prompt_tokens"]
    wrong = {4: "not JSON", "missing": "nowhere.png", "typo": "unknown keys 'imge'", "answered": "the assistant's"}
    for key, text in (wrong | {8: "nested too deeply", "surrogate": "lone surrogate", 10: "'id' must be"}).items():
        assert found[key]["error"]["type"] == "input" and text in found[key]["error"]["message"], key
    assert infer.main(["batch", "--in", source, "--out", str(out)]) == 0  # nothing is left to do
    summary = json.loads(capfd.readouterr().out)
    assert (summary["done_before"], summary["batches"]) == (11, 0) and len(read_lines(out)) == 11


def test_goes_on_behind_a_torn_line(nano, tmp_path):
    rows = [{"id": i, "prompt": f"Copy: word {i}"} for i in range(5)]
    source, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    run_batch(*nano, source, str(out), batch_size=2)
    lines = out.read_bytes().splitlines(keepends=True)
    for torn in (lines[2][:-1], lines[2][: len(lines[2]) // 2], b'{"id": 3', b"\x00"):
        kept = b"".join(lines[:2])
        out.write_bytes(kept + torn)
        summary = run_batch(*nano, source, str(out))
        assert (summary["done_before"], summary["answered"]) == (2, 3)
        assert out.read_bytes().startswith(kept)
        assert sorted(record["id"] for record in read_lines(out)) == [0, 1, 2, 3, 4]


def test_a_kill_loses_nothing_that_was_answered(nano, tmp_path):
    rows = [{"id": f"r{i}", "prompt": f"Copy: word {i}"} for i in range(40)]
    source, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    command = [sys.executable, str(ROOT / "infer.py"), "batch", "--in", source, "--out", str(out), "--batch-size", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not out.exists() or out.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = out.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    assert whole.count(b"\n") < 40
    summary = run_batch(*nano, source, str(out))
    assert summary["done_before"] == whole.count(b"\n") and summary["errors"] == 0
    assert out.read_bytes().startswith(whole)
    assert sorted(record["id"] for record in read_lines(out)) == sorted(row["id"] for row in rows)


def test_sampled_answers_depend_on_neither_batch_nor_restart(nano, tmp_path):
    rows = [{"prompt": f"Copy: word {i}" * (1 + i % 3)} for i in range(6)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    options = {"temperature": 5.0, "top_p": 0.9, "seed": 3, "max_new_tokens": 6}
    answers = []
    for name, size in (("a", 6), ("b", 2), ("c", 6)):
        out = tmp_path / name
        if name == "c":  # half of the rows from a
            out.write_bytes(b"".join((tmp_path / "a").read_bytes().splitlines(keepends=True)[:3]))
        run_batch(*nano, source, str(out), batch_size=size, **options)
        answers.append({record["id"]: record["answer"] for record in read_lines(out)})
    assert answers[0] == answers[1] == answers[2] and len(set(answers[0].values())) > 4
    run_batch(*nano, source, str(tmp_path / "d"), **(options | {"seed": 4}))
    assert {record["id"]: record["answer"] for record in read_lines(tmp_path / "d")} != answers[0]


def test_batches_that_fail_are_halved(nano, tmp_path, monkeypatch):
    """Three rows at once are too many for this machine, and one row is too long at any rate."""
    model, processor = nano
    rows = [{"id": i, "prompt": f"Copy: word {i}"} for i in range(6)] + [{"id": "long", "prompt": "word " * 60}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    generate = type(model).generate

    def small(self, input_ids, **options):
        if len(input_ids) > 2 or input_ids.shape[1] > 60:
            raise torch.OutOfMemoryError("too much")
        return generate(self, input_ids, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "generate", small)
        summary = run_batch(*nano, source, str(tmp_path / "small"))
    assert (summary["answered"], summary["errors"]) == (6, 1)
    records = {record["id"]: record for record in read_lines(tmp_path / "small")}
    assert records["long"]["error"] == {"type": "OutOfMemoryError", "message": "too much"}
    summary = run_batch(*nano, source, str(tmp_path / "small"), retry_errors=True)
    assert (summary["done_before"], summary["answered"], summary["errors"]) == (6, 1, 0)
    run_batch(*nano, source, str(tmp_path / "large"))
    key = lambda record: str(record["id"])  # noqa: E731
    assert sorted(read_lines(tmp_path / "small"), key=key) == sorted(read_lines(tmp_path / "large"), key=key)


def test_files_that_would_be_ambiguous_are_refused(nano, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"id": 0, "prompt": "b"}])
    with pytest.raises(OmniInputError, match="rows 0 and 1 .* same id 0"):
        run_batch(*nano, source, str(tmp_path / "out"))
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(OmniInputError, match="same file"):
        run_batch(*nano, source, source)
    other = write_rows(tmp_path / "other.jsonl", [{"text": "not ours"}])
    with pytest.raises(OmniInputError, match="line 1 is no result"):
        run_batch(*nano, source, other)
    assert read_lines(other) == [{"text": "not ours"}]
    with pytest.raises(OmniInputError, match="cannot be read"):
        run_batch(*nano, str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(OmniInputError, match="cannot be written"):
        run_batch(*nano, source, str(tmp_path / "none" / "out"))
    os.mkfifo(tmp_path / "pipe")  # would wait for ever
    for files in (("/dev/zero", str(tmp_path / "out")), (source, str(tmp_path / "pipe"))):
        with pytest.raises(OmniInputError, match="is not a regular file"):
            run_batch(*nano, *files)
    held = Results(str(tmp_path / "held"))
    with pytest.raises(OmniInputError, match="another process"):
        Results(str(tmp_path / "held"))
    held.close()
    Results(str(tmp_path / "held")).close()


def test_batches_keep_to_their_budget():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (200,), generator=generator).tolist() + [5000]
    rows = [
        Prepared(str(i), {}, Row({"input_ids": torch.zeros(1, n, dtype=torch.long)}, 50)) for i, n in enumerate(lengths)
    ]
    batches = list(batches_of(rows, 2000, 16))
    assert sorted(item.key for batch in batches for item in batch) == sorted(item.key for item in rows)
    for batch in batches:
        longest = max(item.row.prompt_tokens for item in batch)
        assert len(batch) == 1 or len(batch) <= 16 and len(batch) * (longest + 50) <= 2000
    assert len(batches) < 40 and max(map(len, batches)) == 16


# ------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_collated_prompts_are_the_processors_batch(nano, rate):
    model, processor = nano
    clip, sound = open_media("video", MEDIA / "motion_sound.mp4"), open_media("audio", MEDIA / "digits.wav")
    picture, silent = open_media("image", MEDIA / "shapes.png"), open_media("video", MEDIA / "motion.mp4")
    conversations = [
        [user_message("What moves and what is said?", [clip])],
        [user_message("hello")],
        [user_message("Which digits?", [sound, picture])],
        [user_message("What moves where, and what else is there to be seen?", [silent, picture])],
    ]
    singles = [encode(model, processor, one, video_pruning_rate=rate) for one in conversations]
    together = processor.apply_chat_template(
        conversations, add_generation_prompt=True, enable_thinking=False, tokenize=True, return_tensors="pt",
        video_pruning_rate=rate,
    )  # fmt: skip
    batch = collate_prompts(singles, processor.tokenizer.pad_token_id)
    assert set(batch) == set(together) and ("video_keep_tokens" in batch) == (rate > 0)
    for name in together:
        assert batch[name].dtype == together[name].dtype, name
        if name == "input_features":  # summed over other paddings
            torch.testing.assert_close(batch[name], together[name], atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(batch[name], together[name]), name
    if rate:
        plain = encode(model, processor, conversations[0])
        with pytest.raises(ValueError, match="EVS"):
            collate_prompts([plain, singles[3]])


def test_rows_of_a_batch_have_their_own_settings(nano):
    """Greedy, sampled, with a thought, short, stopped and with a budget, all in one batch: as each of them alone."""
    model, processor = nano

    def rows():
        heard = []
        made = []
        for question, thinking, settings in (
            ("Copy: banana split", False, {"max_new_tokens": 30}),
            ("Copy: banana split", False, {"max_new_tokens": 12, "temperature": 4.0, "seed": 5}),
            (SUM, True, {"max_new_tokens": 64}),
            (SUM, True, {"max_new_tokens": 64, "reasoning_budget": 3, "reasoning_grace": 1}),
            ("Copy: banana split", False, {"max_new_tokens": 2}),
            (SUM, True, {"max_new_tokens": 64}),
        ):
            settings = row_settings(model, **settings)[0]
            made.append(Row(encode(model, processor, [user_message(question)], thinking), **settings))
        made[0].on_token = heard.append
        made[-1].stopped = lambda: len(made[-1].tokens) == 4
        return made, heard

    batch, heard = rows()
    generate_rows(model, processor, batch)
    alone, _ = rows()
    for row in alone:
        generate_rows(model, processor, [row])
    assert [row.tokens for row in batch] == [row.tokens for row in alone]
    assert [row.finish_reason for row in batch][:1] == ["stop"] and heard == batch[0].tokens
    assert [row.finish_reason for row in batch][4:] == ["length", "interrupted"]
    assert [len(row.tokens) for row in batch][4:] == [2, 4] and batch[1].tokens != batch[0].tokens
    assert [row.thought_cut for row in batch] == [False, False, False, True, False, False]
    texts = [row_text(processor, row) for row in batch]
    assert texts[2]["reasoning"].startswith(texts[3]["reasoning"]) and texts[3]["reasoning"] != texts[2]["reasoning"]
    assert texts[0] == {"reasoning": "", "answer": answer_of(nano, "Copy: banana split")}


def test_settings_come_from_the_checkpoint(nano, monkeypatch):
    """As the released generation_config.json has them: sampling, and a budget with its grace period."""
    model, processor = nano
    assert row_settings(model, 9)[0] == {"max_new_tokens": 9, "seed": None, "budget": None, "grace": 1024}
    released = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "reasoning_budget": 16384, "reasoning_grace": 512}
    for name, value in released.items():
        monkeypatch.setattr(model.generation_config, name, value, raising=False)
    settings, note = row_settings(model, 16384, seed=1)
    assert (settings["temperature"], settings["top_p"], settings["seed"]) == (0.6, 0.95, 1)
    assert (settings["budget"], settings["grace"]) == (13824, 512) and "lowered to 13824" in note
    assert "temperature" not in row_settings(model, 9, temperature=0)[0]
    assert row_settings(model, 9, temperature=2.0, top_p=0.5)[0]["temperature"] == 2.0
    rows = [
        Row(encode(model, processor, [user_message(SUM)], True), **row_settings(model, 64, seed=i)[0]) for i in range(3)
    ]
    generate_rows(model, processor, rows)
    assert all(row.finish_reason for row in rows) and all(row.tokens for row in rows)


def test_rows_are_sampled_as_transformers_does():
    """Frequencies of 4,000 seeds against the probabilities that transformers' warpers leave."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    for temperature, top_p, top_k in ((0.7, 0.8, None), (1.5, None, 4), (1.0, 0.95, 6), (2.0, None, None)):
        row = {"inputs": {}, "max_new_tokens": 1, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        sampler = RowSampler([Row(**row, seed=i) for i in range(4000)] + [Row({}, 1)], torch.device("cpu"))
        scores = sampler(None, logits.repeat(4001, 1))
        assert torch.equal(scores[-1], logits) and bool(((scores[:-1] == 0).sum(1) == 1).all())
        expected = TemperatureLogitsWarper(temperature)(None, logits[None])
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p:
            expected = TopPLogitsWarper(top_p)(None, expected)
        probabilities = expected.softmax(-1)[0]
        frequencies = torch.bincount(scores[:-1].argmax(1), minlength=12) / 4000
        assert bool((frequencies[probabilities == 0] == 0).all())
        spread = (probabilities * (1 - probabilities) / 4000).sqrt()
        assert bool(((frequencies - probabilities).abs() <= 4.5 * spread).all())


def test_tool_calls_are_a_section_of_their_own(nano):
    processor = nano[1]
    text = "\nI look. <tool_call>\n<function=f>\n</function>\n</tool_call>\n<tool_call>x</tool_call><|im_end|>"
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids

    def split(ids, **options):
        splitter = AnswerSplitter(processor, False, **options)
        pieces = [piece for token in ids for piece in splitter.push(token)] + splitter.finish()
        return [s for s, _ in pieces if s == "tool_call"], "".join(t for s, t in pieces if s == "answer"), pieces

    calls, answer, pieces = split(ids, tool_calls=True)
    assert answer == "I look." and pieces[-2:] == [("tool_call", "\n<function=f>\n</function>\n"), ("tool_call", "x")]
    assert split(ids)[1] == text.strip().removesuffix("<|im_end|>") and not split(ids)[0]
    cut = ids[: ids.index(processor.codec.special_ids["</tool_call>"])]
    assert split(cut, tool_calls=True)[1] == "I look. <tool_call>\n<function=f>\n</function>"
    typed = processor.encode("<tool_call>x</tool_call>")  # text that spells the mark
    assert split(typed, tool_calls=True)[:2] == ([], "<tool_call>x</tool_call>")
