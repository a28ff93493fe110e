"""Prompts as templates: text with named fields in braces."""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.tasks.base import NoColumn, column, is_missing


class Template:
    r"""A text with fields in braces, each a field that the task computes or a column of the row.

    Braces that belong to the text are doubled. What a field holds is inserted as it is: braces in it mean nothing.

    Args:
        text: The template.
        option: The option that gave it, for error messages.
        computed: Names of the fields that the task computes; they take precedence over columns.

    Raises:
        UserError: The braces do not match, a field is no plain name, or there is no field.

    Example:
        >>> template = Template("{subject}: {question}\n", "data.task_args.template", ["question"])
        >>> template.fill({"subject": "maths", "question": 1}, "row 0", {"question": "2 + {x}?"})
        'maths: 2 + {x}?\n'
    """

    def __init__(self, text: str, option: str, computed: Sequence[str] = ()) -> None:
        self.option, self.computed = option, tuple(computed)
        known = f"Fields are names in braces: {choices((*computed, 'and columns of the data'))}."
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{option} is {text!r}, which is no template ({error}). {known}") from error
        for _, name, spec, conversion in parts:
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise UserError(f"{option} is {text!r}; name a column between braces, as in {{question}}. {known}")
        self.parts = [(literal, name) for literal, name, _, _ in parts]
        self.fields = [name for _, name in self.parts if name is not None]
        if not self.fields:
            raise UserError(f"{option} is {text!r}, which has no field in braces: all prompts would be equal. {known}")

    def fill(self, row: Mapping[str, Any], id: str, computed: Mapping[str, str] | None = None) -> str:
        """The text with its fields filled in.

        Args:
            row: The row whose columns may be named.
            id: The row's id, for error messages.
            computed: Values of the computed fields.

        Raises:
            UserError: A field is neither computed nor a column, or the row has nothing in it.
        """
        values = computed or {}
        columns = [name for name in self.fields if name not in values]
        if columns and not values and all(name in row and is_missing(row[name]) for name in columns):
            # Nothing is asked. Of several fields some may be empty text.
            column(row, columns[0], self.option, id)
        return "".join(literal + (self._value(name, row, id, values) if name else "") for literal, name in self.parts)

    def around(self, text: str) -> str:
        """A prompt of a text that someone types; the text itself if the template has other fields too.

        Example:
            >>> Template("Q: {question} A:", "").around("2 + 2?"), Template("{a} or {b}?", "").around("2 + 2?")
            ('Q: 2 + 2? A:', '2 + 2?')
        """
        if len(self.fields) > 1:
            return text
        return "".join(literal + (text if name else "") for literal, name in self.parts)

    def _value(self, name: str, row: Mapping[str, Any], id: str, computed: Mapping[str, str]) -> str:
        if name in computed:
            return computed[name]
        if name not in row:
            columns = [name for name in row if name not in self.computed]
            raise NoColumn(
                id,
                name,
                f"column {name!r} is not in the data. {self.option} may have the fields "
                f"{choices((*self.computed, *columns))}.",
            )
        return str(column(row, name, self.option, id, may_be_blank=True))


def check_instruction(template: Template, chain_of_thought: bool) -> None:
    """Check that the template has a place to ask for a chain of thought.

    Raises:
        UserError: The option is on, but the template has no ``{instruction}``, which it changes.
    """
    if chain_of_thought and "instruction" not in template.fields:
        raise UserError(
            f"data.task_args.chain_of_thought changes {{instruction}}, which {template.option} does not have. "
            "Put it there, or leave chain_of_thought out."
        )
