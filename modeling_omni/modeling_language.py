"""The hybrid language model: Mamba-2, mixture of experts, attention without positions, plain MLP (paper section 2).

One mixer per layer, `x + mixer(RMSNorm(x))`, its kind given by a letter of `hybrid_override_pattern`. Mamba-2 is the
chunked state-space dual form of Dao and Gu (2024); the experts are those of Nemotron 3 Nano (sigmoid router with a
correction bias used for the choice only, relu^2 experts without gates, one shared expert). This file says what is
computed and how it is put together; the arithmetic that is worth doing fast stands in `ssd.py` (Mamba-2) and
`kernels.py` (norms, experts, attention).

Shape legend: B batch, S tokens, D hidden size; H Mamba heads, P head size, G groups, N state size, C conv channels;
E experts, K experts per token, T tokens of all rows, I expert width; L keys.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_omni import OmniTextConfig
from .kernels import causal_attention, gated_group_rms_norm, linear, relu2, rms_norm, routed_experts
from .quantization import decode_cache, encode_cache, kv_scales
from .ssd import causal_conv1d, causal_conv1d_step, ssd_advance, ssd_scan, ssd_step

LOSS_CHUNK = 1024  # trained tokens whose logits exist at a time


class OmniRMSNorm(nn.Module):
    """RMSNorm computed in float32, weight multiplied in float32, result cast back to the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedGroupRMSNorm(nn.Module):
    """Mamba-2's output norm: `RMSNorm(y * silu(gate))` over groups of channels, the gate applied before the norm."""

    def __init__(self, size: int, group_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.group_size = group_size
        self.eps = eps

    def forward(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """y, gate: [B, S, H*P] -> [B, S, H*P] in gate's dtype."""
        return gated_group_rms_norm(y, gate, self.weight, self.group_size, self.eps)


class Mamba2Mixer(nn.Module):
    """Mamba-2 (checkpoint section 3.4: no bias in the projections, gate before the grouped norm, state in float32)."""

    def __init__(self, config: OmniTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.n_groups, self.state_size = config.n_groups, config.ssm_state_size
        self.time_step_limit = config.time_step_limit
        self.state_dtype = getattr(torch, config.mamba_ssm_cache_dtype)
        inner, conv_size = config.mamba_intermediate_size, config.mamba_conv_size
        self.in_proj = nn.Linear(config.hidden_size, inner + conv_size + self.num_heads, bias=config.mamba_proj_bias)
        self.conv1d = nn.Conv1d(conv_size, conv_size, config.conv_kernel, groups=conv_size, bias=config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GatedGroupRMSNorm(inner, inner // self.n_groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_BSD: torch.Tensor,
        cache: Cache | None = None,
        padding_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        context=None,
    ) -> torch.Tensor:
        """padding_mask: [B, S] bool, False on padding, which then leaves convolution and state untouched.

        With a dict at `cache.draft_window` (speculative.py) several tokens behind a state leave it as it is, and what
        `advance` needs to take the first of them into it is put there.
        """
        length = hidden_BSD.shape[1]
        inner, bc_size = self.num_heads * self.head_dim, self.n_groups * self.state_size
        if padding_mask is not None:
            hidden_BSD = hidden_BSD * padding_mask[..., None]
        gate, xbc, dt = linear(self.in_proj, hidden_BSD).split([inner, inner + 2 * bc_size, self.num_heads], -1)

        state = cache.get_recurrent_state(self.layer_idx) if cache is not None else None
        one_step = state is not None and length == 1
        window = None if one_step else getattr(cache, "draft_window", None)
        own = xbc
        if one_step:
            xbc = self._convolve_step(xbc, cache)
        else:
            xbc = self._convolve(xbc, cache, seq_idx, context, window is None)
        if padding_mask is not None:  # the convolution's bias made padding non-zero again
            xbc = xbc * padding_mask[..., None]
        x, B, C = xbc.split([inner, bc_size, bc_size], -1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.n_groups, self.state_size)) for t in (B, C))
        A = -self.A_log.float().exp()
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.time_step_limit)

        kernels = self.config.kernels
        if one_step:
            y = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, self.D, kernels)[:, None]
        else:
            state = None if state is None else state.float()
            y, state = ssd_scan(x, dt, A, B, C, state, seq_idx, self.D, kernels=kernels)
            if window is not None:
                window[self.layer_idx] = (own, x, dt, A, B)
            elif cache is not None:
                cache.update_recurrent_state(state.to(self.state_dtype), self.layer_idx)
            if context is not None:
                y = context.add_incoming_state(y, state, dt * A, C)
        return linear(self.out_proj, self.norm(y.flatten(-2), gate))

    def advance(self, cache: Cache, inputs: tuple[torch.Tensor, ...], tokens: int) -> None:
        """Takes the first `tokens` of a draft window (see `forward`) into the cache's convolution and state."""
        xbc, x, dt, A, B = inputs
        kernel = self.conv1d.kernel_size[0]
        cache.update_conv_state(xbc[:, :tokens].transpose(1, 2), self.layer_idx, conv_kernel_size=kernel)
        ssd_advance(x[:, :tokens], dt[:, :tokens], A, B[:, :tokens], cache.get_recurrent_state(self.layer_idx))

    def _convolve(self, xbc_BSC, cache, seq_idx, context, keep):
        length, kernel = xbc_BSC.shape[1], self.conv1d.kernel_size[0]
        own = xbc_BSC
        if cache is not None:
            previous = cache.get_conv_state(self.layer_idx)
            if previous is not None:
                xbc_BSC = torch.cat([previous[..., 1:].transpose(1, 2), own], 1)
            if keep:
                cache.update_conv_state(own[:, -kernel:].transpose(1, 2), self.layer_idx, conv_kernel_size=kernel)
        if context is not None:  # rows are slices of longer rows, which stand on several ranks
            xbc_BSC, seq_idx = context.prepend_history(own, kernel - 1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        return causal_conv1d(xbc_BSC, weight, bias, seq_idx, self.config.kernels)[:, -length:]

    def _convolve_step(self, xbc_B1C, cache):
        kernel = self.conv1d.kernel_size[0]
        window = cache.update_conv_state(xbc_B1C.transpose(1, 2), self.layer_idx, conv_kernel_size=kernel)
        return causal_conv1d_step(window[..., -kernel:], self.conv1d.weight.squeeze(1), self.conv1d.bias)[:, None]


class TopKRouter(nn.Module):
    """Sigmoid router in float32. The correction bias chooses the experts; the weights are the plain sigmoids."""

    def __init__(self, config: OmniTextConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> expert numbers [T, K] and their weights [T, K] float32."""
        config = self.config
        with torch.autocast(hidden_TD.device.type, enabled=False):  # a score rounded to bfloat16 picks other experts
            scores = F.linear(hidden_TD.float(), self.weight.float()).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias.float()
        if config.n_group > 1:  # only experts of the best groups, a group judged by its two best experts
            groups = choice.unflatten(-1, (config.n_group, -1))
            best = groups.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
            allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
            choice = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
        experts = choice.topk(config.num_experts_per_tok, -1).indices
        weights = scores.gather(-1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor


class Experts(nn.Module):
    """All routed experts of a layer as two stacked parameters."""

    def __init__(self, config: OmniTextConfig):
        super().__init__()
        self.config = config
        width = config.moe_latent_size or config.hidden_size
        self.num_experts = config.n_routed_experts
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, config.moe_intermediate_size, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, config.moe_intermediate_size))

    def forward(self, hidden_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        up, down = self.up_proj, self.down_proj  # read once: adapters and 4-bit weights are formed at each reading
        return routed_experts(hidden_TD, experts_TK, weights_TK, up, down, self.config.kernels)


class OmniMLP(nn.Module):
    """`down(relu2(up(x)))`: the plain MLP layer and the shared expert."""

    def __init__(self, config: OmniTextConfig, width: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(self.down_proj, relu2(linear(self.up_proj, hidden)))


class MoE(nn.Module):
    """Routed experts plus one shared expert, added unscaled."""

    def __init__(self, config: OmniTextConfig):
        super().__init__()
        self.gate = TopKRouter(config)
        self.experts = Experts(config)
        self.shared_experts = OmniMLP(config, config.moe_shared_expert_intermediate_size * config.n_shared_experts)
        self.latent = config.moe_latent_size is not None
        if self.latent:
            self.fc1_latent_proj = nn.Linear(config.hidden_size, config.moe_latent_size, bias=config.mlp_bias)
            self.fc2_latent_proj = nn.Linear(config.moe_latent_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        hidden = hidden_BSD.flatten(0, -2)
        experts, weights = self.gate(hidden)
        if self.latent:
            routed = linear(self.fc2_latent_proj, self.experts(linear(self.fc1_latent_proj, hidden), experts, weights))
        else:
            routed = self.experts(hidden, experts, weights)
        return (routed + self.shared_experts(hidden)).view_as(hidden_BSD)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention. query [B, heads, S, d], key/value [B, kv heads, L, d] -> [B, S, heads, d], weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class OmniAttention(nn.Module):
    """Grouped-query causal attention without any positional encoding.

    `attn_implementation` "sdpa" (the default) takes `kernels.causal_attention`; anything else goes to transformers.
    """

    is_causal = True

    def __init__(self, config: OmniTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads  # read by transformers
        query_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_BSD: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        documents: list[list[int]] | None = None,
        keys: int | None = None,
        context=None,
        **kwargs,
    ) -> torch.Tensor:
        """attention_mask, documents: see `attention_inputs`; keys: how many of the cache's keys exist (None: all)."""
        query, key, value = (
            linear(proj, hidden_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            scales = kv_scales(self)  # in FP8 all keys are read as they are kept, the new ones too
            if scales is not None:
                key, value = encode_cache(key, scales[0]), encode_cache(value, scales[1])
            key, value = cache.update(key, value, self.layer_idx)
            if keys is not None:
                key, value = key[:, :, :keys], value[:, :, :keys]
            if scales is not None:
                key, value = (decode_cache(codes, scale, query.dtype) for codes, scale in zip((key, value), scales))
        dropout = self.config.attention_dropout if self.training else 0.0
        if context is not None:
            return self.o_proj(context.attend(query, key, value, self.head_dim**-0.5, dropout).flatten(2))
        if self.config._attn_implementation == "sdpa":
            output = causal_attention(query, key, value, attention_mask, dropout, documents, self.config.kernels)
            return linear(self.o_proj, output.flatten(2))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, _ = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.head_dim**-0.5, **kwargs
        )
        return linear(self.o_proj, output.flatten(2))


class OmniBlock(GradientCheckpointingLayer):
    """One layer: `x + mixer(RMSNorm(x))`; of the kind that the pattern has at its place, if not given."""

    def __init__(self, config: OmniTextConfig, layer_idx: int, kind: str | None = None):
        super().__init__()
        self.kind = kind or config.hybrid_override_pattern[layer_idx]
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = OmniRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if self.kind == "M":
            self.mixer = Mamba2Mixer(config, layer_idx)
        elif self.kind == "*":
            self.mixer = OmniAttention(config, layer_idx)
        elif self.kind == "E":
            self.mixer = MoE(config)
        else:
            self.mixer = OmniMLP(config, config.intermediate_size)

    def forward(self, hidden, cache=None, padding_mask=None, seq_idx=None, context=None, attention=None, **kwargs):
        residual = hidden.float() if self.residual_in_fp32 else hidden
        hidden = self.norm(hidden.to(self.norm.weight.dtype))
        if self.kind == "M":
            hidden = self.mixer(hidden, cache, padding_mask, seq_idx, context)
        elif self.kind == "*":
            hidden = self.mixer(hidden, cache, context=context, **(attention or {}), **kwargs)
        else:
            hidden = self.mixer(hidden)
        return residual + hidden


def attention_inputs(config, inputs_embeds, attention_mask, cache, position_ids, seq_idx) -> dict:
    """What the attention layers must know of padding, packing and the cache; no mask [S, L] where none is needed.

    Returns:
        attention_mask: as `create_causal_mask` makes it, or None: causal, and whatever `documents` say.
        documents: the lengths of what may only see itself, row by row: packed documents, and runs of padding.
        keys: how many keys of a preallocated cache exist after this call; None for all.
    """
    plain = config._attn_implementation == "sdpa" and not torch.compiler.is_compiling()
    # transformers reads packing off positions that start anew, where nothing else tells
    plain = plain and not (position_ids is not None and attention_mask is None and cache is None)
    plain = plain and (attention_mask is None or attention_mask.dim() == 2)
    if plain:
        past = 0 if cache is None else int(cache.get_seq_length())  # a static cache returns a live counter
        numbers = seq_idx
        if attention_mask is not None and not bool(attention_mask.all()):
            tokens = attention_mask.bool()
            starts = tokens[:, :1].sum(1) + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
            plain = past == 0 and inputs_embeds.shape[1] > 1 and bool((starts <= 1).all())
            numbers = tokens.long() - 1 if seq_idx is None else seq_idx.masked_fill(~tokens, -1)
    if plain:
        documents = None
        if numbers is not None:
            documents = [row.unique_consecutive(return_counts=True)[1].tolist() for row in numbers.cpu()]
        preallocated = cache is not None and cache.get_max_length() != -1
        return {"documents": documents, "keys": past + inputs_embeds.shape[1] if preallocated else None}

    same_document = None
    if seq_idx is not None:

        def same_document(batch, head, query, key):
            return seq_idx[batch, query] == seq_idx[batch, key]

    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
        and_mask_function=same_document,
    )
    return {"attention_mask": mask}


def decode_masks(attention_mask: torch.Tensor | None, batch: int, cache: Cache, device) -> dict:
    """The masks of one decoding step over a preallocated cache, of fixed shapes, so that compiled code fits every step.

    Args:
        attention_mask: [B, past + 1], 0 on padding; None means no padding.

    Returns:
        "full_attention": bool [B, 1, 1, L], True on the keys to read; "linear_attention": None, a new token is never
        padding. Accepted by `OmniLanguageModel.forward` as its `attention_mask`.
    """
    length = cache.get_max_length()
    if length == -1:  # no attention layer
        return {"full_attention": None, "linear_attention": None}
    seen = torch.arange(length, device=device) <= cache.get_seq_length()
    if attention_mask is not None:
        seen = seen & F.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]))
    return {"full_attention": seen.expand(batch, length)[:, None, None], "linear_attention": None}


