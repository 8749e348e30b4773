"""Word error rate of transcripts after normalisation (paper section 3.2.4: the reward is 1 - WER).

English is normalised by Whisper's normaliser as transformers ships it, with British spelling made American by rules of
our own. Its general normaliser cuts words at every combining mark, and so loses vowels and tones outside Latin; other
languages have one of our own that keeps them. Languages written without spaces are counted in letters, with the marks
on them, which makes the WER a CER.
"""

import re
import unicodedata
from functools import lru_cache

from .rewards_text import visible

MAX_CHARS = 100_000  # of a transcript
MAX_WORDS = 60_000  # or letters, of a transcript; hours of speech

UNSPACED = "zh cmn yue wuu zho chi ja jp jpn ko kor th tha lo lao km khm my mya bur bo bod tib chinese mandarin "
UNSPACED = set((UNSPACED + "cantonese japanese korean thai lao khmer burmese tibetan").split())
UNSPACED_LETTERS = re.compile(
    r"[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)
# scripts other than Latin and those of UNSPACED_LETTERS: their words must not pass for English, which drops marks
OTHER_LETTERS = re.compile(r"[\u0370-\u0dff\u10a0-\u177f\u1800-\u1dff\u1f00-\u1fff\u2d00-\u2dff\ua4d0-\uabff]")
# vowel points that Hebrew and Arabic may leave out, Arabic's stretching line, and marks on emoji and symbols
OPTIONAL_MARKS = re.compile(
    r"[\u0591-\u05c7\u0610-\u061a\u0640\u064b-\u0652\u0656-\u065f\u0670\u06d6-\u06ed\u20d0-\u20ff\ufe00-\ufe0f]"
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


@lru_cache(1)
def english_normaliser():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def words_of(text: str, unspaced: bool) -> list[str]:
    """The words of any language, or its letters with their marks; symbols and punctuation are blanks."""
    text = unicodedata.normalize("NFKC", text.lower())
    text = "".join(" " if unicodedata.category(char)[0] in "SP" else char for char in text)
    text = OPTIONAL_MARKS.sub("", text)
    if not unspaced:
        return text.split()
    import regex  # comes with transformers; letters as Unicode's grapheme clusters

    return regex.findall(r"\X", "".join(text.split()))


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


def language_of(text: str) -> str:
    """ "zh" where most letters are of scripts without spaces, "other" where most are of other scripts, else "en"."""
    half = len("".join(text.split())) / 2
    if len(UNSPACED_LETTERS.findall(text)) > half:
        return "zh"
    return "other" if len(OTHER_LETTERS.findall(text)) > half else "en"


def normalise_speech(text: str, lang: str | None = None) -> list[str]:
    """A transcript as the words (of languages without spaces: the letters) that are counted.

    Args:
        lang: language code or name; None: English, unless the letters say otherwise.
    """
    text = visible(text)
    code = re.split(r"[-_ ]", (lang or "").strip().lower())[0] or language_of(text)
    english = code in ("en", "eng", "english")
    text = " ".join(without_brackets(text).split())
    # numbers that Python refuses to read (4,300 digits) or takes long over; a letter in front makes them words
    text = re.sub(r"[0-9]{60,}", lambda match: "\ue000" + match.group(), text)
    try:
        words = english_normaliser()(text).split() if english else words_of(text, code in UNSPACED)
    except (ValueError, AssertionError, ArithmeticError, RecursionError):
        words = words_of(text, unspaced=False)
    words = [word for word in words if any(char.isalnum() for char in word)]
    return [american(word) for word in words] if english else words


@lru_cache(1024)
def gold_words(gold: str, lang: str) -> tuple[str, ...]:
    """A gold transcript's words; the rollouts of a prompt share them."""
    return tuple(normalise_speech(gold, lang))


def asr_wer(prediction: str, gold: str, lang: str | None = None) -> float:
    """1 - WER after normalisation, not below 0; character errors for languages without spaces.

    Silence (a gold transcript without words) scores 1 where nothing was said either, else 0.
    """
    # most of such an answer would be insertions, whatever the words: digits written as words are up to 9 times longer,
    # whole speeches are not
    if len(gold) > MAX_CHARS or len(prediction) > min(10 * len(gold) + 1000, 2 * len(gold) + 20_000):
        return 0.0
    lang = lang or language_of(visible(gold))
    wanted, words = gold_words(gold, lang), normalise_speech(prediction, lang)
    if not wanted:
        return float(not words)
    if not words or len(words) >= 2 * len(wanted) or len(wanted) > MAX_WORDS:
        return 0.0
    from rapidfuzz.distance import Levenshtein

    return max(0.0, 1.0 - Levenshtein.distance(wanted, words, score_cutoff=len(wanted)) / len(wanted))


__all__ = ["asr_wer", "language_of", "normalise_speech"]
