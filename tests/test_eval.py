"""Benchmarks from files and the paper's tables, on the shipped nano."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import infer
from modeling_omni import OmniInputError
from modeling_omni.evaluation_files import (
    checkpoint_fingerprint,
    graded_by,
    named_files,
    provenance,
    results_markdown,
    spread_out,
    summary_rows,
)
from modeling_omni.evaluation_tables import first_token, merged, nano_files, synthetic_clip, without_tubelets
from modeling_omni.inference import encode, load, user_message
from modeling_omni.media import VideoClip
from modeling_omni.metrics import wilson_interval
from modeling_omni.nano_data import make_sample

ROOT = Path(__file__).parent.parent
MEDIA = ROOT / "modeling_omni/nano/examples"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture
def run(nano, capfd, monkeypatch):
    """run(*arguments) -> (exit code, stdout, stderr, times that the model was loaded) of `infer.py eval`."""
    import modeling_omni.inference as inference

    loads = []
    monkeypatch.setattr(inference, "load", lambda *options: loads.append(options) or nano)

    def main(*arguments):
        loads.clear()
        code = infer.main(["eval", *map(str, arguments)])
        return code, *capfd.readouterr(), len(loads)

    return main


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def copied(word: str, **more) -> dict:
    return {"prompt": f"Copy: {word}", "answer": word, "verifier": "string_match"} | more


# ------------------------------------------------------------------------------------------------------ files


def test_rows_of_every_kind_are_answered_and_scored(run, tmp_path):
    for name in ("shapes.png", "digits.wav"):
        os.symlink(MEDIA / name, tmp_path / name)
    where = [{"role": "user", "content": [{"type": "image", "path": "shapes.png"},
                                          {"type": "text", "text": "Where is the red circle?"}]}]  # fmt: skip
    rows = [
        copied("abc", id="copy", source="text"),
        {"id": "place", "prompt": where, "answer": "top right", "verifier": "string-match", "source": "picture"},
        {"id": "wrong", "prompt": where, "answer": "bottom left", "metric": "exact_match"},
        {"id": "sft", "messages": [*where, {"role": "assistant", "content": "top right"}], "source": "picture"},
        {"id": "heard", "prompt": "Which digits are spoken?", "audio": "digits.wav", "answer": "none", "metric": "wer"},
        {"id": "told", "prompt": "Copy: abc", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"id": "gold", "prompt": "Copy: a", "answer": "many", "verifier": "numeric"},
        {"id": "lost", "prompt": "What?", "image": "nowhere.png", "answer": "a", "verifier": "string_match"},
        {"id": "typo", "prompt": "Copy: a", "answer": "a", "verifier": "string_mtach"},
        "{torn",
        {"id": "list", "messages": ["Copy: a"], "verifier": "numeric"},
        {"id": "args", "prompt": "Copy: a", "answer": "a", "verifier": "anls", "args": 3},
    ]  # fmt: skip
    file, out = write_rows(tmp_path / "mixed.jsonl", rows), tmp_path / "out"
    code, shown, err, _ = run("--data", file, "--metric", "anls", "--out", out)
    assert code == 0
    found = {line["id"]: line for line in read_lines(out / "mixed.predictions.jsonl")}
    assert len(found) == 12 and sum("error" in line for line in found.values()) == 6
    assert found["copy"]["answer"] == "abc" and found["copy"]["prompt"].endswith("<think></think>")
    assert "Copy: abc" in found["copy"]["prompt"] and found["copy"]["media"] == {}
    tokens = found["place"]["tokens"]["image"]
    assert f"<img><image {tokens}></img>Where is" in found["place"]["prompt"] and tokens > 0
    _, h, w = found["place"]["media"]["image_grid_thw"][0]
    assert h * w == 4 * tokens
    scores = {line["id"]: line for line in read_lines(out / "mixed.scores.jsonl")}
    assert list(scores) == ["copy", "place", "wrong", "sft", "heard", "told", "gold", "lost", "typo", 9, "list", "args"]
    right = {name for name, line in scores.items() if line["score"] == 1}
    assert right == {"copy", "place", "sft", "told"} and scores["wrong"]["gold"] == "bottom left"
    assert scores["heard"]["words"] == 1 and scores["heard"]["word_errors"] >= 1
    saved = json.loads((out / "results.json").read_text())
    lines = {(row["verifier"], row["source"]): row for row in saved["table"]}
    both = lines[("string_match", "all")]  # copy, place, and the row whose picture is lost
    assert (both["rows"], both["errors"], both["score"]) == (3, 1, pytest.approx(2 / 3))
    assert (both["low"], both["high"]) == pytest.approx(wilson_interval(2, 3)) and both["interval"] == "wilson"
    assert lines[("string_match", "picture")]["score"] == 1.0 and lines[("exact_match", "")]["score"] == 0.0
    assert lines[("asr_wer", "")]["wer"] >= 1.0 and lines[("anls", "picture")]["score"] == 1.0
    start = saved["settings"]["mixed"]["starts"][0]
    assert start["versions"]["torch"] == torch.__version__ and start["decoding"] == "greedy" and not start["thinking"]
    assert start["max_new_tokens"] == 256 and saved["date"].endswith("+00:00")
    assert "string_match): 1 of 3 rows had errors, counted as wrong" in err
    assert shown.strip() == (out / "results.md").read_text().strip() and "| WER of the corpus |" in shown
    # the same again needs no model; rows with errors may be left out afterwards
    code, shown, _, loads = run("--data", file, "--metric", "anls", "--out", out, "--errors", "leave out")
    assert (code, loads) == (0, 0)
    lines = {(r["verifier"], r["source"]): r for r in json.loads((out / "results.json").read_text())["table"]}
    assert lines[("string_match", "all")]["score"] == 1.0 and lines[("string_match", "all")]["counted"] == 2


def test_goes_on_after_a_kill_and_refuses_other_settings(run, tmp_path):
    rows = [copied(word) for word in ("abc", "xk", "qg", "ts", "red")]
    file, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    assert run("--data", f"mine={file}", "--out", out, "--samples", 3)[0] == 0
    first = (out / "mine.predictions.jsonl").read_bytes()
    assert [line["id"] for line in read_lines(out / "mine.scores.jsonl")] == [0, 1, 3]  # spread over the file
    lines = first.splitlines(keepends=True)
    (out / "mine.predictions.jsonl").write_bytes(lines[0] + lines[1][:20])  # as a kill leaves it
    assert run("--data", f"mine={file}", "--out", out, "--samples", 1)[::3] == (0, 0)  # its row is whole
    code, shown, _, loads = run("--data", f"mine={file}", "--out", out)
    assert (code, loads) == (0, 1) and "| mine |  | string_match | 100.0 | 56.6 to 100.0 | 5 | 0 |" in shown
    assert (out / "mine.predictions.jsonl").read_bytes().startswith(lines[0])
    assert len(read_lines(out / "mine.predictions.jsonl")) == 5 and len(read_lines(out / "mine.starts.jsonl")) == 2
    for more in (["--think"], ["--temperature", "0.5"], ["--max-media-tokens", "100"], ["--seed", "1"]):
        code, _, err, loads = run("--data", f"mine={file}", "--out", out, *more)
        assert (code, loads) == (2, 0) and "begun with other settings" in err
    write_rows(file, rows[:4])
    code, _, err, _ = run("--data", f"mine={file}", "--out", out)
    assert code == 2 and "data:" in err


def test_several_runs_are_averaged(run, tmp_path):
    file, out = write_rows(tmp_path / "r.jsonl", [copied("abc"), copied("red")]), tmp_path / "out"
    assert run("--data", file, "--out", out, "--runs", 3, "--temperature", 3, "--max-new-tokens", 8)[0] == 0
    runs = [read_lines(out / f"r.run{number}.scores.jsonl") for number in range(3)]
    table = json.loads((out / "results.json").read_text())["table"]
    assert table[0]["score"] == pytest.approx(sum(line["score"] for run in runs for line in run) / 6)
    assert len({json.dumps([line["graded"] for line in run]) for run in runs}) > 1  # each with a seed of its own


def test_prompts_are_lowered_to_their_limit(run, tmp_path):
    clip = {"prompt": "What moves where?", "video": str(MEDIA / "motion.mp4"), "answer": "a", "verifier": "anls"}
    file, out = write_rows(tmp_path / "clip.jsonl", [clip]), tmp_path / "out"
    assert run("--data", file, "--out", out, "--max-prompt-tokens", 60, "--max-new-tokens", 1)[0] == 0
    (line,) = read_lines(out / "clip.predictions.jsonl")
    assert sum(line["tokens"].values()) <= 60 and line["degraded"][0].startswith("video motion.mp4: ")


def test_what_is_refused(run, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [copied("a")])
    wrong = [
        (["--data", file], "need --out"),
        (["--data", file, f"a={file}", "--out", tmp_path / "o"], "two files"),
        (["--data", f"a/b={file}", "--out", tmp_path / "o"], "no file name"),
        (["--data", tmp_path / "none.jsonl", "--out", tmp_path / "o"], "no such file"),
        (["--data", file, "--skills", "text_copy", "--out", tmp_path / "o"], "alone"),
        (["--temperature", "1"], "--temperature is for other"),
        (["--suite", "quantization", "--think", "--out", tmp_path / "o"], "not for --suite quantization"),
        (["--max-prompt-tokens", "9"], "--max-prompt-tokens is for other"),
        (["--suite", "tables", "--model", "other", "--out", tmp_path / "o"], "need benchmarks"),
        (["--suite", "tables", "--think", "--out", tmp_path / "o"], "itself"),
    ]
    for arguments, text in wrong:
        code, _, err, loads = run(*arguments)
        assert (code, loads) == (2, 0) and text in err, arguments


def test_sums():
    """Two sources and two runs, worked out by hand."""

    def one(source, score, **more):
        more = {"finish_reason": "stop", "prompt_tokens": 10, "generated_tokens": 2} | more
        return {"verifier": "asr_wer", "source": source, "score": score, "word_errors": 2, "words": 4} | more

    failed = {"verifier": "asr_wer", "source": "b", "score": 0.0, "error": "x", "word_errors": 6, "words": 6}
    runs = [[one("a", 0.5), one("a", 1.0, word_errors=0), failed]]
    runs.append([one("a", 0.0, finish_reason="length"), one("a", 1.0, word_errors=0), failed])
    table = {row["source"]: row for row in summary_rows("d", runs)}
    assert table["a"]["score"] == pytest.approx((0.25 + 1.0) / 2) and table["a"]["cut_off"] == 0.25
    assert table["a"]["wer"] == pytest.approx(4 / 16) and table["a"]["interval"] == "bootstrap"
    assert table["all"]["score"] == pytest.approx((0.25 + 1.0 + 0.0) / 3) and table["all"]["errors"] == 1
    assert table["all"]["wer"] == pytest.approx((4 + 12) / (16 + 12))
    table = {row["source"]: row for row in summary_rows("d", runs, "leave out")}
    assert table["b"]["score"] is None and table["all"]["wer"] == pytest.approx(4 / 16)
    assert "| d | b | asr_wer | | | 1 | 1 | | |" in results_markdown(list(table.values()))
    assert merged(summary_rows("d", runs))["score"] == pytest.approx(1.25 / 3)
    rows = [one("a", 0.5, word_errors=errors) for errors in range(5)]
    once, often = (summary_rows("d", [rows] * count)[0] for count in (1, 4))
    assert {key: often[key] for key in ("wer", "wer_low", "wer_high")}.items() <= once.items()  # no more is known


def test_golds_of_rows():
    args = {"size": [100, 100]}
    row = {"prompt": "?", "answer": [1, 2, 3, 4], "verifier": "iou", "args": json.dumps(args)}
    assert graded_by(row) == {"verifier": "iou", "gold": [1, 2, 3, 4], "args": args, "source": ""}
    for row in ({"prompt": "?"}, {"answer": "a"}, {"answer": "a", "verifier": "format"},
                {"answer": "a", "verifier": "anls", "args": {"nothing": 1}}, "text"):  # fmt: skip
        with pytest.raises(OmniInputError):
            graded_by(row)


def test_small_parts(tmp_path):
    assert spread_out(10, 3) == [0, 3, 6] and spread_out(2, 5) == [0, 1] and spread_out(3, None) == [0, 1, 2]
    (tmp_path / "odd=name.jsonl").write_text("{}")
    assert named_files([str(tmp_path / "odd=name.jsonl"), f"b={tmp_path / 'odd=name.jsonl'}"][1:])["b"]
    for name, data in (("a", b"x" * 200_000), ("b", b"x" * 150_000 + b"y" + b"x" * 49_999)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(data)
    prints = [checkpoint_fingerprint(str(tmp_path / name)) for name in "ab"]
    assert prints[0] != prints[1] and checkpoint_fingerprint("some/hub-id") == "some/hub-id"
    assert {"date", "versions"} <= set(provenance())


# ------------------------------------------------------------------------------------------------------ tables


def test_single_frames_are_pairs_of_one_frame(nano):
    """What the tower gets is a clip in which every frame stands twice; the labels name every frame once."""
    model, processor = nano
    single = without_tubelets(processor)
    clip = synthetic_clip(5, 64, fps=4.0)
    doubled = VideoClip(frames=np.repeat(clip.frames, 2, 0), frame_indices=np.repeat(range(5), 2).tolist(), fps=4.0,
                        duration=clip.duration)  # fmt: skip
    ask = [user_message("What moves?", [{"type": "video", "video": clip, "name": "c"}])]
    ask_doubled = [user_message("What moves?", [{"type": "video", "video": doubled, "name": "c"}])]
    inputs, expected = encode(model, single, ask, False), encode(model, processor, ask_doubled, False)
    assert torch.equal(inputs["pixel_values_videos"], expected["pixel_values_videos"])
    assert torch.equal(inputs["video_grid_thw"], expected["video_grid_thw"])
    text = single.decode(inputs["input_ids"][0])
    assert "Frame 2 sampled at 0.25 seconds: " in text and " and frame" not in text
    assert processor.video_processor.video_temporal_patch_size == 2
    pairs = encode(model, processor, ask, False)
    assert pairs["video_grid_thw"][0, 0] == 3 and inputs["video_grid_thw"][0, 0] == 5
    measured = first_token(model, single, clip, 0.5, 2)
    assert len(measured["seconds"]) == 2 and min(measured["seconds"]) > 0
    assert measured["video_tokens"] == int((inputs["mm_token_type_ids"] == 2).sum() * 0.5)


def test_a_checkpoint_trained_like_nano_has_its_tables(tmp_path):
    from modeling_omni.evaluation_commands import is_nano

    tokenizer = (ROOT / "modeling_omni/nano/tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer)))
    assert is_nano("nano") and is_nano(tmp_path) and not is_nano("other")
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace('"circle"', '"disc"'))
    assert not is_nano(tmp_path)


def test_tables(run, tmp_path):
    """All four on two benchmarks of our own: shared cells are made once, and nothing is done twice."""
    moves = {
        "prompt": "What moves where?",
        "video": str(MEDIA / "motion.mp4"),
        "answer": "x",
        "verifier": "string_match",
    }
    asked, known = make_sample("text_math", 10**6, "heldout")["messages"]
    sums = {"prompt": asked["content"], "answer": known["content"], "verifier": "numeric"}
    files = [f"clips={write_rows(tmp_path / 'a.jsonl', [moves])}", f"sums={write_rows(tmp_path / 'b.jsonl', [sums])}"]
    out = tmp_path / "out"
    arguments = ["--suite", "tables", "--data", *files, "--out", out, "--samples", 2, "--table-frames", 4, 8]
    arguments += ["--ttft-clip", 8, 64, "--ttft-runs", 1, "--budgets", 0, 4, "--max-new-tokens", 64]
    code, shown, err, loads = run(*arguments)
    assert (code, loads) == (0, 1), err
    tables = {table["table"]: table for table in json.loads((out / "results.json").read_text())["table"]}
    assert list(tables) == ["modes", "11", "12", "13"]
    modes = {row["name"]: row["cells"] for row in tables["modes"]["rows"]}
    assert modes["reasoning on"]["sums"]["score"] == 1.0
    assert modes["reasoning on"]["sums"]["generated_tokens"] > modes["reasoning off"]["sums"]["generated_tokens"]
    budgets = {row["name"]: row for row in tables["11"]["rows"]}
    assert list(budgets) == ["none", "4", "0"] and budgets["0"]["cells"]["sums"]["thought_cut"] == 1.0
    spent = [budgets[name]["cells"]["sums"]["generated_tokens"] for name in budgets]
    assert spent[0] > spent[2] and spent[1] != spent[0], spent
    rows = {row["name"]: row for row in tables["12"]["rows"]}
    ttft = {name: row["ttft"]["video_tokens"] for name, row in rows.items()}
    assert (
        ttft["single frames"] == 2 * ttft["tubelets"] == 2 * ttft["single frames + EVS"] == 4 * ttft["tubelets + EVS"]
    )
    assert list(rows["tubelets"]["cells"]) == ["clips 4f", "clips 8f"]  # sums have no video
    prompts = [
        rows[name]["cells"]["clips 8f"]["prompt_tokens"] for name in ("single frames", "tubelets", "tubelets + EVS")
    ]
    assert prompts[0] > prompts[1] > prompts[2]
    assert rows["tubelets + EVS"]["cells"] == tables["13"]["rows"][1]["cells"]  # q = 0.5 in both
    assert len(tables["13"]["rows"]) == 7
    cells = {path.name for path in (out / "cells").glob("clips*.predictions.jsonl")}
    assert len([name for name in cells if "thinkingFalse-f" in name]) == 2 * (2 + 7)
    assert "### Table 12: tubelets and EVS" in shown and "paired with itself" in shown
    for name in tables:
        assert (out / f"table-{name}.png").stat().st_size > 5000 and (out / f"table-{name}.md").is_file()
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.predictions.jsonl")}
    (out / "cells" / "ttft-8x64-q0.5.json").unlink()  # as if killed there
    code, again, _, loads = run(*arguments)
    assert (code, loads) == (0, 1) and again.splitlines()[:8] == shown.splitlines()[:8]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_nano_stands_in_for_benchmarks(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNI_NANO_SPEECH", str(tmp_path / "nothing"))
    files, missing = nano_files(tmp_path / "data", ["text_copy", "video_mover", "speech_words"], 2)
    assert list(files) == ["text_copy", "video_mover"] and "no spoken words" in missing["speech_words"]
    rows = read_lines(files["video_mover"])
    assert len(rows) == 2 and rows[0]["id"] == "video_mover/heldout/1000000" and graded_by(rows[0])
    stamp = os.stat(files["text_copy"]).st_mtime_ns
    nano_files(tmp_path / "data", ["text_copy"], 2)
    assert os.stat(files["text_copy"]).st_mtime_ns == stamp