class OmniLanguageModel(nn.Module):
    """Embeddings, layers and final norm of the language model; the head stands in `OmniForConditionalGeneration`."""

    def __init__(self, config: OmniTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OmniBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm_f = OmniRMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        position_ids: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        context=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Runs the layers.

        Args:
            inputs_embeds: [B, S, D].
            attention_mask: [B, past + S], 0 on padding (left or right); None means no padding.
            seq_idx: [B, S] document number of each token of packed rows: documents then see only themselves in
                attention, convolution and Mamba state alike. Training only (no cache).
            context: `ContextShard` of context parallelism: the rows are this rank's slices [R, L] of longer rows.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if seq_idx is not None and past_key_values is not None:
            raise ValueError("packed rows (seq_idx) cannot be combined with a cache: pass use_cache=False")
        if seq_idx is not None and context is None and "flash" in (self.config._attn_implementation or ""):
            raise ValueError(
                "packed rows (seq_idx) need attn_implementation 'sdpa' or 'eager'; flash would mix documents"
            )
        hidden, length = inputs_embeds, inputs_embeds.shape[1]
        attention = {}
        if isinstance(attention_mask, dict):  # prepared for compiled decoding, see `decode_masks`
            attention = {"attention_mask": attention_mask["full_attention"]}
            attention_mask = attention_mask["linear_attention"]
        padding_mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            padding_mask = attention_mask[:, -length:].bool()
            if not torch.compiler.is_compiling() and bool(padding_mask.all()):
                padding_mask = None
        if "*" in self.config.hybrid_override_pattern and not attention and context is None:
            attention = attention_inputs(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids, seq_idx
            )
        all_hidden = []
        for layer in self.layers:
            if output_hidden_states:
                all_hidden.append(hidden)
            hidden = layer(
                hidden,
                cache=past_key_values,
                padding_mask=padding_mask,
                seq_idx=seq_idx,
                context=context,
                attention=attention,
                **kwargs,
            )
        hidden = self.norm_f(hidden.to(self.norm_f.weight.dtype))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden, hidden) if output_hidden_states else None,
        )


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    chunk: int = LOSS_CHUNK,
    min_chunks: int = 0,
) -> torch.Tensor:
    """Next-token loss without ever holding all logits: the head runs over `chunk` trained tokens at a time.

    Args:
        hidden: [B, S, D]. labels: [B, S], -100 where nothing is learnt; token t is predicted from position t - 1.
        num_items: divide the summed loss by this (gradient accumulation); the number of trained tokens if None.
        min_chunks: call the head at least this often. Processes that share a sharded head must agree on it.
    """
    labels = labels[:, 1:].to(hidden.device)
    trained = labels != -100
    states, targets = hidden[:, :-1][trained], labels[trained]

    def loss_of(states, targets):
        return F.cross_entropy(head(states).float(), targets, reduction="sum")

    # keeps the graph whole when a batch has no trained token; a sum in float16 may overflow
    total = hidden.sum(dtype=torch.float32) * 0.0
    parts = list(zip(states.split(chunk), targets.split(chunk)))
    parts += [(states[:0], targets[:0])] * (min_chunks - len(parts))
    for part, target in parts:
        if torch.is_grad_enabled() and len(parts) > 1:
            total = total + torch.utils.checkpoint.checkpoint(loss_of, part, target, use_reentrant=False)
        else:
            total = total + loss_of(part, target)
    return total / (trained.sum().clamp(min=1) if num_items is None else num_items)


