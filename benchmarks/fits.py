"""Fits in processes of their own: peak memory by size, predicted beside measured, and time by number of processes."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.world import BATCH, fit, make_world, no_sums, timed
from corrsteer_pl.models.decoding.decode import Decoder

MIB = 2**20
# The allocator gives back what is freed, instead of keeping it for later.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# Processes, and threads of each.
WAYS = ((1, 1), (1, 2), (2, 1))
SIZES = ("layers", "width", "d_sae", "prompts", "fit_prompts", "tokens")


def memory(options: Namespace) -> Iterator[dict[str, Any]]:
    """Peaks for few samples and for many, for more layers and for more features; prompts are short."""
    few, many = options.memory
    for sizes in (
        {"fit_prompts": few}, {"fit_prompts": many},
        {"fit_prompts": few, "layers": 2 * options.layers}, {"fit_prompts": few, "d_sae": 4 * options.d_sae},
    ):  # fmt: skip
        sizes |= {"prompts": BATCH, "tokens": 16, "sae_layers": sizes.get("layers", options.layers)}
        yield alone(options, GIVES_BACK, **sizes)


def scaling(options: Namespace) -> Iterator[dict[str, Any]]:
    """Seconds by processes and threads, and whether all select what the first does."""
    first: Any = None
    for processes, threads in WAYS:
        found = alone(options, {"OMP_NUM_THREADS": str(threads)}, processes, fit_prompts=2 * options.fit_prompts)
        first = first or found
        faster, same = first["seconds"] / found["seconds"], found["candidates"] == first["candidates"]
        yield {"processes": processes, "threads": threads, "seconds": found["seconds"], "faster": faster, "same": same}


def alone(options: Namespace, environment: dict[str, str], processes: int = 1, **sizes: int) -> dict[str, Any]:
    """What :func:`main` finds in so many fresh processes."""
    launcher = ["torch.distributed.run", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    given = {**{name: getattr(options, name) for name in SIZES}, "processes": processes, **sizes}
    command = [sys.executable, "-m", *launcher, "benchmarks.fits", *(f"--{n}={value}" for n, value in given.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return next(found for found in map(json.loads, done.stdout.splitlines()) if found["rank"] == 0)


def main(args: list[str]) -> int:
    """Fit twice; print the second's seconds, candidates and peak memory in MiB, all as one line of JSON."""
    parser = ArgumentParser(prog="python -m benchmarks.fits", description=__doc__)
    for name in (*SIZES, "processes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--sae_layers", type=int, default=7)
    options = parser.parse_args(args)
    world = make_world(options.layers, options.width, options.d_sae, min(options.sae_layers, options.layers))
    fitted, validated = (world.prompts(n, options.tokens) for n in (options.fit_prompts, options.prompts))
    many = {"devices": options.processes, "strategy": "ddp" if options.processes > 1 else "auto"}
    with tempfile.TemporaryDirectory() as folder:
        fit(world, folder, fitted, validated, **many)
        gc.collect()
        # The peak from here on.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        seconds, module = timed(lambda: fit(world, folder, fitted, validated, **many))
    found = {
        **{name: getattr(options, name) for name in SIZES},
        "rank": module.global_rank,
        "seconds": seconds,
        "candidates": [(f.layer, f.index, round(f.coefficient, 4)) for f in module.selection.candidates],
        "peak": _status("VmHWM"),
        "before": before,
        "sums": no_sums(world).size / MIB,
        "activations": BATCH * (len(world.saes) + 4) * options.d_sae * 4 / MIB,
        "variants": (2 * len(world.saes) + 1) * Decoder(world.llm, 1).size_of_variant(validated, True) / MIB,
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _status(name: str) -> float:
    """A figure of this process, in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
