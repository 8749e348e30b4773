"""Query-conditioned reduction of visual tokens while the prompt goes through the depth, made for hybrid models.

After every attention and every Mamba-2 layer of the prefill the visual tokens that are left are scored against the
question, and the lowest are dropped from the sequence before the next layer; expert and MLP layers see what the layer
before them left. Which tokens matter changes from layer to layer, so little is dropped early and more late. Text, sound
and everything behind the last visual token always stay. Scores:

- attention: softmax weights of the question's queries on the layer's keys, mean over heads and question tokens;
- Mamba-2: its implicit attention. With state <- exp(dt_s A) state + dt_s x_s B_s^T and y_t = C_t state, what token t
  takes from token s is a_ts = (C_t . B_s) exp(A (dt_s+1 + ... + dt_t)) dt_s; the score is the mean of |a_ts|.

`OmniForConditionalGeneration.generate(visual_keep=0.25)` uses it. What each layer keeps for decoding is what it saw:
attention caches differ in length, Mamba's state is that of the tokens which reached the layer. A batch is padded on the
left again after every drop, so the question's distance from the end never changes.

The idea is that of query-conditioned, low-to-high progressive token reduction for hybrid video models; scores and
schedule here are this package's own. Nothing is trained.

Shape legend: B batch, S prompt tokens, L tokens that reach a layer, T question tokens, D hidden size; H Mamba heads,
G groups, N state size; K key/value heads, R query heads per key/value head, d head size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_omni import TYPE_IMAGE as IMAGE
from .configuration_omni import TYPE_TEXT as TEXT
from .configuration_omni import TYPE_VIDEO as VIDEO
from .media import OmniInputError
from .modeling_language import attention_inputs
from .quantization import decode_cache, kv_scales

SCORINGS = ("query", "random", "uniform")
SCORED_KINDS = "M*"  # layers of `hybrid_override_pattern` that mix tokens
QUESTION_TOKENS = 128  # text tokens at the end of the prompt that ask, at most
QUERY_BLOCK = 16  # question tokens whose attention weights exist at a time


def keep_schedule(pattern: str, keep: float | Sequence[float]) -> list[float]:
    """Share of the visual tokens that enters each layer, non-increasing.

    Args:
        pattern: `hybrid_override_pattern`.
        keep: mean of the shares over all layers. The shares then fall by one factor at every layer that scores, from 1
            at the first layer. Or the shares themselves, one per layer.

    Raises:
        OmniInputError: a share outside (0, 1], too small a mean for this depth, or a list that does not fit.
    """
    scored_before = [sum(kind in SCORED_KINDS for kind in pattern[:i]) for i in range(len(pattern))]
    if isinstance(keep, Sequence):
        shares = list(map(float, keep))
        fits = len(shares) == len(pattern) and shares[0] == 1 and shares == sorted(shares, reverse=True)
        drops = [i for i in range(1, len(shares)) if shares[i] < shares[i - 1]] if fits else []
        if not fits or shares[-1] <= 0 or any(pattern[i - 1] not in SCORED_KINDS for i in drops):
            raise OmniInputError(
                f"visual_keep as a list needs {len(pattern)} shares, one per layer of {pattern}: 1 first, never "
                "rising, above 0, and falling only behind an M or * layer"
            )
        return shares
    lowest = scored_before.count(0) / len(pattern)
    if not lowest < keep <= 1:
        raise OmniInputError(
            f"visual_keep is {keep}; it is a mean over {len(pattern)} layers, of which the first "
            f"{scored_before.count(0)} see everything: give more than {lowest:.3f} and at most 1"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        factor = (low + high) / 2
        mean = sum(factor**n for n in scored_before) / len(pattern)
        low, high = (low, factor) if mean > keep else (factor, high)
    return [high**n for n in scored_before]


class ReducedCache(DynamicCache):
    """Cache of a prompt whose visual tokens are dropped on the way; each layer holds what it saw.

    Args:
        config: of the language model.
        keep: see `keep_schedule`.
        scoring: "query"; or, for comparison at the same schedule, "random" (torch's global generator) or "uniform"
            (evenly spread over the visual tokens that are left).

    Attributes:
        positions: per layer, [B, L] places in the prompt of the tokens that entered it, -1 on padding; None before the
            prefill. Rows as the prefill had them: beams are not followed.
    """

    def __init__(self, config, keep: float | Sequence[float], scoring: str = "query"):
        if scoring not in SCORINGS:
            raise OmniInputError(f"visual_scoring is {scoring!r}; known: {', '.join(SCORINGS)}")
        super().__init__(config=config)
        self.shares = keep_schedule(config.hybrid_override_pattern, keep)
        self.scoring = scoring
        self.positions: list[torch.Tensor] | None = None
        self.valid: list[torch.Tensor | None] = []  # per layer, [B, L] without padding's places; None: no padding
        self.seen = 0

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Tokens of prompt and answer so far; with a layer's number the length of its own cache."""
        return self.seen if layer_idx is None else super().get_seq_length(layer_idx)

    def reset(self) -> None:
        super().reset()
        self.positions, self.valid, self.seen = None, [], 0


def reduction_cache(model, keep: float | Sequence[float], scoring: str, options: dict) -> ReducedCache:
    """The cache for `generate(visual_keep=keep, visual_scoring=scoring, **options)`.

    Raises:
        OmniInputError: options that cannot go with it.
    """
    config = options.get("generation_config") or model.generation_config

    def option(name):
        return options[name] if options.get(name) is not None else getattr(config, name, None)

    for name in ("past_key_values", "cache_implementation", "prefill_chunk_size"):
        if option(name) is not None:
            raise OmniInputError(f"visual_keep drops tokens between layers and brings its own cache: leave out {name}")
    if option("use_cache") is False:
        raise OmniInputError("visual_keep needs the cache: leave out use_cache=False")
    return ReducedCache(model.config.get_text_config(), keep, scoring)


# ---- the pass through the layers ----


def reduced_forward(
    language_model: nn.Module,
    inputs_embeds: torch.Tensor,
    token_types: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: ReducedCache,
    seq_idx: torch.Tensor | None = None,
    output_hidden_states: bool = False,
    **kwargs,
) -> BaseModelOutputWithPast:
    """`OmniLanguageModel.forward` with a `ReducedCache`: the first call is the prefill, and reduces.

    Args:
        inputs_embeds: [B, S, D]. token_types: [B, S] `mm_token_type_ids`, at the places of the embeddings.
        attention_mask: [B, past + S], 0 on padding, which must be on the left.

    Returns:
        last_hidden_state [B, L, D] of the tokens that reached the end; always with the last one of the prompt.

    Raises:
        OmniInputError: padding on the right, visual tokens without any text behind them, packed rows.
    """
    if seq_idx is not None or output_hidden_states:
        raise OmniInputError("visual_keep works neither on packed rows nor with hidden states of every layer")
    if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2):
        raise OmniInputError("visual_keep needs an attention_mask [B, past + S] of 1 and 0")
    if cache.positions is not None:
        return _decode(language_model, inputs_embeds, attention_mask, cache, kwargs)

    batch, length = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        valid = attention_mask.to(device).bool()
    if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        raise OmniInputError("visual_keep needs rows padded on the left (padding_side='left')")
    positions = torch.arange(length, device=device).expand(batch, length).masked_fill(~valid, -1)
    types = torch.zeros(batch, length, device=device) if token_types is None else token_types.to(device)
    visual = ((types == IMAGE) | (types == VIDEO)) & valid
    from_end, asks = question_places(types, visual, valid)
    counts, nothing_visual = visual.sum(1), not bool(visual.any())

    hidden = inputs_embeds
    cache.positions, cache.valid = [], []
    padded = None if bool(valid.all()) else valid
    config, shares = language_model.config, cache.shares
    for number, layer in enumerate(language_model.layers):
        cache.positions.append(positions)
        cache.valid.append(padded)
        entered = hidden
        hidden = layer(
            hidden,
            cache=cache,
            padding_mask=padded,
            **(layer_attention(config, cache, number, hidden, padded) if layer.kind == "*" else {}),
            **kwargs,
        )
        if nothing_visual or number + 1 == len(shares) or shares[number + 1] >= shares[number]:
            continue
        keep_B = (counts * shares[number + 1]).ceil().long()
        if cache.scoring == "query":
            question = hidden.shape[1] - from_end
            scores = layer_scores(layer, entered, cache, positions >= 0, question, asks)
        elif cache.scoring == "random":
            scores = torch.rand(visual.shape, device=device)
        else:
            scores = uniform_scores(visual, keep_B)
        order, kept = surviving_places(scores, visual, positions >= 0, keep_B)
        hidden = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        positions = positions.gather(1, order).masked_fill(~kept, -1)
        visual = visual.gather(1, order) & kept
        padded = None if bool(kept.all()) else kept
    cache.seen = length
    hidden = language_model.norm_f(hidden.to(language_model.norm_f.weight.dtype))
    return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


