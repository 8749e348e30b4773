"""Mixed Preference Optimization (MPO, Wang et al., 2024; paper 3.2.1) on pairs of answers to prompts with any media.

Loss of a pair, with rewards r = beta * (log p(answer) - log p_reference(answer)):

    preference * -log s(r_chosen - r_rejected)                                   DPO
    + quality * (-log s(r_chosen - d) - log s(-(r_rejected - d)))                BCO, d the reward shift
    + sft * -log p(chosen) per token

The losses are those of TRL's DPOTrainer. Its BCO has no reward shift; the shift comes in through the reference:
adding d / beta to both of the reference's log-probabilities takes d off both rewards and leaves their difference, so
the DPO term, alone. d is the running mean of the rewards of all answers, over all processes, and changes after an
optimizer step only. The media of a pair run through the towers once, for both answers and, where the towers are
frozen, for the reference too.

A row is {"prompt": messages or text, "chosen": text, "rejected": text} with optional "prompt_opened_think": whole
answers as the policy writes them after the generation prompt, thinking and its end mark included.

Shape legend: B pairs, S tokens.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer

from .data import NothingToLearn, TooLong
from .media import OmniInputError
from .packing import join_media
from .rl_training import (
    OmniTrainer,
    PromptRows,
    RLArguments,
    answer_ids,
    encode_prompt,
    load_policy,
    open_stage,
    places,
    run_stage,
    trl_config,
    world_size,
)
from .training import _key


@dataclass
class MPOArguments(RLArguments):
    """Every key of an MPO stage's YAML file."""

    row_tokens: int = _key(4096, "tokens of prompt and answer at most; longer rows are left out")
    global_batch_size: int = _key(256, "pairs of a step over all processes")
    micro_batch_size: int = _key(1, "pairs of one forward pass")
    beta: float = _key(0.1, "strength of the tie to the reference")
    preference_weight: float = _key(0.8, "weight of the DPO loss")
    quality_weight: float = _key(0.2, "weight of the BCO loss")
    sft_weight: float = _key(0.0, "weight of the likelihood of the chosen answer (1.0 in MPO's own paper)")
    sft_norm: str = _key("token", "mean of that likelihood over a micro-batch's tokens, or over each sequence's")
    reward_shift: str = _key("ema", "BCO's shift: ema or mean of the rewards so far, or off")
    reward_shift_decay: float = _key(0.99, "decay of the ema per optimizer step")


# ---- rows ----


def encode_pair(row: dict, processor, args: MPOArguments) -> dict:
    """A row -> its prompt (see `encode_prompt`) with "chosen" and "rejected", the tokens of the answers.

    Raises:
        NothingToLearn: the answers are the same.
        TooLong, OmniInputError: as `encode_prompt`, or answers that are no text.
    """
    answers = [row.get("chosen"), row.get("rejected")]
    if not all(isinstance(answer, str) and answer for answer in answers):
        raise OmniInputError("'chosen' and 'rejected' must be texts")
    thinking = row.get("prompt_opened_think", any("</think>" in answer for answer in answers))
    chosen, rejected = (answer_ids(answer, processor, thinking) for answer in answers)
    if chosen == rejected:
        raise NothingToLearn("chosen and rejected are the same")
    longest = max(len(chosen), len(rejected))
    if longest >= args.row_tokens:
        raise TooLong(f"an answer of {longest} tokens; limit {args.row_tokens} with its prompt")
    pair = encode_prompt(row, processor, args, thinking, args.row_tokens - longest)
    return pair | {"chosen": chosen, "rejected": rejected}


def collate_pairs(pairs: list[dict], pad_id: int = 0) -> dict:
    """Pairs -> what TRL's loss takes, [2B, S] each, chosen before rejected, padded on the right.

    Returns:
        input_ids, attention_mask, completion_mask, mm_token_type_ids, and "media": the tensors of every pair, once.
    """
    rows = [(pair, pair[answer]) for answer in ("chosen", "rejected") for pair in pairs]

    def padded(values, fill=0):
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=fill)

    return {
        "input_ids": padded([pair["ids"] + answer for pair, answer in rows], pad_id),
        "attention_mask": padded([[1] * (len(pair["ids"]) + len(answer)) for pair, answer in rows]),
        "completion_mask": padded([[0] * len(pair["ids"]) + [1] * len(answer) for pair, answer in rows]),
        "mm_token_type_ids": padded([pair["types"] + [0] * len(answer) for pair, answer in rows]),
        "media": [pair["media"] for pair in pairs],
    }


class PairCollator:
    """Places of a blend -> a batch of pairs, in the data loader's processes."""

    def __init__(self, rows: PromptRows, pad_id: int):
        self.rows, self.pad_id = rows, pad_id

    def __call__(self, batch: list[dict]) -> dict:
        return collate_pairs([self.rows[one["place"]] for one in batch], self.pad_id)


# ---- training ----


