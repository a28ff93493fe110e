"""Configuration files that were written for one method, read for another."""

import atexit
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

from corrsteer_pl.cli.arguments import STAGES, given_method, read_config, replace_values
from corrsteer_pl.cli.options import groups
from corrsteer_pl.errors import choices
from corrsteer_pl.methods.registry import METHODS


def without_foreign_options(args: Sequence[str]) -> list[str]:
    """Leave out of configuration files what only other methods have among ``model``'s options; a warning names it.

    So one configuration of a task serves all methods. A file is replaced by a copy of its name.
    """
    # A comparison has many methods, and takes of each configuration what serves each.
    if args[0] not in (*STAGES, "doctor") or args[0] == "compare":
        return list(args)
    method = given_method(args)

    def cleaned(path: str) -> str:
        settings = {} if path.startswith("{") else read_config(path)
        model = settings.get("model")
        if not isinstance(model, dict) or not (left_out := _foreign(method, model)):
            return path
        copy = Path(_scratch()) / Path(path).name
        kept = {name: value for name, value in model.items() if name not in left_out}
        copy.write_text(json.dumps({**settings, "model": kept}), encoding="utf-8")
        if os.environ.get("LOCAL_RANK", "0") == "0":
            warnings.warn(
                f"{Path(path).name} sets {choices(f'model.{name}' for name in left_out)}, which the method {method} "
                "does not have; left out.",
                stacklevel=2,
            )
        return str(copy)

    return replace_values(args, ("--config", "-c"), cleaned)


def _foreign(method: str, options: Iterable[str]) -> list[str]:
    """Those of some options that a method lacks and another has."""
    own = _model_options(method) if method in METHODS else None
    unknown = [] if own is None else sorted(set(options) - own)
    return [option for option in unknown if any(option in (_model_options(other) or ()) for other in METHODS)]


@cache
def _scratch() -> str:
    """A folder that lasts as long as this process."""
    folder = mkdtemp(prefix="corrsteer_pl-configs-")
    atexit.register(rmtree, folder, ignore_errors=True)
    return folder


@cache
def _model_options(method: str) -> set[str] | None:
    """Names of a method's own options; None where its source does not tell them."""
    options = groups("fit", method)["model"].options
    return None if options is None else {option.name.removeprefix("model.") for option in options}
