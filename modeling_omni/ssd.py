"""Mamba-2's sequence operations: the selective scan in chunks (Dao and Gu, 2024, "state-space duality"), its backward
pass, one step of it, and the causal convolution in front of it.

The scan is a few matrix products per chunk of Q tokens, several chunks to a product (`chunks_at_once`), and one short
loop that carries the float32 state from chunk to chunk. What the heads of a group share is formed once per group:
C B^T, and the products with the state, which is kept as [N, heads x P] of a group for that. Everything is float32
(float64 for float64 inputs), whatever autocast says. Linear in S.

The backward pass is written by hand: it keeps the inputs and the state in front of every run of chunks, and forms the
rest again. Through autograd, the same scan keeps several [Q, Q] matrices per head and chunk.

On a GPU the kernels of `mamba_ssm` and `causal_conv1d` take over, see `cuda_kernels`; that path has never been run.

Shape legend: B batch, S tokens, H Mamba heads, P head size, G groups, R heads of a group (H = G R), N state size,
Q tokens of a chunk, c chunks at once; C conv channels, K taps.
"""

import importlib.util
import logging

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

# Tokens per chunk. Results depend neither on it nor on the config's `chunk_size`; 32 to 64 measured fastest on CPUs.
SCAN_CHUNK = 64
# Elements of the largest buffer of the scan: small enough for a CPU's cache, large enough that Python costs little.
SCAN_ELEMENTS = 2**20
# Elements of a block of the convolution, which goes through the taps in the cache.
CONV_ELEMENTS = 2**19
# In training a state is kept per run of chunks, so the runs are longer.
TRAINING_FACTOR = 4

_PACKAGES = ("mamba_ssm", "causal_conv1d")
_MISSING = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
_reported = set()


def cuda_kernels(kernels: str, x: torch.Tensor, package: str | None = None) -> bool:
    """Whether `x` goes through GPU kernels. `kernels` is `config.kernels`: "auto", "torch" or "cuda".

    For tensors on a GPU "auto" takes what is installed of mamba_ssm and causal_conv1d, and PyTorch's own grouped
    product and varlen attention; "cuda" insists on both packages; "torch" takes nothing. Tensors elsewhere always run
    on plain PyTorch. What is active is logged once. Never run on a GPU by this project.

    Args:
        package: the one that is asked for; None: what PyTorch brings itself.

    Raises:
        ImportError: "cuda", a tensor on a GPU, and a package is missing.
        ValueError: an unknown setting.
    """
    if kernels not in ("auto", "torch", "cuda"):
        raise ValueError(f"kernels is {kernels!r}; it must be 'auto', 'torch' or 'cuda'")
    device = x.device.type
    active = device == "cuda" and kernels != "torch"
    if active and kernels == "cuda" and _MISSING:
        raise ImportError(f"kernels='cuda' needs {', '.join(_MISSING)}: install them, or set kernels='auto'")
    if not torch.compiler.is_compiling() and (kernels, device) not in _reported:
        _reported.add((kernels, device))
        names = [name for name in _PACKAGES if name not in _MISSING] + ["grouped_mm, varlen attention"]
        names = ", ".join(names) if active else "plain PyTorch"
        logger.info("language model kernels: %s (kernels=%r, tensors on %s)", names, kernels, device)
    return active and package not in _MISSING


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will record what is done with these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- the scan ----


