"""Two gloo processes against one: ZeRO-3 with and without expert parallelism, plain data parallelism, checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from distributed_worker import MAX_NORM, ROWS, STEPS, batches_of, optimizer_of, rate_of
from safetensors.torch import load_file
from tiny_model import collate, make_sample, tiny_model

from modeling_omni.distributed import (
    agree_on_step,
    make_accelerator,
    pad_missing_modalities,
    prepare_expert_parallel,
    trained_tokens,
)
from modeling_omni.media import OmniInputError
from modeling_omni.modeling_omni import OmniForConditionalGeneration, chunked_cross_entropy

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
CASES = ["plain", "experts"]


def launch(config: str, folder: Path) -> None:
    """Runs distributed_worker.py in two processes on CPU, from the configuration meant for GPUs."""
    pytest.importorskip("deepspeed")
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{config}.yaml"]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    command += [str(ROOT / "tests/distributed_worker.py"), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One-process checkpoint `start`, from which everything begins."""
    path = tmp_path_factory.mktemp("distributed")
    model = tiny_model(pattern="ME*EM")
    # every token of the first MoE layer goes to experts of process 0: process 1 computes nothing there
    model.model.language_model.layers[1].mixer.gate.e_score_correction_bias[:4] = 100.0
    model.save_pretrained(path / "start")
    return path


@pytest.fixture(scope="module")
def reference(folder):
    """One process on the global batch: per step the loss, the norm, gradients and new weights (released names)."""
    model = OmniForConditionalGeneration.from_pretrained(folder / "start").train()
    optimizer = optimizer_of(model)
    steps = []
    for step in range(STEPS):
        batches = batches_of(step, 0) + batches_of(step, 1)
        tokens = sum(trained_tokens(batch) for batch in batches)
        for group in optimizer.param_groups:
            group["lr"] = rate_of(group["name"], step)
        optimizer.zero_grad()
        loss = sum(model(**batch, skip_logits=True, num_items_in_batch=tokens).loss for batch in batches)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item()
        optimizer.step()
        model.save_pretrained(folder / f"reference-{step + 1}")
        steps.append((loss.item(), norm, grads, weights(folder / f"reference-{step + 1}")))
    return steps


@pytest.fixture(scope="module")
def two_processes(folder):
    launch("zero3", folder)
    return {case: json.loads((folder / case / "log.json").read_text()) for case in [*CASES, "ddp"]}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def largest_difference(ours: dict, theirs: dict) -> float:
    assert set(ours) == set(theirs)
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


@pytest.mark.parametrize("case", CASES)
def test_zero3_equals_one_process(case, folder, reference, two_processes):
    log = two_processes[case]
    assert set(log["experts_of_a_process"]) == {8 if case == "plain" else 4}
    for step, (loss, norm, grads, new_weights) in enumerate(reference):
        assert log["steps"][step] == pytest.approx([loss, norm], rel=1e-5)
        ours = load_file(folder / case / f"gradients-{step}.safetensors")
        for name in set(ours) - set(grads):  # a tower without input has no gradient in one process
            assert not ours.pop(name).any(), name
        assert largest_difference(ours, grads) < 1e-5
        assert largest_difference(weights(folder / case / f"step-{step + 1}"), new_weights) < 1e-5
    assert largest_difference(reference[-1][3], weights(folder / "start")) > 1e-3  # far more than the tolerance


@pytest.mark.parametrize("case", CASES)
def test_resumed_zero3_equals_uninterrupted(case, folder, two_processes):
    log = two_processes[case]
    assert log["resumed"] == log["steps"][1]
    assert largest_difference(weights(folder / case / "resumed"), weights(folder / case / "step-2")) == 0.0
    if case == "experts":
        assert "expert_parallel" in log["refused"]
        assert "must divide the 2 processes and the [8] experts" in log["indivisible"]


@pytest.mark.parametrize("case", CASES)
def test_gradient_that_is_not_finite_skips_the_step_everywhere(case, folder, two_processes):
    assert two_processes[case]["not_finite"] is False
    assert largest_difference(weights(folder / case / "skipped"), weights(folder / case / "step-2")) == 0.0


