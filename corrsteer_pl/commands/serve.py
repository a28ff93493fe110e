"""An OpenAI-compatible endpoint for a run, by transformers' own server: one model under two names."""

import socket
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.tables import show
from corrsteer_pl.methods.runs.loading import load_fit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# What the server of transformers needs.
NEEDED = ("fastapi", "uvicorn", "openai")


def serve(
    run: Path, port: int = 8000, host: str = "127.0.0.1", name: str | None = None, api_key: str | None = None
) -> None:
    """Answer completions and chat completions of the OpenAI interface, streamed or not, with NAME and NAME-steered.

    Args:
        run: Folder of a run, such as checkpoints/demo, or a checkpoint.
        port: Port to listen on.
        host: Address to listen on; one that other machines reach needs an api_key.
        name: What the model is called; the run's name if left out.
        api_key: What requests have to bring as their key; none if left out.
    """
    if missing := [module for module in NEEDED if find_spec(module) is None]:
        raise UserError(f"serving needs {missing[0]}, of the extra 'serving': pip install 'corrsteer_pl[serving]'.")
    if host not in LOOPBACK and not api_key:
        raise UserError(f"--host {host} is reached by other machines, so give a key that they have to know: --api_key.")
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise UserError("--api_key has a character that no client can send. Take letters, digits and signs of ASCII.")
    with listening(host, port) as places:
        import uvicorn

        from corrsteer_pl.commands.endpoint import application, names

        fit = load_fit(run)
        app = application(fit, name or fit.name, api_key)
        shown, open_port = places.getsockname()[:2]
        show(f"{', '.join(names(name or fit.name))} at http://{shown}:{open_port}/v1; Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[places])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: The port is taken, or cannot be.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; it is a number from 0, for any that is free, to {2**16 - 1}.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"port {port} of {host} cannot be listened on ({error.strerror}). Choose another with --port, or another "
            "address."
        ) from error