def ssd_scan(
    x_BSHP: torch.Tensor,
    dt_BSH: torch.Tensor,
    A_H: torch.Tensor,
    B_BSGN: torch.Tensor,
    C_BSGN: torch.Tensor,
    state_BHPN: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    D_H: torch.Tensor | None = None,
    chunk: int = SCAN_CHUNK,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2's selective scan: state <- exp(dt A) state + dt x B^T, y = C state + D x, for every token in order.

    Args:
        x_BSHP: inputs. dt_BSH: step sizes after softplus, not negative, float32. A_H: decay rates, negative, float32.
        B_BSGN, C_BSGN: input and output maps, shared by the heads of a group.
        state_BHPN: state before the first token, float32 (zeros if None); it belongs to the first token's document.
        seq_idx: [B, S] document number of every token; the state never crosses from one document to the next.
        D_H: skip weights (none if None).
        chunk: tokens per chunk; a matter of speed only.
        kernels: see `cuda_kernels`.

    Returns:
        y [B, S, H, P] float32 and the state after the last token [B, H, P, N] float32 (float64 if dt is).
    """
    if cuda_kernels(kernels, x_BSHP, "mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        documents = None if seq_idx is None else seq_idx.int()
        options = {"D": D_H, "initial_states": state_BHPN, "seq_idx": documents, "return_final_states": True}
        y, state = mamba_chunk_scan_combined(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, chunk_size=128, **options)
        return y.float(), state
    tensors = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, state_BHPN, D_H)
    if needs_grad(*tensors):
        return _SSDScan.apply(*tensors, seq_idx, chunk)
    return _scan(*tensors, seq_idx, chunk, SCAN_ELEMENTS)


def chunks_at_once(batch: int, heads: int, largest: int, elements: int) -> int:
    """How many chunks go into one product. largest: elements of the largest matrix of one head and chunk."""
    return max(1, elements // (batch * heads * largest))


def _runs(length: int, chunk: int, at_once: int) -> list[tuple[int, int, int]]:
    """Cuts a row into (start, stop, chunks) of equal chunks; the rest of the row is a chunk of its own."""
    whole, runs = length - length % chunk, []
    for start in range(0, whole, chunk * at_once):
        stop = min(start + chunk * at_once, whole)
        runs.append((start, stop, (stop - start) // chunk))
    return runs if whole == length else [*runs, (whole, length, 1)]


def _by_group(t_BSHX: torch.Tensor, chunks: int, groups: int) -> torch.Tensor:
    """A view [c, B, G, R, Q, X] of a run's [B, S, H, X]."""
    return t_BSHX.unflatten(1, (chunks, -1)).unflatten(3, (groups, -1)).permute(1, 0, 3, 4, 2, 5)


def _copy(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy in one pass, conversion included."""
    return torch.empty(view.shape, dtype=dtype, device=view.device).copy_(view)


def _product(view: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of `view` in scale's dtype, its rows multiplied by `scale`."""
    return torch.mul(view, scale[..., None], out=torch.empty(view.shape, dtype=scale.dtype, device=view.device))


class _Run:
    """What forward and backward pass both need of a run of chunks: its views, decays, C B^T and weighted inputs."""

    def __init__(self, x, dt, A, B, C, seq_idx, start, stop, chunks):
        part = slice(start, stop)
        groups = B.shape[2]
        f = dt.dtype
        self.chunks, self.groups, self.part = chunks, groups, part
        self.x = _by_group(x[:, part], chunks, groups)  # [c, B, G, R, Q, P], in x's dtype
        self.dt = _copy(_by_group(dt[:, part, :, None], chunks, groups).squeeze(-1), f)  # [c, B, G, R, Q]
        self.B, self.C = (_copy(_by_group(t[:, part], chunks, groups).squeeze(3), f) for t in (B, C))  # [c, B, G, Q, N]
        # log decay from the chunk's start through each token
        self.total = (self.dt * A.unflatten(0, (groups, -1))[..., None]).cumsum(-1)
        last = self.total[..., -1:]
        self.from_start = self.total.exp()  # decay of the incoming state up to each token
        self.to_end = (last - self.total).exp()  # decay of each token's share up to the chunk's end
        self.kept = last.exp()[..., 0]  # [c, B, G, R] decay of the incoming state over the chunk
        self.CB = self.C @ self.B.transpose(-1, -2)
        self.allowed = torch.ones(self.CB.shape[-2:], dtype=torch.bool, device=x.device).tril_()
        if seq_idx is not None:
            documents = seq_idx[:, part].unflatten(1, (chunks, -1)).transpose(0, 1)  # [c, B, Q]
            ends = documents[..., -1]
            previous = torch.cat([seq_idx[None, :, max(start - 1, 0)], ends[:-1]])  # whose the incoming state is
            self.allowed = ((documents[..., :, None] == documents[..., None, :]) & self.allowed)[:, :, None]
            self.from_start = self.from_start * (documents == previous[..., None])[:, :, None, None]
            self.to_end = self.to_end * (documents == ends[..., None])[:, :, None, None]
            self.kept = self.kept * (ends == previous)[:, :, None, None]
        self.CB.mul_(self.allowed)

    def inputs(self) -> torch.Tensor:
        """dt x, [c, B, G, R, Q, P]."""
        return _product(self.x, self.dt)

    def decay(self) -> torch.Tensor:
        """[c, B, G, R, Q, Q]: decay from token to token; 1 where the second is later, to be masked by C B^T."""
        # decays never exceed 1; `clamp` keeps what C B^T masks from overflowing
        return (self.total[..., :, None] - self.total[..., None, :]).clamp_(max=0).exp_()

    def by_token(self, view: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """[c, B, G, R, Q, P] and a factor of each row -> [c, B, G, Q, R P], to be multiplied by all heads at once."""
        return _product(view.transpose(3, 4), scale.transpose(3, 4)).flatten(4)

    def incoming(self, state: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
        """The states in front of every chunk of the run and behind the last, [c + 1, B, G, N, R P]."""
        new = self.B.transpose(-1, -2) @ weighted
        states = new.new_empty(self.chunks + 1, *new.shape[1:])
        states[0] = state
        kept = self.kept.repeat_interleave(new.shape[-1] // self.kept.shape[-1], -1)[..., None, :]
        for number in range(self.chunks):
            torch.addcmul(new[number], states[number], kept[number], out=states[number + 1])
        return states


def _per_head(values_H: torch.Tensor, dtype: torch.dtype, groups: int) -> torch.Tensor:
    """[H] -> [G, R, 1, 1]."""
    return values_H.to(dtype).unflatten(0, (groups, -1))[..., None, None]


def _by_rows(state_BHPN: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, H, P, N] -> [B, G, N, R P]."""
    return state_BHPN.unflatten(1, (groups, -1)).flatten(2, 3).transpose(2, 3)


def _by_heads(state_BGNX: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, G, N, R P] -> [B, H, P, N], contiguous."""
    return state_BGNX.transpose(2, 3).unflatten(2, (heads // state_BGNX.shape[1], -1)).flatten(1, 2).contiguous()


def _scan(x, dt, A, B, C, state, D, seq_idx, chunk, elements, fronts=None):
    """-> y and the last state. The state in front of every run [B, G, N, R P] is appended to `fronts`."""
    batch, length, heads, size = x.shape
    groups, states = B.shape[2], B.shape[3]
    y = dt.new_empty(x.shape)
    if state is None:
        state = dt.new_zeros(batch, groups, states, heads // groups * size)
    else:
        state = _by_rows(state.to(dt.dtype), groups)
    at_once = chunks_at_once(batch, heads, max(chunk * chunk, size * states), elements)
    D = None if D is None else _per_head(D, dt.dtype, groups)
    with torch.autocast(x.device.type, enabled=False):
        for start, stop, chunks in _runs(length, chunk, at_once):
            if fronts is not None:
                fronts.append(state.clone())  # by itself it is part of a larger tensor
            run = _Run(x, dt, A, B, C, seq_idx, start, stop, chunks)
            incoming = run.incoming(state, run.by_token(run.x, run.dt * run.to_end))
            state = incoming[-1]
            output = _by_group(y[:, run.part], chunks, groups)
            output.copy_(run.decay().mul_(run.CB[:, :, :, None]) @ run.inputs())
            from_state = (run.C @ incoming[:-1]).unflatten(-1, (-1, size)).transpose(3, 4)
            output.addcmul_(from_state, run.from_start[..., None])
            if D is not None:
                output.addcmul_(run.x.to(dt.dtype), D)
    return y, _by_heads(state, heads)


class _SSDScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, state, D, seq_idx, chunk):
        ctx.chunk, ctx.elements = chunk, SCAN_ELEMENTS * TRAINING_FACTOR
        ctx.has_state, fronts = state is not None, []
        y, last = _scan(x, dt, A, B, C, state, D, seq_idx, chunk, ctx.elements, fronts)
        ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, *fronts)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, seq_idx, *fronts = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return _scan_backward(x, dt, A, B, C, D, seq_idx, fronts, dy, dlast, ctx.chunk, ctx.elements, ctx.has_state)


def _scan_backward(x, dt, A, B, C, D, seq_idx, fronts, dy, dlast, chunk, elements, has_state):
    """Gradients of x, dt, A, B, C, the first state and D, in the inputs' dtypes; run by run from the row's end.

    In a chunk, with u = dt x, L_ij the decay from j to i, l the log decay through a token, S the incoming state, e, m
    the decays from the start and to the end (`from_start`, `to_end`) and dS' the gradient of the outgoing state:
        y_i = sum_j (C_i.B_j) L_ij u_j + e_i S C_i       S' = kept S + sum_j m_j u_j B_j^T
        du_j = sum_i (C_i.B_j) L_ij dy_i + m_j dS' B_j   d(C_i.B_j) = sum over heads of L_ij dy_i.u_j
        dl: every decay is exp of a difference of two l, so each dL_ij L_ij is added to dl_i and taken from dl_j.
    """
    batch, length, heads, size = x.shape
    groups = B.shape[2]
    at_once = chunks_at_once(batch, heads, max(chunk * chunk, size * B.shape[3]), elements)
    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    ddt = torch.empty_like(dt, memory_format=torch.contiguous_format)
    dA = dt.new_zeros(A.shape)
    dstate = _by_rows(dlast.to(dt.dtype), groups)
    for (start, stop, chunks), state in zip(reversed(_runs(length, chunk, at_once)), reversed(fronts)):
        run = _Run(x, dt, A, B, C, seq_idx, start, stop, chunks)
        grad = _copy(_by_group(dy[:, run.part], chunks, groups), dt.dtype)  # [c, B, G, R, Q, P]
        weighted = run.by_token(run.x, run.dt * run.to_end)  # [c, B, G, Q, R P]
        weighted_grad = run.by_token(grad, run.from_start)
        incoming = run.incoming(state, weighted)[:-1]
        outgoing = torch.empty_like(incoming)  # gradients of the states behind each chunk
        from_chunk = run.C.transpose(-1, -2) @ weighted_grad
        kept = run.kept.repeat_interleave(size, -1)[..., None, :]
        for number in reversed(range(chunks)):
            outgoing[number] = dstate
            dstate = torch.addcmul(from_chunk[number], dstate, kept[number])

        inputs, decay = run.inputs(), run.decay()
        CB = run.CB[:, :, :, None]
        dinputs = (decay * CB).transpose(-1, -2) @ grad
        dmixing = (grad @ inputs.transpose(-1, -2)).mul_(decay)
        dCB = dmixing.sum(3).mul_(run.allowed)
        # [c, B, G, R, Q]: first of decays inside the chunk. A token's decay to itself is 1: left out, not cancelled
        dmixing.mul_(CB).diagonal(dim1=-2, dim2=-1).zero_()
        dtotal = dmixing.sum(-1).sub_(dmixing.sum(-2))
        del decay, dmixing
        # ... then of those from the incoming state and to the outgoing one
        from_state = (run.C @ incoming).mul_(weighted_grad).unflatten(-1, (-1, size)).sum(-1).transpose(3, 4)
        to_state = (run.B @ outgoing).unflatten(-1, (-1, size)).transpose(3, 4)
        to_state = to_state * run.to_end[..., None]
        per_token = (to_state * inputs).sum(-1)
        per_token[..., -1] = 0
        through_state = per_token.sum(-1)
        through_state += (incoming * outgoing).unflatten(-1, (-1, size)).sum((3, 5)) * run.kept
        dinputs += to_state
        per_dt = (dinputs * run.x).sum(-1)
        dtotal += from_state
        dtotal -= per_token
        dtotal[..., -1] += through_state
        dlog = dtotal.flip(-1).cumsum(-1).flip(-1)  # a token's log decay is part of all later totals of the chunk

        rates = A.unflatten(0, (groups, -1))[..., None]
        _by_group(ddt[:, run.part, :, None], chunks, groups).squeeze(-1).copy_(per_dt.addcmul_(dlog, rates))
        dA += (dlog * run.dt).sum((0, 1, 4)).flatten()
        dinputs *= run.dt[..., None]
        if D is not None:
            dinputs.addcmul_(grad, _per_head(D, dt.dtype, groups))
        _by_group(dx[:, run.part], chunks, groups).copy_(dinputs)
        dC_run = (dCB @ run.B).add_(weighted_grad @ incoming.transpose(-1, -2))
        dB_run = (dCB.transpose(-1, -2) @ run.C).add_(weighted @ outgoing.transpose(-1, -2))
        for full, own in ((dB, dB_run), (dC, dC_run)):
            _by_group(full[:, run.part], chunks, groups).squeeze(3).copy_(own)
    dD = None if D is None else (dy * x).sum((0, 1, 3)).to(D.dtype)
    dstate = _by_heads(dstate, heads) if has_state else None
    return dx, ddt, dA.to(A.dtype), dB, dC, dstate, dD, None, None


def ssd_step(
    x_BHP: torch.Tensor,
    dt_BH: torch.Tensor,
    A_H: torch.Tensor,
    B_BGN: torch.Tensor,
    C_BGN: torch.Tensor,
    state_BHPN: torch.Tensor,
    D_H: torch.Tensor | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """One token of `ssd_scan`; `state_BHPN` (contiguous, float32) is updated in place. Returns y [B, H, P] float32."""
    if cuda_kernels(kernels, x_BHP, "mamba_ssm"):
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        _, _, size, states = state_BHPN.shape
        dt, A = dt_BH[..., None].expand(-1, -1, size), A_H[:, None, None].expand(-1, size, states)
        D = None if D_H is None else D_H.float()[:, None].expand(-1, size)
        bias = torch.zeros_like(A_H)[:, None].expand(-1, size)  # its shortcut for strides of 0 reads it unasked
        return selective_state_update(state_BHPN, x_BHP.float(), dt, A, B_BGN.float(), C_BGN.float(), D, dt_bias=bias)
    groups = B_BGN.shape[1]
    x = x_BHP.float()
    B, C = B_BGN.to(state_BHPN.dtype), C_BGN.float()
    state = state_BHPN.unflatten(1, (groups, -1))  # [B, G, R, P, N]
    state_BHPN.mul_((dt_BH * A_H).exp()[..., None, None])
    state.addcmul_((x * dt_BH[..., None]).unflatten(1, (groups, -1))[..., None], B[:, :, None, None])
    if torch.compiler.is_compiling():  # one pass over the state: decay, addition and reduction fuse
        y = (state.float() * C[:, :, None, None]).sum(-1).flatten(1, 2)
    else:
        y = (state.float().flatten(2, 3) @ C[..., None]).reshape(x.shape)
    return y if D_H is None else torch.addcmul(y, x, D_H.float()[:, None])


def ssd_advance(
    x_BSHP: torch.Tensor, dt_BSH: torch.Tensor, A_H: torch.Tensor, B_BSGN: torch.Tensor, state_BHPN: torch.Tensor
) -> None:
    """The state that `ssd_scan` leaves behind the tokens, without its outputs; `state_BHPN` is updated in place.

    One product per group, for a handful of tokens whose outputs are known already.
    """
    total_BSH = (dt_BSH * A_H).cumsum(1)  # log decay through each token
    weight_BSH = (total_BSH[:, -1:] - total_BSH).exp() * dt_BSH
    inputs = (x_BSHP.float() * weight_BSH[..., None]).unflatten(2, (B_BSGN.shape[2], -1)).flatten(3)  # [B, S, G, R P]
    new = inputs.permute(0, 2, 3, 1) @ B_BSGN.float().transpose(1, 2)  # [B, G, R P, N]
    state_BHPN.mul_(total_BSH[:, -1].exp()[..., None, None]).add_(new.reshape(state_BHPN.shape))


# ---- the convolution ----


def causal_conv1d(
    x_BSC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None,
    seq_idx: torch.Tensor | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """Depthwise causal convolution with SiLU, as a sum of shifted products in float32 (no transposes, no padding).

    `x_BSC` may carry history in front; with `seq_idx` [B, S] a tap never reaches into another document.
    Returns [B, S, C]. In training only the inputs are kept.
    """
    if cuda_kernels(kernels, x_BSC, "causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        documents = None if seq_idx is None else seq_idx.int()
        weight, bias = weight_CK.to(x_BSC.dtype), None if bias_C is None else bias_C.to(x_BSC.dtype)
        channels_last = x_BSC.contiguous().transpose(1, 2)
        return causal_conv1d_fn(channels_last, weight, bias, seq_idx=documents, activation="silu").transpose(1, 2)
    tensors = (x_BSC, weight_CK, bias_C)
    if needs_grad(*tensors):
        return _CausalConv1d.apply(*tensors, seq_idx)
    return _convolved(*tensors, seq_idx)


def _conv_blocks(x: torch.Tensor) -> list[tuple[int, int]]:
    """(start, stop) of runs of tokens that stay in a CPU's cache through all taps."""
    length = x.shape[1]
    elements = CONV_ELEMENTS if x.device.type == "cpu" else length * x.shape[0] * x.shape[2]
    rows = max(1, elements // (x.shape[0] * x.shape[2]))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def _wide(weight, bias, x):
    """Weights [K, C] and bias in float32 (float64 for float64 inputs), in which the sums are formed."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return weight.t().to(dtype).contiguous(), None if bias is None else bias.to(dtype)


def _shifted(block, seq_idx, back, first, start, stop):
    """Tokens start - back .. stop - back of a row whose tokens from `first` on are `block`; 0 across documents."""
    earlier = block[:, start - back - first : stop - back - first]
    if seq_idx is None or back == 0:
        return earlier
    return earlier * (seq_idx[:, start:stop] == seq_idx[:, start - back : stop - back])[..., None]


def _convolve(x, weight_KC, bias, seq_idx, start, stop):
    """The sums of tokens start..stop, before SiLU, and the tokens they read, from `first` on."""
    kernel = len(weight_KC)
    first = max(0, start - kernel + 1)
    block = x[:, first:stop].to(weight_KC.dtype)
    own = block[:, start - first :]
    y = own * weight_KC[-1] if bias is None else torch.addcmul(bias, own, weight_KC[-1])
    for back in range(1, kernel):
        begin = max(start, back)
        if begin < stop:
            y[:, begin - start :].addcmul_(_shifted(block, seq_idx, back, first, begin, stop), weight_KC[-1 - back])
    return y, block, first


def _convolved(x, weight, bias, seq_idx):
    y, (weight, bias) = torch.empty(x.shape, dtype=x.dtype, device=x.device), _wide(weight, bias, x)
    for start, stop in _conv_blocks(x):
        y[:, start:stop] = F.silu(_convolve(x, weight, bias, seq_idx, start, stop)[0], inplace=True)
    return y


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, seq_idx):
        ctx.save_for_backward(x, weight, bias, seq_idx)
        return _convolved(x, weight, bias, seq_idx)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias, seq_idx = ctx.saved_tensors
        wide, wide_bias = _wide(weight, bias, x)
        dx, dweight = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(wide)
        dbias = None if bias is None else torch.zeros_like(wide_bias)
        length, kernel = x.shape[1], len(wide)
        for start, stop in _conv_blocks(x):
            end = min(stop + kernel - 1, length)  # the last outputs that these inputs reach
            y, block, first = _convolve(x, wide, wide_bias, seq_idx, start, end)
            dy = torch.ops.aten.silu_backward(grad[:, start:end].to(wide.dtype), y)
            own = dy[:, : stop - start]
            if dbias is not None:
                dbias += own.sum((0, 1))
            for back in range(kernel):
                begin = max(start, back)
                if begin < stop:
                    read = _shifted(block, seq_idx, back, first, begin, stop)
                    dweight[-1 - back] += (own[:, begin - start :] * read).sum((0, 1))
            dblock = own * wide[-1]
            for back in range(1, kernel):
                reach = min(stop, length - back)  # inputs from here on have no output `back` tokens later
                if reach > start:
                    later = dy[:, back : reach - start + back]
                    if seq_idx is not None:
                        same = seq_idx[:, start:reach] == seq_idx[:, start + back : reach + back]
                        later = later * same[..., None]
                    dblock[:, : reach - start].addcmul_(later, wide[-1 - back])
            dx[:, start:stop] = dblock
        dbias = None if bias is None else dbias.to(bias.dtype)
        return dx, dweight.t().to(weight.dtype), dbias, None


def causal_conv1d_step(window_BCK: torch.Tensor, weight_CK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    """`causal_conv1d` for one token: its last K inputs, itself the last of them -> [B, C]."""
    y = (window_BCK * weight_CK).sum(-1)
    return F.silu(y if bias_C is None else y + bias_C)


__all__ = ["SCAN_CHUNK", "causal_conv1d", "causal_conv1d_step", "cuda_kernels", "ssd_advance", "ssd_scan", "ssd_step"]
