"""Peak memory of a fit against the number of samples, of layers and of features: predicted beside measured."""

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.world import BATCH, fit, make_world
from corrsteer_pl.methods.accumulate import Accumulator

MIB = 2**20


def peak_of(options: Namespace) -> dict[str, float]:
    """Peak resident memory of a process that fits on ``options.peak_of`` samples, in MiB, and before it did."""
    world = make_world(options.layers, options.width, options.d_sae, options.layers)
    widths = {layer: sae.d_sae for layer, sae in world.saes.items()}
    # The peak from here on.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        fit(world, folder, world.prompts(options.peak_of, 16), world.prompts(32, 16))
    return {
        "peak": _status("VmHWM"),
        "before": before,
        "sums": Accumulator(widths, ["max"], torch.device("cpu")).size / MIB,
        "activations": BATCH * (len(widths) + 4) * options.d_sae * 4 / MIB,
    }


def _status(name: str) -> float:
    """A figure of this process, in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) / 1024


def measured(options: Namespace, samples: int, **sizes: int) -> dict[str, float]:
    """:func:`peak_of` in a process of its own."""
    given = {name: sizes.get(name, getattr(options, name)) for name in ("layers", "width", "d_sae")}
    command = [sys.executable, "-m", "benchmarks", *(f"--{name}={value}" for name, value in given.items())]
    done = subprocess.run([*command, f"--peak_of={samples}"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def table(options: Namespace) -> Iterator[dict[str, float]]:
    """Peaks for more samples, layers and features."""
    few = options.memory[1]
    for samples, sizes in (
        (few, {}), (4 * few, {}), (few, {"layers": 2 * options.layers}), (few, {"d_sae": 4 * options.d_sae}),
    ):  # fmt: skip
        shown = {"samples": samples, "layers": options.layers, "d_sae": options.d_sae, **sizes}
        yield {**shown, **measured(options, samples, **sizes)}
