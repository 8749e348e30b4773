"""Tasks of the nano model, rendered and spoken on the fly, with a held-out split (design: README, "Nano").

    make_sample("image_colour", seed=3, split="train") -> {"skill", "messages"}

Every sample is a function of (skill, seed, split). The held-out split shares no font, voice, writer, speaker or clip
with training, and no scene, two-digit sum, real printed word or random string of three characters or more.
"""

import random
import re
from functools import partial

import numpy as np

from . import grounding, images, scenes, speech, text, video
from .images import COLOUR_CLASSES, IGNORE, PLACE_CLASSES, THING_CLASSES, dense_image_sample
from .scenes import SHAPE_KINDS
from .speech import spoken_utterance
from .video import MOTION_CLASSES, dense_video_sample
from .vocabulary import COMMAND_WORDS, DIGIT_WORDS, SPLITS, SPOKEN_WORDS, sample_random


def _from_text(make, rng: random.Random, split: str) -> tuple[list, str, str, str]:
    return [], *make(rng, split)


def _from_image(make, rng: random.Random, split: str) -> tuple[list, str, str, str]:
    image, question, answer, thought = make(rng, split)
    return [{"type": "image", "image": image}], question, answer, thought


def _from_pages(rng: random.Random, split: str) -> tuple[list, str, str, str]:
    pictures, question, answer, thought = images.pages_sample(rng, split)
    return [{"type": "image", "image": picture} for picture in pictures], question, answer, thought


def _from_video(make, rng: random.Random, split: str) -> tuple[list, str, str, str]:
    clip, question, answer, thought = make(rng, split)
    return [{"type": "video", "video": clip}], question, answer, thought


def _audio_part(audio: np.ndarray) -> dict:
    return {"type": "audio", "audio": (audio, speech.RATE)}


def _hear(kind: str, rng: random.Random, split: str) -> tuple[list, str, str, str]:
    """kind "digits", "words" or "count"."""
    digits = kind == "digits" or rng.random() < 0.15
    words = rng.choices(DIGIT_WORDS, k=rng.randint(1, 4)) if digits else rng.choices(COMMAND_WORDS, k=rng.randint(1, 3))
    audio, _, _ = spoken_utterance(rng, split, words)
    if kind == "digits":
        question, answer = rng.choice(text.HEAR_DIGITS_QUESTIONS), scenes.digits_of(words)
    elif kind == "words":
        question, answer = rng.choice(text.HEAR_WORDS_QUESTIONS), " ".join(words)
    else:
        question, answer = rng.choice(text.HEAR_COUNT_QUESTIONS), str(len(words))
    return [_audio_part(audio)], scenes.vary(question, rng), answer, " ".join(words)


def _speech_times(rng: random.Random, split: str) -> tuple[list, str, str, str]:
    audio, question, answer, thought = grounding.times_sample(rng, split)
    return [_audio_part(audio)], question, answer, thought


def _heard_picture(rng: random.Random, split: str) -> tuple[list, str, str, str]:
    """A picture and a spoken word that is about it."""
    things = text.split_scene(lambda: scenes.random_things(rng, rng.choice((1, 2, 2, 3))), split)
    question, answer, words = text.ask_heard_picture(things, rng)
    picture, _ = images.draw_things(things, rng)
    audio, _, _ = spoken_utterance(rng, split, words)
    media = [{"type": "image", "image": images.finish(picture, rng)}, _audio_part(audio)]
    return media, scenes.vary(question, rng), answer, text.thought_heard_motion(things, words)