class MPOTrainer(OmniTrainer, DPOTrainer):
    """TRL's DPOTrainer with shared media, BCO's reward shift and the likelihood per sequence.

    Args:
        ref_model: the reference, the stage's own starting point; None with adapters, which are then switched off.
        stage_args: `MPOArguments`. Everything else as DPOTrainer and `OmniTrainer`.
    """

    def __init__(self, model, ref_model, *, stage_args: MPOArguments, **kwargs):
        super().__init__(model, ref_model, stage_args=stage_args, **kwargs)
        if "ref" in getattr(self.model, "peft_config", {}):
            # TRL's copy of the adapter: of a resumed one it would be a trained policy, not the starting point
            self.model.delete_adapter("ref")
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False)
        self.precompute_ref_logps = True  # the loss finds the reference's log-probabilities in the batch
        self.shift = {"value": 0.0, "steps": 0} | self.saved.get("shift", {})
        self.rewards_of_step = []

    def own_state(self) -> dict:
        return {"shift": self.shift}

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset  # places; rows are read by the collator

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        media, mode = inputs.pop("media"), "train" if self.model.training else "eval"
        inputs |= self._features(model, media)
        shift = self.shift["value"]
        reference = torch.cat(self._reference(inputs, media))
        for name, logps in zip(("ref_chosen_logps", "ref_rejected_logps"), (reference + shift / self.beta).chunk(2)):
            inputs[name] = logps
        outputs = []

        def forward(**kwargs):
            outputs.append(model(**kwargs))
            return outputs[-1]

        loss = super()._compute_loss(forward, inputs, False)
        for name in ("rewards/chosen", "rewards/rejected"):
            self._metrics[mode][name][-1] += shift
        logps = outputs[0].log_probs
        if self.stage_args.sft_weight and self.stage_args.sft_norm == "sequence":
            tokens = inputs["completion_mask"][:, 1:].sum(1)
            likelihood = (logps.sum(1) / tokens).chunk(2)[0].mean()
            loss = loss - self.stage_args.sft_weight * likelihood
        if mode == "train":
            self._update_shift(self.beta * (logps.detach().sum(1) - reference))
            self._metrics[mode]["reward_shift"].append(shift)
        return (loss, outputs[0]) if return_outputs else loss

    def _features(self, model, media: list[dict]) -> dict[str, torch.Tensor]:
        """Every pair's media once -> the features of all chosen rows, then of all rejected ones."""
        features = [self.encode(model, one) for one in media]
        return join_media(features + features)

    @torch.no_grad()
    def _reference(self, inputs: dict, media: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of chosen and rejected answers under the reference, each [B]."""
        model = self.model if self.ref_model is None else self.ref_model
        if self.media_params and any(media):  # its towers are others than the policy's by now
            inner = self.accelerator.unwrap_model(model)
            if self.ref_model is None:
                with inner.disable_adapter():
                    features = self._features(inner, media)
            else:
                features = self._features(inner, media)
        else:
            features = {name: inputs[name].detach() for name in inputs if name.endswith("_features")}
        return self.compute_ref_log_probs(model, inputs | features)

    def _update_shift(self, rewards: torch.Tensor) -> None:
        """Adds the rewards [2B] of a micro-batch; at the end of an optimizer step they move the shift."""
        self.rewards_of_step.append(self.accelerator.gather(rewards).mean().item())
        if not self.accelerator.sync_gradients:
            return
        mean, self.rewards_of_step = sum(self.rewards_of_step) / len(self.rewards_of_step), []
        kind, value, steps = self.stage_args.reward_shift, self.shift["value"], self.shift["steps"] + 1
        if kind == "ema":  # starts at 0, which is every reward's value before the first step
            decay = self.stage_args.reward_shift_decay
            value = decay * value + (1 - decay) * mean
        elif kind == "mean":
            value += (mean - value) / steps
        self.shift = {"value": value, "steps": steps}


def check_mpo(args: MPOArguments) -> None:
    if args.sft_norm not in ("token", "sequence") or args.reward_shift not in ("ema", "mean", "off"):
        raise OmniInputError("sft_norm is token or sequence, reward_shift is ema, mean or off")
    if not any((args.preference_weight, args.quality_weight, args.sft_weight)):
        raise OmniInputError("preference_weight, quality_weight and sft_weight are all 0: there is no loss")
    if args.trl.get("ld_alpha") is not None:
        raise OmniInputError("trl: ld_alpha changes the rewards that the shift is the mean of; leave it out")
    readers = world_size() * args.micro_batch_size
    if args.global_batch_size < 1 or args.global_batch_size % readers:
        raise OmniInputError(f"global_batch_size {args.global_batch_size} must be a multiple of {readers}: processes x "
                             "micro_batch_size")  # fmt: skip


def make_mpo_trainer(args: MPOArguments, stage) -> MPOTrainer:
    """The trainer of an opened stage."""
    losses = {"sigmoid": args.preference_weight, "bco_pair": args.quality_weight}
    if args.sft_norm == "token":
        losses["sft"] = args.sft_weight
    losses = {name: weight for name, weight in losses.items() if weight} or {"sigmoid": 0.0}
    config = trl_config(
        DPOConfig,
        args,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        beta=args.beta,
        max_length=None,  # over-long rows are refused, never cut
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.global_batch_size // (args.micro_batch_size * world_size()),
        train_sampling_strategy="sequential",  # the blend's places are in random order
        dataloader_num_workers=args.workers,
    )
    processor = stage.processor
    rows = PromptRows(args, lambda row: encode_pair(row, processor, args), stage.folder / "bad_rows.jsonl")
    return MPOTrainer(
        stage.model,
        None if args.lora is not None else load_policy(args.model, args).eval(),
        stage_args=args,
        saved=stage.saved,
        args=config,
        train_dataset=places(args.steps * args.global_batch_size),
        data_collator=PairCollator(rows, processor.tokenizer.pad_token_id or 0),
        processing_class=processor,
    )


def train_mpo(args: MPOArguments) -> None:
    """Runs one MPO stage; started again with the same `output_dir` it goes on where it was."""
    check_mpo(args)
    stage = open_stage(args)
    trainer = make_mpo_trainer(args, stage)
    run_stage(trainer, stage, args, f"`train.py mpo`: {args.steps} steps of {args.global_batch_size} pairs")


__all__ = ["MPOArguments", "MPOTrainer", "collate_pairs", "encode_pair", "train_mpo"]
