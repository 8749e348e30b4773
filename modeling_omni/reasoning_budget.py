"""Reasoning budgets: a thought that runs too long is ended, and the answer keeps its room (paper section 4.5).

From `budget` tokens of thought on, the thought ends (`</think>` is forced) behind the first newline. From half the
grace period on it also ends behind a sentence, and when the grace period is over it ends wherever it is; both force a
newline first, as every thought in training ends with one. A thought that the model ends itself is never touched, nor
is a row without a thought.

Everything is recomputed from the ids at every step, so that beams, reordered rows and `num_return_sequences` need no
bookkeeping. Shapes: B rows, T generated tokens, V ids of the vocabulary.
"""

import functools
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from .media import OmniInputError
from .prompt_omni import TextCodec

GRACE = 1024  # paper 4.5, where neither the call nor the checkpoint says
ANSWER_SHARE = 8  # an eighth of max_new_tokens is left for the answer: with 16,384, the paper's 13,312 + 1,024
UNLIMITED = 2**40
SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")  # the last three are CJK


@dataclass(frozen=True, eq=False)
class ThoughtTokens:
    """Ids that matter to a budget.

    Attributes:
        opens, closes: `<think>` and `</think>`.
        newline: the id that spells one newline; None if the vocabulary has none.
        has_newline, ends_sentence: bool [V + 1], where V stands for every id beyond the tokenizer.
    """

    opens: int
    closes: int
    newline: int | None
    has_newline: torch.Tensor
    ends_sentence: torch.Tensor


@functools.lru_cache(maxsize=8)
def thought_tokens(codec: TextCodec) -> ThoughtTokens:
    """Reads the whole vocabulary, once per tokenizer (`processor.codec`).

    Raises:
        OmniInputError: a tokenizer without thinking marks.
    """
    marks = [codec.special_ids.get(mark) for mark in ("<think>", "</think>")]
    if None in marks:
        raise OmniInputError("a reasoning budget needs a tokenizer with <think> and </think>; this one lacks them")
    texts = codec.plain.decode_batch([[i] for i in range(codec.num_tokens)], skip_special_tokens=False)
    texts = ["" if i in codec.reserved else text for i, text in enumerate(texts)]
    spelt = codec.encode("\n")
    newline = spelt[0] if len(spelt) == 1 else next((i for i, text in enumerate(texts) if text == "\n"), None)
    return ThoughtTokens(
        *marks,
        newline,
        torch.tensor(["\n" in text for text in texts] + [False]),
        torch.tensor([text.rstrip(" ").endswith(SENTENCE_ENDS) for text in texts] + [False]),
    )


