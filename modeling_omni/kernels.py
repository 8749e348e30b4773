"""The language model's parts that have a fast form of their own: norms, relu^2, routed experts, attention.

Each stands for a few plain lines of mathematics, given in its docstring and tested against them. Where several forms
exist, tensors choose: one token per row or many, float32 or bfloat16, CPU or GPU, inference or training. Training
forms keep inputs only and form the rest again in the backward pass. Mamba-2's operations stand in `ssd.py`.

Shape legend: B batch, S tokens, L keys, d head size; T tokens of all rows, D their width; E experts, K experts per
token, I expert width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from .ssd import cuda_kernels, needs_grad

# Tokens up to which compiled code multiplies every token with its own gathered experts, never forming the gather.
GATHER_TOKENS = 16
# Tokens up to which compiled code on a CPU multiplies a matrix with them in one loop over it.
STREAM_TOKENS = 4
# On a CPU a bfloat16 product of a new shape is compiled first, which takes longer than many a product: experts' rows
# come in multiples of this.
EVEN_ROWS = 16
# Elements of a block of rows where norms run block by block.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
# Queries of a block of causal attention on a CPU, and the most scores that exist at a time.
BLOCK_ROWS = 256
BLOCK_SCORES = 2**23


# ---- elementwise ----


def _blocks(tensors: tuple) -> list[tuple]:
    """Cuts tensors [..., D] into blocks of rows; vectors [D] and None are in every block as they are."""
    rows = [t.flatten(0, -2) if t is not None and t.dim() > 1 else t for t in tensors]
    count, width = next(t.shape for t in rows if t is not None and t.dim() == 2)
    size = max(1, BLOCK_ELEMENTS.get(tensors[0].device.type, BLOCK_ELEMENTS["cpu"]) // width)
    cuts = [t.split(size) if t is not None and t.dim() == 2 else [t] * max(1, -(-count // size)) for t in rows]
    return list(zip(*cuts))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return recomputed(function, *inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        # what all rows share is summed over the blocks, in float32
        wide = [t if t is None or t.dim() > 1 else t.to(torch.promote_types(t.dtype, torch.float32)) for t in inputs]
        grads = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) if n else None for t, n in zip(wide, needed)]
        for (grad_block, *block), (_, *targets) in zip(_blocks((grad, *wide)), _blocks((grad, *grads))):
            block = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(block, needed)]
            with torch.enable_grad():
                output = ctx.function(*block)
            own = torch.autograd.grad(output, [t for t, n in zip(block, needed) if n], grad_block)
            for target, part in zip([t for t in targets if t is not None], own):
                target.add_(part)
        return None, *(g if g is None else g.to(t.dtype) for g, t in zip(grads, inputs))


def recomputed(function: Callable, *inputs: torch.Tensor | None) -> torch.Tensor:
    """`function(*inputs)`, row by row the same; for the backward pass only the inputs are kept.

    Many rows run in blocks, forward and backward: what exists between inputs and outputs is small, and in the cache.

    Args:
        function: cheap, without random numbers, of one dtype and shape out: [rows, D] for the first input's.
        inputs: tensors [..., D], and vectors [D] that all rows share.
    """
    if needs_grad(*inputs):
        return _Recomputed.apply(function, *inputs)
    if torch.compiler.is_compiling() or len(blocks := _blocks(inputs)) == 1:
        return function(*inputs)
    return torch.cat([function(*block) for block in blocks]).view(inputs[0].shape)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, in float32, in x's dtype. [..., D] -> [..., D]."""
    return recomputed(lambda x, weight: F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype), x, weight)


def gated_group_rms_norm(
    y: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group_size: int, eps: float
) -> torch.Tensor:
    """`weight * RMSNorm(y * silu(gate))` over groups of channels, in float32, in gate's dtype. All [..., D]."""

    def norm(y, gate, weight):
        groups = (y.float() * F.silu(gate.float())).unflatten(-1, (-1, group_size))
        return (F.rms_norm(groups, (group_size,), eps=eps).flatten(-2) * weight.float()).to(gate.dtype)

    return recomputed(norm, y, gate, weight)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = F.relu(x).square_()
        ctx.save_for_backward(y)  # the layer behind keeps it as well, so this costs nothing
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return y.sqrt().mul_(grad).mul_(2)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU, the activation of the experts, the MLP layers and both projectors."""
    return _Relu2.apply(x) if needs_grad(x) else F.relu(x).square_()


# ---- linear layers ----


def _in_memory(x: torch.Tensor) -> torch.Tensor:
    """x, of which the compiler would otherwise compute norm, activation or conversion again for every row of weights
    that it is multiplied with: a strided view is one of something that stands in memory."""
    return x.as_strided(x.shape, x.stride())


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`. [..., in] -> [..., out].

    Few tokens in compiled code on a CPU are multiplications and sums: the compiler makes one loop of them, which
    streams the weights about twice as fast as the library's product.
    """
    few = torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() <= STREAM_TOKENS * x.shape[-1]
    if not few or type(layer) is not nn.Linear:  # adapters and quantised layers have a way of their own
        return layer(x)
    weight = layer.weight.float()
    y = torch.stack([(weight * row).sum(-1) for row in _in_memory(x.flatten(0, -2).float())])
    if layer.bias is not None:
        y = y + layer.bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], -1)


