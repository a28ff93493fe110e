"""Special tokens around a text, and the tokens that end a generation.

A language model continues a prompt only if nothing follows it. Some tokenizers append EOS, SEP or other special tokens
to every text, because they were configured for training or for an encoder. :func:`without_appended` changes them.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from corrsteer_pl.errors import UserError
from corrsteer_pl.models.chat_template import TEMPLATE_ERRORS

# Texts whose tokens are looked for between those that the tokenizer adds; the first with any tokens is used.
PROBES = ("a", "Hello", "1")
# Number of vocabulary entries that are tried after them, for vocabularies of a few words.
VOCABULARY_PROBES = 200
# An answer that no template changes, and that is easily recognised in a rendered chat.
ANSWER = "Answer1"


def added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer puts before and after every text; both empty if that cannot be found out."""
    for text in _probes(tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(text)["input_ids"]
        starts = (i for i in range(len(whole) - len(ids) + 1) if whole[i : i + len(ids)] == ids)
        if ids and (start := next(starts, None)) is not None:
            return whole[:start], whole[start + len(ids) :]
    return [], []


def without_appended(tokenizer: Any, name: str) -> tuple[Any, list[int]]:
    """A tokenizer that adds special tokens before a text only, and BOS once.

    Args:
        tokenizer: It is not changed; if it appends tokens, a changed copy is returned.
        name: The model's name, for the error message.

    Returns:
        The tokenizer, and the token ids that the given one appends.

    Raises:
        UserError: The tokenizer appends tokens, and is of a class that cannot be changed.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer, []
    prefix, suffix = added_tokens(tokenizer)
    bos = tokenizer.bos_token_id
    single = [token for i, token in enumerate(prefix) if i == 0 or token != bos or prefix[i - 1] != bos]
    if not suffix and single == prefix:
        return tokenizer, []
    changed: Any = copy.deepcopy(tokenizer)
    # Saved with the tokenizer, and read again, they would bring the tokens back.
    for option in {"add_bos_token", "add_eos_token"} & changed.init_kwargs.keys():
        changed.init_kwargs[option] = option == "add_bos_token" and bos in single
    _add_only(changed, single)
    if added_tokens(changed) != (single, []):
        raise UserError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) appends {token_texts(tokenizer, suffix)} to every "
            "prompt. Set add_eos_token to false in its tokenizer_config.json, or change its post-processor."
        )
    return changed, suffix


def _add_only(tokenizer: Any, prefix: Sequence[int]) -> None:
    """Make a tokenizer add these tokens before every text, and none after it."""
    if not tokenizer.is_fast:
        tokenizer.build_inputs_with_special_tokens = partial(_prefixed, list(prefix))
        return
    # With these set, transformers would replace the post-processor whenever it saves or changes special tokens.
    vars(tokenizer).update(_add_eos_token=False, _add_bos_token=tokenizer.bos_token_id in prefix)
    vars(tokenizer).update(_should_update_post_processor=False)
    # $A is the text, and $B the second one of a pair.
    names = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in prefix}
    before = [names[token] for token in prefix]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A"], pair=[*before, "$A", "$B"], special_tokens=[(text, id) for id, text in names.items()]
    )


def _prefixed(prefix: list[int], first: list[int], second: list[int] | None = None) -> list[int]:
    return [*prefix, *first, *(second or [])]


def _probes(tokenizer: Any) -> Iterator[str]:
    yield from PROBES
    special = special_ids(tokenizer)
    ordinary = (id for id in range(len(tokenizer)) if id not in special)
    yield from (text for id in islice(ordinary, VOCABULARY_PROBES) if (text := tokenizer.decode([id])).strip())


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens, including those that have no role such as BOS or padding."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids with the text of each, for messages and tables: ``'</s>' (2)``."""
    return ", ".join(f"{tokenizer.decode([id])!r} ({id})" for id in ids)


def turn_end(tokenizer: Any) -> tuple[int | None, str]:
    """What a chat template writes directly after an assistant turn.

    Returns:
        The id of the special token that ends the turn, None if there is none; and otherwise the text that the template
        writes there, empty if it writes none.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None, ""
    question = {"role": "user", "content": "Question1"}
    turns = [question, {"role": "assistant", "content": ANSWER}]
    special, endings = special_ids(tokenizer), []
    # The last turn comes first: some templates end only that one by the token that ends a generation. Others end no
    # turn, and the role of the next one is a special token.
    for messages in (turns, [*turns, question]):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except TEMPLATE_ERRORS:
            break  # reported when prompts are rendered
        endings.append(text.rpartition(ANSWER)[2].strip() if ANSWER in text else "")
        ids = tokenizer(endings[-1], add_special_tokens=False)["input_ids"]
        if ids and ids[0] in special:
            return ids[0], ""
        if endings[0]:
            break
    return None, endings[0] if endings else ""
