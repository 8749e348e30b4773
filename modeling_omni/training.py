"""Supervised fine-tuning (paper 3.1): one stage of the recipe, in one process or many.

A stage trains named groups of parameters on a blend of sources, packed into rows of `row_tokens` tokens. A step is
`global_batch_size` rows over all processes, `micro_batch_size` of them in one forward pass. A run that is killed at any
moment goes on from its newest checkpoint, in one process to the same bits.
"""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.modeling_layers import GradientCheckpointingLayer

from . import distributed
from .checkpoint import GROUPS
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
from .context_parallel import context_group, set_context_parallel, shard_batch
from .data import Blend, check_sources, measure_mean_tokens
from .lora import (
    base_name,
    check_adapter_gradients,
    lora_table,
    save_adapter,
    start_lora,
    watch_adapter_gradients,
)
from .media import OmniInputError
from .modeling_omni import OmniForConditionalGeneration
from .packing import PackedRows, row_limits
from .planning import LANGUAGE_KINDS, memory_estimate
from .reporting import Previews, RouterLoad, evaluate, parameter_table, write_model_card

# Parts whose activations can be computed again in the backward pass (paper 3.1.8) -> how their modules' names begin
RECOMPUTED = {name: GROUPS[name] for name in ("language", "vision", "vision_projector", "audio", "audio_projector")}
PIXELS = {"pixel_values", "pixel_values_videos"}


def _key(default, text: str):
    """A key of the YAML file: its default (a list or dict is copied) and what it is."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class SFTArguments:
    """Every key of a stage's YAML file; the command line overrides the file, unknown keys are errors."""

    output_dir: str = field(metadata={"help": "folder for checkpoints, logs and the final model"})
    # model
    model: str | None = _key(None, "checkpoint to start from: a folder, hub id or 'nano'")
    model_config: str | None = _key(None, "YAML of an OmniConfig: start from random weights")
    processor: str | None = _key(None, "processor to use; that of `model` if not given")
    towers: dict[str, str] = _key({}, "group -> safetensors file of a pre-trained tower")
    train: list[str] = _key(list(GROUPS), f"groups to train: {list(GROUPS)}")
    lora: dict | None = _key(None, "train adapters instead of the groups; see modeling_omni/lora.py")
    mtp_layers: int = _key(0, "new draft heads (multi-token prediction) for a checkpoint that has none")
    mtp_depth: int = _key(1, "drafts in a row that the heads learn; beyond their number the last one is unrolled")
    mtp_loss_weight: float = _key(0.1, "of the heads' loss beside the model's; with a frozen model theirs is the loss")
    cpe_eval: bool = _key(True, "vision position embedding in eval mode; false: random windows of it")
    # data
    data: list[dict] = _key([], "sources: {path, weight (share of tokens), ...}; see SOURCE_KEYS in data.py")
    weight_of: str = _key("tokens", "what weights are shares of: tokens or rows")
    row_tokens: int = _key(256, "tokens of one packed row (the stage's context)")
    media_tokens: int | None = _key(None, "the most media that a packed row may hold, in patches and 80 ms of sound")
    cut_long: bool = _key(False, "cut the end of too long text instead of leaving the row out")
    max_frames: int | None = _key(None, "frames of a video at most")
    patches_per_frame: list[int] = _key([], "target patches of a video frame; one is drawn for each row")
    max_bad_share: float = _key(0.05, "share of rows that cannot be used above which training stops")
    workers: int = _key(1, "data loader processes")
    # optimisation
    steps: int = _key(1000, "optimizer steps")
    train_tokens: int = _key(0, "tokens of the stage; read by `train.py plan` only")
    global_batch_size: int = _key(16, "packed rows per step over all processes")
    micro_batch_size: int = _key(1, "packed rows of one forward pass")
    optimizer: str = _key("adamw", "adamw, or muon: Muon on hidden matrices and AdamW on the rest")
    learning_rate: float = _key(1e-3, "peak learning rate")
    group_learning_rates: dict[str, float] = _key({}, "peak rate of single groups")
    min_learning_rate: float = _key(0.0, "rate at the end of the cosine, for the peak rate")
    warmup_fraction: float = _key(0.05, "share of steps of linear warm-up")
    weight_decay: float = _key(0.05, "weight decay of matrices")
    max_grad_norm: float = _key(1.0, "gradient clipping")
    max_skipped: int = _key(10, "steps in a row without a finite gradient after which training stops")
    seed: int = _key(0, "seed of data order and starting weights")
    # parallelism and memory
    expert_parallel: int = _key(1, "processes over which the experts of a layer are spread (ZeRO-3)")
    context_parallel: int = _key(1, "processes that share one row")
    recompute: list[str] = _key([], f"recompute activations of: {[*RECOMPUTED, *LANGUAGE_KINDS.values()]}")
    # log
    save_every: int = _key(500, "steps between checkpoints; the newest two are kept")
    final_dtype: str | None = _key(
        None, "dtype of the final model's weights: bfloat16 or float32; as trained if not given"
    )
    eval_every: int = _key(0, "steps between held-out tests of nano skills; 0: end only")
    eval_data: list[dict] = _key([], "held-out sources (as in data) whose mean loss is taken at every held-out test")
    eval_rows: int = _key(4, "packed rows of each source of eval_data")
    eval_skills: list[str] = _key([], "nano skills of the held-out tests; empty: those in data; all: every skill")
    eval_samples: int = _key(40, "held-out samples per skill; 0: no test")
    previews: int = _key(0, "rows of the blend whose answers are shown at every held-out test")
    log_every: int = _key(20, "steps between log lines")
    report_to: list[str] = _key(["tensorboard"], "trackers of accelerate: tensorboard, wandb, ...")