# ---- routed experts ----


def routed_experts(
    hidden_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up_EID: torch.Tensor,
    down_EDI: torch.Tensor,
    kernels: str = "auto",
) -> torch.Tensor:
    """sum over k of weights[t, k] * down[e] relu2(up[e] hidden[t]) with e = experts[t, k]: [T, D] in hidden's dtype.

    Rows sorted by expert, one pair of products per chosen expert, all in preallocated memory. Compiled code with few
    tokens (decode) instead multiplies and sums with gathered weights, which the compiler fuses: the weights are read
    once and never copied.
    """
    if torch.is_autocast_enabled(hidden_TD.device.type):  # out= products are out of autocast's sight
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        hidden_TD, up_EID, down_EDI = hidden_TD.to(dtype), up_EID.to(dtype), down_EDI.to(dtype)
    weights_TK = weights_TK.to(hidden_TD.dtype)
    if cuda_kernels(kernels, hidden_TD) and hidden_TD.element_size() == 2:
        return experts_grouped(hidden_TD, experts_TK, weights_TK, up_EID, down_EDI)
    if torch.compiler.is_compiling() and len(hidden_TD) <= GATHER_TOKENS:
        return experts_gathered(hidden_TD, experts_TK, weights_TK, up_EID, down_EDI)
    return experts_sorted(hidden_TD, experts_TK, weights_TK, up_EID, down_EDI)


@torch.compiler.disable  # how many rows an expert gets is data: compiled code would fit one step, and be made anew
def experts_sorted(hidden_TD, experts_TK, weights_TK, up_EID, down_EDI):
    """`routed_experts` as one pair of products per chosen expert."""
    if needs_grad(hidden_TD, weights_TK, up_EID, down_EDI):
        return _RoutedExperts.apply(hidden_TD, experts_TK, weights_TK, up_EID, down_EDI)
    even = hidden_TD.device.type == "cpu" and hidden_TD.dtype == torch.bfloat16
    tokens, places, spans = sort_by_expert(experts_TK, len(up_EID), EVEN_ROWS if even else 1)
    rows = _run_experts(hidden_TD.index_select(0, tokens), spans, up_EID, down_EDI)
    return F.embedding_bag(places, rows, per_sample_weights=weights_TK, mode="sum")


def experts_gathered(hidden_TD, experts_TK, weights_TK, up_EID, down_EDI):
    """`routed_experts` as multiplications and sums over gathered weights, for the compiler."""
    dtype, wide = hidden_TD.dtype, torch.promote_types(hidden_TD.dtype, torch.float32)
    hidden_TD = _in_memory(hidden_TD.to(wide))
    inner_TKI = (up_EID[experts_TK].to(wide) * hidden_TD[:, None, None]).sum(-1).to(dtype)
    inner_TKI = _in_memory(relu2(inner_TKI).to(wide))
    outputs_TKD = (down_EDI[experts_TK].to(wide) * inner_TKI[:, :, None]).sum(-1).to(dtype)
    return (outputs_TKD * weights_TK[..., None]).sum(1)


