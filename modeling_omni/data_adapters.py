"""Rows as people have them -> {"messages": [...], "tools": [...]}: LLaVA, ShareGPT, swift, TRL, questions with options.

In LLaVA, ShareGPT and swift rows the marks `<image>`, `<video>`, `<audio>` in a text are places of media; nowhere else.
A row's columns say which marks count: `<video>` is text in a row without videos. In messages of our own, text is text
whatever it spells. Media paths may be absolute and may lead out of the file's folder (`../`): rows can name any file
that the user may read. The templates for questions follow Nemotron-CrossThink: one row of any field becomes multiple
choice or open form, so that the space of answers is known and the answer can be checked.
"""

import json
import random
import re
from pathlib import Path

from .media import OmniInputError
from .prompt_omni import source_keys

FORMATS = ("messages", "llava", "sharegpt", "swift", "qa")
TEMPLATES = ("multiple_choice", "open", "mixed")
KINDS = ("image", "video", "audio")
_MEDIA_COLUMNS = (*KINDS, *(f"{kind}s" for kind in KINDS))
_PATH_KEYS = ("path", "url", *KINDS, *(f"{kind}_url" for kind in KINDS))
_TURNS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURNS |= {"function_call": "assistant", "observation": "tool", "tool": "tool"}
# questions that mean nothing without their options
_NEEDS_OPTIONS = re.compile(
    r"\b(which|what|who|where)\b.*\b(following|these|those)\b|\b(following|above|below) (is|are|options?|statements?)\b"
    r"|\b(all|none|both) of the\b|\bexcept\b|\bbest (answer|option|describes|completes)\b",
    re.IGNORECASE | re.DOTALL,
)


def adapt_row(row: dict, form: str | None = None, template: str = "mixed", folder: Path | None = None) -> dict:
    """A row of any known form -> {"messages": ..., "tools": ... (where it has some)}.

    Args:
        row: as it was read.
        form: one of FORMATS; None takes rows with `conversations` as LLaVA or ShareGPT and others as messages. Swift
            rows (marks in the text of messages) and questions must be named, as their text would be read otherwise.
        template: one of TEMPLATES, for questions.
        folder: media paths that are not absolute start here.

    Raises:
        OmniInputError: what is missing or does not fit.
    """
    if not isinstance(row, dict):
        raise OmniInputError(f"a JSON object is needed, not {type(row).__name__}")
    form = form or ("sharegpt" if "conversations" in row else "messages")
    try:
        columns = {kind: _column(row, kind) for kind in KINDS}
        if form in ("llava", "sharegpt"):
            messages = _read_turns(row)
        elif form == "qa":
            messages = question_messages(row, template)
        elif "messages" in row:
            messages = [dict(message) for message in _parsed(row["messages"])]
        elif "prompt" in row and "completion" in row:  # TRL
            if isinstance(row["prompt"], str) and not row["prompt"].lstrip().startswith("["):
                raise OmniInputError("'prompt' is plain text; give prompt and completion as lists of messages")
            messages = [dict(message) for name in ("prompt", "completion") for message in _parsed(row[name])]
        else:
            raise OmniInputError(f"no 'messages' or 'conversations' among its keys {sorted(row)[:12]}")
        if form not in ("messages", "qa"):
            for message in messages:
                if message["role"] != "assistant" and isinstance(message.get("content"), str):
                    message["content"] = _split_marks(message["content"], columns)
        _fill_parts(messages, columns)
        if folder is not None:
            _resolve_paths(messages, folder)
        tools = _parsed(row.get("tools"))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, OmniInputError):
            raise
        raise OmniInputError(f"not a row of form {form!r} ({type(error).__name__}: {error})") from error
    return {"messages": messages} | ({"tools": tools} if tools else {})


