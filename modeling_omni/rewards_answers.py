"""What a short answer says: its number, the letter of its option, the point it clicks on, that it cannot be known.

Shared by the verifiers of training (`rewards.py`) and the metrics of evaluation (`metrics.py`). Everything takes time
linear in the text, or bounded, and never raises because of it.
"""

import re
from fractions import Fraction

from .rewards_text import plain_form, unwrap, visible

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
    r"(?:(?:so|thus|hence|therefore),? )?(?:(?:the |my )?(?:(?:final|correct|best|right) )?(?:answer|option|choice)"
    r"(?: is)?|it(?: is|'s)|i (?:choose|pick|select)|(?:正确)?(?:答案|选项)[是为]?|选择?)\s{0,3}[:=]?\s{0,3}",
    re.I,
)
VERDICT = re.compile(r"\s(?:is|are)(?: the)?(?: (?:correct|right|best))?(?: (?:answer|option|choice)s?)?[.!]?", re.I)
EMPHASIS = re.compile(r"(?<![\w)])(?:\*\*|__|`)|(?:\*\*|__|`)(?![\w(])")  # not the power of 2**3
AROUND = " \t\n.,:;!?*`\"'$()[]{}<>_。、【】「」"


def chosen_letters(text: str, options: dict[str, str], several: bool = False) -> str:
    """The option letters an answer commits to, sorted, upper case; "" where it names none, or more than asked for."""
    if len(text) > 10_000:
        return ""
    text = unwrap(visible(text)).strip()
    plain = EMPHASIS.sub("", text).strip()
    if plain[:1] + plain[-1:] in ("$$", "**", "__") and plain.count(plain[0]) == 2:
        plain = plain[1:-1].strip()
    for _ in range(2):  # "the answer is option B"
        plain = plain[match.end() :] if (match := LABEL.match(plain)) else plain
    head = re.match(r"[^ ,]{1,9}(?:(?:, ?| and )[^ ,]{1,9}){0,9}?(?= (?:is|are) )", plain)
    if head and VERDICT.fullmatch(plain, head.end()):
        plain = head.group()
    core = plain.strip(AROUND)
    if re.fullmatch(r"[A-Za-z]", core) and (not options or core.upper() in options):
        return core.upper()
    forms = {plain_form(text), plain_form(plain)} - {""}
    matching = [letter for letter, option in options.items() if plain_form(option) in forms]
    if len(matching) == 1:
        return matching[0]
    labelled = re.match(r"[(\[<]?([A-Za-z])([\s).:\]>,;=(。、-]+)(.+)", plain, re.DOTALL)
    behind = re.fullmatch(r"(.+?)\s?[(\[]([A-Za-z])[)\]][.!]?", plain, re.DOTALL)
    labels = [(labelled[1].upper(), labelled[3])] if labelled else []
    labels += [(behind[2].upper(), behind[1])] if behind else []
    for letter, words in labels:
        same = {plain_form(words), plain_form(words.strip(" )"))} - {""}  # as in B (dog)
        if letter in options and plain_form(options[letter]) in same:
            return letter
    if labelled and not options and re.fullmatch(r"\)|\]|[).\]]?[.:]?\s|[):]\s?", labelled[2]):
        # without the options' texts a label must look like one, and no other letter may stand behind it
        words = re.findall(r"[^\W\d_]+", labelled[3])
        if any(len(word) > 1 for word in words) and not any(len(w) == 1 and w.isupper() for w in words):
            return labelled[1].upper() if labelled[2].strip() else ""
    if several:
        letters = re.findall(r"[A-Za-z]", core)
        if re.fullmatch(
            r"[A-Z]{2,10}|\(?[A-Za-z]\)?(?:(?:\s?[,/&;、和]\s?(?:and )?|\s(?:and\s)?)\(?[A-Za-z]\)?){1,9}", core
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

PAIR = r"([+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?) ?, ?([+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?)"
POINT = re.compile(rf" ?(?:\[ ?\( ?{PAIR} ?\) ?\]|\( ?{PAIR} ?\)|\[ ?{PAIR} ?\]|\[ ?\[ ?{PAIR} ?\] ?\]|{PAIR}) ?")
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


# ---------------------------------------------------------------------------------------------------- abstention

# Written for plain forms with "not" in full. A verb may have an object, and anything may name the medium.
_MEDIUM = (
    r"(?:image|picture|photo|figure|chart|graph|table|diagram|map|screenshot|video|clip|frame|audio|recording|sound"
    r"|speech|document|page|passage|text|context|question|information|data|evidence|detail)s?"
)
_THE = r"(?:(?:the|this|that|these|any|your) )?(?:(?:given|provided|available|above|attached) )?"
_WHERE = (
    rf"(?: (?:here|alone|with certainty|(?:from|in|on|by|with|using|given|based on|based solely on) {_THE}{_MEDIUM}"
    r"(?: (?:given|provided|available|alone|itself|above))?))*"
)
_OBJECT = (
    r"(?: (?:to |about )?(?:this|it|that|so"
    r"|(?:the|this|that|your) (?:correct |exact )?(?:answer|question|information))){0,2}"
)
_VERB = r"(?:determined?|answer(?:ed)?|tell|told|say|said|known?|see|seen|identify|identified|inferred|deduced)"
_LACK = r"(?:enough|insufficient|(?:not )?sufficient|no|any|the|necessary|required|relevant)"
_FACTS = rf"(?:{_LACK} )*(?:information|evidence|data|context|details?)(?: (?:given|provided|available))?"
_ADJECTIVE = (
    r"(?:unknown|unclear|unanswerable|undetermined|indeterminate|undeterminable|inconclusive"
    r"|not (?:answerable|determinable|clear|known|certain|applicable|visible|shown|specified|stated|mentioned|given"
    r"|provided|present|depicted|indicated|available|there|in))"
)
ABSTENTIONS = re.compile(
    r"\[?idk\]?|n ?/ ?a|no answer(?: (?:possible|available|given))?|none of (?:the above|these|them) can be determined"
    rf"|(?:i|we) (?:really |honestly )?(?:do|does|did|could|would) not know{_OBJECT}{_WHERE}"
    r"|(?:i am )?not (?:sure|certain)|(?:i have )?no idea"
    rf"|(?:{_THE}(?:question|answer|{_MEDIUM}) |it |that |this )?(?:is |was )?{_ADJECTIVE}(?: {_THE}{_MEDIUM})?{_WHERE}"
    rf"|(?:it is |this is )?(?:impossible|not possible) to {_VERB}{_OBJECT}{_WHERE}"
    rf"|(?:(?:i|we) (?:am|are) )?(?:unable|not able) to {_VERB}{_OBJECT}{_WHERE}"
    rf"|(?:(?:i|we|you|it|that|this|{_THE}(?:question|answer)) )?(?:can|could) not (?:be )?{_VERB}{_OBJECT}{_WHERE}"
    rf"|(?:there is |there are )?(?:not |no |insufficient ){_FACTS}(?: to {_VERB})?{_OBJECT}{_WHERE}"
    rf"|(?:i|we) do not have {_FACTS}(?: to {_VERB}{_OBJECT})?{_WHERE}"
    rf"|{_THE}{_MEDIUM} (?:does|do) not (?:provide|contain|show|have|give|include|specify|mention|say|state|tell)"
    rf"(?: (?:us|me))?(?: {_FACTS}(?: to {_VERB})?)?{_OBJECT}"
    r"|(?:我)?(?:从|根据)?(?:这张|这个|该)?(?:图片|图像|图|视频|音频)?(?:中|里)?(?:我)?(?:无法|不能)(?:确定|回答|判断|得知|知道|看出)(?:答案)?"
    r"|(?:我)?不(?:知道|确定|清楚)|未知|无法回答(?:这个|该)?问题|(?:没有|缺乏)足够的?信息|信息不足"
)
_BESIDES = re.compile(
    r"(?:i am )?(?:very |so )?sorry|(?:my )?apologies|i apologi[sz]e|unfortunately"
    r"|i am (?:just |only )?an? [a-z ]{0,30}model"
)


def is_abstention(text: str) -> bool:
    """Whether an answer (of a box, or a whole one) says that it cannot be known, and nothing besides.

    An apology may stand beside it, and that a model is speaking; every other part must say so by itself.
    """
    if len(text) > 300:
        return False
    form = re.sub(r"\bcannot\b", "can not", re.sub(r"n't\b", " not", plain_form(text).replace("can't", "can not")))
    form = re.sub(r"\b(i|we|it|that)'(m|re|s)\b", lambda m: m[1] + {"m": " am", "re": " are", "s": " is"}[m[2]], form)
    parts = [part.strip() for part in re.split(r"[.,;:!?。、]| (?=but )", form)]
    parts = [re.sub(r"^(?:but|so|and|thus|therefore) ", "", part) for part in parts]
    said = [part for part in parts if part and not _BESIDES.fullmatch(part)]
    return bool(said) and all(map(ABSTENTIONS.fullmatch, said))
