"""On-policy distillation from a teacher per domain (Nemotron-Cascade 2): recovers what later stages have lost.

The student answers prompts; on its own answers the teacher of the prompt's domain says how likely every token was, and
the loss is the reverse KL divergence per token, KL(student || teacher), the mean over all tokens of a step. Answers are
sampled once per step, so the student is always on its own policy. Two estimators of the divergence at a position:

    full      the sum over the vocabulary: exact for the next token, and the default, as the teacher is at hand
    sampled   the sampled token alone: gradient (log p(y) - log q(y)) grad log p(y), unbiased, p the student; all that a
              teacher allows which tells nothing but log-probabilities. Its variance is much larger.

Both leave out how the student's choice changes later positions, as on-policy distillation does. A prompt's media run
once through the towers of the student and once through its teacher's, for all its answers; where the student's towers
train, once more with gradients. Sampling is a function of seed, step and prompt (rollouts.py), not of the number of
processes: several of them train like one. ZeRO-3 is not supported.

A row is {"prompt"} with optional "prompt_opened_think", "id", "source", "group" and, for the reward in the log,
"answer", "verifier", "args".

Shape legend: N tokens, V vocabulary, D hidden size, B answers, S prompt tokens, T answer tokens.
"""

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from . import distributed
from .checkpointing import load_optimizers, write_checkpoint
from .data import hashed
from .distributed import bare_model
from .filtering import grade, group_of
from .media import OmniInputError
from .modeling_language import LOSS_CHUNK
from .packing import join_media
from .reporting import append_line
from .rl_training import (
    PromptRows,
    RLArguments,
    encode_media,
    encode_prompt,
    load_policy,
    media_params,
    open_stage,
    reduce_gradients,
    run_stage,
    world_size,
)
from .rollouts import answer_ends, padded_prompts, sample_ids
from .training import _key, cosine_factor, parameter_groups

ESTIMATORS = ("full", "sampled")


@dataclass
class DistillArguments(RLArguments):
    """Every key of a distillation stage's YAML file."""

    teachers: dict[str, str] = _key({}, "domain -> checkpoint; a row's domain is its source, else its group (text, "
                                    "image, video, omni, asr, audio_qa), else default")  # fmt: skip
    estimator: str = _key("full", "of the divergence at a position: full (vocabulary) or sampled (one token)")
    prompt_tokens: int = _key(4096, "tokens of a prompt at most; longer rows are left out")
    completion_tokens: int = _key(1024, "tokens of an answer at most; answers cut off there count like others")
    rollouts: int = _key(1, "answers to a prompt")
    global_batch_size: int = _key(128, "answers of a step over all processes")
    micro_batch_size: int = _key(1, "prompts sampled and trained on at a time")
    temperature: float = _key(1.0, "of sampling")
    top_p: float = _key(1.0, "share of probability that is sampled from")
    reward: str = _key("format", "what is graded for the log, where rows have verifiers: format, answer or text")
    log_samples: int = _key(2, "sampled answers in every log line")


# ---- loss ----


