"""Text is data: rendering the chat template and tokenising structure and text apart.

Text that a user, a data row or a tool result supplies never becomes a special token, whatever it spells; only message
structure does. The means: special tokens written in a template's own source are wrapped in two Unicode noncharacters
before it is compiled, so in the rendered string structure is told from text by those marks and not by spelling.
Supplied text is escaped so that it cannot hold such a mark, and restored after rendering. All of this survives JSON,
trimming, splitting and concatenation inside the template.
"""

import base64
import binascii
import functools
import json
import re
from datetime import datetime
from pathlib import Path

import jinja2
import tokenizers
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import get_json_schema

from .limits import MAX_NESTING, OmniInputError

# Sentinels: one media item each, in templates and prompt strings. The first and the last are also placeholder tokens.
IMAGE, VIDEO, AUDIO = "<image>", "<video>", "<so_embedding>"
SENTINELS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
ROLES = ("system", "user", "assistant", "tool")

# Unicode noncharacters: never part of interchanged text, and left alone by JSON, trimming and Jinja.
OPEN, CLOSE, ESCAPE, LABELS_ON, LABELS_OFF = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
_UNSAFE = re.compile("[\ufdd0-\ufdd4\ud800-\udfff]")
_ESCAPED = re.compile(ESCAPE + "([0-4])")
_ESCAPED_IN_PROMPT = re.compile(ESCAPE + "([2.])")
_STRUCTURE = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}|([{LABELS_ON}{LABELS_OFF}])")
_ESCAPES = {ord(char): ESCAPE + str(i) for i, char in enumerate((OPEN, CLOSE, ESCAPE, LABELS_ON, LABELS_OFF))}
_UNESCAPES = {str(i): chr(char) for i, char in enumerate(_ESCAPES)} | {".": ""}


def mark(token: str) -> str:
    """A special token as structure, for use in rendered templates and prepared messages."""
    return OPEN + token + CLOSE


def escape(text: str) -> str:
    """Supplied text, safe to stand in a rendered template. `unescape` gives it back."""
    if text.isascii() or not (found := _UNSAFE.search(text)):
        return text
    check_encodable(text)
    return text.translate(_ESCAPES) if found else text


def unescape(text: str) -> str:
    if ESCAPE not in text:
        return text
    return _ESCAPED.sub(lambda match: _UNESCAPES[match[1]], text)


