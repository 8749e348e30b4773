"""Tasks in text alone: copying, sums with a short thought, and the questions of every media skill over descriptions.

A language model that cannot look up "red circle top left, blue star right: what colour is the circle?" learns nothing
from an image of the same scene, so these come first (README, "How nano is trained").
"""

import random

from . import scenes
from .vocabulary import COMMAND_WORDS, DIGIT_WORDS, PLACES, PRINTED_WORDS, SPOKEN_WORDS, in_split

LETTERS_UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERS_LOWER = LETTERS_UPPER.lower()

# question, answer, thought
Exchange = tuple[str, str, str]


def random_string(rng: random.Random, letters: str, shortest: int, longest: int, split: str) -> str:
    """A random string of `letters` that belongs to `split`."""
    while True:
        text = "".join(rng.choices(letters, k=rng.randint(shortest, longest)))
        if len(text) < 3 or in_split(text, split):
            return text


def split_scene(draw, split: str) -> list[scenes.Thing]:
    """Draws scenes until one belongs to `split`."""
    while True:
        things = draw()
        if in_split(scenes.describe(things), split):
            return things


def printed_word(rng: random.Random, split: str) -> str:
    """An upper-case word of 2-5 letters to show in a picture: a real one or a random string."""
    if rng.random() < 0.5:
        return rng.choice(PRINTED_WORDS[split])
    return random_string(rng, LETTERS_UPPER, 2, 5, split)


def copy(rng: random.Random, split: str) -> Exchange:
    how = rng.randrange(5)
    if how == 0:
        text = " ".join(rng.choices(SPOKEN_WORDS, k=rng.randint(1, 4)))
    elif how == 1:
        text = random_string(rng, "0123456789", 1, 6, split)
    elif how == 2:
        text = random_string(rng, LETTERS_LOWER, 2, 6, split)
    else:
        text = printed_word(rng, split)
    question = rng.choice((f"Repeat: {text}", f"Copy this: {text}", f"Say {text}", f"Repeat after me: {text}"))
    return question, text, f"i copy {text}"


def read(rng: random.Random, split: str) -> Exchange:
    """The twin of reading pictures: a sign's letters come one by one."""
    if rng.random() < 0.6:
        text = printed_word(rng, split)
        shown = rng.choice((" ".join(text), text))
        fact = rng.choice((f"A sign shows {shown}.", f"The word is {shown}.", f"The letters are {shown}."))
        question = rng.choice(READ_WORD_QUESTIONS)
    else:
        text = random_string(rng, "0123456789", 1, 4, split)
        shown = rng.choice((" ".join(text), text))
        fact = rng.choice((f"A sign shows {shown}.", f"The number is {shown}.", f"The digits are {shown}."))
        question = rng.choice(READ_DIGITS_QUESTIONS)
    return f"{fact}\n{scenes.vary(question, rng)}", text, " ".join(text)


def speech(rng: random.Random, split: str) -> Exchange:
    """The twin of listening: words to words, or digit words to digits."""
    if rng.random() < 0.5:
        words = rng.choices(DIGIT_WORDS, k=rng.randint(1, 4))
        question, answer = rng.choice(HEAR_DIGITS_QUESTIONS), scenes.digits_of(words)
    else:
        words = rng.choices(COMMAND_WORDS + (DIGIT_WORDS if rng.random() < 0.2 else ()), k=rng.randint(1, 3))
        question, answer = rng.choice(HEAR_WORDS_QUESTIONS), " ".join(words)
    if rng.random() < 0.15:
        question, answer = rng.choice(HEAR_COUNT_QUESTIONS), str(len(words))
    said = " ".join(words)
    fact = rng.choice((f"A voice says {said}.", f"You hear {said}.", f"The speech is {said}."))
    return f"{fact}\n{scenes.vary(question, rng)}", answer, said


def scene(kind: str, rng: random.Random, split: str) -> Exchange:
    """The twin of the picture questions: the same questions over a description in any order."""
    things = split_scene(lambda: scenes.scene_of(kind, rng), split)
    question, answer = scenes.ask_scene(kind, things, rng, rng.choice(("picture", "text")))
    shown = [thing.sentence() for thing in rng.sample(things, len(things))]
    if rng.random() < 0.3:
        with_article = [("an " if sentence[0] in "aeiou" else "a ") + sentence for sentence in shown]
        fact = rng.choice(("There is ", "You see ")) + " and ".join(with_article)
    else:
        fact = ", ".join(shown)
    return f"{fact}.\n{scenes.vary(question, rng)}", answer, scenes.describe(things)


