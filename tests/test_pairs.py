"""Rollouts, `train.py filter` and `train.py pairs` on a small policy that really samples; nano's prompts as files."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rl_tasks import two_processes
from tiny_model import media_rows, tiny_checkpoint
from transformers import TopKLogitsWarper, TopPLogitsWarper

from modeling_omni import nano_data
from modeling_omni.data import Source
from modeling_omni.data_adapters import adapt_prompt
from modeling_omni.inference import load
from modeling_omni.media import OmniInputError
from modeling_omni.nano_data.__main__ import main as nano_main
from modeling_omni.nano_data.prompts import ABOUT_THINGS, NOT_KNOWN, prompt_row
from modeling_omni.pairs import PairsArguments, choose_pair, make_pairs
from modeling_omni.processing_omni import OmniProcessor
from modeling_omni.rewards import score
from modeling_omni.rollouts import FilterArguments, SeededSampling, filter_prompts, read_rows, sample_completions
from modeling_omni.training import load_arguments

ROOT = Path(__file__).parents[1]
END = "<|im_end|>"


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    """Writes "red", "blue" and ends, in any order, so that some answers are right, some wrong and some cut off."""
    return tiny_checkpoint(tmp_path_factory.mktemp("policy"), only=("red", "blue", END))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("prompts")
    rows = media_rows(folder)
    rows += [rows[0] | {"id": f"text {i}", "answer": ("red", "blue", "green")[i % 3]} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def arguments(cls, folder, policy, prompts, **changes):
    values = {"output_dir": str(folder), "model": policy, "data": [{"path": prompts}], "reward": "text"}
    return cls(**values | {"completion_tokens": 3, "batch_size": 4, "temperature": 3.0} | changes)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- sampling


def test_seeded_sampling_samples_the_softmax():
    torch.manual_seed(0)
    logits = torch.randn(6) * 1.5
    count, temperature = 4000, 0.7
    rows = logits.expand(count, 6)
    for top_p, top_k in ((1.0, 0), (0.8, 0), (0.8, 3)):
        sampling = SeededSampling(list(range(count)), temperature, top_p, logits.device, top_k)
        scaled = (logits / temperature)[None]
        scaled = TopKLogitsWarper(top_k)(None, scaled) if top_k else scaled
        kept = scaled if top_p == 1 else TopPLogitsWarper(top_p)(None, scaled)
        expected = kept.softmax(-1)[0]
        drawn = torch.bincount(sampling(None, rows).argmax(-1), minlength=6) / count
        assert ((drawn - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()
        again = SeededSampling(list(range(count)), temperature, top_p, logits.device)
        assert torch.equal(again(None, rows), SeededSampling(range(count), temperature, top_p, "cpu")(None, rows))


def test_answers_depend_on_the_row_alone_and_media_are_encoded_once(policy, prompts):
    model, processor = load(policy, "float32")
    rows = read_rows([{"path": prompts}])[0]
    calls = []
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.register_forward_hook(lambda *_: calls.append(1))
    args = arguments(PairsArguments, "unused", policy, prompts)
    together = sample_completions(model, processor, rows[:4], 6, args)
    assert len(calls) == 3  # a picture, a sound, a clip, six answers to each
    alone = [sample_completions(model, processor, [row], 6, args)[0] for row in rows[:4][::-1]][::-1]
    assert together == alone and [len(answers) for answers in together] == [6] * 4
    args.seed = 1
    assert sample_completions(model, processor, rows[:4], 6, args) != together
    texts = [text for answers in together for text in answers]
    assert {text.replace(END, "").replace("red", "").replace("blue", "") for text in texts} == {""}
    assert any(text.endswith(END) for text in texts) and not all(text.endswith(END) for text in texts)


# ---------------------------------------------------------------------------------------------------- pairs


def row(**keys) -> dict:
    return {"id": "r", "source": "s", "prompt": [{"role": "user", "content": "?"}], "verifier": "math"} | keys


@pytest.mark.parametrize(
    "texts, scores, expected",
    [
        ([f"a{END}", f"b{END}", "c"], [1.0, 0.0, 0.0], ("a", "b")),
        ([f"a{END}", f"b{END}"], [1.0, 1.0], "none_wrong"),
        ([f"a{END}", f"b{END}"], [0.0, 0.0], "none_right"),
        ([f"a{END}", f"b{END}"], [0.6, 0.4], "too_close"),
        ([f"a{END}", "b"], [1.0, 0.0], "cut_off"),
        ([f"a{END}", END, "b"], [1.0, 0.0, 0.0], "cut_off"),
        ([f"x</think>a{END}", f"y</think>b{END}\n"], [0.2, 0.9], ("y</think>b", "x</think>a")),
    ],
)
def test_pairs_are_the_best_and_the_worst(texts, scores, expected):
    pair = choose_pair(row(), texts, scores, 0.5, 0)
    assert pair == expected if isinstance(expected, str) else (pair["chosen"], pair["rejected"]) == expected


def test_which_of_equal_answers_is_drawn_by_the_seed():
    texts = [f"{letter}{END}" for letter in "abcdefgh"]
    drawn = [choose_pair(row(), texts, [1.0] * 4 + [0.0] * 4, 0.5, seed) for seed in range(30)]
    assert {pair["chosen"] for pair in drawn} == set("abcd") and {pair["rejected"] for pair in drawn} == set("efgh")
    assert drawn[3] == choose_pair(row(), texts, [1.0] * 4 + [0.0] * 4, 0.5, 3)


def test_pairs_of_all_modalities_resume_to_the_same(policy, prompts, tmp_path):
    whole = arguments(PairsArguments, tmp_path / "whole", policy, prompts, rollouts=32)
    report = make_pairs(whole)
    pairs = lines_of(tmp_path / "whole/pairs.jsonl")
    assert {"image", "audio", "video", "text"} <= {pair["id"] for pair in pairs}
    for pair in pairs:
        assert pair["chosen_score"] == 1 and pair["rejected_score"] == 0 and pair["chosen"] != pair["rejected"]
        assert not pair["prompt_opened_think"] and END not in pair["chosen"] + pair["rejected"]
    assert all(pair["chosen"] == "red" for pair in pairs if "text" not in pair["id"])
    counts = json.loads((tmp_path / "whole/report.json").read_text())
    reasons = ("pairs", "none_right", "none_wrong", "too_close", "cut_off")
    assert sum(one["prompts"] for one in counts) == 12 == sum(one[name] for one in counts for name in reasons)
    assert sum(one["none_right"] for one in counts) >= 2 and "| all | | 12 |" in report  # nobody says green
    rows = Source({"path": str(tmp_path / "whole/pairs.jsonl")}, adapt=adapt_prompt)
    paths = [part["path"] for one in range(len(rows)) for part in rows[one]["prompt"][0]["content"] if "path" in part]
    assert len(paths) >= 3 and all(open(path, "rb").read(1) for path in paths)  # relative to the new file

    (tmp_path / "cut").mkdir()  # as if killed after five prompts, in the middle of a line; gone on in other batches
    found = (tmp_path / "whole/pass_rates-0.jsonl").read_text().splitlines()
    (tmp_path / "cut/pass_rates-0.jsonl").write_text("\n".join(found[:6])[:-30])
    make_pairs(arguments(PairsArguments, tmp_path / "cut", policy, prompts, rollouts=32, batch_size=3))
    assert lines_of(tmp_path / "cut/pairs.jsonl") == pairs
    assert len(lines_of_whole(tmp_path / "cut/pass_rates-0.jsonl")) == 12
    with pytest.raises(OmniInputError, match="pairs of 12 prompts, at_least 99"):
        make_pairs(arguments(PairsArguments, tmp_path / "cut", policy, prompts, rollouts=32, at_least=99))


def lines_of_whole(path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


# ---------------------------------------------------------------------------------------------------- filter


def test_filter_keeps_the_band_and_reuses_rollouts(policy, prompts, tmp_path):
    bands = {"default": [0.01, 0.99]}
    args = arguments(FilterArguments, tmp_path, policy, prompts, bands=bands, mismatched=1)
    report = filter_prompts(args)
    kept = lines_of(tmp_path / "prompts.jsonl")
    scores = {one["id"]: one["scores"] for one in lines_of(tmp_path / "pass_rates-0.jsonl")}
    wanted = [name for name, one in scores.items() if 0 < sum(one) < 8]
    assert [one["id"] for one in kept] == wanted and 0 < len(wanted) < 12
    assert "| source | group |" in report and report + "\n" == (tmp_path / "report.md").read_text()
    before = (tmp_path / "pass_rates-0.jsonl").read_bytes()
    assert filter_prompts(args) == report and (tmp_path / "pass_rates-0.jsonl").read_bytes() == before
    with pytest.raises(OmniInputError, match="the stage needs 50"):
        filter_prompts(arguments(FilterArguments, tmp_path, policy, prompts, bands=bands, at_least=50))
    rows, _, bad = read_rows([{"path": str(tmp_path / "prompts.jsonl")}])  # its own output is good input
    assert len(rows) == len(kept) and not bad and "left out" not in report


def test_a_bad_row_costs_that_row(policy, prompts, tmp_path):
    """In two batches, one of them without any other row; restarted, after one of them was mended."""
    good = [json.loads(line) for line in Path(prompts).read_text().splitlines()][4:7]
    gone = [{"role": "user", "content": [{"type": "image", "path": "gone.png"}]}]
    bad = {
        "verifier": {"prompt": "?", "answer": "1"},
        "no prediction can score 1": {"prompt": "?", "answer": "5,5", "verifier": "gui-coordinate"},
        "tokens; limit 60": good[0] | {"prompt": "word " * 90},
        "gone.png": good[0] | {"prompt": gone},
    }
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in [*bad.values(), *good]]
    file.write_text("\n".join([*lines, "{no json"]) + "\n")
    options = {"prompt_tokens": 60, "bands": {"default": [0, 1.1]}, "batch_size": 2}
    filtering = arguments(FilterArguments, tmp_path / "filter", policy, str(file), **options)
    for _ in range(2):
        assert "left out: 5 rows" in filter_prompts(filtering)
        assert [row["id"] for row in lines_of(tmp_path / "filter/prompts.jsonl")] == [row["id"] for row in good]
        named = {row["row"]: row["reason"] for row in lines_of(tmp_path / "filter/bad_rows.jsonl")}
        assert set(named) == {1, 2, 3, 4, 8}
        assert all(reason in named[number] for number, reason in enumerate(bad, 1)), named
    two_processes(filter_prompts, arguments(FilterArguments, tmp_path / "two", policy, str(file), **options))
    for name in ("prompts.jsonl", "bad_rows.jsonl", "report.md"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "filter" / name).read_text()
    assert len(lines_of(tmp_path / "two/pass_rates-1.jsonl")) == 1  # of the three rows that can be used
    Image.new("RGB", (64, 64)).save(tmp_path / "gone.png")
    assert "left out: 4 rows" in filter_prompts(filtering)
    del options["bands"]
    pairs = arguments(PairsArguments, tmp_path / "pairs", policy, str(file), rollouts=32, **options)
    assert "left out: 4 rows" in make_pairs(pairs)
    with pytest.raises(OmniInputError, match=r"4 of 8 rows cannot be used, over max_bad_share 0.003; .*, row 3: .*60"):
        pairs.max_bad_share = 0.003
        make_pairs(pairs)


def test_every_config_loads_and_feeds_its_stage():
    for scale in ("nano", "30b"):
        outputs = set()
        for file in sorted((ROOT / "configs" / scale / "rl").glob("*.yaml")):
            text, settings = file.read_text(), yaml.safe_load(file.read_text())
            cls = {"pairs": PairsArguments, "filter": FilterArguments}.get(settings["stage"])
            if cls is None:
                continue
            for line in text.splitlines():
                assert line.startswith(("#", "  ", "data:")) or " # " in line, f"{file}: {line}: no comment"
            args = load_arguments(cls, ["--config", str(file)])
            if file.stem == "pass_rates":  # measures, and feeds no stage
                continue
            output = f"{args.output_dir}/{'pairs' if cls is PairsArguments else 'prompts'}.jsonl"
            outputs.add(output)
            stage = "mpo" if cls is PairsArguments else file.stem.removeprefix("filter_")
            trained = yaml.safe_load((file.parent / f"{stage}.yaml").read_text())
            assert args.model == trained["model"], file  # the initial policy of the stage
            assert output in [source["path"] for source in trained["data"]], file
        wanted = [yaml.safe_load(path.read_text()) for path in (ROOT / "configs" / scale / "rl").glob("*.yaml")]
        wanted = {one["path"] for settings in wanted for one in settings["data"]}
        assert {path for path in wanted if path.startswith("runs/") and "/data/" in path} == outputs


# ---------------------------------------------------------------------------------------------------- nano prompts


def test_nano_prompts_hold_what_the_samples_hold(tmp_path):
    skills = ["text_math", "text_button", "text_count", "image_colour", "image_where", "image_shape", "video_direction"]
    nano_main(["prompts", "--out", str(tmp_path), "--skills", *skills, "--count", "5", "--mismatched", "0.2"])
    rows = read_rows([{"path": str(tmp_path / "prompts.jsonl")}])[0]
    asked, unanswerable = [r for r in rows if not r.get("unanswerable")], [r for r in rows if r.get("unanswerable")]
    assert len(asked) == 35 and 2 <= len(unanswerable) <= 7
    processor = OmniProcessor.from_pretrained("nano")
    for one in asked:
        skill, split, seed = one["id"].split("/")
        sample = nano_data.make_sample(skill, int(seed), split)
        answer = sample["messages"][-1]["content"]
        assert score(one["verifier"], answer, one["answer"], **one.get("args", {})) == 1, one["id"]
        assert score(one["verifier"], "no idea", one["answer"], **one.get("args", {})) == 0
        assert one["prompt_opened_think"] is (skill == "text_math")
        mine, theirs = (processor.count_tokens(m) for m in (one["prompt"], sample["messages"][:1]))
        assert mine == theirs, one["id"]
    button = next(one for one in asked if one["source"] == "text_button")
    x, y = (round(100 * float(number)) for number in button["answer"].split(","))
    assert 0 < score("gui_coordinate", f"({x - 4}, {y + 3})", button["answer"], **button["args"]) < 1
    for one in unanswerable:
        assert one["answer"] == NOT_KNOWN and one["source"] in ABOUT_THINGS
        assert score(one["verifier"], "I do not know. I am a small model.", one["answer"]) == 1


@pytest.mark.skipif(importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed")
def test_spoken_prompts(tmp_path, monkeypatch):
    from modeling_omni.nano_data import speech

    every = {split: [v for v in speech.voices(split) if v.engine == "espeak"][:1] for split in nano_data.SPLITS}
    monkeypatch.setattr(speech, "voices", lambda split: every[split])
    speech.build_cache(tmp_path / "speech", splits=("train",))
    monkeypatch.setenv(speech.FOLDER_VARIABLE, str(tmp_path / "speech"))
    for skill in ("speech_words", "speech_digits", "video_heard_motion"):
        one = prompt_row(skill, 3, tmp_path)
        sample = nano_data.make_sample(skill, 3)
        assert score(one["verifier"], sample["messages"][-1]["content"], one["answer"], **one.get("args", {})) == 1
        kinds = {"speech_words": "asr_wer", "speech_digits": "asr_wer", "video_heard_motion": "string_match"}
        assert one["verifier"] == kinds[skill]
        mine, theirs = (
            OmniProcessor.from_pretrained("nano").count_tokens(m) for m in (one["prompt"], sample["messages"][:1])
        )
        assert abs(mine["audio"] - theirs["audio"]) <= 2 and mine["video"] == theirs["video"]  # AAC pads the end
    assert score("asr_wer", "427", "407", lang="zh") == pytest.approx(2 / 3)
