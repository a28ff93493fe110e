"""The base class of tasks, and what they read rows with."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.files import parsed_json
from corrsteer_pl.options import described
from corrsteer_pl.rewards import Reward


@dataclass(frozen=True)
class Source:
    """The data set of a task, used unless the user names another.

    Attributes:
        path: A folder, or the id of a data set on the Hugging Face Hub; None if the user has to name some data.
        subsets: Its named configurations that are read one after the other; none for the only one.
        train: The split that is fitted on; ``all`` for all splits together.
        validation: The split for validation.
        test: The split for test.
        shares: Weights by which fit, validation and test divide a split that several of them name.
    """

    path: str | None = None
    subsets: tuple[str, ...] = ()
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    shares: tuple[int, int, int] = (5, 1, 4)


# Seven tenths for test, and a tenth of the rest for validation, as in the paper.
PAPER_SHARES = (27, 3, 70)


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        id: Unique within its split.
        prompt: The text that the model continues.
        gold: What the reward compares with.
        groups: Categories whose rewards are reported beside the whole.
        solution: A perfect response, shown in few-shot prompts; None if there is none to show.
        options: Texts that may follow the prompt, for a task that is answered by their likelihood.
        details: What the task's own measures need to know.
    """

    id: str
    prompt: str
    gold: str
    groups: tuple[str, ...] = ()
    solution: str | None = None
    options: tuple[str, ...] = ()
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> tuple[str, frozenset[str]]:
        """What is asked: the prompt, with the options if they do not stand in it."""
        return self.prompt, frozenset(self.options)


class Task(ABC):
    """Turns rows into prompts and responses into rewards.

    Attributes:
        source: The data that belong to the task.
        generates: Whether the model answers; otherwise it reads texts, and the reward is known beforehand.
        by_likelihood: Whether the model writes nothing, but says how likely each option of an example is.
        instructs: Whether its prompts are instructions, which a base model has not learnt to follow.
        max_new_tokens: How many tokens are generated at most.
        answers: The only responses that make sense, each one token, or None for free text.
        scorer: The reward of a response; None in a task that overrides :meth:`reward`.
    """

    source: ClassVar[Source] = Source()
    generates: ClassVar[bool] = True
    instructs: ClassVar[bool] = False
    by_likelihood: bool = False
    max_new_tokens: int = 1
    answers: Sequence[str] | None = None
    scorer: Reward | None = None

    @property
    def reward_name(self) -> str:
        """What the results say of the reward."""
        return self.scorer.name if self.scorer else type(self).__name__

    def load(self, device: str) -> None:
        """Load what the reward needs, once per process and before the first response.

        Raises:
            UserError: It cannot be loaded.
        """
        if self.scorer:
            self.scorer.load(device)

    @abstractmethod
    def example(self, row: Mapping[str, Any], id: str) -> Example:
        """Make the sample of one row.

        Raises:
            UserError: A column is missing, or its value cannot be used.
        """

    def examples(self, row: Mapping[str, Any], id: str) -> list[Example]:
        """Make the samples of one row, which is one sample for most tasks.

        Raises:
            UserError: As :meth:`example` does.
        """
        return [self.example(row, id)]

    def named_values(self) -> list[tuple[str, str, Sequence[Any]]]:
        """Options that name values of a column: option, column, and the values, which have to occur in the data."""
        return []

    def likeliest(self, example: Example, nats: Sequence[float], tokens: Sequence[int]) -> str:
        """The answer of a task that is answered by likelihood: the option that is the likeliest per byte of its text.

        Args:
            example: The example.
            nats: Log-likelihood of each option after the prompt.
            tokens: Number of tokens of each.
        """
        return example.options[likeliest_option(example, nats)]

    def reward(self, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Rewards in [0, 1] of the responses to the prompts of ``examples``."""
        if self.scorer is None:
            raise NotImplementedError(f"{type(self).__name__} needs a scorer, or a reward method of its own")
        return self.scorer(texts, [example.gold for example in examples])

    def measures(self, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, float | None]:
        """Further measures of a whole test, by name; None where one is undefined."""
        return {}


def likeliest_option(example: Example, nats: Sequence[float]) -> int:
    """The option whose text is the likeliest per byte, given the log-likelihood of each; the first of equal ones.

    Example:
        >>> likeliest_option(Example("", "A cat says", "", options=("meow", "a lot")), [-4.0, -4.5])
        1
    """
    each = [total / len(option.encode()) for total, option in zip(nats, example.options, strict=True)]
    return each.index(max(each))


@contextmanager
def users_own(what: str) -> Iterator[None]:
    """Turn any error of code that a user may have written into one sentence.

    Args:
        what: The code and what it works on, for the sentence.

    Raises:
        UserError: The code failed, or ended the program.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} failed ({described(error)}).") from error


