"""lm-eval with a model of its own, ``corrsteer``: a run, steered at the positions of its fit."""

import sys
from importlib.util import find_spec

from corrsteer_pl.errors import UserError

NAME = "corrsteer"


def run(args: list[str]) -> int:
    """Run lm-eval's command line with arguments of its own; the exit status.

    Raises:
        UserError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed. Install it with: pip install 'corrsteer_pl[lm_eval]'.")
    from lm_eval.__main__ import cli_evaluate

    register()
    # lm-eval reads its arguments from where a program finds them.
    sys.argv = ["lm_eval", *args[1:]]
    cli_evaluate()
    return 0


def register() -> None:
    """Make ``--model corrsteer`` known to lm-eval."""
    from lm_eval.api.registry import model_registry

    model_registry.register(NAME, target="corrsteer_pl.commands.steered_run:SteeredRun")
