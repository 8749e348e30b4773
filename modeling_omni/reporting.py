"""What a person sees of a training run: parameters, load of the experts, previews, held-out tests, the model card."""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .data import Blend
from .distributed import is_sharded
from .media import OmniInputError
from .modeling_language import TopKRouter
from .packing import PackedRows, row_limits

NANO = "nano:"


def parameter_table(model, groups: dict[str, str], group_of) -> str:
    """Trained and frozen parameters of every group, as text."""
    counts = {group: [0, 0] for group in groups}
    for name, parameter in model.named_parameters():
        counts[group_of(name)][not parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    counts = {group: pair for group, pair in counts.items() if any(pair) or group != "mtp"}  # most have no such head
    counts["all"] = [sum(column) for column in zip(*counts.values())]
    lines = [f"{'group':18}{'trained':>16}{'frozen':>16}"]
    return "\n".join(lines + [f"{group:18}{trained:16,}{frozen:16,}" for group, (trained, frozen) in counts.items()])


class RouterLoad:
    """Counts which experts the tokens of this process are sent to, between two log lines."""

    def __init__(self, model):
        self.counts = {}
        for name, module in model.named_modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(self._count(name, module.config.n_routed_experts))

    def _count(self, name: str, experts: int):
        def hook(module, inputs, output):
            if module.training:
                counts = output[0].flatten().bincount(minlength=experts)
                self.counts[name] = self.counts.get(name, 0) + counts

        return hook

    def line(self) -> dict[str, float]:
        """Load of the busiest expert of any layer in shares of the mean (1 is even), and the share of idle experts."""
        if not self.counts:
            return {}
        counts = torch.stack(list(self.counts.values())).float()
        self.counts = {}
        busiest = (counts.max(1).values / counts.mean(1).clamp(min=1e-9)).max()
        return {
            "busiest_expert": round(float(busiest), 2),
            "idle_experts": round(float((counts == 0).float().mean()), 3),
        }


class Previews:
    """Fixed prompts, the first rows of the blend under a seed of their own, with what the model answers to them."""

    def __init__(self, args, processor):
        self.processor, self.rows = processor, []
        fixed = [source for source in args.data if not source.get("streaming")]
        if args.previews and fixed:
            blend = Blend(fixed, seed=args.seed + 1, split="heldout")
            rows = [blend.read(place)[2] for place in range(args.previews)]
            self.rows = [row for row in rows if not isinstance(row, Exception)]

    def show(self, model, folder: Path, step: int) -> None:
        """Prints question, expected and given answer and adds them to `previews.jsonl`."""
        from .evaluation import answer_batch

        for row in self.rows:
            turns = row["messages"]
            last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
            content = turns[last - 1]["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            asked = " ".join(part.get("text") or f"[{part['type']}]" for part in parts)
            thinking = bool(turns[last].get("reasoning_content"))
            (answer,) = answer_batch(model, self.processor, [turns[:last]], thinking, 64)
            line = {"step": step, "asked": asked[:500], "expected": turns[last]["content"], "answered": answer}
            append_line(folder / "previews.jsonl", line)
            tqdm.write(f"  {line['asked'][:100]!r}: expected {str(line['expected'])[:80]!r}, got {answer[:80]!r}")


def heldout_skills(args) -> list[str]:
    """The nano skills that a stage is tested on: `eval_skills`, or those in its data."""
    from .nano_data import SKILLS

    if args.eval_skills == ["all"]:
        return list(SKILLS)
    found = [source["path"].removeprefix(NANO) for source in args.data if source["path"].startswith(NANO)]
    return args.eval_skills or list(dict.fromkeys(found))


@torch.no_grad()
def heldout_losses(model, processor, args, device) -> dict[str, float]:
    """Mean loss per trained token on the first rows of every source of `eval_data`; all processes run the same rows."""
    losses = {}
    for source in args.eval_data:
        rows = PackedRows(Blend([source | {"mean_tokens": 1.0}]), processor, 1, **row_limits(args))
        total, tokens = 0.0, 0
        for batch in islice(rows, args.eval_rows):
            trained = batch.pop("info")["trained"]
            batch = {name: value.to(device) for name, value in batch.items()}
            total += model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1).loss.item()
            tokens += trained
        losses[source["path"]] = round(total / max(1, tokens), 4)
    return losses


def evaluate(
    accelerator, model, processor, args, folder: Path, step: int, previews: Previews | None
) -> dict[str, float]:
    """Losses on `eval_data`, previews, and the held-out accuracy of `heldout_skills`: printed, logged and written down.

    The processes share the skills out among themselves; with ZeRO-3 there are losses only.

    Args:
        model: the prepared model.

    Returns:
        Accuracy of every skill.
    """
    from .checkpointing import model_inside

    was_training, table = model.training, {}
    model.eval()
    losses = heldout_losses(model, processor, args, accelerator.device)
    if accelerator.is_main_process and losses:
        append_line(folder / "heldout_loss.jsonl", {"step": step, **losses})
        accelerator.log({f"heldout_loss/{path}": loss for path, loss in losses.items()}, step)
        tqdm.write(f"step {step} held-out loss: " + ", ".join(f"{path} {loss:.3f}" for path, loss in losses.items()))
    if not is_sharded(accelerator):
        from .evaluation import heldout_accuracy

        inside, skills = model_inside(model), heldout_skills(args)
        if accelerator.is_main_process and previews is not None:
            previews.show(inside, folder, step)
        if skills and args.eval_samples:
            own = skills[accelerator.process_index :: accelerator.num_processes]
            found = dict(gather_object(list(heldout_accuracy(inside, processor, own, args.eval_samples).items())))
            table = {skill: found[skill] for skill in skills if skill in found}
            if accelerator.is_main_process:
                append_line(folder / "heldout.jsonl", {"step": step, **table})
                shown = ", ".join(f"{skill} {value:.2f}" for skill, value in table.items())
                tqdm.write(f"step {step} held out: {shown}")
            accelerator.log({f"heldout/{skill}": value for skill, value in table.items()}, step)
    model.train(was_training)
    accelerator.wait_for_everyone()
    return table


def append_line(path: Path, line: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line, default=str) + "\n")


