"""Speculative decoding with the model's own draft head: `model.generate(..., mtp_drafts=k)`.

The head (modeling_mtp.py) drafts k tokens, the trunk reads them in one pass of k + 1 tokens and says of each place
what it would have written there; its tokens are taken as far as the drafts agree with them, and the first that does not
(Leviathan et al., 2023). So greedy answers are those of plain decoding. Sampled ones are too, under the same seed: a
token is drawn as argmax p / E with exponential E, as `torch.multinomial` does, and a draft is drawn from the head's p
with the E of its place (Gumbel coupling, Daliri et al., 2025). What is written therefore depends on the trunk alone,
whatever the head says, and nothing is to be corrected where a draft is rejected. Both hold up to rounding: a pass over
several tokens rounds otherwise than a step.

Logits processors and stopping criteria see every token in its turn, as in plain decoding, and a processor may have a
state (generation_rows.RowSampler). When sampling, they shape the drafts as well: give functions of their inputs.

Taking drafts back: keys and values are cropped. Mamba's state cannot be, so the trunk leaves it as it was and hands
over the inputs of its window (`draft_window`), from which it is advanced by the tokens that stay. States after each
token would be k + 1 times as much to write, and a snapshot costs a copy; this writes a state as often as plain decoding
does. In a batch every row goes on by what the shortest accepts, which keeps them aligned; made for one row.

benchmark_drafts.py measures acceptance and speed.

Shape legend: B batch, S tokens, D hidden size, V vocabulary.
"""

from collections import Counter, deque

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .media import OmniInputError
from .token_reduction import ReducedCache


def check_drafts(model, drafts: int, generation_config, cache) -> None:
    """Raises an OmniInputError for what drafts cannot be combined with."""
    heads = model.config.llm_config.num_nextn_predict_layers
    if not isinstance(drafts, int) or drafts < 1:
        raise OmniInputError(f"mtp_drafts must be a whole number from 1 on, got {drafts!r}")
    if heads != 1:
        raise OmniInputError(f"mtp_drafts needs a model with one draft head; num_nextn_predict_layers is {heads}")
    plain = isinstance(cache, DynamicCache) and not isinstance(cache, ReducedCache) and not cache.offloading
    if not plain or any(type(layer) is not DynamicLayer for layer in cache.layers if isinstance(layer, DynamicLayer)):
        raise OmniInputError(
            "mtp_drafts needs the plain dynamic cache: leave out visual_keep, compile_decode, use_cache=False and "
            f"cache_implementation (the cache is {type(cache).__name__})"
        )
    others = {
        "num_beams": generation_config.num_beams > 1,
        "output_attentions": generation_config.output_attentions,
        "output_hidden_states": generation_config.output_hidden_states,
        "ZeRO-3": is_deepspeed_zero3_enabled(),
    }
    if found := [name for name, asked in others.items() if asked]:
        raise OmniInputError(f"mtp_drafts cannot be combined with {', '.join(found)}")