def _decode(language_model, inputs_embeds, attention_mask, cache, kwargs) -> BaseModelOutputWithPast:
    """Tokens behind a reduced prompt, all of them kept: every attention layer has a mask of its own length."""
    hidden, new = inputs_embeds, inputs_embeds.shape[1]
    if new > 1 and attention_mask is not None and not bool(attention_mask[:, -new:].all()):
        raise OmniInputError("tokens behind a reduced prompt (visual_keep) cannot be padded")
    config, shared = language_model.config, {}
    for number, layer in enumerate(language_model.layers):
        attention = {}
        if layer.kind == "*":
            length, valid = cache.get_seq_length(number) + new, cache.valid[number]
            key = (length, id(valid))  # layers that saw the same tokens share a mask
            if key not in shared:
                valid = None if valid is None else F.pad(valid, (0, length - valid.shape[1]), value=True)
                shared[key] = layer_attention(config, cache, number, hidden, valid)
            attention = shared[key]
        hidden = layer(hidden, cache=cache, padding_mask=None, **attention, **kwargs)
    cache.seen += new
    hidden = language_model.norm_f(hidden.to(language_model.norm_f.weight.dtype))
    return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)


def layer_attention(config, cache: ReducedCache, number: int, hidden: torch.Tensor, valid: torch.Tensor | None) -> dict:
    """What one attention layer must know of padding and of its own cache's length, as arguments of its block."""
    own = Cache(layers=[cache.layers[number]])
    return {"attention": attention_inputs(config, hidden, valid, own, None, None)}