def rewards_of(task: Task, texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """Rewards of responses, each checked to be a number between 0 and 1.

    Raises:
        UserError: The reward failed on a sample, or gave something else.
    """
    try:
        rewards = task.reward(texts, examples)
    except UserError:
        raise
    except (Exception, SystemExit):
        # Judge one response at a time, to find the sample that it fails on.
        for text, example in zip(texts, examples, strict=True):
            with users_own(f"the reward {task.reward_name} of the response to {example.id}"):
                task.reward([text], [example])
        with users_own(f"the reward {task.reward_name} of {len(texts)} responses together"):
            rewards = task.reward(texts, examples)
    if not isinstance(rewards, Sequence) or len(rewards) != len(texts):
        given = f"{len(rewards)} rewards" if isinstance(rewards, Sequence) else type(rewards).__name__
        raise UserError(f"{task.reward_name} gave {given} for {len(texts)} responses; give one for each, in a list.")
    for reward, example in zip(rewards, examples, strict=True):
        if not isinstance(reward, Real) or not 0 <= reward <= 1:
            raise UserError(f"the reward of {example.id} is {reward!r}; a task's rewards lie between 0 and 1.")
    return [float(reward) for reward in rewards]


class MissingValue(UserError):
    """A row has nothing where its task needs a value.

    Args:
        id: The row.
        column: The column.
        message: Another message than the usual one.
    """

    def __init__(self, id: str, column: str, message: str | None = None) -> None:
        usual = f"row {id} has nothing in the column {column!r}. Fill it in or remove the row."
        super().__init__(usual if message is None else message)
        self.column = column


class NoColumn(MissingValue):
    """A row lacks a column that its task needs; others may have it."""


def is_missing(value: Any) -> bool:
    """Whether a value stands for nothing: None, NaN, NaT, NA, or text of white space alone.

    Example:
        >>> is_missing(None), is_missing(float("nan")), is_missing(" "), is_missing(0), is_missing([])
        (True, True, True, False, False)
    """
    if value is None or isinstance(value, str):
        return value is None or not value.strip("\ufeff\u200b \t\r\n") or not value.strip()
    if isinstance(value, (list, tuple, dict)):
        return False
    if type(value).__name__ in ("NAType", "NaTType"):
        return True
    try:
        return bool(value != value)
    except (TypeError, ValueError):
        return False


def plain_text(value: Any) -> str:
    """A value as text for comparison; a number without decimals as an integer.

    Example:
        >>> plain_text(1.0), plain_text(True), plain_text("1.0")
        ('1', 'True', '1.0')
    """
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def column(row: Mapping[str, Any], name: str, option: str, id: str, may_be_blank: bool = False) -> Any:
    """The value of a named column, or of a field within it, as ``choices.text``.

    Args:
        row: The row.
        name: The column.
        option: The option that named it.
        id: The row's id.
        may_be_blank: Whether text without characters is a value.

    Raises:
        MissingValue: The row has nothing in the column.
        UserError: The row has no such column, or something else than text in it.
    """
    value: Any = row
    for part in [name] if name in row else name.split("."):
        value = structured(value)
        if value is not row and is_missing(value):
            raise MissingValue(id, name)
        if not isinstance(value, Mapping) or part not in value:
            raise NoColumn(
                id,
                name,
                f"column {name!r} is not in the data (columns: {choices(row)}). "
                f"Set data.task_args.{option} to one of them.",
            )
        value = value[part]
    if is_missing(value) and not (may_be_blank and isinstance(value, str)):
        raise MissingValue(id, name)
    if isinstance(value, bytes):
        raise UserError(f"row {id} has bytes in the column {name!r}, not text. Save it as text in UTF-8.")
    return value


def optional_column(row: Mapping[str, Any], name: str, id: str) -> Any:
    """The value of a column that a data set need not have; None if it has none. Empty text is a value.

    Raises:
        MissingValue: The data set has the column, but the row has nothing in it.
    """
    return column(row, name, name, id, may_be_blank=True) if name in row else None


def without_trailing_missing(values: Any, name: str, id: str) -> list[Any]:
    """A list without missing values at its end, which tables with a fixed number of options have.

    Raises:
        MissingValue: A value before the end is missing, or all are.
    """
    present = list(values)
    while present and is_missing(present[-1]):
        present.pop()
    if any(map(is_missing, present)) or (values and not present):
        raise MissingValue(id, name)
    return present


def structured(value: Any) -> Any:
    """Parse a list or object that a CSV cell holds as JSON; any other value is returned as it is."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        with suppress(ValueError):
            return parsed_json(value)
    return value


def not_a_number(id: str, name: str, answer: str) -> UserError:
    """The error for a gold answer that is not one number."""
    shown = answer if len(answer) <= 40 else f"...{answer[-40:]}"
    return UserError(
        f"row {id} has {shown!r} in the column {name!r}, which does not end in one plain number. Write it as in "
        "1234.5, 3/8 or 1e5, after #### if other numbers precede it, or remove the row."
    )


def present(*groups: Any) -> tuple[str, ...]:
    """The groups as text, without missing ones."""
    return tuple(plain_text(group) for group in groups if not is_missing(group))


def check_new_tokens(max_new_tokens: Any) -> int:
    """A number of tokens, at least 1.

    Raises:
        UserError: It is none.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise UserError(f"data.task_args.max_new_tokens is {max_new_tokens!r}; it is a number of tokens, at least 1.")
    return max_new_tokens
