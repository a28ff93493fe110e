"""What a user gives on the command line, in configuration files and in a checkpoint, and which of them prevails."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from corrsteer_pl.errors import UserError, choices, nearest, one_line
from corrsteer_pl.files import absolute
from corrsteer_pl.methods.run_files import LAST

SUBCOMMANDS = ("fit", "validate", "test", "predict")
RUNS = Path("checkpoints")
# In an installed package the configurations lie inside it, in a clone beside it.
PACKAGE = Path(__file__).parents[1]
SHIPPED = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
# Options that hold options by name.
NESTED = ("data.task_args", "data.filter", "data.fit_on", "model.llm_args")
# Options whose value the tag of a test names when it is not the checkpoint's.
TAGGED = {
    "model": ("scale", "rule", "sign", "layers", "positions", "first_k", "decay", "dtype", "llm_args"),
    "data": (
        "path", "subset", "task_args", "filter", "train_split", "val_split", "test_split", "test_size", "chat_template",
        "shots", "restrict", "reverse", "seed",
    ),
    "trainer": ("limit_test_batches", "limit_predict_batches"),
}  # fmt: skip


def with_found_configs(args: Sequence[str]) -> list[str]:
    """Replace the value of each ``--config`` by the file that it means.

    Looked for as given, then in ``configs/``, then among the configurations shipped with the package.

    Raises:
        UserError: There is none.
    """
    return _configs_first(_replace_values(args, ("--config", "-c"), _find_config))


def _configs_first(args: Sequence[str]) -> list[str]:
    """Configuration files before all options, so that the command line overrules them in any order."""
    configs, others = [], []
    rest = iter(args[1:])
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name in ("--config", "-c"):
            configs += [argument] if equals else [argument, *islice(rest, 1)]
        else:
            others.append(argument)
    return [*args[:1], *configs, *others]


def _find_config(name: str) -> str:
    places = [Path(name), Path("configs") / name, SHIPPED / name]
    for place in places:
        with suppress(OSError):  # Too long for a name, for example.
            if place.is_file():
                return str(place)
    known = sorted(path.name for path in SHIPPED.glob("*.yaml"))
    raise UserError(
        f"the configuration {name!r} was found neither as given nor in configs/ nor in the package, which has "
        f"{choices(nearest(name, known))}. Give a path or the name of one of these."
    )


def with_checkpoint(args: Sequence[str]) -> list[str]:
    """Let a checkpoint's own settings come before, and so below, all that the user gave.

    The order of precedence is: defaults, checkpoint, configuration files, command line. When the user names
    another task, the checkpoint's data settings do not apply: the result is a transfer.

    Raises:
        UserError: The checkpoint is missing or cannot be read, or none is given where one is needed.
    """
    if not args or args[0] not in SUBCOMMANDS or {"-h", "--help", "--print_config"} & set(args):
        return list(args)
    command, given = args[0], given_options(args)
    path = given.get("ckpt_path")
    if path is None:
        if command != "fit":
            raise UserError(
                f"{command} needs the checkpoint of a fit. Give it with --ckpt_path checkpoints/RUN/{LAST}."
            )
        return list(args)
    if path == "last":
        path = str(run_folder(given) / LAST)
        args = _replace_values(args, ("--ckpt_path",), lambda _: path)
    settings = read_settings(Path(path))
    if given.get("data.task", settings["data"].get("task")) != settings["data"].get("task"):
        settings["data"] = {}
    settings["trainer"] = {"default_root_dir": str(Path(path).parent)}
    if command in ("test", "predict"):
        settings["results"] = {"tag": "-".join(_changed(given, _flatten(settings))) or None}
    return [command, "--config", json.dumps(settings), *args[1:]]


def _changed(given: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What a test has otherwise than its checkpoint, each as it stands in the name of its results."""
    given = _flatten({key: parsed(value) if key in NESTED else value for key, value in given.items()})
    tagged = [f"{part}.{name}" for part, names in TAGGED.items() for name in names]
    keys = [key for option in tagged for key in given if key == option or key.startswith(f"{option}.")]
    values = {key: absolute(given[key]) if key == "data.path" else given[key] for key in keys}
    changed = [key for key in keys if parsed(values[key]) != parsed(settings.get(key))]
    return [f"{key.partition('.')[2]}-{_short(given[key])}" for key in changed]


