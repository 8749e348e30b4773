"""Conversations with settings of their own, generated as one left-padded batch: what `batch` and `serve` share.

A row has its own temperature, top-p, seed, length, reasoning budget and stop, so that any rows make a batch, and what a
row gets does not depend on the others in it (but for rounding: a batch multiplies larger matrices).

Shapes: B rows, S tokens of the longest prompt, V ids of the vocabulary.
"""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor

from .conversation import ConversationCache, end_tokens, generate_inputs
from .inference import AnswerSplitter, opens_thought, suppressed_tokens
from .limits import is_out_of_memory
from .packing import join_media
from .processing_omni import OmniProcessor
from .reasoning_budget import ReasoningBudget, reasoning_limits

logger = logging.getLogger(__name__)


def collate_prompts(prompts: list[dict[str, torch.Tensor]], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """Encoded conversations [1, S_i] with their media -> one left-padded batch, as the processor makes it of all.

    Raises:
        ValueError: videos with and without EVS, whose prompts are laid out differently.
    """
    length = max(prompt["input_ids"].shape[1] for prompt in prompts)
    with_types = any("mm_token_type_ids" in prompt for prompt in prompts)
    batch = {}
    for name in ("input_ids", "attention_mask", *["mm_token_type_ids"] * with_types):
        rows = [prompt.get(name, torch.zeros_like(prompt["input_ids"])) for prompt in prompts]
        fill = pad_token_id if name == "input_ids" else 0
        batch[name] = torch.cat([F.pad(row, (length - row.shape[1], 0), value=fill) for row in rows])
    videos = [prompt for prompt in prompts if "video_grid_thw" in prompt]
    if len({"video_keep_tokens" in prompt for prompt in videos}) > 1:
        raise ValueError("videos with and without EVS cannot stand in one batch")
    return batch | join_media(prompts)


@dataclass(eq=False)
class Row:
    """One conversation of a batch and what became of it.

    Attributes:
        inputs: from `encode`, one conversation.
        max_new_tokens: of reasoning and answer.
        temperature: 0 is greedy. top_p, top_k: None leaves them out.
        seed: the row's own; None draws one.
        budget, grace: of the reasoning, as `reasoning_limits` gives them.
        on_token: called with every id as it comes, the ending one included; `finish_reason` is then set.
        stopped: asked after every token; True ends the row.
        tokens: what was generated.
        finish_reason: "stop", "length" or "interrupted"; None while the row runs, or where `error` says why not.
        thought_cut: the budget ended the thought.
        scope: whose prefixes of a `ConversationCache` it may go on from.
        cached_tokens: of the prompt, that came from there.
    """

    inputs: dict[str, torch.Tensor]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    budget: int | None = None
    grace: int = 0
    on_token: Callable[[int], None] | None = None
    stopped: Callable[[], bool] | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    thought_cut: bool = False
    error: Exception | None = None
    scope: str = ""
    cached_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def take(self, token: int, ends: set[int]) -> None:
        self.tokens.append(token)
        if token in ends:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            self.finish_reason = "length"
        elif self.stopped is not None and self.stopped():
            self.finish_reason = "interrupted"
        if self.on_token is not None:
            self.on_token(token)


def row_settings(
    model,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    reasoning_budget: int | None = None,
    reasoning_grace: int | None = None,
) -> tuple[dict, str | None]:
    """Settings of a `Row`, what is None from the checkpoint's generation_config.json, and the note of the budget.

    As in `generation_options`: a temperature of 0 is greedy; any other temperature, or top_p, samples.
    """
    defaults = model.generation_config
    sampled = defaults.do_sample if temperature is None and top_p is None else temperature != 0
    settings = {"max_new_tokens": max_new_tokens, "seed": seed}
    if sampled:
        default = defaults.temperature if defaults.temperature is not None else 1.0
        settings["temperature"] = default if temperature is None else temperature
        settings["top_p"] = defaults.top_p if top_p is None else top_p
        settings["top_k"] = defaults.top_k or None
    budget, grace, note = reasoning_limits(model, max_new_tokens, reasoning_budget, reasoning_grace)
    return settings | {"budget": budget, "grace": grace}, note


class RowSampler(LogitsProcessor):
    """Draws the next token of every sampled row by its own settings and leaves it as the only choice.

    Must be the last processor, in a `generate` without sampling.
    """

    def __init__(self, rows: list[Row], device: torch.device):
        self.sampled = [i for i, row in enumerate(rows) if row.temperature > 1e-5]
        chosen = [rows[i] for i in self.sampled]
        self.generators = []
        for row in chosen:
            generator = torch.Generator(device)
            self.generators.append(generator.manual_seed(secrets.randbits(62) if row.seed is None else row.seed))
        self.temperature_B1 = torch.tensor([row.temperature for row in chosen], device=device)[:, None]
        top_p = [1.0 if row.top_p is None else row.top_p for row in chosen]
        self.top_p_B1 = torch.tensor(top_p, device=device)[:, None]
        self.top_k = [row.top_k for row in chosen]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [B, V] -> the same, with every id but the drawn one at -inf in sampled rows."""
        if not self.sampled:
            return scores
        logits_BV = scores[self.sampled] / self.temperature_B1
        logits_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probabilities_BV = logits_BV.softmax(-1)
        likelier_BV = probabilities_BV.cumsum(-1) - probabilities_BV  # sum of all likelier ids
        dropped_BV = likelier_BV >= self.top_p_B1
        dropped_BV[self.top_p_B1[:, 0] >= 1] = False
        dropped_BV[:, 0] = False
        for i, top_k in enumerate(self.top_k):
            if top_k is not None:
                dropped_BV[i, top_k:] = True
        probabilities_BV = probabilities_BV.masked_fill(dropped_BV, 0.0)
        places = [
            torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities_BV, self.generators)
        ]
        drawn_B1 = order_BV.gather(1, torch.stack(places))
        scores = scores.clone()
        scores[self.sampled] = torch.full_like(logits_BV, -torch.inf).scatter(1, drawn_B1, 0.0)
        return scores


def generate_rows(
    model,
    processor: OmniProcessor,
    rows: list[Row],
    prefill_chunk_size: int | None = None,
    conversations: ConversationCache | None = None,
) -> None:
    """Runs the rows as one batch until each has ended; fills `tokens`, `finish_reason` and `thought_cut`.

    With `conversations` prompts are read from where an earlier one is known (`prefill_all`); then all decode as one
    batch. The point behind the answer is kept for a row that runs alone: in a batch, the first row to end is fed on.
    A row that is stopped while its prompt is read ends without a token, and `on_token` is not called.
    """
    pad = processor.tokenizer.pad_token_id or 0
    ready = []
    if conversations is None:
        batch = collate_prompts([row.inputs for row in rows], pad)
        batch = {name: value.to(model.device) for name, value in batch.items()}
    else:
        prompts = [(row.inputs, row.scope) for row in rows]
        stopped = [row.stopped or (lambda: False) for row in rows]
        known_rows = conversations.prefill_all(model, prompts, prefill_chunk_size, stopped)
        for row, known, asked in zip(rows, known_rows, stopped, strict=True):
            if known is None or asked():
                row.finish_reason = "interrupted"
                continue
            ready.append(known)
            row.cached_tokens = known.cached
        rows = [row for row in rows if row.finish_reason is None]
        if not rows:
            return
        batch = generate_inputs(ready, model.device, model.config.llm_config, pad)
    prompt_ids, ends = batch["input_ids"], end_tokens(model)
    processors = []
    if any(row.budget is not None for row in rows):
        budgets, graces = [row.budget for row in rows], [row.grace for row in rows]
        processors.append(ReasoningBudget(processor, prompt_ids, budgets, graces))
    processors.append(RowSampler(rows, prompt_ids.device))

    def finished(input_ids, scores, **kwargs):
        for row, token in zip(rows, input_ids[:, -1].tolist()):
            if row.finish_reason is None:
                row.take(token, ends)
        return torch.tensor([row.finish_reason is not None for row in rows], device=input_ids.device)

    options = {} if prefill_chunk_size is None else {"prefill_chunk_size": prefill_chunk_size}
    sequences = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(row.max_new_tokens for row in rows),
        suppress_tokens=suppressed_tokens(model, processor),
        pad_token_id=pad,
        logits_processor=processors,
        stopping_criteria=[finished],
        **options,
    )
    if len(ready) == 1:
        conversations.finish(ready[0], sequences[0])
    if len(processors) > 1:
        for row, forced in zip(rows, processors[0].forced_mask(sequences, list(ends)).tolist()):
            row.thought_cut = any(forced[: len(row.tokens)])


def generate_or_split(model, processor, rows: list[Row], prefill_chunk_size=None, conversations=None) -> None:
    """`generate_rows`; a batch that fails is tried again in halves, so that one bad row, or too little memory for all,
    costs no other row. Where nothing helps, `error` of the row says why. Rows whose tokens were given out are not begun
    anew.
    """
    pending = [rows]
    while pending:
        rows = pending.pop()
        failure = None
        try:
            generate_rows(model, processor, rows, prefill_chunk_size, conversations)
        except Exception as error:
            failure = error.with_traceback(None)  # the frames hold the batch
        if failure is None:
            continue
        if is_out_of_memory(failure):
            if conversations is not None:
                conversations.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        logger.warning("a batch of %d failed: %s: %s", len(rows), type(failure).__name__, str(failure)[:500])
        left = [row for row in rows if row.finish_reason is None]
        again = [row for row in left if row.on_token is None or not row.tokens]
        for row in left:
            if len(rows) == 1 or row not in again:
                row.error = failure
        if len(rows) > 1 and again:
            for row in again:
                row.tokens.clear()
            half = (len(again) + 1) // 2
            pending += [part for part in (again[half:], again[:half]) if part]


def row_text(processor: OmniProcessor, row: Row) -> dict[str, str]:
    """{"reasoning", "answer"} of a row that has run."""
    splitter = AnswerSplitter(processor, opens_thought(processor, row.inputs["input_ids"]))
    texts = {"reasoning": "", "answer": ""}
    for token in row.tokens:
        for section, text in splitter.push(token):
            texts[section] += text
    for section, text in splitter.finish():
        texts[section] += text
    return texts


__all__ = ["Row", "collate_prompts", "generate_or_split", "generate_rows", "row_settings", "row_text"]
