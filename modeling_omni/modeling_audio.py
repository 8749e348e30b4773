"""The audio tower: Parakeet's FastConformer encoder (paper section 2; Rekesh et al., 2023; Gulati et al., 2020).

Log-mel frames go through three stride-2 convolutions (8x subsampling, 12.5 tokens per second) and Conformer blocks:
half a feed-forward, self-attention with Transformer-XL relative positions, a convolution module, half a feed-forward.
Module and parameter names are those of the released checkpoint below `sound_encoder.encoder.`.

There is no dropout and no LayerDrop, and batch norm uses its running statistics in train mode too (see
`PinnedBatchNorm1d`), so the tower computes the same function while it trains and while it generates.

Shapes: N clips, T mel frames, M mel bins, C subsampling channels, F frequency rows left, S tokens of a clip
(S = sub(sub(sub(T))), sub(n) = (n - 1) // 2 + 1), P = 2S relative positions, D hidden size, H heads, K head size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_omni import OmniAudioConfig
from .feature_extraction_omni import clip_token_count, hann_window, mel_filterbank

# STFT sizes of the released front end; they only shape the two stored buffers of `MelFeaturizer`.
N_FFT, WIN_LENGTH = 512, 400


class MelFeaturizer(nn.Module):
    """Mel filters `fb` [1, M, N_FFT / 2 + 1] and `window` [WIN_LENGTH] of the released checkpoint. Kept so that saved
    checkpoints hold them; the features come from `OmniFeatureExtractor` in float32 (these are bfloat16 on disk)."""

    def __init__(self, config: OmniAudioConfig):
        super().__init__()
        self.sampling_rate = config.sampling_rate
        self.register_buffer("fb", torch.empty(1, config.num_mel_bins, N_FFT // 2 + 1))
        self.register_buffer("window", torch.empty(WIN_LENGTH))
        self.fill()

    def fill(self):
        init.copy_(self.fb, mel_filterbank(self.fb.shape[1], N_FFT, self.sampling_rate)[None])
        init.copy_(self.window, hann_window(WIN_LENGTH))


class MelFeatureExtractor(nn.Module):
    """Holder of `featurizer`, for the released names."""

    def __init__(self, config: OmniAudioConfig):
        super().__init__()
        self.featurizer = MelFeaturizer(config)


class SubsamplingConv2d(nn.Conv2d):
    """Conv2d that runs channels-last on CPUs: half the time of the default layout at these shapes (few input channels,
    depthwise), measured in float32. Weight shapes, and so checkpoints, are a plain Conv2d's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if x.device.type == "cpu":
            x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
        return self._conv_forward(x, weight, self.bias)


class Subsampling(GradientCheckpointingLayer):
    """Stride-2 convolutions over time and frequency, the first one full and the others depthwise + pointwise.

    [N, T, M] -> [N, S, D]. Frames past a clip's end are zeroed before every convolution that mixes frames, so a padded
    clip gives what it gives alone.
    """

    def __init__(self, config: OmniAudioConfig):
        super().__init__()
        kernel, channels = config.subsampling_conv_kernel_size, config.subsampling_conv_channels
        if config.subsampling_conv_stride != 2 or kernel % 2 == 0:
            raise ValueError("sound_config needs subsampling_conv_stride 2 and an odd subsampling_conv_kernel_size")
        strided = {"kernel_size": kernel, "stride": 2, "padding": kernel // 2}
        self.layers = nn.ModuleList([SubsamplingConv2d(1, channels, **strided), nn.ReLU()])
        for _ in range(config.subsampling_factor.bit_length() - 2):
            self.layers.append(SubsamplingConv2d(channels, channels, groups=channels, **strided))
            self.layers.append(SubsamplingConv2d(channels, channels, 1))
            self.layers.append(nn.ReLU())
        rows = clip_token_count(config.num_mel_bins, config.subsampling_factor)
        self.linear = nn.Linear(channels * rows, config.hidden_size)

    def forward(self, features_NTM: torch.Tensor, frames_N: torch.Tensor | None) -> torch.Tensor:
        """frames_N: valid frames of each clip, or None when no clip is padded."""
        x = features_NTM[:, None]  # [N, 1, T, M]
        if frames_N is not None:
            x = x * _prefix_mask(frames_N, x.shape[2])[:, None, :, None]
        for layer in self.layers:
            x = layer(x)  # [N, C, T', F']
            if frames_N is not None and isinstance(layer, nn.ReLU) and layer is not self.layers[-1]:
                frames_N = clip_token_count(frames_N, 2)
                x = x * _prefix_mask(frames_N, x.shape[2])[:, None, :, None]
        return self.linear(x.transpose(1, 2).flatten(2))  # channel-major


class FeedForward(nn.Module):
    def __init__(self, config: OmniAudioConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.attention_bias)
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x_NSD: torch.Tensor) -> torch.Tensor:
        return self.linear2(F.silu(self.linear1(x_NSD)))


