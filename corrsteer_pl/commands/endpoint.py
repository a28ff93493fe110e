"""The server of transformers with one language model under two names: unchanged, and changed by a run.

Needs the extra ``serving``.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from copy import copy
from functools import partial
from threading import Lock
from typing import Any, ClassVar

import torch
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers import BatchEncoding, GenerationConfig, StopStringCriteria
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import (
    BaseHandler,
    DirectStreamer,
    GenerateManager,
    GenerationState,
    Modality,
    _GenerationCancelled,
)

from corrsteer_pl.commands.requests import Rejected, checked, conversation_of, messages_of, prompt_of
from corrsteer_pl.errors import UserError, one_line
from corrsteer_pl.methods.runs.loading import Fit
from corrsteer_pl.models.decoding.decode import Intervention
from corrsteer_pl.models.llm import LanguageModel
from corrsteer_pl.models.llm_loading import penalties_off

# What the server of transformers raises at a request that it does not expect.
MISTAKES = (TypeError, ValueError, LookupError, AttributeError, TemplateError)

# What can be asked of it: that server has more, such as transcriptions.
ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/health")


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
    models, state = Models(fit, name), Generations()
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
    async def http_error(_request: Request, error: HTTPException) -> Response:
        return JSONResponse(as_error(error), status_code=error.status_code)

    @app.exception_handler(RequestValidationError)
    async def body_error(_request: Request, _error: RequestValidationError) -> Response:
        return JSONResponse(as_error(Rejected("the body is no JSON object")), status_code=400)

    @app.exception_handler(Exception)
    async def server_error(_request: Request, error: Exception) -> Response:
        return JSONResponse(as_error(error), status_code=500)

    @app.middleware("http")
    async def check_key(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if api_key and not secrets.compare_digest(sent.encode(), api_key.encode()):
            error = Rejected("the key is wrong or missing", status=401)
            return JSONResponse(as_error(error), status_code=error.status_code)
        return await call_next(request)

    return app


def as_error(error: Exception) -> dict[str, Any]:
    """An error as the OpenAI interface has it."""
    status, message = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, one_line(error))
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": None}}


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
        settings = kwargs["generation_config"]
        # The last token is not read.
        room = self._llm.context + 1 - kwargs["input_ids"].shape[1]
        settings.max_new_tokens = min(settings.max_new_tokens, room)
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
        self.require(model_id_and_revision)
        return self.variants[model_id_and_revision], self.tokenizer

    def chat(self, messages: Any, *, return_tensors: str, return_dict: bool, tokenize: bool, **options: Any) -> Any:
        """Tokens of a conversation, as a fit reads it."""
        ids = self.llm.chat_ids(self.llm.chat.text(messages, **options))
        self.require_room(len(ids))
        return BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type=return_tensors)

    def require(self, model: Any) -> None:
        """Check that a model is one of the two.

        Raises:
            HTTPException: It is not.
        """
        if not isinstance(model, str) or model not in self.variants:
            raise Rejected(f"there is no model {model!r}; there are {' and '.join(self.variants)}", "model", 404)

    def require_room(self, length: int) -> None:
        """Check that the model can read a prompt of so many tokens.

        Raises:
            HTTPException: It cannot.
        """
        if length > self.llm.context:
            raise Rejected(f"the prompt has {length} tokens, but the model reads at most {self.llm.context}", "prompt")

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
    """Answers requests of which every field is understood.

    Attributes:
        read: The fields that this interface reads, besides those of all.
        neutral: Values of unsupported fields that ask for nothing in this interface, besides those of all.
    """

    model_manager: Models
    read: tuple[str, ...] = ()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Reject a request, or answer it."""
        self.model_manager.require(body.get("model"))
        fields = self.prepared(checked(body, self.read, self.neutral))
        try:
            response = await super().handle_request(fields, request_id)  # type: ignore[misc]
        except UserError as error:
            raise Rejected(str(error)) from error
        except MISTAKES as error:
            raise HTTPException(400, f"the request cannot be answered ({one_line(error)})") from error
        if isinstance(response, StreamingResponse):
            response.body_iterator = finished(response.body_iterator)
        return response

    def prepared(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields in the form that the server of transformers reads.

        Raises:
            HTTPException: The request lacks something, or has something other than text.
        """
        raise NotImplementedError

    def _require_template(self, model: str) -> None:
        if not self.model_manager.llm.has_chat_template:
            raise Rejected(f"{model} has no chat template. Ask for completions of a plain prompt instead.", "model")

    def _validate_request(self, body: dict) -> None:
        """It was checked."""

    def _build_generation_config(self, body: dict, *args: Any, **kwargs: Any) -> Any:
        # The seed counts when the generation begins, which waits for others.
        settings: Any = super()._build_generation_config({**body, "seed": None}, *args, **kwargs)
        settings.seed = body.get("seed")
        if body.get("generation_config") is None:
            # As in a test, whatever the model's own configuration says.
            settings.update(**penalties_off(settings), do_sample=bool(body.get("temperature")))
        if settings.eos_token_id is None:
            settings.eos_token_id = self.model_manager.llm.eos_token_ids or None
        settings.stop_strings = settings.stop_strings or None
        return settings


class Chats(Checked, ChatCompletionHandler):
    """Answers conversations."""

    read = ("messages", "max_tokens", "max_completion_tokens", "stop", "chat_template_kwargs")

    def prepared(self, fields: dict[str, Any]) -> dict[str, Any]:
        """With messages of text alone."""
        self._require_template(fields["model"])
        return fields | {"messages": messages_of(fields.get("messages"))}


class Responses(Checked, ResponseHandler):
    """Answers conversations, by the newer interface."""

    read = ("input", "instructions", "max_output_tokens", "chat_template_kwargs")
    # Nothing is stored, which is what `previous_response_id` would need.
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"store": (True, False)}

    def prepared(self, fields: dict[str, Any]) -> dict[str, Any]:
        """With messages of text alone, the instructions as the first."""
        self._require_template(fields["model"])
        messages = conversation_of(fields.get("input"), fields.pop("instructions", None))
        return fields | {"input": messages}

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> Any:
        response = await super()._non_streaming(*args, **kwargs)
        return JSONResponse(with_status(json.loads(bytes(response.body)), settings_among(args)))

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        response = super()._streaming(*args, **kwargs)
        response.body_iterator = _with_status(response.body_iterator, settings_among(args))
        return response


class Completions(Checked, CompletionHandler):
    """Continues prompts."""

    read = ("prompt", "max_tokens", "stop")

    def prepared(self, fields: dict[str, Any]) -> dict[str, Any]:
        """With one prompt, which does not begin with the BOS token that the tokenizer adds."""
        llm, prompt = self.model_manager.llm, prompt_of(fields.get("prompt"))
        if llm.adds_bos:
            prompt = prompt.removeprefix(llm.tokenizer.bos_token)
        self.model_manager.require_room(len(llm.token_ids(prompt)))
        return fields | {"prompt": prompt}


class Generations(GenerationState):
    """The threads that generate, one for each model."""

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The one of a model."""
        return self._generate_managers.setdefault(model_id, Manager())


class Manager(GenerateManager):
    """Generates, and finds out why a generation ended.

    The server of transformers says that a text ended by its length if it has as many tokens as it may have, even if the
    last of them ends the text. Therefore the limit is removed from the settings of a generation that ended by itself.
    """

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue, DirectStreamer]:
        """Begin to generate; tokens, or an exception, come by the queue."""
        loop, queue = asyncio.get_running_loop(), Results()
        streamer = Streamer(processor._tokenizer, loop, queue, response_parser)
        streamer.ended = partial(_settle, processor, gen_config)

        def run() -> None:
            try:
                model.generate(**inputs, streamer=streamer, generation_config=gen_config, tokenizer=processor)
            except _GenerationCancelled:
                loop.call_soon_threadsafe(queue.put_nowait, None)
            except Exception as error:  # everything that fails in the thread is told to the client
                loop.call_soon_threadsafe(queue.put_nowait, error)

        self.submit(run)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """Generate a whole text."""
        text, length, new = await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        _settle(processor, gen_config, [*inputs["input_ids"][0].tolist(), *new.tolist()])
        return text, length, new


