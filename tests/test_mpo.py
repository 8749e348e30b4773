"""MPO: its loss against TRL's and by hand, shared media, the reference, resuming, freezing, two processes."""

import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F
from rl_tasks import (
    TowerCalls,
    kill_when,
    log_lines,
    prompt,
    save_policy,
    stage_values,
    two_processes,
    weights,
    write_media,
    write_rows,
)
from safetensors.torch import load_file
from transformers import Trainer
from trl import DPOTrainer

from modeling_omni.data import encode_row
from modeling_omni.media import OmniInputError
from modeling_omni.modeling_omni import OmniForConditionalGeneration
from modeling_omni.mpo import MPOArguments, collate_pairs, encode_pair, make_mpo_trainer, train_mpo
from modeling_omni.processing_omni import OmniProcessor
from modeling_omni.rl_training import MEDIA_TENSORS, answer_ids, open_stage
from modeling_omni.training import group_of, load_arguments

KINDS = ("image", "video", "audio", "text")
BETA = 0.3


def pair(kind: str, number: int) -> dict:
    thought = number % 2
    chosen = "a thought\n</think>\nred, I think" if thought else "red, I think"
    rejected = "another\n</think>\nno idea" if thought else "blue"
    return {"prompt": prompt(kind, number), "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mpo")
    save_policy(path / "start")
    write_media(path)
    write_rows(path / "pairs.jsonl", [pair(kind, number) for number in range(4) for kind in KINDS])
    return path


def arguments(folder, name, **changes) -> MPOArguments:
    values = stage_values(folder, name, "pairs.jsonl") | {"global_batch_size": 4, "micro_batch_size": 2, "beta": BETA}
    return MPOArguments(**values | changes)


def trainer_of(args: MPOArguments):
    trainer = make_mpo_trainer(args, open_stage(args))
    trainer.model.train()
    return trainer


def batch_of(folder, args, kinds=KINDS, swap=()) -> dict:
    """Pairs of the kinds; those in `swap` with the media of another."""
    processor = OmniProcessor.from_pretrained(args.model)
    rows = [pair(kind, number) for number, kind in enumerate(kinds)]
    for number in swap:
        rows[number]["prompt"] = prompt(kinds[number], number + 1)
    for row in rows:
        for part in row["prompt"][0]["content"]:
            if "path" in part:
                part["path"] = str(folder / part["path"])
    return collate_pairs([encode_pair(row, processor, args) for row in rows])