def load_arguments(cls, argv: list[str] | None = None):
    """`--config file.yaml [--key value ...]` -> an instance of `cls`. Unknown keys are errors, on both sides."""
    parser = HfArgumentParser(cls)
    parser.add_argument("--config", help="YAML file with values of the options below")
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    for action in parser._actions:
        if "dict" in types.get(action.dest, ""):  # on the command line as JSON
            action.type, action.nargs = json.loads, None
    config_parser = HfArgumentParser([], add_help=False)  # the other one shows every key
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(argv)[0].config
    values = {}
    if path is not None:
        values = yaml.safe_load(Path(path).read_text()) or {}
        values.pop("stage", None)  # the command that the file is for (`train.py recipe` reads it)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{path}: unknown keys {unknown}; known: {sorted(known)}")
        for action in parser._actions:
            if action.dest in values:
                action.required = False
        parser.set_defaults(**values)
    options = vars(parser.parse_args(argv))
    options.pop("config")
    return cls(**options)


# ---- parameters ----


def group_of(name: str) -> str:
    """The group of a parameter by its name."""
    if GROUPS["router"] in name and not name.startswith(GROUPS["mtp"]):
        return "router"
    return max((group for group in GROUPS if name.startswith(GROUPS[group])), key=lambda group: len(GROUPS[group]))


def kind_of(name: str, parameter: torch.Tensor) -> str:
    """ "hidden" (a matrix between layers, which Muon may take), "decayed" (other matrices) or "plain" (no decay)."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor behind
    if len(shape) < 2 or name.endswith(("pos_embed", "token")):
        return "plain"
    return "decayed" if len(shape) > 2 or any(part in name for part in ("embed", "head.weight", "lora_")) else "hidden"


def parameter_groups(model, args: SFTArguments) -> list[dict]:
    """Freezes what is not trained and returns the optimizer's groups, each with a name, a decay and a peak rate.

    Where the model carries adapters, they are what is trained, with the rate of the group they stand in.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        group = group_of(base_name(name))
        if args.lora is None:
            parameter.requires_grad_(group in args.train)
        if parameter.requires_grad:
            groups.setdefault((group, kind_of(name, parameter)), []).append(parameter)
    if not groups:
        raise ValueError(f"nothing is trained: train is {args.train}; known groups: {list(GROUPS)}")
    return [
        {
            "params": params,
            "weight_decay": 0.0 if kind == "plain" else args.weight_decay,
            "lr": args.group_learning_rates.get(group, args.learning_rate),
            "name": group,
            "kind": kind,
        }
        for (group, kind), params in groups.items()
    ]


