"""Multi-token prediction: the draft head of Nemotron 3 Super and Ultra, its loss, and its keys and values.

At position t the head takes the trunk's last hidden state (behind the final norm) and the embedding of token t + 1,
and says what token t + 2 is: both are normed, joined (embedding first), projected to the width of the model, sent
through a few layers ("*E": attention and experts, LatentMoE where the trunk has it) and normed. Embeddings and
`lm_head` are the trunk's. What it says of t + 3 comes from the same, with its own hidden state in place of the trunk's.
The idea is that of DeepSeek-V3 (2024, section 2.2); names and order are those of the released checkpoints, as public
serving code reads them: `mtp.layers.N`, all layers of all heads in one list, `enorm`, `hnorm` and `eh_proj` in a head's
first layer, `final_layernorm` in its last.

Drafts that the trunk verifies are in speculative.py.

Shape legend: B batch, S tokens, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_omni import OmniTextConfig
from .modeling_language import OmniBlock, OmniRMSNorm, attention_inputs, chunked_cross_entropy


class MTPLayer(OmniBlock):
    """A layer of a head; the first holds what joins its two inputs, the last its final norm."""

    def __init__(self, config: OmniTextConfig, layer_idx: int, kind: str, first: bool, last: bool):
        super().__init__(config, layer_idx, kind)
        size, eps = config.hidden_size, config.layer_norm_epsilon
        self.last = last
        if first:
            self.enorm, self.hnorm = OmniRMSNorm(size, eps), OmniRMSNorm(size, eps)
            self.eh_proj = nn.Linear(2 * size, size, bias=False)
        if last:
            self.final_layernorm = OmniRMSNorm(size, eps)

    def forward(self, hidden: torch.Tensor, embeds: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """embeds: of the tokens further on, [B, S, D], for the first layer."""
        if embeds is not None:
            hidden = self.eh_proj(torch.cat([self.enorm(embeds), self.hnorm(hidden)], -1))
        hidden = super().forward(hidden, **kwargs)
        return self.final_layernorm(hidden.to(self.final_layernorm.weight.dtype)) if self.last else hidden


class OmniMTP(nn.Module):
    """`num_nextn_predict_layers` heads, one per depth: depth 0 predicts the token after the next one."""

    def __init__(self, config: OmniTextConfig):
        super().__init__()
        self.config = config
        self.depths, pattern = config.num_nextn_predict_layers, config.mtp_hybrid_override_pattern
        kinds, size = pattern * self.depths, len(pattern)
        self.size = size
        self.layers = nn.ModuleList(
            # an attention layer's number is its place in the cache: `new_cache`
            MTPLayer(config, kinds[:i].count("*"), kind, first=i % size == 0, last=i % size == size - 1)
            for i, kind in enumerate(kinds)
        )

    def new_cache(self) -> Cache:
        """An empty cache for the attention layers of all heads."""
        return Cache(layers=[DynamicLayer() for layer in self.layers if layer.kind == "*"])

    def forward(
        self,
        hidden_BSD: torch.Tensor,
        embeds_BSD: torch.Tensor,
        depth: int = 0,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, S, D] for `lm_head`.

        Args:
            hidden_BSD: of the trunk (behind its final norm), or of the depth before.
            embeds_BSD: embeddings of the tokens 1 + depth places further on.
            depth: which head; beyond the last, the last one is used again.
            attention_mask, seq_idx: as in `OmniLanguageModel`, of the positions of `hidden_BSD`.
        """
        start = min(depth, self.depths - 1) * self.size
        hidden, attention = hidden_BSD, {}
        if "*" in self.config.mtp_hybrid_override_pattern:
            attention = attention_inputs(self.config, hidden, attention_mask, cache, None, seq_idx)
        for number, layer in enumerate(self.layers[start : start + self.size]):
            hidden = layer(hidden, None if number else embeds_BSD, cache=cache, attention=attention)
        return hidden


def mtp_loss(
    mtp: OmniMTP,
    head: nn.Module,
    hidden_BSD: torch.Tensor,
    embeds_BSD: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    depths: int = 1,
    min_chunks: int = 0,
) -> torch.Tensor:
    """Mean over the depths of the heads' cross-entropy; depth d learns token t + 2 + d at position t.

    Args:
        hidden_BSD, embeds_BSD: the trunk's last hidden states and its inputs, media in place.
        labels: [B, S], -100 where nothing is learnt. attention_mask: [B, S]. seq_idx: [B, S] of packed rows: a token is
            never predicted from another document.
        num_items, min_chunks: see `chunked_cross_entropy`; the number of trained tokens is the trunk's.
        depths: how many drafts in a row are learnt; beyond the heads there are, the last one is unrolled.
    """
    total = 0.0
    for depth in range(depths):
        far = depth + 2
        embeds_BSD = F.pad(embeds_BSD[:, 1:], (0, 0, 0, 1))
        hidden_BSD = mtp(hidden_BSD, embeds_BSD, depth, attention_mask, seq_idx=seq_idx)
        far_labels, targets = labels[:, far:], torch.full_like(labels, -100)
        for numbers in (attention_mask, seq_idx):  # neither into padding nor into another document
            if numbers is not None:
                far_labels = far_labels.masked_fill(numbers[:, far:] != numbers[:, :-far], -100)
        targets[:, 1 : 1 + far_labels.shape[1]] = far_labels  # the loss reads position t's target at t + 1
        total = total + chunked_cross_entropy(hidden_BSD, head, targets, num_items, min_chunks=min_chunks)
    return total / depths


__all__ = ["MTPLayer", "OmniMTP", "mtp_loss"]
