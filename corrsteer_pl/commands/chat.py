"""Talk to a run: the unchanged and the changed model side by side, as they write."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from corrsteer_pl.errors import UserError
from corrsteer_pl.methods.answers.streams import stream
from corrsteer_pl.methods.runs.loading import Fit, load_fit
from corrsteer_pl.methods.steering import Steering

HELP = """/scale 0.5     steer half as strongly; /scale alone says how strongly
/features      what steers, with numbers
/off 3         without the third of them; /on 3 with it again
/new           begin a new conversation
/quit          end, as Ctrl-D does"""
NAMES = ("unsteered", "steered")


def chat(run: Path, max_new_tokens: int = 128) -> None:
    """Answer each line with the unchanged and with the changed model, side by side; /help tells what else there is.

    Lines that come through a pipe are answered as plain lines.

    Args:
        run: Folder of a run, such as checkpoints/demo, or a checkpoint.
        max_new_tokens: How many tokens an answer has at most.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {max_new_tokens}; it is a number of tokens, at least 1.")
    console = Console(highlight=False)
    with console.status(f"loading {run}") if sys.stdin.isatty() else nullcontext():
        talk = Talk(load_fit(run))
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  Arrow keys, and the lines before.
        console.print(f"{talk.fit.name} on {talk.fit.method.llm.name}; /help tells what else there is.", style="dim")
    if isinstance(talk.fit.method, Steering) and not talk.fit.features:
        console.print("Nothing was selected, so both answers are the same.", style="dim")
    for line in _lines(sys.stdin.isatty()):
        try:
            if line.startswith("/"):
                if line == "/quit":
                    return
                console.print(talk.command(line), markup=False, soft_wrap=True)
            elif sys.stdout.isatty():
                _side_by_side(talk, line, max_new_tokens, console)
            else:
                _plainly(talk, line, max_new_tokens)
        except UserError as error:
            console.print(str(error), markup=False, style="red", soft_wrap=True)
        except KeyboardInterrupt:
            # As if it had not been asked; Ctrl-C at the next question ends the talk.
            console.print("stopped", style="dim")


def _lines(asks: bool) -> Iterator[str]:
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> ") if asks else input()
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line.strip()


@dataclass
class Talk:
    """A conversation with a run.

    Attributes:
        fit: The run.
        scale: Factor on what steers.
        off: Numbers of features that do not steer.
        turns: For each of both models what was asked and answered, in turn.
    """

    fit: Fit
    scale: float = 1.0
    off: set[int] = field(default_factory=set)
    turns: list[list[str]] = field(default_factory=lambda: [[], []])

    def answers(self, text: str, max_new_tokens: int) -> Iterator[list[str]]:
        """Both answers as they are written; of models with a chat template what was said before belongs to it."""
        asked = [[*turns, self.fit.asked(text)] for turns in self.turns]
        prompts = [self.fit.prompt_ids(turns) for turns in asked]
        answers = ["", ""]
        for answers in stream(self.fit.method.llm, prompts, self.fit.scaled(self.scale, self._each), max_new_tokens):
            yield answers
        if self.fit.uses_chat:
            self.turns = [[*turns, answer] for turns, answer in zip(asked, answers, strict=True)]

    @property
    def _each(self) -> list[float]:
        return [float(number not in self.off) for number in range(1, len(self.fit.features) + 1)]

    def command(self, line: str) -> str:
        """Do what a line says that begins with a slash; what there is to say of it.

        Raises:
            UserError: It cannot be done.
        """
        name, _, value = line.partition(" ")
        known: dict[str, Callable[[str], str]] = {
            "/help": lambda _: HELP, "/new": self._new, "/scale": self._scale, "/features": self._shown,
            "/off": lambda number: self._switch(number, self.off.add),
            "/on": lambda number: self._switch(number, self.off.discard),
        }  # fmt: skip
        if name not in known:
            raise UserError(f"there is no {name}; /help tells what there is.")
        return known[name](value.strip())

    def _new(self, _: str) -> str:
        self.turns = [[], []]
        return "A new conversation."

    def _scale(self, value: str) -> str:
        if not isinstance(self.fit.method, Steering):
            raise UserError(f"{self.fit.method.name} changes weights, which have no strength to set.")
        if value:
            self.scale = _factor(value)
        return f"Steering {self.scale:g} times as strongly as the run."

    def _shown(self, _: str) -> str:
        cards = getattr(self.fit.method, "cards", [])
        named = {card.get("name"): card for card in cards}
        lines = []
        for number, feature in enumerate(self.fit.features, 1):
            card = named.get(feature.name, {})
            tokens = " ".join(repr(str(token)) for token in card.get("likelier", [])[:5])
            off = " (off)" if number in self.off else ""
            lines.append(f"{number}. {feature}{off} {tokens} {feature.neuronpedia or ''}".rstrip())
        return "\n".join(lines) or "Nothing was selected."

    def _switch(self, number: str, change: Callable[[int], None]) -> str:
        if not number.isdecimal() or not 1 <= int(number) <= len(self.fit.features):
            raise UserError(
                f"{number or 'nothing'} is no number of a feature, 1 to {len(self.fit.features)}; see /features."
            )
        change(int(number))
        return self._shown("")


def _factor(value: str) -> float:
    with suppress(ValueError):
        if isfinite(factor := float(value)):
            return factor
    raise UserError(f"/scale takes a number, not {value!r}: /scale 0.5")


def _side_by_side(talk: Talk, line: str, max_new_tokens: int, console: Console) -> None:
    with Live(console=console, refresh_per_second=12) as live:
        for texts in talk.answers(line, max_new_tokens):
            table = Table(expand=True, box=None)
            for name in NAMES:
                table.add_column(name, ratio=1, header_style="bold")
            table.add_row(*(Text(text) for text in texts))
            live.update(table)


def _plainly(talk: Talk, line: str, max_new_tokens: int) -> None:
    *_, answers = ["", ""], *talk.answers(line, max_new_tokens)
    for name, answer in zip(NAMES, answers, strict=True):
        sys.stdout.write(f"{name}: {' '.join(answer.split())}\n")
    sys.stdout.flush()
