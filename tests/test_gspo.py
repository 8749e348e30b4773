"""GSPO: its loss against the paper's equations, ratios of 1, shared media, rewards that rise, guards, resuming."""

import inspect
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rl_tasks import (
    COLOURS,
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
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from modeling_omni.checkpoint import released_tensors
from modeling_omni.data_adapters import adapt_prompt
from modeling_omni.gspo import (
    GSPOArguments,
    GSPOTrainer,
    check_gspo,
    encode_row,
    make_gspo_trainer,
    released_names,
    reward_of,
    train_gspo,
)
from modeling_omni.inference import MEDIA_TOKENS
from modeling_omni.lora import base_name
from modeling_omni.media import OmniInputError
from modeling_omni.modeling_omni import OmniForConditionalGeneration
from modeling_omni.mpo import MPOArguments, check_mpo
from modeling_omni.processing_omni import OmniProcessor
from modeling_omni.rl_training import answer_ids, check_arguments, decoded, encode_prompt, open_stage
from modeling_omni.training import group_of, load_arguments

ROOT = Path(__file__).parents[1]

KINDS = ("image", "video", "audio", "text")


def row(kind: str, number: int, **changes) -> dict:
    answer = list(COLOURS)[number % 2]
    values = {"prompt": prompt(kind, number), "answer": answer, "verifier": "string_match"}
    return values | {"prompt_opened_think": False} | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy that answers every prompt with "red" or "blue", whatever is in it."""
    path = tmp_path_factory.mktemp("gspo")
    start = save_policy(path / "random")
    write_media(path)
    write_rows(path / "mixed.jsonl", [row(kind, number) for number in range(4) for kind in KINDS])
    write_rows(path / "images.jsonl", [row("image", number % 2) for number in range(8)])
    model = OmniForConditionalGeneration.from_pretrained(start)
    processor = OmniProcessor.from_pretrained(start)
    args = GSPOArguments(output_dir="")
    optimizer = torch.optim.AdamW([*model.model.language_model.parameters(), *model.lm_head.parameters()], lr=3e-3)
    ids, labels = [], []
    question = {"prompt": [{"role": "user", "content": " What is it?"}]}
    start_ids = encode_prompt(question, processor, args, False, 999)["ids"]
    for answer in ("red", "blue"):
        written = answer_ids(answer, processor, False)
        ids.append(torch.tensor(start_ids + written))
        labels.append(torch.tensor([-100] * len(start_ids) + written))
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    for _ in range(60):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, skip_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path / "start")
    processor.save_pretrained(path / "start")
    return path


def arguments(folder, name, **changes) -> GSPOArguments:
    values = stage_values(folder, name, "mixed.jsonl") | {"rollouts": 4, "global_batch_size": 16, "micro_batch_size": 4}
    values |= {"updates": 2, "prompt_tokens": 200, "completion_tokens": 6, "reward": "text"}
    return GSPOArguments(**values | changes)


def trainer_of(args: GSPOArguments, kind=None) -> GSPOTrainer:
    trainer = make_gspo_trainer(args, open_stage(args))
    trainer.__class__ = kind or GSPOTrainer
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def sampled(trainer, number: int = 0) -> dict:
    """One batch of answers, as the trainer gets them, in order."""
    size = trainer.args.generation_batch_size // trainer.num_generations
    inputs = [
        {"place": place} for place in range(number * size, (number + 1) * size) for _ in range(trainer.num_generations)
    ]
    return trainer._generate_and_score_completions(inputs)


def part(batch: dict, start: int, stop: int) -> dict:
    return {name: value[start:stop] if value.dim() else value for name, value in batch.items()}


def test_trl_has_the_hooks_that_are_used():
    hooks = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_tokenize_prompts": ["self", "prompts"],
        "_generate_single_turn": [
            "self",
            "prompt_ids",
            "images",
            "multimodal_fields",
            "num_generations",
            "has_tool_images",
        ],
        "_compute_loss": ["self", "model", "inputs"],
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    }
    for name, names in hooks.items():
        signature = inspect.signature(inspect.unwrap(getattr(GRPOTrainer, name)))
        assert list(signature.parameters) == names, f"GRPOTrainer.{name} has changed"
    names = list(inspect.signature(inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)).parameters)
    assert names[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    ignore = torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    assert list(inspect.signature(ignore).parameters) == ["module", "params_and_buffers_to_ignore"]


def test_first_ratio_is_one_and_every_kind_is_seen(folder):
    trainer = trainer_of(arguments(folder, "ratio", global_batch_size=64, rollouts=4))
    with TowerCalls() as calls:
        batch = sampled(trainer)
    kinds = {tuple(sorted(p["media"])) for p in trainer.prompts}
    assert len(kinds) == 4 and len(trainer.prompts) == 16
    assert (calls.vision, calls.audio) == (8, 4)  # once a prompt, for 64 answers, sampled and scored
    with TowerCalls() as calls:
        rows = [part(batch, start, start + 4) for start in range(0, 64, 4)]
        for one in rows:
            trainer.numbers = one["prompt_number"].tolist()
            ids = torch.cat([one["prompt_ids"], one["completion_ids"]], 1)
            mask = torch.cat([one["prompt_mask"], one["completion_mask"]], 1)
            logps = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, one["completion_ids"].shape[1]
            )[0]
            difference = (logps - one["old_per_token_logps"]) * one["completion_mask"]
            assert torch.equal(difference, torch.zeros_like(difference))
            trainer._compute_loss(trainer.model, one)
    assert (calls.vision, calls.audio) == (0, 0)
    assert set(trainer._metrics["train"]["clip_ratio/region_mean"]) == {0.0}
    # what a prompt's features are decides its answers' log-probabilities
    for number, one in enumerate(trainer.prompts):
        if not one["media"]:
            continue
        same = next(i for i, p in enumerate(trainer.prompts) if i != number and p["types"] == one["types"]
                    and p["shown"] != one["shown"])  # fmt: skip
        answers = part(batch, number * 4, number * 4 + 4)
        ids = torch.cat([answers["prompt_ids"], answers["completion_ids"]], 1)
        mask = torch.cat([answers["prompt_mask"], answers["completion_mask"]], 1)
        found = []
        for numbers in ([number] * 4, [same] * 4):
            trainer.numbers = numbers
            found.append(
                trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, mask, answers["completion_ids"].shape[1]
                )[0]
            )
        assert not torch.equal(*found), one["shown"]


def test_sampling_in_pieces_is_the_same(folder):
    found = []
    for size in (0, 5):
        args = arguments(folder, "pieces", model=str(folder / "random"), updates=1, sampling_batch_size=size, top_k=99)
        trainer = trainer_of(args)
        trainer.stage_args.max_starved = 9
        found.append(sampled(trainer)["completion_ids"])
    assert torch.equal(*found) and len(found[0].unique(dim=0)) == 16
    special = trainer.processing_class.codec.special_ids
    assert not set(found[0].unique().tolist()) & {special[token] for token in MEDIA_TOKENS}


def test_advantages_are_of_the_rewards_of_a_prompts_answers(folder):
    trainer = trainer_of(arguments(folder, "advantages"))
    batch = sampled(trainer)
    groups = {}
    for number, ids, mask in zip(batch["prompt_number"].tolist(), batch["completion_ids"], batch["completion_mask"]):
        text = decoded(ids[: int(mask.sum()) or None].tolist(), trainer.processing_class)
        reward = reward_of(trainer.prompts[number]["row"], text, "text")
        groups.setdefault(number, []).append(reward)
    rewards = torch.tensor([groups[number] for number in range(4)])
    assert rewards.mean(1).unique().numel() > 1 and (rewards.std(1) > 0).any()
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"], expected.flatten())


def test_prompts_are_read_once_with_the_same_answers_and_gradients(folder):
    found = []
    for shared in (True, False):
        args = arguments(
            folder, f"shared{shared}", model=str(folder / "random"), top_k=1, updates=1, micro_batch_size=16,
            share_prompts=shared, train=["language", "head", "audio_projector"],
        )  # fmt: skip
        trainer, tokens = trainer_of(args), []
        language = trainer.model.model.language_model
        if not shared:  # the option is of training; sampling always shares
            whole = trainer.model.generate
            trainer.model.generate = lambda *a, prompt_rows, f=whole, **options: f(*a, **options)
        watch = language.register_forward_pre_hook(lambda _, given, to=tokens: to.append(given[0].shape[:2].numel()))
        batch = sampled(trainer)
        sampling, tokens[:] = sum(tokens), []
        batch["advantages"] = torch.linspace(-1, 1, 16)
        loss = trainer._compute_loss(trainer.model, batch)
        watch.remove()
        trainer.accelerator.backward(loss)
        trainer._backward_media()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        found.append((batch["completion_ids"], gradients, sampling, sum(tokens)))
    (ids, once, sampling, training), (plain_ids, plain, more, most) = found
    assert torch.equal(ids, plain_ids)
    assert sampling < more / 2 and training < most / 2
    assert once.keys() == plain.keys() and any("conv1d" in name for name in once)
    for name in once:
        torch.testing.assert_close(once[name], plain[name], rtol=1e-4, atol=1e-7)


def test_loss_is_the_papers_in_float64(folder):
    trainer = trainer_of(arguments(folder, "loss", epsilon=0.01, epsilon_high=0.02))
    batch = sampled(trainer)
    generator = torch.Generator().manual_seed(0)
    batch["advantages"] = torch.randn(16, generator=generator)
    with torch.no_grad():  # the policy moves away from the one that sampled
        for name, parameter in trainer.model.named_parameters():
            if "language_model.layers" in name and parameter.dim() > 1:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    loss = trainer._compute_loss(trainer.model, batch).item()
    model = OmniForConditionalGeneration(trainer.model.config).eval().requires_grad_(False)
    model.load_state_dict(trainer.model.state_dict())
    model, terms, clipped = model.double(), [], 0
    for i in range(16):
        tokens = batch["completion_mask"][i].bool()
        given, media = trainer.prompts[batch["prompt_number"][i]], {}
        ids = torch.tensor([given["ids"] + batch["completion_ids"][i][tokens].tolist()])
        if given["media"]:
            media = {**given["media"], "mm_token_type_ids": torch.tensor([given["types"]])}
        count = int(tokens.sum())
        if not count:  # cut off
            terms.append(torch.tensor(0.0).double())
            continue
        logits = model(input_ids=ids, **media).logits[0, -count - 1 : -1].double().log_softmax(-1)
        logps = logits.gather(1, ids[0, -count:, None])[:, 0]
        ratio = (logps - batch["old_per_token_logps"][i][tokens].double()).mean().exp()
        advantage = batch["advantages"][i].double()
        terms.append(-torch.min(ratio * advantage, ratio.clamp(0.99, 1.02) * advantage))
        clipped += bool(terms[-1] != -ratio * advantage)
    assert 0 < clipped < 16
    assert loss == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5, abs=1e-6)


def test_cut_off_answers_do_not_count(folder):
    trainer = trainer_of(arguments(folder, "cut", updates=1, save_every=2, completion_tokens=1))
    with pytest.raises(OmniInputError, match="cut off at 1 tokens"):
        trainer.stage_args.max_starved = 1
        sampled(trainer)
    trainer.stage_args.max_starved = 9
    batch = sampled(trainer)
    assert not batch["completion_mask"].any()
    assert trainer._compute_loss(trainer.model, batch).item() == 0.0


class PerMicroBatch(GSPOTrainer):
    """The plain way: towers run for every micro-batch, inside its graph."""

    in_engine = True


def test_towers_run_once_per_step_with_the_same_gradient(folder):
    found = []
    for kind in (GSPOTrainer, PerMicroBatch):
        args = arguments(
            folder, kind.__name__, updates=1, train=["language", "vision", "vision_projector", "audio_projector"]
        )
        trainer = trainer_of(args, kind)
        trainer.create_optimizer()
        batch = sampled(trainer)
        batch["advantages"] = torch.linspace(-1, 1, 16)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        batch = {name: value[order] if value.dim() else value for name, value in batch.items()}
        trainer._buffered_inputs = [part(batch, start, start + 4) for start in range(0, 16, 4)]
        trainer.current_gradient_accumulation_steps = 4
        with TowerCalls() as calls:
            for step in range(4):
                trainer._step = step
                trainer.accelerator.gradient_state._set_sync_gradients(step == 3)
                trainer._prepare_inputs = lambda batch: batch
                trainer.training_step(trainer.model, trainer._buffered_inputs[step], None)
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        found.append((gradients, calls.vision, calls.audio))
    (once, vision, audio), (plain, more, most) = found
    assert (vision, audio) == (2, 1) and more > vision
    assert once.keys() == plain.keys() and any("vision_tower" in name for name in once)
    for name in once:
        torch.testing.assert_close(once[name], plain[name], rtol=1e-4, atol=1e-6)


def test_image_reward_rises(folder):
    args = arguments(
        folder, "rises", data=[{"path": str(folder / "images.jsonl")}], steps=30, save_every=30, rollouts=8,
        global_batch_size=32, micro_batch_size=16, updates=1, learning_rate=2e-3, log_samples=1,
    )  # fmt: skip
    train_gspo(args)
    lines = log_lines(folder / "rises", "reward")
    rewards = [line["reward"] for line in lines]
    assert len(rewards) == 30
    first, last = sum(rewards[:8]) / 8, sum(rewards[-8:]) / 8
    assert first < 0.75 and last > first + 0.15, (first, last)
    assert last > 0.6, last  # one that does not look ends at one half
    line = lines[0]
    assert line["reward/string_match"] == pytest.approx(line["reward"], abs=1e-5)
    for name in ("clip_ratio/region_mean", "entropy", "completions/mean_length", "completions/clipped_ratio"):
        assert name in line
    sample = line["samples"][0]
    assert sample["media"][0].endswith(".png") and sample["answer"] in COLOURS and "completion" in sample
    assert EventAccumulator(str(folder / "rises/tensorboard")).Reload().Tags()["images"] == ["samples"]
    assert "`train.py gspo`: 30 steps" in (folder / "rises/final/README.md").read_text()


def test_resumes_after_a_kill_and_freezes_to_the_bit(folder):
    values = {"train": ["language", "head"], "steps": 6, "weight_decay": 0.1}  # Text-RL
    train_gspo(arguments(folder, "whole", **values))
    args = arguments(folder, "killed", **values)
    kill_when(folder / "killed/step-2", train_gspo, args)
    train_gspo(args)
    whole, killed = weights(folder / "whole/final"), weights(folder / "killed/final")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    start, final = (OmniForConditionalGeneration.from_pretrained(folder / path) for path in ("start", "whole/final"))
    changed = {}
    for (name, old), new in zip(start.state_dict().items(), final.state_dict().values()):
        changed.setdefault(group_of(name), []).append(not torch.equal(old, new))
    assert {group for group, ones in changed.items() if any(ones)} == {"language", "head"}


def test_adapters_learn_and_their_base_stays(folder):
    lora = {"presets": ["attention_mamba", "projectors"], "r": 4}
    trainer = trainer_of(
        arguments(folder, "lora", lora=lora, updates=1, steps=2, data=[{"path": str(folder / "images.jsonl")}])
    )
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.any()}
    assert any("mixer" in name for name in moved) and any("vision_projector" in name for name in moved)
    start = OmniForConditionalGeneration.from_pretrained(folder / "start").state_dict()
    base = {base_name(name): p for name, p in trainer.model.named_parameters() if "lora_" not in name}
    assert len(base) > 100
    for name, parameter in base.items():
        assert torch.equal(parameter, start[name]), name


def test_recomputed_activations_change_nothing(folder):
    values = {"train": ["language", "vision_projector"], "steps": 2, "updates": 1}
    for name in ("kept", "recomputed"):
        train_gspo(arguments(folder, name, recompute=name == "recomputed", share_prompts=False, **values))
    assert log_lines(folder / "kept")[0]["grad_norm"] > 0
    kept, recomputed = weights(folder / "kept/final"), weights(folder / "recomputed/final")
    for name in kept:
        torch.testing.assert_close(kept[name], recomputed[name], rtol=1e-5, atol=1e-6)


def test_two_processes_have_the_answers_and_the_loss_of_one(folder):
    """Every step is on all answers sampled at a time, since each process shuffles its own."""
    values = {"train": ["language", "vision_projector", "audio_projector"], "updates": 1, "micro_batch_size": 2}
    train_gspo(arguments(folder, "one", **values))
    two_processes(train_gspo, arguments(folder, "two", **values))
    one, two = (log_lines(folder / name) for name in ("one", "two"))
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert a["samples"] == b["samples"], a["step"]
        for name in ("loss", "reward", "grad_norm", "completions/mean_length"):
            assert math.isclose(a[name], b[name], rel_tol=1e-3, abs_tol=2e-5), (name, a["step"])
    assert all(line["grad_norm"] > 0 for line in one)
    one, two = weights(folder / "one/step-4"), weights(folder / "two/step-4")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-4)


def test_guards(folder):
    for changes, words in (
        ({"rollouts": 3}, "whole groups"),
        ({"rollouts": 1}, "whole groups"),
        ({"updates": 3}, "divide"),
        ({"save_every": 3}, "multiples of 2"),
        ({"steps": 5}, "multiples of 2"),
        ({"global_batch_size": 6}, "multiple of 4"),
        ({"reward": "good"}, "reward"),
        ({"trl": {"epsilon": 1}}, "set by other keys"),
        ({"trl": {"log_completions": True}}, "goes past"),
        ({"trl": {"use_transformers_continuous_batching": True}}, "goes past"),
        ({"trl": {"min_p": 0.1}}, "goes past"),
        ({"trl": {"use_vllm": True}, "train": ["language", "vision"]}, "would not notice"),
        ({"data": [{"path": str(folder / "mixed.jsonl"), "limit": 3}]}, "3 rows, but 4 prompts"),
        ({"data": [{"path": str(folder / "mixed.jsonl"), "streaming": True}]}, "streaming"),
    ):
        with pytest.raises(OmniInputError, match=words):
            train_gspo(arguments(folder, "never", **changes))
    data = write_rows(folder / "hopeless.jsonl", [row("text", n, answer="nobody says this") for n in range(8)])
    with pytest.raises(OmniInputError, match="no group differ .* 2 time"):
        train_gspo(arguments(folder, "starved", data=data, max_starved=2, updates=1))


@pytest.mark.parametrize("scale,processes", [("nano", 1), ("30b", 8)])
def test_every_config_loads(scale, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    stages = {}
    for file in sorted((ROOT / "configs" / scale / "rl").glob("*.yaml")):
        text = file.read_text()
        kind = yaml.safe_load(text)["stage"]
        if kind not in ("mpo", "gspo"):
            continue
        for before, line in zip(["", *text.splitlines()], text.splitlines()):
            commented = not line or line.startswith(("#", "  ", "data:")) or " # " in line or before.startswith("#")
            assert commented, f"{file}: {line}: no comment"
        cls, check = {"mpo": (MPOArguments, check_mpo), "gspo": (GSPOArguments, check_gspo)}[kind]
        args = load_arguments(cls, ["--config", str(file)])
        check(args)
        check_arguments(args)
        assert "router" not in args.train
        stages[file.stem] = args
    order = ["mpo", "text_rl_1", "image_rl", "omni_rl", "text_rl_2"]
    assert set(order) <= set(stages)
    for before, after in zip(order, order[1:]):
        assert stages[after].model == stages[before].output_dir + "/final"
    for name in ("text_rl_1", "text_rl_2"):
        assert stages[name].train == ["language", "head"]


def test_rewards(folder):
    gold = row("text", 0)
    assert reward_of(gold, "Red.", "text") == 1.0 and reward_of(gold, "blue", "text") == 0.0
    thinking = gold | {"prompt_opened_think": True}
    assert reward_of(thinking, "hm</think>\nred", "text") == 1.0
    assert reward_of(thinking, "red", "text") == 0.0  # thinking that never ends
    whole = "hm\n</think>\n\\boxed{red}<|im_end|>"
    assert reward_of(thinking, whole, "format") == 1.0 and reward_of(thinking, whole, "answer") == 1.0
    assert reward_of(thinking, whole.replace("red", "blue"), "format") == pytest.approx(0.1)
    several = thinking | {"answer": ["green", "red"]}
    assert reward_of(several, whole, "format") == 1.0


def test_vllm_would_get_the_tensors_that_are_saved_and_pictures_alone(folder):
    trainer = trainer_of(arguments(folder, "released", model=str(folder / "random")))
    model, saved = trainer.model, load_file(folder / "random/model.safetensors")
    generation = object.__new__(VLLMGeneration)  # TRL's own, without an engine
    generation.model, generation._dist = model, trainer._dist
    found = dict(released_names(generation._iter_named_params)())
    assert set(found) <= set(saved) and len(found) > 100
    for name, tensor in found.items():
        assert torch.equal(tensor, saved[name]), name
    missing = set(saved) - set(found) - {n for b, _ in model.named_buffers() for n, _ in released_tensors(b, _)}
    assert not missing, json.dumps(sorted(missing))
    args = arguments(folder, "released", trl={"use_vllm": True})
    for kind, refused in zip(KINDS, (False, True, True, False)):
        one = adapt_prompt(row(kind, 0), folder=folder)
        if refused:
            with pytest.raises(OmniInputError, match="images only"):
                encode_row(one, trainer.processing_class, args)
        else:
            assert len(encode_row(one, trainer.processing_class, args)["images"]) == (kind == "image")


def test_curriculum_of_pairs_and_rewards_is_one_command(folder, capsys):
    """`train.py rl`: MPO, then GSPO from where it ended."""
    sys.path.insert(0, str(ROOT))
    import train

    pairs = [row("text", n, chosen="red", rejected="blue") for n in range(4)]
    write_rows(folder / "pairs.jsonl", pairs)
    common = {"steps": 2, "save_every": 2, "bf16": False, "learning_rate": 1e-3}
    mpo = {"stage": "mpo", "model": str(folder / "start"), "output_dir": str(folder / "rl/mpo"),
           "data": [{"path": str(folder / "pairs.jsonl")}], "global_batch_size": 2} | common  # fmt: skip
    gspo = {"stage": "gspo"} | vars(arguments(folder, "rl/gspo", model=str(folder / "rl/mpo/final"), **common))
    files = []
    for values in (mpo, gspo):
        files.append(folder / f"{values['stage']}.yaml")
        files[-1].write_text(yaml.safe_dump(values))
    train.recipe([str(file) for file in files])
    assert "| reward |" in capsys.readouterr().out
    start, middle, end = (weights(folder / name) for name in ("start", "rl/mpo/final", "rl/gspo/final"))
    head = "language_model.lm_head.weight"
    assert not torch.equal(start[head], middle[head]) and not torch.equal(middle[head], end[head])
    train.recipe([str(file) for file in files])
    shown = capsys.readouterr().out
    assert shown.count("nothing to do") == 2 and "WARNING" not in shown
    files[0].write_text(yaml.safe_dump(mpo | {"beta": 0.5}))  # MPO is to be another, and ...
    save_file(middle | {head: middle[head] + 1}, folder / "rl/mpo/final/model.safetensors")  # ... was another
    train.recipe([str(file) for file in files])
    shown = capsys.readouterr().out
    assert shown.count("nothing to do") == 2 and "rl/mpo was made before a change of config;" in shown
    assert f"rl/gspo was made before a change of weights of {folder / 'rl/mpo/final'};" in shown
