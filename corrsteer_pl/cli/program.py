"""The commands: which there are, and what runs each. Nothing large is imported before a command is known to be run."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from corrsteer_pl.cli.arguments import with_found_configs
from corrsteer_pl.cli.foreign import without_foreign_options
from corrsteer_pl.cli.options import check_names, command_help
from corrsteer_pl.cli.processes import is_told, tell
from corrsteer_pl.errors import UserError, choices
from corrsteer_pl.version import __version__

PROGRAM = "python -m corrsteer_pl"


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        does: What it does, as a sentence.
        runs: ``module:function`` that takes the command's name and its arguments.
        takes: What it takes beside options.
        passes: Whether its arguments are another program's, and are passed on as they are.
    """

    does: str
    runs: str
    takes: str = ""
    passes: bool = False


STAGE, PLAIN = "corrsteer_pl.cli.lightning:run_stage", "corrsteer_pl.cli.plain:run"
COMPARE = "corrsteer_pl.cli.compare:run"
TRANSFER = "corrsteer_pl.cli.transfer:run"
LM_EVAL = "corrsteer_pl.commands.lm_eval:run"
COMMANDS = {
    "fit": Command("Correlate features with rewards, test the candidates, and select those that help.", STAGE),
    "validate": Command("Test the candidates of a fit again on the validation split.", STAGE),
    "test": Command("Compare steered with unsteered answers to the same questions.", STAGE),
    "predict": Command("Write steered and unsteered answers side by side, without judging them.", STAGE),
    "transfer": Command("Test a fit on the task of each configuration, and on plain text, side by side.", TRANSFER),
    "compare": Command("Fit and test many systems on the same questions, with several seeds, as one table.", COMPARE),
    "doctor": Command("Show on one batch what a fit would do, and whether everything fits together.", STAGE),
    "report": Command("Write what a run found as a page, or compare two runs in pairs.", PLAIN, "RUN [RUN]"),
    "export": Command("Hand a run on to llama.cpp, peft, vLLM or lm-eval, with the measured difference.", PLAIN, "RUN"),
    "push": Command("Put a run's vectors and what was measured on the Hugging Face Hub.", PLAIN, "RUN OWNER/NAME"),
    "chat": Command("Talk to a run: both models side by side, as they write.", PLAIN, "RUN"),
    "page": Command("Show a run as a page on this machine, with sliders.", PLAIN, "RUN"),
    "serve": Command("Answer the OpenAI interface with a run, unchanged and steered.", PLAIN, "RUN"),
    "lm_eval": Command("Run lm-eval, which then knows --model corrsteer.", LM_EVAL, passes=True),
    "train_saes": Command("Train sparse autoencoders for a model that has none.", PLAIN),
}
EXAMPLES = f"""examples:
  {PROGRAM} fit --config demo.yaml
  {PROGRAM} test --ckpt_path checkpoints/demo/last.ckpt
  {PROGRAM} fit --help
"""


def process() -> int:
    """Run the command of a process of its own.

    Warnings are one line each, Ctrl-C ends it without a traceback, and whoever reads the output may leave.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        tell("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # What is left of the output goes nowhere.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 1
    return status


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one sentence on standard error and the exit status 2."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        return _main(args)
    except UserError as error:
        tell(f"error: {error}")
        return 2
    except RuntimeError:
        # When one process has failed, the others' collective operations fail with a RuntimeError.
        if not is_told():
            raise
        return 2


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if args[0] == "--version":
        sys.stdout.write(f"corrsteer_pl {__version__}\n")
        return 0
    command = args[0]
    if command not in COMMANDS:
        raise UserError(f"the command {command!r} is not known; choose one of {choices(COMMANDS)}.")
    if COMMANDS[command].passes:
        return _imported(COMMANDS[command].runs)(args)
    args = without_foreign_options(with_found_configs(args))
    if {"-h", "--help"} & set(args):
        program = " ".join([PROGRAM, command, COMMANDS[command].takes]).strip()
        sys.stdout.write(command_help(program, command, COMMANDS[command].does, args))
        return 0
    check_names(args)
    return _imported(COMMANDS[command].runs)(args)


def _imported(path: str) -> Callable[[list[str]], int]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "".join(f"  {name:<{width}}  {command.does}\n" for name, command in COMMANDS.items())
    about = "Steer language models with the SAE features that correlate with their own success."
    options = "  -h, --help  Show this help, or that of a command.\n  --version   Show the version.\n"
    return (
        f"usage: {PROGRAM} COMMAND [options]\n\n{about}\n\ncommands:\n{lines}\noptions:\n{options}\n"
        f"Each command says more with --help.\n\n{EXAMPLES}"
    )
