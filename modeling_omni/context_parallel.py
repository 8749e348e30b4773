"""Context parallelism: the tokens of every row split over the ranks of a group (paper 3.1.8: 2 ranks in SFT stage 5, 16
in stage 6).

A row is padded and cut into 2W slices; rank r holds slices r and 2W - 1 - r ("zig-zag"): early tokens attend to few
keys and late ones to many, so every rank gets the same share of causal attention, where one contiguous piece per rank
would give the last rank nearly twice the mean (attention is more than half of the arithmetic at 256k tokens). To the
language model the slices are rows of a batch, [2B, L]; only three things reach over their borders:

- The convolution reads the last k - 1 inputs of the slice before: all ranks gather every slice's last rows.
- Mamba's state. The scan is affine in the state it starts from, so every slice is scanned from zero, the final states
  and decays are gathered (2 MiB per slice, row and layer at 30B, whatever the length), each rank composes the states
  its slices start from and adds their part, `C S exp(cumsum(dt A))`, to the outputs.
- Attention gathers keys and values (no positions, 2 heads: 1 KiB per token and layer in bfloat16). Documents run one
  by one with the causal triangle at the lower right, so no mask is ever formed and nothing of another document is read.

Everything else is token-local. Gathering is differentiable: gradients return by reduce-scatter. Collectives stand in
one chain of dependencies, so forward, backward and recomputation issue them in the same order on all ranks, provided
that every rank builds the same graph: hence nothing here is skipped where a rank happens to have nothing to do.

Media: images, tubelets and audio clips are independent in the towers. They are dealt out over the ranks by cost, each
rank runs towers and projectors on its own, and the projected tokens are gathered. Repeating the towers on all ranks
would cost more than the language model from 2 ranks on. The price is one gather of all media tokens per step and
direction (5 KiB per token at 30B) and, while it is used, that much memory.

Shape legend: W ranks, B rows, S tokens of a row, L of a slice; R = 2B slices of a rank as rows, row by row; D hidden
size; H Mamba heads, P head size, G groups, N state size; C conv channels; T media tokens.
"""

import functools
import types
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers.modeling_outputs import CausalLMOutputWithPast

from .distributed import bare_model
from .evs import check_places
from .feature_extraction_omni import clip_token_count
from .media import OmniInputError
from .modeling_omni import (
    AUDIO,
    IMAGE,
    MEDIA_TENSORS,
    MODALITY_NAMES,
    VIDEO,
    OmniForConditionalGeneration,
    chunked_cross_entropy,
)

MIN_SLICE = 8  # tokens; a slice must hold the history of the convolution that follows it (3 rows at 30B)

