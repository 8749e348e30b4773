"""Pass-rate filtering: bands as the paper draws them, a cache that survives a kill, abstention exempt and capped."""

import json
import re

import pytest

from modeling_omni.filtering import (
    BANDS,
    grade,
    group_of,
    is_unanswerable,
    markdown_report,
    measure_pass_rates,
    mismatched_rows,
    select_prompts,
)
from modeling_omni.media import OmniInputError


def prompt(text: str, *kinds: str, path: str = "a") -> list[dict]:
    return [{"role": "user", "content": [{"type": k, "path": path} for k in kinds] + [{"type": "text", "text": text}]}]


def row(number: int, *kinds: str, **keys) -> dict:
    """A prompt that `policy` passes `number` times out of eight."""
    return {"prompt": prompt(f"pass {number}", *kinds), "answer": "7", "verifier": "string_match"} | keys


class Policy:
    """Answers "pass 3" rightly three times of eight, "abstain 2" with two abstentions; counts what it was asked."""

    def __init__(self, stop_after: int | None = None):
        self.asked, self.stop_after = [], stop_after

    def __call__(self, rows: list[dict], n: int) -> list[list[str]]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        texts = [r["prompt"][0]["content"][-1]["text"] for r in rows]
        self.asked += texts
        completions = []
        for text in texts:
            word, number = re.match(r"(\w+) (\d+)", text).groups()
            right, other = (r"\boxed{7}", r"\boxed{8}") if word == "pass" else (r"\boxed{unanswerable}", "no box")
            completions.append([f"thought</think>{right if i < int(number) else other}<|im_end|>" for i in range(n)])
        return completions


def kept_passes(rows: list[dict], tmp_path, bands: dict) -> list[int]:
    measured = measure_pass_rates(rows, Policy(), tmp_path, policy="p")
    kept, _ = select_prompts(rows, measured, bands)
    return [int(r["prompt"][0]["content"][-1]["text"].split()[1]) for r in kept]


@pytest.mark.parametrize(
    "stage,kinds,expected",
    [
        ("image_rl", ("image",), [0, 1, 2, 3, 4, 5, 6]),
        ("omni_rl", ("image",), [1, 2, 3, 4, 5, 6, 7]),
        ("omni_rl", ("video", "audio"), [1, 2, 3, 4, 5, 6, 7]),
        ("omni_rl", (), [1, 2, 3, 4, 5, 6, 7]),
        ("omni_rl", ("audio",), [3, 4, 5]),
    ],
)
def test_bands(stage, kinds, expected, tmp_path):
    assert kept_passes([row(n, *kinds) for n in range(9)], tmp_path, BANDS[stage]) == expected


def test_speech_recognition_is_no_audio_question(tmp_path):
    speech = row(0, "audio", verifier="asr", answer="one two")
    assert group_of(speech) == "asr" and group_of(row(0, "audio")) == "audio_qa"
    assert group_of(row(0, "audio", group="music")) == "music"
    measured = [{"scores": [1.0, 0.5, 0.5, 0.0], "abstained": 0}]
    assert select_prompts([speech], measured, BANDS["omni_rl"])[0] == [speech]  # mean 0.5
    with pytest.raises(OmniInputError, match="needs 1"):
        select_prompts([speech], measured, {"default": (0.4, 0.9)}, pass_thresholds={"asr": 0.9})  # 1 of 4 passes


