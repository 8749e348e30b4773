"""What MPO and GSPO share (paper 3.2): arguments, rows, media that are encoded once, checkpoints, the end of a stage.

TRL's trainers train; `OmniTrainer` is mixed into them for what they do not do with this model: media of every kind,
groups of parameters with rates of their own, checkpoints in the released layout without pickles. Rows are read by
`Blend`: which row stands at which place is a function of the seed, so a stage is one pass over as many places as it
needs, whatever the number of its rows, and resumes at the exact one.

Shape legend: B rows, S tokens, N media tokens, D hidden size.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import PartialState
from PIL import Image
from transformers import GenerationConfig
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from .checkpointing import (
    find_checkpoint,
    load_optimizers,
    model_inside,
    resume_settings,
    save_final,
    write_atomically,
    write_checkpoint,
)
from .configuration_omni import OmniConfig, resolve_checkpoint
from .data import Blend, TooLong, check_sources, cost_of, media_kinds, row_error
from .data_adapters import adapt_prompt
from .distributed import bare_model
from .lora import lora_table, save_adapter, start_lora
from .media import OmniInputError, load_image
from .modeling_omni import MEDIA_TENSORS, OmniForConditionalGeneration
from .packing import BAD_ROWS_BASE
from .processing_omni import OmniProcessor
from .prompt_omni import media_source
from .reporting import append_line, evaluate, parameter_table, write_model_card
from .training import GROUPS, _key, check_choices, group_of, parameter_groups

logger = logging.getLogger(__name__)

MEDIA_GROUPS = ("vision", "vision_projector", "audio", "audio_projector")
# what a decoded answer may hold as structure; everything else in it is text, whatever it spells
ANSWER_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
LOGGED_SIDE = 512  # of a logged picture's longer side, in pixels
REPLACEMENTS = 64  # places tried instead of one whose row cannot be used
FAR = 2**32  # where these begin: no stage is that long


@dataclass
class RLArguments:
    """Keys of both kinds of stage; the command line overrides the file, unknown keys are errors."""

    output_dir: str = field(metadata={"help": "folder for checkpoints, logs and the final model"})
    # model
    model: str = _key("nano", "checkpoint to start from (the stage's initial policy): a folder, hub id or 'nano'")
    processor: str | None = _key(None, "processor to use; that of `model` if not given")
    dtype: str = _key("float32", "of the weights: float32, or bfloat16 (below LoRA)")
    train: list[str] = _key(["language", "head"], f"groups to train, the router is better left out: {list(GROUPS)}")
    lora: dict | None = _key(None, "train adapters instead of the groups; see modeling_omni/lora.py")
    # data
    data: list[dict] = _key([], "sources: {path, weight (share of rows), limit}; see SOURCE_KEYS in data.py")
    media_tokens: int | None = _key(None, "the most media that a row may hold, in patches and 80 ms of sound")
    max_frames: int | None = _key(None, "frames of a video at most")
    max_bad_share: float = _key(0.05, "share of rows that cannot be used above which training stops")
    workers: int = _key(0, "processes (MPO) or threads (GSPO) that read and decode rows")
    # optimisation
    steps: int = _key(100, "optimizer steps")
    learning_rate: float = _key(1e-6, "peak learning rate")
    group_learning_rates: dict[str, float] = _key({}, "peak rate of single groups")
    schedule: str = _key("constant", "after the warm-up: constant, or cosine to min_learning_rate")
    min_learning_rate: float = _key(0.0, "rate at the end of the cosine, for the peak rate")
    warmup: float = _key(0.0, "linear warm-up: steps, or below 1 a share of the steps")
    weight_decay: float = _key(0.0, "weight decay of matrices")
    adam_beta2: float = _key(0.999, "second momentum of AdamW")
    max_grad_norm: float = _key(1.0, "gradient clipping")
    seed: int = _key(0, "seed of data order, sampling and new adapters")
    # precision and memory
    bf16: bool | None = _key(None, "mixed precision in bfloat16; on GPUs if not given")
    recompute: bool = _key(False, "recompute activations in the backward pass")
    # log
    save_every: int = _key(100, "steps between checkpoints; the newest two are kept")
    final_dtype: str | None = _key(None, "dtype of the final weights: bfloat16 or float32; as trained if not given")
    eval_skills: list[str] = _key([], "nano skills of the held-out test at the end; all: every skill")
    eval_samples: int = _key(40, "held-out samples per skill; 0: no test")
    log_every: int = _key(1, "steps between log lines")
    report_to: list[str] = _key(["tensorboard"], "tensorboard, or any tracker of transformers")
    trl: dict = _key({}, "further arguments of TRL's configuration, as they are; those set above are refused here")

    # what held-out tests and model cards of SFT ask for
    weight_of = "rows"
    eval_data = ()
    model_config = None


def trl_config(cls, args: RLArguments, **settings):
    """The arguments as TRL's configuration class takes them.

    Raises:
        OmniInputError: `trl` has keys that TRL does not know, or that other keys of ours stand for.
    """
    cosine = {"min_lr_rate": args.min_learning_rate / args.learning_rate}
    settings |= {
        "output_dir": args.output_dir,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr" if args.schedule == "cosine" else "constant_with_warmup",
        "lr_scheduler_kwargs": cosine if args.schedule == "cosine" else {},
        "warmup_steps": args.warmup,
        "weight_decay": args.weight_decay,
        "adam_beta2": args.adam_beta2,
        "max_grad_norm": args.max_grad_norm,
        "seed": args.seed,
        "bf16": torch.cuda.is_available() if args.bf16 is None else args.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": args.recompute,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "disable_dropout": True,  # of adapters: dropout would move the ratio away from 1
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": args.save_every,
        "logging_steps": args.log_every,
        "report_to": [name for name in args.report_to if name != "tensorboard"],
    }
    known = {one.name for one in dataclasses.fields(cls) if one.init}
    unknown, twice = sorted(set(args.trl) - known), sorted(set(args.trl) & set(settings))
    if unknown or twice:
        raise OmniInputError(
            f"trl: {cls.__name__} of the TRL that is installed has no {unknown}"
            if unknown
            else f"trl: {twice} are set by other keys of the file; leave them out"
        )
    return cls(**settings, **args.trl)


def check_arguments(args: RLArguments) -> None:
    """Raises for what would otherwise fail only when it is needed."""
    check_sources(args.data)
    check_choices(args, schedule=["constant", "cosine"], dtype=["float32", "bfloat16"])
    if any(source.get("streaming") for source in args.data):
        raise OmniInputError("data: a streamed source has no places; drop streaming")
    if args.lora is not None and args.final_dtype:
        raise OmniInputError("lora: adapters are saved as they are; drop final_dtype")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


# ---- rows ----


class PromptRows:
    """Rows of a blend by place, encoded. A row that cannot be used is named and counted, and a later one stands in.

    Args:
        encode: row -> what training needs; raises for a row that cannot be used.
        bad_rows: JSONL file for the rows left out: file, row, reason.
    """

    def __init__(self, args: RLArguments, encode, bad_rows: Path):
        self.blend = Blend(args.data, args.seed, adapt=adapt_prompt)
        self.encode, self.bad_rows, self.max_bad_share = encode, bad_rows, args.max_bad_share
        self.read, self.bad = 0, {}

    def __len__(self) -> int:
        """Rows that are there, each once."""
        return sum(len(source) for source in self.blend.sources)

    def __getitem__(self, place: int) -> dict:
        for attempt in range(REPLACEMENTS):
            file, row, content = self.blend.read(place + attempt * FAR)
            self.read += 1
            try:
                if isinstance(content, OmniInputError):
                    raise content
                return self.encode(content)
            except Exception as error:  # whatever one row does, it is named and the run goes on
                self._report(file, row, error)
        reason = f"{file}, row {row}: {self.bad[file, row]['reason']}"
        raise OmniInputError(f"{REPLACEMENTS} rows in a row cannot be used; see {self.bad_rows}: {reason}")

    def _report(self, file: str, row: int, error: Exception) -> None:
        if (file, row) not in self.bad:
            self.bad[file, row] = {"file": file, "row": row, "reason": row_error(error, f"{file}, row {row}: ")}
            append_line(self.bad_rows, self.bad[file, row])
        check_bad_share([*self.bad.values()], min(self.read, len(self)), self.max_bad_share, self.bad_rows)


def check_bad_share(bad: list[dict], count: int, share: float, path: Path) -> None:
    """Raises where of `count` rows too many cannot be used; `path` names them all."""
    if len(bad) > share * max(BAD_ROWS_BASE, count):
        raise OmniInputError(
            f"{len(bad)} of {count} rows cannot be used, over max_bad_share {share}; see {path}: "
            "{file}, row {row}: {reason}".format(**bad[-1])
        )


def places(count: int):
    """The places of a stage as a `datasets.Dataset`, which is what TRL takes."""
    from datasets import Dataset

    return Dataset.from_dict({"place": list(range(count))})


def encode_prompt(row: dict, processor, args: RLArguments, thinking: bool, tokens: int) -> dict:
    """A row's prompt up to where the answer begins, with its media ready for the towers.

    Args:
        thinking: the generation prompt opens `<think>`; otherwise it closes it again.
        tokens: the most that the prompt may have.

    Returns:
        {"ids": list, "types": list (0 text, 1 image, 2 video, 3 audio), "media": {name: tensor}}

    Raises:
        TooLong: over `tokens` or `media_tokens`: nothing is ever cut.
        OmniInputError: a malformed prompt, media that cannot be read.
    """
    kinds, images = media_kinds(row["prompt"]), processor.image_processor
    least = len(kinds) + kinds.count("image") * (images.min_num_patches // images.merge_size**2 // 2)
    if least > tokens:  # not even decoded
        raise TooLong(f"{len(kinds)} media items are over {least} tokens; limit {tokens}")
    options = {} if args.max_frames is None else {"max_frames": args.max_frames}
    sample = processor.apply_chat_template(
        row["prompt"], tools=row.get("tools"), add_generation_prompt=True, enable_thinking=thinking,
        tokenize=True, return_dict=True, return_tensors="pt", **options,
    )  # fmt: skip
    if "video_keep_tokens" in sample:
        raise OmniInputError("the processor drops video tokens (EVS), which the trainers cannot share between answers")
    length, cost = cost_of(sample)
    if length > tokens:
        raise TooLong(f"{length} tokens; limit {tokens}; lower max_frames or leave the row out")
    if args.media_tokens is not None and cost > args.media_tokens:
        raise TooLong(f"media cost {cost} (patches and sound frames); limit {args.media_tokens}")
    types = sample["mm_token_type_ids"][0].tolist() if "mm_token_type_ids" in sample else [0] * length
    media = {name: sample[name] for name in MEDIA_TENSORS if name in sample}
    if bool(kinds) != bool(media):
        raise OmniInputError(f"{len(kinds)} media parts in the prompt, {sorted(media)} for the towers")
    return {"ids": sample["input_ids"][0].tolist(), "types": types, "media": media}


def answer_ids(text: str, processor, thinking: bool) -> list[int]:
    """A whole answer as the policy writes it after the generation prompt -> its tokens, the end mark included.

    Thinking and tool-call marks are structure, everything else is text. A `<think>` that the prompt has opened already
    may stand at the beginning, an end mark at the end.
    """
    special = processor.codec.special_ids
    end = processor.tokenizer.eos_token
    text = text.rstrip("\n").removesuffix(end)
    if thinking and text.startswith("<think>"):
        text = text.removeprefix("<think>").removeprefix("\n")
    ids = []
    for piece in re.split("(" + "|".join(map(re.escape, ANSWER_MARKS)) + ")", text):
        ids += [special[piece]] if piece in special and piece in ANSWER_MARKS else processor.encode(piece)
    return ids + [special[end]]


def decoded(ids: list[int], processor) -> str:
    """Tokens -> text with its thinking and tool-call marks. Skipping special tokens would lose what rewards look at."""
    return processor.post_process_image_text_to_text([ids])[0]


# ---- media ----


def encode_media(model: OmniForConditionalGeneration, prompt: dict) -> dict[str, torch.Tensor]:
    """Features of one prompt's media: every tower once."""
    media = {name: value.to(model.device) for name, value in prompt["media"].items()}
    return model.model.encode_media(**media) if media else {}


