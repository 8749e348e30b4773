"""Bodies of OpenAI's chat completions -> encoded requests. What cannot be done is refused, never ignored silently."""

import json
import math
import secrets
from dataclasses import dataclass

import torch

from .degrade import PromptTooLong
from .generation_rows import row_settings
from .inference import default_max_new_tokens, default_thinking, encode_fitting, token_counts

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_TOOLS = 16, 256, 256
# fields that change nothing for the answer of a server like this one
IGNORED = (
    "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
)  # fmt: skip
# fields that are not supported, with the values at which they change nothing (null is one of them)
NEUTRAL = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "verbosity": ("medium",),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
READ = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "stop", "tools", "tool_choice", "user", "chat_template_kwargs", "reasoning_effort", "reasoning_budget",
    "thinking_token_budget", "reasoning_grace", "mm_processor_kwargs",
)  # fmt: skip
# of a message; the last four change nothing
MESSAGE = (
    "role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id", "name", "refusal", "annotations",
)  # fmt: skip
PARTS = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}


class RequestError(Exception):
    """A request that is refused, in OpenAI's form."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def type(self) -> str:
        names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return names.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")


@dataclass
class Asked:
    """A request that was understood.

    Attributes:
        inputs: of the model, one conversation. counts: its tokens by modality.
        settings: of a `Row`. thinking: the prompt opens a thought. degraded: what was lowered so that the
            request fits, one line per medium.
    """

    inputs: dict[str, torch.Tensor]
    counts: dict[str, int]
    settings: dict
    stops: list[str]
    tools: list[dict]
    stream: bool
    include_usage: bool
    user: str
    id: str
    degraded: list[str]
    thinking: bool = False


def take(body: dict, name: str, kinds, fits=lambda value: True, expected: str = ""):
    """A field of the body, None where it is missing or null.

    Raises:
        RequestError: it is of another kind, or does not fit.
    """
    value = body.get(name)
    if value is None:
        return None
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not right or (isinstance(value, float) and not math.isfinite(value)) or not fits(value):
        raise RequestError(f"{name} must be {expected}, not {value!r:.80}", param=name)
    return value


def read_request(server, body: bytes) -> Asked:
    """Checks a body, decodes its media and encodes its prompt.

    Args:
        server: a `serving.Server`, for model, processor, limits and defaults.

    Raises:
        RequestError, OmniInputError: what is wrong with it.
    """
    try:
        body = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    for name, value in body.items():
        if name in NEUTRAL:
            if value is not None and not any(value == one for one in NEUTRAL[name]):
                raise RequestError(f"{name} is not supported here; leave it out", param=name, code="unsupported_value")
        elif name not in READ and name not in IGNORED:
            raise RequestError(f"unknown field {name!r:.80}", param=name[:80], code="unknown_parameter")
    model = take(body, "model", str, expected="the name of the model")
    if model != server.name:
        raise RequestError(f"the model {model!r:.200} does not exist here; there is {server.name!r}", 404, "model",
                           "model_not_found")  # fmt: skip
    stream = take(body, "stream", bool, expected="true or false") or False
    stream_options = take(body, "stream_options", dict, expected="an object") or {}
    if stream_options and not stream:
        raise RequestError("stream_options are for streams", param="stream_options")
    tools = read_tools(body)
    messages = read_messages(body, server.limits, server.defaults.get("video_sound") or "auto")
    thinking, template = read_thinking(body, server)
    settings, asked_length = read_settings(body, server)
    options = template | read_media_options(body, server)
    options |= {"media_limits": server.limits.media, "tools": tools or None}
    context = server.limits.context
    new, most = settings["max_new_tokens"], server.defaults.get("max_prompt_tokens") or context
    if asked_length and new >= context:
        raise RequestError(f"max_tokens is {new}, but prompt and answer together have {context} tokens; ask for fewer",
                           param="max_tokens", code="context_length_exceeded")  # fmt: skip
    # an answer of no given length takes what the prompt leaves
    for limit in dict.fromkeys(min(most, context - kept) for kept in ((new,) if asked_length else (new, 1))):
        try:
            inputs, _, degraded = encode_fitting(
                server.model, server.processor, messages, limit, thinking, device="cpu", **options
            )
            break
        except PromptTooLong as error:
            problem = error
    else:
        raise RequestError(f"the context is {context} tokens and the answer may have {new}: {problem}",
                           param="messages", code="context_length_exceeded")  # fmt: skip
    total = inputs["input_ids"].shape[1]
    if total + new > context:
        settings = read_settings(body, server, context - total)[0]
    return Asked(
        inputs, token_counts(inputs), settings, read_stops(body), tools, stream,
        bool(stream_options.get("include_usage")),
        (take(body, "user", str, expected="text") or "")[:200], f"chatcmpl-{secrets.token_hex(12)}", degraded,
    )  # fmt: skip


def read_settings(body: dict, server, room: int | None = None) -> tuple[dict, bool]:
    """Settings of the row, and whether the request named a length."""
    positive = {"fits": lambda n: n >= 1, "expected": "a whole number of 1 or more"}
    given = [take(body, name, int, **positive) for name in ("max_completion_tokens", "max_tokens")]
    length = next((value for value in given if value is not None), None)
    most = server.limits.max_new_tokens
    if length is not None and most is not None and length > most:
        raise RequestError(f"max_tokens is {length}, this server gives {most} at most", param="max_tokens")
    new = length or default_max_new_tokens(server.model)
    new = min(value for value in (new, most, room) if value is not None)
    temperature = take(body, "temperature", (int, float), lambda t: 0 <= t <= 100, "a number from 0 to 100")
    top_p = take(body, "top_p", (int, float), lambda p: 0 < p <= 1, "above 0 and at most 1")
    seed = take(body, "seed", int, expected="a whole number")
    budget = take(body, "reasoning_budget", int, expected="a whole number")
    if budget is None:
        budget = take(body, "thinking_token_budget", int, expected="a whole number")
    grace = take(body, "reasoning_grace", int, lambda n: n >= 0, "a whole number of 0 or more")
    settings, _ = row_settings(
        server.model,
        new,
        server.defaults.get("temperature") if temperature is None else temperature,
        server.defaults.get("top_p") if top_p is None else top_p,
        None if seed is None else seed % 2**62,
        server.defaults.get("reasoning_budget") if budget is None else budget,
        server.defaults.get("reasoning_grace") if grace is None else grace,
    )
    return settings, length is not None


def read_thinking(body: dict, server) -> tuple[bool, dict]:
    """Whether to think, and further variables of the chat template."""
    template = dict(take(body, "chat_template_kwargs", dict, expected="an object") or {})
    for name, value in template.items():
        if name not in ("enable_thinking", "truncate_history_thinking") or not isinstance(value, bool):
            raise RequestError("chat_template_kwargs takes enable_thinking and truncate_history_thinking (true, false)",
                               param="chat_template_kwargs")  # fmt: skip
    thinking = template.pop("enable_thinking", None)
    effort = take(body, "reasoning_effort", str, expected="text")
    if thinking is None and effort is not None:
        thinking = effort != "none"
    if thinking is None:
        thinking = server.defaults.get("thinking")
    return default_thinking(server.model) if thinking is None else thinking, template


def read_media_options(body: dict, server) -> dict:
    """How videos are sampled: the server's defaults, and `mm_processor_kwargs` as vLLM's clients send them."""
    given = take(body, "mm_processor_kwargs", dict, expected="an object") or {}
    whole = {"fits": lambda n: n >= 1, "expected": "a whole number of 1 or more"}
    options = {
        "num_frames": take(given, "num_frames", int, **whole),
        "fps": take(given, "fps", (int, float), lambda n: n > 0, "a number above 0"),
        "use_audio_in_video": take(given, "use_audio_in_video", bool, expected="true or false"),
        "max_media_tokens": take(given, "max_media_tokens", int, **whole),
    }
    unknown = [name for name in given if name not in options]
    if unknown:
        raise RequestError(f"mm_processor_kwargs takes {', '.join(options)}, not {unknown[0]!r:.80}",
                           param="mm_processor_kwargs")  # fmt: skip
    most = server.defaults.get("max_media_tokens")
    if most is not None:
        options["max_media_tokens"] = min(most, options["max_media_tokens"] or most)
    own = {
        name: server.defaults.get(name) for name in ("num_frames", "fps", "video_pruning_rate", "use_audio_in_video")
    }
    return own | {name: value for name, value in options.items() if value is not None}


def read_stops(body: dict) -> list[str]:
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    right = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not right or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise RequestError(f"stop must be text, or a list of {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters",
                           param="stop")  # fmt: skip
    return stops


def read_tools(body: dict) -> list[dict]:
    tools = take(body, "tools", list, lambda tools: len(tools) <= MAX_TOOLS, f"a list of at most {MAX_TOOLS}") or []
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise RequestError(
            "tool_choice must be 'auto' or 'none'; this model cannot be made to call", param="tool_choice"
        )
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError("a tool must be {'type': 'function', 'function': {'name': ...}}", param="tools")
        parameters = function.get("parameters")
        properties = parameters.get("properties", {}) if isinstance(parameters, dict) else {}
        if not isinstance(parameters, (dict, type(None))) or not isinstance(properties, dict):
            raise RequestError(f"parameters of tool {function['name']!r:.80} must be a JSON schema", param="tools")
    return [] if choice == "none" else tools


def read_messages(body: dict, limits, video_sound: str = "auto") -> list[dict]:
    """Messages as the processor takes them; media only as URLs or data, never as files of the server."""
    messages = take(body, "messages", list, expected="a list")
    if not messages or len(messages) > limits.max_messages:
        raise RequestError(f"messages must be a list of 1 to {limits.max_messages} messages", param="messages")
    read, media = [], 0
    for i, message in enumerate(messages):
        param = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"{param} must be an object with a role", param=param)
        unknown = [name for name, value in message.items() if name not in MESSAGE and value is not None]
        if unknown:
            raise RequestError(f"{param}: unknown field {unknown[0]!r:.80}; media are parts of its content",
                               param=param, code="unknown_parameter")  # fmt: skip
        content = message.get("content")
        if content is None and message["role"] == "user":
            raise RequestError(f"{param}.content is missing", param=param)
        if isinstance(content, list):
            content = [read_part(part, f"{param}.content[{k}]") for k, part in enumerate(content)]
            media += sum(part["type"] != "text" for part in content)
            content = [part | {"audio": video_sound} if part["type"] == "video" else part for part in content]
        elif content is not None and not isinstance(content, str):
            raise RequestError(f"{param}.content must be text or a list of parts", param=param)
        entry = {"role": message["role"], "content": content}
        reasoning = message.get("reasoning_content", message.get("reasoning"))
        if message["role"] == "assistant" and reasoning is not None:
            entry["reasoning_content"] = reasoning
        calls = message.get("tool_calls")
        if calls is not None:
            if not isinstance(calls, list):
                raise RequestError(f"{param}.tool_calls must be a list", param=param)
            entry["tool_calls"] = calls
        read.append(entry)
    if media > limits.max_media:
        raise RequestError(
            f"the request has {media} media items, this server takes {limits.max_media}", param="messages"
        )
    if read[-1]["role"] == "assistant":
        raise RequestError("the last message must not be the assistant's", param=f"messages[{len(read) - 1}]")
    return read


def read_part(part, param: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "refusal"):
        text = part.get(kind)
        if not isinstance(text, str):
            raise RequestError(f"{param} needs text under {kind!r}", param=param)
        return {"type": "text", "text": text}
    if kind not in PARTS:
        raise RequestError(f"{param}: unknown type {kind!r:.80}; known: text, {', '.join(PARTS)}", param=param)
    source = part.get(kind)
    name = "data" if kind == "input_audio" else "url"
    source = source.get(name) if isinstance(source, dict) else source
    if not isinstance(source, str) or not source:
        raise RequestError(f"{param} needs {{{kind!r}: {{{name!r}: ...}}}}", param=param)
    if name == "data" and source[:5].lower() != "data:":
        return {"type": "audio", "data": source}
    return {"type": PARTS[kind], "url": source}


__all__ = ["Asked", "RequestError", "read_request"]