def test_a_killed_run_goes_on_and_a_finished_one_asks_nothing(tmp_path):
    rows = [row(n, id=f"r{n}") for n in range(9)] + [row(3, id="r3")]  # the last one twice
    policy = Policy(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        measure_pass_rates(rows, policy, tmp_path, policy="p", batch_size=2)
    path = tmp_path / "pass_rates-0.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 4 == len(policy.asked)
    path.write_text("\n".join(lines)[:-20])  # the kill came in the middle of a line
    again = Policy()
    measured = measure_pass_rates(rows, again, tmp_path, policy="p", batch_size=2)
    assert len(again.asked) == 6 and not set(again.asked) & set(policy.asked[:3])
    assert [sum(m["scores"]) for m in measured] == [*range(9), 3]
    silent = Policy(stop_after=0)
    assert measure_pass_rates(rows, silent, tmp_path, policy="p") == measured
    for changed in ({"policy": "q"}, {"policy": "p", "settings": {"temperature": 0.5}}, {"policy": "p", "rollouts": 4}):
        with pytest.raises(KeyboardInterrupt):
            measure_pass_rates(rows, silent, tmp_path, **changed)
    with pytest.raises(KeyboardInterrupt):
        measure_pass_rates([rows[0] | {"answer": "8"}], silent, tmp_path, policy="p")


def test_two_processes_share_the_work(tmp_path):
    rows = [row(n, id=n) for n in range(9)]
    first, second = Policy(), Policy()
    half = measure_pass_rates(rows, first, tmp_path, policy="p", rank=0, world_size=2)
    assert [m is None for m in half] == [False, True] * 4 + [False]
    with pytest.raises(OmniInputError, match="no scores"):
        select_prompts(rows, half, BANDS["omni_rl"])
    whole = measure_pass_rates(rows, second, tmp_path, policy="p", rank=1, world_size=2)
    assert [sum(m["scores"]) for m in whole] == list(range(9))
    assert len(first.asked) == 5 and len(second.asked) == 4


def test_abstention_prompts_are_exempt_and_capped_and_false_abstention_is_reported(tmp_path):
    answerable = [row(4, "image", id=n, source="charts") for n in range(28)]
    answerable += [
        {
            "prompt": prompt("abstain 2", "image"),
            "answer": "7",
            "verifier": "string_match",
            "id": f"f{n}",
            "source": "x",
        }
        for n in range(2)
    ]
    hopeless = [row(0, "image", id=f"u{n}", answer="unanswerable") for n in range(10)]
    rows = hopeless[:5] + answerable + hopeless[5:]
    measured = measure_pass_rates(rows, Policy(), tmp_path, policy="p")
    kept, report = select_prompts(rows, measured, {"default": (0.0, 0.8)}, abstain_share=0.1)
    assert len(kept) == 33 and sum(r["answer"] == "unanswerable" for r in kept) == 3  # a tenth of 33, not more
    assert kept == [r for r in rows if r in kept]
    assert report["exempt"] == 10 and report["exempt_kept"] == 3
    assert report["false_abstention"] == 2 * 2 / (30 * 8)
    assert report["groups"][("charts", "image")] == {
        "prompts": 28, "kept": 28, "too_easy": 0, "too_hard": 0, "pass_rate": 0.5
    }  # fmt: skip
    assert "| charts | image | 28 | 28 | 0 | 0 | 0.500 |" in markdown_report(report)
    assert "false abstention: 1.7 %" in markdown_report(report)
    again, _ = select_prompts(rows, measured, {"default": (0.0, 0.8)}, abstain_share=0.1)
    other, _ = select_prompts(rows, measured, {"default": (0.0, 0.8)}, abstain_share=0.1, seed=1)
    assert again == kept and other != kept
    with pytest.raises(OmniInputError, match="needs 64"):
        select_prompts(rows, measured, {"default": (0.0, 0.8)}, at_least=64)
    with pytest.raises(OmniInputError, match="no band"):
        select_prompts(rows, measured, {"text": (0.0, 0.8)})


def test_mismatched_prompts_swap_media_of_one_kind():
    rows = [row(n, "image", id=f"i{n}", args={"rel_tol": 0.1}) for n in range(4)] + [row(9, "audio", id="a"), row(1)]
    for n, one in enumerate(rows[:4]):
        one["prompt"][0]["content"][0]["path"] = f"picture-{n}"
    before = json.dumps(rows)
    made = mismatched_rows(rows, 10)
    assert json.dumps(rows) == before
    assert len(made) == 4  # the only sound has no partner, text has nothing to swap
    for one in made:
        words, picture = one["prompt"][0]["content"][-1]["text"], one["prompt"][0]["content"][0]["path"]
        assert words[-1] != picture[-1]
        assert one["answer"] == "unanswerable" and "args" not in one
        assert grade(one, ["a</think>\\boxed{cannot be determined}", "a</think>\\boxed{7}"])["scores"] == [1.0, 0.0]
    assert len({one["id"] for one in made}) == 4
    assert len(mismatched_rows(rows, 2)) == 2


def test_texts_are_kept_and_what_is_graded_is_part_of_the_key(tmp_path):
    rows = [row(n, id=n) for n in range(3)]
    plain = measure_pass_rates(rows, Policy(), tmp_path, policy="p", rollouts=4)
    with_texts = measure_pass_rates(rows, Policy(), tmp_path, policy="p", rollouts=4, texts=True)
    assert [m["scores"] for m in plain] == [m["scores"] for m in with_texts] and "completions" not in plain[0]
    silent = Policy(stop_after=0)
    assert measure_pass_rates(rows, silent, tmp_path, policy="p", rollouts=4, texts=True) == with_texts
    assert len(with_texts[1]["completions"]) == 4 and r"\boxed{7}" in with_texts[1]["completions"][0]
    with pytest.raises(KeyboardInterrupt):
        measure_pass_rates(rows, silent, tmp_path, policy="p", rollouts=4, reward="text")


def test_whole_texts_are_graded_where_nothing_is_boxed():
    plain = row(0, prompt_opened_think=False)
    assert grade(plain, ["7<|im_end|>", r"\boxed{7}", "8"])["scores"] == [0.0, 1.0, 0.0]
    assert grade(plain, ["7<|im_end|>", r"\boxed{7}", "8", "so 7"], "text")["scores"] == [1.0, 1.0, 0.0, 0.0]
    assert grade(row(0), ["6 + 1 = 7</think>\n7", "7"], "text")["scores"] == [1.0, 0.0]
    click = plain | {"verifier": "gui-coordinate", "answer": "0.5,0.6", "args": {"scale": 100, "tagged": False}}
    scores = grade(click, ["50 60", "(50, 60)<|im_end|>", "50 66", "500 600", "at 50 60", "<point>[(50,60)]</point>"])
    assert scores["scores"] == [1.0, 1.0, 0.36, 0.0, 0.0, 1.0]


def test_what_abstains():
    refusals = [
        "a</think>I do not know. I am a small model.<|im_end|>",
        "a</think>\\boxed{Not visible}",
        "a</think>No.",
    ]
    assert grade(row(0), refusals) == {"scores": [0.0] * 3, "abstained": 2}  # one without the box of an answer
    assert is_unanswerable(row(0) | {"answer": ["I do not know. I am a small model.", "unanswerable"]})
    assert not is_unanswerable(row(0) | {"answer": ["unknown", "7"]}) and not is_unanswerable(row(0) | {"answer": []})
    assert not is_unanswerable(row(0) | {"answer": "unknown", "verifier": "exact_match"})


def test_mismatches_may_be_restricted():
    rows = [row(n, "image", path=None, id=n, prompt=prompt(f"q {n}", "image", path=str(n))) for n in range(8)]
    made = mismatched_rows(rows, 8, fits=lambda one, donor: one["id"] % 2 == 0)
    assert {one["id"].split("|")[0] for one in made} == set("0246")


def test_rows_that_cannot_be_remembered_and_broken_generators(tmp_path):
    with pytest.raises(OmniInputError, match="'id'"):
        measure_pass_rates(
            [row(1) | {"prompt": [{"content": [{"type": "image", "image": object()}]}]}], Policy(), tmp_path, "p"
        )
    with pytest.raises(OmniInputError, match="8 completions"):
        measure_pass_rates([row(1)], lambda rows, n: [["x"]], tmp_path, policy="p")
    with pytest.raises(OmniInputError, match="no verifier"):
        measure_pass_rates([row(1, verifier="judge")], Policy(), tmp_path, policy="p")
