"""Quantisation-aware distillation (NVIDIA's QAD report): a student in FP8 or NVFP4 learns from itself in bfloat16.

In every forward pass the student's weights, and the inputs of its products, are rounded as the packed checkpoint rounds
them; gradients pass through the rounding unchanged and move the weights below it. The loss at a trained position is
KL(teacher || student) over the vocabulary, so no labels are fitted and what reinforcement learning has shaped stays;
with `loss: labels` it is the cross-entropy of labels instead (QAT), for comparison. Everything else is the SFT stage of
`training.py`. Scales of inputs are calibrated at the start and stay.

    output_dir/final    the student's weights before rounding, plain
    output_dir/packed   the same in `format`, as published: what was trained for

Shape legend: B rows, S tokens, N trained tokens, D hidden size, V vocabulary.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from .checkpoint import released_tensors
from .checkpointing import newest_checkpoint
from .configuration_omni import resolve_checkpoint
from .media import OmniInputError
from .modeling_language import LOSS_CHUNK, Experts
from .modeling_omni import OmniForConditionalGeneration
from .quantization import (
    CODES,
    GROUP,
    NVFP4,
    RECIPES,
    experts_one_by_one,
    fake_quantize,
    fake_quantize_input,
    format_of,
    scale_of,
)
from .quantized_export import calibrate, calibration_batches, export_checkpoint
from .training import SFTArguments, _key, train_sft

LOSSES = ("kl", "labels")
SCALES = "scales.safetensors"


@dataclass
class QADArguments(SFTArguments):
    """Every key of a stage's YAML file."""

    format: str = _key("nvfp4", f"what the student is trained for: {', '.join(RECIPES)}")
    loss: str = _key("kl", "kl: divergence from the teacher (QAD); labels: cross-entropy (QAT)")
    teacher: str | None = _key(None, "checkpoint of the teacher; `model` if not given")
    round_inputs: bool = _key(True, "round the inputs of products too (W8A8, W4A4); false: weights alone")
    calibration_rows: int = _key(16, "packed rows of `data` that scales of inputs and of the KV cache are taken from")


# ---- the student


