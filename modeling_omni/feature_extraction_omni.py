"""Log-mel front end of the audio tower: mono waveforms to 30 s clips of log-mel frames (paper section 2).

Sound at 16 kHz is cut into clips of 30 s that are encoded on their own; every clip becomes a log-mel spectrogram with
a 10 ms hop, normalised per mel bin over the clip. A clip of L samples has L // 160 valid frames, as in training and
vLLM (a centred STFT makes one physical frame more, which is dropped here), so 30 s give exactly 375 tokens.

Shapes: A audio items, N clips, L samples, T frames, F STFT bins (n_fft / 2 + 1), M mel bins.
"""

import functools
import math

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor

from .media import OmniInputError

LOG_FLOOR = 2.0**-24  # added to mel energies before the logarithm
STD_FLOOR = 1e-5  # added to the standard deviation: digital silence divides by it
SAMPLES_PER_PASS = 8 * 30 * 16000  # waveform samples transformed at once; bounds working memory at about 150 MB


@functools.lru_cache(maxsize=8)
def mel_filterbank(num_mels: int, n_fft: int, sampling_rate: int) -> torch.Tensor:
    """Triangular mel filters on Slaney's scale with Slaney's (area) norm, 0 Hz to Nyquist: float32 [M, F], CPU."""
    # `device` is spelled out because models are built under a default device (meta) that must not enter the cache.
    # Slaney's auditory toolbox scale: linear below 1 kHz (3 mels per 200 Hz), logarithmic above (27 mels per 6.4x).
    mel_1khz, mels_per_log = 15.0, 27.0 / math.log(6.4)
    mel_max = mel_1khz + mels_per_log * math.log(sampling_rate / 2 / 1000)
    mels = torch.linspace(0, mel_max, num_mels + 2, dtype=torch.float64, device="cpu")
    edges_hz = torch.where(mels < mel_1khz, mels * 200 / 3, 1000 * torch.exp((mels - mel_1khz) / mels_per_log))
    bins_hz = torch.linspace(0, sampling_rate / 2, n_fft // 2 + 1, dtype=torch.float64, device="cpu")
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]  # [M, 1] each
    rising, falling = (bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)).float()


@functools.lru_cache(maxsize=8)
def hann_window(win_length: int) -> torch.Tensor:
    """Symmetric Hann window: float32 [win_length], CPU."""
    return torch.hann_window(win_length, periodic=False, dtype=torch.float32, device="cpu")


def clip_token_count(valid_frames, subsampling_factor: int = 8):
    """Tokens of a clip of `valid_frames` (int or long tensor): one stride-2 convolution per factor of 2."""
    for _ in range(subsampling_factor.bit_length() - 1):
        valid_frames = (valid_frames - 1) // 2 + 1
    return valid_frames


def clip_sample_counts(num_samples: int, clip_samples: int = 480000, min_clip_samples: int = 1600) -> list[int]:
    """Samples in each clip of one audio, the last one after zero padding to `min_clip_samples`."""
    whole, rest = divmod(num_samples, clip_samples)
    return [clip_samples] * whole + ([max(rest, min_clip_samples)] if rest else [])


