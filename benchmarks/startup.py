"""Processor seconds of commands, beside those of importing torch and transformers."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = [sys.executable, "-m", "corrsteer_pl"]
PLAIN = [sys.executable, "-c", "import torch, transformers"]
FIT = ["fit", "--config", "demo.yaml", "--data.train_size=96", "--data.val_size=8", "--data.test_size=1"]
# What is typed, its exit status, and how many times as long as the plain imports it may take; None: as it comes.
COMMANDS: list[tuple[list[str], int, float | None]] = [
    (["--help"], 0, 0.2),
    (["--version"], 0, 0.2),
    (["fitt"], 2, 0.2),
    (["fit", "--config", "nix.yaml"], 2, 0.2),
    (["fit", "--model.scal", "2"], 2, 0.2),
    (["test", "--help"], 0, 1.5),
    (["test", "--ckpt_path", "checkpoints/demo/last.ckpt"], 0, None),
]


def startup(repeats: int) -> Iterator[dict[str, Any]]:
    """Measure each command, the plain imports beside it; ``same`` says whether it ended as it should."""
    with tempfile.TemporaryDirectory() as folder:
        processor_seconds([*OURS, *FIT], folder)
        for args, status, wanted in COMMANDS:
            pairs = [
                (processor_seconds([*OURS, *args], folder), processor_seconds(PLAIN, folder)) for _ in range(repeats)
            ]
            yield {
                "command": " ".join(args),
                "seconds": statistics.median(mine for (mine, _), _ in pairs),
                "plain": statistics.median(theirs for _, (theirs, _) in pairs),
                "ratio": statistics.median(mine / theirs for (mine, _), (theirs, _) in pairs),
                "wanted": wanted,
                "same": all(ended == status for (_, ended), _ in pairs),
            }


def processor_seconds(command: list[str], folder: str) -> tuple[float, int]:
    """Seconds of user and system time of a command and its children, and its exit status."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, **quiet)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, child.returncode
