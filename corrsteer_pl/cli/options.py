"""The options of each command, read from the sources: help, and misspelt names, need no import of what runs.

LightningCLI makes its parser of the same signatures, so the names agree; a test compares them.
"""

import ast
import re
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from docstring_parser import parse

from corrsteer_pl.cli.arguments import PARTS, given_method, given_options
from corrsteer_pl.errors import UserError, choices, nearest
from corrsteer_pl.methods.registry import METHODS, method_path

DATA = "corrsteer_pl.data.module:TaskDataModule"
RESULTS = "corrsteer_pl.methods.runs.files:RunFiles"
TRAINER = "lightning.pytorch.trainer.trainer:Trainer"
# Functions of the commands that are no stage of the Trainer.
FUNCTIONS = {
    "chat": "corrsteer_pl.commands.chat:chat",
    "export": "corrsteer_pl.commands.export:export",
    "page": "corrsteer_pl.commands.page:page",
    "push": "corrsteer_pl.commands.push:push",
    "report": "corrsteer_pl.commands.report:report_on",
    "serve": "corrsteer_pl.commands.serve:serve",
    "train_saes": "corrsteer_pl.commands.train_saes:train_saes_on",
}
# Arguments of the Trainer's stages, and what given_options adds.
UNSHOWN = ("configs", "weights_only", "verbose", "return_predictions")
CHECKPOINT = "Checkpoint of a fit; the settings of the fit apply unless others are given. 'last': that of this run."


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: As on the command line, without dashes.
        kind: The type that it takes, as the source has it.
        default: The default, as the source has it; None if it has to be given.
        help: What it means.
    """

    name: str
    kind: str
    default: str | None
    help: str


@dataclass(frozen=True)
class Group:
    """Options that belong together.

    Attributes:
        title: What they are about.
        options: The options; None where the source does not tell them.
    """

    title: str
    options: tuple[Option, ...] | None


def groups(command: str, method: str) -> dict[str, Group]:
    """The options of a command by the prefix of their names; "" has no prefix."""
    if command in FUNCTIONS:
        return {"": Group("options", _options(FUNCTIONS[command], ""))}
    return {
        "": Group("general", tuple(_general(command, method))),
        "model": _of_all()
        if command == "compare"
        else Group(f"the method {method}, and its language model", _options(method_path(method), "model.")),
        "data": Group("the task and its data", _options(DATA, "data.")),
        "results": Group("what a run leaves", _options(RESULTS, "results.")),
        "trainer": Group("Lightning's Trainer", _options(TRAINER, "trainer.")),
    }


def _general(command: str, method: str) -> list[Option]:
    """The options of a command that have no prefix."""
    if command == "compare":
        return [
            Option("config", "file", None, "Configuration of a task, and of the model."),
            Option("method", "name", "", "In a configuration: the method that its options of the model are for."),
            Option("methods", "names", "", "Systems to compare, separated by spaces; all that there are if left out."),
            Option("seeds", "int", "3", "How many seeds, from 0."),
            Option("out", "folder", "checkpoints/compare", "Where cells, table and figure are written."),
            Option("elsewhere", "file", "", "Configuration of a task on which the change may do harm."),
            Option("systems", "file", "", "YAML file with more systems: for each name a method, and its options."),
            Option("readme", "file", "", "File into which the table is written, between the marks named after --out."),
        ]
    general = [
        Option(
            "config", "file", "", "Configuration file, in YAML; several are merged, later values over earlier ones."
        ),
        Option("print_config", "flag", "", "Print the configuration with all defaults, and exit."),
        Option("method", "|".join(METHODS), method, "What is fitted."),
        Option("seed_everything", "bool | int", "False", "Seed of all random numbers; a method's own needs none."),
    ]
    if command != "doctor":
        general.append(Option("ckpt_path", "file", "" if command == "fit" else None, CHECKPOINT))
    if command == "transfer":
        general[0] = Option("config", "file", None, "Configuration of a task; each is tested on its own.")
        general += [
            Option("text", "file", "", "JSONL, CSV or parquet file with plain text in the column text, for its loss."),
            Option("text_rows", "int", "200", "How many of its rows are read."),
        ]
    return general


def _of_all() -> Group:
    """The options of all methods, each once."""
    found = {option.name: option for path in METHODS.values() for option in _options(path, "model.") or ()}
    return Group("the methods, and their language model", tuple(found.values()))


def command_help(program: str, command: str, does: str, args: Sequence[str]) -> str:
    """The help of a command."""
    parser = ArgumentParser(
        prog=program, usage=f"{program} [options]", description=does, add_help=False, allow_abbrev=False
    )
    for group in groups(command, given_method(args)).values():
        section = parser.add_argument_group(group.title)
        for option in group.options or ():
            default = "" if option.default in ("", None) else f" (default: {option.default})"
            text = " ".join(f"{option.help}{default}".split()).replace("%", "%%")
            metavar = option.kind.upper() if option.kind in ("file", "flag") else option.kind
            required = "required; " if option.default is None else ""
            section.add_argument(f"--{option.name}", metavar=metavar, help=f"{required}{text}" or SUPPRESS)
    return parser.format_help()


def check_names(args: Sequence[str]) -> None:
    """Refuse options that no part of a command has.

    Raises:
        UserError: Naming the nearest that there are.
    """
    known = groups(args[0], given_method(args))
    general = [option.name for option in known[""].options or ()]
    for given in given_options(args):
        part, dot, rest = given.partition(".")
        group, name = known.get(part), rest.split(".")[0]
        if group is None:
            names = [*general, *(part for part in PARTS if part in known)]
            found = part in (*general, *UNSHOWN)
        else:
            names = [option.name.partition(".")[2] for option in group.options or ()]
            found = group.options is None or not dot or not name.isidentifier() or name in names
        if not found:
            wanted = name if group else given
            prefix = f"{part}." if group else ""
            near = choices(f"{prefix}{one}" for one in nearest(wanted, names, 4))
            raise UserError(f"there is no option {given}; the nearest are {near}. See {args[0]} --help for all.")


@cache
def _options(path: str, prefix: str) -> tuple[Option, ...] | None:
    """The arguments of a function, or of a class's ``__init__``, at ``module:name``; None if it has none of its own."""
    module, _, name = path.partition(":")
    source = _source(module)
    if source is None:
        return None
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found = next((node for node in tree.body if getattr(node, "name", None) == name), None)
    docs = [ast.get_docstring(found)] if isinstance(found, (ast.ClassDef, ast.FunctionDef)) else []
    if isinstance(found, ast.ClassDef):
        found = next((node for node in found.body if getattr(node, "name", None) == "__init__"), None)
        docs += [ast.get_docstring(found)] if isinstance(found, ast.FunctionDef) else []
    if not isinstance(found, ast.FunctionDef):
        return None
    meanings = {param.arg_name: param.description or "" for doc in docs if doc for param in parse(doc).params}
    options = _signature(found)
    return tuple(
        Option(f"{prefix}{arg.arg}", kind, default, meanings.get(arg.arg, "")) for arg, kind, default in options
    )


