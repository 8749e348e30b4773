"""Short clips of the nano world: one shape moves (or none), alone or beside one that stays, with or without speech.

Frames are uint8 [T, H, W, 3] (T 4-12, mostly 8, sides 64 or 96), at about 4 frames per second; sound is 16 kHz mono.
"""

import random

import numpy as np
from PIL import Image

from . import images, scenes, speech, text
from .vocabulary import COLOURS, MOTIONS, SHAPES, sample_random

MOTION_CLASSES = ("none", scenes.STILL, *MOTIONS)  # dense labels, channel 4
FRAME_RATES = (2.0, 4.0, 4.0, 4.0, 5.0)


def random_shape(rng: random.Random) -> tuple[int, int, int]:
    """Frames, height and width."""
    count = 8 if rng.random() < 0.6 else rng.choice((4, 6, 10, 12))
    side = (64, 64) if rng.random() < 0.6 else rng.choice(((96, 96), (64, 96), (96, 64)))
    return count, *side


def draw_clip(
    things: list[scenes.Thing], rng: random.Random, count: int, height: int, width: int
) -> tuple[np.ndarray, list[list[images.Ink]]]:
    """Frames uint8 [count, height, width, 3] of the things and, per frame, what was painted.

    The mover crosses at least a third of the picture at a steady pace; what stays is out of its way.
    """
    colours = {thing.colour: images.jittered(thing.colour, rng) for thing in things}
    ground, _ = images.background(rng, height, width, list(colours.values()))
    side = min(height, width)
    mover = next((thing for thing in things if thing.motion != scenes.STILL), None)
    horizontal = mover is None or MOTIONS[mover.motion][0] != 0
    lanes = (0.28, 0.72) if len(things) == 2 else (rng.uniform(0.3, 0.7),)
    lanes = rng.sample(lanes, len(lanes))
    masks, paths = [], []
    for thing, lane in zip(things, lanes, strict=True):
        radius = rng.uniform(0.13, 0.19 if len(things) == 2 else 0.24) * side
        masks.append(images.shape_mask(thing.shape, radius, rng))
        length = width if horizontal else height
        across = lane * (height if horizontal else width) + rng.uniform(-0.03, 0.03) * side
        near, far = radius * 0.8, length - radius * 0.8
        if thing.motion == scenes.STILL:
            along = np.full(count, rng.uniform(near, far))
        else:
            travel = rng.uniform(0.35, 0.95) * (far - near)
            begin = rng.uniform(near, far - travel)
            along = begin + travel * np.linspace(0, 1, count)
            if min(MOTIONS[thing.motion]) < 0:  # left or up
                along = along[::-1]
        paths.append((along, np.full(count, across)) if horizontal else (np.full(count, across), along))
    return render(things, masks, paths, [colours[thing.colour] for thing in things], ground, rng)


def render(
    things: list[scenes.Thing], masks: list[np.ndarray], paths: list[tuple], tones: list, ground: np.ndarray, rng
) -> tuple[np.ndarray, list[list[images.Ink]]]:
    """Frames of things along their paths (x of every frame, y of every frame), with a camera's faults; and the inks."""
    count, (height, width, _) = len(paths[0][0]), ground.shape
    shake = rng.uniform(0, 0.6) if rng.random() < 0.3 else 0.0
    gain, shift, noise = rng.uniform(0.92, 1.05), rng.uniform(-8, 8), rng.uniform(0, 7) if rng.random() < 0.7 else 0.0
    quality = rng.randint(55, 95) if rng.random() < 0.2 else None
    frames, inks = np.empty((count, height, width, 3), np.uint8), []
    for number in range(count):
        picture, painted = ground.copy(), []
        for thing, mask, (xs, ys), tone in zip(things, masks, paths, tones, strict=True):
            x = round(xs[number] + shake * rng.uniform(-1, 1) - mask.shape[1] / 2)
            y = round(ys[number] + shake * rng.uniform(-1, 1) - mask.shape[0] / 2)
            images.paint(picture, mask, x, y, tone)
            painted.append(images.Ink(mask, x, y, 1 + SHAPES.index(thing.shape), 1 + list(COLOURS).index(thing.colour)))
        picture = picture * gain + shift
        if noise:
            picture += noise * images.noise(rng, height, width)
        frames[number] = np.clip(picture, 0, 255).astype(np.uint8)
        if quality:
            frames[number] = np.asarray(images.through_jpeg(Image.fromarray(frames[number]), quality))
        inks.append(painted)
    return frames, inks