def check_encodable(text: str) -> None:
    """Raises `OmniInputError` for lone surrogates, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OmniInputError(
            f"text has a lone surrogate {text[error.start]!a} at character {error.start}, which is not valid Unicode; "
            "decode the source with errors='replace' or drop the character"
        ) from None


def escape_tree(value, depth: int = 0):
    """`escape` for every string in nested lists and dicts, keys included.

    Raises:
        OmniInputError: more than MAX_NESTING levels.
    """
    if isinstance(value, str):
        return escape(value)
    if depth > MAX_NESTING and isinstance(value, (dict, list, tuple)):
        raise OmniInputError(f"tools, their arguments or results are nested over {MAX_NESTING} levels; make them flat")
    if isinstance(value, dict):
        return {escape(str(key)): escape_tree(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [escape_tree(item, depth + 1) for item in value]
    return value


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}`: marks what the model has to write, in the rendered string itself."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        on, off = (nodes.Output([nodes.TemplateData(mark)]) for mark in (LABELS_ON, LABELS_OFF))
        return [on, *body, off]


def _template_error(message: str):
    raise OmniInputError(f"the chat template refuses this conversation: {message}")


@functools.lru_cache(maxsize=1)
def _jinja_environment() -> ImmutableSandboxedEnvironment:
    # the settings and helpers that chat templates of transformers may rely on
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _template_error
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=1)
def default_chat_template() -> str:
    """Source of this package's chat template."""
    return (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


@functools.lru_cache(maxsize=32)
def _compile(source: str, spelling: re.Pattern) -> tuple[jinja2.Template, frozenset[str]]:
    environment = _jinja_environment()
    tree = environment.parse(spelling.sub(lambda match: mark(match[0]), source))
    return environment.from_string(tree), frozenset(meta.find_undeclared_variables(tree))


class TextCodec:
    """Tokenises structure and text apart: a copy of the tokenizer without its added tokens encodes all text."""

    def __init__(self, tokenizer):
        self.special_ids = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        self.num_tokens = len(tokenizer)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self.plain = tokenizers.Tokenizer.from_str(json.dumps(state))
        self.reserved = frozenset(self.special_ids.values())
        spellings = sorted({*self.special_ids, VIDEO}, key=len, reverse=True)
        self.spelling = re.compile("|".join(map(re.escape, spellings)))
        self.short_texts: dict[str, list[int]] = {}

    def __deepcopy__(self, memo):
        return self  # never changes what it answers

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids, none of them an added token."""
        ids = self.short_texts.get(text)
        if ids is None:
            ids = self.plain.encode(text, add_special_tokens=False).ids
            if not self.reserved.isdisjoint(ids):
                ids = self._encode_apart(text)
            if len(text) <= 64 and len(self.short_texts) < 20_000:
                self.short_texts[text] = ids
        return ids

    def _encode_apart(self, text: str) -> list[int]:
        """For vocabularies whose merges spell an added token: such spellings are cut after their first character."""
        cuts = [0, *(match.start() + 1 for match in self.spelling.finditer(text)), len(text)]
        pieces = (text[start:end] for start, end in zip(cuts[:-1], cuts[1:], strict=True) if end > start)
        return [i for piece in pieces for i in self.plain.encode(piece, add_special_tokens=False).ids]

    def compile(self, source: str) -> tuple[jinja2.Template, frozenset[str]]:
        """Template with its special tokens marked as structure, and the names of its variables."""
        return _compile(source, self.spelling)

    def split_rendered(self, rendered: str) -> list[tuple[str, str]]:
        """Rendered template -> (kind, value) pieces; kind is "text", "special" or "labels"."""
        pieces = []
        parts = _STRUCTURE.split(rendered)
        for text, special, mark in zip(parts[::3], parts[1::3] + [None], parts[2::3] + [None], strict=True):
            if text:
                pieces.append(("text", unescape(text)))
            if special is not None:
                pieces.append(("special", special))
            elif mark is not None:
                pieces.append(("labels", mark))
        return pieces

    def to_prompt(self, rendered: str) -> str:
        """Rendered template -> a string for `split_prompt`: special tokens as they are, their spellings in text broken
        by an escape."""
        prompt = []
        for kind, value in self.split_rendered(rendered):
            if kind == "text":
                value = value.replace(ESCAPE, ESCAPE + "2")
                prompt.append(self.spelling.sub(lambda match: match[0][0] + ESCAPE + "." + match[0][1:], value))
            elif kind == "special":
                prompt.append(value)
        return "".join(prompt)

    def split_prompt(self, prompt: str) -> list[tuple[str, str]]:
        """Prompt string, in which special tokens are structure, -> (kind, value) pieces."""
        check_encodable(prompt)
        pieces, start = [], 0
        for match in self.spelling.finditer(prompt):
            if match.start() > start:
                pieces.append(("text", unescape_prompt(prompt[start : match.start()])))
            pieces.append(("special", match[0]))
            start = match.end()
        if start < len(prompt):
            pieces.append(("text", unescape_prompt(prompt[start:])))
        return pieces


def unescape_prompt(text: str) -> str:
    """Undoes `TextCodec.to_prompt` on a piece of text."""
    if ESCAPE not in text:
        return text
    return _ESCAPED_IN_PROMPT.sub(lambda match: _UNESCAPES[match[1]], text)


def prepare_messages(
    messages, loose: dict[str, list], continue_final: bool
) -> tuple[list[dict], list[tuple[str, dict]]]:
    """Messages as the template gets them (all text escaped, content as one string) and their media parts in order.

    Args:
        messages: see `OmniProcessor.apply_chat_template`.
        loose: sources by kind for media parts that name none; used up from the front.
        continue_final: the last message is an unfinished assistant turn.

    Raises:
        OmniInputError: an unknown role or part, content of a wrong type, an unfinished turn of another role.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise OmniInputError("a conversation must be a non-empty list of messages {'role': ..., 'content': ...}")
    prepared, parts = [], []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise OmniInputError(f"message {i} must be a dict with a role and content, not {type(message).__name__}")
        role = "system" if message["role"] == "developer" else message["role"]
        if role not in ROLES:
            raise OmniInputError(f"message {i} has role {role!r:.80}; use one of {', '.join(ROLES)}")
        text = _content(message.get("content"), i, role, loose, parts)
        entry = {"role": role}
        reasoning = message.get("reasoning_content")
        if role == "assistant":
            if reasoning is not None and not isinstance(reasoning, str):
                raise OmniInputError(f"message {i}: reasoning_content must be a string, not {type(reasoning).__name__}")
            unfinished = continue_final and i == len(messages) - 1
            if reasoning and unfinished and not text:
                text, reasoning = mark("<think>") + "\n" + escape(reasoning), None
            elif reasoning:
                entry["reasoning_content"] = escape(reasoning)
            elif not (reasoning or "").strip():
                text = _mark_thinking(text)
            if message.get("tool_calls"):
                if not isinstance(message["tool_calls"], (list, tuple)):
                    kind = type(message["tool_calls"]).__name__
                    raise OmniInputError(f"message {i}: tool_calls must be a list, not {kind}")
                entry["tool_calls"] = [_tool_call(call, i) for call in message["tool_calls"]]
        entry["content"] = text
        prepared.append(entry)
    if continue_final and prepared[-1]["role"] != "assistant":
        raise OmniInputError("continue_final_message needs a conversation that ends with an assistant message")
    return prepared, parts


def _content(content, index: int, role: str, loose: dict[str, list], parts: list) -> str:
    """Content of a message as one escaped string with marked sentinels; its media go to the end of `parts`."""
    if content is None:
        return ""
    if isinstance(content, str):
        return escape(content)
    if role == "tool" and not _is_part_list(content):
        escape_tree(content)  # for its depth
        try:
            return escape(json.dumps(content, ensure_ascii=False))
        except (TypeError, ValueError) as error:
            raise OmniInputError(f"message {index}: a tool's result must be text or JSON ({error})") from None
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, (list, tuple)):
        kind = type(content).__name__
        raise OmniInputError(f"message {index}: content must be a string or a list of parts, not {kind}")
    pieces = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part_kind(part)
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise OmniInputError(f"message {index}: a text part needs a string under 'text', not {text!r:.40}")
            pieces.append(escape(text))
        elif kind in SENTINELS:
            pieces.append(mark(SENTINELS[kind]))
            if not any(part.get(key) is not None for key in source_keys(kind)) and loose.get(kind):
                part = {**part, kind: loose[kind].pop(0)}
            parts.append((kind, part))
        else:
            raise OmniInputError(
                f"message {index}: unknown part {part.get('type') if isinstance(part, dict) else part!r:.80}; "
                "use text, image, video or audio"
            )
    return "".join(pieces)


