"""``python -m corrsteer_pl``."""

import sys

from corrsteer_pl.cli.program import process

if __name__ == "__main__":
    sys.exit(process())