def disturb(model, seed=0):
    """Makes the policy another model than its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "language_model.layers" in name or "lm_head" in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def test_trl_has_the_hooks_that_are_used():
    hooks = {
        (DPOTrainer, "_compute_loss"): ["self", "model", "inputs", "return_outputs"],
        (DPOTrainer, "compute_ref_log_probs"): ["self", "model", "inputs"],
        (DPOTrainer, "_prepare_dataset"): ["self", "dataset", "processing_class", "args", "dataset_name"],
        (DPOTrainer, "_save_checkpoint"): ["self", "model", "trial"],
        (DPOTrainer, "_send_telemetry"): ["self"],
        (Trainer, "_load_from_checkpoint"): ["self", "resume_from_checkpoint", "model"],
        (Trainer, "_load_optimizer_and_scheduler"): ["self", "checkpoint"],
        (Trainer, "_load_rng_state"): ["self", "checkpoint"],
        (Trainer, "create_optimizer"): ["self", "model"],
        (Trainer, "log"): ["self", "logs", "start_time"],
    }
    for (owner, name), names in hooks.items():
        assert list(inspect.signature(getattr(owner, name)).parameters) == names, f"{owner.__name__}.{name} has changed"


def test_loss_without_shift_is_trls_own(folder):
    args = arguments(folder, "trl", reward_shift="off", sft_weight=0.5)
    trainer = trainer_of(args)
    disturb(trainer.model)
    batch = batch_of(folder, args)
    loss = trainer._compute_loss(trainer.model, batch, False)
    # TRL alone: the media twice, as inputs of both answers, through the towers of policy and reference
    plain = {name: value for name, value in batch.items() if name != "media"}
    media = [*batch["media"], *batch["media"]]
    for name in MEDIA_TENSORS:
        parts = [one[name] for one in media if name in one]
        if parts:
            plain[name] = torch.cat(parts)
    trainer.precompute_ref_logps = False
    expected = DPOTrainer._compute_loss(trainer, trainer.model, plain, False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    metrics = trainer._metrics["train"]
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen"):
        assert metrics[name][0] == pytest.approx(metrics[name][1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("sft_norm", ["token", "sequence"])
def test_loss_with_shift_by_hand_in_float64(folder, sft_norm):
    args = arguments(folder, sft_norm, sft_weight=0.7, sft_norm=sft_norm)
    trainer = trainer_of(args)
    disturb(trainer.model)
    trainer.shift["value"] = shift = 0.37
    batch = batch_of(folder, args)
    loss = trainer._compute_loss(trainer.model, dict(batch), False).item()

    def logps(trained):
        model = OmniForConditionalGeneration(trained.config).eval().requires_grad_(False)
        model.load_state_dict(trained.state_dict())
        model, rows = model.double(), []
        for row in range(len(batch["input_ids"])):
            one = {name: value[row : row + 1] for name, value in batch.items() if name != "media"}
            mask = one.pop("completion_mask")[0, 1:].bool()
            media = batch["media"][row % len(batch["media"])]
            tokens = model(**one, **media).logits[0, :-1].double().log_softmax(-1)
            rows.append(tokens.gather(1, one["input_ids"][0, 1:, None])[:, 0][mask])
        return rows

    policy, reference = logps(trainer.model), logps(trainer.ref_model)
    rewards = BETA * torch.stack([(p.sum() - r.sum()) for p, r in zip(policy, reference)])
    chosen, rejected = rewards.chunk(2)
    dpo = -F.logsigmoid(chosen - rejected).mean()
    bco = (-F.logsigmoid(chosen - shift) - F.logsigmoid(-(rejected - shift))).mean()
    own = policy[: len(policy) // 2]
    sft = -torch.cat(own).mean() if sft_norm == "token" else -torch.stack([row.mean() for row in own]).mean()
    expected = 0.8 * dpo + 0.2 * bco + 0.7 * sft
    assert abs(rewards).max() > 0.05
    assert loss == pytest.approx(expected.item(), rel=2e-6)
    metrics = trainer._metrics["train"]
    assert metrics["rewards/chosen"][0] == pytest.approx(chosen.mean().item(), abs=1e-4)
    # after the step the shift is the mean of all rewards, slowly
    assert trainer.shift["value"] == pytest.approx(0.99 * shift + 0.01 * rewards.mean().item(), abs=1e-5)


def test_shift_moves_once_per_optimizer_step(folder):
    trainer = trainer_of(arguments(folder, "shift", reward_shift="mean"))
    state = trainer.accelerator.gradient_state
    for mean, last in ((1.0, False), (3.0, True), (-2.0, True)):
        state._set_sync_gradients(last)
        trainer._update_shift(torch.tensor([mean - 1, mean + 1]))
        if not last:
            assert trainer.shift == {"value": 0.0, "steps": 0}
    state._set_sync_gradients(True)
    assert trainer.shift == {"value": 0.0, "steps": 2}  # of 2 and -2


def test_media_are_encoded_once_and_every_kind_is_seen(folder):
    args = arguments(folder, "seen", reward_shift="off")
    trainer = trainer_of(args)
    disturb(trainer.model)
    with torch.no_grad():
        with TowerCalls() as calls:
            loss = trainer._compute_loss(trainer.model, batch_of(folder, args), False).item()
        assert (calls.vision, calls.audio) == (2, 1)  # an image, a video, a sound: chosen, rejected and reference
        assert trainer._compute_loss(trainer.model, batch_of(folder, args), False).item() == loss
        for number in range(3):
            swapped = trainer._compute_loss(trainer.model, batch_of(folder, args, swap=[number]), False).item()
            assert swapped != loss, KINDS[number]
    trained = arguments(folder, "towers", train=["language", "vision", "vision_projector", "audio_projector"])
    trainer = trainer_of(trained)
    with TowerCalls() as calls:
        trainer._compute_loss(trainer.model, batch_of(folder, trained), False).backward()
    assert (calls.vision, calls.audio) == (4, 2)  # policy and reference have towers of their own now
    for parameter in trainer.media_params:
        assert parameter.grad is not None
    for name in ("rewards/chosen", "rewards/rejected"):
        assert trainer._metrics["train"][name] == [0.0]  # the reference is where the stage starts, to the bit


def test_features_that_do_not_fit_raise(folder):
    args = arguments(folder, "misfit")
    trainer = trainer_of(args)
    batch = batch_of(folder, args, kinds=["image"])
    features = trainer.encode(trainer.model, batch["media"][0])
    ids, types = batch["input_ids"][:1], batch["mm_token_type_ids"][:1]
    trainer.model(input_ids=ids, mm_token_type_ids=types, **features)
    with pytest.raises(OmniInputError, match="image features were given for"):
        short = {"image_features": features["image_features"][1:]}
        trainer.model(input_ids=ids, mm_token_type_ids=types, **short)
    with pytest.raises(OmniInputError, match="no image was given"):
        trainer.model(input_ids=ids, mm_token_type_ids=types)
    with pytest.raises(OmniInputError, match="mm_token_type_ids"):
        trainer.model(input_ids=ids, **features)


def test_answers_are_the_tokens_that_generation_writes(folder):
    processor = OmniProcessor.from_pretrained(folder / "start")
    for thought, text in (("", "red <think> <image>"), ("so it is", "blue")):
        turn = {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {})
        messages = [{"role": "user", "content": "What?"}]
        whole = encode_row({"messages": [*messages, turn]}, processor)
        start = processor.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=bool(thought), tokenize=True
        )["input_ids"][0]
        if thought:
            written = answer_ids(f"<think>\n{thought}\n</think>\n{text}<|im_end|>\n", processor, True)
            assert written == answer_ids(f"{thought}\n</think>\n{text}", processor, True)
            ids = whole["input_ids"][0].tolist()
            assert ids[: len(start) + len(written)] == start + written
    assert 18 not in answer_ids("<image>", processor, False)


def test_bad_rows_are_named_and_replaced(folder, tmp_path):
    good = [pair(kind, number) for number in range(3) for kind in ("image", "text")]
    bad = {
        "must be texts": {"prompt": "x", "chosen": "a"},
        "the same": {"prompt": "x", "chosen": "a", "rejected": "a"},
        "gone.png": {"prompt": [{"role": "user", "content": [{"type": "image", "path": "gone.png"}]}],
                     "chosen": "a", "rejected": "b"},
        "tokens; limit 5": {"prompt": "word " * 90, "chosen": "a", "rejected": "b"},
        "needs a 'prompt'": {"chosen": "a", "rejected": "b"},
    }  # fmt: skip
    write_media(tmp_path)
    data = write_rows(tmp_path / "rows.jsonl", [*good, *bad.values()])
    args = arguments(folder, "bad", data=data, row_tokens=60, steps=3)
    train_mpo(args)
    named = [json.loads(line)["reason"] for line in (folder / "bad/bad_rows.jsonl").read_text().splitlines()]
    assert len(named) == len(bad)
    for reason in bad:
        assert any(reason in one for one in named), reason
    assert len(log_lines(folder / "bad")) == 3
    data = write_rows(tmp_path / "none.jsonl", [bad["the same"]])
    with pytest.raises(OmniInputError, match="the same"):
        train_mpo(arguments(folder, "worse", data=data, steps=1))


def test_arguments(folder, tmp_path):
    file = tmp_path / "mpo.yaml"
    file.write_text("output_dir: x\nbetta: 1\n")
    with pytest.raises(ValueError, match="betta"):
        load_arguments(MPOArguments, ["--config", str(file)])
    for changes, words in (
        ({"trl": {"beta": 1.0}}, "set by other keys"),
        ({"trl": {"no_such": 1}}, "no_such"),
        ({"global_batch_size": 3}, "multiple"),
        ({"reward_shift": "late"}, "reward_shift"),
        ({"train": ["routers"]}, "routers"),
        ({"preference_weight": 0, "quality_weight": 0}, "no loss"),
    ):
        with pytest.raises(OmniInputError, match=words):
            train_mpo(arguments(folder, "never", **changes))
    trainer = trainer_of(arguments(folder, "usable", trl={"adam_beta1": 0.5, "optim": "adafactor"}))
    assert type(trainer.create_optimizer()).__name__ == "Adafactor"


LORA = {"presets": ["attention_mamba"], "r": 4}


@pytest.mark.parametrize("lora", [None, LORA], ids=["weights", "lora"])
def test_resumes_after_a_kill_and_freezes_to_the_bit(folder, lora):
    kind = "lora" if lora else "weights"
    values = {"lora": lora, "train": ["language"], "weight_decay": 0.1, "schedule": "cosine", "warmup": 2}
    values |= {"learning_rate": 1e-2 if lora else 1e-3, "reward_shift_decay": 0.5}
    train_mpo(arguments(folder, f"whole-{kind}", **values))
    args = arguments(folder, f"killed-{kind}", **values)
    kill_when(folder / f"killed-{kind}/step-2", train_mpo, args)
    train_mpo(args)
    whole, killed = weights(folder / f"whole-{kind}/final"), weights(folder / f"killed-{kind}/final")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    before, after = (log_lines(folder / f"{name}-{kind}", "reward_shift") for name in ("whole", "killed"))
    assert before[0]["rewards/chosen"] == before[0]["rewards/rejected"] == 0.0
    assert [line["loss"] for line in before] == [line["loss"] for line in after if line["step"] <= 4][-4:]
    assert before[-1]["reward_shift"] == after[-1]["reward_shift"] != 0.0
    if lora:
        return
    card = (folder / "whole-weights/final/README.md").read_text()
    assert "`train.py mpo`: 4 steps of 4 pairs" in card
    paths = (folder / "start", folder / "whole-weights/final")
    start, final = (OmniForConditionalGeneration.from_pretrained(path) for path in paths)
    assert final.generation_config.to_dict() == start.generation_config.to_dict()
    changed = {}
    for (name, old), new in zip(start.state_dict().items(), final.state_dict().values()):
        changed.setdefault(group_of(name), []).append(not torch.equal(old, new))
    assert [group for group, ones in changed.items() if any(ones)] == ["language"]
    moments = load_file(folder / "whole-weights/step-4/optimizer.safetensors")
    trained = sum(p.numel() for name, p in start.named_parameters() if group_of(name) == "language")
    assert sum(value.numel() for name, value in moments.items() if name.endswith("exp_avg")) == trained


def test_recomputed_activations_change_nothing(folder):
    values = {"train": ["language", "vision", "vision_projector", "audio_projector"], "steps": 2}
    for name in ("kept", "recomputed"):
        train_mpo(arguments(folder, name, recompute=name == "recomputed", **values))
    kept, recomputed = weights(folder / "kept/final"), weights(folder / "recomputed/final")
    for name in kept:
        torch.testing.assert_close(kept[name], recomputed[name], rtol=1e-5, atol=1e-6)


def test_two_processes_have_the_loss_of_one(folder):
    values = {"train": ["language", "head", "audio_projector"], "steps": 3, "save_every": 3}
    train_mpo(arguments(folder, "one", **values))
    args = arguments(folder, "two", **values)
    two_processes(train_mpo, args)
    one, two = (log_lines(folder / name) for name in ("one", "two"))
    for name in ("loss", "rewards/chosen", "rewards/margins", "reward_shift", "grad_norm"):
        for a, b in zip(one, two, strict=True):
            assert math.isclose(a[name], b[name], rel_tol=1e-4, abs_tol=2e-5), (name, a["step"])