@torch.no_grad()
def init_language_weights(module: nn.Module, config: OmniTextConfig) -> None:
    """Starting values of any module of this file (`transformers.initialization` leaves loaded parameters alone)."""
    from transformers import initialization as init

    std = config.initializer_range
    if isinstance(module, Mamba2Mixer):
        init.copy_(module.A_log, torch.arange(1, module.num_heads + 1, dtype=torch.float32).log())
        init.ones_(module.D)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = (torch.rand(module.num_heads) * (high - low) + low).exp().clamp(min=config.time_step_floor)
        init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        bound = module.conv1d.kernel_size[0] ** -0.5
        init.uniform_(module.conv1d.weight, -bound, bound)
        if module.conv1d.bias is not None:
            init.zeros_(module.conv1d.bias)
        if config.rescale_prenorm_residual:
            init.normal_(module.out_proj.weight, std=std / math.sqrt(config.num_hidden_layers))
    elif isinstance(module, TopKRouter):
        init.normal_(module.weight, std=std)
        init.zeros_(module.e_score_correction_bias)
    elif isinstance(module, Experts):
        init.normal_(module.up_proj, std=std)
        init.normal_(module.down_proj, std=std)
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, std=std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=std)
    elif isinstance(module, (OmniRMSNorm, GatedGroupRMSNorm)):
        init.ones_(module.weight)
