"""The server of transformers with one language model under two names: unchanged, and changed by a run.

Needs the extra ``serving``.
"""

import secrets
from collections.abc import Awaitable, Callable, Mapping
from copy import copy
from math import inf
from threading import Lock
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers import BatchEncoding
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState, Modality

from corrsteer_pl.errors import one_line
from corrsteer_pl.methods.runs.loading import Fit
from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.llm_loading import penalties_off

# What the server of transformers raises at a request that it does not expect.
MISTAKES = (TypeError, ValueError, LookupError, AttributeError, TemplateError)

# What can be asked of it: that server has more, such as transcriptions.
ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/health")
# Below this, logits are divided by next to nothing.
COLDEST = 1e-3


def names(name: str) -> tuple[str, str]:
    """The names of the unchanged model and of the changed one."""
    return name, f"{name}-steered"


def application(fit: Fit, name: str, api_key: str | None = None) -> FastAPI:
    """The server's application.

    Args:
        fit: The run.
        name: What its unchanged model is called.
        api_key: What requests have to bring as their key; none if left out.
    """
    models, state = Models(fit, name), GenerationState()
    app = build_server(
        models,
        Chats(models, state),
        Completions(models, state),
        Responses(models, state),
        TranscriptionHandler(models, state),
        SystemOneHandler(models, state),
        state,
    )

    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]

    @app.exception_handler(404)
    @app.exception_handler(405)
    @app.exception_handler(HTTPException)
    async def tell(_request: Request, error: HTTPException) -> Response:
        """An error as the OpenAI interface has it."""
        return JSONResponse({"error": {"message": error.detail}}, status_code=error.status_code)

    @app.exception_handler(RequestValidationError)
    async def tell_of_body(_request: Request, _error: RequestValidationError) -> Response:
        """The same of what is no request at all."""
        return JSONResponse({"error": {"message": "the body is no JSON object"}}, status_code=400)

    @app.middleware("http")
    async def check_key(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if api_key and not secrets.compare_digest(sent.encode(), api_key.encode()):
            return JSONResponse({"error": {"message": "the key is wrong or missing"}}, status_code=401)
        return await call_next(request)

    return app


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
        """Generate under the variant, no further than the model's context."""
        length, most = kwargs["input_ids"].shape[1], self._llm.context
        if length > most:
            raise HTTPException(400, f"the prompt has {length} tokens, but the model reads at most {most}")
        settings = kwargs["generation_config"]
        # The last token is not read.
        settings.max_new_tokens = min(settings.max_new_tokens, most + 1 - length)
        with self._lock, self._variant.attached(self._llm.model):
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
            return self._llm.model.generate(*args, **kwargs)


class Models(ModelManager):
    """The two models of a run; others are not loaded."""

    def __init__(self, fit: Fit, name: str) -> None:
        super().__init__()
        lock, self.llm = Lock(), fit.method.llm
        variants = [Variant(self.llm, variant, lock) for variant in fit.compared().groups(1)]
        self.variants = dict(zip(names(name), variants, strict=True))
        self.tokenizer: Any = copy(self.llm.tokenizer)
        self.tokenizer.apply_chat_template = self.chat

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model of a name, and the tokenizer."""
        refuse({"model": model_id_and_revision}, self.variants)
        return self.variants[model_id_and_revision], self.tokenizer

    def chat(self, messages: Any, *, return_tensors: str, return_dict: bool, tokenize: bool, **options: Any) -> Any:
        """Tokens of a conversation, as a fit reads it."""
        text = self.llm.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = self.llm.chat_ids(text)
        return BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type=return_tensors)

    def get_model_modality(self, model: Any, processor: Any = None) -> Any:  # type: ignore[override]
        """Text."""
        return Modality.LLM

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        """What can be asked for."""
        return [{"id": name, "object": "model", "created": 0, "owned_by": "corrsteer_pl"} for name in self.variants]

    # Its name before transformers 5.24.
    get_gen_models = list_models  # type: ignore[assignment]

    def shutdown(self) -> None:
        """Keep what is loaded."""


class Checked(BaseHandler):
    """Answers requests that can be answered.

    Attributes:
        asked: The field of a request that must not be empty.
    """

    model_manager: Models
    asked = "messages"

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Refuse a request, or answer it."""
        refuse(body, self.model_manager.variants)
        self.check(body)
        try:
            # By its newer interface, that server would stream what nobody has asked to be streamed.
            return await super().handle_request({"stream": False, **body}, request_id)  # type: ignore[misc]
        except MISTAKES as error:
            raise HTTPException(400, f"the request cannot be answered ({one_line(error)})") from error

    def _build_generation_config(self, body: dict, *args: Any, **kwargs: Any) -> Any:
        # The seed counts when the generation begins, which waits for others.
        settings: Any = super()._build_generation_config({**body, "seed": None}, *args, **kwargs)
        settings.seed = body.get("seed")
        if body.get("generation_config") is None:
            # As in a test, whatever the model's own configuration says.
            settings.update(**penalties_off(settings), do_sample=bool(body.get("temperature")))
        settings.stop_strings = settings.stop_strings or None
        return settings

    def check(self, body: Mapping[str, Any]) -> None:
        """Refuse what this kind of request must not lack."""
        if not self.model_manager.llm.has_chat_template:
            raise HTTPException(
                400, f"{body['model']} has no chat template. Ask for completions of a plain prompt instead."
            )
        if not body.get(self.asked):
            raise HTTPException(400, f"there are no {self.asked}")


class Chats(Checked, ChatCompletionHandler):
    """Answers conversations."""


class Responses(Checked, ResponseHandler):
    """Answers conversations, by the newer interface."""

    asked = "input"


class Completions(Checked, CompletionHandler):
    """Continues prompts."""

    def check(self, body: Mapping[str, Any]) -> None:
        """Refuse a request without a prompt."""
        if not body.get("prompt"):
            raise HTTPException(400, "there is no prompt")


def refuse(request: Mapping[str, Any], models: Mapping[str, Any]) -> None:
    """Refuse a request that cannot be answered.

    Raises:
        HTTPException: With the reason.
    """
    model = request.get("model")
    if not isinstance(model, str) or model not in models:
        raise HTTPException(404, f"there is no model {model!r}; there are {' and '.join(models)}")
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        wanted = request.get(field)
        if wanted is not None and (type(wanted) is not int or wanted < 1):
            raise HTTPException(400, f"{field} is {wanted!r}; it is a number of tokens, at least 1")
    heat = request.get("temperature")
    if heat is not None and not (type(heat) in (int, float) and 0 <= heat < inf):
        raise HTTPException(400, f"temperature is {heat!r}; it is a number, at least 0")
    if heat is not None and 0 < heat < COLDEST:
        raise HTTPException(400, f"temperature is {heat!r}; it is 0, for the likeliest token, or at least {COLDEST}")
    seed = request.get("seed")
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise HTTPException(400, f"seed is {seed!r}; it is a whole number from 0 to 2**63 - 1")
    share = request.get("top_p")
    if share is not None and not (type(share) in (int, float) and 0 < share <= 1):
        raise HTTPException(400, f"top_p is {share!r}; it is a number above 0, at most 1")
    stop = request.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise HTTPException(400, f"stop is {stop!r}; it is a text, or a list of texts, none of them empty")
    if request.get("n") not in (None, 1):
        raise HTTPException(400, f"n is {request['n']!r}, but a request has one answer")
    if request.get("logprobs"):
        raise HTTPException(400, "logprobs cannot be had here; leave them out")