def _signature(function: ast.FunctionDef) -> Iterator[tuple[ast.arg, str, str | None]]:
    positional = [arg for arg in function.args.args if arg.arg != "self"]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(function.args.defaults))
    pairs = [
        *zip(positional, [*defaults, *function.args.defaults], strict=True),
        *zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True),
    ]
    for arg, default in pairs:
        kind = ast.unparse(arg.annotation) if arg.annotation else "value"
        yield arg, _plain(kind), None if default is None else ast.unparse(default)


def _plain(kind: str) -> str:
    """A type as help shows it.

    Example:
        >>> _plain("Literal['max', 'mean'] | None"), _plain("Optional[Union[int, float]]")
        ('max|mean', 'int|float')
    """
    kind = re.sub(r"Optional\[(.*)\]", r"\1", kind)
    kind = re.sub(r"(?:Literal|Union)\[(.*?)\]", lambda match: "|".join(match[1].split(", ")), kind)
    return kind.replace("'", "").replace(" | None", "").replace(" | ", "|")


def _source(module: str) -> Path | None:
    """The file of a module; of its packages only the first, which is not run, is asked for its place."""
    top, *parts = module.split(".")
    spec = find_spec(top)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder, *parts).with_suffix(".py")
        if file.is_file():
            return file
    return None
