"""The plain text of answers, which every verifier compares or reads on: one writing for signs that look the same,
without wrappers of LaTeX and Markdown. Everything takes time linear in the text and never raises because of it.
"""

import re
import unicodedata
from collections.abc import Callable

WRAPPERS = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)|[mh]box|emph|underline|f?boxed|bm"
    r"|overline(?=\s*\{[A-Z]{2}\}))\s*\{"
)
INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
DASHES = str.maketrans({**dict.fromkeys("‐‑‒–—−", "-"), **dict.fromkeys("“”„«»", '"'), **dict.fromkeys("‘’‚´", "'")})


def visible(text: str) -> str:
    """NFKC without invisible and control characters; linear time (runs of combining marks, which make the
    normalisation quadratic, are cut)."""
    if text.isascii():
        return INVISIBLE.sub("", text)
    kept, run = [], 0
    for char in text:
        if unicodedata.category(char) in ("Cf", "Cc", "Cs") and not char.isspace():
            continue
        run = run + 1 if unicodedata.combining(char) else 0
        if run <= 8:
            kept.append(char)
    return unicodedata.normalize("NFKC", "".join(kept)).translate(DASHES)


def unwrap(text: str) -> str:
    """Takes `\\text{...}`, `\\boxed{...}` and the like away at any depth, in one pass; unbalanced ones stay."""
    if "\\" not in text:
        return text
    cuts, stack = [], []
    for match in re.finditer(WRAPPERS + r"|\\[{}\\]|[{}]", text):
        mark = match.group()
        if mark == "}" and stack:
            opening = stack.pop()
            if opening is not None:
                cuts += [opening, match.span()]
        elif mark[-1] == "{" and mark != "\\{":
            stack.append(match.span() if mark != "{" else None)
    pieces, position = [], 0
    for start, end in sorted(cuts):
        pieces.append(text[position:start])
        position = end
    return "".join(pieces) + text[position:]


def plain_form(text: str) -> str:
    """What string comparison compares: NFKC, no case, wrappers, markdown, outer quotes or final punctuation."""
    text = unwrap(visible(text))
    text = re.sub(r"\^?\{?\\(?:circ|degree)\b\}?", "°", text)
    text = re.sub(r"\\([%$&#_])", r"\1", text)
    text = re.sub(r"\\[,;:!]", "", text).replace("\\ ", " ")
    text = " ".join(text.casefold().split())
    for _ in range(4):
        before = text
        for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ('"', '"'), ("'", "'"), ("`", "`")):
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
                text = text[len(opening) : -len(closing)].strip()
        if text.startswith(("**", "__")) and text[:2] == text[-2:] and len(text) > 4:
            text = text[2:-2].strip()
        elif text.startswith(("*", "_")) and text[0] == text[-1] and len(text) > 2 and text.count(text[0]) == 2:
            text = text[1:-1].strip()
        text = text.rstrip(".!?。 ") or text  # an answer that is a mark stays one
        if text == before:
            break
    return text


def pair_up(ones: list, others: list, fits: Callable) -> bool:
    """Whether every one finds another of its own that `fits(one, other)`: the first that is left."""
    left = list(others)
    for one in ones:
        match = next((i for i, other in enumerate(left) if fits(one, other)), None)
        if match is None:
            return False
        del left[match]
    return True
