"""Fault drills that stand nowhere else: a full disk under `batch`, a lost process, damaged checkpoints, memory that is
not there. (SIGKILL of training, batch and server, and a full disk under training: the tests of these.)"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import test_training
import torch
import yaml
from safetensors.torch import load_file

from modeling_omni import OmniInputError
from modeling_omni.batch_inference import run_batch
from modeling_omni.inference import load
from modeling_omni.training import train_sft

ROOT = Path(__file__).parents[1]
tiny_yaml = test_training.tiny_yaml  # the fixture
stage = test_training.stage
SHORT = {"eval_samples": 0, "report_to": [], "cpe_eval": False, "data": [{"path": "nano:text_sum"}]}


def run_worker(name: str, *arguments) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def test_a_full_disk_under_batch_costs_no_line(tmp_path):
    model, processor = load("nano")
    rows = [{"id": i, "prompt": f"Copy: word {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, out = str(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # larger files fail as on a full disk
    try:
        with pytest.raises(OmniInputError, match="out.jsonl: cannot be written.*start the same command again"):
            run_batch(model, processor, source, str(out), batch_size=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    torn = out.read_bytes()
    assert 0 < torn.count(b"\n") < 6
    summary = run_batch(model, processor, source, str(out), batch_size=1)
    assert summary["done_before"] == torn.count(b"\n") and summary["errors"] == 0
    assert out.read_bytes().startswith(torn[: torn.rindex(b"\n") + 1])
    assert sorted(json.loads(line)["id"] for line in out.read_text().splitlines()) == list(range(6))


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "state"])
def test_a_damaged_checkpoint_is_passed_over(tiny_yaml, tmp_path, damage, caplog):
    train_sft(stage(tiny_yaml, tmp_path, **SHORT))
    want = load_file(tmp_path / "final" / "model.safetensors")
    newest, older = tmp_path / "step-6", tmp_path / "step-3"
    broken = newest / ("state-0.json" if damage == "state" else "model.safetensors")
    if damage == "truncated":
        os.truncate(broken, broken.stat().st_size // 2)
    else:
        broken.write_bytes(b"\xff" * 100)
    for file in (tmp_path / "final").iterdir():
        file.unlink()
    train_sft(stage(tiny_yaml, tmp_path, **SHORT))
    assert "step-6 is damaged and is passed over" in caplog.text
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    got = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)
    for folder in (newest, older):
        os.truncate(folder / "model.safetensors", 10)
    with pytest.raises(OmniInputError, match="no checkpoint.*whole.*take it away"):
        train_sft(stage(tiny_yaml, tmp_path, **SHORT))


def test_a_lost_process_ends_the_other_and_the_run_goes_on(tiny_yaml, tmp_path):
    """Killed without a word, one of two processes; the other must not wait for ever, and nothing saved is lost."""
    files = []
    for name in ("whole", "cut"):
        changes = SHORT | {"steps": 24, "save_every": 4, "global_batch_size": 4, "micro_batch_size": 1}
        args = stage(tiny_yaml, tmp_path / name, **changes)
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(dataclasses.asdict(args)))
    result = json.loads(run_worker("lost_rank_worker.py", *files, tmp_path / "cut"))
    assert result["whole"] == result["again"] == [0, 0]
    assert result["lost"][1] == -9 and result["lost"][0] not in (0, None)
    assert result["left"] and not result["finished"]
    whole, cut = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_request_beyond_the_memory_fails_alone():
    first, large, last = json.loads(run_worker("memory_worker.py"))
    assert large[0] == 413 and large[1]["error"]["code"] == "out_of_memory"
    assert first[0] == last[0] == 200
    assert first[1]["choices"][0]["message"] == last[1]["choices"][0]["message"]
