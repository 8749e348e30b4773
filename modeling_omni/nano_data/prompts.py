"""Prompts for reinforcement learning from the nano tasks, as files: JSONL rows beside their pictures, sounds and clips.

Files, not `nano:<skill>` rows made on the fly: filtering, pairs and logs name rows by their paths, the rows that are
kept must be written down, and training then takes the same road (decoding included) as with anybody's data.

Nano answers in plain words, so all rows are meant for `reward: text`. Which verifier grades what:

    asr_wer         spoken words; spoken digits by character, as languages without spaces are counted
    gui_coordinate  points at buttons, in percent; the reward decays with the distance
    math            counts
    document_parse  pages with boxes and classes, in percent
    timed_speech    spoken phrases with seconds
    abstention      questions about what is not in their picture
    string_match    everything else. Sums too: a symbolic verifier takes "2 + 3" for 5, which is copying the question

No question here is multiple choice with letters: nano was never shown any.
"""

import json
import re
from pathlib import Path

from ..filtering import mismatched_rows
from ..media import save_audio, save_video
from . import GROUNDING_SKILLS, POINTING_SKILLS, SKILLS, make_sample
from .vocabulary import COLOURS, SHAPES

# what the SFT data say where nothing is known, and the words that every policy may use
NOT_KNOWN = ["I do not know. I am a small model.", "I do not know", "unanswerable"]
# skills of which a question names what it is about, so that a picture without that thing makes it unanswerable
ABOUT_THINGS = ("image_colour", "image_shape", "image_where")


def verifier_of(skill: str, answer: str) -> dict:
    """{"verifier", "answer", "args" (where there are some)} of a skill's answer."""
    if skill in POINTING_SKILLS:
        x, y = (int(number) for number in answer.split())
        args = {"scale": 100, "tagged": False}
        return {"verifier": "gui_coordinate", "answer": f"{x / 100},{y / 100}", "args": args}
    if skill == "image_document":
        return {"verifier": "document_parse", "answer": answer, "args": {"scale": 100}}
    if skill == "speech_times":
        return {"verifier": "timed_speech", "answer": answer}
    if skill == "speech_words":
        return {"verifier": "asr_wer", "answer": answer}
    if skill == "speech_digits":
        return {"verifier": "asr_wer", "answer": answer, "args": {"lang": "zh"}}
    return {"verifier": "math" if skill.endswith("_count") else "string_match", "answer": answer}


def save_part(part: dict, stem: Path) -> dict:
    """A message's part with its medium written to a file whose name begins with `stem`, and named by its path."""
    kind = part["type"]
    if kind == "text":
        return part
    path = stem.with_suffix({"image": ".png", "audio": ".wav", "video": ".mp4"}[kind])
    found = {"type": kind, "path": str(path)}
    if kind == "image":
        part["image"].save(path)
    elif kind == "audio":
        save_audio(path, *part["audio"])
    else:
        clip = part["video"]
        save_video(path, clip.frames, clip.fps, clip.audio, options={"crf": "10"})
        found["num_frames"] = len(clip.frames)  # all of them, as in SFT
    return found


def prompt_row(skill: str, seed: int, folder: Path, split: str = "train", think: bool | None = None) -> dict:
    """The RL row of one sample, its media written into `folder`; "about" holds the sample's thought."""
    sample = make_sample(skill, seed, split, think=True)
    question, assistant = sample["messages"]
    content = question["content"]
    if not isinstance(content, str):
        content = [save_part(part, folder / f"{skill}-{split}-{seed}-{i}") for i, part in enumerate(content)]
    row = {"id": f"{skill}/{split}/{seed}", "source": skill, "prompt": [question | {"content": content}]}
    row |= verifier_of(skill, assistant["content"])
    row["prompt_opened_think"] = skill == "text_math" if think is None else think
    return row | {"about": assistant["reasoning_content"]}


def is_unanswerable_from(row: dict, donor: dict) -> bool:
    """Whether the question names a colour or a shape, and nothing of what it names is in the other's picture."""
    if row["source"] not in ABOUT_THINGS or donor["source"] == "image_button":  # its thought names one button only
        return False
    words = re.findall(r"[a-z]+", row["prompt"][0]["content"][-1]["text"].lower())
    named = [word for word in words if word in COLOURS or word in SHAPES]
    return bool(named) and not any(word in donor["about"].split() for word in named)


def save_prompts(
    folder: str | Path,
    skills: list[str],
    count: int,
    split: str = "train",
    first_seed: int = 0,
    mismatched: float = 0.0,
    think: bool | None = None,
) -> list[dict]:
    """Writes `prompts.jsonl` and `media/` into `folder`.

    Args:
        count: samples of every skill, of the seeds from `first_seed` on.
        mismatched: share of unanswerable rows to add: questions about things that are not in their picture.
        think: whether the prompts open `<think>`; None: only those of text_math, which needs it.

    Returns:
        The rows, as written; paths are relative to the folder.
    """
    known = (*SKILLS, *GROUNDING_SKILLS)
    unknown = [skill for skill in skills if skill not in known]
    if unknown:
        raise ValueError(f"unknown skills {', '.join(unknown)}; known: {', '.join(known)}")
    folder = Path(folder)
    (folder / "media").mkdir(parents=True, exist_ok=True)
    seeds = range(first_seed, first_seed + count)
    rows = [prompt_row(skill, seed, folder / "media", split, think) for seed in seeds for skill in skills]
    wrong = mismatched_rows(rows, round(mismatched * len(rows)), first_seed, fits=is_unanswerable_from)
    rows += [row | {"answer": NOT_KNOWN} for row in wrong]
    for row in rows:
        del row["about"]
        for part in row["prompt"][0]["content"]:
            if isinstance(part, dict) and "path" in part:
                part["path"] = f"media/{Path(part['path']).name}"
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