class RelativeAttention(nn.Module):
    """Self-attention with relative positions (Transformer-XL, Dai et al., 2019):
    score[i, j] = ((q_i + bias_u) . k_j + (q_i + bias_v) . r_(i - j)) / sqrt(K)."""

    def __init__(self, config: OmniAudioConfig):
        super().__init__()
        self.config = config
        size, self.num_heads = config.hidden_size, config.num_attention_heads
        self.head_dim = size // self.num_heads
        self.q_proj = nn.Linear(size, size, bias=config.attention_bias)
        self.k_proj = nn.Linear(size, size, bias=config.attention_bias)
        self.v_proj = nn.Linear(size, size, bias=config.attention_bias)
        self.o_proj = nn.Linear(size, size, bias=config.attention_bias)
        self.relative_k_proj = nn.Linear(size, size, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
        self.bias_v = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))

    def forward(
        self, x_NSD: torch.Tensor, positions_PD: torch.Tensor, valid_NS: torch.Tensor | None = None
    ) -> torch.Tensor:
        heads = (self.num_heads, self.head_dim)
        q = self.q_proj(x_NSD).unflatten(-1, heads)  # [N, S, H, K]
        k_NHSK = self.k_proj(x_NSD).unflatten(-1, heads).transpose(1, 2)
        v_NHSK = self.v_proj(x_NSD).unflatten(-1, heads).transpose(1, 2)
        r_HPK = self.relative_k_proj(positions_PD).unflatten(-1, heads).transpose(0, 1)
        qu_NHSK = (q + self.bias_u).transpose(1, 2)
        qv_NHSK = (q + self.bias_v).transpose(1, 2)
        bias_NHSS = relative_shift(qv_NHSK @ r_HPK.transpose(1, 2)) * self.head_dim**-0.5
        if valid_NS is not None:
            # the most negative number, not -inf: a row without any valid key must stay finite
            bias_NHSS = bias_NHSS.masked_fill(~valid_NS[:, None, None], torch.finfo(bias_NHSS.dtype).min)
        if self.config._attn_implementation == "eager":
            scores = qu_NHSK @ k_NHSK.transpose(2, 3) * self.head_dim**-0.5 + bias_NHSS
            out_NHSK = scores.float().softmax(-1).to(v_NHSK.dtype) @ v_NHSK
        else:
            # Every other choice runs SDPA: flash kernels take no additive bias, and clips are short (375 tokens).
            out_NHSK = F.scaled_dot_product_attention(qu_NHSK, k_NHSK, v_NHSK, attn_mask=bias_NHSS)
        return self.o_proj(out_NHSK.transpose(1, 2).flatten(2))