# newer names of the same collectives
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _GatherRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        output = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        _all_gather(output, x.contiguous(), group=group)
        return output

    @staticmethod
    def backward(ctx, grad):
        every = grad.float().contiguous()  # a sum over ranks in bfloat16 would round
        own = every.new_empty(every.shape[0] // dist.get_world_size(ctx.group), *every.shape[1:])
        _reduce_scatter(own, every, group=ctx.group)
        return own.to(grad.dtype), None


def gather_ranks(x: torch.Tensor, group) -> torch.Tensor:
    """[n, ...] of every rank -> [W * n, ...], rank after rank; differentiable (gradients are summed over the ranks)."""
    return _GatherRanks.apply(x, group)


@dataclass
class ContextShard:
    """What one rank must know of a batch beside its own tokens. Made by `shard_batch`; `to` moves the tensors.

    seq_idx: [R, L] document numbers of the own slices. previous: [R, L] those of the slices in front (-1: none).
    connected: [B, 2W] bool, whether a slice ends in the document in which the slice in front ends.
    spans: for every own slice, the place in the row where the document of its first token starts, and the lengths of
        the pieces of documents in it.
    length: S before padding. num_items: trained tokens of the batch, of all ranks.
    media_tokens: modality -> tokens that each rank encodes. media_places: modality -> bool [R, L].
    media_index: modality -> long [own places], which of the gathered tokens [W * most of a rank] each place takes.
    """

    rank: int
    size: int
    length: int
    num_items: int
    seq_idx: torch.Tensor
    previous: torch.Tensor
    connected: torch.Tensor
    spans: list[tuple[int, list[int]]]
    media_tokens: dict[int, list[int]]
    media_places: dict[int, torch.Tensor]
    media_index: dict[int, torch.Tensor]
    group: object = None

    def to(self, *args, **kwargs) -> "ContextShard":
        moved = {}
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(*args, **kwargs)
            elif name in ("media_places", "media_index"):
                moved[name] = {key: tensor.to(*args, **kwargs) for key, tensor in value.items()}
        return replace(self, **moved)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[R, ...] of every rank -> [2W, B, ...], the slices in order."""
        first, second = gather_ranks(x, self.group).unflatten(0, (self.size, -1, 2)).unbind(2)
        return torch.cat([first, second.flip(0)])

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """[R, L, ...] of every rank -> [B, S, ...] without the padding, e.g. hidden states."""
        return self.gather(x).transpose(0, 1).flatten(1, 2)[:, : self.length]

    def prepend_history(self, x_RLC: torch.Tensor, history: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the last `history` tokens of the slice in front before every slice: [R, history + L, C], documents."""
        assert history <= MIN_SLICE, "a slice may be shorter than the convolution's history"
        ends = self.gather(x_RLC[:, x_RLC.shape[1] - history :])  # [2W, B, history, C]
        fronts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]]).transpose(0, 1)
        documents = torch.cat([self.previous[:, self.previous.shape[1] - history :], self.seq_idx], 1)
        return torch.cat([own_slices(fronts, self.rank, self.size), x_RLC], 1), documents

    def add_incoming_state(
        self, y_RLHP: torch.Tensor, state_RHPN: torch.Tensor, decay_log_RLH: torch.Tensor, C_RLGN: torch.Tensor
    ) -> torch.Tensor:
        """`ssd_scan`'s outputs from a state of zero -> outputs from the state that the tokens in front leave.

        state_RHPN: the state after each slice, from zero. decay_log_RLH: dt A. All float32 but C.
        """
        total_RLH = decay_log_RLH.cumsum(1)
        ends = self.gather(torch.cat([state_RHPN.flatten(1), total_RLH[:, -1].exp()], 1))  # one collective for both
        heads = total_RLH.shape[2]
        states = ends[..., :-heads].unflatten(-1, state_RHPN.shape[1:])  # [2W, B, H, P, N]
        kept = (ends[..., -heads:] * self.connected.T[..., None])[..., None, None]  # [2W, B, H, 1, 1]
        incoming = [torch.zeros_like(states[0])]
        for state, keep in zip(states[:-1].unbind(), kept[:-1].unbind()):
            incoming.append(torch.addcmul(state, incoming[-1], keep))
        incoming = own_slices(torch.stack(incoming, 1), self.rank, self.size)  # [R, H, P, N]
        groups = C_RLGN.shape[2]
        by_group = incoming.unflatten(1, (groups, -1)).flatten(2, 3).transpose(2, 3)  # [R, G, N, H/G*P]
        added = (C_RLGN.float().transpose(1, 2) @ by_group).transpose(1, 2).reshape(y_RLHP.shape)
        carried = (self.seq_idx == self.previous[:, -1:])[..., None]  # tokens of the document that the state is of
        return torch.addcmul(y_RLHP, added, (total_RLH.exp() * carried)[..., None])

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dropout: float = 0.0
    ) -> torch.Tensor:
        """Causal attention inside documents. query [R, heads, L, d], key/value [R, kv heads, L, d] -> [R, L, heads, d].

        Always torch's scaled dot product attention, whatever `attn_implementation` says. Only a document that began
        before the slice needs gathered keys.
        """
        both = self.gather(torch.stack([key, value], 1))  # [2W, B, 2, kv heads, L, d]
        keys, values = both.permute(2, 1, 3, 0, 4, 5).flatten(3, 4)  # [B, kv heads, S, d] each
        rows = []
        for row, (start, lengths) in enumerate(self.spans):
            slice_number = self.rank if row % 2 == 0 else 2 * self.size - 1 - self.rank
            stop = slice_number * query.shape[2] + lengths[0]
            parts = [list(x[row : row + 1].split(lengths, 2)) for x in (query, key, value)]
            parts[1][0], parts[2][0] = (x[row // 2 : row // 2 + 1, :, start:stop] for x in (keys, values))
            pieces = [
                F.scaled_dot_product_attention(
                    q, k, v, causal_lower_right(q.shape[2], k.shape[2]), dropout, scale=scale, enable_gqa=True
                )
                for q, k, v in zip(*parts)
            ]
            rows.append(torch.cat(pieces, 2))
        return torch.cat(rows).transpose(1, 2)


def context_group(size: int):
    """The process group of this rank's row: every `size` consecutive ranks split one row. Call it on all ranks.

    Ranks of a group must be given the same batches: `rank // size` is what data is sharded by.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if size < 1 or world % size:
        raise OmniInputError(f"context_parallel is {size}, but {world} processes cannot be divided into such groups")
    if size == 1:
        return None
    groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    return groups[dist.get_rank() // size]


def shard_batch(batch: dict[str, torch.Tensor], rank: int, size: int, merge_size: int = 2) -> dict:
    """A batch as the collators make it -> what this rank needs of it. Works on the CPU, without a process group.

    Args:
        batch: input_ids, labels [B, S] and, if there, attention_mask, seq_idx, mm_token_type_ids and media. Padding is
            its own document, on whichever side it stands.
        rank, size: this rank's place in its context-parallel group, and how many ranks that has.
        merge_size: patches per side of one vision token.

    Returns:
        `input_ids` [R, L]; `labels` [R, L + 1], those of each slice's tokens and of the token behind it, so that
        `labels[:, 1:]` is what the tokens are to predict, as in any batch; `context` (`ContextShard`);
        the media that this rank encodes, for the `forward` of a model prepared by `set_context_parallel`. A rank
        without an item of a modality that is in the batch encodes the cheapest one with weight 0, so that its towers
        run and get gradients like everywhere.

    Raises:
        OmniInputError: media and placeholders do not fit, or the batch has inputs that cannot be split.
    """
    for name in ("video_keep_tokens", "inputs_embeds", "position_ids", "past_key_values"):
        if batch.get(name) is not None:
            raise OmniInputError(f"{name} cannot be combined with context parallelism: leave it out of the batch")
    input_ids = batch["input_ids"]
    length = input_ids.shape[1]
    slice_length = max(-(-length // (2 * size)), MIN_SLICE)
    padding = 2 * size * slice_length - length

    def own(x, fill):  # [B, S] -> [R, L]
        return own_slices(F.pad(x, (0, padding), value=fill).unflatten(1, (2 * size, slice_length)), rank, size)

    documents = document_numbers(batch)
    documents = torch.cat([documents, (documents[:, -1:] + 1).expand(-1, padding)], 1)
    by_slice = documents.unflatten(1, (2 * size, slice_length))
    ends = by_slice[:, :, -1]
    seq_idx = own_slices(by_slice, rank, size)
    spans = []
    for row, own_documents in enumerate(seq_idx):
        start = torch.searchsorted(documents[row // 2], own_documents[0])
        spans.append((int(start), own_documents.unique_consecutive(return_counts=True)[1].tolist()))
    context = ContextShard(
        rank=rank,
        size=size,
        length=length,
        num_items=0,
        seq_idx=seq_idx,
        previous=own_slices(F.pad(by_slice[:, :-1], (0, 0, 1, 0), value=-1), rank, size),
        connected=F.pad(ends[:, 1:] == ends[:, :-1], (1, 0)),
        spans=spans,
        media_tokens={},
        media_places={},
        media_index={},
    )

    output = {"input_ids": own(input_ids, 0), "context": context}
    if batch.get("labels") is not None:
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        context.num_items = int((targets != -100).sum())
        output["labels"] = F.pad(own(targets, -100), (1, 0), value=-100)

    media = split_media(batch, rank, size, merge_size)
    token_types = batch.get("mm_token_type_ids")
    token_types = torch.zeros_like(input_ids) if token_types is None else token_types
    for modality, name in MODALITY_NAMES.items():
        is_place = token_types == modality
        if modality in media:
            inputs, item_tokens, rank_tokens = media[modality]
            check_places(is_place, item_tokens, name)
            counts = torch.tensor(rank_tokens)
            index = torch.zeros_like(input_ids)  # the tokens of rank i stand from i * counts.max() on
            gaps = torch.arange(size) * counts.max() - counts.cumsum(0) + counts
            index[is_place] = torch.arange(sum(rank_tokens)) + gaps.repeat_interleave(counts)
            context.media_tokens[modality] = rank_tokens
            context.media_places[modality] = own(is_place, False)
            context.media_index[modality] = own(index, 0)[context.media_places[modality]]
            output |= inputs
        elif bool(is_place.any()):
            raise OmniInputError(f"the batch has {name} placeholder tokens but no {name} was given")
    return output


def own_slices(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """[B, 2W, ...] -> the two slices of a rank [R, ...]."""
    return x[:, [rank, 2 * size - 1 - rank]].flatten(0, 1)


def document_numbers(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, S] documents numbered by place from 0; padding, on either side, is a document too."""
    documents = torch.zeros_like(batch["input_ids"]) if batch.get("seq_idx") is None else batch["seq_idx"]
    if batch.get("attention_mask") is not None:
        documents = documents.masked_fill(batch["attention_mask"] == 0, -1)
    changes = documents[:, 1:] != documents[:, :-1]
    return F.pad(changes.long().cumsum(1), (1, 0))


def split_media(batch: dict[str, torch.Tensor], rank: int, size: int, merge_size: int) -> dict[int, tuple]:
    """Modality -> (model inputs of this rank's items, tokens of every item of the batch, tokens of every rank).

    Ranks take runs of consecutive items of about equal cost, so that their tokens follow each other as the items do.
    """
    media = {}
    for modality, values, grid in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if batch.get(values) is not None:
            item_tokens = (batch[grid].prod(-1) // merge_size**2).tolist()
            frames = batch[grid].repeat_interleave(batch[grid][:, 0], 0)  # tubelets of a video are independent
            frames[:, 0] = 1
            patches = frames.prod(-1)
            items, tokens = own_items(patches, patches // merge_size**2, rank, size)
            first = int(patches[: items.start].sum())
            pixels = batch[values][first : first + int(patches[items].sum())]
            media[modality] = {values: pixels, grid: frames[items]}, item_tokens, tokens
    if batch.get("input_features") is not None:
        mask, counts = batch["input_features_mask"], batch.get("audio_clip_counts")
        frames = mask.sum(-1)
        clip_tokens = clip_token_count(frames)
        clips = [1] * len(frames) if counts is None else counts.tolist()
        if sum(clips) != len(frames):
            raise OmniInputError(f"audio_clip_counts {clips} add up to {sum(clips)} clips, {len(frames)} were given")
        item_tokens = [int(part.sum()) for part in clip_tokens.split(clips)]
        items, tokens = own_items(frames, clip_tokens, rank, size)
        longest = int(frames[items].max())
        inputs = {
            "input_features": batch["input_features"][items, :longest],
            "input_features_mask": mask[items, :longest],
        }
        media[AUDIO] = inputs, item_tokens, tokens
    return media


def own_items(costs: torch.Tensor, tokens: torch.Tensor, rank: int, size: int) -> tuple[slice, list[int]]:
    """Which of the items this rank encodes, and how many tokens each rank contributes.

    An item goes to the rank into whose share of the total cost its middle falls. A rank without items is given the
    cheapest one, and contributes no token of it.
    """
    ends = costs.cumsum(0)
    owner = (2 * ends - costs) * size // (2 * ends[-1])
    counts = torch.zeros(size, dtype=torch.long).index_add(0, owner, tokens).tolist()
    mine = (owner == rank).nonzero().flatten().tolist() or [int(costs.argmin())]
    return slice(mine[0], mine[-1] + 1), counts


def set_context_parallel(model: torch.nn.Module, group) -> None:
    """Makes `model(**shard_batch(...))` run over the ranks of `group`; call it before `accelerator.prepare`.

    Batches without `context` run as before, whole on each rank (evaluation, `generate`). None takes it back.

    Args:
        model: an `OmniForConditionalGeneration`, or a module around one (adapters).
        group: from `context_group`.
    """
    model = bare_model(model)
    model.__dict__.pop("forward", None)
    if group is None:
        return
    whole = type(model).forward

    @functools.wraps(whole)  # generate reads the signature
    def forward(self, *args, context=None, **kwargs):
        return whole(self, *args, **kwargs) if context is None else forward_shard(self, group, context, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def forward_shard(
    model: OmniForConditionalGeneration,
    group,
    context: ContextShard,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    output_hidden_states: bool | None = None,
    **others,
) -> CausalLMOutputWithPast:
    """The forward pass of one rank's part of a batch; arguments are what `shard_batch` returns.

    Args:
        num_items_in_batch: divides the summed loss of the own tokens; if None, the trained tokens of the batch that
            fall to a rank on average.

    Returns:
        loss: of the own tokens. Losses and gradients, averaged over the ranks (as data-parallel engines do), are those
        of one process. hidden_states: of the own slices [R, L, D] if asked for.
    """
    media = {name: others.pop(name) for name in MEDIA_TENSORS if name in others}
    ignored = ("use_cache", "skip_logits", "return_dict")
    given = [name for name, value in others.items() if value is not None and value is not False and name not in ignored]
    if given:
        raise ValueError(f"not understood with context parallelism: {given}; pass what shard_batch returned")
    if model.mtp is not None and model.mtp.layers[0].eh_proj.weight.requires_grad:
        raise ValueError("draft heads (mtp) cannot be trained with context parallelism: leave mtp out of `train`")
    context = replace(context, group=group)
    inner = model.model
    embeds = inner.language_model.embeddings(input_ids)
    features = inner.encode_media(**media)
    for modality, tokens in context.media_tokens.items():
        own_TD = features[f"{MODALITY_NAMES[modality]}_features"][: tokens[context.rank]]
        gathered = gather_ranks(F.pad(own_TD, (0, 0, 0, max(tokens) - len(own_TD))), group)
        chosen = gathered.index_select(0, context.media_index[modality]).to(embeds.dtype)
        embeds = embeds.masked_scatter(context.media_places[modality][..., None].expand_as(embeds), chosen)
    output = inner.language_model(
        embeds, seq_idx=context.seq_idx, context=context, output_hidden_states=bool(output_hidden_states)
    )
    loss = None
    if labels is not None:
        loss = chunked_cross_entropy(
            F.pad(output.last_hidden_state, (0, 0, 0, 1)),  # as long as the labels; the last state predicts nothing
            model.lm_head,
            labels,
            max(context.num_items, 1) / context.size if num_items_in_batch is None else num_items_in_batch,
            min_chunks=max(1, model.min_loss_chunks),  # the head runs on ranks without trained tokens as well
        )
    return CausalLMOutputWithPast(loss=loss, hidden_states=output.hidden_states)


__all__ = ["ContextShard", "context_group", "set_context_parallel", "shard_batch"]