def recall(rng: random.Random, split: str) -> Exchange:
    """Several look-ups at once. One answer per scene teaches a model to name anything that was mentioned; many teach it
    to look."""
    things = split_scene(lambda: scenes.random_things(rng, rng.randint(2, 6)), split)
    question, answer = ask_recall(things, rng)
    fact = ", ".join(thing.sentence() for thing in rng.sample(things, len(things)))
    return f"{fact}.\n{question}", answer, scenes.describe(things)


def ask_recall(things: list[scenes.Thing], rng: random.Random) -> tuple[str, str]:
    """One property of every thing, asked by another; half of the answers say the key again before its value."""
    views = {"colour": lambda t: t.colour, "shape": lambda t: t.shape, "place": lambda t: PLACES[t.place]}
    value, key = rng.sample(list(views), 2)
    asked = rng.sample(things, len(things))
    keys = ", ".join(views[key](thing) for thing in asked)
    question = {"colour": "What colour is the", "shape": "What shape is the", "place": "Where is the"}[value]
    answers = [views[value](thing) for thing in asked]
    if rng.random() < 0.5:
        answers = [f"{views[key](thing)} {answer}" for thing, answer in zip(asked, answers, strict=True)]
        question = "List. " + question
    return f"{question} {keys}?", ", ".join(answers)


def motion(rng: random.Random, split: str) -> Exchange:
    """The twin of the video questions."""
    things = split_scene(lambda: scenes.moving_things(rng), split)
    kind = rng.choice(("direction", "direction", "mover", "mover", "describe_motion"))
    question, answer = scenes.ask_motion(kind, things, rng, rng.choice(("video", "clip", "text")))
    fact = ", ".join(thing.sentence() for thing in rng.sample(things, len(things)))
    return f"{fact}.\n{scenes.vary(question, rng)}", answer, scenes.describe(things)


def turning_thing(rng: random.Random, split: str) -> tuple[scenes.Thing, list[str]]:
    """A shape and the ways it moves, one after the other, that belong to `split`."""
    while True:
        (thing,), motions = scenes.random_things(rng, 1), scenes.random_turns(rng)
        if in_split(scenes.tell_turns(thing, motions), split):
            return thing, motions


def turns(rng: random.Random, split: str) -> Exchange:
    """The twin of longer clips."""
    thing, motions = turning_thing(rng, split)
    question, answer, thought = scenes.ask_turns(thing, motions, rng)
    return f"{thing.name} moves {', then '.join(motions)}.\n{scenes.vary(question, rng)}", answer, thought


def random_pages(rng: random.Random, split: str) -> list[str]:
    """What stands on two to six pages: words and numbers, all different."""
    pages: list[str] = []
    count = rng.randint(2, 6)
    while len(pages) < count:
        page = printed_word(rng, split) if rng.random() < 0.5 else random_string(rng, "0123456789", 1, 3, split)
        if page not in pages:
            pages.append(page)
    return pages


def ask_pages(pages: list[str], rng: random.Random) -> tuple[str, str, str]:
    """A question about pages in their order: question, answer, thought."""
    number = rng.randrange(len(pages))
    told = ", ".join(f"page {place} {page}" for place, page in enumerate(pages, 1))
    return *rng.choice((
        (f"What is on page {number + 1}?", pages[number]),
        (f"On which page is {pages[number]}?", str(number + 1)),
        ("How many pages are there?", str(len(pages))),
        ("What is on the last page?", pages[-1]),
    )), told  # fmt: skip


def pages(rng: random.Random, split: str) -> Exchange:
    """The twin of several pages."""
    shown = random_pages(rng, split)
    question, answer, thought = ask_pages(shown, rng)
    fact = ". ".join(f"Page {place}: {page}" for place, page in enumerate(shown, 1))
    return f"{fact}.\n{scenes.vary(question, rng)}", answer, thought


def heard_motion(rng: random.Random, split: str) -> Exchange:
    """The twin of a video with sound."""
    things = split_scene(lambda: scenes.moving_things(rng), split)
    question, answer, words = ask_heard_motion(things, rng)
    said, fact = " ".join(words), ", ".join(thing.sentence() for thing in things)
    return f"{fact}. A voice says {said}.\n{scenes.vary(question, rng)}", answer, thought_heard_motion(things, words)