class PointwiseConv1d(nn.Conv1d):
    """Kernel-1 convolution over [N, S, channels]: a linear layer with a convolution's weight shape [out, in, 1]."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x_NSD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_NSD, self.weight.squeeze(-1), self.bias)


class PinnedBatchNorm1d(nn.BatchNorm1d):
    """Batch norm over [N, S, D] that uses its running statistics in train mode too, unless `batch_norm_training`.

    With batch statistics a clip's output would depend on the other clips of its batch: a policy in train mode and its
    reference in eval mode would disagree (ratios off 1 at step 0), padding and passes would change results, and the
    released statistics would drift under small fine-tuning batches. What is left is a per-channel scale and shift,
    whose weight and bias still train.
    """

    batch_norm_training = False

    def forward(self, x_NSD: torch.Tensor, valid_NS: torch.Tensor | None = None) -> torch.Tensor:
        if self.training and self.batch_norm_training:  # statistics over valid tokens only
            if valid_NS is None:
                return super().forward(x_NSD.flatten(0, 1)).view_as(x_NSD)
            return torch.zeros_like(x_NSD).masked_scatter(valid_NS[..., None], super().forward(x_NSD[valid_NS]))
        scale_D = self.weight.float() * torch.rsqrt(self.running_var.float() + self.eps)
        shift_D = self.bias.float() - self.running_mean.float() * scale_D
        return torch.addcmul(shift_D, x_NSD.float(), scale_D).to(x_NSD.dtype)


class ConvolutionModule(nn.Module):
    """Pointwise convolution with GLU, depthwise convolution over time, batch norm, SiLU, pointwise convolution."""

    def __init__(self, config: OmniAudioConfig):
        super().__init__()
        size, kernel, bias = config.hidden_size, config.conv_kernel_size, config.convolution_bias
        self.pointwise_conv1 = PointwiseConv1d(size, 2 * size, bias=bias)
        self.depthwise_conv = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=size, bias=bias)
        self.norm = PinnedBatchNorm1d(size)
        self.pointwise_conv2 = PointwiseConv1d(size, size, bias=bias)

    def forward(self, x_NSD: torch.Tensor, valid_NS: torch.Tensor | None = None) -> torch.Tensor:
        x_NSD = F.glu(self.pointwise_conv1(x_NSD))
        if valid_NS is not None:
            x_NSD = x_NSD * valid_NS[..., None]
        x_NSD = self.depthwise_conv(x_NSD.transpose(1, 2)).transpose(1, 2)
        return self.pointwise_conv2(F.silu(self.norm(x_NSD, valid_NS)))


class ConformerBlock(GradientCheckpointingLayer):
    def __init__(self, config: OmniAudioConfig):
        super().__init__()
        self.feed_forward1 = FeedForward(config)
        self.self_attn = RelativeAttention(config)
        self.conv = ConvolutionModule(config)
        self.feed_forward2 = FeedForward(config)
        for name in ("norm_feed_forward1", "norm_self_att", "norm_conv", "norm_feed_forward2", "norm_out"):
            setattr(self, name, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))

    def forward(
        self, x_NSD: torch.Tensor, positions_PD: torch.Tensor, valid_NS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """valid_NS: True on real tokens, or None when no clip is padded. What padded tokens hold is undefined."""
        x_NSD = x_NSD + 0.5 * self.feed_forward1(self.norm_feed_forward1(x_NSD))
        x_NSD = x_NSD + self.self_attn(self.norm_self_att(x_NSD), positions_PD, valid_NS)
        x_NSD = x_NSD + self.conv(self.norm_conv(x_NSD), valid_NS)
        x_NSD = x_NSD + 0.5 * self.feed_forward2(self.norm_feed_forward2(x_NSD))
        return self.norm_out(x_NSD)


class OmniAudioModel(nn.Module):
    """FastConformer encoder of independent clips.

    Attributes:
        max_frames_per_pass (`int`): mel frames, padding included, encoded at once (default 16 clips of 30 s). Clips
            are grouped by length, so mixed lengths cost little padding; the result does not depend on the grouping.
        batch_norm_training (`bool`): let batch norm use and update batch statistics in train mode. Only for training
            a tower from scratch; with gradient checkpointing the statistics are then updated twice per step.
        min_passes (`int`): default of `forward`'s argument of that name, for training loops that only call the model.
    """

    def __init__(self, config: OmniAudioConfig):
        super().__init__()
        self.config = config
        self.max_frames_per_pass = 16 * 3000
        self.min_passes = 0
        self.feature_extractor = MelFeatureExtractor(config)
        self.subsampling = Subsampling(config)
        self.layers = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_hidden_layers))

    @property
    def batch_norm_training(self) -> bool:
        return any(block.conv.norm.batch_norm_training for block in self.layers)

    @batch_norm_training.setter
    def batch_norm_training(self, value: bool):
        for block in self.layers:
            block.conv.norm.batch_norm_training = value

    def forward(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor, min_passes: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode clips.

        Args:
            input_features: log-mel clips [N, T, M], any floating dtype (cast to the tower's).
            input_features_mask: bool [N, T], True on each clip's valid frames, which come first.
            min_passes (`int`): make at least this many passes by repeating the shortest clip with weight 0. Ranks
                with sharded parameters (FSDP, ZeRO-3) must agree on it (maximum of `len(plan_passes(...))`), since
                every pass gathers every layer.

        Returns:
            hidden [N, S, D], zero past each clip's tokens, S being the longest clip's; token counts long [N].
        """
        frames_N = input_features_mask.sum(-1)
        tokens_N = clip_token_count(frames_N, self.config.subsampling_factor)
        frames = frames_N.tolist()  # the one host sync
        features_NTM = input_features.to(self.subsampling.layers[0].weight.dtype)
        if not frames:
            return features_NTM.new_zeros(0, 0, self.config.hidden_size), tokens_N
        assert min(frames) > 0, "a clip without a valid frame has no tokens"
        groups = plan_passes(frames, self.max_frames_per_pass)
        if len(groups) == 1:
            hidden_NSD = self._encode(features_NTM, frames_N, frames)
        else:
            size = clip_token_count(max(frames), self.config.subsampling_factor)
            hidden = []
            for group in groups:
                part_NSD = self._encode(features_NTM[group], frames_N[group], [frames[i] for i in group])
                hidden.append(F.pad(part_NSD, (0, 0, 0, size - part_NSD.shape[1])))
            order = torch.tensor([i for group in groups for i in group], device=frames_N.device)
            hidden_NSD = torch.cat(hidden)[order.argsort()]
        shortest = min(range(len(frames)), key=frames.__getitem__)
        for _ in range(max(min_passes, self.min_passes) - len(groups)):
            clip = [shortest]
            hidden_NSD = hidden_NSD + 0 * self._encode(features_NTM[clip], frames_N[clip], [frames[shortest]]).sum()
        return hidden_NSD, tokens_N

    def _encode(self, features_NTM: torch.Tensor, frames_N: torch.Tensor, frames: list[int]) -> torch.Tensor:
        """One pass over clips of `frames` valid frames (`frames_N` on the device): [N, S, D], zero past each clip."""
        features_NTM = features_NTM[:, : max(frames)]
        if self.training and torch.is_grad_enabled() and self.subsampling.gradient_checkpointing:
            # Reentrant checkpointing gives no gradient at all to a segment whose inputs need none.
            features_NTM = features_NTM.detach().requires_grad_(any(p.requires_grad for p in self.parameters()))
        padded = min(frames) < max(frames)
        x_NSD = self.subsampling(features_NTM, frames_N if padded else None)
        valid_NS = None
        if padded:
            valid_NS = _prefix_mask(clip_token_count(frames_N, self.config.subsampling_factor), x_NSD.shape[1])
        positions_PD = relative_positions(x_NSD.shape[1], x_NSD.shape[2], x_NSD.device).to(x_NSD.dtype)
        for block in self.layers:
            x_NSD = block(x_NSD, positions_PD, valid_NS)
        return x_NSD * valid_NS[..., None] if padded else x_NSD


