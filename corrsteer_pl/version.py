"""The version, the commit and the machine, readable without importing anything large."""

import platform
import shutil
import subprocess
from pathlib import Path

__version__ = "0.1.0"


def commit() -> str:
    """The commit of the checkout that this package lies in, ``-dirty`` if it or ``configs`` differ, or ``unknown``."""
    if shutil.which("git") is None:
        return "unknown"
    name = _git("describe", "--always", "--exclude=*")
    # Not all files: a table that is written into a page changes nothing of what is measured next.
    differing = _git("status", "--porcelain", "--", ".", "../configs")
    return f"{name}-dirty" if name and differing else name or "unknown"


def _git(*args: str) -> str:
    command = ["git", *args]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()


def machine() -> str:
    """Processor, threads and version of torch, for what is measured."""
    import torch  # large, and not needed for the version

    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