def draft_and_verify(
    model,
    input_ids: torch.Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    mtp_drafts: int = 1,
    mtp_counts: Counter | None = None,
    streamer=None,
    **model_kwargs,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """The decoding loop of `generate(mtp_drafts=k)`, in place of transformers' `_sample`.

    Args:
        mtp_drafts: k, the drafts of a round (fewer where the length ends).
        mtp_counts: added to it are "passes" of the trunk behind the prompt, the "tokens" of a row that they wrote, the
            drafts they read ("drafted"), and those that were right ("accepted"; an end that was drafted is one).

    Raises:
        OmniInputError: see `check_drafts`.
    """
    cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
    check_drafts(model, mtp_drafts, generation_config, cache)
    config, counts = generation_config, Counter() if mtp_counts is None else mtp_counts
    limit, chunk, device = stopping_criteria.max_length, config.prefill_chunk_size, input_ids.device
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    names = ("scores", "logits") if config.return_dict_in_generate else ()
    kept = {name: () for name in names if getattr(config, f"output_{name}")}
    noise = deque()  # of the next tokens in order, each drawn once: the stream is that of plain sampling

    def choose(scores_BV: torch.Tensor, place: int) -> torch.Tensor:
        """-> [B], the token `place` places ahead of the next one."""
        if not config.do_sample:
            return scores_BV.argmax(-1)
        while len(noise) <= place:
            noise.append(torch.empty_like(scores_BV).exponential_())
        return (scores_BV.softmax(-1) / noise[place]).argmax(-1)

    def choose_draft(logits_BV: torch.Tensor, drafts_BK: torch.Tensor) -> torch.Tensor:
        logits_BV = logits_BV.to(device, torch.float32)
        if config.do_sample:
            logits_BV = logits_processor(torch.cat([tokens, drafts_BK], 1), logits_BV)
        return choose(logits_BV, drafts_BK.shape[1])

    def seen(ahead: int) -> torch.Tensor | None:
        """The mask of prompt, written tokens but the last, and `ahead` more."""
        return None if mask is None else F.pad(mask, (0, tokens.shape[1] - input_ids.shape[1] - 1 + ahead), value=1)

    hidden, after = prefill(model, input_ids, config, cache, mask, model_kwargs.get("inputs_embeds"))
    logits = model.lm_head(hidden[:, -1:])
    tokens, drafts, own, window = input_ids, input_ids[:, :0], model.mtp.new_cache(), None
    unfinished = torch.ones(len(tokens), dtype=torch.bool, device=device)
    while True:
        taken = 0
        for logits_BV in logits.unbind(1):  # until a token differs from its draft
            logits_BV = logits_BV.to(device, torch.float32, copy=True)
            scores = logits_processor(tokens, logits_BV)
            for name, values in (("scores", scores), ("logits", logits_BV)):
                if name in kept:
                    kept[name] += (values,)
            token = choose(scores, 0)
            if noise:
                noise.popleft()
            if has_eos:
                token = token.where(unfinished, config._pad_token_tensor.to(device))
            tokens = torch.cat([tokens, token[:, None]], 1)
            if streamer is not None:
                streamer.put(token.cpu())
            unfinished = unfinished & ~stopping_criteria(tokens, kept.get("scores"))
            agrees = taken < drafts.shape[1] and not bool(((token != drafts[:, taken]) & unfinished).any())
            taken += 1
            counts["accepted"] += agrees
            if not agrees or not bool(unfinished.any()):
                break
        if window is not None:
            keep_tokens(model, cache, window, taken, of=1 + drafts.shape[1])
        if not bool(unfinished.any()):
            break
        drafted = mtp_drafts if limit is None else min(mtp_drafts, limit - tokens.shape[1] - 1)
        if drafted > 0:
            embeds = model.get_input_embeddings()(tokens[:, -taken:].to(hidden.device))
            after = torch.cat([after, embeds], 1)
            drafts = draft_tokens(model, hidden[:, : after.shape[1]], after, seen(0), own, drafted, choose_draft, chunk)
            after = after[:, :0]
        else:
            drafts = drafts[:, :0]
        cache.draft_window = window = {} if drafts.shape[1] else None
        try:
            hidden = model.model(
                input_ids=torch.cat([tokens[:, -1:], drafts], 1).to(hidden.device),
                attention_mask=seen(1 + drafts.shape[1]),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        finally:
            cache.draft_window = None
        logits = model.lm_head(hidden)
        counts["passes"] += 1
        counts["drafted"] += drafts.shape[1]
    counts["tokens"] += tokens.shape[1] - input_ids.shape[1] - 1  # the prompt's pass wrote one
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return tokens
    return GenerateDecoderOnlyOutput(sequences=tokens, past_key_values=cache, **kept)


def prefill(
    model, input_ids: torch.Tensor, config, cache: Cache, mask: torch.Tensor | None, embeds: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs what the cache does not hold yet of the prompt -> hidden states [B, S, D], embeddings of all but the first.

    As in transformers, embeddings are of the whole prompt, and so are ids unless they are shorter than the mask.
    """
    past = cache.get_seq_length()
    if embeds is None:
        embeds = model.get_input_embeddings()(input_ids.to(model.device))
        whole = (config._mask_length if mask is None else mask.shape[1]) == input_ids.shape[1]
    else:
        whole = True
    embeds = embeds[:, past if whole else 0 :]
    output = model.model(
        inputs_embeds=embeds,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        prefill_chunk_size=config.prefill_chunk_size,
    )
    return output.last_hidden_state, embeds[:, 1:]


def keep_tokens(model, cache: Cache, window: dict[int, tuple], tokens: int, of: int) -> None:
    """Of the `of` tokens that the trunk has just read, leaves the first `tokens` in the cache.

    Args:
        window: number of a Mamba layer -> its inputs, see `Mamba2Mixer.advance`.
    """
    for number, inputs in window.items():
        model.model.language_model.layers[number].mixer.advance(cache, inputs, tokens)
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            layer.crop(tokens - of)


def draft_tokens(
    model,
    hidden_BSD: torch.Tensor,
    embeds_BSD: torch.Tensor,
    mask: torch.Tensor | None,
    own: Cache,
    drafts: int,
    choose,
    chunk: int | None = None,
) -> torch.Tensor:
    """The head reads what the trunk has written and drafts on -> [B, drafts].

    Args:
        hidden_BSD, embeds_BSD: of the positions that the head has not read: the trunk's states, the tokens behind them.
        mask: [B, ...] up to the last of these positions, or None.
        own: the head's cache; afterwards it holds the positions given, and none of the drafts.
        choose: (logits [B, V], drafts so far [B, n]) -> the next draft [B].
        chunk: positions at a time.
    """
    read, length = own.get_seq_length(), hidden_BSD.shape[1]
    mask = None if mask is None else mask[:, mask.shape[1] - read - length :]
    hidden = None
    for part, embeds in zip(hidden_BSD.split(chunk or length, 1), embeds_BSD.split(chunk or length, 1)):
        read += part.shape[1]
        hidden = model.mtp(part, embeds, 0, None if mask is None else mask[:, :read], own)
    tokens_BK = hidden.new_empty(len(hidden), 0, dtype=torch.long)
    while True:
        hidden = hidden[:, -1:]
        token = choose(model.lm_head(hidden)[:, 0], tokens_BK)
        tokens_BK = torch.cat([tokens_BK, token[:, None].to(tokens_BK.device)], 1)
        if tokens_BK.shape[1] == drafts:
            break
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        hidden = model.mtp(hidden, model.get_input_embeddings()(tokens_BK[:, -1:]), 0, mask, own)
    for layer in own.layers:
        layer.crop(1 - drafts)
    return tokens_BK


__all__ = ["check_drafts", "draft_and_verify"]
