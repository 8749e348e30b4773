"""Audio decoding: any file or array to float32 mono [L] at 16 kHz (paper section 2, audio input).

soundfile (libsndfile) first, PyAV (bundled FFmpeg) for MP3 and what the former cannot read. Samples go block by block
through a soxr "HQ" stream, so that neither the rate nor the channel count of the source matters for memory. soxr HQ is
librosa's default, through which the published serving stack resamples, and needs no torch.
"""

from __future__ import annotations

import os
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile
import soxr

from .limits import MediaLimits, default_limits
from .media_headers import check_mp4
from .media_source import Deadline, decoding, is_tensor, open_source, refuse, to_numpy, words_of

# Demuxers that never open other files or addresses themselves (no hls, dash, concat, image2, sdp ...).
AV_FORMATS = "mov,matroska,webm,avi,gif,flv,mpegts,mpeg,asf,ogg,wav,w64,mp3,flac,aac,aiff,caf,amr,au"
MIN_AUDIO_SECONDS = 0.01  # one mel hop; less holds no frame at all
NUMBER = (int, float, np.number)
SILENCE_BLOCK = 1 << 20  # samples of a gap that are filled at a time: a gap may be hours at any rate
MAX_AUDIO_PEAK = 8.0  # decoders overshoot 1.0 a little; more than this is audio that was never scaled to [-1, 1]


class Mono16k:
    """Mono blocks of any, even changing, rate in; one resampled array out. Values, length and time are checked."""

    def __init__(self, rate_out: int, name: str, limits: MediaLimits, deadline: Deadline):
        self.rate_out, self.name, self.limits, self.deadline = rate_out, name, limits, deadline
        self.rate, self.stream, self.seconds, self.blocks = None, None, 0.0, []

    def add(self, block: np.ndarray, rate: int) -> None:
        self.deadline.check()
        if rate != self.rate:
            _check_rate(rate, self.name, self.limits)
            self._flush()
            self.rate = rate
            self.stream = None if rate == self.rate_out else soxr.ResampleStream(rate, self.rate_out, 1, quality="HQ")
        self.seconds += len(block) / rate
        check_seconds(self.seconds, self.name, self.limits)
        if len(block) == 0:
            return
        peak = float(np.abs(block).max())
        if not np.isfinite(peak):
            raise refuse(self.name, "holds NaN or infinite samples", do="clean it, for example with np.nan_to_num")
        if peak > MAX_AUDIO_PEAK:
            problem = f"holds samples up to {peak:g}"
            raise refuse(self.name, problem, "[-1, 1] for float audio", "scale it (16-bit values: divide by 32768)")
        block = block.astype(np.float32, copy=False)
        self.blocks.append(block if self.stream is None else self.stream.resample_chunk(block))

    def _flush(self) -> None:
        if self.stream is not None:
            self.blocks.append(self.stream.resample_chunk(np.zeros(0, np.float32), last=True))

    def finish(self) -> np.ndarray:
        self._flush()
        audio = np.concatenate(self.blocks) if self.blocks else np.zeros(0, np.float32)
        self.blocks = []
        return np.clip(audio, -1.0, 1.0, out=audio)


def _check_rate(rate: float, name: str, limits: MediaLimits) -> None:
    if not limits.min_audio_rate <= rate <= limits.max_audio_rate:
        limit = f"{limits.min_audio_rate} to {limits.max_audio_rate} Hz (MediaLimits.min_audio_rate, max_audio_rate)"
        raise refuse(name, f"has a sampling rate of {rate:g} Hz", limit, "check the rate or resample it")


def check_seconds(seconds: float, name: str, limits: MediaLimits) -> None:
    if seconds > limits.max_audio_seconds:
        limit = f"{limits.max_audio_seconds:g} s (MediaLimits.max_audio_seconds)"
        raise refuse(name, f"holds {seconds:.1f} s of audio or more", limit, "cut it or raise it")


