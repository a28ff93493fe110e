"""``python -m corrsteer_pl``."""

import sys

from corrsteer_pl.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
