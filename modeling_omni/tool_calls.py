"""Tool calls as the model writes them -> names and JSON arguments.

The model writes `<function=NAME>` with one `<parameter=KEY>` block per argument (chat_template.jinja). Values are text;
the tool's schema says which of them are numbers, lists and so on.
"""

import json


def parse_tool_call(text: str, tools: list[dict] | None = None) -> dict | None:
    """What stands between `<tool_call>` and `</tool_call>` -> {"name", "arguments" (JSON text)}; None if it is no call.

    Args:
        tools: schemas as OpenAI's clients send them; an argument without a type in them stays text.
    """
    start = text.find("<function=")
    end = text.find(">", start)
    if start < 0 or end < 0 or not text[start + 10 : end].strip():
        return None
    name = text[start + 10 : end].strip()
    functions = [tool.get("function", tool) for tool in tools or ()]
    parameters = next((f.get("parameters") or {} for f in functions if f.get("name") == name), {})
    fields = parameters.get("properties") or {}
    arguments, place = {}, end + 1
    while (start := text.find("<parameter=", place)) >= 0:
        end = text.find(">", start)
        if end < 0:
            return None
        key, close = text[start + 11 : end].strip(), text.find("</parameter>", end)
        if close < 0:
            return None
        value = text[end + 1 : close].removeprefix("\n").removesuffix("\n")
        arguments[key] = typed_value(value, fields.get(key) if isinstance(fields, dict) else None)
        place = close
    return {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}


def typed_value(text: str, schema):
    """A value as its JSON schema has it, or the text where it does not fit."""
    schema = schema if isinstance(schema, dict) else {}
    kinds = schema.get("type")
    if kinds is None:  # Python's clients write optional arguments this way
        kinds = [one.get("type") for one in schema.get("anyOf") or () if isinstance(one, dict)]
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not any(kind in ("integer", "number", "boolean", "array", "object", "null") for kind in kinds):
        return text
    word = text.strip()
    word = {"True": "true", "False": "false", "None": "null"}.get(word, word)
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    names = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
    kind = names.get(type(value), "string")
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    return value if fits else text


def _refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


__all__ = ["parse_tool_call", "typed_value"]