def _check_channels(channels: int, name: str, limits: MediaLimits) -> None:
    if not 1 <= channels <= limits.max_audio_channels:
        limit = f"1 to {limits.max_audio_channels} channels (MediaLimits.max_audio_channels)"
        raise refuse(name, f"has {channels} audio channels", limit, "mix it down first")


def load_audio(
    source: Any, sampling_rate: int = 16000, limits: MediaLimits | None = None, sampling_rate_in: int | None = None
) -> np.ndarray:
    """Decode audio to float32 mono [L] in [-1, 1] at `sampling_rate` Hz; channels are averaged.

    source: path, bytes, binary file object, data: URL (http(s) when allowed) of wav, flac, mp3, ogg, opus, m4a, aac,
    webm or a video with sound; or an array / tensor with `sampling_rate_in`, a tuple (array, rate) or a dict {"array",
    "sampling_rate"}. Arrays are [L], or two-dimensional with the channels on the shorter axis; float in [-1, 1], or
    integers, which are scaled by their full range. Raises OmniInputError.
    """
    limits = limits or default_limits()
    if isinstance(source, dict) and "array" in source:
        source = (source["array"], source.get("sampling_rate"))
    if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], NUMBER):
        source, sampling_rate_in = source
    if isinstance(source, (list, tuple, np.ndarray)) or is_tensor(source):
        name, audio = "audio array", _array_audio(source, sampling_rate, limits, sampling_rate_in)
    else:
        with open_source(source, "audio", limits) as (name, file), decoding(name, "audio"):
            mono = Mono16k(sampling_rate, name, limits, Deadline(name, limits.timeout))
            _decode_sound(file, mono, name, limits)
            audio = mono.finish()
    if len(audio) < max(1, int(MIN_AUDIO_SECONDS * sampling_rate)):
        problem = "holds no samples" if len(audio) == 0 else f"holds only {len(audio) / sampling_rate * 1000:.2g} ms"
        raise refuse(name, problem, f"at least {MIN_AUDIO_SECONDS:g} s", "give a longer recording")
    return audio


def _array_audio(source: Any, sampling_rate: int, limits: MediaLimits, rate: int | None) -> np.ndarray:
    name = "audio array"
    if rate is None:
        raise refuse(name, "has no sampling rate", do="give (array, rate) or sampling_rate_in")
    with decoding(name, "audio"):
        array, rate = to_numpy(source), int(rate)
    if (
        array.ndim not in (1, 2)
        or array.dtype.kind not in "iuf"
        or array.dtype.itemsize > 4
        and array.dtype.kind != "f"
    ):
        problem = f"has shape {list(array.shape)} and dtype {array.dtype}"
        raise refuse(name, problem, do="give [L] or [channels, L] of float, int16, int32, int8 or uint8")
    if array.ndim == 2:
        array = array if array.shape[0] <= array.shape[1] else array.T
        _check_channels(array.shape[0], name, limits)
    _check_rate(rate, name, limits)
    check_seconds(array.shape[-1] / rate, name, limits)
    mono = Mono16k(sampling_rate, name, limits, Deadline(name, limits.timeout))
    with decoding(name, "audio"):
        for begin in range(0, array.shape[-1], 1 << 20):
            mono.add(_to_mono(array[..., begin : begin + (1 << 20)]), rate)
        return mono.finish()


def _to_mono(samples: np.ndarray) -> np.ndarray:
    """float32 [L] of samples [L] or [channels, L], integers scaled by their full range."""
    if samples.dtype.kind in "iu":
        bits = samples.dtype.itemsize * 8
        offset = 2.0 ** (bits - 1) if samples.dtype.kind == "u" else 0.0
        samples = (samples.astype(np.float64 if bits > 16 else np.float32) - offset) / 2.0 ** (bits - 1)
    with np.errstate(over="ignore", invalid="ignore"):  # becomes inf or NaN, which are refused by name
        if samples.ndim == 2:
            samples = samples[0] if len(samples) == 1 else samples.mean(axis=0)
        return samples.astype(np.float32, copy=False)