def experts_grouped(hidden_TD, experts_TK, weights_TK, up_EID, down_EDI):
    """`routed_experts` through PyTorch's grouped product: nothing goes back to the host. For GPUs; tested on CPUs."""
    flat = experts_TK.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(flat[order], torch.arange(len(up_EID), device=flat.device), right=True).int()
    rows = hidden_TD[order // experts_TK.shape[1]]
    inner = relu2(F.grouped_mm(rows, up_EID.transpose(1, 2), offs=ends))
    outputs = F.grouped_mm(inner, down_EDI.transpose(1, 2), offs=ends)
    return (outputs[places].view(*experts_TK.shape, -1) * weights_TK[..., None]).sum(1)


def sort_by_expert(experts_TK: torch.Tensor, number: int, even: int = 1) -> tuple[torch.Tensor, torch.Tensor, list]:
    """-> token of every sorted row [rows]; row of every choice [T, K]; (expert, start, stop) of every chosen expert.

    even: experts of more than 4 `even` rows get a multiple of it, filled up with rows of token 0 that nothing reads.
    """
    tokens, per_token = experts_TK.shape
    if tokens == 1:
        chosen = experts_TK[0].tolist()
        spans = [(expert, row, row + 1) for row, expert in enumerate(chosen)]
        return experts_TK.new_zeros(per_token), torch.arange(per_token, device=experts_TK.device)[None], spans
    flat = experts_TK.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=number)
    sizes = torch.where(counts > 4 * even, (counts + even - 1) // even * even, counts)
    stops = sizes.cumsum(0)
    # a sorted row moves down by what the experts before its own were filled up with
    rows = torch.arange(len(order), device=order.device)
    rows += (stops - sizes - counts.cumsum(0) + counts).repeat_interleave(counts)
    places = torch.empty_like(order).scatter_(0, order, rows)
    spans, start = [], 0
    for expert, size in enumerate(sizes.tolist()):
        if size:
            spans.append((expert, start, start + size))
            start += size
    return order.new_zeros(start).scatter_(0, rows, order // per_token), places.view(tokens, per_token), spans


def _buffer(rows: torch.Tensor, spans: list, width: int) -> torch.Tensor:
    return rows.new_empty(max((stop - start for _, start, stop in spans), default=0), width)


def _run_experts(rows, spans, up, down):
    """Rows sorted by expert -> outputs, in the rows' own memory."""
    inner = _buffer(rows, spans, up.shape[1])
    for expert, start, stop in spans:
        part = rows[start:stop]
        hidden = torch.mm(part, up[expert].t(), out=inner[: stop - start])
        torch.mm(hidden.relu_().square_(), down[expert].t(), out=part)
    return rows


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, experts, weights, up, down):
        tokens, places, ctx.spans = sort_by_expert(experts, len(up))
        ctx.save_for_backward(hidden, tokens, places, weights, up, down)
        rows = _run_experts(hidden.index_select(0, tokens), ctx.spans, up, down)
        return F.embedding_bag(places, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, tokens, places, weights, up, down = ctx.saved_tensors
        needs_hidden, _, needs_weights, needs_up, needs_down = ctx.needs_input_grad
        spans = ctx.spans
        rows, grad_rows = hidden.index_select(0, tokens), grad.index_select(0, tokens)
        row_weights = rows.new_empty(len(rows), 1)
        row_weights[places.flatten(), 0] = weights.flatten()
        grad_up, grad_down = (torch.empty_like(t) if n else None for t, n in ((up, needs_up), (down, needs_down)))
        grad_weights = torch.empty_like(row_weights)
        inner, grad_inner = (_buffer(rows, spans, up.shape[1]) for _ in range(2))
        for expert, start, stop in spans:
            part, grad_part, scale = rows[start:stop], grad_rows[start:stop], row_weights[start:stop]
            root = torch.mm(part, up[expert].t(), out=inner[: stop - start]).relu_()
            activation = root.square()
            back = torch.mm(grad_part, down[expert], out=grad_inner[: stop - start])
            if needs_weights:
                torch.sum(back * activation, 1, keepdim=True, out=grad_weights[start:stop])
            if needs_down:
                torch.mm(grad_part.t(), activation.mul_(scale), out=grad_down[expert])
            back.mul_(root).mul_(scale).mul_(2)
            if needs_up:
                torch.mm(back.t(), part, out=grad_up[expert])
            if needs_hidden:
                torch.mm(back, up[expert], out=grad_part)  # in place: this part of it is no longer read
        chosen = {expert for expert, _, _ in spans}
        for parameter_grad in (grad_up, grad_down):
            if parameter_grad is not None:
                for expert in range(len(up)):
                    if expert not in chosen:
                        parameter_grad[expert].zero_()
        grad_hidden = F.embedding_bag(places, grad_rows, mode="sum") if needs_hidden else None
        grad_weights = grad_weights[places, 0] if needs_weights else None
        return grad_hidden, None, grad_weights, grad_up, grad_down


# ---- attention ----


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    documents: list[list[int]] | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """softmax(query key^T / sqrt(d)) value, the query heads of one KV head sharing it.

    Args:
        query: [B, heads, S, d]; key, value: [B, KV heads, L, d], L >= S.
        mask: [B or 1, 1, S, L], bool and True where a key is read, or to be added to the scores. None: the queries are
            the last S of the L tokens and read everything up to themselves.
        documents: for packed rows, the lengths of the documents of every row: each then sees only itself, and runs on
            its own, so that no mask [S, S] exists.
        kernels: unless "torch", packed rows in 16 bits on a GPU run as one varlen call (never run here).

    Returns:
        [B, S, heads, d].
    """
    if documents is not None:
        if cuda_kernels(kernels, query) and not dropout and query.element_size() == 2:
            return _attend_varlen(query, key, value, documents)
        return _attend_documents(query, key, value, dropout, documents)
    length, keys = query.shape[2], key.shape[2]
    shared = mask is None or mask.shape[1] == 1
    if length == 1 and shared and not dropout and not needs_grad(query, key, value):
        return _attend_one(query, key, value, mask)
    if mask is None and query.device.type == "cpu" and not dropout and not needs_grad(query, key, value):
        if query.dtype == torch.bfloat16:
            return _attend_blocks(query, key, value)
        if 1 < length < keys:
            return _attend_behind(query, key, value)
    if mask is None and 1 < length < keys:
        mask = causal_lower_right(length, keys)
    output = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None and length > 1, enable_gqa=True
    )
    return output.transpose(1, 2)


def _attend_one(query, key, value, mask):
    """One query per row: the heads of a KV head are the rows of one product with it."""
    folded = query.reshape(key.shape[0], key.shape[1], -1, key.shape[3])
    scores = (folded @ key.transpose(2, 3)).float() * key.shape[3] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1).to(value.dtype)
    return (weights @ value).view(query.shape[0], 1, query.shape[1], -1)


