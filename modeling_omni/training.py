"""Supervised fine-tuning (paper 3.1): named groups of parameters, cosine schedule, checkpoints that resume exactly."""

import dataclasses
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from .configuration_omni import OmniConfig, resolve_checkpoint
from .data import Blend, PackedBatches
from .modeling_omni import OmniForConditionalGeneration

# Group name -> prefixes of parameter names; the longest prefix that fits decides.
GROUPS = {
    "language": ("model.language_model.",),
    "embeddings": ("model.language_model.embeddings.",),
    "head": ("lm_head.",),
    "vision": ("model.vision_tower.",),
    "vision_projector": ("model.vision_projector.",),
    "audio": ("model.audio_tower.",),
    "audio_projector": ("model.audio_projector.",),
}


@dataclass
class SFTArguments:
    """Every key of a stage's YAML file; the command line overrides the file, unknown keys are errors."""

    output_dir: str = field(metadata={"help": "folder for checkpoints, logs and the final model"})
    model: str | None = field(default=None, metadata={"help": "checkpoint to start from: a folder, hub id or 'nano'"})
    model_config: str | None = field(
        default=None, metadata={"help": "YAML of an OmniConfig: start from random weights"}
    )
    processor: str | None = field(default=None, metadata={"help": "processor to use; that of `model` if not given"})
    data: list[dict] = field(default_factory=list, metadata={"help": "sources: {path, weight, limit}"})
    train: list[str] = field(
        default_factory=lambda: list(GROUPS), metadata={"help": f"groups to train: {list(GROUPS)}"}
    )
    towers: dict[str, str] = field(
        default_factory=dict, metadata={"help": "group -> safetensors file of a pre-trained tower"}
    )
    steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    rows_per_step: int = field(default=64, metadata={"help": "rows (samples) per optimizer step on each process"})
    row_tokens: int = field(default=256, metadata={"help": "tokens of one packed row"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    group_learning_rates: dict[str, float] = field(
        default_factory=dict, metadata={"help": "peak rate of single groups"}
    )
    min_learning_rate: float = field(default=0.0, metadata={"help": "rate at the end of the cosine, for the peak rate"})
    warmup_fraction: float = field(default=0.05, metadata={"help": "share of steps of linear warm-up"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of matrices"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})
    seed: int = field(default=0, metadata={"help": "seed of data order and starting weights"})
    save_every: int = field(default=500, metadata={"help": "steps between checkpoints; the newest two are kept"})
    eval_every: int = field(
        default=0, metadata={"help": "steps between held-out tests of the nano skills in data; 0: end only"}
    )
    eval_samples: int = field(default=40, metadata={"help": "held-out samples per skill"})
    workers: int = field(default=1, metadata={"help": "data loader processes"})
    log_every: int = field(default=20, metadata={"help": "steps between log lines"})


def load_arguments(cls, argv: list[str] | None = None):
    """`--config file.yaml [--key value ...]` -> an instance of `cls`. Unknown keys are errors, on both sides."""
    parser = HfArgumentParser(cls)
    parser.add_argument("--config", help="YAML file with values of the options below")
    config_parser = HfArgumentParser([])
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(argv)[0].config
    values = {}
    if path is not None:
        values = yaml.safe_load(Path(path).read_text()) or {}
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


def group_of(name: str) -> str:
    """The group of a parameter by its name."""
    fitting = [
        (len(prefix), group) for group, prefixes in GROUPS.items() for prefix in prefixes if name.startswith(prefix)
    ]
    return max(fitting)[1]


def parameter_groups(model, args: SFTArguments) -> list[dict]:
    """Freezes what is not trained and returns AdamW's groups (decay on matrices only), each with its own peak rate."""
    unknown = (set(args.train) | set(args.group_learning_rates)) - set(GROUPS)
    if unknown:
        raise ValueError(f"unknown parameter groups {sorted(unknown)}; known: {list(GROUPS)}")
    groups = {}
    for name, parameter in model.named_parameters():
        group = group_of(name)
        parameter.requires_grad_(group in args.train)
        if parameter.requires_grad:
            decay = args.weight_decay if parameter.dim() > 1 and not name.endswith(("pos_embed", "token")) else 0.0
            groups.setdefault((group, decay), []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": decay,
            "lr": args.group_learning_rates.get(group, args.learning_rate),
            "name": group,
        }
        for (group, decay), params in groups.items()
    ]


def parameter_table(model) -> str:
    """Trained and frozen parameters of every group, as text."""
    counts = {group: [0, 0] for group in GROUPS}
    for name, parameter in model.named_parameters():
        counts[group_of(name)][not parameter.requires_grad] += parameter.numel()
    lines = [f"{'group':18}{'trained':>14}{'frozen':>14}"]
    lines += [f"{group:18}{trained:14,}{frozen:14,}" for group, (trained, frozen) in counts.items()]
    return "\n".join(
        lines + [f"{'all':18}{sum(c[0] for c in counts.values()):14,}{sum(c[1] for c in counts.values()):14,}"]
    )


def cosine_factor(step: int, steps: int, warmup_fraction: float, floor: float) -> float:
    """Linear warm-up, then a cosine from 1 to `floor` (a share of the peak rate)."""
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_model(args: SFTArguments) -> OmniForConditionalGeneration:
    """The model to start from: a checkpoint in float32, or random weights of `model_config`."""
    if (args.model is None) == (args.model_config is None):
        raise ValueError("give exactly one of `model` (a checkpoint) and `model_config` (random weights)")
    if args.model is not None:
        model = OmniForConditionalGeneration.from_pretrained(resolve_checkpoint(args.model), dtype=torch.float32)
    else:
        torch.manual_seed(args.seed)
        model = OmniForConditionalGeneration(OmniConfig(**yaml.safe_load(Path(args.model_config).read_text())))
    for group, path in args.towers.items():
        load_tower(model, group, path)
    return model


def load_tower(model, group: str, path: str) -> None:
    """Copies the parameters and buffers of one group from a safetensors file with our names."""
    from safetensors.torch import load_file

    (prefix,) = GROUPS[group]
    state = {name: value for name, value in load_file(path).items() if name.startswith(prefix)}
    missing = [n for n in model.state_dict() if n.startswith(prefix) and n not in state]
    if missing or not state:
        raise ValueError(f"{path} lacks {len(missing)} tensors of group {group!r}, e.g. {missing[:3]}")
    model.load_state_dict(state, strict=False)


def write_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """Writes `folder/step-N` under another name first, so that a kill or a full disk leaves the last good one."""
    target = folder / f"step-{step}"
    partial = folder / f"partial-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    torch.save({"step": step, "optimizer": optimizer.state_dict()}, partial / "training_state.pt")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in sorted(folder.glob("step-*"), key=lambda p: int(p.name[5:]))[:-2]:
        shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, if any."""
    return max(folder.glob("step-*"), key=lambda p: int(p.name[5:]), default=None)


def train_sft(args: SFTArguments) -> None:
    """Runs one SFT stage; started again with the same `output_dir` it goes on where it was."""
    from .processing_omni import OmniProcessor

    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError("training over several processes is not built yet: start train.py with one process")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(args)
    processor = OmniProcessor.from_pretrained(resolve_checkpoint(args.processor or args.model))
    groups = parameter_groups(model, args)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    peaks = [group["lr"] for group in optimizer.param_groups]
    step, resumed = 0, newest_checkpoint(folder)
    if resumed is not None:
        state = torch.load(resumed / "training_state.pt", weights_only=True)
        step = state["step"]
        loaded = OmniForConditionalGeneration.from_pretrained(resumed, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        optimizer.load_state_dict(state["optimizer"])
    settings = yaml.safe_dump(dataclasses.asdict(args), sort_keys=False)
    (folder / "config.resolved.yaml").write_text(settings)
    accelerator.print(settings + "\n" + parameter_table(model))
    if step:
        accelerator.print(f"resuming from {resumed}")

    batches = PackedBatches(Blend(args.data, args.seed), processor, args.rows_per_step, args.row_tokens, args.steps)
    loader = DataLoader(Subset(batches, range(step, args.steps)), batch_size=None, num_workers=args.workers)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    bar = tqdm(total=args.steps, initial=step, mininterval=10)
    log, sums, started = open(folder / "log.jsonl", "a"), [0.0, 0, 0.0], time.time()
    for batch in loader:
        factor = cosine_factor(step, args.steps, args.warmup_fraction, args.min_learning_rate / args.learning_rate)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        loss = model(**batch, use_cache=False, skip_logits=True).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        if loss.isfinite() and norm.isfinite():
            optimizer.step()
        else:
            accelerator.print(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}: skipped")
        optimizer.zero_grad()
        step += 1
        bar.update()
        sums = [sums[0] + loss.item(), sums[1] + int(batch["attention_mask"].sum()), sums[2] + float(norm)]
        if step % args.log_every == 0:
            elapsed = time.time() - started
            line = {
                "step": step,
                "loss": round(sums[0] / args.log_every, 4),
                "grad_norm": round(sums[2] / args.log_every, 3),
                "lr": factor * args.learning_rate,
                "tokens_per_second": round(sums[1] / elapsed),
                "packing": round(float(batch["attention_mask"].float().mean()), 3),
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix(loss=line["loss"], tok_s=line["tokens_per_second"])
            sums, started = [0.0, 0, 0.0], time.time()
        if step % args.save_every == 0 and step < args.steps:
            write_checkpoint(folder, accelerator.unwrap_model(model), optimizer, step)
        if args.eval_every and step % args.eval_every == 0 and step < args.steps:
            evaluate(accelerator.unwrap_model(model), processor, args, folder, step)
            model.train()
            started = time.time()
    bar.close()
    model = accelerator.unwrap_model(model)
    write_checkpoint(folder, model, optimizer, step)
    model.save_pretrained(folder / "final")
    processor.save_pretrained(folder / "final")
    evaluate(model, processor, args, folder, step)


def evaluate(model, processor, args: SFTArguments, folder: Path, step: int) -> None:
    """Held-out accuracy of every `nano:` skill in the blend, printed and added to `heldout.jsonl`."""
    from .evaluation import heldout_accuracy

    skills = [source["path"].removeprefix("nano:") for source in args.data if source["path"].startswith("nano:")]
    model.eval()
    table = heldout_accuracy(model, processor, skills, args.eval_samples)
    with open(folder / "heldout.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **table}) + "\n")
    tqdm.write(f"step {step} held out: " + ", ".join(f"{skill} {value:.2f}" for skill, value in table.items()))


__all__ = ["SFTArguments", "load_arguments", "train_sft"]
