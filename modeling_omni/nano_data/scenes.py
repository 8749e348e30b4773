"""What a picture or a clip shows, the sentence that says it, and questions with their answers.

The same `Scene` is written out as text (the language model learns to look facts up before it sees anything), drawn
(`images.py`) or animated (`video.py`), so every skill over media has its twin over text.
"""

import random
from dataclasses import dataclass

from .vocabulary import COLOURS, DIGIT_WORDS, MOTIONS, PLACES, SHAPES

COLOUR_NAMES = tuple(COLOURS)
STILL = "stays"
# questions that a Scene of shapes answers; SCENE_KINDS with "motion" need moving shapes
SHAPE_KINDS = ("colour", "shape", "where", "count", "relation", "describe")


@dataclass
class Thing:
    """One shape. `place` indexes PLACES; `motion` is a key of MOTIONS, STILL, or None in a picture."""

    colour: str
    shape: str
    place: int
    motion: str | None = None

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def sentence(self) -> str:
        if self.motion is None:
            return f"{self.name} {PLACES[self.place]}"
        return f"{self.name} {STILL}" if self.motion == STILL else f"{self.name} moves {self.motion}"


def describe(things: list[Thing]) -> str:
    """The canonical description, in reading order: "red circle top left, blue star right"."""
    return ", ".join(thing.sentence() for thing in sorted(things, key=lambda t: t.place))


def random_things(rng: random.Random, count: int, distinct: bool = True) -> list[Thing]:
    """`count` shapes in different places; `distinct` ones also differ in colour and in shape."""
    places = rng.sample(range(9), count)
    if distinct:
        colours, shapes = rng.sample(COLOUR_NAMES, count), rng.sample(SHAPES, count)
    else:
        # few kinds, so that counting one of them is a question
        colours = rng.choices(rng.sample(COLOUR_NAMES, 2), k=count)
        shapes = rng.choices(rng.sample(SHAPES, 2), k=count)
    return [Thing(c, s, p) for c, s, p in zip(colours, shapes, places, strict=True)]


def scene_of(kind: str, rng: random.Random) -> list[Thing]:
    """Random shapes that suit a question of `kind` (one of SHAPE_KINDS)."""
    if kind == "count":
        count = rng.randint(1, 6)
        if rng.random() < 0.5:  # all alike
            colour, shape = rng.choice(COLOUR_NAMES), rng.choice(SHAPES)
            return [Thing(colour, shape, p) for p in rng.sample(range(9), count)]
        return random_things(rng, count, distinct=False)
    if kind == "relation":
        return random_things(rng, rng.choice((2, 2, 3)))
    return random_things(rng, rng.choice((1, 1, 2, 2, 3)))


def ask_scene(kind: str, things: list[Thing], rng: random.Random, noun: str) -> tuple[str, str]:
    """A question of `kind` about still shapes and its answer. `noun` is what the scene is ("picture", "text", ...)."""
    thing, alone = rng.choice(things), len(things) == 1
    colour_word = rng.choice(("colour", "color"))
    if kind == "colour":
        subject = "shape" if alone and rng.random() < 0.5 else thing.shape
        return rng.choice(
            (
                f"What {colour_word} is the {subject}?",
                f"Which {colour_word} is the {subject}?",
                f"Name the {colour_word} of the {subject}.",
            )
        ), thing.colour
    if kind == "shape":
        if alone and rng.random() < 0.5:
            return rng.choice(
                ("What shape is it?", "Which shape is this?", f"Name the shape in the {noun}.")
            ), thing.shape
        if rng.random() < 0.3:
            return rng.choice((f"What shape is at the {PLACES[thing.place]}?",
                               f"Which shape is at the {PLACES[thing.place]}?")), thing.shape  # fmt: skip
        return rng.choice(
            (
                f"What shape is {thing.colour}?",
                f"Which shape is {thing.colour}?",
                f"Name the {thing.colour} shape.",
            )
        ), thing.shape
    if kind == "where":
        subject = rng.choice((thing.shape, thing.name, f"{thing.colour} shape"))
        if alone and rng.random() < 0.3:
            subject = "shape"
        return rng.choice(
            (
                f"Where is the {subject}?",
                f"Where in the {noun} is the {subject}?",
                f"In which part of the {noun} is the {subject}?",
            )
        ), PLACES[thing.place]
    if kind == "count":
        return _ask_count(things, rng, noun)
    if kind == "relation":
        return _ask_relation(things, rng, noun)
    if kind == "describe":
        return rng.choice((
            f"Describe the {noun}.", f"What is in the {noun}?", f"What does the {noun} show?",
        )), describe(things)  # fmt: skip
    raise ValueError(f"unknown kind of question {kind!r}")