def media_params(model) -> list[torch.nn.Parameter]:
    """The trained parameters of towers and projectors, adapters included."""
    starts = tuple(GROUPS[group] for group in MEDIA_GROUPS)
    named = bare_model(model).named_parameters()
    return [parameter for name, parameter in named if name.startswith(starts) and parameter.requires_grad]


def reduce_gradients(accelerator, parameters: list[torch.nn.Parameter], how: str) -> None:
    """The "sum" or "mean" of gradients over all processes; one without tokens for a parameter counts with zeros."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        found = torch.tensor(float(parameter.grad is not None), device=parameter.device)
        if accelerator.reduce(found, "sum") > 0:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, how)


# ---- training ----


class OmniTrainer:
    """Mixed into TRL's trainers, before them.

    Args:
        stage_args: of this stage.
        saved: what `find_checkpoint` read from the checkpoint that `model` came from.
    """

    def __init__(self, *args, stage_args: RLArguments, saved: dict, **kwargs):
        self.stage_args, self.saved = stage_args, saved
        self.samples, self.picture = [], None  # for the next log line, and the part with the first picture in them
        self.writer = None
        super().__init__(*args, **kwargs)
        self.media_params = media_params(self.model)
        if "tensorboard" in stage_args.report_to and self.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(Path(stage_args.output_dir) / "tensorboard")
            self.add_callback(TensorBoardCallback(self.writer))

    def encode(self, model, media: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`encode_media` in the precision of training."""
        with self.accelerator.autocast():
            return encode_media(bare_model(model), {"media": media})

    def create_optimizer(self, model=None):
        """TRL's optimizer (`optim` and its arguments) over our groups, with their decays and rates."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(parameter_groups(self.model, self.stage_args), **options)
        return self.optimizer

    def own_state(self) -> dict:
        """What a checkpoint keeps besides weights, optimizer and schedule."""
        return {}

    def _save_checkpoint(self, model, trial) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # their own files; never run
            super()._save_checkpoint(model, trial)
            return
        state = {"step": self.state.global_step, "processes": [self.accelerator.num_processes, 1]}
        state |= {"schedule": self.lr_scheduler.state_dict(), **self.own_state()}
        files = {TRAINER_STATE_NAME: json.dumps(dataclasses.asdict(self.state), indent=1)}
        folder = Path(self.args.output_dir)
        write_checkpoint(self.accelerator, folder, self.model_wrapped, [self.optimizer], state, files)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """The weights are in the model already; transformers would look for other names and find none."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizers([self.optimizer], Path(checkpoint) / "optimizer.safetensors")
        self.lr_scheduler.load_state_dict(self.saved["schedule"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr()):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint) -> None:
        """Nothing: what is random here is a function of the seed and the step."""

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """TRL's metrics, and one line of `log.jsonl` with sampled completions in it."""
        super().log(logs, start_time)  # adds TRL's metrics to `logs`
        if not self.is_world_process_zero():
            return
        line = {name: round(value, 6) if isinstance(value, float) else value for name, value in logs.items()}
        samples, self.samples = self.samples, []
        step = self.state.global_step
        line = {"step": step, **line} | ({"samples": samples} if samples else {})
        append_line(Path(self.args.output_dir) / "log.jsonl", line)
        if self.writer is not None and samples:
            text = "\n\n---\n\n".join(
                "\n\n".join(f"**{name}** {str(value)[:2000]}" for name, value in sample.items()) for sample in samples
            )
            self.writer.add_text("samples", text, step)
            with contextlib.suppress(OmniInputError):  # a link that is gone by now
                if self.picture is not None:
                    image = Image.fromarray(load_image(media_source("image", self.picture)))
                    image.thumbnail((LOGGED_SIDE, LOGGED_SIDE))
                    self.writer.add_image("samples", np.asarray(image), step, dataformats="HWC")


