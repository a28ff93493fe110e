"""One message where several processes run one command: the process that meets a mistake tells it, the others end."""

import os
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.time()
# One number for all processes of a run on this machine: Lightning's first process starts the others, which have
# LOCAL_RANK from the beginning; a launcher such as torchrun starts them all.
RUN = os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()
# Seconds to wait for another process's message.
PATIENCE = 10.0


def tell(message: str) -> None:
    """Write a message to standard error, unless another process of this run has told one."""
    if _is_first():
        sys.stderr.write(f"{message}\n")


def is_told() -> bool:
    """Whether another process of this run tells of a mistake, which then is why this one cannot go on."""
    marker = _marker()
    ends = time.monotonic() + (PATIENCE if marker else 0)
    while marker and time.monotonic() < ends:
        if _is_of_this_run(marker):
            return True
        time.sleep(0.1)
    return False


def _is_first() -> bool:
    marker = _marker()
    if marker is None:
        return True
    if not _is_of_this_run(marker):
        marker.unlink(missing_ok=True)
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _is_of_this_run(marker: Path) -> bool:
    # An earlier run may have had the same numbers.
    return marker.exists() and marker.stat().st_mtime >= STARTED - PATIENCE


def _marker() -> Path | None:
    """A file whose name is the same for all processes of a run on this machine; None if there is only one process."""
    port = os.environ.get("MASTER_PORT")
    return Path(tempfile.gettempdir(), f"corrsteer_pl-{RUN}-{port}") if port else None
