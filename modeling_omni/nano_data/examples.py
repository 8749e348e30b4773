"""The README's example media, made from the held-out split: fonts, voices and scenes that training never shows."""

import json
from pathlib import Path

import numpy as np

from . import images, scenes, speech, video
from .vocabulary import sample_random


def save_examples(folder: str | Path) -> list[dict]:
    """Writes five small files and examples.json, a list of {"image" and/or "audio" / "video", "question", "answer"}."""
    from ..media import save_audio, save_video

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = sample_random("examples", 0, "heldout")

    things = [scenes.Thing("red", "circle", 2), scenes.Thing("blue", "star", 6)]
    images.finish(images.draw_things(things, rng)[0], rng).save(folder / "shapes.png")
    images.finish(images.draw_word("HELLO", rng, "heldout")[0], rng).save(folder / "word.png")

    digits, _, _ = speech.spoken_utterance(rng, "heldout", ["four", "zero", "seven"], engine="piper", clean=True)
    save_audio(folder / "digits.wav", digits, speech.RATE)

    movers = [scenes.Thing("green", "square", 0, "right"), scenes.Thing("yellow", "star", 1, scenes.STILL)]
    frames, _ = video.draw_clip(movers, rng, 8, 64, 64)
    save_video(folder / "motion.mp4", frames, 4.0)

    speaker = [scenes.Thing("yellow", "heart", 0, "up")]
    frames, _ = video.draw_clip(speaker, rng, 8, 64, 64)
    said, _, _ = speech.spoken_utterance(rng, "heldout", ["stop"], engine="flite", clean=True)
    sound = np.zeros(2 * speech.RATE, np.float32)
    sound[: len(said)] = said[: len(sound)]
    save_video(folder / "motion_sound.mp4", frames, 4.0, sound, speech.RATE)

    rows = [
        {"image": "shapes.png", "question": "What colour is the star?", "answer": "blue"},
        {"image": "shapes.png", "question": "Where is the red circle?", "answer": "top right"},
        {"image": "word.png", "question": "Read the word.", "answer": "HELLO"},
        {"audio": "digits.wav", "question": "Which digits are spoken?", "answer": "407"},
        {"video": "motion.mp4", "question": "What moves where?",
         "answer": "green square moves right, yellow star stays"},
        {"video": "motion_sound.mp4", "question": "What colour moves and what word is said?", "answer": "yellow, stop"},
    ]  # fmt: skip
    (folder / "examples.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows
