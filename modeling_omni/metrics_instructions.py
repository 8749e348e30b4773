"""Checks of instructions that a program can verify (IFEval, Zhou et al. 2023; paper Table 8, VoiceBench).

Names and arguments are IFEval's, so that rows of its file need no translation. Written anew from the paper's
descriptions; two differ from its code on purpose: sentences are counted by rule (IFEval asks nltk's model), and
letters' case is checked without asking what language it is. `language:response_language` needs `langdetect`.
"""

import json
import re
from collections.abc import Callable

from .media_source import OmniInputError

MAX_CHARS = 200_000
ABBREVIATIONS = "mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|inc|ltd|co|corp|no|fig|e\\.g|i\\.e|u\\.s|u\\.k|a\\.m|p\\.m"
SENTENCE_END = re.compile(r"[.!?]+[\"')\]*_]*(?=\s|$)|[\u3002\uff01\uff1f]+")
ABBREVIATED = re.compile(rf"(?:\b(?:{ABBREVIATIONS})|\b[A-Za-z])\.$", re.IGNORECASE)
YES_NO_MAYBE = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def compared(count: int, relation: str | None, limit: int) -> bool:
    if relation not in ("less than", "at least", None):
        raise OmniInputError(f"relation {relation!r} is unknown; use 'less than' or 'at least'")
    return count < limit if relation == "less than" else count >= limit


def count_words(text: str) -> int:
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Ends of sentences (not of "Dr." or initials), and what is left behind the last one."""
    count, start = 0, 0
    for match in SENTENCE_END.finditer(text):
        piece = text[start : match.end()].rstrip("\"')]*_")
        if match.group().strip("\"')]*_") == "." and ABBREVIATED.search(piece) and text[match.end() :].strip():
            continue
        count += bool(re.search(r"\w", piece))
        start = match.end()
    return count + bool(re.search(r"\w", text[start:]))


def occurrences(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def keywords_existence(text: str, keywords: list[str]) -> bool:
    return all(occurrences(word, text) for word in keywords)


def keywords_frequency(text: str, keyword: str, frequency: int, relation: str | None = None) -> bool:
    return compared(occurrences(keyword.strip(), text), relation, frequency)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str | None = None) -> bool:
    return compared(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
    try:
        import langdetect
    except ImportError as error:
        raise OmniInputError("language:response_language needs a detector: pip install langdetect") from error
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return True  # nothing to tell a language by


def number_sentences(text: str, num_sentences: int, relation: str | None = None) -> bool:
    return compared(count_sentences(text), relation, num_sentences)


def number_words(text: str, num_words: int, relation: str | None = None) -> bool:
    return compared(count_words(text), relation, num_words)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs divided by `***`; an empty one is allowed at either end only."""
    paragraphs = [piece.strip() for piece in text.split("***")]
    inner = paragraphs[bool(not paragraphs[0]) : len(paragraphs) - bool(not paragraphs[-1] and len(paragraphs) > 1)]
    return all(inner) and len(inner) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs divided by an empty line."""
    paragraphs = text.split("\n\n")
    count = sum(bool(piece.strip()) for piece in paragraphs)
    if not 1 <= nth_paragraph <= count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"")
    word = re.split(r"[.,?!'\"]", word)[0].lower()
    return count == num_paragraphs and word == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    """A line with the marker ("P.S.", "P.P.S", with blanks inside or not) and something at or behind it."""
    letters = [re.escape(part) for part in postscript_marker.lower().replace(".", " ").split()]
    if not letters:
        return False
    last_dot = r"\." if postscript_marker.rstrip().endswith(".") else ""
    return re.search(r"\.\s?".join(letters) + last_dot, text.lower()) is not None


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*\n]|-)", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    return any(choice in text for choice in YES_NO_MAYBE)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """*highlighted* parts; **so** counts too."""
    single = [part for part in re.findall(r"\*[^\n*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", text) if part.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    return any(found.strip("<> ") for found in re.findall(r"<<[^\n]+?>>", text))


def two_responses(text: str) -> bool:
    pieces = [piece.strip() for piece in text.split("******")]
    given = [piece for piece in pieces if piece]
    return all(pieces[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str | None = None) -> bool:
    words = re.findall(r"\w[\w-]*", text)  # as nltk: NASA's and DON'T are two words, ALL-CAPS is one
    return compared(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper()


def english_lowercase(text: str) -> bool:
    return text.islower()


def no_comma(text: str) -> bool:
    return "," not in text


INSTRUCTIONS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}


def relaxed_forms(text: str) -> list[str]:
    """The text, and without its first line, last line or both, each also without asterisks (IFEval's loose scoring)."""
    lines = text.split("\n")
    forms = [text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
    forms = [form.strip() if form is not text else form for form in forms]
    return [*forms, *(form.replace("*", "") for form in forms)]


def read_instructions(gold) -> list[tuple[str, dict]]:
    """Gold of `instruction_following` -> [(name, arguments)].

    Args:
        gold: {"instruction_id_list": [...], "kwargs": [{...}, ...]} as IFEval writes it, or its JSON.

    Raises:
        OmniInputError: another form, or an instruction that is not known.
    """
    try:
        gold = json.loads(gold) if isinstance(gold, str) else gold
        names = list(gold["instruction_id_list"])
        arguments = list(gold.get("kwargs") or [{}] * len(names))
        if not names or len(arguments) != len(names):
            raise ValueError
        arguments = [{key: value for key, value in (one or {}).items() if value is not None} for one in arguments]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise OmniInputError("instructions are {'instruction_id_list': [...], 'kwargs': [{...}, ...]}") from error
    unknown = [name for name in names if name not in INSTRUCTIONS]
    if unknown:
        raise OmniInputError(f"no check of the instruction {', '.join(map(str, unknown))}")
    return list(zip(names, arguments))


def instruction_following(prediction: str, gold, loose: bool = False, each: bool = False) -> float:
    """1 if every instruction is followed, else 0 (IFEval's prompt-level accuracy).

    Args:
        gold: see `read_instructions`.
        loose: an instruction also counts as followed by one of `relaxed_forms` of the answer.
        each: the share of instructions followed instead (instruction-level).

    Wrong instructions or arguments score 0; `check_instructions` says what is wrong with them.
    """
    if not prediction.strip() or len(prediction) > MAX_CHARS:
        return 0.0
    forms = [form for form in (relaxed_forms(prediction) if loose else [prediction]) if form.strip()]
    try:
        instructions = read_instructions(gold)
        followed = [any(INSTRUCTIONS[name](form, **own) for form in forms) for name, own in instructions]
    except (OmniInputError, TypeError, AttributeError):
        return 0.0
    return sum(followed) / len(followed) if each else float(all(followed))


def check_instructions(gold) -> None:
    """Raises OmniInputError where instructions or their arguments cannot be checked on this machine."""
    for name, own in read_instructions(gold):
        try:
            INSTRUCTIONS[name]("Some text.", **own)
        except (TypeError, AttributeError) as error:
            raise OmniInputError(f"arguments of the instruction {name} do not fit: {error}") from error


__all__ = ["INSTRUCTIONS", "check_instructions", "instruction_following", "read_instructions"]
