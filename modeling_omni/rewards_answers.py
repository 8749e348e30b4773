"""What a short answer says: its number, the letter of its option, the point it clicks on.

Shared by the verifiers of training (`rewards.py`) and the metrics of evaluation (`metrics.py`). Everything takes time
linear in the text, or bounded, and never raises because of it.
"""

import re
from fractions import Fraction

from .rewards_grammar import plain_form, unwrap, visible

# ---------------------------------------------------------------------------------------------------- numbers

NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<currency>[$€£¥]?)(?P<late>[+-]?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.(?P<decimals>[0-9]*))?"
    r"(?:e(?P<power>[+-]?[0-9]{1,3}))? ?(?P<percent>%?)"
)


def plain_number(text: str) -> tuple[Fraction, str] | None:
    """A plain form -> (exact value, currency or percent sign); None where it is not one number."""
    match = NUMBER.fullmatch(text) if len(text) <= 200 else None
    if match is None or not (match["whole"] or match["decimals"]) or (match["sign"] and match["late"]):
        return None
    digits = (match["whole"] or "0").replace(",", "") + "." + (match["decimals"] or "0")
    value = Fraction(digits) * Fraction(10) ** int(match["power"] or 0)
    negative = "-" in (match["sign"], match["late"])
    return -value if negative else value, match["currency"] or match["percent"]


# ---------------------------------------------------------------------------------------------------- options

LABEL = re.compile(
    r"(?:the )?(?:(?:final|correct|best|right) )?(?:answer|option|choice)(?: is)?\s{0,3}[:=]?\s{0,3}", re.I
)
AROUND = " \t\n.,:;!?*`\"'$()[]{}<>_"


def chosen_letters(text: str, options: dict[str, str], several: bool = False) -> str:
    """The option letters an answer commits to, sorted, upper case; "" where it names none, or more than asked for."""
    if len(text) > 10_000:
        return ""
    text = unwrap(visible(text)).strip(AROUND[:3] + "$*`")
    text = text[match.end() :] if (match := LABEL.match(text)) else text
    core = text.strip(AROUND)
    if re.fullmatch(r"[A-Za-z]", core) and (not options or core.upper() in options):
        return core.upper()
    form = plain_form(text)
    matching = [letter for letter, option in options.items() if plain_form(option) == form]
    if form and len(matching) == 1:
        return matching[0]
    labelled = re.match(r"[(\[<]?([A-Za-z])([\s).:\]>,;=(-]+)(.+)", text, re.DOTALL)
    if labelled and labelled[1].upper() in options:
        rest = plain_form(labelled[3].strip(" )"))
        if rest and rest == plain_form(options[labelled[1].upper()]):
            return labelled[1].upper()
    if labelled and not options and re.fullmatch(r"\)|\]|[).\]]?[.:]?\s|[):]\s?", labelled[2]):
        # without the options' texts a label must look like one, and no other letter may stand behind it
        words = re.findall(r"[^\W\d_]+", labelled[3])
        if any(len(word) > 1 for word in words) and not any(len(w) == 1 and w.isupper() for w in words):
            return labelled[1].upper() if labelled[2].strip() else ""
    if several:
        letters = re.findall(r"[A-Za-z]", core)
        if re.fullmatch(
            r"[A-Z]{2,10}|\(?[A-Za-z]\)?(?:(?:\s?[,/&;]\s?(?:and )?|\s(?:and\s)?)\(?[A-Za-z]\)?){1,9}", core
        ):
            letters = [letter.upper() for letter in re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", core)] or letters
            if len(set(letters)) == len(letters):
                return "".join(sorted(letters))
    return ""


def options_of(options) -> dict[str, str]:
    """Options as texts by upper-case letter."""
    if not options:
        return {}
    if isinstance(options, dict):
        return {str(letter).strip(AROUND).upper(): str(text) for letter, text in options.items()}
    return {chr(ord("A") + i): str(text) for i, text in enumerate(options)}


# ---------------------------------------------------------------------------------------------------- points

PAIR = r"(-?[0-9]{1,30}(?:\.[0-9]{1,30})?) ?, ?(-?[0-9]{1,30}(?:\.[0-9]{1,30})?)"
POINT = re.compile(rf" ?(?:\[ ?\( ?{PAIR} ?\) ?\]|\( ?{PAIR} ?\)|\[ ?{PAIR} ?\]|{PAIR}) ?")
PLAIN_POINT = re.compile(rf" ?\(?{PAIR.replace(' ?, ?', '(?: ?, ?| )')}\)?[.]? ?")


def first_point(text: str, scale: float = 1000, tagged: bool = True) -> tuple[tuple[float, float] | None, int]:
    """(the first `<point>`'s x and y, each in 0..scale, or None; how many further points were begun or ended).

    Without `tagged` a text that is nothing but two numbers is a point too.
    """
    extra = max(text.count("<point>"), text.count("</point>")) - 1
    start = text.find("<point>")
    end = text.find("</point>", start)
    if not tagged and extra < 0 and len(text) <= 500:
        match, extra = PLAIN_POINT.fullmatch(" ".join(visible(text).split())), 0
    elif start < 0 or end < 0 or end - start > 500:
        return None, max(extra, 0)
    else:
        match = POINT.fullmatch(" ".join(visible(text[start + 7 : end]).split()))
    if match is None:
        return None, extra
    x, y = (float(number) for number in match.groups() if number is not None)
    return ((x, y) if 0 <= x <= scale and 0 <= y <= scale else None), extra


def point_of(gold) -> tuple[float, float] | None:
    """ "x,y" or a pair of numbers in [0, 1], else None."""
    try:
        x, y = (float(part) for part in (gold.strip().strip("()[]").split(",") if isinstance(gold, str) else gold))
    except (TypeError, ValueError):
        return None
    return (x, y) if 0 <= x <= 1 and 0 <= y <= 1 else None
