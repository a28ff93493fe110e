"""``python -m benchmarks``: print the tables, and write them into ``benchmarks/README.md`` and ``results.json``."""

import logging
import platform
import sys
import time
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import fits
from benchmarks.rows import Row, rows
from benchmarks.startup import startup
from corrsteer_pl.errors import UserError
from corrsteer_pl.files import write_between, write_json
from corrsteer_pl.version import commit

FOLDER = Path(__file__).parent
RESULTS, README = FOLDER / "results.json", FOLDER / "README.md"
HEADER = "| work | against | ours, s | plain, s | ratio | wanted | same answers |\n|---|---|---|---|---|---|---|\n"
MEMORY = (
    "| samples | layers | features | peak, MiB | ratio | the fit's | predicted: sums | activations | variants |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)
STARTUP = (
    "| command | processor s | torch, transformers: s | ratio | wanted | as it should |\n|---|---|---|---|---|---|\n"
)
SCALING = "| processes | threads each | fit, s | ratio | same candidates |\n|---|---|---|---|---|\n"
QUICK = {"layers": 3, "width": 128, "d_sae": 256, "prompts": 6, "fit_prompts": 40, "tokens": 40, "repeats": 1}


def parse(args: list[str]) -> Namespace:
    """The options of the command line."""
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--layers", type=positive, default=8, help="decoder blocks")
    parser.add_argument("--width", type=positive, default=512, help="width of the residual stream, a multiple of 64")
    parser.add_argument("--d_sae", type=positive, default=4096, help="features of each SAE")
    parser.add_argument("--prompts", type=positive, default=24, help="validation prompts")
    parser.add_argument("--fit_prompts", type=positive, default=64, help="prompts to fit")
    parser.add_argument("--tokens", type=positive, default=330, help="tokens of a prompt")
    parser.add_argument("--repeats", type=positive, default=3, help="of which the median is taken")
    parser.add_argument("--memory", type=positive, nargs=2, default=[500, 5000], help="few and many samples to fit")
    parser.add_argument("--quick", action="store_true", help="small sizes unless given, for agreement and not for time")
    if "--quick" in args:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(args)
    if options.width % 64:
        parser.error(f"--width is {options.width}; it is a multiple of 64")
    options.memory.sort()
    return options


def positive(text: str) -> int:
    """A number from 1 on, as the command line has it."""
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def machine(options: Namespace) -> dict:
    """Where and on what was measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": "float32",
        "versions": {name: version(name) for name in ("torch", "transformers", "lightning", "sae-lens")},
        "sizes": {name: value for name, value in vars(options).items() if name != "quick"},
    }


def line(row: Row) -> str:
    """A row of the first table."""
    figures = f"{row.ours:.2f} | {row.plain:.2f} | {row.ratio:.2f}"
    return f"| {row.work} | {row.against} | {figures} | {row.wanted} | {'yes' if row.agree else 'NO'} |\n"


def memory_line(peak: dict[str, Any], first: dict[str, Any]) -> str:
    """A row of the table of memory."""
    sizes = f"{peak['fit_prompts']} | {peak['layers']} | {peak['d_sae']}"
    found = f"{peak['peak']:.0f} | {peak['peak'] / first['peak']:.3f} | {peak['peak'] - peak['before']:.0f}"
    return f"| {sizes} | {found} | {peak['sums']:.1f} | {peak['activations']:.1f} | {peak['variants']:.1f} |\n"


def scaling_line(way: dict[str, Any]) -> str:
    """A row of the table of processes."""
    sizes = f"{way['processes']} | {way['threads']} | {way['seconds']:.2f} | {way['faster']:.2f}"
    return f"| {sizes} | {'yes' if way['same'] else 'NO'} |\n"


def startup_line(row: dict[str, Any]) -> str:
    """A row of the table of start-up."""
    wanted = "-" if row["wanted"] is None else f"at most {row['wanted']:g}"
    figures = f"{row['seconds']:.2f} | {row['plain']:.2f} | {row['ratio']:.2f}"
    return f"| `{row['command']}` | {figures} | {wanted} | {'yes' if row['same'] else 'NO'} |\n"


def write_readme(shown: str, about: dict) -> None:
    """Put the tables between the marks of the README."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    note = f"Measured on {about['date']} at commit {about['commit']}: {about['machine']}, {about['dtype']}, {versions}."
    write_between(README, "results", f"{shown}\n{note}\n")


def main(args: list[str]) -> int:
    """Measure; 1 if an answer of ours differs from the plain way's, 2 if nothing can be fitted at these sizes."""
    options = parse(args)
    about = machine(options)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    measured, shown, started = [], STARTUP, []
    sys.stdout.write(STARTUP)
    for row in startup(options.repeats):
        started.append(row)
        shown += startup_line(row)
        sys.stdout.write(startup_line(row))
    shown += "\n" + HEADER
    sys.stdout.write("\n" + HEADER)
    try:
        for row in rows(options):
            measured.append(row)
            shown += line(row)
            sys.stdout.write(line(row))
            sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if not options.quick:
        peaks, ways = list(fits.memory(options)), list(fits.scaling(options))
        shown += "\n" + MEMORY + "".join(memory_line(peak, peaks[0]) for peak in peaks)
        shown += "\n" + SCALING + "".join(map(scaling_line, ways))
        found = [row.as_dict() for row in measured]
        write_json(RESULTS, {**about, "startup": started, "rows": found, "memory": peaks, "scaling": ways})
        write_readme(shown, about)
    return 0 if all(row.agree for row in measured) and all(row["same"] for row in started) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
