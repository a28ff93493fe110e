"""``python -m corrsteer_pl``."""

import os
import sys
import warnings

from corrsteer_pl.cli.program import main


def _as_a_sentence(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"


if __name__ == "__main__":
    warnings.formatwarning = _as_a_sentence
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has gone, and what is left of it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
