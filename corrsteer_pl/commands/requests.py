"""Checks requests to the endpoint, and brings them into the form that the server of transformers reads.

That server ignores fields and parts of messages that it does not support. Here a request is rejected, naming the field,
unless everything in it is read or its value asks for nothing.
"""

import json
from collections.abc import Mapping
from math import inf
from typing import Any

from fastapi import HTTPException

# Below this, logits are divided by next to nothing.
COLDEST = 1e-3
# Characters of a value that a message shows.
SHOWN = 80
# Fields of all interfaces that are read; and those that cannot change an answer, such as names of users and caches.
READ = ("model", "stream", "stream_options", "temperature", "top_p", "seed", "generation_config")
WITHOUT_EFFECT = (
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
)  # fmt: skip
# Fields that are not supported, with the values that ask for nothing; None, [] and {} do not either, but for NOT_EMPTY.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "frequency_penalty": (0,), "presence_penalty": (0,), "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"), "function_call": ("auto", "none"), "parallel_tool_calls": (True, False),
    "modalities": (["text"],), "store": (False,), "service_tier": ("auto", "default"), "verbosity": ("medium",),
    "truncation": ("disabled",), "background": (False,), "text": ({"format": {"type": "text"}},),
}  # fmt: skip
# An empty object switches web search on.
NOT_EMPTY = ("web_search_options",)
ROLES = ("system", "developer", "user", "assistant")
TEXT_PARTS = ("text", "input_text", "output_text")
# Fields of a message, and of an item of `input`, that are not part of its text.
MESSAGE_FIELDS = ("role", "content", "name", "type", "id", "status")


class Rejected(HTTPException):
    """A request that cannot be answered.

    Attributes:
        param: The field at fault, as in the errors of OpenAI.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(status, message)
        self.param = param


def checked(body: Mapping[str, Any], read: tuple[str, ...], neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The fields of a request that are read.

    Args:
        body: The request.
        read: The fields of this interface that are read, besides those of all.
        neutral: Values of unsupported fields that ask for nothing in this interface, besides those of all.

    Raises:
        Rejected: A field has a value that is not allowed, or is not supported.
    """
    check_values(body)
    fields = {name: value for name, value in body.items() if name in (*READ, *read) and value is not None}
    for name, value in body.items():
        empty = value is None or (value in ([], {}) and name not in NOT_EMPTY)
        known = {**NEUTRAL, **neutral}.get(name, ())
        if name not in (*fields, *WITHOUT_EFFECT) and not empty and value not in known:
            raise Rejected(
                f"{name} is {shown(value)}, which is not supported, so the request cannot be answered. Leave it out.",
                name,
            )
    return fields | {"stream": fields.get("stream", False)}


def check_values(request: Mapping[str, Any]) -> None:
    """Check the values of fields that all interfaces share.

    Raises:
        Rejected: Naming the first that is not allowed.
    """
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        wanted = request.get(field)
        if wanted is not None and (type(wanted) is not int or wanted < 1):
            raise Rejected(f"{field} is {wanted!r}; it is a number of tokens, at least 1", field)
    heat = request.get("temperature")
    if heat is not None and not (type(heat) in (int, float) and 0 <= heat < inf):
        raise Rejected(f"temperature is {heat!r}; it is a number, at least 0", "temperature")
    if heat is not None and 0 < heat < COLDEST:
        raise Rejected(
            f"temperature is {heat!r}; it is 0, for the likeliest token, or at least {COLDEST}", "temperature"
        )
    seed = request.get("seed")
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise Rejected(f"seed is {seed!r}; it is a whole number from 0 to 2**63 - 1", "seed")
    share = request.get("top_p")
    if share is not None and not (type(share) in (int, float) and 0 < share <= 1):
        raise Rejected(f"top_p is {share!r}; it is a number above 0, at most 1", "top_p")
    stop = request.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise Rejected(f"stop is {stop!r}; it is a text, or a list of texts, none of them empty", "stop")
    if request.get("n") not in (None, 1):
        raise Rejected(f"n is {request['n']!r}, but a request has one answer", "n")
    if request.get("logprobs"):
        raise Rejected("logprobs cannot be had here; leave them out", "logprobs")
    stream = request.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise Rejected(f"stream is {stream!r}; it is true or false", "stream")
    _check_objects(request)


