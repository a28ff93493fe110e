"""What a user gives on the command line and in configuration files, and which of it prevails."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from corrsteer_pl.cli.safe_yaml import read_yaml
from corrsteer_pl.errors import UserError, choices, nearest, one_line
from corrsteer_pl.files import LAST, exists
from corrsteer_pl.methods.registry import DEFAULT, READY
from corrsteer_pl.options import import_paths

STAGES = ("fit", "validate", "test", "predict", "transfer", "compare")
# The groups of options, each with a common prefix.
PARTS = ("model", "data", "trainer", "results")
RUNS = Path("checkpoints")
# In an installed package the configurations lie inside it, in a clone beside it.
PACKAGE = Path(__file__).parents[1]
SHIPPED = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())
# Options whose values are dictionaries.
NESTED = ("data.task_args", "data.filter", "data.fit_on", "model.llm_args", "model.budget", "model.harmless")
# The task or the model that such an option belongs to.
OWNERS = {"data.task_args": "data.task", "data.filter": "data.task", "model.llm_args": "model.llm"}
CODE = "model.llm_args.trust_remote_code"
FLAGS = ("-h", "--help", "--print_config")


def with_found_configs(args: Sequence[str]) -> list[str]:
    """Replace the value of each ``--config`` by the file that it means.

    Looked for as given, then in ``configs/``, then among the configurations shipped with the package.

    Raises:
        UserError: There is none.
    """
    return _configs_first(replace_values(args, ("--config", "-c", "--elsewhere"), _find_config))


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


def split_options(args: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of some options, and all arguments but these.

    Example:
        >>> split_options(["--config", "a", "--x=1", "--config=b"], ["--config"])
        (['a', 'b'], ['--x=1'])
    """
    values: list[str] = []
    others: list[str] = []
    rest = iter(args)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in names:
            values += [value] if equals else islice(rest, 1)
        else:
            others.append(argument)
    return values, others


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