class Streamer(DirectStreamer):
    """Hands on tokens, and all of them to ``ended`` before it tells that there are no more."""

    ended: Callable[[list[int]], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ids: list[int] = []

    def put(self, value: Any) -> None:
        """Take the prompt at first, and then each token."""
        self._ids += value.flatten().tolist()
        super().put(value)

    def end(self) -> None:
        """Take the end of the generation."""
        self.ended(self._ids)
        super().end()


class Results(asyncio.Queue):
    """A queue that raises the exceptions that are put into it."""

    def get_nowait(self) -> Any:
        """The next item."""
        item = super().get_nowait()
        if isinstance(item, Exception):
            raise item
        return item


def _settle(tokenizer: Any, settings: Any, ids: list[int]) -> None:
    """Remove the limit from the settings if the last token ends the text, by itself or with a stop string."""
    ends = settings.eos_token_id
    if ids[-1] in ([ends] if isinstance(ends, int) else ends or []):
        settings.max_new_tokens = None
    elif settings.stop_strings:
        stops = StopStringCriteria(tokenizer=tokenizer, stop_strings=settings.stop_strings)
        if stops(torch.tensor([ids]), None).any():
            settings.max_new_tokens = None


async def finished(events: Any) -> AsyncIterator[Any]:
    """A stream of events, with an error if one occurs, and the mark of the end."""
    # Closing them ends the generation if the client has left.
    async with aclosing(events):
        try:
            async for event in events:
                yield event
        except Exception as error:  # the status has been sent; clients raise what such an event says
            yield f"data: {json.dumps(as_error(error))}\n\n"
    yield "data: [DONE]\n\n"


async def _with_status(events: Any, settings: Any) -> AsyncIterator[str]:
    async with aclosing(events):
        async for event in events:
            data = json.loads(event.removeprefix("data: ")) if '"response.completed"' in event else {}
            if data.get("type") == "response.completed":
                data["response"] = with_status(data["response"], settings)
                data["type"] = f"response.{data['response']['status']}"
                event = f"data: {json.dumps(data)}\n\n"
            yield event


def with_status(response: dict[str, Any], settings: Any) -> dict[str, Any]:
    """A response of the newer interface; incomplete if it has as many tokens as it may have."""
    most = settings.max_new_tokens
    if most is None or response["usage"]["output_tokens"] < most:
        return response
    return response | {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}


def settings_among(arguments: Sequence[Any]) -> Any:
    """The generation configuration among arguments."""
    return next(argument for argument in arguments if isinstance(argument, GenerationConfig))