@dataclass
class Stage:
    """A stage that is ready for its trainer."""

    folder: Path
    processor: OmniProcessor
    model: torch.nn.Module
    resumed: Path | None
    saved: dict
    configs: tuple  # configuration and generation configuration as the stage found them


def load_policy(name: str | Path, args: RLArguments) -> OmniForConditionalGeneration:
    dtype = getattr(torch, args.dtype)
    model = OmniForConditionalGeneration.from_pretrained(resolve_checkpoint(str(name)), dtype=dtype)
    model.model.vision_tower.force_cpe_eval_mode = True  # random windows would move the ratio away from 1
    return model


def load_configs(name: str) -> tuple[OmniConfig, GenerationConfig | None]:
    path = resolve_checkpoint(name)
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:  # not every checkpoint has one
        generation = None
    return OmniConfig.from_pretrained(path), generation


def open_stage(args: RLArguments) -> Stage:
    """The folder, the processor and the model to train: where a killed run was, or at the stage's start."""
    check_arguments(args)
    folder, state = Path(args.output_dir), PartialState(cpu=not torch.cuda.is_available())
    folder.mkdir(parents=True, exist_ok=True)
    resumed, saved = find_checkpoint(state, folder)
    if left := sorted(folder.glob("checkpoint-*")):
        raise OmniInputError(
            f"{left[-1]} was written by DeepSpeed or FSDP, from which stages are not resumed: give another output_dir, "
            "and its weights as `model`"
        )
    resolved = folder / "config.resolved.yaml"
    if resumed:
        resume_settings(args, resolved)
    processor = OmniProcessor.from_pretrained(resolve_checkpoint(args.processor or args.model))
    model = load_policy(args.model if resumed is None or args.lora is not None else resumed, args)
    configs = copy.deepcopy((model.config, model.generation_config))
    if resumed and args.lora is None:  # TRL and transformers have written into those of a checkpoint
        start = load_configs(args.model)
        configs = (start[0], start[1] or configs[1])
    if args.lora is not None:
        model = start_lora(model, args.lora, resumed, args.seed)
    parameter_groups(model, args)  # freezes
    settings = yaml.safe_dump(dataclasses.asdict(args), sort_keys=False)
    if state.is_main_process:
        write_atomically(resolved, settings)
    state.print(settings + "\n" + (lora_table(model) if args.lora else parameter_table(model, GROUPS, group_of)))
    if resumed:
        state.print(f"resuming from {resumed}")
    return Stage(folder, processor, model, resumed, saved, configs)