def make_optimizers(groups: list[dict], kind: str) -> list[torch.optim.Optimizer]:
    """AdamW over all groups, or Muon over the hidden matrices at AdamW's learning rates and AdamW over the rest."""
    if kind not in ("adamw", "muon"):
        raise ValueError(f"optimizer must be 'adamw' or 'muon', got {kind!r}")
    hidden = [group for group in groups if kind == "muon" and group["kind"] == "hidden"]
    others = [group for group in groups if not any(group is one for one in hidden)]
    optimizers = [torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")] if hidden else []
    return optimizers + ([torch.optim.AdamW(others, betas=(0.9, 0.999))] if others else [])


def cosine_factor(step: int, steps: int, warmup_fraction: float, floor: float) -> float:
    """Linear warm-up, then a cosine from 1 to `floor` (a share of the peak rate)."""
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def recompute_activations(model, parts: list[str]) -> None:
    """Turns recomputation in the backward pass on for the named parts, block by block, and off elsewhere."""
    unknown = set(parts) - set(RECOMPUTED) - set(LANGUAGE_KINDS.values())
    if unknown:
        raise ValueError(
            f"recompute: unknown parts {sorted(unknown)}; known: {[*RECOMPUTED, *LANGUAGE_KINDS.values()]}"
        )
    if parts:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    starts = tuple(RECOMPUTED[part] for part in parts if part in RECOMPUTED)
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            chosen = bool(starts) and base_name(name + ".").startswith(starts)
            module.gradient_checkpointing = chosen or LANGUAGE_KINDS.get(getattr(module, "kind", None)) in parts


# ---- start ----


def build_model(args: SFTArguments, dtype: torch.dtype = torch.float32, start: str | Path | None = None):
    """The model to start from: the checkpoint `start` or `args.model`, or random weights of `model_config`."""
    if (args.model is None) == (args.model_config is None):
        raise ValueError("give exactly one of `model` (a checkpoint) and `model_config` (random weights)")
    if start or args.model:
        checkpoint = start or resolve_checkpoint(args.model)
        config = OmniConfig.from_pretrained(checkpoint)
        config.llm_config.num_nextn_predict_layers = config.llm_config.num_nextn_predict_layers or args.mtp_layers
        if args.lora is None and getattr(config, "quantization_config", None) is not None:
            raise OmniInputError(
                f"model {args.model}: packed weights do not train; make plain ones: python infer.py export --model "
                f"{args.model} --format bf16 --out DIR"
            )
        torch.manual_seed(args.seed)
        model = OmniForConditionalGeneration.from_pretrained(checkpoint, config=config, dtype=dtype)
        if args.mtp_layers:  # transformers saves by the rules that loading used: new heads have one of their own
            model._weight_conversions = None
    else:
        torch.manual_seed(args.seed)
        model = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(Path(args.model_config).read_text()))).to(
            dtype
        )
    if start is None:
        for group, path in args.towers.items():
            load_tower(model, group, path)
    model.model.vision_tower.force_cpe_eval_mode = args.cpe_eval
    model.mtp_depth, model.mtp_loss_weight = args.mtp_depth, args.mtp_loss_weight
    return model