def _check_objects(request: Mapping[str, Any]) -> None:
    options = request.get("stream_options")
    known = ("include_usage", "include_obfuscation")
    if options is not None and not (
        isinstance(options, dict)
        and all(name in known and type(on) in (bool, type(None)) for name, on in options.items())
    ):
        raise Rejected(
            f"stream_options is {shown(options)}; it is an object with {' and '.join(known)}, true or false",
            "stream_options",
        )
    arguments = request.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, dict):
        raise Rejected(f"chat_template_kwargs is {shown(arguments)}; it is an object", "chat_template_kwargs")
    settings = request.get("generation_config")
    if settings is not None:
        try:
            is_object = isinstance(json.loads(settings), dict)
        except (TypeError, ValueError):
            is_object = False
        if not is_object:
            raise Rejected(
                f"generation_config is {shown(settings)}; it is an object, written as JSON", "generation_config"
            )


def prompt_of(value: Any) -> str:
    """The prompt of a completion.

    Raises:
        Rejected: It is not exactly one text, or empty.
    """
    prompt = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not prompt and prompt != 0:
        raise Rejected("there is no prompt", "prompt")
    if not isinstance(prompt, str):
        raise Rejected(f"prompt is {shown(value)}; it is one text, not token ids or several texts", "prompt")
    return prompt


def messages_of(value: Any, field: str = "messages") -> list[dict[str, str]]:
    """Messages with a role and a text each, and nothing else.

    Raises:
        Rejected: There are none, or one has something other than text; naming what.
    """
    if not value:
        raise Rejected(f"there are no {field}", field)
    if not isinstance(value, list):
        raise Rejected(f"{field} is {shown(value)}; it is a list of messages", field)
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def conversation_of(value: Any, instructions: Any) -> list[dict[str, str]]:
    """The messages of the fields ``input`` and ``instructions``.

    Raises:
        Rejected: One of them has something other than text; naming what.
    """
    if isinstance(value, str) and value:
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "role" not in item for item in value):
        if value[0].get("type") in TEXT_PARTS:
            messages = [{"role": "user", "content": _text(value, "input")}]
        else:
            raise Rejected(f"input[0] has the type {shown(value[0].get('type'))}; only text is supported", "input")
    else:
        messages = messages_of(value, "input")
    if instructions is None or instructions == "":
        return messages
    if not isinstance(instructions, str):
        raise Rejected(f"instructions is {shown(instructions)}; it is a text", "instructions")
    return [{"role": "system", "content": instructions}, *messages]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Rejected(f"{where} is {shown(message)}; it is an object with role and content", where)
    if message.get("type") not in (None, "message"):
        raise Rejected(f"{where} has the type {shown(message['type'])}; only text is supported", where)
    role = message.get("role")
    if role not in ROLES:
        raise Rejected(f"{where}.role is {shown(role)}; choose one of {', '.join(ROLES)}", f"{where}.role")
    for name, value in message.items():
        if name not in MESSAGE_FIELDS and value not in (None, [], {}, ""):
            raise Rejected(
                f"{where}.{name} is {shown(value)}, which is not supported. Leave it out.", f"{where}.{name}"
            )
    return {"role": role, "content": _text(message.get("content"), f"{where}.content")}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Rejected(f"{where} is {shown(content)}; it is a text, or a list of text parts", where)
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or kind not in TEXT_PARTS:
            raise Rejected(f"{where}[{i}] is {shown(kind)}; only text parts are supported", f"{where}[{i}]")
        if not isinstance(part.get("text"), str):
            raise Rejected(f"{where}[{i}].text is {shown(part.get('text'))}; it is a text", f"{where}[{i}].text")
    return " ".join(part["text"] for part in content)


def shown(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