def plan_passes(frames: list[int], max_frames: int = 48000) -> list[list[int]]:
    """Group clips into passes: indices, longest first, at most `max_frames` frames per pass with the padding counted.

    A pass also ends before a clip shorter than half of its longest one: the memory and time of padding cost more than
    another pass, on CPUs too.
    """
    order = sorted(range(len(frames)), key=frames.__getitem__, reverse=True)
    groups: list[list[int]] = []
    for i in order:
        if groups:
            longest = frames[groups[-1][0]]
            if longest * (len(groups[-1]) + 1) <= max_frames and 2 * frames[i] >= longest:
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


def relative_positions(num_tokens: int, size: int, device: torch.device) -> torch.Tensor:
    """Sinusoids of the relative positions S - 1, ..., -S, sine and cosine interleaved: float32 [2S, size].

    The last position never occurs; it makes the row count even, which `relative_shift` uses. Computed when needed: a
    buffer that is not saved would be lost when weights are loaded into a model built on the meta device.
    """
    inv_freq = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    angles = torch.arange(num_tokens - 1, -num_tokens - 1, -1, dtype=torch.float32, device=device)[:, None] * inv_freq
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def relative_shift(scores: torch.Tensor) -> torch.Tensor:
    """[..., S, 2S] -> [..., S, S]: column p holds relative position S - 1 - p, so out[i, j] = in[i, S - 1 - i + j]."""
    S, P = scores.shape[-2:]
    # The flat index i * P + S - 1 - i + j is (S - 1) + i * (P - 1) + j: a view whose rows are P - 1 apart.
    flat = scores.flatten(-2)[..., S - 1 : S - 1 + S * (P - 1)]
    return flat.unflatten(-1, (S, P - 1))[..., :S]


def _prefix_mask(lengths_N: torch.Tensor, size: int) -> torch.Tensor:
    """[N, size], True on the first `lengths_N` places of each row."""
    return torch.arange(size, device=lengths_N.device) < lengths_N[:, None]


def init_audio_weights(module: nn.Module, config: OmniAudioConfig) -> None:
    """Initialise a whole `OmniAudioModel`, except weights that were loaded. Any other module is left alone, so a larger
    model may call this on each of its modules, parents after children as transformers does.

    Fan-in scaling, not a fixed std: depthwise kernels sum 9 values and the stem sees one channel, so std 0.02 shrinks
    the subsampling's output of a small tower to about 1e-7, below the layer norms' eps, and nothing trains.
    """
    if not isinstance(module, OmniAudioModel):
        return
    for part in module.modules():
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Linear):
            init.kaiming_normal_(part.weight, nonlinearity="linear" if isinstance(part, nn.Linear) else "relu")
            if part.bias is not None:
                init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm | nn.BatchNorm1d):
            init.ones_(part.weight)
            init.zeros_(part.bias)
            if isinstance(part, nn.BatchNorm1d):
                init.zeros_(part.running_mean)
                init.ones_(part.running_var)
                init.zeros_(part.num_batches_tracked)
        elif isinstance(part, RelativeAttention):
            init.normal_(part.bias_u, std=config.initializer_range)
            init.normal_(part.bias_v, std=config.initializer_range)
        elif isinstance(part, MelFeaturizer):
            part.fill()


__all__ = ["OmniAudioModel", "init_audio_weights", "plan_passes"]
