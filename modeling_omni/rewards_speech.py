"""Word error rate of transcripts after normalisation (paper section 3.2.4: the reward is 1 - WER).

The English and the general normaliser are Whisper's, as transformers ships them; British spelling is made American by
rules of our own. Languages written without spaces are counted in letters, which makes the WER a CER.
"""

import re
from collections.abc import Callable
from functools import lru_cache

from .rewards_grammar import visible

MAX_CHARS = 100_000  # of a transcript

UNSPACED = {
    "zh",
    "cmn",
    "yue",
    "wuu",
    "ja",
    "jp",
    "ko",
    "th",
    "lo",
    "km",
    "my",
    "bo",
    "chinese",
    "mandarin",
    "cantonese",
}
UNSPACED |= {"japanese", "korean", "thai", "lao", "khmer", "burmese", "tibetan"}
UNSPACED_LETTERS = re.compile(
    r"[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)
# British to American, by ending and by word. Both sides are rewritten, so a word rewritten without need does no harm.
SPELLING = [
    (re.compile(r"(?<=[a-z]{3})our"), "or"),
    (re.compile(r"(?<=[a-z]{3})is(?=(?:e|es|ed|ing|er|ers|ation|ations|able)$)"), "iz"),
    (re.compile(r"(?<=[a-z]{2})ys(?=(?:e|es|ed|ing|er|ers)$)"), "yz"),
    (re.compile(r"(?<=[a-z])(t|b)re(?=s?$)"), r"\1er"),
    (re.compile(r"(?<=[a-z]{3})ogue(?=s?$)"), "og"),
    (re.compile(r"^(defen|offen|preten|licen)c(?=es?$)"), r"\1s"),
    (re.compile(r"^practis(?=e|es|ed|ing)"), "practic"),
    (
        re.compile(
            r"^(travel|cancel|model|label|level|fuel|counsel|marvel|signal|total|quarrel|jewel|fulfil|enrol|dial|equal|"
            r"instal|skil|wil|distil|instil|channel|tunnel|panel|rival|duel|pencil|parcel|shovel|towel|"
            r"unravel|snorkel|barrel|bevel|funnel|initial|libel|pedal|spiral|trial)l(?=ed|ing|er|ers|ous|or|ors|ment|ments|ful)"
        ),
        r"\1",
    ),
]
SPELLED = """
grey gray|greys grays|cheque check|cheques checks|programme program|programmes programs|tyre tire|tyres tires|
kerb curb|plough plow|ploughed plowed|pyjamas pajamas|aluminium aluminum|mum mom|mums moms|mummy mommy|ageing aging|
jewellery jewelry|judgement judgment|judgements judgments|fulfil fulfill|enrol enroll|skilful skillful|wilful willful|
instal install|moustache mustache|sceptic skeptic|sceptical skeptical|scepticism skepticism|mould mold|mouldy moldy|
storey story|storeys stories|yoghurt yogurt|aeroplane airplane|aeroplanes airplanes|paediatric pediatric|
orthopaedic orthopedic|anaemia anemia|anaesthetic anesthetic|oesophagus esophagus|diarrhoea diarrhea|
manoeuvre maneuver|manoeuvres maneuvers|encyclopaedia encyclopedia|draught draft|draughts drafts|cosy cozy|
odour odor|odours odors|woollen woolen|artefact artifact|artefacts artifacts|axe ax|catalogue catalog|smoulder smolder|
whisky whiskey|
acknowledgement acknowledgment|haemorrhage hemorrhage|leukaemia leukemia|foetus fetus|gaol jail|maths math|
towards toward|afterwards afterward|furore furor|speciality specialty|tonne ton|tonnes tons|archaeology archeology|
archaeologist archeologist|mediaeval medieval|likeable likable|sizeable sizable|cancelled canceled|cancelling canceling
"""
SPELLED_WORDS = dict(row.split() for row in SPELLED.replace("\n", "").split("|"))


@lru_cache(4)
def text_normaliser(kind: str) -> Callable[[str], str]:
    """Whisper's normalisers as transformers ships them: "english", "unspaced" (letters apart) or "other"."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer({}) if kind == "english" else BasicTextNormalizer(split_letters=kind == "unspaced")


def american(word: str) -> str:
    """One spelling for British and American English."""
    if word in SPELLED_WORDS:
        return SPELLED_WORDS[word]
    if len(word) > 30 or len(word) < 5:
        return word
    for pattern, spelling in SPELLING:
        word = pattern.sub(spelling, word)
    return word


def without_brackets(text: str) -> str:
    """Takes [noise], <tags> and (asides) away; the normalisers' own way is quadratic in unclosed ones."""
    for opening, closing in (("[<", "]>"), ("(", ")")):
        last = max(text.rfind(char) for char in closing)
        pieces, position = [], 0
        for match in re.finditer("[" + re.escape(opening) + "]", text):
            start = match.start()
            if start < position or start > last:
                continue
            ends = [end for char in closing if (end := text.find(char, start)) >= 0]
            pieces.append(text[position:start])
            position = min(ends) + 1
        text = "".join(pieces) + text[position:]
    return re.sub(r"[][<>()]", " ", text)


def normalise_speech(text: str, lang: str | None = None) -> list[str]:
    """A transcript as the words (of languages without spaces: the letters) that are counted.

    Args:
        lang: language code or name; None: English, unless the letters say otherwise.
    """
    text = visible(text)
    code = re.split(r"[-_ ]", lang.strip().lower())[0] if lang else ""
    if not code:
        code = "zh" if len(UNSPACED_LETTERS.findall(text)) * 2 > len("".join(text.split())) else "en"
    kind = "unspaced" if code in UNSPACED else "english" if code in ("en", "eng", "english") else "other"
    text = " ".join(without_brackets(text).split())
    # numbers that Python refuses to read (4,300 digits) or takes long over; a letter in front makes them words
    text = re.sub(r"[0-9]{60,}", lambda match: "\ue000" + match.group(), text)
    try:
        words = text_normaliser(kind)(text).split()
    except (ValueError, AssertionError, ArithmeticError, RecursionError):
        words = text_normaliser("other")(text).split()
    words = [word for word in words if any(char.isalnum() for char in word)]
    return [american(word) for word in words] if kind == "english" else words


@lru_cache(1024)
def gold_words(gold: str, lang: str) -> tuple[str, ...]:
    """A gold transcript's words; the rollouts of a prompt share them."""
    return tuple(normalise_speech(gold, lang))


def asr_wer(prediction: str, gold: str, lang: str | None = None) -> float:
    """1 - WER after normalisation, not below 0; character errors for languages without spaces.

    Silence (a gold transcript without words) scores 1 where nothing was said either, else 0.
    """
    # most of such an answer would be insertions, whatever the words
    if len(gold) > MAX_CHARS or len(prediction) > 10 * len(gold) + 1000:
        return 0.0
    if not lang and len(UNSPACED_LETTERS.findall(gold)) * 2 > len("".join(gold.split())):
        lang = "zh"
    wanted, words = gold_words(gold, lang or "en"), normalise_speech(prediction, lang or "en")
    if not wanted:
        return float(not words)
    if not words or len(words) >= 2 * len(wanted):
        return 0.0
    import jiwer

    return max(0.0, 1.0 - jiwer.wer(" ".join(wanted), " ".join(words)))


__all__ = ["asr_wer", "normalise_speech"]
