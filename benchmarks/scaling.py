"""The same fit by one process and by two, and with one thread and with two."""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from benchmarks.rows import timed
from benchmarks.world import fit, make_world

# Processes, and threads of each.
WAYS = ((1, 1), (1, 2), (2, 1))


def fit_in(options: Namespace) -> dict[str, Any]:
    """Seconds of the second of two equal fits by ``options.processes`` processes, and what it selects."""
    world = make_world(options.layers, options.width, options.d_sae, min(7, options.layers))
    fitted, validated = (world.prompts(n, options.tokens) for n in (2 * options.fit_prompts, options.prompts))
    many = {"devices": options.processes, "strategy": "ddp" if options.processes > 1 else "auto"}
    with tempfile.TemporaryDirectory() as folder:
        fit(world, folder, fitted, validated, **many)
        seconds, module = timed(lambda: fit(world, folder, fitted, validated, **many))
    candidates = [(f.layer, f.index, round(f.coefficient, 4)) for f in module.selection.candidates]
    return {"seconds": seconds, "candidates": candidates, "rank": module.global_rank}


def table(options: Namespace) -> Iterator[dict[str, Any]]:
    """Seconds by processes and threads, and whether all select what the first does."""
    first: Any = None
    for processes, threads in WAYS:
        found = _measured(options, processes, threads)
        first = first or found
        yield {
            "processes": processes,
            "threads": threads,
            "seconds": found["seconds"],
            "faster": first["seconds"] / found["seconds"],
            "same": found["candidates"] == first["candidates"],
        }


def _measured(options: Namespace, processes: int, threads: int) -> dict[str, Any]:
    names = ("layers", "width", "d_sae", "prompts", "fit_prompts", "tokens")
    launcher = ["torch.distributed.run", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    sizes = [f"--{name}={getattr(options, name)}" for name in names]
    command = [sys.executable, "-m", *launcher, "benchmarks", *sizes, f"--processes={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return next(found for found in map(json.loads, done.stdout.splitlines()) if found["rank"] == 0)