def load_tower(model, group: str, path: str) -> None:
    """Copies the parameters and buffers of one group from a safetensors file with our names."""
    prefix = GROUPS[group]
    state = {name: value for name, value in load_file(path).items() if name.startswith(prefix)}
    missing = [n for n in model.state_dict() if n.startswith(prefix) and n not in state]
    if missing or not state:
        raise ValueError(f"{path} lacks {len(missing)} tensors of group {group!r}, e.g. {missing[:3]}")
    model.load_state_dict(state, strict=False)


def check_choices(args, **choices) -> None:
    """Raises OmniInputError for what a key cannot be; `choices`: those of keys that not every stage has."""
    from .nano_data import GROUNDING_SKILLS, SKILLS

    choices |= {"train": GROUPS, "group_learning_rates": GROUPS, "final_dtype": [None, "float32", "bfloat16"]}
    choices |= {"eval_skills": ["all", *SKILLS, *GROUNDING_SKILLS]}
    for key, known in choices.items():
        given = getattr(args, key)
        unknown = [value for value in (given if isinstance(given, (list, dict)) else [given]) if value not in known]
        if unknown:
            raise OmniInputError(f"{key}: unknown {unknown}; known: {list(known)}")


def check_arguments(args: SFTArguments, world: int, sharded: bool) -> None:
    """Raises for what would otherwise fail only when it is needed, perhaps days later."""
    check_sources(args.data)
    for source in args.eval_data:
        check_sources([source])
    check_choices(
        args,
        recompute=[*RECOMPUTED, *LANGUAGE_KINDS.values()],
        optimizer=["adamw", "muon"],
        weight_of=["tokens", "rows"],
    )
    if args.lora is not None and (args.model is None or args.towers or args.final_dtype):
        raise OmniInputError("lora: adapters stand on a checkpoint: give `model`, and neither towers nor final_dtype")
    if sharded and args.towers:
        raise OmniInputError("towers cannot be loaded into a model that ZeRO-3 has cut: start with one process")
    if args.context_parallel < 1 or world % args.context_parallel:
        raise OmniInputError(
            f"context_parallel {args.context_parallel} does not divide the {world} process(es) that were started; "
            "start with `accelerate launch --config_file configs/accelerate/<name>.yaml`, or set --context_parallel"
        )
    readers = world // args.context_parallel
    if args.global_batch_size < 1 or args.global_batch_size % (readers * args.micro_batch_size):
        raise OmniInputError(
            f"global_batch_size {args.global_batch_size} must be a multiple of {readers} readers x micro_batch_size "
            f"{args.micro_batch_size}"
        )


def settle_data(args: SFTArguments, processor, accelerator: Accelerator) -> None:
    """Notes every source's mean tokens per row in `args.data`, so that weights are shares of tokens."""
    if args.weight_of == "rows":
        args.data = [{key: value for key, value in s.items() if key != "mean_tokens"} for s in args.data]
    elif accelerator.is_main_process:
        accelerator.print("measuring the sources' mean tokens per row (give mean_tokens to skip this)")
        args.data = measure_mean_tokens(args.data, processor, args.patches_per_frame, args.workers, **row_limits(args))
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        args.data = broadcast_object_list([args.data])[0]


# ---- training ----