# metrics of training that a table of stages shows: of GSPO and distillation, and of preference pairs
TRAINING_METRICS = ("reward", "kl", "rewards/accuracies", "rewards/margins")


def stage_names(runs: list[str | Path]) -> dict[str, str]:
    """Run -> the name of its folder or file, or the whole path where several are called the same."""
    names = {str(run): Path(run).stem if Path(run).suffix == ".json" else Path(run).name for run in runs}
    taken = list(names.values())
    return {run: name if taken.count(name) == 1 else run for run, name in names.items()}


def stage_table(runs: list[str | Path]) -> dict[str, dict[str, float]]:
    """Stage -> skill -> last held-out accuracy, from the `heldout.jsonl` of runs or what `infer.py eval --out` wrote.

    Raises:
        OmniInputError: a folder without held-out results.
    """
    table = {}
    for run, name in zip(map(Path, runs), map(stage_names(runs).get, map(str, runs))):
        file = run / "heldout.jsonl"
        if run.suffix == ".json" and run.is_file():
            tested = json.loads(run.read_text())["table"]
            table[name] = {row["skill"]: row["accuracy"] for row in tested if "accuracy" in row}
            continue
        if not file.is_file():
            raise OmniInputError(f"{run} has no heldout.jsonl; give the output_dir of finished runs")
        last = json.loads(file.read_text().splitlines()[-1])
        table[name] = {skill: value for skill, value in last.items() if skill != "step"}
    return table