def heard_picture(rng: random.Random, split: str) -> Exchange:
    """The twin of a picture with a spoken word."""
    things = split_scene(lambda: scenes.random_things(rng, rng.choice((1, 2, 2, 3))), split)
    question, answer, words = ask_heard_picture(things, rng)
    shown = ", ".join(thing.sentence() for thing in rng.sample(things, len(things)))
    fact = f"{shown}. A voice says {' '.join(words)}."
    return f"{fact}\n{scenes.vary(question, rng)}", answer, thought_heard_motion(things, words)


def ask_button(buttons: list, rng: random.Random) -> tuple[str, str, str]:
    """Which of the buttons (`images.Button`) to press: question, answer (its centre in percent), thought."""
    button = rng.choice(buttons)
    name = f"the {button.colour} button" if rng.random() < 0.5 else f"the button {button.label}"
    question = rng.choice((f"Point at {name}.", f"Click {name}.", f"Where do I click for {name}?"))
    return question, button.point, f"{button.colour} button {button.label} at {button.point}"


def button(rng: random.Random, split: str) -> Exchange:
    """The twin of pointing at a button."""
    from .images import random_buttons

    buttons = random_buttons(rng, split)
    question, answer, thought = ask_button(buttons, rng)
    fact = ", ".join(f"{one.colour} button {one.label} at {one.point}" for one in buttons)
    return f"{fact}.\n{scenes.vary(question, rng)}", answer, thought


def thought_heard_motion(things: list[scenes.Thing], words: list[str]) -> str:
    return f"{scenes.describe(things)}. a voice says {' '.join(words)}"


def ask_heard_motion(things: list[scenes.Thing], rng: random.Random) -> tuple[str, str, list[str]]:
    """A question about moving shapes and spoken words: question, answer, the words to speak."""
    mover = next((t for t in things if t.motion != scenes.STILL), None)
    word = rng.choice(COMMAND_WORDS)
    how = rng.random()
    if mover is None or how < 0.25:
        words = [word] if rng.random() < 0.7 else rng.choices(COMMAND_WORDS, k=2)
        return rng.choice(HEAR_WORDS_QUESTIONS[:2] + ("What does the voice in the video say?",)), " ".join(words), words
    if how < 0.55:
        word = mover.motion if rng.random() < 0.5 else rng.choice([w for w in scenes.MOTIONS if w != mover.motion])
        question = rng.choice(
            ("Does the spoken word match the motion?", "Is the spoken direction the direction of motion?")
        )
        return question, "yes" if word == mover.motion else "no", [word]
    if how < 0.7:
        return f"Which way does the {mover.shape} move and what is said?", f"{mover.motion}, {word}", [word]
    if how < 0.85:
        colour_word = rng.choice(("colour", "color"))
        return f"What {colour_word} moves and what word is said?", f"{mover.colour}, {word}", [word]
    return f"Which way does the {mover.shape} move?", mover.motion, [word]


def ask_heard_picture(things: list[scenes.Thing], rng: random.Random) -> tuple[str, str, list[str]]:
    """A question about still shapes and a spoken word that names one of them: question, answer, the words to speak."""
    thing, how = rng.choice(things), rng.random()
    spoken_shapes = [t for t in things if t.shape in COMMAND_WORDS]
    if how < 0.5 and spoken_shapes:
        thing = rng.choice(spoken_shapes)
        question, answer = rng.choice(
            (
                ("Where is the spoken shape?", scenes.PLACES[thing.place]),
                ("What colour is the spoken shape?", thing.colour),
                ("What color is the spoken shape?", thing.colour),
            )
        )
        return question, answer, [thing.shape]
    spoken_colours = [c for c in scenes.COLOUR_NAMES if c in COMMAND_WORDS]
    colour = thing.colour if thing.colour in spoken_colours and rng.random() < 0.5 else rng.choice(spoken_colours)
    found = [t for t in things if t.colour == colour]
    if found and rng.random() < 0.5:
        return rng.choice(
            (
                ("Which shape has the spoken colour?", found[0].shape, [colour]),
                ("Which shape has the spoken color?", found[0].shape, [colour]),
                ("Where is the shape of the spoken colour?", scenes.PLACES[found[0].place], [colour]),
            )
        )
    question = rng.choice(("Is the spoken colour in the picture?", "Is the spoken color in the picture?"))
    return question, "yes" if found else "no", [colour]


