"""Changes of a model that apply to all rows of a batch at once: edited weights, or an adapter."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

from torch import nn

# Changes a model within its context.
Switch = Callable[[], AbstractContextManager]


class Switched:
    """Variants of a model, each a context within which it is changed; every variant reads its own prompts.

    Args:
        variants: A name and a context for each variant; None for the unchanged model.

    Attributes:
        most_together: How many variants can share a forward pass: one.
        changes_prompt: Whether the prompt's keys and values depend on the variant: they do.
    """

    most_together: int | None = 1
    changes_prompt = True

    def __init__(self, variants: Sequence[tuple[str, Switch] | None]) -> None:
        self.variants = list(variants)

    def __len__(self) -> int:
        """Number of variants."""
        return len(self.variants)

    def described(self, variant: int) -> str | None:
        """What a variant does, as the subject of a sentence; None if it changes nothing."""
        named = self.variants[variant]
        return None if named is None else named[0]

    def groups(self, size: int) -> Iterator[Self]:
        """The variants one by one.

        Raises:
            ValueError: More than one are to share a forward pass.
        """
        if size != 1:
            raise ValueError(f"{size} variants of the weights cannot share a forward pass")
        for variant in self.variants:
            yield type(self)([variant])

    def attached(self, model: nn.Module, run: Any = None) -> AbstractContextManager:
        """The only variant's change within the context."""
        if len(self) != 1:
            raise ValueError(f"{len(self)} variants of the weights cannot share a forward pass; use groups(1)")
        named = self.variants[0]
        return nullcontext() if named is None else named[1]()
