"""Renders conversations with a tokenizer's chat template, and checks that no message is lost.

Templates fail silently: one that ignores a role, or reads the content of a message as a list of parts, renders a prompt
without the question. :class:`ChatTemplate` renders marked messages once per sequence of roles, and looks for each
message in every text that it returns.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from jinja2 import TemplateError

from corrsteer_pl.errors import UserError, one_line

Message = Mapping[str, Any]

# Raised by a chat template that does not parse, calls raise_exception, or uses something undefined.
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
# Templates of reasoning models leave the reasoning out of earlier assistant turns.
END_OF_REASONING = "</think>"
# What a template writes that prints a list of parts instead of reading it.
PRINTED_PART = re.compile(r"""['"]text['"]: *['"]Message""")
# Characters of a message that an error shows.
SHOWN = 40


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: The tokenizer.
        name: The model's name, for messages.
        parts: For each sequence of roles that was checked, the roles whose content is passed as a list of parts.
    """

    tokenizer: Any
    name: str
    parts: dict[Any, frozenset[str]] = field(default_factory=dict)

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = True, **options: Any) -> str:
        """Render a conversation.

        Args:
            messages: Each with ``role`` and ``content``.
            add_generation_prompt: Whether the header of an answer follows.
            **options: Further options of ``apply_chat_template``.

        Raises:
            UserError: The template fails, or loses or changes a message.
        """
        options |= {"add_generation_prompt": add_generation_prompt}
        rendered = self._render(with_parts(messages, self._roles_with_parts(messages, options)), options)
        if (lost := first_lost(messages, rendered)) is not None:
            content = messages[lost]["content"].strip()
            shown = content if len(content) <= SHOWN else f"{content[:SHOWN]}..."
            raise self._lost(messages, lost, "changes", f", {shown!r}")
        return rendered

    def _roles_with_parts(self, messages: Sequence[Message], options: Mapping[str, Any]) -> frozenset[str]:
        """Roles whose content the template reads as parts, found by rendering one marker per message.

        A real message may occur in the text by chance ("A" in "Assistant"), a marker does not.
        """
        shape = tuple((message["role"], is_checked(message)) for message in messages)
        key = (repr(self.tokenizer.chat_template), shape, repr(sorted(options.items())))
        if key not in self.parts:
            self.parts[key] = self._try_parts(messages, options)
        return self.parts[key]

    def _try_parts(self, messages: Sequence[Message], options: Mapping[str, Any]) -> frozenset[str]:
        marked = [{**m, "content": f"Message{i}x"} if is_checked(m) else m for i, m in enumerate(messages)]
        roles = list(dict.fromkeys(str(message["role"]) for message in messages if is_checked(message)))
        failures = []
        for flags in product((False, True), repeat=len(roles)):
            parts = frozenset(role for role, flag in zip(roles, flags, strict=True) if flag)
            try:
                text = self._render(with_parts(marked, parts), options)
            except UserError as error:
                failures.append(error)
                continue
            if (lost := first_lost(marked, text)) is not None:
                failures.append(self._lost(marked, lost, "drops"))
            elif not PRINTED_PART.search(text):
                return parts
        raise failures[0]

    def _render(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except TEMPLATE_ERRORS as error:
            turns = sum(message["role"] != "system" for message in messages)
            raise UserError(
                f"the chat template of the tokenizer of {self.name} fails on {turns} turns of user and assistant "
                f"{'after a system message ' if turns < len(messages) else ''}"
                f"({type(error).__name__}: {one_line(error)}). Correct it, or set data.chat_template to false."
            ) from error

    def _lost(self, messages: Sequence[Message], index: int, verb: str, content: str = "") -> UserError:
        role = messages[index]["role"]
        return UserError(
            f"the chat template of the tokenizer of {self.name} {verb} the {role} message (message {index + 1} of "
            f"{len(messages)}{content}), so the model would not read it. Correct the template, leave the message out, "
            "or set data.chat_template to false."
        )


def is_checked(message: Message) -> bool:
    """Whether a message has text that must occur in the rendered conversation."""
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())


def with_parts(messages: Sequence[Message], roles: frozenset[str]) -> list[Message]:
    """Messages whose content is a list with one text part, as templates of multimodal models read it, for some roles.

    Example:
        >>> with_parts([{"role": "user", "content": "Who?"}], frozenset({"user"}))
        [{'role': 'user', 'content': [{'type': 'text', 'text': 'Who?'}]}]
    """
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if is_checked(m) and m["role"] in roles else m
        for m in messages
    ]


def first_lost(messages: Sequence[Message], text: str) -> int | None:
    """Index of the first message whose content does not occur in the rendered text; None if all occur.

    White space around a message may be lost, and the reasoning of an assistant. Turns keep their order. A system
    message may be anywhere, because some templates put it into the first or the last user turn.

    Example:
        >>> chat = [{"role": "user", "content": " Who? "}, {"role": "assistant", "content": "Me"}]
        >>> first_lost(chat, "[user] Who? [assistant] Me"), first_lost(chat, "Me: Who?")
        (None, 1)
    """
    start = 0
    for index, message in enumerate(messages):
        if not is_checked(message):
            continue
        content = message["content"].strip()
        if message["role"] in ("system", "developer"):
            if content not in text:
                return index
            continue
        at = text.find(content, start)
        if at < 0 and message["role"] == "assistant":
            content = content.split(END_OF_REASONING)[-1].strip()
            at = text.find(content, start)
        if at < 0:
            return index
        start = at + len(content)
    return None