def adapt_prompt(row: dict, form: str | None = None, template: str = "mixed", folder: Path | None = None) -> dict:
    """A row of reinforcement learning, {"prompt", ...}: its prompt as messages whose media have their sources.

    A prompt is text, messages, or either as JSON text; media columns and relative paths as in `adapt_row`. All other
    fields stay; "args" and "tools" may be JSON text.

    Raises:
        OmniInputError: no prompt, or one that is malformed.
    """
    if not isinstance(row, dict) or not row.get("prompt"):
        raise OmniInputError("a row needs a 'prompt' (messages or text)")
    row, prompt = dict(row), row["prompt"]
    if isinstance(prompt, str):
        prompt = _parsed(prompt) if prompt.lstrip().startswith("[{") else [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise OmniInputError("'prompt' must be text or a list of messages")
    adapted = adapt_row({"messages": prompt} | {k: row[k] for k in _MEDIA_COLUMNS if k in row}, folder=folder)
    row["prompt"] = adapted["messages"]
    if isinstance(row.get("args"), str):
        row["args"] = _parsed(row["args"])
    if row.get("tools"):
        row["tools"] = _parsed(row["tools"])
    return {key: value for key, value in row.items() if key not in _MEDIA_COLUMNS}


def _parsed(value):
    """Parquet files often hold messages and tools as JSON text."""
    return json.loads(value) if isinstance(value, str) and value.strip() else value


def _read_turns(row: dict) -> list[dict]:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in _parsed(row["conversations"]):
        speaker = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if speaker not in _TURNS:
            raise OmniInputError(f"a turn is from {speaker!r}; known: {', '.join(_TURNS)}")
        message = {"role": _TURNS[speaker], "content": text}
        if speaker == "function_call":
            calls = _parsed(text)
            message = {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
        messages.append(message)
    return messages


def _split_marks(text: str, columns: dict[str, list]) -> str | list[dict]:
    """Text -> parts, cut at the marks of the media that the row has."""
    marks = {f"<{kind}>": kind for kind, items in columns.items() if items}
    if not any(mark in text for mark in marks):
        return text
    pieces = re.split(f"({'|'.join(marks)})", text)
    return [{"type": marks[p]} if p in marks else {"type": "text", "text": p} for p in pieces if p]


def _column(row: dict, kind: str) -> list:
    """The media of a row under `images` or `image` (and so on), one or several."""
    value = row.get(kind + "s")
    value = row.get(kind) if value is None else value
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _fill_parts(messages: list[dict], columns: dict[str, list]) -> None:
    """Gives the media of the columns to parts without a source, in order; without any part they open the first turn."""
    for kind, items in columns.items():
        if not items:
            continue
        places = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, list):  # copied: rows in memory stay as they are
                content = message["content"] = [dict(p) if isinstance(p, dict) else p for p in content]
                places += [part for part in content if isinstance(part, dict) and part.get("type") == kind]
        if not places:
            if any(f"<{kind}>" in text for text in _asked(messages)):
                raise OmniInputError(
                    f"{len(items)} {kind}(s) beside the messages, the mark <{kind}> in the text and no part for them: "
                    f"where the mark is their place, give the source `format: swift`; else give parts of type {kind!r}"
                )
            first = next((message for message in messages if message["role"] == "user"), None)
            if first is None:
                raise OmniInputError(f"{len(items)} {kind}(s) beside the messages but no user's turn to put them in")
            content = first.get("content") or []
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            places = [{"type": kind} for _ in items]
            first["content"] = [*places, *content]
        empty = [part for part in places if not any(part.get(key) is not None for key in source_keys(kind))]
        if len(empty) != len(items):
            raise OmniInputError(f"{len(items)} {kind}(s) beside the messages but {len(empty)} empty place(s) for them")
        for part, item in zip(empty, items):
            part[kind] = item


def _asked(messages: list[dict]):
    """Every text but the assistant's."""
    for message in messages:
        if message["role"] != "assistant":
            content = message.get("content")
            for part in content if isinstance(content, list) else [content]:
                text = part.get("text") if isinstance(part, dict) else part
                if isinstance(text, str):
                    yield text


def _resolve_paths(messages: list[dict], folder: Path) -> None:
    def resolved(source):
        if isinstance(source, dict) and source.get("bytes") is None:
            return source | {key: resolved(source[key]) for key in ("path", "url") if isinstance(source.get(key), str)}
        if isinstance(source, str) and "://" not in source[:32] and source[:5].lower() != "data:":
            return str(folder / source)
        return source

    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = [
                part
                if not isinstance(part, dict) or str(part.get("type")).removesuffix("_url") not in KINDS
                else part | {key: resolved(part[key]) for key in _PATH_KEYS if part.get(key) is not None}
                for part in message["content"]
            ]


def question_messages(row: dict, template: str = "mixed") -> list[dict]:
    """{"question", "answer", "options" or "choices", "reasoning"} -> a user's and an assistant's turn.

    Args:
        row: options are a list, and the answer is the text, the letter or the number (from 0) of one; or they are
            {key: text}, and the answer is a key in either case, or a text.
        template: "multiple_choice": options in an order drawn from the question, the answer is a letter; "open": no
            options, the answer is a text; "mixed": one of both, drawn from the question. A question that needs its
            options is never open, one without options never multiple choice.
    """
    if template not in TEMPLATES:
        raise OmniInputError(f"template is {template!r}; use one of {', '.join(TEMPLATES)}")
    question, answer = row["question"], row["answer"]
    options = row.get("options") if row.get("options") is not None else row.get("choices")
    options = _parsed(options) or []
    if options:
        answer = _right_option(answer, options)
    options = [str(text) for text in (options.values() if isinstance(options, dict) else options)]
    rng = random.Random(question)
    is_open = not options or (template == "open" or template == "mixed" and rng.random() < 0.5)
    if is_open and options and _NEEDS_OPTIONS.search(question):
        if template == "open":
            raise OmniInputError("this question needs its options and has no open form; use 'mixed'")
        is_open = False
    if not options and template == "multiple_choice":
        raise OmniInputError("no 'options' to choose from; use template 'open' or 'mixed'")
    if is_open:
        asked, reply = question, str(answer)
    else:
        rng.shuffle(options)
        lines = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
        asked = "\n".join([question, *lines, "Answer with the letter of the right option."])
        reply = chr(ord("A") + options.index(answer))
    reply = {"role": "assistant", "content": reply}
    if row.get("reasoning"):
        reply["reasoning_content"] = row["reasoning"]
    return [{"role": "user", "content": asked}, reply]


def _right_option(answer, options: list | dict) -> str:
    """The text of the option meant. Keys win; in a list, what can be read as two different options is refused."""
    name = str(answer).strip().strip("().").upper()
    if isinstance(options, dict):
        keys = {str(key).strip().upper(): str(text) for key, text in options.items()}
        meant = {keys[name]} if name in keys else {str(answer)} & set(keys.values())
    else:
        texts = [str(text) for text in options]
        meant = {str(answer)} & set(texts)
        if isinstance(answer, int) and not isinstance(answer, bool):
            meant |= set(texts[answer : answer + 1] if answer >= 0 else ())
        else:
            meant |= {text for i, text in enumerate(texts) if name == chr(ord("A") + i)}
    if len(meant) != 1:
        what = "is none" if not meant else f"could be {len(meant)} ({', '.join(sorted(meant))[:80]}; use a dict)"
        raise OmniInputError(f"the answer {str(answer)[:40]!r} {what} of the {len(options)} options")
    return meant.pop()


__all__ = ["FORMATS", "TEMPLATES", "adapt_prompt", "adapt_row", "question_messages"]
