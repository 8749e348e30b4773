"""C-RADIO vision tower and pixel shuffle (paper section 2; tubelet embedder of section 4.6).

A pre-LN vision transformer over 16x16 patches at native aspect ratio. Images and video tubelets ("items") of any mix
of sizes go through packed into one row dimension: linears, norms and MLPs see the rows, attention stays inside an item.
Positions come from one learned square table by Cropped Position Embedding (CPE). Learned prefix tokens (class tokens
and registers) stand in front of each item and are dropped from the output. There is no final norm: the projector
behind the pixel shuffle normalises.

Parameter names below `OmniVisionModel` are the released names (`input_conditioner.*`, `patch_generator.*`, `blocks.*`).

Shape legend: P patches of all items; N = P + items * prefix tokens, the packed rows; D hidden size; H heads; K head
size; G side of the position table in patches; h, w grid of an item in patches; n items of one size;
L = prefix tokens + h * w.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_omni import OmniVisionConfig

# CPE in training (C-RADIO): each item sees a random window of the position table. Side lengths are fractions of the
# table's side; 0.1 is the smallest share of its area.
_CPE_MIN_SIDE = math.sqrt(0.1)
_CPE_LOG_ASPECT = math.log(4 / 3)


class PackedItems(NamedTuple):
    """How the packed rows of one pass split into items: `runs` of (n, L) in row order, bounds for varlen kernels."""

    runs: list[tuple[int, int]]
    cu_seqlens: torch.Tensor | None = None  # [items + 1] int32, only for flash attention


class InputConditioner(nn.Module):
    """CLIP mean and std of the pixels. The processor normalises; these are kept because the released file has them."""

    def __init__(self, config: OmniVisionConfig):
        super().__init__()
        for name in ("norm_mean", "norm_std"):
            value = torch.tensor(getattr(config, name), dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, value)


class PrefixTokens(nn.Module):
    """Learned class and register tokens in front of every item."""

    def __init__(self, config: OmniVisionConfig):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(config.num_prefix_tokens, config.hidden_size))

    def forward(self, num_items: int) -> torch.Tensor:
        return self.token.expand(num_items, -1, -1)


class PatchGenerator(nn.Module):
    """Embeds patches, adds their CPE positions and puts the prefix tokens in front of each item."""

    def __init__(self, config: OmniVisionConfig):
        super().__init__()
        if not config.separate_video_embedder:
            raise ValueError("vision_config.separate_video_embedder is false; only true is supported")
        self.grid = config.position_grid
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, config.hidden_size))
        self.cls_token = PrefixTokens(config)
        self.embedder = nn.Linear(config.patch_dim, config.hidden_size, bias=False)
        video_patch_dim = config.video_temporal_patch_size * config.patch_dim
        self.video_embedder = nn.Linear(video_patch_dim, config.hidden_size, bias=False)

    def forward(
        self, patches: torch.Tensor, sizes: list[tuple[int, int, int]], is_video: bool, random_windows: bool
    ) -> torch.Tensor:
        """[P, patch_dim] patches of runs of n items of one grid, `sizes` = [(n, h, w)] -> packed rows [N, D]."""
        # The residual stream has the dtype of the parameters, also when autocast lets the embedder compute in bf16.
        dtype = self.pos_embed.dtype
        embedder = self.video_embedder if is_video else self.embedder
        rows_PD = embedder(patches.to(dtype)).to(dtype)
        if random_windows:
            positions = [self.window_positions(n, h, w) for n, h, w in sizes]
        else:
            by_grid = self.grid_positions({(h, w) for _, h, w in sizes})
            positions = [by_grid[h, w] for _, h, w in sizes]
        packed = []
        parts = rows_PD.split([n * h * w for n, h, w in sizes])
        # one call, whatever the sizes: processes that share sharded weights must call alike
        prefixes = self.cls_token(sum(n for n, _, _ in sizes)).split([n for n, _, _ in sizes])  # [n, prefix, D] each
        for (n, h, w), rows, position, prefix in zip(sizes, parts, positions, prefixes, strict=True):
            packed.append(torch.cat([prefix, rows.view(n, h * w, -1) + position], dim=1).flatten(0, 1))
        return torch.cat(packed) if len(packed) > 1 else packed[0]

    def table(self) -> torch.Tensor:
        """The position table in float32, [1, D, G, G]."""
        return self.pos_embed.float().view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)

    def grid_positions(self, grids: set[tuple[int, int]]) -> dict[tuple[int, int], torch.Tensor]:
        """CPE of inference: the table resized to the square of the longer side, its top-left (h, w) cut out.

        Returns (h, w) -> [h * w, D] in the parameters' dtype.
        """
        table = self.table()
        by_side = {}
        for h, w in sorted(grids):
            by_side.setdefault(max(h, w), []).append((h, w))
        positions = {}
        for side, members in by_side.items():
            resized = table
            if side != self.grid:
                # align_corners=False as in the SFT code and in serving (NVlabs/RADIO itself has True)
                resized = F.interpolate(table, size=(side, side), mode="bilinear", align_corners=False)
            resized = resized[0].permute(1, 2, 0).to(self.pos_embed.dtype)  # [side, side, D]
            for h, w in members:
                positions[h, w] = resized[:h, :w].reshape(h * w, -1)
        return positions

    def window_positions(self, n: int, h: int, w: int) -> torch.Tensor:
        """CPE of training: a random window of the table per item, sampled on an (h, w) grid. Returns [n, h * w, D]."""
        if h == w == self.grid:
            return self.pos_embed
        device = self.pos_embed.device
        side, log_aspect = torch.rand(2, n, device=device)
        side = _CPE_MIN_SIDE + (1 - _CPE_MIN_SIDE) * side
        aspect = torch.exp((2 * log_aspect - 1) * _CPE_LOG_ASPECT)
        extent = torch.stack([side * aspect, side / aspect], dim=-1).clamp(max=1)  # [n, 2] (x, y) in table sides
        start = torch.rand(n, 2, device=device) * (1 - extent)
        x = start[:, :1] + extent[:, :1] * torch.linspace(0, 1, w, device=device)  # [n, w]
        y = start[:, 1:] + extent[:, 1:] * torch.linspace(0, 1, h, device=device)  # [n, h]
        points = torch.stack([x[:, None].expand(n, h, w), y[:, :, None].expand(n, h, w)], dim=-1) * 2 - 1
        # Items are stacked along the sampled rows, so that the table (and its gradient) is there once, not n times.
        sampled = F.grid_sample(self.table(), points.view(1, n * h, w, 2), mode="bilinear", align_corners=True)
        return sampled[0].permute(1, 2, 0).reshape(n, h * w, -1).to(self.pos_embed.dtype)


class VisionAttention(nn.Module):
    """Multi-head self-attention inside each item, fused qkv."""

    def __init__(self, config: OmniVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, rows_ND: torch.Tensor, items: PackedItems) -> torch.Tensor:
        qkv = self.qkv(rows_ND).unflatten(-1, (3, self.num_heads, -1))  # [N, 3, H, K]
        if items.cu_seqlens is not None:
            mixed = self.varlen_attention(qkv, items)
        else:
            eager = self.config._attn_implementation == "eager"
            attention = eager_attention if eager else F.scaled_dot_product_attention
            mixed = []
            # Items of one length are one dense batch: no mask, no padding.
            for (n, length), part in zip(items.runs, qkv.split([n * length for n, length in items.runs]), strict=True):
                q, k, v = part.unflatten(0, (n, length)).permute(2, 0, 3, 1, 4)  # each [n, H, L, K]
                mixed.append(attention(q, k, v).transpose(1, 2).reshape(n * length, -1))
            mixed = torch.cat(mixed) if len(mixed) > 1 else mixed[0]
        return self.proj(mixed)

    def varlen_attention(self, qkv: torch.Tensor, items: PackedItems) -> torch.Tensor:
        q, k, v = qkv.unbind(1)  # each [N, H, K]
        longest = max(length for _, length in items.runs)
        mixed = load_flash_varlen(self.config._attn_implementation)(
            q, k, v, items.cu_seqlens, items.cu_seqlens, longest, longest, causal=False
        )
        return (mixed[0] if isinstance(mixed, tuple) else mixed).flatten(1)  # some kernels also return log-sums


def eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain attention on [n, H, L, K], softmax in float32."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def load_flash_varlen(implementation: str):
    """The varlen function of a flash attention package or of a kernel that transformers has loaded."""
    try:
        functions, _ = lazy_import_flash_attention(implementation)
    except ImportError as error:
        raise ImportError(
            f"vision_config asks for attn_implementation={implementation!r}, which is not installed: "
            "install flash-attn (CUDA), or use attn_implementation='sdpa'"
        ) from error
    return functions[1]


class VisionMLP(nn.Module):
    def __init__(self, config: OmniVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, rows_ND: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(rows_ND)))


class VisionBlock(GradientCheckpointingLayer):
    """Pre-LN transformer block."""

    def __init__(self, config: OmniVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, rows_ND: torch.Tensor, items: PackedItems) -> torch.Tensor:
        rows_ND = rows_ND + self.attn(self.norm1(rows_ND), items)
        return rows_ND + self.mlp(self.norm2(rows_ND))


class OmniVisionModel(nn.Module):
    """The C-RADIO tower.

    Attributes:
        force_cpe_eval_mode (`bool`, default True): positions as at inference also while training (paper stages 1, 4
            and 5). False: in `train()` mode each item sees a random window of the position table.
        max_patches_per_pass (`int`, default 131072): memory bound; more patches are encoded in several passes. An item
            (an image, a tubelet) is never split. The result is that of a single pass.
    """

    def __init__(self, config: OmniVisionConfig):
        super().__init__()
        self.config = config
        self.force_cpe_eval_mode = True
        self.max_patches_per_pass = 128 * 1024
        self.input_conditioner = InputConditioner(config)
        self.patch_generator = PatchGenerator(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor, is_video: bool = False) -> torch.Tensor:
        """Encode images, or the tubelets of videos.

        Args:
            patches: [P, patch_dim] normalised pixels, any float dtype; per item row-major over (h, w). An image patch
                is flattened (channel, y, x); a video patch is that of each frame of the tubelet in turn.
            grid_thw: [items, 3] long (t, h, w) in patches; t tubelets of a video, 1 for an image.
            is_video: which of the two patch embedders.

        Returns:
            [P, D] patch features in the order of the input, dtype of the parameters.

        Raises:
            ValueError: patches and grid_thw do not fit together.
        """
        embedder = self.patch_generator.video_embedder if is_video else self.patch_generator.embedder
        grids = [(h, w) for t, h, w in grid_thw.tolist() for _ in range(t)]
        if any(h < 1 or w < 1 for h, w in grids):
            raise ValueError(f"grid_thw {grid_thw.tolist()} has an item without patches")
        num_patches = sum(h * w for h, w in grids)
        if patches.ndim != 2 or patches.shape != (num_patches, embedder.in_features):
            raise ValueError(
                f"{'video' if is_video else 'image'} patches have shape {list(patches.shape)}, but grid_thw "
                f"{grid_thw.tolist()} needs [{num_patches}, {embedder.in_features}]"
            )
        if not grids:
            return embedder(patches.to(self.patch_generator.pos_embed.dtype))  # [0, D]

        outputs, done = [], 0
        for chunk in split_passes(grids, self.max_patches_per_pass):
            size = sum(h * w for h, w in chunk)
            outputs.append(self.encode(patches[done : done + size], chunk, is_video))
            done += size
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def encode(self, patches: torch.Tensor, grids: list[tuple[int, int]], is_video: bool) -> torch.Tensor:
        """One pass over items of the given (h, w) grids, [P, patch_dim] -> [P, D]."""
        # Items are sorted by length and grid, so that those of one length are neighbours, i.e. a dense batch by a view.
        order = sorted(range(len(grids)), key=lambda i: (grids[i][0] * grids[i][1], grids[i]))
        sizes = run_lengths([grids[i] for i in order])
        if order != list(range(len(grids))):
            counts = [h * w for h, w in grids]
            starts = [0, *accumulate(counts)]
            patches = patches.index_select(
                0, span_index([starts[i] for i in order], [counts[i] for i in order], patches.device)
            )

        random_windows = self.training and not self.force_cpe_eval_mode
        rows_ND = self.patch_generator(patches, [(n, h, w) for (h, w), n in sizes], is_video, random_windows)
        prefix = self.config.num_prefix_tokens
        lengths = [prefix + grids[i][0] * grids[i][1] for i in order]
        runs = [(n, length) for length, n in run_lengths(lengths)]
        items = PackedItems(runs, self.cu_seqlens(lengths, rows_ND.device))
        for block in self.blocks:
            rows_ND = block(rows_ND, items)

        if len(sizes) == 1:  # all items alike: no index needed
            return rows_ND.view(len(grids), lengths[0], -1)[:, prefix:].flatten(0, 1)
        ends = dict(zip(order, accumulate(lengths), strict=True))  # item -> end of its rows
        counts = [h * w for h, w in grids]
        starts = [ends[i] - count for i, count in enumerate(counts)]
        return rows_ND.index_select(0, span_index(starts, counts, rows_ND.device))

    def cu_seqlens(self, lengths: list[int], device: torch.device) -> torch.Tensor | None:
        """Row boundaries of the items for flash attention; None for the dense batches of sdpa and eager."""
        implementation = self.config._attn_implementation or "sdpa"
        if implementation in ("sdpa", "eager"):
            return None
        if "flash" not in implementation:
            raise ValueError(f"vision tower: attn_implementation {implementation!r} is not one of sdpa, eager, flash_*")
        return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)


def split_passes(grids: list[tuple[int, int]], max_patches: int) -> list[list[tuple[int, int]]]:
    """Cut a list of item grids, in order, into passes of at most `max_patches` patches (a larger item goes alone)."""
    passes, room = [], 0
    for h, w in grids:
        if not passes or h * w > room:
            passes.append([])
            room = max_patches
        passes[-1].append((h, w))
        room -= h * w
    return passes


def run_lengths(values: list) -> list[tuple]:
    """[a, a, b] -> [(a, 2), (b, 1)]."""
    runs = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return runs


def span_index(starts: list[int], counts: list[int], device: torch.device) -> torch.Tensor:
    """Row indices of the spans [start, start + count), one after the other: [sum of counts] long."""
    counts_t = torch.tensor(counts)
    shift = torch.tensor(starts) - (counts_t.cumsum(0) - counts_t)
    return (shift.repeat_interleave(counts_t) + torch.arange(sum(counts))).to(device)


def pixel_shuffle(hidden: torch.Tensor, grid_thw: torch.Tensor, merge_size: int = 2) -> torch.Tensor:
    """Fold each merge_size x merge_size square of patches into one row (pixel shuffle "v2").

    Args:
        hidden: [P, D] patch features, packed items, row-major.
        grid_thw: [items, 3] long (t, h, w) in patches.

    Returns:
        [P / merge_size**2, merge_size**2 * D], items in the same order, row-major; the blocks of channels are the
        patches of the square row by row: top-left, top-right, bottom-left, bottom-right.

    Raises:
        ValueError: a side is not a multiple of merge_size, or the number of patches does not fit.
    """
    runs = run_lengths([(h, w) for t, h, w in grid_thw.tolist() for _ in range(t)])
    for (h, w), _ in runs:
        if h % merge_size or w % merge_size:
            raise ValueError(f"patch grid {h}x{w} cannot be merged {merge_size}x{merge_size}: resize to a multiple")
    counts = [n * h * w for (h, w), n in runs]
    if hidden.shape[0] != sum(counts):
        raise ValueError(f"{hidden.shape[0]} patch features, but grid_thw {grid_thw.tolist()} describes {sum(counts)}")
    merged = []
    for ((h, w), n), rows in zip(runs, hidden.split(counts), strict=True):
        # [n * h/m, m(dy), w/m, m(dx), D] -> [n * h/m, w/m, dy, dx, D]
        squares = rows.reshape(n * h // merge_size, merge_size, w // merge_size, merge_size, -1).transpose(1, 2)
        merged.append(squares.reshape(-1, merge_size**2 * hidden.shape[1]))
    if not merged:
        return hidden.reshape(0, merge_size**2 * hidden.shape[1])
    return torch.cat(merged) if len(merged) > 1 else merged[0]


@torch.no_grad()
def init_vision_weights(module: nn.Module, config: OmniVisionConfig) -> None:
    """Initialise one module of this file (not its children), for `_init_weights` of the parent model.

    Goes through `transformers.initialization`, which leaves alone what was loaded from a checkpoint.
    """
    std = config.initializer_range
    if isinstance(module, nn.Linear):
        init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, PatchGenerator):
        init.trunc_normal_(module.pos_embed, std=std, a=-2 * std, b=2 * std)
    elif isinstance(module, PrefixTokens):
        init.trunc_normal_(module.token, std=std, a=-2 * std, b=2 * std)
    elif isinstance(module, InputConditioner):
        for name in ("norm_mean", "norm_std"):
            value = torch.tensor(getattr(config, name), dtype=torch.float32).view(-1, 1, 1)
            init.copy_(getattr(module, name), value)


__all__ = ["OmniVisionModel", "VisionBlock", "init_vision_weights", "pixel_shuffle"]
