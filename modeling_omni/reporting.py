"""What a person sees of a training run: parameters, load of the experts, previews, held-out tests, the model card."""

import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .data import Blend
from .modeling_language import TopKRouter

NANO = "nano:"


def parameter_table(model, groups: dict[str, str], group_of) -> str:
    """Trained and frozen parameters of every group, as text."""
    counts = {group: [0, 0] for group in groups}
    for name, parameter in model.named_parameters():
        counts[group_of(name)][not parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    counts["all"] = [sum(column) for column in zip(*counts.values())]
    lines = [f"{'group':18}{'trained':>16}{'frozen':>16}"]
    return "\n".join(lines + [f"{group:18}{trained:16,}{frozen:16,}" for group, (trained, frozen) in counts.items()])


class RouterLoad:
    """Counts which experts the tokens of this process are sent to, between two log lines."""

    def __init__(self, model):
        self.counts = {}
        for name, module in model.named_modules():
            if isinstance(module, TopKRouter):
                module.register_forward_hook(self._count(name, module.weight.shape[0] or module.num_experts))

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
            self.rows = [blend[place] for place in range(args.previews)]

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
            with open(folder / "previews.jsonl", "a") as file:
                file.write(json.dumps(line, default=str) + "\n")
            tqdm.write(f"  {line['asked'][:100]!r}: expected {str(line['expected'])[:80]!r}, got {answer[:80]!r}")


def evaluate(accelerator, model, processor, args, folder: Path, step: int, previews: Previews) -> dict[str, float]:
    """Previews and the held-out accuracy of every `nano:` skill in the blend, printed and added to `heldout.jsonl`.

    The first process does it while the others wait.
    """
    table = {}
    if accelerator.is_main_process:
        from .evaluation import heldout_accuracy

        was_training = model.training
        model.eval()
        with torch.no_grad():
            previews.show(model, folder, step)
            skills = [source["path"].removeprefix(NANO) for source in args.data if source["path"].startswith(NANO)]
            if skills and args.eval_samples:
                table = heldout_accuracy(model, processor, list(dict.fromkeys(skills)), args.eval_samples)
        model.train(was_training)
        if table:
            with open(folder / "heldout.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **table}) + "\n")
            accelerator.log({f"heldout/{skill}": value for skill, value in table.items()}, step)
            tqdm.write(f"step {step} held out: " + ", ".join(f"{skill} {value:.2f}" for skill, value in table.items()))
    accelerator.wait_for_everyone()
    return table


def write_model_card(folder: Path, args, table: dict[str, float]) -> None:
    """`final/README.md`: from what, on what and how the model was trained, and what it scored."""
    start = args.model or f"random weights ({args.model_config})"
    shares = sum(float(source.get("weight", 1.0)) for source in args.data)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: any-to-any",
        *([f"base_model: {args.model}"] if args.model else []),
        "---",
        "",
        f"# {Path(args.output_dir).name}",
        "",
        f"{'Adapters (LoRA)' if args.lora else 'Weights'} trained from {start} with `train.py sft`: {args.steps} steps"
        f" of {args.global_batch_size} rows of {args.row_tokens} tokens. Every setting is in `config.resolved.yaml`"
        " of the run, the loss in `log.jsonl`.",
        "",
        f"Trained: {args.lora if args.lora else ', '.join(args.train)}. Peak learning rate {args.learning_rate:g}.",
        "",
        f"| data | share of {args.weight_of} |",
        "|---|---:|",
        *(f"| {s['path']} | {100 * float(s.get('weight', 1.0)) / shares:.1f} % |" for s in args.data),
    ]
    if table:
        lines += ["", f"| held-out skill | accuracy ({args.eval_samples} samples) |", "|---|---:|"]
        lines += [f"| {skill} | {100 * value:.0f} % |" for skill, value in table.items()]
    (folder / "final" / "README.md").write_text("\n".join(lines) + "\n")


__all__ = ["Previews", "RouterLoad", "evaluate", "parameter_table", "write_model_card"]