def _ask_count(things: list[Thing], rng: random.Random, noun: str) -> tuple[str, str]:
    how = rng.random()
    if how < 0.5:
        return rng.choice((
            "How many shapes are there?", f"How many shapes are in the {noun}?", "Count the shapes.",
        )), str(len(things))  # fmt: skip
    if how < 0.8:
        shape = rng.choice(things).shape
        plural = {"cross": "crosses"}.get(shape, shape + "s")
        count = sum(t.shape == shape for t in things)
        return rng.choice((f"How many {plural} are there?", f"Count the {plural}.")), str(count)
    colour = rng.choice(things).colour
    count = sum(t.colour == colour for t in things)
    return rng.choice((f"How many {colour} shapes are there?", f"Count the {colour} shapes.")), str(count)


def _ask_relation(things: list[Thing], rng: random.Random, noun: str) -> tuple[str, str]:
    if rng.random() < 0.35:
        if rng.random() < 0.5:
            return f"Is there a {rng.choice(things).name} in the {noun}?", "yes"
        colour, shape = rng.choice(COLOUR_NAMES), rng.choice(SHAPES)
        found = any(t.colour == colour and t.shape == shape for t in things)
        return f"Is there a {colour} {shape} in the {noun}?", "yes" if found else "no"
    one, other = rng.sample(things, 2)
    (y1, x1), (y2, x2) = divmod(one.place, 3), divmod(other.place, 3)
    relations = []  # only those that the two places make certain
    if x1 != x2:
        relations += [("left of", x1 < x2), ("right of", x1 > x2)]
    if y1 != y2:
        relations += [("above", y1 < y2), ("below", y1 > y2)]
    word, true = rng.choice(relations)
    if rng.random() < 0.5:
        return f"Is the {one.shape} {word} the {other.shape}?", "yes" if true else "no"
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    word = word if true else opposite[word]
    return f"Which shape is {word} the {other.shape}?" if len(things) == 2 else (
        f"Is the {one.shape} {word} the {other.shape}?"), one.shape if len(things) == 2 else "yes"  # fmt: skip


def moving_things(rng: random.Random) -> list[Thing]:
    """One shape that moves (or stays), or two of which exactly one moves."""
    things = random_things(rng, rng.choice((1, 2)))
    for thing in things:
        thing.motion = STILL
    if len(things) == 2 or rng.random() < 0.85:
        things[rng.randrange(len(things))].motion = rng.choice(tuple(MOTIONS))
    # places order the description; a clip is described mover first, because the mover changes its place
    mover_first = sorted(things, key=lambda t: t.motion == STILL)
    for order, thing in enumerate(mover_first):
        thing.place = order
    return mover_first


def ask_motion(kind: str, things: list[Thing], rng: random.Random, noun: str) -> tuple[str, str]:
    """A question about moving shapes: kind "direction", "mover" or "describe_motion"."""
    mover = next((t for t in things if t.motion != STILL), None)
    if kind == "direction":
        if mover is None or rng.random() < 0.12:
            thing = rng.choice(things)
            return f"Does the {thing.shape} move?", "no" if thing.motion == STILL else "yes"
        subject = rng.choice((mover.shape, mover.name, "shape" if len(things) == 1 else mover.shape))
        return rng.choice(
            (
                f"Which way does the {subject} move?",
                f"Where does the {subject} move?",
                f"In which direction does the {subject} move?",
            )
        ), mover.motion
    if kind == "mover":
        if mover is None:
            return rng.choice(("What moves?", "Which shape moves?")), "none"
        colour_word = rng.choice(("colour", "color"))
        return rng.choice(
            (
                ("Which shape moves?", mover.shape),
                (f"What {colour_word} is the moving shape?", mover.colour),
                (f"Which {colour_word} moves?", mover.colour),
                (f"What moves {mover.motion}?", mover.name),
                ("What moves?", mover.name),
            )
        )
    if kind == "describe_motion":
        return rng.choice((f"Describe the {noun}.", f"What happens in the {noun}?", "What moves where?")), describe(
            things
        )
    raise ValueError(f"unknown kind of question {kind!r}")


def random_turns(rng: random.Random) -> list[str]:
    """Two to four motions, no two alike in a row."""
    motions: list[str] = []
    for _ in range(rng.randint(2, 4)):
        motions.append(rng.choice([motion for motion in MOTIONS if motions[-1:] != [motion]]))
    return motions


def tell_turns(thing: Thing, motions: list[str]) -> str:
    return f"{thing.name} moves {', '.join(motions)}"


def ask_turns(thing: Thing, motions: list[str], rng: random.Random) -> tuple[str, str, str]:
    """A question about one shape's motions in their order: question, answer, thought."""
    return *rng.choice((
        (f"Which way does the {thing.shape} move first?", motions[0]),
        (f"Which way does the {thing.shape} move last?", motions[-1]),
        (f"How many times does the {thing.shape} change its way?", str(len(motions) - 1)),
        (f"Which ways does the {thing.shape} move?", ", ".join(motions)),
    )), tell_turns(thing, motions)  # fmt: skip


def vary(question: str, rng: random.Random) -> str:
    """People also type without capitals and without the question mark."""
    if rng.random() < 0.2:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question


def digits_of(words: list[str]) -> str:
    """["three", "seven"] -> "37"."""
    return "".join(str(DIGIT_WORDS.index(word)) for word in words)
