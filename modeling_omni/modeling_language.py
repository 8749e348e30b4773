"""The hybrid language model: Mamba-2, mixture of experts, attention without positions, plain MLP (paper section 2).

One mixer per layer, `x + mixer(RMSNorm(x))`, its kind given by a letter of `hybrid_override_pattern`. Mamba-2 is the
chunked state-space dual form of Dao and Gu (2024); the experts are those of Nemotron 3 Nano (sigmoid router with a
correction bias used for the choice only, relu^2 experts without gates, one shared expert).

Shape legend: B batch, S tokens, D hidden size; H Mamba heads, P head size, G groups, N state size, Q tokens of a
scan chunk, C conv channels; E experts, K experts per token, T tokens of all rows, I expert width.
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

# Tokens per chunk of the Mamba-2 scan. The result does not depend on it; 32 to 64 measured fastest on CPUs.
SCAN_CHUNK = 64


def relu2(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU, the activation of the experts, the MLP layers and both projectors."""
    return F.relu(x).square()


class OmniRMSNorm(nn.Module):
    """RMSNorm computed in float32, weight multiplied in float32, result cast back to the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * y).to(x.dtype)


class GatedGroupRMSNorm(nn.Module):
    """Mamba-2's output norm: `RMSNorm(y * silu(gate))` over groups of channels, the gate applied before the norm."""

    def __init__(self, size: int, group_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.group_size = group_size
        self.eps = eps

    def forward(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """y, gate: [B, S, H*P] -> [B, S, H*P] in gate's dtype."""
        y = y.float() * F.silu(gate.float())
        groups = y.unflatten(-1, (-1, self.group_size))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return (self.weight.float() * y).to(gate.dtype)


def causal_conv1d(
    x_BSC: torch.Tensor, weight_CK: torch.Tensor, bias_C: torch.Tensor | None, seq_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """Depthwise causal convolution with SiLU, as a sum of shifted products (no transposes).

    `x_BSC` may carry history in front; with `seq_idx` [B, S] a tap never reaches into another document.
    Returns [B, S, C].
    """
    kernel, length = weight_CK.shape[1], x_BSC.shape[1]
    x = F.pad(x_BSC, (0, 0, kernel - 1, 0))
    y = bias_C
    for tap in range(kernel):
        shifted = x[:, tap : tap + length]
        back = kernel - 1 - tap  # this tap reads the token `back` places earlier
        if seq_idx is not None and back:
            same = seq_idx == F.pad(seq_idx, (back, 0), value=-1)[:, :length]
            shifted = shifted * same[..., None]
        y = shifted * weight_CK[:, tap] if y is None else torch.addcmul(y, shifted, weight_CK[:, tap])
    return F.silu(y)


def ssd_scan(
    x_BSHP: torch.Tensor,
    dt_BSH: torch.Tensor,
    A_H: torch.Tensor,
    B_BSGN: torch.Tensor,
    C_BSGN: torch.Tensor,
    state_BHPN: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    chunk: int = SCAN_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's selective scan: state <- exp(dt A) state + dt x B^T, y = C state, for every token in order.

    Chunk by chunk: inside a chunk as products of matrices (C B^T is formed once per group, not per head), between
    chunks through the float32 state. Linear in S; nothing larger than [B, H, Q, Q] is ever held.

    Args:
        x_BSHP: inputs. dt_BSH: step sizes after softplus, float32. A_H: negative decay rates, float32.
        B_BSGN, C_BSGN: input and output maps, shared by the heads of a group.
        state_BHPN: state before the first token (zeros if None).
        seq_idx: [B, S] document number of every token; the state never crosses from one document to the next.

    Returns:
        y [B, S, H, P] float32 and the state after the last token [B, H, P, N] float32.
    """
    batch, _, heads, _ = x_BSHP.shape
    groups = B_BSGN.shape[2]
    per_group = heads // groups
    decay_log_BHS = (dt_BSH * A_H).transpose(1, 2)
    xdt_BHSP = (x_BSHP.float() * dt_BSH[..., None]).transpose(1, 2)
    B_BGSN, C_BGSN = B_BSGN.float().transpose(1, 2), C_BSGN.float().transpose(1, 2)
    # `split` and not slices: the gradient of a slice is a zero-filled tensor of the whole length for every chunk
    parts = zip(xdt_BHSP.split(chunk, 2), decay_log_BHS.split(chunk, 2), B_BGSN.split(chunk, 2), C_BGSN.split(chunk, 2))
    documents = seq_idx.split(chunk, 1) if seq_idx is not None else None
    last_document = None
    outputs = []
    for number, (x, decay_log, B, C) in enumerate(parts):
        length = x.shape[2]
        total = decay_log.cumsum(-1)  # [B, H, Q] log decay from the chunk's start through each token
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        carried = 1.0  # whether the incoming state belongs to the token's document
        kept = total[..., -1:]  # log decay of the incoming state over the chunk
        to_end = kept - total
        if documents is not None:
            document = documents[number]
            causal = causal & (document[:, None, :, None] == document[:, None, None, :])
            if last_document is not None:
                carried = (document == last_document[:, None])[:, None, :, None]
                kept = kept.masked_fill((document[:, -1] != last_document)[:, None, None], -torch.inf)
            to_end = to_end.masked_fill((document != document[:, -1:])[:, None], -torch.inf)
            last_document = document[:, -1]
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        mixing = (C @ B.transpose(2, 3))[:, :, None] * decay.unflatten(1, (groups, per_group))  # [B, G, H/G, Q, Q]
        y = mixing.flatten(1, 2) @ x
        if state_BHPN is not None:
            from_state = C[:, :, None] @ state_BHPN.unflatten(1, (groups, per_group)).transpose(3, 4)
            y = y + from_state.flatten(1, 2) * total.exp()[..., None] * carried
        outputs.append(y)
        weighted = (x * to_end.exp()[..., None]).unflatten(1, (groups, per_group)).transpose(3, 4)  # [B,G,H/G,P,Q]
        new_state = (weighted @ B[:, :, None]).flatten(1, 2)
        state_BHPN = new_state if state_BHPN is None else torch.addcmul(new_state, state_BHPN, kept.exp()[..., None])
    y_BHSP = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return y_BHSP.transpose(1, 2), state_BHPN


def ssd_step(
    x_BHP: torch.Tensor,
    dt_BH: torch.Tensor,
    A_H: torch.Tensor,
    B_BGN: torch.Tensor,
    C_BGN: torch.Tensor,
    state_BHPN: torch.Tensor,
) -> torch.Tensor:
    """One token of `ssd_scan`; `state_BHPN` (float32) is updated in place. Returns y [B, H, P] float32."""
    per_group = x_BHP.shape[1] // B_BGN.shape[1]
    B_BHN = B_BGN.float().repeat_interleave(per_group, 1)
    C_BHN = C_BGN.float().repeat_interleave(per_group, 1)
    state_BHPN.mul_((dt_BH * A_H).exp()[..., None, None])
    state_BHPN.addcmul_((x_BHP.float() * dt_BH[..., None])[..., None], B_BHN[:, :, None].to(state_BHPN.dtype))
    return (state_BHPN.float() @ C_BHN[..., None]).squeeze(-1)


class Mamba2Mixer(nn.Module):
    """Mamba-2 (checkpoint section 3.4: no bias in the projections, gate before the grouped norm, state in float32)."""

    def __init__(self, config: OmniTextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.n_groups, self.state_size = config.n_groups, config.ssm_state_size
        self.time_step_limit = config.time_step_limit
        self.state_dtype = getattr(torch, config.mamba_ssm_cache_dtype)
        self.chunk = min(config.chunk_size, SCAN_CHUNK)
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
        """padding_mask: [B, S] bool, False on padding, which then leaves convolution and state untouched."""
        length = hidden_BSD.shape[1]
        inner, bc_size = self.num_heads * self.head_dim, self.n_groups * self.state_size
        if padding_mask is not None:
            hidden_BSD = hidden_BSD * padding_mask[..., None]
        gate, xbc, dt = self.in_proj(hidden_BSD).split([inner, inner + 2 * bc_size, self.num_heads], -1)

        state = None
        if cache is not None:
            state = cache.get_recurrent_state(self.layer_idx, state_idx=0)
            kernel = self.conv1d.kernel_size[0]
            xbc = cache.update_conv_state(xbc.transpose(1, 2), self.layer_idx, conv_kernel_size=kernel).transpose(1, 2)
            xbc = xbc[:, -(length + kernel - 1) :]
        documents = seq_idx
        if context is not None:  # rows are slices of longer rows, which stand on several ranks
            xbc, documents = context.prepend_history(xbc, self.conv1d.kernel_size[0] - 1)
        xbc = causal_conv1d(xbc, self.conv1d.weight.squeeze(1), self.conv1d.bias, documents)[:, -length:]
        if padding_mask is not None:  # the convolution's bias made padding non-zero again
            xbc = xbc * padding_mask[..., None]
        x, B, C = xbc.split([inner, bc_size, bc_size], -1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.n_groups, self.state_size)) for t in (B, C))
        A = -self.A_log.float().exp()
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.time_step_limit)

        if state is not None and length == 1:
            y = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state)[:, None]
        else:
            y, state = ssd_scan(x, dt, A, B, C, None if state is None else state.float(), seq_idx, self.chunk)
            if cache is not None:
                cache.update_recurrent_state(state.to(self.state_dtype), self.layer_idx)
            if context is not None:
                y = context.add_incoming_state(y, state, dt * A, C)
        y = torch.addcmul(y, x.float(), self.D.float()[:, None])
        return self.out_proj(self.norm(y.flatten(-2), gate))


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
    """All routed experts of a layer as two stacked parameters; tokens are sorted by expert, one product per expert."""

    def __init__(self, config: OmniTextConfig):
        super().__init__()
        width = config.moe_latent_size or config.hidden_size
        self.num_experts = config.n_routed_experts
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, config.moe_intermediate_size, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, config.moe_intermediate_size))

    def forward(self, hidden_TD: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        per_token = experts_TK.shape[1]
        order = experts_TK.flatten().argsort(stable=True)
        tokens = order // per_token
        counts = experts_TK.flatten().bincount(minlength=self.num_experts).tolist()
        sorted_hidden = hidden_TD[tokens]
        # `unbind` and not indexing: the gradient of an index is a zero-filled tensor of all experts for every expert
        outputs = [
            F.linear(relu2(F.linear(part, up)), down)
            for part, up, down in zip(sorted_hidden.split(counts), self.up_proj.unbind(), self.down_proj.unbind())
            if len(part)
        ]
        weighted = torch.cat(outputs) * weights_TK.flatten()[order, None].to(hidden_TD.dtype)
        return torch.zeros_like(hidden_TD).index_add(0, tokens, weighted)


class OmniMLP(nn.Module):
    """`down(relu2(up(x)))`: the plain MLP layer and the shared expert."""

    def __init__(self, config: OmniTextConfig, width: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(relu2(self.up_proj(hidden)))


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
            routed = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(hidden), experts, weights))
        else:
            routed = self.experts(hidden, experts, weights)
        return (routed + self.shared_experts(hidden)).view_as(hidden_BSD)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention. query [B, heads, S, d], key/value [B, kv heads, L, d] -> [B, S, heads, d], weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class OmniAttention(nn.Module):
    """Grouped-query causal attention without any positional encoding."""

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
        context=None,
        **kwargs,
    ) -> torch.Tensor:
        query, key, value = (
            proj(hidden_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        dropout = self.config.attention_dropout if self.training else 0.0
        if context is not None:
            return self.o_proj(context.attend(query, key, value, self.head_dim**-0.5, dropout).flatten(2))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, _ = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.head_dim**-0.5, **kwargs
        )
        return self.o_proj(output.flatten(2))


class OmniBlock(GradientCheckpointingLayer):
    """One layer: `x + mixer(RMSNorm(x))`."""

    def __init__(self, config: OmniTextConfig, layer_idx: int):
        super().__init__()
        self.kind = config.hybrid_override_pattern[layer_idx]
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

    def forward(self, hidden, cache=None, padding_mask=None, attention_mask=None, seq_idx=None, context=None, **kwargs):
        residual = hidden.float() if self.residual_in_fp32 else hidden
        hidden = self.norm(hidden.to(self.norm.weight.dtype))
        if self.kind == "M":
            hidden = self.mixer(hidden, cache, padding_mask, seq_idx, context)
        elif self.kind == "*":
            hidden = self.mixer(hidden, cache, attention_mask, context, **kwargs)
        else:
            hidden = self.mixer(hidden)
        return residual + hidden


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
        causal_mask = None
        if isinstance(attention_mask, dict):  # prepared by `generate` for a static cache
            causal_mask, attention_mask = attention_mask["full_attention"], attention_mask["linear_attention"]
        padding_mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            padding_mask = attention_mask[:, -length:].bool()
            if bool(padding_mask.all()):
                padding_mask = None
        if "*" in self.config.hybrid_override_pattern and causal_mask is None and context is None:
            same_document = None
            if seq_idx is not None:

                def same_document(batch, head, query, key):
                    return seq_idx[batch, query] == seq_idx[batch, key]

            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                and_mask_function=same_document,
            )
        all_hidden = []
        for layer in self.layers:
            if output_hidden_states:
                all_hidden.append(hidden)
            hidden = layer(
                hidden,
                cache=past_key_values,
                padding_mask=padding_mask,
                attention_mask=causal_mask,
                seq_idx=seq_idx,
                context=context,
                **kwargs,
            )
        hidden = self.norm_f(hidden.to(self.norm_f.weight.dtype))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden, hidden) if output_hidden_states else None,
        )


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