def as_clip(frames: np.ndarray, rate: float, audio: np.ndarray | None = None):
    """A `VideoClip` of frames at `rate` per second, with sound or without."""
    from ..media import VideoClip

    return VideoClip(
        frames=frames, frame_indices=list(range(len(frames))), fps=rate, duration=len(frames) / rate, audio=audio
    )


def motion_sample(kind: str, rng: random.Random, split: str) -> tuple:
    """Clip, question, answer and thought for one kind of `scenes.ask_motion`."""
    things = text.split_scene(lambda: scenes.moving_things(rng), split)
    frames, _ = draw_clip(things, rng, *random_shape(rng))
    question, answer = scenes.ask_motion(kind, things, rng, rng.choice(("video", "clip")))
    return as_clip(frames, rng.choice(FRAME_RATES)), scenes.vary(question, rng), answer, scenes.describe(things)


def heard_motion_sample(rng: random.Random, split: str) -> tuple:
    """The same with a voice in the clip, and questions of which most need both."""
    things = text.split_scene(lambda: scenes.moving_things(rng), split)
    question, answer, words = text.ask_heard_motion(things, rng)
    audio, _, _ = speech.spoken_utterance(rng, split, words)
    count, height, width = random_shape(rng)
    frames, _ = draw_clip(things, rng, count, height, width)
    rate = rng.choice(FRAME_RATES)
    length = max(len(audio), round(count / rate * speech.RATE))  # a voice that takes longer keeps its last word
    sound = np.zeros(length, np.float32)
    begin = rng.randrange(length - len(audio) + 1)
    sound[begin : begin + len(audio)] = audio
    thought = text.thought_heard_motion(things, words)
    return as_clip(frames, rate, sound), scenes.vary(question, rng), answer, thought


def turns_sample(rng: random.Random, split: str) -> tuple:
    """A longer clip: one shape that moves two to four times, each time another way."""
    thing, motions = text.turning_thing(rng, split)
    side, part = rng.choice((64, 96)), rng.choice((4, 6))
    steps = np.repeat([MOTIONS[motion] for motion in motions], part, axis=0).astype(float)  # [T, 2]
    corners = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])[:-1] / part
    low, high = corners.min(0), corners.max(0)
    stride = min(rng.uniform(0.3, 0.5), 0.62 / (high - low).max())
    start = [rng.uniform(0.19 - stride * a, 0.81 - stride * b) for a, b in zip(low, high, strict=True)]
    xs, ys = ((start + stride * corners) * side).T
    tone = images.jittered(thing.colour, rng)
    ground, _ = images.background(rng, side, side, [tone])
    mask = images.shape_mask(thing.shape, rng.uniform(0.13, 0.18) * side, rng)
    frames, _ = render([thing], [mask], [(xs, ys)], [tone], ground, rng)
    question, answer, thought = scenes.ask_turns(thing, motions, rng)
    return as_clip(frames, rng.choice(FRAME_RATES)), scenes.vary(question, rng), answer, thought


def dense_video_sample(seed: int, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """A clip and labels of every 4x4 cell of every pair of frames, to teach the vision tower motion.

    Returns:
        frames uint8 [T, H, W, 3] (T even); labels int64 [5, T / 2, H / 4, W / 4]: thing, colour, column, row (as in
        `dense_image_sample`) and motion (MOTION_CLASSES), from the ink of both frames of a pair.
    """
    rng = sample_random("dense_video", seed, split)
    things = scenes.moving_things(rng)
    count, height, width = random_shape(rng)
    frames, inks = draw_clip(things, rng, count, height, width)
    motions = {1 + SHAPES.index(t.shape): MOTION_CLASSES.index(t.motion) for t in things}  # shapes of a clip differ
    labels = np.zeros((5, count // 2, height // images.CELL, width // images.CELL), np.int64)
    for pair in range(count // 2):
        labels[:4, pair] = images.dense_labels(inks[2 * pair] + inks[2 * pair + 1], height, width)
    labels[4] = np.where(labels[0] == images.IGNORE, images.IGNORE, 0)
    for thing, motion in motions.items():
        labels[4][labels[0] == thing] = motion
    return frames, labels