def train_sft(args: SFTArguments, prepare: Callable | None = None, how: str | None = None) -> None:
    """Runs one SFT stage; started again with the same `output_dir` it goes on where it was.

    Args:
        prepare: called with model, processor and device before the optimizers are made, changes the model in place;
            what it returns is called with every micro-batch before the model is (qad.py).
        how: the command and what it does, for the model card.
    """
    from .processing_omni import OmniProcessor

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = distributed.make_accelerator(args.max_grad_norm, log_with=args.report_to or None, project_dir=folder)
    sharded, main = distributed.is_sharded(accelerator), accelerator.is_main_process
    world, rank = accelerator.num_processes, accelerator.process_index
    check_arguments(args, world, sharded)
    readers = world // args.context_parallel  # processes with rows of their own
    accumulation = args.global_batch_size // (readers * args.micro_batch_size)
    resumed, saved = find_checkpoint(accelerator, folder, args.context_parallel)
    step, resolved = saved["step"], folder / "config.resolved.yaml"
    if resumed:
        resume_settings(args, resolved)
    processor = OmniProcessor.from_pretrained(resolve_checkpoint(args.processor or args.model))

    dtype = distributed.model_dtype(accelerator)
    model = build_model(args, dtype, None if args.lora is not None else resumed)
    distributed.prepare_expert_parallel(model, args.expert_parallel, accelerator)
    group = context_group(args.context_parallel)
    set_context_parallel(model, group)
    if args.lora is not None:
        model = start_lora(model, args.lora, resumed, args.seed)
    before = prepare(model, processor, accelerator.device) if prepare is not None else None
    recompute_activations(model, args.recompute)
    optimizers = make_optimizers(parameter_groups(model, args), args.optimizer)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    if not resumed:
        settle_data(args, processor, accelerator)
    settings = yaml.safe_dump(dataclasses.asdict(args), sort_keys=False)
    if main:
        write_atomically(resolved, settings)
    accelerator.print(
        settings + "\n" + (parameter_table(model, GROUPS, group_of) if args.lora is None else lora_table(model))
    )
    accelerator.print(memory_estimate(
        args, world, dtype, sharded, distributed.offloads(accelerator), torch.cuda.is_available(),
        args.micro_batch_size, model.config,
    ))  # fmt: skip
    accelerator.print(
        f"{accumulation} micro-batches x {readers} readers x {args.micro_batch_size} packed rows per step"
    )
    if resumed:
        accelerator.print(f"resuming from {resumed}")

    rows = PackedRows(
        Blend(args.data, args.seed), processor, args.micro_batch_size, rank=rank // args.context_parallel,
        world=readers, patches_per_frame=args.patches_per_frame, max_bad_share=args.max_bad_share,
        bad_rows=None if rank % args.context_parallel else folder / "bad_rows.jsonl", **row_limits(args),
    )  # fmt: skip
    if saved["data"] is not None:
        rows.load_state_dict(saved["data"])
    loader = iter(DataLoader(rows, batch_size=None, num_workers=args.workers))
    model, optimizers = distributed.prepare_training(accelerator, model, optimizers)
    if resumed and sharded:
        distributed.load_state(model, resumed)
    elif resumed:
        load_optimizers(optimizers, resumed / "optimizer.safetensors")
    unreached = args.lora is not None  # adapters of parts whose media have not been seen yet
    watch = watch_adapter_gradients(model) if unreached and sharded else None
    if main:
        accelerator.init_trackers("tensorboard")
    load = RouterLoad(model)
    previews = Previews(args, processor)
    model.train()
    bar = tqdm(total=args.steps, initial=step, mininterval=10, disable=not main)
    log, total, skipped = open(folder / "log.jsonl", "a"), Totals(), 0
    while step < args.steps:
        factor = cosine_factor(step, args.steps, args.warmup_fraction, args.min_learning_rate / args.learning_rate)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for one, peak in zip(optimizer.param_groups, rates, strict=True):
                one["lr"] = peak * factor
        # random windows of positions and dropout of adapters are functions of the step, so that resuming is exact
        torch.manual_seed((args.seed * 1_000_003 + step) * 65_536 + rank // args.context_parallel)
        batches, infos, own = [], [], []
        for batch in islice(loader, accumulation):
            infos.append(rows.consumed(batch.pop("info")))
            if unreached:
                own.append(batch)
            if world > 1:
                batch = distributed.pad_missing_modalities(batch, model_inside(model).config)
            if group is not None:
                batch = shard_batch(batch, rank % args.context_parallel, args.context_parallel)
            for name in PIXELS & batch.keys():
                # decoded media of a whole step can fill the host: held in the model's dtype, and where a shard is a
                # view that would keep all of its row, as a copy
                batch[name] = batch[name].to(dtype, copy=group is not None)
            batches.append(batch)
        tokens = distributed.agree_on_step(accelerator, model, batches)
        loss_sum = 0.0
        for number, batch in enumerate(batches):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            if before is not None:
                before(batch)
            with distributed.microbatch(accelerator, model, number == len(batches) - 1):
                output = model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=max(tokens, 1) / world)
                distributed.backward(accelerator, model, output.loss)
            loss_sum += output.loss.detach().float()
        if unreached:
            unreached = bool(check_adapter_gradients(model, own, watch))
        norm, applied = distributed.clip_and_step(accelerator, model, optimizers, args.max_grad_norm)
        step += 1
        bar.update()
        skipped = 0 if applied else skipped + 1
        if not applied:
            names = [name for info in infos for name in info["names"]]
            with open(folder / f"skipped-{rank}.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "grad_norm": str(norm), "rows": names}) + "\n")
            accelerator.print(f"step {step}: gradient norm {norm}: skipped; its rows stand in {folder}/skipped-*.jsonl")
            total.counts["skipped"] += 1
            if skipped >= args.max_skipped:
                raise OmniInputError(
                    f"{skipped} steps in a row without a finite gradient (max_skipped); rows of process {rank}: {names}"
                )
        total.add(accelerator.gather(loss_sum.reshape(1).to(accelerator.device)).mean().item(), norm, infos)
        last = step == args.steps
        if step % args.log_every == 0 or last:
            line = {"step": step, **total.line(readers), "lr": factor * args.learning_rate, **load.line()}
            line["bad_rows"] = sum(lane["bad"] for lane in rows.state["lanes"].values())
            if main:
                log.write(json.dumps(line) + "\n")
                log.flush()
            accelerator.log({name: value for name, value in line.items() if name != "step"}, step)
            bar.set_postfix(loss=line["loss"], tok_s=line["tokens_per_second"])
            total = Totals()
        if step % args.save_every == 0 or last:
            write_checkpoint(
                accelerator,
                folder,
                model,
                optimizers,
                {"step": step, "data": rows.state_dict(), "processes": [world, args.context_parallel]},
            )
        if args.eval_every and step % args.eval_every == 0 and not last:
            evaluate(accelerator, model, processor, args, folder, step, previews)
            total.started = time.time()
    bar.close()
    if args.lora is None:
        save_final(accelerator, model, folder / "final", args.final_dtype)
    else:
        save_adapter(model_inside(model), folder / "final")
    if main:
        processor.save_pretrained(folder / "final")
    table = evaluate(accelerator, model, processor, args, folder, step, previews)
    if main:
        write_model_card(folder, args, table, how)
    accelerator.end_training()


class Totals:
    """Sums between two log lines."""

    def __init__(self):
        self.started, self.losses, self.norms, self.packing = time.time(), [], [], []
        self.tokens, self.counts = Counter(), Counter()

    def add(self, loss: float, norm: float, infos: list[dict]) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        for info in infos:
            self.tokens.update(info["tokens"])
            self.packing.append(info["packing"])
            self.counts["samples"] += info["samples"]
            self.counts["trained"] += info["trained"]

    def line(self, readers: int) -> dict:
        """What is logged; tokens per second of all readers, counted on this one."""
        seconds, tokens = time.time() - self.started, sum(self.tokens.values())
        return {
            "loss": round(sum(self.losses) / len(self.losses), 4),
            "grad_norm": round(sum(self.norms) / len(self.norms), 3),
            "tokens_per_second": round(tokens * readers / seconds),
            "packing": round(sum(self.packing) / len(self.packing), 3),
            "samples": self.counts["samples"],
            "skipped": self.counts["skipped"],
            **{f"share_{kind}": round(count / max(1, tokens), 3) for kind, count in self.tokens.items()},
        }


__all__ = ["GROUPS", "SFTArguments", "load_arguments", "train_sft"]
