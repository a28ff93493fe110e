"""``python -m corrsteer_pl``."""

import sys
import warnings

from corrsteer_pl.cli.program import main


def _as_a_sentence(message: Warning | str, *_: object) -> str:
    return f"warning: {message}\n"


if __name__ == "__main__":
    warnings.formatwarning = _as_a_sentence
    sys.exit(main())
