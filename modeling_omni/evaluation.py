"""Held-out accuracy of the nano model's skills: real prompts through `generate`, exact match on the answer."""

import torch


@torch.no_grad()
def answer_batch(model, processor, conversations: list[list[dict]], thinking: bool, max_new_tokens: int) -> list[str]:
    """Greedy answers (text after the reasoning) to conversations that end with a user's turn."""
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        enable_thinking=thinking,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    return [processor.split_reasoning(text)[1] if thinking else text.split("<|im_end|>")[0].strip() for text in texts]


def heldout_accuracy(
    model, processor, skills: list[str], samples: int = 100, batch_size: int = 25, first_seed: int = 10**6
) -> dict[str, float]:
    """Share of right answers per skill on `samples` held-out samples; skills that need a thought may think."""
    from .nano_data import make_sample, score

    table = {}
    for skill in skills:
        right = 0
        for start in range(0, samples, batch_size):
            rows = [make_sample(skill, first_seed + i, "heldout") for i in range(start, min(start + batch_size, samples))]
            prompts = [row["messages"][:-1] for row in rows]
            thinking = skill == "text_math"
            answers = answer_batch(model, processor, prompts, thinking, 64 if thinking else 24)
            right += sum(score(row, answer) for row, answer in zip(rows, answers))
        table[skill] = right / samples
    return table
