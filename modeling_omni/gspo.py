"""Group Sequence Policy Optimization (GSPO, Zheng et al., 2025; paper 3.2.5) on prompts with any media.

Of every prompt G answers are sampled and graded; with advantages A = (reward - mean of the group) / its deviation and
the ratio s = exp(mean over tokens of log p(token) - log p_old(token)) of a whole answer, the loss is
-min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A), the mean over answers; no KL term. Answers that were cut off do not
count. TRL's GRPOTrainer trains; answers are sampled as rollouts.py does. What TRL does not do:

- prompts that are read once: all answers to a prompt continue one cache, when they are sampled and when they are
  trained on (the gradients of the answers meet in the prompt's keys, values and Mamba states).
- media other than images: the log-probabilities of sound would be taken without the sound, and nobody would notice.
  Here a prompt's media are decoded once and run through the towers once, and all its rollouts share the features, when
  they are sampled and when they are trained on. Towers that train run once per optimizer step and prompt: the
  rollouts' gradients meet at the features, and the towers' backward pass runs once, at the end of the step.
- processes that sample like one: every answer has a seed of its own.
- errors: a stage that cannot make a step, rewards that never differ, groups cut over processes all raise.

A row is {"prompt", "answer", "verifier"} with optional "args", "prompt_opened_think", "id", "source", "group", as
filtering.py reads it.

Shape legend: B rollouts of this process, P prompt tokens, C completion tokens, N media tokens, D hidden size.
"""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from .checkpoint import released_tensors
from .checkpointing import model_inside
from .data import hashed
from .data_adapters import KINDS as MEDIA_KINDS
from .distributed import bare_model
from .filtering import grade, media_parts
from .inference import MEDIA_TOKENS
from .media import OmniInputError, load_image
from .packing import join_media
from .prompt_omni import media_source
from .rewards import LISTED, check_gold, score, verifier_name
from .rl_training import (
    OmniTrainer,
    PromptRows,
    RLArguments,
    decoded,
    encode_prompt,
    media_params,
    open_stage,
    places,
    reduce_gradients,
    run_stage,
    trl_config,
    world_size,
)
from .rollouts import REWARDS, sample_ids
from .shared_prompts import distinct_rows
from .training import _key

logger = logging.getLogger(__name__)


@dataclass
class GSPOArguments(RLArguments):
    """Every key of a GSPO stage's YAML file."""

    prompt_tokens: int = _key(4096, "tokens of a prompt at most; longer rows are left out")
    completion_tokens: int = _key(1024, "tokens of an answer at most; answers cut off there do not count")
    rollouts: int = _key(16, "answers to a prompt")
    global_batch_size: int = _key(4096, "answers sampled at a time over all processes")
    updates: int = _key(1, "optimizer steps on the answers sampled at a time; 1: never off-policy, nothing is clipped")
    micro_batch_size: int = _key(1, "answers of one forward pass")
    share_prompts: bool = _key(True, "train with every prompt read once for all its answers of a forward pass; "
                                "never with recompute, DeepSpeed or FSDP")  # fmt: skip
    sampling_batch_size: int = _key(0, "answers that a process samples side by side; 0: all of its own")
    epsilon: float = _key(3e-4, "clipping of the ratio below 1 (GSPO's paper)")
    epsilon_high: float = _key(4e-4, "clipping of the ratio above 1 (GSPO's paper)")
    temperature: float = _key(1.0, "of sampling")
    top_p: float = _key(1.0, "share of probability that is sampled from")
    top_k: int = _key(0, "tokens that are sampled from; 0: all")
    reward: str = _key("format", "format: 0.9 accuracy + 0.1 format (paper); answer: the boxed answer; text: the "
                       "whole text after thinking")  # fmt: skip
    max_starved: int = _key(10, "times in a row that no group's rewards differ, after which training stops")
    log_samples: int = _key(2, "sampled answers in every log line")


# ---- rows and rewards ----


