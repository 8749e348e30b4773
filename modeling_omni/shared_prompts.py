"""Prompts that stand in several rows of a batch and are read once (rollouts of reinforcement learning).

Shape legend: B rows, U distinct prompts, S prompt tokens, D hidden size.
"""

import torch
from transformers import DynamicCache


def distinct_rows(numbers: list[int]) -> tuple[list[int], list[int]]:
    """Where each number stands first, and for every place which of these it is: [7, 7, 3] -> [0, 2], [0, 0, 1]."""
    order = {number: i for i, number in enumerate(dict.fromkeys(numbers))}
    return [numbers.index(number) for number in order], [order[number] for number in numbers]


@torch.no_grad()
def read_prompts(
    model, prompts: list[int], embeds_BSD: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> DynamicCache:
    """The cache of B rows behind all of their prompt but its last token, with one pass over the U distinct prompts.

    Args:
        model: `OmniModel`. prompts: for each of the B rows, any number that is the same where the prompt is.
        embeds_BSD: media in place. attention_mask: [B, S], 0 on padding.
    """
    firsts, prompt_of = distinct_rows(prompts)
    cache = DynamicCache(config=model.config.llm_config)
    mask = None if attention_mask is None else attention_mask[firsts, :-1]
    model(inputs_embeds=embeds_BSD[firsts, :-1], attention_mask=mask, past_key_values=cache)
    cache.reorder_cache(torch.tensor(prompt_of, device=embeds_BSD.device))
    return cache