def part_kind(part) -> str:
    """What a part is, however its type is spelt ("image", "image_url", "input_audio", ...)."""
    kind = part.get("type") if isinstance(part, dict) else None
    return str(kind).removeprefix("input_").removesuffix("_url")


def replace_media(messages: list[dict], parts: list[dict]) -> list[dict]:
    """Messages that `prepare_messages` takes, with other media parts in the places of theirs, in order."""
    rest, replaced = iter(parts), []
    for message in messages:
        content = message.get("content")
        content = [content] if isinstance(content, dict) else content
        if isinstance(content, (list, tuple)) and (message["role"] != "tool" or _is_part_list(message["content"])):
            content = [next(rest) if part_kind(part) in SENTINELS else part for part in content]
            message = {**message, "content": content}
        replaced.append(message)
    return replaced


def _is_part_list(content) -> bool:
    return isinstance(content, (list, tuple)) and all(isinstance(part, dict) and "type" in part for part in content)


def _mark_thinking(text: str) -> str:
    """A leading `<think>...</think>` of an assistant's content is structure; anything further in is text.

    Decoded output, whose `<think>` stood in the prompt, goes through `OmniProcessor.split_reasoning` first.
    """
    body = text.lstrip()
    if not body.startswith("<think>"):
        return text
    inner, closed, rest = body.removeprefix("<think>").partition("</think>")
    return mark("<think>") + inner + (mark("</think>") + rest if closed else "")


def _tool_call(call, index: int) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise OmniInputError(f"message {index}: a tool call needs a name: {{'function': {{'name', 'arguments'}}}}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise OmniInputError(f"message {index}: arguments of tool call {function['name']!r:.80} must be a JSON object")
    return {"name": escape(function["name"]), "arguments": escape_tree(arguments)}


def tool_schemas(tools) -> list[dict] | None:
    """JSON schemas of tools given as schemas or as documented functions, with all text escaped."""
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)):
        raise OmniInputError(f"tools must be a list of JSON schemas or functions, not {type(tools).__name__}")
    schemas = []
    for tool in tools:
        if not isinstance(tool, dict):
            if not callable(tool):
                raise OmniInputError(f"a tool must be a JSON schema or a function, not {type(tool).__name__}")
            tool = get_json_schema(tool)
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise OmniInputError("a tool needs a name: {'type': 'function', 'function': {'name', 'description', ...}}")
        schemas.append(escape_tree(tool))
    return schemas


def source_keys(kind: str) -> tuple[str, ...]:
    """Keys under which a media part may name its source."""
    return (kind, "path", "url", "bytes", "array", "base64", "data", f"{kind}_url", f"input_{kind}")


def media_source(kind: str, part: dict, inner: bool = False):
    """What a media part points to, as the loaders take it; sound with its rate beside it becomes (array, rate)."""
    source = next((part[key] for key in source_keys(kind) if part.get(key) is not None), None)
    if source is None:
        raise OmniInputError(
            f"a part of type {kind!r} names no source: give 'path', 'url', 'bytes', 'array' or {kind!r}, or pass "
            f"{kind if kind == 'audio' else kind + 's'}=[...]"
        )
    if isinstance(source, dict) and "array" not in source:  # OpenAI's {"url"} and {"data"}, datasets' {"bytes", "path"}
        if inner:
            raise OmniInputError(f"a part of type {kind!r} names its source in dicts within dicts; give a path or url")
        return media_source(kind, {**part, **dict.fromkeys(source_keys(kind)), **source}, inner=True)
    if isinstance(source, str) and (source is part.get("base64") or source is part.get("data")):
        try:
            return base64.b64decode(source, validate=True)
        except (binascii.Error, ValueError):
            raise OmniInputError(f"a part of type {kind!r} has invalid base64 data") from None
    if kind == "audio" and part.get("sampling_rate") and not isinstance(source, (str, bytes, dict, tuple)):
        return source, part["sampling_rate"]
    return source