def test_checkpoint_of_two_processes_is_the_released_layout_and_runs_in_one(folder, reference, two_processes):
    assert set(weights(folder / "experts" / "step-2")) == set(weights(folder / "start"))
    assert "language_model.backbone.layers.1.mixer.experts.7.up_proj.weight" in weights(folder / "experts" / "step-2")
    batch = batches_of(0, 0)[0]
    logits = [
        OmniForConditionalGeneration.from_pretrained(path).eval()(**batch).logits
        for path in (folder / "experts" / "step-2", folder / "reference-2")
    ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_data_parallelism_equals_one_process(folder, reference, two_processes):
    assert two_processes["ddp"]["steps"] == [pytest.approx(step[:2], rel=1e-5) for step in reference]
    assert largest_difference(weights(folder / "ddp" / "step-2"), reference[-1][3]) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [[[6], [9]], [[4, ("image", 2, 4), 5], [12]], [[5, ("audio", [20]), 4]]])
def test_padded_modalities_change_neither_loss_nor_gradients(rows, packed):
    model = tiny_model(pattern="ME*").train()
    batch = collate([make_sample(row, n) for n, row in enumerate(rows)], left=False)
    if packed:
        batch["seq_idx"] = torch.where(batch["attention_mask"] == 1, 0, -1)
    padded = pad_missing_modalities(batch, model.config)
    assert {"pixel_values", "pixel_values_videos", "input_features"} <= set(padded)
    assert padded["input_ids"].shape[1] <= batch["input_ids"].shape[1] + 3
    grads = []
    for inputs in (batch, padded):
        model.zero_grad()
        loss = model(**inputs, skip_logits=True).loss
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"": loss})
    assert {name for name, _ in model.named_parameters()} == set(grads[1]) - {""}  # every part took part
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0].get(name, torch.zeros_like(grad)), atol=1e-6, rtol=1e-5)
    assert pad_missing_modalities(padded, model.config).keys() == padded.keys()


def test_calls_of_the_head_that_are_asked_for_change_nothing():
    torch.manual_seed(0)
    head, hidden, labels = torch.nn.Linear(8, 20), torch.randn(2, 9, 8), torch.randint(0, 20, (2, 9))
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    plain = chunked_cross_entropy(hidden, head, labels)
    expected = torch.autograd.grad(plain, head.weight)[0]
    calls.clear()
    loss = chunked_cross_entropy(hidden, head, labels, min_chunks=4)
    assert len(calls) == 4
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, head.weight)[0], expected)


def test_one_process_agrees_with_itself_and_has_no_expert_parallelism():
    model, accelerator = tiny_model(pattern="ME"), Accelerator(cpu=True)
    batches = batches_of(1, 0)
    assert agree_on_step(accelerator, model, batches) == sum(trained_tokens(batch) for batch in batches) > 1024
    assert (model.min_loss_chunks, model.model.audio_tower.min_passes) == (0, 0)
    prepare_expert_parallel(model, 1, accelerator)
    with pytest.raises(OmniInputError, match="needs ZeRO-3"):
        prepare_expert_parallel(model, 2, accelerator)


@pytest.mark.parametrize(
    "key, value", [("ZERO_STAGE", "2"), ("OFFLOAD_OPTIMIZER_DEVICE", "nvme"), ("CONFIG_FILE", "zero.json")]
)
def test_deepspeed_settings_that_are_not_supported_are_named(key, value, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{key}", value)
    with pytest.raises(OmniInputError, match=f"{key.lower()}.*not supported"):
        make_accelerator()


def test_processes_of_the_test_differ_in_everything_that_could_hang():
    kinds = [[{part[0] for row in rows for part in row if not isinstance(part, int)} for rows in m] for m in ROWS[0]]
    assert kinds == [[{"image"}, {"audio"}], [set(), {"video"}]]
    assert trained_tokens(batches_of(1, 0)[0]) > 1024 > trained_tokens(batches_of(1, 1)[0])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_accelerate_config_loads_and_says_what_its_keys_do(file):
    config = load_config_from_file(str(file))
    assert config.num_processes % config.num_machines == 0
    keys = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert all(" # " in line for line in keys)
    if config.deepspeed_config:
        known = {"zero_stage", "zero3_init_flag", "offload_optimizer_device", "deepspeed_multinode_launcher"}
        assert set(config.deepspeed_config) <= known and not config.use_cpu


def test_there_is_a_config_for_every_kind_of_machine():
    names = {file.stem for file in CONFIGS}
    assert names == {"cpu", "gpu", "cpu_processes", "zero3", "zero3_experts", "nodes"}