def arithmetic(rng: random.Random, split: str) -> Exchange:
    """a + b or a - b >= 0 with numbers up to 99, done column by column in the thought."""
    while True:
        plus, a, b = rng.random() < 0.5, rng.randint(0, 99), rng.randint(0, 99)
        if not plus:
            a, b = max(a, b), min(a, b)
        if in_split(f"{a} {'+' if plus else '-'} {b}", split):
            return _ask_sum(rng, a, b, plus)


def small_sum(rng: random.Random, split: str) -> Exchange:
    """The facts under `arithmetic`: a + b up to 9 + 9 and its inverse. There are 200, so no split holds any out."""
    a, b, plus = rng.randint(0, 9), rng.randint(0, 9), rng.random() < 0.5
    return _ask_sum(rng, a if plus else a + b, b, plus)


def _ask_sum(rng: random.Random, a: int, b: int, plus: bool) -> Exchange:
    text = f"{a} {'+' if plus else '-'} {b}"
    question = rng.choice((f"What is {text}?", f"{text} = ?", f"Calculate {text}.", f"How much is {text}?"))
    return question, str(a + b if plus else a - b), sum_thought(a, b, plus)


def sum_thought(a: int, b: int, plus: bool) -> str:
    """Column arithmetic from the right: "47 + 38: 7 + 8 = 15, 4 + 3 + 1 = 8"; a borrow writes 12 - 7."""
    steps, carry = [], 0
    columns = max(len(str(a)), len(str(b)))
    for place in range(columns):
        x, y = a // 10**place % 10, b // 10**place % 10
        if plus:
            total = x + y + carry
            steps.append(f"{x} + {y}" + (" + 1" if carry else "") + f" = {total}")
            carry = total // 10
        else:
            x, borrow = x - carry, x - carry < y
            steps.append(f"{x + 10 * borrow} - {y} = {x + 10 * borrow - y}")
            carry = int(borrow)
    return f"{a} {'+' if plus else '-'} {b}: " + ", ".join(steps)


GREETINGS = ("Hello!", "Hi!", "Good day!", "Hello, nano!", "Hi there!")
ABOUT = ("Who are you?", "What are you?", "What is your name?")
ABILITIES = ("What can you do?", "How can you help me?", "What do you know?")
UNKNOWN = (
    "Who wrote Hamlet?", "What is the capital of France?", "Tell me a joke.", "Write a poem.", "Why is the sky blue?",
    "Who won the game?", "What is the weather like?", "Translate this to German.", "How old is the earth?",
    "Explain gravity.", "What time is it?", "Write some code.", "Who is the president?", "Tell me a story.",
)  # fmt: skip
UNKNOWN_HELDOUT = (
    "Who painted this?",
    "What is a black hole?",
    "Sing a song.",
    "How do I bake bread?",
    "When is lunch?",
)


def chat(rng: random.Random, split: str) -> Exchange:
    how = rng.random()
    if how < 0.3:
        return (
            scenes.vary(rng.choice(GREETINGS), rng),
            "Hello! Show me a picture, a video or speech.",
            "this is a greeting",
        )
    if how < 0.5:
        return scenes.vary(rng.choice(ABOUT), rng), "I am nano, a small omni model.", "i am nano"
    if how < 0.7:
        answer = "I name shapes and colours, count, read words and digits, hear words and see motion."
        return scenes.vary(rng.choice(ABILITIES), rng), answer, "i say what i can do"
    question = rng.choice(UNKNOWN if split == "train" else UNKNOWN_HELDOUT)
    return scenes.vary(question, rng), "I do not know. I am a small model.", "i do not know this"


READ_WORD_QUESTIONS = (
    "Read the word.", "What word is shown?", "What does it say?", "Read the text.", "Which word is in the picture?",
)  # fmt: skip
READ_LINES_QUESTIONS = ("Read every line.", "Read all the text.", "Read the lines from top to bottom.")
READ_DIGITS_QUESTIONS = (
    "Read the digits.", "What number is shown?", "Read the number.", "Which digits are in the picture?",
)  # fmt: skip
READ_HANDWRITING_QUESTIONS = (
    "Read the handwritten digits.", "What number is handwritten?", "Which digits are handwritten?",
)  # fmt: skip
HEAR_WORDS_QUESTIONS = (
    "What is said?", "What does the voice say?", "Transcribe the speech.", "Which words do you hear?",
)  # fmt: skip
HEAR_DIGITS_QUESTIONS = (
    "Which digits are spoken?", "What number is said?", "Write the digits you hear.", "Which digits do you hear?",
)  # fmt: skip
HEAR_COUNT_QUESTIONS = ("How many words are said?", "How many words do you hear?", "Count the words.")