def _spelt(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of options, given as ``--name value``, ``--name=value`` or, for lists, ``--name+=value``."""
    arguments = iter(args[1:])
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in FLAGS or not name.startswith("-"):
            continue
        yield name.removeprefix("--").removesuffix("+"), value if equals else next(arguments, "")


def given_options(args: Sequence[str]) -> dict[str, Any]:
    """What the user set in configuration files and on the command line, by dotted name.

    A whole part may be given as a file or as JSON, ``--model model.yaml``. Values of the command line are text.

    Raises:
        UserError: A configuration cannot be read.
    """
    given: dict[str, Any] = {}
    for name, value in _spelt(args):
        if name in ("config", "-c"):
            given |= flatten(read_config(value)) | {"configs": [*given.get("configs", []), Path(value).stem]}
        elif name in PARTS and value and args[0] in (*STAGES, "doctor"):
            given |= flatten({name: read_config(value)})
        elif name in NESTED:
            given |= flatten({name: parsed(value)}) or {name: value}
        else:
            _check_value(name, value)
            given[name] = value
    return given


def _check_value(name: str, value: str) -> None:
    """Refuse a list or a mapping that the parser would take long to read, or read half of."""
    if value[:1] in ("[", "{"):
        try:
            read_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"the value of {name} is no valid YAML ({one_line(error)}).") from error


def given_method(args: Sequence[str]) -> str:
    """The method that the user names, or else that of the checkpoint's run, or else the default one."""
    given = given_options(args)
    if "method" in given:
        return str(given["method"])
    if args[0] in STAGES and given.get("ckpt_path"):
        # A checkpoint itself takes seconds to read; what does not agree with it is refused later.
        beside = (checkpoint_path(args[0], given) or Path()).parent / "config.yaml"
        with suppress(UserError, OSError):
            if beside.is_file():
                return str(read_config(str(beside)).get("method", DEFAULT))
    return DEFAULT


def with_checkpoint(args: Sequence[str], given: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Let a checkpoint's own settings come before, and so below, all that the user gave.

    The order of precedence is: defaults, checkpoint, configuration files, command line. When the user names
    another task, the checkpoint's data settings do not apply: the result is a transfer.

    Args:
        args: The command and its arguments.
        given: What :func:`given_options` says of them.
        settings: The options ``model`` and ``data`` of the checkpoint.

    Raises:
        UserError: The checkpoint would run code that the user has not named.
    """
    refuse_code(settings, given)
    path = str(checkpoint_path(args[0], given))
    args = replace_values(args, ("--ckpt_path",), lambda _: path)
    first = {**settings, "trainer": {"default_root_dir": str(Path(path).parent)}}
    return [args[0], "--config", json.dumps(first), *args[1:]]


def checkpoint_path(command: str, given: dict[str, Any]) -> Path | None:
    """The checkpoint that a stage starts from; None for a fit from the beginning, and for what needs no fit.

    Raises:
        UserError: The stage needs one, and none is given.
    """
    path = given.get("ckpt_path")
    if path is None:
        if command != "fit" and not (command in ("test", "predict") and given.get("method") in READY):
            raise UserError(
                f"{command} needs the checkpoint of a fit. Give it with --ckpt_path checkpoints/RUN/{LAST}."
            )
        return None
    return run_folder(given) / LAST if path == "last" else Path(path)


def refuse_code(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse a checkpoint that would run code, unless the user names the same code anew, or something else instead.

    Raises:
        UserError: The checkpoint names code of a model's repository, or a task or a reward by an import path.
    """
    named: dict[str, Any] = dict(import_paths(settings.get("data", {})))
    if (settings.get("model", {}).get("llm_args") or {}).get("trust_remote_code"):
        named[CODE] = True
    for option, value in named.items():
        if option not in given:
            shown = str(value).lower() if value is True else value
            raise UserError(
                f"the checkpoint sets {option} to {shown}, which runs code that is not part of corrsteer_pl. If you "
                f"trust it, give it anew with --{option} {shown}."
            )


def with_whole_dicts(args: Sequence[str]) -> list[str]:
    """Merge the options that are dictionaries: each configuration into those before it, the command line into all.

    A dictionary is merged name by name, at every depth. Any other value, lists included, replaces the earlier one, and
    so does a dictionary that belongs to another task or model. Each value is parsed once, so quoted text stays text.
    """
    merged: dict[str, Any] = {}
    others: list[str] = []
    given: set[str] = set()
    arguments = iter(args)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        option = next((o for o in NESTED if name == f"--{o}" or name.startswith(f"--{o}.")), None)
        part = name.removeprefix("--")
        if name in ("--config", "-c") or part in PARTS:
            value = value if equals else next(arguments, "")
            settings = read_config(value)
            settings = settings if name in ("--config", "-c") else {part: settings}
            settings = _flatten_parts(settings, value)
            # What a single configuration gives needs no merging.
            given |= {o for o in NESTED if isinstance(merged.get(o), dict) and isinstance(settings.get(o), dict)}
            merged = _merged_parts(merged, settings)
            others += [name, value]
        elif option:
            value = parsed(value if equals else next(arguments, ""))
            merged[option] = _with(merged.get(option), name.removeprefix(f"--{option}").split(".")[1:], value)
            given.add(option)
        else:
            others.append(argument)
    return [*others, *(f"--{option}={json.dumps(merged[option], default=str)}" for option in NESTED if option in given)]


def _flatten_parts(settings: dict[str, Any], config: str) -> dict[str, Any]:
    """The options of a configuration by their names; a part may be named by its file, relative to the configuration."""
    flat: dict[str, Any] = {}
    for part, options in settings.items():
        if part in PARTS and isinstance(options, str):
            beside = Path(config).parent / options
            options = read_config(str(beside if exists(str(beside)) else options))
        if isinstance(options, dict):
            flat |= {f"{part}.{name}": value for name, value in options.items()}
    return flat


def _merged_parts(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Options by name, those that are dictionaries merged into the earlier ones."""
    result = {**base, **settings}
    for option in NESTED:
        belongs_to = OWNERS.get(option, option)
        same = belongs_to not in settings or settings[belongs_to] == base.get(belongs_to, settings[belongs_to])
        if option in base and option in settings and (same or belongs_to == option):
            result[option] = _merged(base[option], settings[option])
    return result


def _merged(base: Any, value: Any) -> Any:
    """A value merged into an earlier one; the settings of another task replace those of the earlier task."""
    if not isinstance(base, dict) or not isinstance(value, dict):
        return value
    if "task" in value and value["task"] != base.get("task", value["task"]):
        return value
    return {**base, **{name: _merged(base.get(name), inner) for name, inner in value.items()}}


def _with(base: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    base = base if isinstance(base, dict) else {}
    return {**base, path[0]: _with(base.get(path[0]), path[1:], value)}


def parsed(text: Any) -> Any:
    """A value of the command line, read as YAML; text that is none stays as it is."""
    try:
        return read_yaml(text) if isinstance(text, str) else text
    except yaml.YAMLError:
        return text


def read_config(value: str) -> dict[str, Any]:
    """The options of a configuration file, or of JSON in its place."""
    if not value:
        raise UserError("--config needs a configuration file after it, or the name of one that is shipped: demo.yaml.")
    try:
        text = value if value.startswith("{") else Path(value).read_text(encoding="utf-8")
        settings = read_yaml(text) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration {value} is no valid YAML ({one_line(error)}).") from error
    if not isinstance(settings, dict):
        raise UserError(f"the configuration {value} holds no options by name. See --print_config for an example.")
    for part in PARTS:
        if not isinstance(settings.get(part) or {}, (dict, str)):
            raise UserError(
                f"the configuration {value} has a {type(settings[part]).__name__} for {part}, which takes options by "
                f"name. Write them as {part}: {{name: value}}."
            )
    return settings


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names; those that are None are left out."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if value is not None:
            flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def run_folder(given: dict[str, Any]) -> Path:
    """Where a run's results go: named after its configuration files, or else after the task.

    For vectors from elsewhere the name of their file follows, and the row of a matrix, lest their results mix with
    those of a fit.
    """
    if "trainer.default_root_dir" in given:
        return Path(str(given["trainer.default_root_dir"]))
    names = given.get("configs") or [Path(str(given.get("data.task", "demo_qa"))).name]
    file = [Path(str(given["model.vectors"])).stem] if "model.vectors" in given else []
    row = [f"row{given['model.row']}"] if "model.row" in given else []
    return RUNS / "-".join([*names, *file, *row])


def replace_values(args: Sequence[str], names: Sequence[str], change: Callable[[str], str]) -> list[str]:
    """Change the values of an option, given as ``--name value`` or ``--name=value``."""
    replaced = list(args)
    for i, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name in names and equals:
            replaced[i] = f"{name}={change(value)}"
        elif name in names and i + 1 < len(args):
            replaced[i + 1] = change(args[i + 1])
    return replaced
