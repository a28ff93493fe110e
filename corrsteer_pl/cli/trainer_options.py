"""Options of Lightning's Trainer that it would meet with a traceback, or take and do something else."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from corrsteer_pl.errors import UserError, choices

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
# Places that look like folders, but hold no files of a user's.
SYSTEM = ("/proc", "/sys")


def check_trainer(options: Mapping[str, Any], command: str) -> None:
    """Refuse values that cannot be.

    Args:
        options: The Trainer's options by name, and ``seed_everything``.
        command: The stage that they are for.

    Raises:
        UserError: Naming the first, and what it takes.
    """
    for name, (fits, takes) in CHECKS.items():
        value = options.get(name)
        if value is not None and not fits(value):
            option = name if name == "seed_everything" else f"trainer.{name}"
            raise UserError(f"{option} is {value!r}; it takes {takes}.")
    if command == "fit" and options.get("limit_val_batches") == 0:
        raise UserError(
            "--trainer.limit_val_batches is 0, which leaves nothing to choose by. Leave it out, or set it above 0."
        )


def _is_positive(value: Any) -> bool:
    return not isinstance(value, (int, float)) or value > 0


def _is_known(accelerator: Any) -> bool:
    return not isinstance(accelerator, str) or accelerator in ACCELERATORS


def _is_a_seed(value: Any) -> bool:
    return isinstance(value, bool) or 0 <= value < 2**32


def _is_a_while(value: Any) -> bool:
    """Whether a ``max_time`` is more than nothing, in any of Lightning's spellings."""
    try:
        if isinstance(value, str):
            days, hours, minutes, seconds = map(int, value.split(":"))
            value = {"days": days, "hours": hours, "minutes": minutes, "seconds": seconds}
        return (value if isinstance(value, timedelta) else timedelta(**dict(value))) > timedelta(0)
    except (ValueError, TypeError):
        return False


def _is_a_local_folder(value: Any) -> bool:
    path = str(value)
    return (
        "://" not in path
        and "\0" not in path
        and all(len(part.encode()) <= 255 for part in Path(path).parts)
        and not any(Path(path).absolute().is_relative_to(place) for place in SYSTEM)
    )


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed_everything": (_is_a_seed, "a whole number from 0 to 2**32 - 1, or true or false"),
    "accelerator": (_is_known, f"one of {choices(ACCELERATORS)}"),
    "accumulate_grad_batches": (_is_positive, "a number of batches, at least 1"),
    "check_val_every_n_epoch": (_is_positive, "a number of epochs, at least 1"),
    "val_check_interval": (_is_positive, "a number of batches, or a share of the epoch, above 0"),
    "max_time": (_is_a_while, "a time above 0, as DD:HH:MM:SS or {minutes: 30}"),
    "default_root_dir": (_is_a_local_folder, "a folder on this machine, each part of its name at most 255 bytes long"),
}