def training_curves(run: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) of a run's `log.jsonl`: TRAINING_METRICS and what stands below "reward/" and "kl/"."""
    file, curves = Path(run) / "log.jsonl", {}
    steps: dict[int, dict] = {}  # steps that were run twice, after a kill, stand twice in the log
    for line in file.read_text().splitlines() if file.is_file() else ():
        line = json.loads(line)
        steps.setdefault(line["step"], {}).update(line)
    for step in sorted(steps):
        for name, value in steps[step].items():
            if (name in TRAINING_METRICS or name.startswith(("reward/", "kl/"))) and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((step, float(value)))
    return curves


def first_and_last(curve: list[tuple[int, float]]) -> tuple[float, float]:
    """Means of the first and of the last tenth of a curve."""
    part = max(1, len(curve) // 10)
    values = [value for _, value in curve]
    return sum(values[:part]) / part, sum(values[-part:]) / part


def stages_markdown(runs: list[str | Path]) -> str:
    """Held-out skills after every stage, and what training metrics rose from and to in every stage that has some."""
    table = stage_table([run for run in runs if Path(run).suffix == ".json" or (Path(run) / "heldout.jsonl").is_file()])
    skills = list(dict.fromkeys(skill for scores in table.values() for skill in scores))
    lines = []
    if table:
        lines += [f"| held out, % | {' | '.join(table)} |", f"|---|{'---:|' * len(table)}"]
    for skill in skills:
        cells = [f"{100 * scores[skill]:.0f}" if skill in scores else "" for scores in table.values()]
        lines.append(f"| {skill} | {' | '.join(cells)} |")
    curves = {name: training_curves(run) for run, name in stage_names(runs).items()}
    curves = {stage: found for stage, found in curves.items() if found}
    metrics = list(dict.fromkeys(name for found in curves.values() for name in found))
    if metrics:
        lines += ["", f"| in training, from -> to | {' | '.join(curves)} |", f"|---|{'---:|' * len(curves)}"]
    for name in metrics:
        ends = [first_and_last(found[name]) if name in found else None for found in curves.values()]
        cells = ["" if end is None else f"{end[0]:.3f} -> {end[1]:.3f}" for end in ends]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report_command(argv: list[str]) -> None:
    """`train.py report RUN... [--plot FILE.png]`: what every skill scored after every stage, as a table and a plot."""
    parser = argparse.ArgumentParser(prog="train.py report", description=report_command.__doc__)
    parser.add_argument("runs", nargs="+", help="output folders of stages, in order, or JSON files of infer.py eval")
    parser.add_argument("--plot", help="also draw it into this file (.png, .svg)")
    options = parser.parse_args(argv)
    stage_table(options.runs)  # raises for folders that are no runs
    report_stages(options.runs, options.plot)


def report_stages(runs: list[str | Path], plot: str | None = None) -> None:
    """Prints `stages_markdown` and draws `plot_stages`; stages that were not tested or rewarded are left out."""
    print(stages_markdown(runs), flush=True)
    if plot:
        plot_stages(runs, plot)


def plot_stages(runs: list[str | Path], path: str) -> None:
    """A cell per skill and stage, the darker the better; a panel for every modality (first word of a skill's name) with
    many skills, one for the rest; and one of the rewards in training, step after step."""
    from matplotlib.figure import Figure

    table = stage_table([run for run in runs if Path(run).suffix == ".json" or (Path(run) / "heldout.jsonl").is_file()])
    kinds = {}
    for skill in dict.fromkeys(skill for scores in table.values() for skill in scores):
        kinds.setdefault(skill.split("_")[0], []).append(skill)
    panels = [own for own in kinds.values() if len(own) > 6]
    panels += [rest] if (rest := [skill for own in kinds.values() if len(own) <= 6 for skill in own]) else []
    curves = {name: training_curves(run).get("reward") for run, name in stage_names(runs).items()}
    curves = {stage: curve for stage, curve in curves.items() if curve}
    columns = len(panels) + bool(curves)
    if not columns:
        return
    rows = max(map(len, panels), default=10)
    figure = Figure(figsize=(max(4.0, columns * (1.6 + 0.4 * len(table))), 1.2 + 0.27 * rows), layout="constrained")
    every = figure.subplots(1, columns, squeeze=False)[0]
    for axes, own in zip(every, panels):
        cells = [[100 * scores.get(skill, float("nan")) for scores in table.values()] for skill in own]
        axes.imshow(cells, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for y, values in enumerate(cells):
            for x, value in enumerate(values):
                if value == value:  # not NaN: the skill was not tested there
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="w" if value > 60 else "k", size=8)
        axes.set_xticks(range(len(table)), list(table), rotation=45, ha="left", rotation_mode="anchor")
        axes.set_yticks(range(len(own)), own)
        axes.set_ylim(rows - 0.5, -0.5)  # cells of all panels are of one size
        axes.tick_params(length=0, labelsize=9, top=False, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
    start = 0
    for stage, curve in curves.items():
        steps = [start + step for step, _ in curve]
        every[-1].plot(steps, [100 * value for _, value in curve], linewidth=1, label=stage)
        every[-1].set(title="reward in training", xlabel="step", ylim=(0, 101))
        every[-1].legend(fontsize=7)
        start = steps[-1]
    figure.suptitle("held-out accuracy after every stage, %")
    figure.savefig(path, dpi=110)


def plot_lines(
    path, title: str, names: list[str], lines: dict[str, list], label: str, right: list | None = None, right_label=""
) -> None:
    """Values over named places: a thin line per key of `lines` ("mean" is thick), `right` as bars on a second axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.1 * len(names) + 3), 4.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    if right is not None:
        bars = axes.twinx()
        bars.bar(places, right, width=0.5, color="0.88")
        bars.set(ylabel=right_label, ylim=(0, 1.4 * max(right)))
        axes.set_zorder(bars.get_zorder() + 1)
        axes.patch.set_visible(False)
    for name, values in lines.items():
        values = [float("nan") if value is None else value for value in values]
        style = {"color": "k", "linewidth": 2.5} if name == "mean" else {"linewidth": 1}
        axes.plot(places, values, marker="o", markersize=3, label=name, **style)
    axes.set_xticks(places, names, rotation=20 if max(map(len, names)) > 8 else 0)
    axes.set(title=title, ylabel=label, ylim=(0, 101))
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=110)


def write_model_card(folder: Path, args, table: dict[str, float], how: str | None = None) -> None:
    """`final/README.md`: from what, on what and how (command and size of a step) the model was trained, its scores."""
    how = how or f"`train.py sft`: {args.steps} steps of {args.global_batch_size} rows of {args.row_tokens} tokens"
    start = args.model or f"random weights ({args.model_config})"
    shares = sum(float(source.get("weight", 1.0)) for source in args.data)
    kind, trained = "Weights", ", ".join(args.train)
    if args.lora is not None:
        kind, trained = "Adapters (LoRA)", args.lora
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: any-to-any",
        *([f"base_model: {args.model}"] if args.model else []),
        "---",
        "",
        f"# {Path(args.output_dir).name}",
        "",
        f"{kind} trained from {start} with {how}. Every setting is in `config.resolved.yaml` of the run, the loss in"
        " `log.jsonl`.",
        "",
        f"Trained: {trained}. Peak learning rate {args.learning_rate:g}.",
        "",
        f"| data | share of {args.weight_of} |",
        "|---|---:|",
        *(f"| {s['path']} | {100 * float(s.get('weight', 1.0)) / shares:.1f} % |" for s in args.data),
    ]
    if table:
        lines += ["", f"| held-out skill | accuracy ({args.eval_samples} samples) |", "|---|---:|"]
        lines += [f"| {skill} | {100 * value:.0f} % |" for skill, value in table.items()]
    (folder / "final" / "README.md").write_text("\n".join(lines) + "\n")


__all__ = [
    "Previews",
    "RouterLoad",
    "evaluate",
    "parameter_table",
    "plot_lines",
    "report_command",
    "report_stages",
    "write_model_card",
]