def _short(value: Any) -> str:
    """A value as part of a file name."""
    text = str(value)
    plain = re.sub(r"[^\w.,\[\] -]", "_", Path(text).name if "/" in text else text)[-40:]
    return plain if plain == text else f"{plain}-{sha256(text.encode()).hexdigest()[:6]}"


def with_whole_dicts(args: Sequence[str]) -> list[str]:
    """Put options by name together, what the command line says of one name over what configurations say.

    So each value is parsed once: what is quoted stays text.
    """
    values: dict[str, Any] = {}
    said, others = set(), []
    arguments = iter(args)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        option = next((o for o in NESTED if name == f"--{o}" or name.startswith(f"--{o}.")), None)
        if name in ("--config", "-c"):
            value = value if equals else next(arguments, "")
            settings = _flatten_parts(_read_config(value))
            values |= {o: settings[o] for o in NESTED if o in settings}
            others += [name, value]
        elif option:
            value = parsed(value if equals else next(arguments, ""))
            values[option] = _with(values.get(option), name.removeprefix(f"--{option}").split(".")[1:], value)
            said.add(option)
        else:
            others.append(argument)
    return [*others, *(f"--{option}={json.dumps(values[option])}" for option in NESTED if option in said)]


def _flatten_parts(settings: dict[str, Any]) -> dict[str, Any]:
    parts = {part: options for part, options in settings.items() if isinstance(options, dict)}
    return {f"{part}.{name}": value for part, options in parts.items() for name, value in options.items()}


def _with(base: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    base = base if isinstance(base, dict) else {}
    return {**base, path[0]: _with(base.get(path[0]), path[1:], value)}


def parsed(text: Any) -> Any:
    """A value of the command line, read as YAML; text that is none stays as it is."""
    try:
        return yaml.safe_load(text) if isinstance(text, str) else text
    except yaml.YAMLError:
        return text


def read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """The ``model`` and ``data`` options that a checkpoint was made with.

    Raises:
        UserError: No such file, a damaged one, or one of another program.
    """
    if not path.is_file():
        raise UserError(f"the checkpoint {str(path)!r} does not exist. Give the {LAST} of a fit with --ckpt_path.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Whatever is in the file, it is not a checkpoint; torch.load raises many kinds.
        raise UserError(
            f"the checkpoint {str(path)!r} is damaged or none at all. Fit again to make a new one."
        ) from error
    if not isinstance(checkpoint, dict) or "corrsteer_pl" not in checkpoint:
        raise UserError(f"the checkpoint {str(path)!r} was not written by corrsteer_pl. Give the {LAST} of a fit.")
    names = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
    return {
        name: {k: v for k, v in checkpoint.get(key, {}).items() if not k.startswith("_")} for name, key in names.items()
    }


def given_options(args: Sequence[str]) -> dict[str, Any]:
    """What the user set in configuration files and on the command line, by dotted name."""
    given: dict[str, Any] = {}
    arguments = iter(args[1:])
    for argument in arguments:
        name, _, value = argument.partition("=")
        value = value or next(arguments, "")
        if name in ("--config", "-c"):
            settings = _read_config(value)
            given |= _flatten(settings) | {"configs": [*given.get("configs", []), Path(value).stem]}
        else:
            given[name.removeprefix("--")] = value
    return given


def _read_config(value: str) -> dict[str, Any]:
    """The options of a configuration file, or of JSON in its place."""
    try:
        text = value if value.startswith("{") else Path(value).read_text(encoding="utf-8")
        settings = yaml.safe_load(text) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration {value} is no valid YAML ({one_line(error)}).") from error
    if not isinstance(settings, dict):
        raise UserError(f"the configuration {value} holds no options by name. See --print_config for an example.")
    return settings


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if value is not None:
            flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def run_folder(given: dict[str, Any]) -> Path:
    """Where a run's results go: named after its configuration files, or else after the task."""
    if "trainer.default_root_dir" in given:
        return Path(given["trainer.default_root_dir"])
    return RUNS / ("-".join(given.get("configs", [])) or Path(str(given.get("data.task", "demo_qa"))).name)


def _replace_values(args: Sequence[str], names: Sequence[str], change: Callable[[str], str]) -> list[str]:
    """Change the values of an option, given as ``--name value`` or ``--name=value``."""
    replaced = list(args)
    for i, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name in names and equals:
            replaced[i] = f"{name}={change(value)}"
        elif name in names and i + 1 < len(args):
            replaced[i + 1] = change(args[i + 1])
    return replaced
