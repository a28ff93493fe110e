"""Commands in processes of their own, forked from one that has imported all: imports take longer than small fits."""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *(f"corrsteer_pl.{name}" for name in ("cli.lightning", "methods.corrsteer", "methods.crisp")),
        *("corrsteer_pl.models.sae_loading", "corrsteer_pl.models.llm_loading", "datasets", "peft"),
    ]
)


class Command:
    """A command that has been started, on one process or, with ``ranks`` and ``nodes``, on several as by torchrun.

    What is in ``env`` comes too late for what reads it when it is imported; modules of ``imports`` are imported before.

    Attributes:
        processes: By rank.
    """

    def __init__(self, *args, cwd, ranks=1, nodes=1, env=None, imports=()):
        self.said = Path(tempfile.mkdtemp(prefix="said-", dir=Path(cwd).parent))
        for name in ("stdout", "stderr"):
            (self.said / name).touch()
        port, local = free_port(), ranks // nodes
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank % local, "GROUP_RANK": rank // local}
            size = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": local, "TORCHELASTIC_RUN_ID": "tests"}
            told = {**place, **size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
            told = {name: str(value) for name, value in {**told, **(env or {})}.items()}
            given = ([*map(str, args)], str(cwd), told, imports, self.said)
            self.processes.append(FORKS.Process(target=_run, args=given))
        for process in self.processes:
            process.start()

    def is_running(self):
        return any(process.is_alive() for process in self.processes)

    def send(self, how):
        """Send a signal to all its processes."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, how)

    def wait(self, timeout=240):
        """The exit status of each process, the number of the signal with a minus if one has ended it."""
        for process in self.processes:
            process.join(timeout)
        if self.is_running():
            self.send(signal.SIGKILL)
            raise AssertionError(f"it has not ended after {timeout} s: {self.stderr[-3000:]}")
        return [process.exitcode for process in self.processes]

    @property
    def stdout(self):
        return (self.said / "stdout").read_text(encoding="utf-8")

    @property
    def stderr(self):
        return (self.said / "stderr").read_text(encoding="utf-8")


def forked(*args, cwd, check=True, **options):
    """Run a command to its end; with ``check``, it has to succeed."""
    command = Command(*args, cwd=cwd, **options)
    statuses = command.wait()
    assert not check or not any(statuses), command.stderr[-3000:]
    return command


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(args, cwd, env, imports, said):
    from corrsteer_pl.cli.program import process

    # Whatever runs in the background of a shell ignores it, these tests perhaps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ |= env
    for name in imports:
        import_module(name)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    sys.argv = ["corrsteer_pl", *args]
    sys.exit(process())