def fit_budget(
    budget: int, grace: int, max_new_tokens: int, answer_room: int | None = None
) -> tuple[int, int, str | None]:
    """A budget and a grace period with which the answer has room: budget + grace + room <= max_new_tokens.

    The grace period gives way first, to no less than an eighth of what the thought may have, then the budget.

    Args:
        answer_room: tokens for the answer and the two that a forced end may take; None: max_new_tokens // 8.

    Returns:
        budget, grace, and a sentence about what was lowered (None if nothing was).
    """
    room = max(2, max_new_tokens // ANSWER_SHARE if answer_room is None else answer_room)
    available = max(0, max_new_tokens - room)
    fitting_grace = min(grace, max(available - budget, available // 8))
    fitting = min(budget, available - fitting_grace)
    if (fitting, fitting_grace) == (budget, grace):
        return budget, grace, None
    return (
        fitting,
        fitting_grace,
        f"a reasoning budget of {budget} tokens and {grace} of grace leave no room for the answer in {max_new_tokens} "
        f"new tokens; lowered to {fitting} and {fitting_grace}",
    )


def reasoning_limits(
    model, max_new_tokens: int, budget: int | None = None, grace: int | None = None
) -> tuple[int | None, int, str | None]:
    """The budget of a request, as `fit_budget` leaves it; None: unlimited.

    Args:
        budget: None takes `reasoning_budget` of generation_config.json, unlimited where it has none; negative:
            unlimited.
        grace: None takes `reasoning_grace` of generation_config.json, else GRACE.

    Raises:
        OmniInputError: a negative grace period.
    """
    defaults = model.generation_config
    budget = getattr(defaults, "reasoning_budget", None) if budget is None else budget
    grace = getattr(defaults, "reasoning_grace", None) if grace is None else grace
    grace = GRACE if grace is None else grace
    if grace < 0:
        raise OmniInputError(f"the reasoning grace period is {grace} tokens; give 0 or more")
    if budget is None or budget < 0:
        return None, grace, None
    return fit_budget(budget, grace, max_new_tokens)


def thought_is_open(prompt_BS: torch.Tensor, tokens: ThoughtTokens) -> torch.Tensor:
    """Which prompts end inside `<think>`, bool [B]."""
    closed_B = torch.zeros(len(prompt_BS), dtype=torch.bool, device=prompt_BS.device)
    return _open_after(prompt_BS, closed_B, tokens)[0][:, -1]


def _open_after(tokens_BT, opened_B, tokens: ThoughtTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """After 0, 1 .. T tokens: whether a thought is open, bool [B, T + 1], and where its last mark stands (0: in the
    prompt, t: t-th token), [B, T + 1]."""
    marks = (tokens_BT == tokens.opens).long() - (tokens_BT == tokens.closes).long()
    marks = torch.cat([opened_B.long()[:, None] * 2 - 1, marks], 1)
    places = torch.arange(marks.shape[1], device=marks.device) * (marks != 0)
    last = places.cummax(1).values
    return marks.gather(1, last) == 1, last


def forced_tokens(
    tokens_BT: torch.Tensor,
    opened_B: torch.Tensor,
    budget_B: torch.Tensor,
    grace_B: torch.Tensor,
    tokens: ThoughtTokens,
) -> torch.Tensor:
    """What the budget demands after 0, 1 .. T generated tokens: an id, or -1 where the model is free.

    Args:
        tokens_BT: [B, T] generated ids.
        opened_B: bool [B], the prompt has opened a thought.
        budget_B, grace_B: [B].

    Returns:
        [B, T + 1]; column t depends on the first t tokens alone.
    """
    open_BT, last_mark_BT = _open_after(tokens_BT, opened_B, tokens)
    places = torch.arange(open_BT.shape[1], device=open_BT.device)
    just_opened_BT = places == last_mark_BT
    thought_BT = (open_BT & ~just_opened_BT).long().cumsum(1)  # tokens of all thoughts so far, marks left out
    known = torch.nn.functional.pad(tokens_BT.clamp(max=len(tokens.has_newline) - 1), (1, 0), value=-1)
    newline_BT = tokens.has_newline[known] & (places > 0)
    sentence_BT = tokens.ends_sentence[known] & (places > 0)
    budget, grace = budget_B[:, None], grace_B[:, None]
    over_BT = open_BT & (thought_BT >= budget)
    late_BT = (thought_BT >= budget + grace) | (sentence_BT & (thought_BT >= budget + grace // 2))
    closes_BT = newline_BT | just_opened_BT
    if tokens.newline is None:
        closes_BT = closes_BT | late_BT
    forced_BT = torch.full_like(last_mark_BT, -1)
    if tokens.newline is not None:
        forced_BT = forced_BT.masked_fill(over_BT & late_BT, tokens.newline)
    return forced_BT.masked_fill(over_BT & closes_BT, tokens.closes)


def _per_row(values, rows: int, unlimited: bool, name: str) -> torch.Tensor:
    values = list(values) if isinstance(values, (list, tuple, torch.Tensor)) else [values] * rows
    if len(values) != rows:
        raise OmniInputError(f"{len(values)} values of {name} for {rows} prompts; give one, or one per prompt")
    values = [None if value is None else int(value) for value in values]
    if not unlimited and any(value is None or value < 0 for value in values):
        raise OmniInputError(f"{name} is {values}; give 0 or more")
    return torch.tensor([UNLIMITED if value is None or value < 0 else min(value, UNLIMITED) for value in values])


class ReasoningBudget(LogitsProcessor):
    """Ends thoughts that run over their budget; goes into `generate(logits_processor=[...])`.

    Args:
        processor (`OmniProcessor`): its tokenizer is read once.
        prompt_ids: [B, S], the `input_ids` that `generate` gets.
        budget: tokens of thought, for all rows or one per prompt; None or negative: unlimited.
        grace: tokens beyond it in which the thought may find an end of its own, likewise.

    Raises:
        OmniInputError: another number of budgets than prompts, a negative grace period.
    """

    def __init__(self, processor, prompt_ids: torch.Tensor, budget, grace=GRACE):
        self.tokens = thought_tokens(processor.codec)
        rows, self.prompt_length = prompt_ids.shape
        self.budget_B = _per_row(budget, rows, True, "reasoning_budget")
        self.grace_B = _per_row(grace, rows, False, "reasoning_grace")
        self.opened_B = thought_is_open(prompt_ids.cpu(), self.tokens)
        self.free_until = int(self.budget_B.min()) if rows else UNLIMITED

    def _forced(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        if self.budget_B.device != tokens_BT.device:
            device = tokens_BT.device
            rows = (self.budget_B, self.grace_B, self.opened_B)
            self.budget_B, self.grace_B, self.opened_B = (values.to(device) for values in rows)
            tables = {name: getattr(self.tokens, name).to(device) for name in ("has_newline", "ends_sentence")}
            self.tokens = ThoughtTokens(self.tokens.opens, self.tokens.closes, self.tokens.newline, **tables)
        copies, rest = divmod(len(tokens_BT), len(self.budget_B))
        if rest:
            raise ValueError(f"{len(tokens_BT)} rows are no multiple of the {len(self.budget_B)} prompts of the budget")
        # rows of one prompt (samples, beams) stand together
        rows = (self.opened_B, self.budget_B, self.grace_B)
        opened, budget, grace = (values.repeat_interleave(copies) for values in rows)
        return forced_tokens(tokens_BT, opened, budget, grace, self.tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [B', S + T] and scores [B', V] -> scores with every id but the forced one at -inf."""
        tokens_BT = input_ids[:, self.prompt_length :]
        if tokens_BT.shape[1] < self.free_until:  # no thought can be over its budget yet
            return scores
        forced_B = self._forced(tokens_BT)[:, -1]
        only = torch.full_like(scores, -torch.inf).scatter(1, forced_B.clamp(min=0)[:, None], 0.0)
        return torch.where((forced_B >= 0)[:, None], only, scores)

    def forced_mask(self, sequences: torch.Tensor, eos_token_id: int | list[int] = ()) -> torch.Tensor:
        """Which generated tokens were forced: they are not the policy's and leave the loss in RL.

        Args:
            sequences: [B', S + T], what `generate` returned.
            eos_token_id: behind the first of these in a row there is only padding.

        Returns:
            bool [B', T].
        """
        tokens_BT = sequences[:, self.prompt_length :]
        ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id) or [-1])
        is_end_BT = torch.isin(tokens_BT, ends.to(tokens_BT.device))
        ended_BT = is_end_BT.long().cumsum(1) - is_end_BT.long() > 0
        return (self._forced(tokens_BT)[:, :-1] >= 0) & ~ended_BT


__all__ = ["ReasoningBudget", "fit_budget", "forced_tokens", "reasoning_limits", "thought_is_open", "thought_tokens"]