def _decode_sound(file: BinaryIO, mono: Mono16k, name: str, limits: MediaLimits) -> None:
    """Feed every sample of an audio file to `mono`: soundfile where it can read the file, otherwise PyAV."""
    head, size = file.read(18), file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 65_307))  # the longest page of Ogg
    tail = file.read()
    last = tail.rfind(b"OggS")
    file.seek(0)
    declared = int.from_bytes(head[4:8], "little") + 8
    # Streamed recordings write 0 or a huge number here, and some writers are off by a header; neither is damage.
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE" and size + 64 < declared < 0x7FFF0000:
        raise refuse(name, f"is truncated ({size} of {declared} bytes)", do="copy or download it again")
    # Of recordings one behind the other (radio), told by their serial numbers, libsndfile reads the first alone.
    chained = head[:4] == b"OggS" and last >= 0 and tail[last + 14 : last + 18] != head[14:]
    if chained or head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):  # MP3 or AAC frames
        _decode_av_sound(file, mono, name, limits, "left to FFmpeg")
        return
    try:
        sound = soundfile.SoundFile(file)
    except Exception as error:
        file.seek(0)
        _decode_av_sound(file, mono, name, limits, words_of(error, 80))
        return
    # libsndfile guesses the length of an MP3 from its first bit rate and stops there (variable rates lose half their
    # sound), and takes a WAV of unknown length (recorded through a pipe) for an empty one, such a FLAC for an endless.
    # FFmpeg does none of it.
    if sound.format == "MP3" or (sound.frames == 0 and size > 1000) or sound.frames >= 1 << 60:
        sound.close()
        file.seek(0)
        _decode_av_sound(file, mono, name, limits, "left to FFmpeg")
        return
    with sound:
        _check_rate(sound.samplerate, name, limits)
        _check_channels(sound.channels, name, limits)
        check_seconds(sound.frames / sound.samplerate, name, limits)
        total, step = 0, max(1024, (1 << 18) // sound.channels)
        while len(block := sound.read(step, dtype="float32", always_2d=True)):
            total += len(block)
            mono.add(_to_mono(block.T), sound.samplerate)
        missing = sound.frames - total
        if missing > 0.1 * sound.samplerate and missing > 0.01 * sound.frames:
            raise refuse(name, f"is truncated ({total} of {sound.frames} samples)", do="copy or download it again")


def open_av(file: BinaryIO, limits: MediaLimits):
    # of the frames that FFmpeg decodes while it looks at the streams; the limit itself is checked by name behind it
    options = {"format_whitelist": AV_FORMATS, "protocol_whitelist": "none"}
    options["max_pixels"] = str(4 * limits.max_video_pixels)
    return av.open(file, mode="r", options=options, metadata_errors="ignore", timeout=limits.timeout)


def _decode_av_sound(file: BinaryIO, mono: Mono16k, name: str, limits: MediaLimits, reason: str) -> None:
    check_mp4(file, name, limits, mono.deadline)
    try:
        container = open_av(file, limits)
    except Exception as error:
        problem = f"is not audio that can be read (soundfile: {reason}; FFmpeg: {words_of(error, 80)})"
        raise refuse(name, problem, do="give wav, flac, mp3, ogg, m4a, aac or webm") from error
    with container:
        if not container.streams.audio:
            raise refuse(name, "has no audio track", do="give a file with sound")
        stream = container.streams.audio[0]
        if stream.duration and container.format.name not in ("mp3", "aac"):  # there it is a guess from the bit rate
            check_seconds(float(stream.duration * stream.time_base), name, limits)
        decode_av_track(container, stream, mono, name, limits)
        check_complete(container, stream, mono.seconds, name)


def check_complete(container, stream, seconds: float, name: str) -> None:
    """A header that promises clearly more than was found is a truncated file. Other containers only estimate."""
    if "matroska" in container.format.name:
        promised = (container.duration or 0) / av.time_base
    elif "mov" in container.format.name and stream.duration:
        promised = float(stream.duration * stream.time_base)
    else:
        return
    if seconds < 0.9 * promised - 0.05:
        problem = f"is truncated ({seconds:.2f} s of {promised:.2f} s)"
        raise refuse(name, problem, do="copy or download it again")


def decode_av_track(
    container, stream, mono: Mono16k, name: str, limits: MediaLimits, window: tuple[float, float] | None = None
) -> None:
    """Feed an audio stream to `mono`. window: (begin, end) on the stream's clock in seconds; then samples are placed by
    their times: silence where the track starts late or has a gap, cut at both ends."""
    if stream.codec_context is None:
        raise refuse(name, "has sound in a codec that is not known here", do="convert it, for example to wav")
    _check_channels(stream.codec_context.channels or 1, name, limits)
    stream.thread_type = "NONE"  # audio decoders are fast; worker threads would only cost start-up
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    if window is not None and window[0] > 1.0:  # half a second early: codecs need a frame or two to settle
        container.seek(int((window[0] - 0.5) / stream.time_base), stream=stream, backward=True)
    done, damaged = 0.0, 0  # seconds of the window that have been filled
    for packet in container.demux(stream):
        mono.deadline.check()
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            damaged += 1
            if damaged > 10:
                raise
            continue
        for frame in frames:
            rate, channels = frame.sample_rate, len(frame.layout.channels)
            _check_channels(channels, name, limits)
            samples = frame.to_ndarray()  # planar [channels, L], packed [1, L * channels]
            block = _to_mono(samples if frame.format.is_planar else samples.reshape(-1, channels).T)
            if window is None:
                mono.add(block, rate)
                continue
            length = window[1] - window[0]
            at = float(frame.pts * frame.time_base) - window[0] if frame.pts is not None else done
            gap = at - done
            if at >= length:
                return
            if gap > 0.1 or (gap > 0 and done == 0):
                silence = round(gap * rate)
                for begin in range(0, silence, SILENCE_BLOCK):
                    mono.add(np.zeros(min(SILENCE_BLOCK, silence - begin), np.float32), rate)
                done += silence / rate
            elif done == 0 and gap < 0:
                block = block[round(-gap * rate) :]
            block = block[: max(0, round((length - done) * rate))]
            if len(block):
                mono.add(block, rate)
                done += len(block) / rate
            if length - done < 0.5 / rate:
                return


def save_audio(path: str | os.PathLike, array: np.ndarray, rate: int) -> None:
    """Write float [L] or [L, channels] in [-1, 1] by the ending: wav, flac, ogg, opus, mp3, m4a, webm."""
    array = np.asarray(array, np.float32)
    ending = os.path.splitext(os.fsdecode(path))[1].lower()
    if ending in (".m4a", ".mp4", ".webm", ".mka"):
        with av.open(os.fspath(path), "w") as container:
            stream = add_sound(container, rate, 1 if array.ndim == 1 else array.shape[1])
            write_sound(container, stream, array.reshape(len(array), -1), rate, 0)
            container.mux(stream.encode(None))
    elif ending == ".opus":
        soundfile.write(os.fspath(path), array, rate, format="OGG", subtype="OPUS")
    else:
        soundfile.write(os.fspath(path), array, rate)


def add_sound(container, rate: int, channels: int):
    # AVI cannot say that an encoder's first samples are padding, so its sound is PCM.
    codec = {"webm": "libopus", "matroska": "libopus", "avi": "pcm_s16le"}.get(container.format.name, "aac")
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    return container.add_stream(codec, rate=rate, layout=layout)


def write_sound(container, stream, samples: np.ndarray, rate: int, begin: int) -> None:
    for at in range(0, len(samples), 1024):
        block = np.ascontiguousarray(samples[at : at + 1024], np.float32)
        frame = av.AudioFrame.from_ndarray(block.reshape(1, -1), format="flt", layout=stream.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, begin + at, Fraction(1, rate)
        container.mux(stream.encode(frame))