def encode_row(row: dict, processor, args: GSPOArguments) -> dict:
    """A row -> its prompt (see `encode_prompt`) with "row" and "shown", the prompt as text.

    Raises:
        OmniInputError: as `encode_prompt`, an unknown verifier, an answer that nothing can reach.
    """
    if row.get("answer") is None or not isinstance(row.get("verifier"), str):
        raise OmniInputError("a row needs an 'answer' and a 'verifier'")
    check_gold(row["verifier"], row["answer"], **(row.get("args") or {}))
    prompt = encode_prompt(row, processor, args, row.get("prompt_opened_think", True), args.prompt_tokens)
    images = []
    if args.trl.get("use_vllm"):
        parts = media_parts(row["prompt"])
        if any(part["type"] != "image" for part in parts):
            raise OmniInputError("TRL gives vLLM images only: sound and video need use_vllm: false")
        images = [load_image(media_source("image", part)) for part in parts]
    return prompt | {"row": row, "shown": shown(row["prompt"]), "images": images}


def shown(messages: list[dict]) -> list[dict]:
    """Messages with every medium as [its kind and where it is], for logs."""

    def text(part) -> str:
        if isinstance(part, str):
            return part
        if part.get("type") not in MEDIA_KINDS:
            return part.get("text") or ""
        source = media_source(part["type"], part)
        return f"[{part['type']} {source if isinstance(source, str) else 'in memory'}]"

    contents = [message.get("content") or "" for message in messages]  # None beside tool calls
    contents = [content if isinstance(content, str) else "".join(map(text, content)) for content in contents]
    return [{"role": message["role"], "content": content} for message, content in zip(messages, contents)]


def reward_of(row: dict, completion: str, kind: str) -> float:
    """Reward in [0, 1] of a whole completion, decoded with its thinking marks.

    Args:
        kind: one of REWARDS. With "format" a verifier "format" of the row itself is taken as it is.
    """
    verifier, gold, opened = verifier_name(row["verifier"]), row["answer"], row.get("prompt_opened_think", True)
    args = row.get("args") or {}
    if verifier == "format":
        return score(verifier, completion, gold, **{"prompt_opened_think": opened} | args)
    if kind == "format":
        golds = gold if isinstance(gold, list) and verifier in LISTED else [gold]
        golds = [one if isinstance(one, str) else json.dumps(one) for one in golds]
        return max(
            score("format", completion, f"{verifier}:{one}", prompt_opened_think=opened, **args) for one in golds
        )
    return grade(row, [completion], kind)["scores"][0]


# ---- training ----


def released_names(parameters):
    """A function that yields (our name, tensor) -> one that yields the released tensors, which are what vLLM knows."""

    def released():
        for name, tensor in parameters():
            yield from released_tensors(name, tensor)

    return released