class FakeQuantizedLinear(nn.Linear):
    """A linear layer that computes as its packed form will."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_scale is not None:
            x = fake_quantize_input(x, self.kind, self.input_scale)
        return F.linear(x, fake_quantize(self.weight, self.kind, self.codes).to(x.dtype), self.bias)


class FakeQuantizedExperts(Experts):
    """Routed experts that compute as their packed form will."""

    def forward(self, hidden_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        weights = {part: fake_quantize(getattr(self, part), self.kind, self.codes) for part in ("up_proj", "down_proj")}

        def product(part, rows, expert):
            scale = getattr(self, f"{part}_input_scale")
            if scale is not None:
                rows = fake_quantize_input(rows, self.kind, scale[expert])
            return F.linear(rows, weights[part][expert].to(rows.dtype))

        return experts_one_by_one(hidden_TD, experts_TK, weights_TK, self.num_experts, product)


def fake_quantize_model(model: nn.Module, recipe: str, amax: dict[str, torch.Tensor] | None = None) -> int:
    """Makes the layers that the recipe packs compute as if they were, in place; names of parameters stay -> how many.

    Args:
        amax: of `calibrate`, for the inputs; None: inputs are not rounded.
    """
    changed = 0
    for name, module in list(model.named_modules()):
        stacked = isinstance(module, Experts)
        if not stacked and type(module) is not nn.Linear:
            continue
        parts = ("up_proj", "down_proj") if stacked else ("weight",)
        kinds, scales = set(), {}
        for part in parts:
            weight = getattr(module, part)
            names = [released.removesuffix(".weight") for released, _ in released_tensors(f"{name}.{part}", weight)]
            kinds |= {format_of(layer, recipe) for layer in names}
            if amax is not None and None not in kinds:
                found = torch.stack([amax[f"{layer}.input_scale"] for layer in names]).to(weight.device)
                scales[part] = scale_of(found if stacked else found[0], next(iter(kinds)))
        kind = next(iter(kinds))
        if kind is None:
            continue
        widths = {getattr(module, part).shape[-1] for part in parts}
        if kind == NVFP4 and any(width % GROUP for width in widths):
            raise OmniInputError(f"{name}: NVFP4 needs multiples of {GROUP} columns, it has {sorted(widths)}")
        module.__class__ = FakeQuantizedExperts if stacked else FakeQuantizedLinear  # the same parameters
        module.kind, module.codes = kind, CODES.get(recipe)
        for part in parts:
            scale = "input_scale" if part == "weight" else f"{part}_input_scale"
            module.register_buffer(scale, scales.get(part), persistent=False)
        changed += 1
    return changed


# ---- the loss


def chunked_kl(
    states: torch.Tensor,
    head: nn.Module,
    teacher_states: torch.Tensor,
    teacher_head: nn.Module,
    chunk: int = LOSS_CHUNK,
    min_chunks: int = 0,
) -> torch.Tensor:
    """Sum over tokens of KL(teacher || student) of the next token; logits exist for `chunk` tokens at a time.

    Args:
        states, teacher_states: final hidden states [N, D] and [N, D'].
        min_chunks: see `chunked_cross_entropy`.
    """

    def divergence(states, teacher_states):
        with torch.no_grad():
            wanted = teacher_head(teacher_states).float().log_softmax(-1)
        return F.kl_div(head(states).float().log_softmax(-1), wanted, reduction="sum", log_target=True)

    total = states.sum() * 0.0  # keeps the graph whole when a batch has no trained token
    parts = list(zip(states.split(chunk), teacher_states.split(chunk)))
    parts += [(states[:0], teacher_states[:0])] * (min_chunks - len(parts))
    for part in parts:
        recomputed = torch.is_grad_enabled() and len(parts) > 1
        total = total + (checkpoint(divergence, *part, use_reentrant=False) if recomputed else divergence(*part))
    return total


class TeacherLoss:
    """What stands at `label_loss` of the student: the divergence from the teacher at the trained positions."""

    def __init__(self, teacher: OmniForConditionalGeneration):
        self.teacher, self.states = teacher, None

    @torch.no_grad()
    def see(self, batch: dict) -> None:
        """Runs the teacher on the batch that the student is given next."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        self.states = self.teacher.model(**inputs, use_cache=False).last_hidden_state

    def __call__(self, hidden, head, labels, num_items=None, min_chunks=0):
        if self.states is None or self.states.shape[:2] != hidden.shape[:2]:
            raise RuntimeError("the teacher has not seen this batch")
        trained = labels[:, 1:].to(hidden.device) != -100
        states, teacher_states = hidden[:, :-1][trained], self.states[:, :-1][trained]
        self.states = None
        total = chunked_kl(states, head, teacher_states, self.teacher.lm_head, min_chunks=min_chunks)
        return total / (trained.sum().clamp(min=1) if num_items is None else num_items)


# ---- the stage


def train_qad(args: QADArguments) -> None:
    """Runs one stage; started again with the same `output_dir` it goes on where it was.

    Raises:
        OmniInputError: what it does not do: adapters, context parallelism, ZeRO-3, expert parallelism, draft heads.
    """
    if args.format not in RECIPES or args.loss not in LOSSES:
        raise OmniInputError(f"format is one of {', '.join(RECIPES)} and loss of {', '.join(LOSSES)}")
    if args.model is None:
        raise OmniInputError("qad starts from a checkpoint: give `model`")
    refused = {"lora": args.lora, "mtp_layers": args.mtp_layers, "context_parallel": args.context_parallel > 1}
    refused |= {"expert_parallel": args.expert_parallel > 1, "towers": args.towers}
    for name, value in refused.items():
        if value:
            raise OmniInputError(f"qad does not take {name}; leave it out")
    folder = Path(args.output_dir)

    def prepare(model, processor, device):
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise OmniInputError("qad does not run under ZeRO-3: start it with data parallelism")
        path, state = folder / SCALES, PartialState()
        with state.main_process_first():  # anew until there is a checkpoint: an earlier start may have had other data
            if state.is_main_process and newest_checkpoint(folder) is None or not path.is_file():
                batches = calibration_batches(processor, args.data, args.calibration_rows, args.row_tokens, args.seed)
                save_file(calibrate(model.eval(), batches), path.with_suffix(".partial"))
                os.replace(path.with_suffix(".partial"), path)
        amax = load_file(path)
        fake_quantize_model(model, args.format, amax if args.round_inputs else None)
        if args.loss == "labels":
            return None
        name = resolve_checkpoint(args.teacher or args.model)
        teacher = OmniForConditionalGeneration.from_pretrained(name, dtype=model.dtype).eval().requires_grad_(False)
        if teacher.config.llm_config.vocab_size != model.config.llm_config.vocab_size:
            raise OmniInputError("the teacher has another vocabulary than the student")
        model.label_loss = TeacherLoss(teacher.to(device))
        return model.label_loss.see

    kind = "divergence from " + str(args.teacher or args.model) if args.loss == "kl" else "cross-entropy of labels"
    how = f"`train.py qad` (format {args.format}, {kind}): {args.steps} steps of {args.global_batch_size} rows"
    train_sft(args, prepare, how)
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(folder / "packed", ignore_errors=True)  # of fewer steps
        export_checkpoint(folder / "final", folder / "packed", args.format, load_file(folder / SCALES))


__all__ = ["QADArguments", "TeacherLoss", "chunked_kl", "fake_quantize_model", "train_qad"]