# ---- what asks, and what stays ----


def question_places(
    types_BS: torch.Tensor, visual_BS: torch.Tensor, valid_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The question: the last text tokens behind a row's last visual token, QUESTION_TOKENS of them at most.

    With this package's chat template these are the question and what opens the answer. Only tokens behind the visual
    ones can attend to them; where the question stands in front of a picture, what opens the answer has read it.

    Returns:
        distance from the row's end [B, T] (1 is the last token) and whether the entry is in use [B, T].
    """
    places = torch.arange(types_BS.shape[1], device=types_BS.device)
    last_visual = (visual_BS * (places + 1)).amax(1, keepdim=True) - 1
    asks = valid_BS & (types_BS == TEXT) & (places > last_visual) & (last_visual >= 0)
    asks &= asks.flip(1).cumsum(1).flip(1) <= QUESTION_TOKENS
    if bool((visual_BS.any(1) & ~asks.any(1)).any()):
        raise OmniInputError("visual_keep scores visual tokens against the text behind them, and there is none")
    size = int(asks.sum(1).max())
    order = asks.byte().argsort(dim=1, stable=True)[:, asks.shape[1] - size :]
    return asks.shape[1] - order, asks.gather(1, order)


def surviving_places(
    scores_BL: torch.Tensor, visual_BL: torch.Tensor, valid_BL: torch.Tensor, keep_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All text and the `keep_B` best visual tokens of each row, in their order, padded on the left.

    Returns:
        places to take [B, L'] and whether each is a token and no padding [B, L'].
    """
    ranked = scores_BL.float().masked_fill(~visual_BL, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    )
    stays = valid_BL & (~visual_BL | (rank < keep_B[:, None]))
    order = stays.byte().argsort(dim=1, stable=True)[:, stays.shape[1] - int(stays.sum(1).max()) :]
    return order, stays.gather(1, order)


def uniform_scores(visual_BL: torch.Tensor, keep_B: torch.Tensor) -> torch.Tensor:
    """1 on `keep_B` visual tokens of each row that are spread evenly over all of them, else 0."""
    number, total, keep = visual_BL.cumsum(1), visual_BL.sum(1, keepdim=True).clamp(min=1), keep_B[:, None]
    return ((number * keep) // total > ((number - 1) * keep) // total).float() * visual_BL


# ---- scores ----


@torch.no_grad()
def layer_scores(
    layer: nn.Module,
    hidden_BLD: torch.Tensor,
    cache: ReducedCache,
    valid_BL: torch.Tensor,
    question_BT: torch.Tensor,
    asks_BT: torch.Tensor,
) -> torch.Tensor:
    """Importance of every token for the question in one attention or Mamba-2 layer, [B, L] float32.

    Args:
        hidden_BLD: what entered the layer. question_BT: places of the question's tokens; asks_BT: which are in use.
    """
    normed = layer.norm(hidden_BLD.to(layer.norm.weight.dtype))
    if layer.kind == "M":
        return mamba_scores(layer.mixer, normed, valid_BL, question_BT, asks_BT)
    asking = normed.gather(1, question_BT[..., None].expand(-1, -1, normed.shape[-1]))
    query = layer.mixer.q_proj(asking).unflatten(-1, (-1, layer.mixer.head_dim)).transpose(1, 2)
    keys = cache.layers[layer.mixer.layer_idx].keys
    scales = kv_scales(layer.mixer)
    if scales is not None:
        keys = decode_cache(keys, scales[0], query.dtype)
    return attention_scores(query, keys, valid_BL, question_BT, asks_BT)


def attention_scores(
    query_BHTd: torch.Tensor,
    key_BKLd: torch.Tensor,
    valid_BL: torch.Tensor,
    question_BT: torch.Tensor,
    asks_BT: torch.Tensor,
) -> torch.Tensor:
    """Attention weights of the question's queries on all keys, mean over heads and question tokens: [B, L] float32.

    Not more than the weights of one key/value head for QUERY_BLOCK question tokens are held at a time.
    """
    batch, heads, _, size = query_BHTd.shape
    length = key_BKLd.shape[2]
    query_BKRTd = query_BHTd.unflatten(1, (key_BKLd.shape[1], -1)).float() * size**-0.5
    total = torch.zeros(batch, length, device=query_BHTd.device)
    places = torch.arange(length, device=query_BHTd.device)
    for query_BRTd, key_BLd in zip(query_BKRTd.unbind(1), key_BKLd.unbind(1)):
        key_BLd = key_BLd.float()
        for query, place, asks in zip(
            query_BRTd.split(QUERY_BLOCK, 2), question_BT.split(QUERY_BLOCK, 1), asks_BT.split(QUERY_BLOCK, 1)
        ):
            seen = valid_BL[:, None] & (places <= place[..., None])  # [B, T, L]
            seen |= ~asks[..., None]  # unused entries: anything but an empty softmax
            weights = (query @ key_BLd[:, None].transpose(2, 3)).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
            total += (weights * asks[:, None, :, None]).sum((1, 2))
    return total / (heads * asks_BT.sum(1, keepdim=True).clamp(min=1))


def mamba_scores(
    mixer: nn.Module,
    hidden_BLD: torch.Tensor,
    valid_BL: torch.Tensor,
    question_BT: torch.Tensor,
    asks_BT: torch.Tensor,
) -> torch.Tensor:
    """Implicit attention |a_ts| of the question on all tokens before it, mean over heads and question: [B, L] float32.

    Only B of all tokens, C of the question and dt are computed again, a tenth of the layer's input projection. The
    decay splits at the question's first token, so that no [heads, T, L] is formed: exp of (token to first) and of
    (first to t), both at most 1.
    """
    heads, groups, inner = mixer.num_heads, mixer.n_groups, mixer.num_heads * mixer.head_dim
    size, history = groups * mixer.state_size, mixer.conv1d.kernel_size[0] - 1
    hidden = hidden_BLD * valid_BL[..., None]
    used = question_BT.masked_fill(~asks_BT, hidden.shape[1] - 1)
    first = used.amin(1, keepdim=True)
    start = max(0, int(first.min()) - history)  # C is needed from here on

    def mapped(hidden, channel):
        """`size` channels of the projection and convolution: B (channel = inner) or C (inner + size)."""
        raw = project_rows(mixer.in_proj, hidden, slice(inner + channel, inner + channel + size))
        own = slice(channel, channel + size)
        bias = None if mixer.conv1d.bias is None else mixer.conv1d.bias[own]
        raw = F.pad(raw.transpose(1, 2), (history, 0))
        return F.silu(F.conv1d(raw, mixer.conv1d.weight[own], bias, groups=size)).transpose(1, 2).float()

    B_BLGN = mapped(hidden, inner).unflatten(-1, (groups, -1))
    C_BTGN = mapped(hidden[:, start:], inner + size).unflatten(-1, (groups, -1))
    C_BTGN = C_BTGN.gather(1, (used - start)[..., None, None].expand(-1, -1, *C_BTGN.shape[2:]))
    dt = project_rows(mixer.in_proj, hidden, slice(2 * inner + 2 * size, 2 * inner + 2 * size + heads))
    dt = F.softplus(dt.float() + mixer.dt_bias.float()).clamp(*mixer.time_step_limit) * valid_BL[..., None]
    # float64: over a long video the sum grows large, and only differences of it count
    total_BLH = (dt.double() * -mixer.A_log.double().exp()).cumsum(1)
    at_first = total_BLH.gather(1, first[..., None].expand(-1, -1, heads))
    at_question = total_BLH.gather(1, used[..., None].expand(-1, -1, heads))
    to_first_BLH = (at_first - total_BLH).clamp(max=0).exp().float() * dt
    to_question_BTH = (at_question - at_first).exp().float() * asks_BT[..., None]

    scores = torch.zeros(valid_BL.shape, device=hidden.device)
    per_group = heads // groups
    for group in range(groups):
        own = slice(group * per_group, (group + 1) * per_group)
        alike_BTL = (C_BTGN[:, :, group] @ B_BLGN[:, :, group].transpose(1, 2)).abs()
        from_question_BHL = to_question_BTH[..., own].transpose(1, 2) @ alike_BTL
        scores += (from_question_BHL * to_first_BLH[..., own].transpose(1, 2)).sum(1)
    return scores / (heads * asks_BT.sum(1, keepdim=True).clamp(min=1))


def project_rows(linear: nn.Module, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
    """`linear(hidden)[..., rows]`, those rows alone being computed where the layer is plain (no adapter, no 4 bits)."""
    if type(linear) is not nn.Linear:
        return linear(hidden)[..., rows]
    return F.linear(hidden, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


__all__ = ["ReducedCache", "keep_schedule", "reduced_forward"]
