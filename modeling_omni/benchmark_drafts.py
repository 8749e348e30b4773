"""What a draft head (modeling_mtp.py) is worth, on nano's held-out skills.

    python -m modeling_omni.benchmark_drafts --model runs/nano/mtp/final

tells for every skill how many drafts are accepted, how many tokens a pass of the trunk writes, and the time per token
without and with drafts (prefill included), and checks that the answers are the same.
"""

import argparse
import json
import time
from collections import Counter

import torch


@torch.no_grad()
def measure(model, processor, skills: list[str], drafts: list[int], samples: int = 20) -> list[dict]:
    """Greedy answers to held-out samples, one at a time, without drafts and with each number of them.

    Returns:
        [{"skill", "drafts", "passes", "tokens", "drafted", "accepted" (see `draft_and_verify`), "same" (whether all
        answers are those without drafts), "seconds" (decoding and prefill)}].
    """
    from .evaluation import FIRST_SEED, THOUGHT_SKILLS
    from .inference import generation_options
    from .nano_data import make_sample

    rows = []
    for skill in skills:
        think = skill in THOUGHT_SKILLS
        prompts = []
        for seed in range(FIRST_SEED, FIRST_SEED + samples):
            inputs = processor.apply_chat_template(
                [make_sample(skill, seed, "heldout")["messages"][:-1]],
                add_generation_prompt=True, enable_thinking=think, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
            prompts.append({name: value.to(model.device) for name, value in inputs.items()})
        options = generation_options(model, processor, 64)
        plain = None
        for number in [0, *drafts]:
            more, counts, answers = {}, Counter(), []
            if number:
                more = {"mtp_drafts": number, "mtp_counts": counts}
            model.generate(**prompts[0], **options, **more)  # the first call of a kind is slow
            counts.clear()
            start = time.perf_counter()
            for inputs in prompts:
                answers.append(model.generate(**inputs, **options, **more)[0, inputs["input_ids"].shape[1] :].tolist())
            seconds, tokens = time.perf_counter() - start, sum(len(answer) - 1 for answer in answers)
            plain = plain or answers
            row = {"skill": skill, "drafts": number, "tokens": tokens, "passes": tokens, "drafted": 0, "accepted": 0}
            rows.append(row | counts | {"same": answers == plain, "seconds": seconds})
    return rows


def markdown(rows: list[dict]) -> str:
    """`measure` as a table, with a line for all skills together."""
    totals = {}
    for row in rows:
        total = totals.setdefault(row["drafts"], {"skill": "all", "drafts": row["drafts"], "same": True})
        for name in ("tokens", "passes", "drafted", "accepted", "seconds"):
            total[name] = total.get(name, 0) + row[name]
        total["same"] &= row["same"]
    lines = ["| skill | drafts | drafts accepted | accepted per pass | tokens per pass | ms per token | speed | same |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|---|")
    for row in [*rows, *totals.values()]:
        per_token = row["seconds"] / max(1, row["tokens"])
        if row["drafts"] == 0:
            plain = per_token
        share = f"{100 * row['accepted'] / row['drafted']:.0f} %" if row["drafted"] else ""
        per_pass = f"{row['accepted'] / row['passes']:.2f}" if row["drafted"] else ""
        lines.append(
            f"| {row['skill']} | {row['drafts']} | {share} | {per_pass} | {row['tokens'] / max(1, row['passes']):.2f} "
            f"| {1e3 * per_token:.2f} | {plain / per_token:.2f} | {'yes' if row['same'] else 'NO'} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    from transformers.utils import logging as transformers_logging

    from .inference import load
    from .nano_data import SKILLS

    transformers_logging.disable_progress_bar()
    text = [skill for skill in SKILLS if skill.startswith("text_")]
    parser = argparse.ArgumentParser(prog="python -m modeling_omni.benchmark_drafts", description=measure.__doc__)
    parser.add_argument("--model", required=True, help="a checkpoint with a draft head")
    parser.add_argument("--skills", default=",".join(text), help="comma-separated (default: all of text alone)")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3], help="drafts of a pass (default: 1 2 3)")
    parser.add_argument("--samples", type=int, default=20, help="of every skill (default: 20)")
    parser.add_argument("--out", help="also write the rows as JSON")
    given = parser.parse_args(argv)
    model, processor = load(given.model)
    rows = measure(model, processor, given.skills.split(","), given.drafts, given.samples)
    print(markdown(rows))
    if given.out:
        with open(given.out, "w") as file:
            json.dump(rows, file, indent=1)
    return 0


__all__ = ["markdown", "measure"]

if __name__ == "__main__":
    raise SystemExit(main())