def run_stage(trainer, stage: Stage, args: RLArguments, how: str) -> None:
    """Trains, then writes `final/` in the released layout, tests it and describes it.

    Args:
        how: command and size of a step, for the model card.

    Raises:
        OmniInputError: no step was made.
    """
    trainer.train(resume_from_checkpoint=str(stage.resumed) if stage.resumed else None)
    if trainer.state.global_step < args.steps:
        raise OmniInputError(f"only {trainer.state.global_step} of {args.steps} steps were made: the data ran out")
    accelerator, final = trainer.accelerator, stage.folder / "final"
    inner = bare_model(trainer.model)
    inner.config, inner.generation_config = stage.configs
    if args.lora is None:
        save_final(accelerator, trainer.model_wrapped, final, args.final_dtype)
    else:
        save_adapter(model_inside(trainer.model_wrapped), final)
    if accelerator.is_main_process:
        stage.processor.save_pretrained(final)
    table = {}
    if args.eval_skills and args.eval_samples:
        table = evaluate(accelerator, trainer.model, stage.processor, args, stage.folder, args.steps, None)
    if accelerator.is_main_process:
        write_model_card(stage.folder, args, table, how)
    accelerator.wait_for_everyone()


__all__ = ["OmniTrainer", "PromptRows", "RLArguments", "answer_ids", "encode_prompt", "open_stage", "run_stage"]
