"""On-policy distillation: the loss against a float64 hand calculation, shared media, two domains, resuming."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_model import media_rows, tiny_checkpoint, tiny_model
from torch import nn

from modeling_omni.data_adapters import adapt_prompt
from modeling_omni.distillation import (
    DistillArguments,
    answer_states,
    check_distill,
    chunked_reverse_kl,
    domain_of,
    reverse_kl,
    train_distill,
)
from modeling_omni.inference import load
from modeling_omni.media import OmniInputError
from modeling_omni.processing_omni import OmniProcessor
from modeling_omni.rl_training import check_arguments, encode_media, encode_prompt
from modeling_omni.training import group_of, load_arguments

ROOT = Path(__file__).parents[1]
WORDS = ("red", "blue", "green", "star", "circle", "<|im_end|>")


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [power / sum(powers) for power in powers]


def test_loss_and_gradient_equal_a_float64_hand_calculation():
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(5, 7), 2 * torch.randn(5, 7)
    tokens = torch.randint(7, (5,))
    for estimator in ("full", "sampled"):
        logits = student.clone().requires_grad_()
        loss, divergence = reverse_kl(logits, teacher, tokens, estimator)
        loss.sum().backward()
        for n in range(5):
            p, q = softmax(student[n].double().tolist()), softmax(teacher[n].double().tolist())
            logs = [math.log(a / b) for a, b in zip(p, q)]
            full, y = sum(a * log for a, log in zip(p, logs)), int(tokens[n])
            assert divergence[n].item() == pytest.approx(full if estimator == "full" else logs[y], abs=1e-5)
            for j in range(7):
                sampled = logs[y] * ((j == y) - p[j])
                expected = p[j] * (logs[j] - full) if estimator == "full" else sampled
                assert logits.grad[n, j].item() == pytest.approx(expected, abs=1e-5)


def test_the_sampled_estimate_is_unbiased():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 9), torch.randn(1, 9)
    p = student.double().softmax(-1)[0]
    gradients = {}
    for estimator in ("full", "sampled"):
        logits = student.expand(9, 9).clone().requires_grad_()
        loss, divergence = reverse_kl(logits, teacher.expand(9, 9), torch.arange(9), estimator)
        (loss * p).sum().backward()  # the mean over what may be sampled
        gradients[estimator] = logits.grad.sum(0), (divergence * p).sum()
    torch.testing.assert_close(gradients["sampled"][0], gradients["full"][0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradients["sampled"][1], gradients["full"][1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_chunks_change_nothing(estimator):
    torch.manual_seed(0)
    head, other = nn.Linear(6, 11), nn.Linear(4, 11)
    states, wanted, tokens = torch.randn(10, 6, requires_grad=True), torch.randn(10, 4), torch.randint(11, (10,))
    loss, divergence = reverse_kl(head(states), other(wanted), tokens, estimator)
    expected = torch.autograd.grad(loss.sum(), [states, head.weight])
    sums = chunked_reverse_kl(states, head, wanted, other, tokens, estimator, chunk=3)
    torch.testing.assert_close(sums, torch.stack([loss.sum(), divergence.sum()]))
    for ours, theirs in zip(torch.autograd.grad(sums[0], [states, head.weight]), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert all(parameter.grad is None for parameter in other.parameters())


def test_states_of_a_mixed_batch_are_those_of_single_prompts(tmp_path):
    processor, model = OmniProcessor.from_pretrained("nano"), tiny_model(vocab_size=512, mels=80)
    args = DistillArguments(output_dir="unused")
    rows = [adapt_prompt(row, folder=tmp_path) for row in media_rows(tmp_path)]
    prompts = [encode_prompt(row, processor, args, False, 4096) for row in rows]
    calls = []
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.register_forward_hook(lambda *_: calls.append(1))
    answers = [[100 + i] * (1 + i % 3) + [11] for i in range(8)]  # two to each prompt, of different lengths
    with torch.no_grad():
        features = [encode_media(model, prompt) for prompt in prompts]
        batch = answer_states(model, prompts, features, answers, 0)
        assert len(calls) == 3
        single = [
            answer_states(model, [prompts[i // 2]], [features[i // 2]], [answers[i]], 0) for i in range(len(answers))
        ]
        whole = processor.apply_chat_template(
            rows[1]["prompt"], add_generation_prompt=True, enable_thinking=False, tokenize=True, return_tensors="pt"
        )
        ids = torch.cat([whole["input_ids"], torch.tensor([answers[3]])], 1)
        inputs = {k: v for k, v in whole.items() if k not in ("input_ids", "attention_mask")}
        plain = model.model(input_ids=ids, **inputs).last_hidden_state[0, -len(answers[3]) - 1 : -1]
    torch.testing.assert_close(batch, torch.cat(single), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(single[3], plain, atol=2e-5, rtol=1e-4)


def test_domains():
    teachers = {"charts": "a", "image": "b", "default": "c"}
    image = {"prompt": [{"role": "user", "content": [{"type": "image", "path": "x"}]}]}
    assert domain_of(image | {"source": "charts"}, teachers) == "charts"
    assert domain_of(image | {"source": "maps"}, teachers) == "image"
    assert domain_of({"prompt": "?"}, teachers) == "default"
    assert domain_of(image | {"verifier": "math", "group": "gui"}, teachers) == "default"
    with pytest.raises(OmniInputError, match="no teacher for source None or group 'text'"):
        domain_of({"prompt": "?"}, {"image": "b"})


# ---------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    """A student, a teacher that differs from it, and prompts in text and with a picture."""
    folder = tmp_path_factory.mktemp("distillation")
    rows = media_rows(folder)[:2]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    student, teacher = (tiny_checkpoint(folder / str(seed), seed, only=WORDS) for seed in (0, 1))
    return {"student": student, "teacher": teacher, "data": str(folder / "rows.jsonl")}


def stage(world, folder, **changes) -> DistillArguments:
    values = {
        "output_dir": str(folder),
        "model": world["student"],
        "data": [{"path": world["data"]}],
        "teachers": {"text": world["teacher"], "image": world["student"]},
        "rollouts": 2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "completion_tokens": 4,
        "steps": 4,
        "save_every": 2,
        "learning_rate": 3e-3,
        "reward": "text",
        "report_to": [],
        "eval_samples": 0,
    }
    return DistillArguments(**values | changes)


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@torch.no_grad()
def divergence(world, student, teacher, number: int) -> float:
    """KL(student || teacher) of the tokens of a fixed answer to a prompt of `world`."""
    states = []
    for name in (student, teacher):
        model, processor = load(str(name), "float32")
        row = json.loads(Path(world["data"]).read_text().splitlines()[number])
        row = adapt_prompt(row, folder=Path(world["data"]).parent)
        prompt = encode_prompt(row, processor, DistillArguments(output_dir="unused"), False, 4096)
        answer = processor.tokenizer.convert_tokens_to_ids(["red", "star", "<|im_end|>"])
        states.append(model.lm_head(answer_states(model, [prompt], [encode_media(model, prompt)], [answer], 0)))
    return float(reverse_kl(*states, torch.zeros(3, dtype=torch.long))[0].mean())


def test_a_student_moves_to_one_teacher_and_is_kept_by_the_other(world, tmp_path):
    both, alone = tmp_path / "both", tmp_path / "alone"
    train_distill(stage(world, both, steps=24, save_every=24))
    only_text = [{"path": world["data"], "limit": 1}]
    train_distill(stage(world, alone, steps=24, save_every=24, global_batch_size=4, data=only_text))
    lines = log_of(both)
    assert {"kl", "kl/text", "kl/image", "reward", "completions/mean_length", "lr"} <= set(lines[0])
    assert lines[0]["kl/image"] == pytest.approx(0, abs=1e-6)  # its teacher is where it starts
    first, last = (sum(line["kl/text"] for line in part) / 4 for part in (lines[:4], lines[-4:]))
    assert last < 0.6 * first
    text, image = 0, 1
    start, teacher = world["student"], world["teacher"]
    assert divergence(world, both / "final", teacher, text) < 0.7 * divergence(world, start, teacher, text)
    moved = [divergence(world, folder / "final", start, image) for folder in (both, alone)]
    assert moved[0] < 0.5 * moved[1]
    # frozen groups are what they were; the files are a checkpoint like any other
    before, after = (load_file(Path(name) / "model.safetensors") for name in (start, both / "final"))
    assert before.keys() == after.keys()
    card = (both / "final/README.md").read_text()
    assert "train.py distill" in card and teacher in card
    models = [load(str(name), "float32")[0] for name in (start, both / "final")]
    changed = {
        group_of(name)
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"language", "head"}


@pytest.mark.parametrize(
    "changes", [{}, {"train": ["language", "vision", "vision_projector"], "estimator": "sampled"}, {"lora": {"r": 4}}]
)
def test_resumed_runs_equal_uninterrupted_ones(world, tmp_path, changes):
    train_distill(stage(world, tmp_path / "whole", **changes))
    train_distill(stage(world, tmp_path / "cut", **changes, steps=2))
    train_distill(stage(world, tmp_path / "cut", **changes, steps=4))
    file = "final/adapter_model.safetensors" if "lora" in changes else "final/model.safetensors"
    whole, cut = (load_file(tmp_path / run / file) for run in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    if "lora" in changes:
        assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)
    with pytest.raises(OmniInputError, match="other settings: teachers"):
        train_distill(stage(world, tmp_path / "cut", **changes, teachers={"default": world["student"]}))


def test_every_config_loads():
    for scale in ("nano", "30b"):
        files = sorted((ROOT / "configs" / scale / "rl").glob("*.yaml"))
        files = [file for file in files if yaml.safe_load(file.read_text())["stage"] == "distill"]
        assert len(files) == {"nano": 2, "30b": 1}[scale]  # nano: recover.yaml too
        for file in files:
            for line in file.read_text().splitlines():
                assert line.startswith(("#", "  ", "data:")) or " # " in line, f"{file}: {line}: no comment"
            args = load_arguments(DistillArguments, ["--config", str(file)])
            check_distill(args)
            check_arguments(args)


def test_wrong_settings_are_refused_before_anything_is_loaded(tmp_path):
    def refused(message, **changes):
        with pytest.raises(OmniInputError, match=message):
            train_distill(DistillArguments(output_dir=str(tmp_path / "no"), model="./none", **changes))

    refused("teachers is empty")
    refused("estimator is", teachers={"default": "a"}, estimator="k3")
    refused("must be a multiple of 3", teachers={"default": "a"}, rollouts=3, global_batch_size=4)
    refused("does not go through TRL", teachers={"default": "a"}, trl={"beta": 1})


def test_two_processes_train_like_one_and_the_curriculum_command_keeps_what_is_finished(world, tmp_path, capsys):
    """`train.py rl` runs the stage in two processes; its losses are those of one."""
    sys.path.insert(0, str(ROOT))
    import train

    train_distill(stage(world, tmp_path / "one", steps=2))
    config = tmp_path / "stage.yaml"
    values = stage(world, tmp_path / "two", steps=2).__dict__
    config.write_text(yaml.safe_dump({"stage": "distill"} | values))
    load_arguments(DistillArguments, ["--config", str(config)])  # the key `stage` is no argument
    launch = tmp_path / "two.yaml"
    launcher = yaml.safe_load((ROOT / "configs/accelerate/cpu_processes.yaml").read_text())
    launch.write_text(yaml.safe_dump(launcher | {"num_processes": 2, "mixed_precision": "no"}))
    command = [str(config), "--launch", str(launch), "--plot", str(tmp_path / "plot.png")]
    train.recipe(command)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["step"] for line in two] == [1, 2]
    for a, b in zip(one, two, strict=True):
        assert b["kl"] == pytest.approx(a["kl"], abs=1e-5) and b["reward"] == a["reward"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    shown = capsys.readouterr().out
    assert "| kl/text |" in shown and "| reward |" in shown and (tmp_path / "plot.png").is_file()
    train.recipe(command)
    assert "nothing to do" in capsys.readouterr().out
    config.write_text(yaml.safe_dump({"stage": "dream"} | values))
    with pytest.raises(SystemExit, match="stage is 'dream'"):
        train.recipe(command)
    assert subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True).returncode == 0