def _attend_behind(query, key, value):
    """Queries behind a cache, on a CPU, in two calls of the fused kernel and without a mask: all earlier keys, for
    which a KV head's query heads are the rows of one, and the queries' own triangle; joined by the weights' sums."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # -> output, log of the sum of exp(scores)
    past = key.shape[2] - query.shape[2]
    folded = query.reshape(*key.shape[:2], -1, key.shape[3])
    earlier, earlier_sum = attend(folded, key[:, :, :past], value[:, :, :past])
    groups = query.shape[1] // key.shape[1]
    own_keys, own_values = (t[:, :, past:].repeat_interleave(groups, 1) for t in (key, value))
    own, own_sum = attend(query, own_keys, own_values, is_causal=True)
    share = torch.sigmoid(own_sum - earlier_sum.reshape(own_sum.shape))[..., None].to(own.dtype)
    return torch.lerp(earlier.view(query.shape), own, share).transpose(1, 2)


def _attend_blocks(query, key, value):
    """Blocks of bfloat16 queries against the keys up to them, on a CPU, without a mask of all keys.

    Plain products, a KV head's query heads folded into rows: faster than the fused kernel, which gains nothing from
    bfloat16.
    """
    batch, heads, length, size = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    folded = heads // kv_heads
    output = query.new_empty(batch, length, heads, size)
    start = 0
    while start < length:
        end = keys - length + min(start + BLOCK_ROWS, length)
        stop = min(start + max(1, min(BLOCK_ROWS, BLOCK_SCORES // (batch * kv_heads * folded * end))), length)
        past, end = keys - length + start, keys - length + stop
        # a block sees all keys in front of it, and the triangle of its own
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu_(1)
        rows = (query[:, :, start:stop] * size**-0.5).reshape(batch, kv_heads, folded * (stop - start), size)
        scores = rows @ key[:, :, :end].transpose(2, 3)
        scores.unflatten(2, (folded, -1))[..., past:].masked_fill_(future, -torch.inf)
        # float32 inside: softmax rounds only its result
        part = (scores.softmax(-1) @ value[:, :, :end]).view(batch, heads, stop - start, size)
        output[:, start:stop] = part.transpose(1, 2)
        start = stop
    return output


def _attend_documents(query, key, value, dropout, documents):
    rows = []
    for row, lengths in enumerate(documents):
        parts = zip(*(t[row : row + 1].split(lengths, 2) for t in (query, key, value)))
        rows.append(torch.cat([causal_attention(*part, dropout=dropout) for part in parts], 1))
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _attend_varlen(query, key, value, documents):
    """`_attend_documents` in one call of PyTorch's variable-length FlashAttention. Never run: it needs a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = torch.tensor([length for row in documents for length in row])
    ends = F.pad(lengths.cumsum(0), (1, 0)).to(query.device, torch.int32)
    longest = int(lengths.max())
    tokens = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))  # [B S, heads, d]
    causal = (-1, 0)  # all keys before, none behind
    output = varlen_attn(*tokens, ends, ends, longest, longest, window_size=causal, enable_gqa=True)
    return output.unflatten(0, (query.shape[0], -1))


__all__ = ["causal_attention", "gated_group_rms_norm", "linear", "recomputed", "relu2", "rms_norm", "routed_experts"]