def reverse_kl(
    student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, estimator: str = "full"
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(student || teacher) of the next token.

    Args:
        student, teacher: logits [N, V] (the teacher's without gradient). tokens: [N] int64, what the student sampled.
        estimator: one of ESTIMATORS.

    Returns:
        a loss [N] float32 whose gradient is that of the divergence (or an unbiased estimate), and the divergence or its
        estimate [N], detached.
    """
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if estimator == "full":
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        return divergence, divergence.detach()
    log_p, log_q = (log.gather(-1, tokens[:, None]).squeeze(-1) for log in (log_p, log_q))
    divergence = (log_p - log_q).detach()
    return divergence * log_p, divergence


def chunked_reverse_kl(
    states: torch.Tensor,
    head: nn.Module,
    teacher_states: torch.Tensor,
    teacher_head: nn.Module,
    tokens: torch.Tensor,
    estimator: str = "full",
    chunk: int = LOSS_CHUNK,
) -> torch.Tensor:
    """Sums of `reverse_kl`'s loss and divergence over all tokens, [2]; logits exist for `chunk` tokens at a time.

    Args:
        states, teacher_states: final hidden states [N, D] and [N, D'] that predict `tokens` [N].
    """

    def sums(states, teacher_states, tokens):
        with torch.no_grad():
            teacher = teacher_head(teacher_states)
        loss, divergence = reverse_kl(head(states), teacher, tokens, estimator)
        return torch.stack([loss.sum(), divergence.sum()])

    total = torch.zeros(2, device=states.device)
    for part in zip(states.split(chunk), teacher_states.split(chunk), tokens.split(chunk)):
        total = total + (
            checkpoint(sums, *part, use_reentrant=False) if torch.is_grad_enabled() else sums(*part)
        )  # fmt: skip
    return total


def answer_states(
    model, prompts: list[dict], features: list[dict], answers: list[list[int]], pad_id: int
) -> torch.Tensor:
    """Final hidden states that predict the answers' tokens, [N, D], answer after answer.

    Args:
        model: `OmniForConditionalGeneration`. prompts, features: P, of each n = len(answers) / P consecutive answers.
    """
    n = len(answers) // len(prompts)
    places = [i for i in range(len(prompts)) for _ in range(n)]
    batch = padded_prompts([prompts[i] for i in places], pad_id, model.device)
    width, longest = batch["input_ids"].shape[1], max(map(len, answers))
    lengths = torch.tensor([len(answer) for answer in answers], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths[:, None]
    ids = torch.tensor([answer + [pad_id] * (longest - len(answer)) for answer in answers], device=model.device)
    batch["input_ids"] = torch.cat([batch["input_ids"], ids], 1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], mask.long()], 1)
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = F.pad(batch["mm_token_type_ids"], (0, longest))
    hidden = model.model(**batch, **join_media([features[i] for i in places]), use_cache=False).last_hidden_state
    return hidden[:, width - 1 : -1][mask]


# ---- rows ----


def domain_of(row: dict, teachers: dict[str, str]) -> str:
    """The domain of a row: the first of its source, its group and "default" that has a teacher.

    Raises:
        OmniInputError: none has.
    """
    names = [row.get("source"), group_of({"verifier": "string_match"} | row), "default"]
    found = next((name for name in names if name in teachers), None)
    if found is None:
        raise OmniInputError(f"no teacher for source {names[0]!r} or group {names[1]!r}; teachers: {sorted(teachers)}")
    return found


# ---- training ----


class DistillTrainer:
    """The loop of a stage, with what `run_stage` asks of a trainer."""

    def __init__(self, args: DistillArguments, stage, accelerator):
        self.args, self.stage, self.accelerator = args, stage, accelerator
        self.model = self.model_wrapped = stage.model.to(accelerator.device)
        groups = parameter_groups(self.model, args)
        self.peaks = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, args.adam_beta2))
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.state = SimpleNamespace(global_step=stage.saved["step"])
        if stage.resumed:
            load_optimizers([self.optimizer], stage.resumed / "optimizer.safetensors")
        folders = dict.fromkeys(args.teachers.values())  # a folder that teaches several domains is loaded once
        loaded = {name: load_policy(name, args).eval().requires_grad_(False) for name in folders}
        self.teachers = {domain: loaded[name].to(accelerator.device) for domain, name in args.teachers.items()}
        vocabulary = self.policy.config.llm_config.vocab_size
        for domain, teacher in self.teachers.items():
            if teacher.config.llm_config.vocab_size != vocabulary:
                raise OmniInputError(f"the teacher of {domain!r} has another vocabulary than the student")
        self.pad_id = stage.processor.tokenizer.pad_token_id or 0
        self.rows = PromptRows(args, self._encode_row, stage.folder / "bad_rows.jsonl")

    @property
    def policy(self):
        return bare_model(self.model)

    def _encode_row(self, row: dict) -> dict:
        thinking = row.get("prompt_opened_think", True)
        prompt = encode_prompt(row, self.stage.processor, self.args, thinking, self.args.prompt_tokens)
        return prompt | {"row": row, "domain": domain_of(row, self.args.teachers)}

    def autocast(self):
        device, wanted = self.accelerator.device, self.args.bf16
        wanted = device.type == "cuda" if wanted is None else wanted
        return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()

    def factor(self, step: int) -> float:
        """Rate of a step as a share of the peak."""
        args = self.args
        warmup = args.warmup if args.warmup >= 1 else args.warmup * args.steps
        if args.schedule == "cosine":
            return cosine_factor(step, args.steps, warmup / args.steps, args.min_learning_rate / args.learning_rate)
        return min(1.0, (step + 1) / max(1.0, warmup))

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """All steps from the checkpoint on; everything random is a function of the step."""
        args, accelerator, folder = self.args, self.accelerator, self.stage.folder
        bar = tqdm(total=args.steps, initial=self.state.global_step, disable=not accelerator.is_main_process)
        totals: Counter = Counter()
        while self.state.global_step < args.steps:
            step, factor = self.state.global_step, self.factor(self.state.global_step)
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * factor
            sums, samples = self.gradients(step)
            reduce_gradients(accelerator, self.trained, "sum")
            norm, applied = distributed.clip_and_step(accelerator, self.model, [self.optimizer], args.max_grad_norm)
            totals.update(sums | {"grad_norm": norm, "steps": 1, "skipped": int(not applied)})
            self.state.global_step = step = step + 1
            bar.update()
            last = step == args.steps
            if step % args.log_every == 0 or last:
                if accelerator.is_main_process:
                    line = {"step": step, **self.line(totals), "lr": factor * args.learning_rate}
                    append_line(folder / "log.jsonl", line | ({"samples": samples} if samples else {}))
                    accelerator.log({name: value for name, value in line.items() if name != "step"}, step)
                    bar.set_postfix(kl=line["kl"])
                totals = Counter()
            if step % args.save_every == 0 or last:
                state = {"step": step, "processes": [accelerator.num_processes, 1]}
                write_checkpoint(accelerator, folder, self.model, [self.optimizer], state)
        bar.close()

    def gradients(self, step: int) -> tuple[dict[str, float], list[dict]]:
        """Samples the answers of a step and adds the gradients of its loss -> sums over all processes, samples."""
        args, accelerator = self.args, self.accelerator
        count = args.global_batch_size // args.rollouts
        own = range(step * count, (step + 1) * count)[accelerator.process_index :: accelerator.num_processes]
        batches = [own[start : start + args.micro_batch_size] for start in range(0, len(own), args.micro_batch_size)]
        towers_train = bool(media_params(self.model))
        sampled = []
        self.model.eval()
        for places in batches:
            prompts = [self.rows[place] for place in places]
            with torch.no_grad(), self.autocast():
                features = [encode_media(self.policy, prompt) for prompt in prompts]
            seeds = [[hashed(args.seed, place, number) for number in range(args.rollouts)] for place in places]
            with self.autocast():
                answers = sample_ids(
                    self.policy, self.stage.processor, prompts, features, seeds, args.completion_tokens,
                    args.temperature, args.top_p,
                )  # fmt: skip
            sampled.append((prompts, None if towers_train else features, answers))
        tokens = torch.tensor(sum(len(answer) for *_, answers in sampled for answer in answers))
        total = accelerator.reduce(tokens.to(accelerator.device), "sum").item()
        self.model.train()
        sums: Counter = Counter({f"{name}/{domain}": 0.0 for domain in args.teachers for name in ("kl", "tokens")})
        for prompts, features, answers in sampled:
            self._add_gradients(prompts, features, answers, total, sums)
        self._grade(sampled, sums)
        names = sorted(sums)
        found = accelerator.gather(torch.tensor([[sums[name] for name in names]], device=accelerator.device))
        prompts, _, answers = sampled[0]
        samples = [self._sample(prompts[i], answers[i * args.rollouts]) for i in range(len(prompts))]
        return dict(zip(names, found.sum(0).tolist())), samples[: args.log_samples]

    def _add_gradients(self, prompts: list[dict], features: list | None, answers: list, total: int, sums: Counter):
        """Gradients of a micro-batch, domain by domain; `features` None: of towers that train."""
        n = self.args.rollouts
        for domain in dict.fromkeys(prompt["domain"] for prompt in prompts):
            own = [i for i, prompt in enumerate(prompts) if prompt["domain"] == domain]
            chosen = [prompts[i] for i in own]
            texts = [answers[i * n + number] for i in own for number in range(n)]
            teacher = self.teachers[domain]
            with self.autocast():
                with torch.no_grad():
                    seen = [encode_media(teacher, prompt) for prompt in chosen]
                    wanted = answer_states(teacher, chosen, seen, texts, self.pad_id)
                seen = [features[i] if features else encode_media(self.policy, prompts[i]) for i in own]
                states = answer_states(self.policy, chosen, seen, texts, self.pad_id)
                ids = torch.tensor([token for text in texts for token in text], device=states.device)
                loss, divergence = chunked_reverse_kl(
                    states, self.policy.lm_head, wanted, teacher.lm_head, ids, self.args.estimator
                )
            (loss / max(1, total)).backward()
            sums[f"kl/{domain}"] += divergence.item()
            sums[f"tokens/{domain}"] += len(ids)

    def _grade(self, sampled: list, sums: Counter) -> None:
        """Adds lengths, answers that were cut off and, where rows have verifiers, rewards."""
        ends = answer_ends(self.policy, self.stage.processor)
        names = ("answers", "length", "cut_off", "graded", "reward")
        sums.update(dict.fromkeys(names, 0.0))
        for prompts, _, answers in sampled:
            for number, answer in enumerate(answers):
                row = prompts[number // self.args.rollouts]["row"]
                sums.update({"answers": 1, "length": len(answer), "cut_off": float(answer[-1] not in ends)})
                if row.get("verifier") and row.get("answer") is not None:
                    text = self.stage.processor.decode(answer, skip_special_tokens=False)
                    sums.update({"graded": 1, "reward": grade(row, [text], self.args.reward)["scores"][0]})

    def _sample(self, prompt: dict, answer: list[int]) -> dict:
        asked = prompt["row"]["prompt"][-1]["content"]
        asked = asked if isinstance(asked, str) else json.dumps(asked, default=lambda part: type(part).__name__)
        text = self.stage.processor.decode(answer, skip_special_tokens=False)
        return {"prompt": asked[:500], "domain": prompt["domain"], "completion": text[:2000]}

    def line(self, sums: Counter) -> dict:
        """What is logged; "kl" is per token."""
        tokens = {domain: sums[f"tokens/{domain}"] for domain in self.args.teachers}
        line = {"kl": sum(sums[f"kl/{domain}"] for domain in tokens) / max(1, sum(tokens.values()))}
        line |= {f"kl/{domain}": sums[f"kl/{domain}"] / count for domain, count in tokens.items() if count}
        line |= {"grad_norm": sums["grad_norm"] / sums["steps"], "skipped": sums["skipped"]}
        line["completions/mean_length"] = sums["length"] / max(1, sums["answers"])
        line["completions/clipped_ratio"] = sums["cut_off"] / max(1, sums["answers"])
        if sums["graded"]:
            line["reward"] = sums["reward"] / sums["graded"]
        return {name: round(float(value), 6) for name, value in line.items()}


def check_distill(args: DistillArguments) -> None:
    """Raises for what would otherwise fail late."""
    if not args.teachers:
        raise OmniInputError("teachers is empty: give domain: checkpoint, at least a default")
    if args.estimator not in ESTIMATORS:
        raise OmniInputError(f"estimator is {args.estimator!r}; use one of {', '.join(ESTIMATORS)}")
    if args.trl:
        raise OmniInputError("trl: distillation does not go through TRL; leave it out")
    share = args.rollouts * world_size()
    if args.rollouts < 1 or args.global_batch_size < 1 or args.global_batch_size % share:
        raise OmniInputError(
            f"global_batch_size {args.global_batch_size} must be a multiple of {share}: rollouts x processes"
        )


def train_distill(args: DistillArguments) -> None:
    """Runs one distillation stage; started again with the same `output_dir` it goes on where it was."""
    check_distill(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = distributed.make_accelerator(log_with=args.report_to or None, project_dir=args.output_dir)
    if distributed.is_sharded(accelerator):
        raise OmniInputError("distillation does not run under ZeRO-3: start it with data parallelism")
    stage = open_stage(args)
    if args.recompute:
        bare_model(stage.model).gradient_checkpointing_enable({"use_reentrant": False})
    if accelerator.is_main_process:
        accelerator.init_trackers("tensorboard")
    size = f"{args.global_batch_size // args.rollouts} prompts with {args.rollouts} answer(s)"
    teachers = ", ".join(f"{domain}: {name}" for domain, name in args.teachers.items())
    run_stage(
        DistillTrainer(args, stage, accelerator), stage, args,
        f"`train.py distill` (teachers {teachers}): {args.steps} steps of {size}",
    )  # fmt: skip
    accelerator.end_training()


__all__ = ["DistillArguments", "DistillTrainer", "chunked_reverse_kl", "domain_of", "reverse_kl", "train_distill"]