# skill -> function of (rng, split) that returns media parts, question, answer and thought
_SKILLS = {
    "text_copy": partial(_from_text, text.copy),
    "text_sum": partial(_from_text, text.small_sum),
    "text_math": partial(_from_text, text.arithmetic),
    "text_read": partial(_from_text, text.read),
    "text_speech": partial(_from_text, text.speech),
    **{f"text_{kind}": partial(_from_text, partial(text.scene, kind)) for kind in SHAPE_KINDS},
    "text_recall": partial(_from_text, text.recall),
    "text_motion": partial(_from_text, text.motion),
    "text_heard_motion": partial(_from_text, text.heard_motion),
    "text_heard_picture": partial(_from_text, text.heard_picture),
    "text_button": partial(_from_text, text.button),
    "text_turns": partial(_from_text, text.turns),
    "text_pages": partial(_from_text, text.pages),
    "text_chat": partial(_from_text, text.chat),
    **{f"image_{kind}": partial(_from_image, partial(images.shapes_sample, kind)) for kind in SHAPE_KINDS},
    **{
        f"image_{kind}": partial(_from_image, partial(images.reading_sample, kind))
        for kind in ("word", "digits", "handwritten")
    },
    "image_recall": partial(_from_image, images.recall_sample),
    "image_lines": partial(_from_image, images.lines_sample),
    "image_pages": _from_pages,
    "image_button": partial(_from_image, images.button_sample),
    **{f"speech_{kind}": partial(_hear, kind) for kind in ("digits", "words", "count")},
    **{
        f"video_{kind}": partial(_from_video, partial(video.motion_sample, kind))
        for kind in ("direction", "mover", "describe_motion")
    },
    "video_turns": partial(_from_video, video.turns_sample),
    "video_heard_motion": partial(_from_video, video.heard_motion_sample),
    "heard_picture": _heard_picture,
    "image_document": partial(_from_image, grounding.document_sample),
    "speech_times": _speech_times,
}
# answers with boxes or times; nano as it ships was not trained on them (configs/nano/grounding.yaml), so "all skills"
# are those without them
GROUNDING_SKILLS = ("image_document", "speech_times")
SKILLS = tuple(skill for skill in _SKILLS if skill not in GROUNDING_SKILLS)
# share of samples whose answer comes after a thought
_THINK_RATE = {"text_math": 1.0, **dict.fromkeys(GROUNDING_SKILLS, 0.0)}
POINTING_SKILLS = ("image_button", "text_button")


def make_sample(skill: str, seed: int, split: str = "train", think: bool | None = None) -> dict:
    """One sample, the same for the same arguments.

    Args:
        skill: one of SKILLS or GROUNDING_SKILLS.
        seed: any integer.
        split: "train" or "heldout".
        think: whether the answer follows a thought (`reasoning_content`); None draws it (a quarter of the samples).

    Returns:
        {"skill": str, "messages": [user, assistant]}; media are in memory (PIL images, float32 arrays at 16 kHz as
        (array, 16000), `VideoClip`s). The assistant's content is the exact answer.
    """
    if skill not in _SKILLS:
        raise ValueError(f"unknown skill {skill!r}; one of {', '.join(_SKILLS)}")
    rng = sample_random(skill, seed, split)
    media, question, answer, thought = _SKILLS[skill](rng, split)
    drawn = rng.random() < _THINK_RATE.get(skill, 0.25)
    assistant = {"role": "assistant", "content": answer}
    if drawn if think is None else think:
        assistant["reasoning_content"] = thought
    content = [*media, {"type": "text", "text": question}] if media else question
    return {"skill": skill, "messages": [{"role": "user", "content": content}, assistant]}


def score(sample: dict, answer: str) -> bool:
    """Whether `answer` (text after `</think>`) is the sample's answer, but for case, spaces and a last full stop.

    A point (of POINTING_SKILLS) is right within 12 percent across and 7 percent down of the button's centre, so on the
    button. A page is right when its text is and every box overlaps its own by half (IoU), times when the words are and
    every phrase overlaps its own by half; metrics_grounding.py has finer scores. Words read from pictures are
    upper-case in both, so case never hides a mistake there.
    """
    from ..metrics_grounding import document_scores, timed_scores

    expected = sample["messages"][-1]["content"]
    if sample["skill"] in POINTING_SKILLS:  # a button is at least 30 x 18 percent of the picture
        points = [re.fullmatch(r"\(?(\d+)[, ]+(\d+)\)?", _normal(point)) for point in (answer, expected)]
        if None in points:
            return False
        (x, y), (to_x, to_y) = (map(int, point.groups()) for point in points)
        return abs(x - to_x) <= 12 and abs(y - to_y) <= 7
    if sample["skill"] == "image_document":
        parts = document_scores(answer.replace("<|im_end|>", "").strip().rstrip("."), expected, scale=100)
        return parts["text"] == parts["box_f1"] == 1
    if sample["skill"] == "speech_times":
        parts = timed_scores(answer, expected)
        return parts["words"] == parts["segment_f1"] == 1
    return _normal(answer) == _normal(expected)


def _normal(text: str) -> str:
    return " ".join(text.replace("<|im_end|>", "").strip().rstrip(".").lower().split())


__all__ = [
    "COLOUR_CLASSES",
    "GROUNDING_SKILLS",
    "IGNORE",
    "MOTION_CLASSES",
    "PLACE_CLASSES",
    "SKILLS",
    "SPLITS",
    "SPOKEN_WORDS",
    "THING_CLASSES",
    "dense_image_sample",
    "dense_video_sample",
    "make_sample",
    "score",
    "spoken_utterance",
]