def num_audio_tokens(
    num_samples: int,
    clip_samples: int = 480000,
    min_clip_samples: int = 1600,
    hop_length: int = 160,
    subsampling_factor: int = 8,
) -> int:
    """Tokens of one audio of `num_samples` at 16 kHz: the sum over its clips (1 s: 13, 30 s: 375, 35 s: 438)."""
    counts = clip_sample_counts(num_samples, clip_samples, min_clip_samples)
    return sum(clip_token_count(samples // hop_length, subsampling_factor) for samples in counts)


class OmniFeatureExtractor(SequenceFeatureExtractor):
    """Cuts mono waveforms into clips and turns each into a normalised log-mel spectrogram.

    The defaults are the released model's, which ships no feature extractor file.

    Args:
        feature_size (`int`): mel bins.
        sampling_rate (`int`): Hz that waveforms must have.
        n_fft, hop_length, win_length (`int`): STFT sizes in samples.
        preemphasis (`float`): coefficient of x[t] - preemphasis * x[t - 1]; a clip's first sample is kept.
        clip_seconds (`float`): length of a full clip.
        min_clip_seconds (`float`): shorter clips are zero-padded to this.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16000,
        n_fft: int = 512,
        hop_length: int = 160,
        win_length: int = 400,
        preemphasis: float = 0.97,
        clip_seconds: float = 30.0,
        min_clip_seconds: float = 0.1,
        padding_value: float = 0.0,
        **kwargs,
    ):
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.win_length = win_length
        self.preemphasis = preemphasis
        self.clip_seconds = clip_seconds
        self.min_clip_seconds = min_clip_seconds
        if win_length > n_fft:
            raise ValueError(f"win_length {win_length} is larger than n_fft {n_fft}")
        if not 2 * hop_length <= self.min_clip_samples <= self.clip_samples:
            raise ValueError(
                f"min_clip_seconds {min_clip_seconds} must be at least two hops ({2 * hop_length / sampling_rate} s: a "
                f"standard deviation needs two frames) and at most clip_seconds {clip_seconds}"
            )

    @property
    def clip_samples(self) -> int:
        return round(self.clip_seconds * self.sampling_rate)

    @property
    def min_clip_samples(self) -> int:
        return round(self.min_clip_seconds * self.sampling_rate)

    def __call__(
        self, raw_speech, sampling_rate: int | None = None, return_tensors: str | None = "pt", **kwargs
    ) -> BatchFeature:
        """Log-mel clips of one or several audio items.

        Args:
            raw_speech: one array or a list of arrays, floating mono waveforms [L] (numpy or torch), nominally in
                [-1, 1].
            sampling_rate (`int`, *optional*): Hz of the waveforms; checked against the extractor's when given.
            return_tensors (`str`, *optional*): type of the tensors, as everywhere in transformers.
            kwargs: `padding` and the like, which transformers' extractors take; clips are always padded to the longest.

        Returns:
            `input_features` float32 [N, T, M], zero where not valid; `input_features_mask` bool [N, T], T being the
            longest clip's valid frames; `audio_clip_counts` long [A], clips of each item (they sum to N).

        Raises:
            OmniInputError: another sampling rate, no audio, or an item that is empty, not 1-D, not floating or not
                finite.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise OmniInputError(
                f"audio is sampled at {sampling_rate} Hz but the model hears {self.sampling_rate} Hz; resample it "
                "first (load_audio does)"
            )
        audios = [raw_speech] if isinstance(raw_speech, (np.ndarray, torch.Tensor)) else list(raw_speech)
        if audios and isinstance(audios[0], float):
            audios = [np.asarray(audios, np.float32)]
        if not audios:
            raise OmniInputError("no audio was given: pass an array or a list of arrays")

        clips, lengths, clip_counts = [], [], []
        for i, audio in enumerate(audios):
            waveform_L = _as_waveform(audio, i)
            counts = clip_sample_counts(len(waveform_L), self.clip_samples, self.min_clip_samples)
            clips += waveform_L.split(self.clip_samples)  # views, no copies
            lengths += counts
            clip_counts.append(len(counts))

        frames = torch.tensor([length // self.hop_length for length in lengths])
        features_NTM = torch.zeros(len(clips), int(frames.max()), self.feature_size, dtype=torch.float32)
        # Longest first in passes of bounded size, so neither hours of sound nor mixed lengths inflate memory.
        order = sorted(range(len(clips)), key=lengths.__getitem__, reverse=True)
        while order:
            size = max(1, SAMPLES_PER_PASS // lengths[order[0]])
            batch, order = order[:size], order[size:]
            wave_NL = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.float32)
            for row, i in enumerate(batch):
                wave_NL[row, : len(clips[i])] = clips[i]
            mel_NTM = self._log_mel(wave_NL, torch.tensor([lengths[i] for i in batch]))
            features_NTM[batch, : mel_NTM.shape[1]] = mel_NTM
        data = {
            "input_features": features_NTM,
            "input_features_mask": torch.arange(features_NTM.shape[1]) < frames[:, None],
            "audio_clip_counts": torch.tensor(clip_counts),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _log_mel(self, wave_NL: torch.Tensor, lengths_N: torch.Tensor) -> torch.Tensor:
        """Zero-padded clips [N, L] of `lengths_N` samples -> normalised log-mel [N, T, M], zero past each clip."""
        if self.preemphasis:
            inside = torch.arange(1, wave_NL.shape[1]) < lengths_N[:, None]
            wave_NL[:, 1:] -= self.preemphasis * wave_NL[:, :-1].clone() * inside
        spectrum_NFT = torch.stft(
            wave_NL,
            self.n_fft,
            self.hop_length,
            self.win_length,
            hann_window(self.win_length),
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        frames_N = lengths_N // self.hop_length
        # the last physical frame is centred on the clip's end and never valid
        power_NFT = torch.view_as_real(spectrum_NFT[..., : int(frames_N.max())]).square().sum(-1)
        mel_NTM = (mel_filterbank(self.feature_size, self.n_fft, self.sampling_rate) @ power_NFT).transpose(1, 2)
        log_NTM = (mel_NTM + LOG_FLOOR).log()
        valid_NT1 = (torch.arange(log_NTM.shape[1]) < frames_N[:, None]).unsqueeze(-1)
        count_N11 = frames_N[:, None, None]
        centred_NTM = (log_NTM - (log_NTM * valid_NT1).sum(1, keepdim=True) / count_N11) * valid_NT1
        std_N1M = (centred_NTM.square().sum(1, keepdim=True) / (count_N11 - 1)).sqrt()
        return centred_NTM / (std_N1M + STD_FLOOR)


def _as_waveform(audio, index: int) -> torch.Tensor:
    """One checked item as float32 [L] on the CPU, without a copy where it already is that."""
    if isinstance(audio, np.ndarray):
        if not np.issubdtype(audio.dtype, np.floating):
            raise OmniInputError(f"audio {index} has dtype {audio.dtype}; pass floating samples in [-1, 1]")
        audio = torch.from_numpy(np.require(audio, np.float32, ["C", "W"]))
    if not isinstance(audio, torch.Tensor) or not audio.is_floating_point():
        kind = audio.dtype if isinstance(audio, torch.Tensor) else type(audio).__name__
        raise OmniInputError(f"audio {index} is {kind}; pass a numpy or torch array of floating samples in [-1, 1]")
    if audio.ndim != 1:
        raise OmniInputError(f"audio {index} has shape {list(audio.shape)}; pass one mono channel, shape [samples]")
    if not len(audio):
        raise OmniInputError(f"audio {index} is empty; drop it or pass at least one sample")
    audio = audio.detach().to("cpu", torch.float32)
    if not all(torch.isfinite(bound) for bound in torch.aminmax(audio)):  # a NaN anywhere makes both bounds NaN
        raise OmniInputError(f"audio {index} holds NaN or infinite samples; check how it was decoded")
    return audio


__all__ = ["OmniFeatureExtractor", "clip_sample_counts", "clip_token_count", "mel_filterbank", "num_audio_tokens"]