class GSPOTrainer(OmniTrainer, GRPOTrainer):
    """TRL's GRPOTrainer with media of every kind, processed and encoded once per prompt.

    Args:
        rows: place -> encoded prompt.
        stage_args: `GSPOArguments`. Everything else as GRPOTrainer and `OmniTrainer`.
    """

    def __init__(self, model, *, rows: PromptRows, stage_args: GSPOArguments, **kwargs):
        self.rows = rows
        self.places: list[int] = []  # of the answers that are sampled
        self.prompts: list[dict] = []  # of the answers that are being trained on
        self.numbers: list[int] = []  # which of them the rows of the pass that runs belong to
        self.features: dict[int, dict] = {}  # number -> features, as the answers were sampled with them
        self.trained: dict[int, tuple[dict, dict]] = {}  # number -> features of this step with their graph, cut off it
        self.starved = 0
        super().__init__(model, self._reward, stage_args=stage_args, **kwargs)
        # their gradients come after DDP's pass and are reduced here; DDP would wait for them in the next one
        own = {id(parameter) for parameter in self.media_params}
        names = [name for name, parameter in self.model.named_parameters() if id(parameter) in own]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)
        if self.use_vllm:  # never run
            self.vllm_generation._iter_named_params = released_names(self.vllm_generation._iter_named_params)

    # what follows is called in this order

    def _generate_and_score_completions(self, inputs):
        # TRL shuffles the answers: a function of the step too, so that resuming is exact
        args = self.stage_args
        torch.manual_seed(args.seed * 1_000_003 + self.state.global_step)
        self.places = [one["place"] for one in inputs]
        unique = list(dict.fromkeys(self.places))
        if args.workers > 1:
            with ThreadPoolExecutor(args.workers) as pool:
                self.prompts = list(pool.map(self.rows.__getitem__, unique))
        else:
            self.prompts = [self.rows[place] for place in unique]
        number = {place: i for i, place in enumerate(unique)}
        self.numbers = [number[place] for place in self.places]
        with torch.no_grad():
            self.features = {i: self.encode(self.model, prompt["media"]) for i, prompt in enumerate(self.prompts)}
        inputs = [{"prompt": self.prompts[i]["shown"], "row": self.prompts[i]["row"]} for i in self.numbers]
        output = super()._generate_and_score_completions(inputs)
        output["prompt_number"] = torch.tensor(self.numbers, device=self.accelerator.device)
        if self.media_params:  # they are other ones after the first step
            self.features = {}
        self._check_starving()
        return output

    def _tokenize_prompts(self, prompts):
        return [self.prompts[i]["ids"] for i in self.numbers], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """An answer is a function of the policy, the seed, the prompt's place in the blend (and so the step) and the
        answer's number: not of what else is sampled beside it, or in which process."""
        args = self.stage_args
        if self.use_vllm:
            images = [self.prompts[i]["images"] or None for i in self.numbers]
            sample = super()._generate_single_turn
            return sample(prompt_ids, images if any(images) else None, {}, num_generations)
        seeds = [hashed(args.seed, place, i % num_generations) for i, place in enumerate(self.places)]
        size, completions = args.sampling_batch_size or len(seeds), []
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            self.accelerator.autocast(),
        ):
            for start in range(0, len(seeds), size):
                seeds_of = {}
                for i, seed in list(zip(self.numbers, seeds))[start : start + size]:
                    seeds_of.setdefault(i, []).append(seed)
                completions += sample_ids(
                    bare_model(model), self.processing_class, [self.prompts[i] for i in seeds_of],
                    [self.features[i] for i in seeds_of], list(seeds_of.values()), args.completion_tokens,
                    args.temperature, args.top_p, args.top_k,
                )  # fmt: skip
        return completions, None

    def _reward(self, prompts, completions, completion_ids, row, log_metric, **kwargs) -> list[float]:
        """TRL's reward function. It decodes the tokens itself: TRL's text lacks the marks of thinking."""
        texts = [decoded(ids, self.processing_class) for ids in completion_ids]
        rewards = [reward_of(one, text, self.stage_args.reward) for one, text in zip(row, texts)]
        for one, reward in zip(row, rewards):
            log_metric(f"reward/{verifier_name(one['verifier'])}", reward)
        firsts = distinct_rows(self.numbers)[0][: self.stage_args.log_samples]
        self.samples = [
            {
                "prompt": prompts[i][-1]["content"],
                "media": [self._source(part) for part in media_parts(row[i]["prompt"])],
                "completion": texts[i],
                "answer": row[i]["answer"],
                "verifier": row[i]["verifier"],
                "reward": round(rewards[i], 4),
            }
            for i in firsts
        ]
        pictures = [part for i in firsts for part in media_parts(row[i]["prompt"]) if part["type"] == "image"]
        self.picture = pictures[0] if pictures else None
        return rewards

    _reward.__name__ = "verifier"

    @staticmethod
    def _source(part: dict) -> str:
        source = media_source(part["type"], part)
        return source if isinstance(source, str) else f"{part['type']} in memory"

    def _check_starving(self) -> None:
        metrics = self._metrics["train"]
        cut = self.mask_truncated_completions and metrics["completions/clipped_ratio"][-1] == 1.0
        if not cut and metrics["frac_reward_zero_std"][-1] < 1.0:
            self.starved = 0
            return
        self.starved += 1
        reason = (
            f"all answers were cut off at {self.max_completion_length} tokens"
            if cut
            else f"the rewards of no group differ (mean {metrics['reward'][-1]:.3f})"
        )
        message = f"step {self.state.global_step}: nothing to learn: {reason}, {self.starved} time(s) in a row"
        if self.starved >= self.stage_args.max_starved:
            raise OmniInputError(
                f"{message} (max_starved). Choose prompts by their pass rate (filtering.py), or raise completion_tokens"
            )
        logger.warning(message)

    def _compute_loss(self, model, inputs):
        self.numbers = inputs["prompt_number"].tolist()
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        size = batch_size or len(input_ids)
        pieces = iter([self.numbers[start : start + size] for start in range(0, len(input_ids), size)])
        shared = self.stage_args.share_prompts and not self.stage_args.recompute and not self.in_engine
        forward = self._forward_shared if shared else self._forward_whole
        return super()._get_per_token_logps_and_entropies(
            lambda **inputs: forward(model, next(pieces), logits_to_keep, **inputs),
            input_ids, attention_mask, logits_to_keep, batch_size, **kwargs,
        )  # fmt: skip

    def _forward_whole(self, model, numbers, completion, input_ids, **inputs):
        width = input_ids.shape[1] - completion
        media = self._media_inputs(numbers, width)
        if media:
            media["mm_token_type_ids"] = F.pad(media["mm_token_type_ids"], (0, completion)).to(input_ids.device)
        return model(input_ids=input_ids, **inputs, **media)

    def _forward_shared(self, model, numbers, completion, input_ids, attention_mask, labels, **inputs):
        """Every prompt but for its last token once; behind it all its answers, with that token in front."""
        firsts, prompt_of = distinct_rows(numbers)
        if len(firsts) == len(numbers):
            options = inputs | {"attention_mask": attention_mask, "labels": labels}
            return self._forward_whole(model, numbers, completion, input_ids, **options)
        last = input_ids.shape[1] - completion - 1
        mask = attention_mask[firsts, :last]
        padding = int((mask.sum(0) == 0).sum())  # to the longest prompt of another pass
        media = self._media_inputs([numbers[i] for i in firsts], last + 1)
        if media:
            media["mm_token_type_ids"] = media["mm_token_type_ids"][:, padding:last].to(input_ids.device)
        cache = DynamicCache(config=bare_model(model).config.llm_config)
        prompts = {"input_ids": input_ids[firsts, padding:last], "attention_mask": mask[:, padding:]}
        # not through DDP, whose passes are collective: a process whose answers all differ in their prompts has one less
        model_inside(model)(**prompts, **media, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.reorder_cache(torch.tensor(prompt_of, device=input_ids.device))
        answers = {"input_ids": input_ids[:, last:], "attention_mask": attention_mask[:, padding:]}
        return model(**answers, labels=labels[:, last:], past_key_values=cache, **inputs)

    def _media_inputs(self, numbers: list[int], width: int) -> dict[str, torch.Tensor]:
        """Features of the rows' prompts, and where they go: prompts are padded on the left to `width`."""
        if not any(self.prompts[i]["media"] for i in numbers):
            return {}
        types = [torch.tensor(self.prompts[i]["types"]) for i in numbers]
        types = torch.stack([F.pad(row, (width - len(row), 0)) for row in types])
        return join_media([self._features_of(i) for i in numbers]) | {"mm_token_type_ids": types}

    def _features_of(self, number: int) -> dict[str, torch.Tensor]:
        if number in self.features:
            return self.features[number]
        if number not in self.trained:  # the first time in this optimizer step
            graph = self.encode(self.model, self.prompts[number]["media"])
            cut = graph
            if not self.in_engine:
                cut = {kind: tokens.detach().requires_grad_(tokens.requires_grad) for kind, tokens in graph.items()}
            self.trained[number] = graph, cut
        return self.trained[number][1]

    @property
    def in_engine(self) -> bool:
        """Engines reduce gradients within their own backward pass: there, towers run once per micro-batch; never run"""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.in_engine:
            self.trained = {}
        elif self.media_params and self.accelerator.sync_gradients:
            self._backward_media()
        return loss

    def _backward_media(self) -> None:
        """The towers' backward pass of a whole optimizer step, and the mean of its gradients over the processes."""
        pairs = [(graph[kind], cut[kind].grad) for graph, cut in self.trained.values() for kind in graph]
        pairs = [(tokens, gradient) for tokens, gradient in pairs if gradient is not None]
        self.trained = {}
        if pairs:
            torch.autograd.backward(*zip(*pairs))
        reduce_gradients(self.accelerator, self.media_params, "mean")  # DDP has not seen them: cut off its graph


def check_gspo(args: GSPOArguments) -> None:
    """Raises where TRL would fail late, mix up groups or make no step."""
    if args.reward not in REWARDS:
        raise OmniInputError(f"reward is {args.reward!r}; use one of {', '.join(REWARDS)}")
    share = args.micro_batch_size * world_size()
    if args.global_batch_size < 1 or args.global_batch_size % share:
        raise OmniInputError(
            f"global_batch_size {args.global_batch_size} must be a multiple of {share}: processes x micro_batch_size"
        )
    passes, own = args.global_batch_size // share, args.global_batch_size // world_size()
    if args.rollouts < 2 or own % args.rollouts:
        raise OmniInputError(
            f"{own} answers per process must be whole groups of {args.rollouts} rollouts (2 or more): raise "
            "global_batch_size, or start fewer processes"
        )
    if args.updates < 1 or passes % args.updates:
        raise OmniInputError(f"updates {args.updates} must divide the {passes} forward passes of every process")
    repeats = args.updates * args.trl.get("num_iterations", 1)
    if args.save_every % repeats or args.steps % repeats:
        raise OmniInputError(
            f"save_every {args.save_every} and steps {args.steps} must be multiples of {repeats}, the optimizer steps "
            "on answers sampled at a time: they are not saved"
        )
    sampling = ("rollout_func", "use_transformers_continuous_batching", "use_transformers_paged")
    if not args.trl.get("use_vllm"):
        sampling += ("min_p", "repetition_penalty", "cache_implementation")
    for key in ("num_generations_eval", "tools", "log_completions", "generation_kwargs", *sampling):
        if args.trl.get(key):
            raise OmniInputError(f"trl: {key} goes past this trainer's sampling and its media; leave it out")


def make_gspo_trainer(args: GSPOArguments, stage) -> GSPOTrainer:
    """The trainer of an opened stage.

    Raises:
        OmniInputError: fewer rows than prompts are sampled at a time; vLLM with towers that train.
    """
    processor, model = stage.processor, stage.model
    if args.trl.get("use_vllm") and media_params(model):
        raise OmniInputError(
            "trl: vLLM keeps the features of pictures that it has seen, and would not notice that their towers are "
            "others by now: leave vision and projectors out of `train`, or use_vllm"
        )
    passes = args.global_batch_size // (args.micro_batch_size * world_size())
    config = trl_config(
        GRPOConfig,
        args,
        importance_sampling_level="sequence",
        loss_type="grpo",
        scale_rewards="group",
        beta=0.0,
        epsilon=args.epsilon,
        epsilon_high=args.epsilon_high,
        num_generations=args.rollouts,
        max_completion_length=args.completion_tokens,
        mask_truncated_completions=True,
        per_device_train_batch_size=args.micro_batch_size,
        steps_per_generation=passes,
        gradient_accumulation_steps=passes // args.updates,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        generation_kwargs={"bad_words": list(MEDIA_TOKENS)} if args.trl.get("use_vllm") else None,
        shuffle_dataset=False,  # the blend's places are in random order
    )
    rows = PromptRows(args, lambda row: encode_row(row, processor, args), stage.folder / "bad_rows.jsonl")
    prompts = args.global_batch_size // args.rollouts
    if len(rows) < prompts:
        raise OmniInputError(
            f"data has {len(rows)} rows, but {prompts} prompts are sampled at a time (global_batch_size / rollouts)"
        )
    rounds = args.steps // (args.updates * config.num_iterations)
    return GSPOTrainer(
        model,
        rows=rows,
        stage_args=args,
        saved=stage.saved,
        args=config,
        train_dataset=places(rounds * prompts),
        processing_class=processor,
    )


def train_gspo(args: GSPOArguments) -> None:
    """Runs one GSPO stage; started again with the same `output_dir` it goes on where it was."""
    check_gspo(args)
    stage = open_stage(args)
    trainer = make_gspo_trainer(args, stage)
    size = f"{args.global_batch_size // args.rollouts} prompts with {args.rollouts} answers"
    run_stage(trainer, stage, args, f"`train.py gspo`: {args.steps} steps, {args.updates} on every {size} sampled")


__all__ = ["GSPOArguments", "GSPOTrainer", "encode_row", "reward_of", "train_gspo"]
