"""An OpenAI-compatible endpoint for a run, by transformers' own server: one model under two names."""

import secrets
import socket
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from math import inf
from pathlib import Path
from threading import Lock
from typing import Any

from corrsteer_pl.errors import UserError
from corrsteer_pl.evaluation.tables import show
from corrsteer_pl.methods.loading import Fit, load_fit
from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.models.llm import LanguageModel

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
    with listening(host, port) as places:
        import uvicorn

        fit = load_fit(run)
        app = application(fit, name or fit.name, api_key)
        shown, open_port = places.getsockname()[:2]
        show(f"{', '.join(names(name or fit.name))} at http://{shown}:{open_port}/v1; Ctrl-C ends it.")
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


def names(name: str) -> tuple[str, str]:
    """The names of the unchanged model and of the changed one."""
    return name, f"{name}-steered"


def refusal(request: Mapping[str, Any], models: Iterable[str]) -> tuple[int, str] | None:
    """Why a request cannot be answered, with HTTP's status; None if it can.

    Example:
        >>> refusal({"model": "other"}, ["demo"])
        (404, "there is no model 'other'; there is demo")
    """
    known, model = tuple(models), request.get("model")
    if model not in known:
        return 404, f"there is no model {model!r}; there {'is' if len(known) == 1 else 'are'} {' and '.join(known)}"
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        wanted = request.get(field)
        if wanted is not None and (type(wanted) is not int or wanted < 1):
            return 400, f"{field} is {wanted!r}; it is a number of tokens, at least 1"
    heat = request.get("temperature")
    if heat is not None and not (type(heat) in (int, float) and 0 <= heat < inf):
        return 400, f"temperature is {heat!r}; it is a number, at least 0"
    if request.get("n") not in (None, 1):
        return 400, f"n is {request['n']!r}, but a request has one answer"
    if request.get("logprobs"):
        return 400, "logprobs cannot be had here; leave them out"
    return None


class Variant:
    """A language model under one of two variants, which generates while the other does not.

    Both share weights, so hooks of one must not be there while the other runs.

    Args:
        llm: The language model.
        variant: The variant.
        lock: One lock for both.
    """

    def __init__(self, llm: LanguageModel, variant: Intervention, lock: Lock) -> None:
        self._llm, self._variant, self._lock = llm, variant, lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm.model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate under the variant."""
        from fastapi import HTTPException

        length, most = kwargs["input_ids"].shape[1], self._llm.context
        if length > most:
            raise HTTPException(400, f"the prompt has {length} tokens, but the model reads at most {most}")
        with self._lock, self._variant.attached(self._llm.model):
            return self._llm.model.generate(*args, **kwargs)


def application(fit: Fit, name: str, api_key: str | None = None) -> Any:
    """The server's application, with two models and nothing else to load."""
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState, Modality

    lock, llm = Lock(), fit.method.llm
    variants = [Variant(llm, variant, lock) for variant in fit.compared().groups(1)]
    models: Mapping[str, Variant] = dict(zip(names(name), variants, strict=True))

    class Models(ModelManager):
        """The two models; others are not loaded."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
            if refused := refusal({"model": model_id_and_revision}, models):
                raise HTTPException(*refused)
            return models[model_id_and_revision], llm.tokenizer

        def get_model_modality(self, model: Any, processor: Any = None) -> Any:  # type: ignore[override]
            return Modality.LLM

        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
            return [{"id": name, "object": "model", "created": 0, "owned_by": "corrsteer_pl"} for name in models]

        def shutdown(self) -> None:
            """Keep what is loaded."""

    class Checked:
        async def handle_request(self, request: Mapping[str, Any], *args: Any) -> Any:
            if refused := refusal(request, models):
                raise HTTPException(*refused)
            return await super().handle_request(request, *args)  # type: ignore[misc]

    class Completions(Checked, CompletionHandler):
        async def handle_request(self, request: Mapping[str, Any], *args: Any) -> Any:
            if not request.get("prompt"):
                raise HTTPException(400, "there is no prompt")
            return await super().handle_request(request, *args)

    class Talks(Checked):
        async def handle_request(self, request: Mapping[str, Any], *args: Any) -> Any:
            if request.get("model") in models and not llm.has_chat_template:
                raise HTTPException(400, f"{name} has no chat template. Ask for completions of a plain prompt instead.")
            return await super().handle_request(request, *args)

    class Chats(Talks, ChatCompletionHandler): ...

    class Responses(Talks, ResponseHandler): ...

    manager, state = Models(), GenerationState()
    kinds = {
        "chat_handler": Chats, "completion_handler": Completions, "response_handler": Responses,
        "transcription_handler": TranscriptionHandler, "systemone_handler": SystemOneHandler,
    }  # fmt: skip
    handlers = {option: kind(manager, state) for option, kind in kinds.items()}
    app = build_server(manager, generation_state=state, **handlers)

    @app.exception_handler(HTTPException)
    async def tell(_request: Any, error: Any) -> Any:
        """An error as the OpenAI interface has it."""
        return JSONResponse({"error": {"message": error.detail}}, status_code=error.status_code)

    @app.middleware("http")
    async def check_key(request: Any, call_next: Any) -> Any:
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if api_key and not secrets.compare_digest(sent.encode(), api_key.encode()):
            return JSONResponse({"error": {"message": "the key is wrong or missing"}}, status_code=401)
        return await call_next(request)

    return app
