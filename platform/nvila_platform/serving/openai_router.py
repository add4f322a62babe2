"""The OpenAI-compatible endpoints: chat completions and the model list.

The KServe SDK's own OpenAI module needs vLLM installed and flattens messages to text, which loses their images.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from nvila.errors import nearest
from nvila_platform.serving.errors import ApiError, as_api_error
from nvila_platform.serving.guard import REQUEST_ID
from nvila_platform.serving.queue import Stream
from nvila_platform.serving.schema import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    ChatUsage,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    ChunkDelta,
    ModelCard,
    ModelList,
    parse_chat,
)
from nvila_platform.serving.service import ChatService

if TYPE_CHECKING:
    from nvila.inference.engine import TokenLogprob

PREFIX = "/openai/v1"


async def _until_sent() -> AsyncIterator[ExitStack]:
    """Hold what a request holds until its response has left, however that ends."""
    with ExitStack() as held:
        yield held


_Held = Annotated[ExitStack, Depends(_until_sent)]


def build_router(service: ChatService) -> APIRouter:
    """Return the routes under `/openai/v1` for one service."""
    router = APIRouter(prefix=PREFIX, tags=["OpenAI"])

    async def chat(request: Request, held: _Held) -> Response:
        service.queue.check_room()
        chat_request = parse_chat(await read_json(request))
        _check_model(service, chat_request.model)
        slot = held.enter_context(service.queue.admit())
        if not chat_request.stream:
            done = await service.answer(slot, chat_request)
            choice = Choice(
                message=AnswerMessage(content=done.text),
                finish_reason=done.finish_reason,
                logprobs=ChoiceLogprobs.of(done.logprobs) if chat_request.logprobs else None,
            )
            body = ChatCompletion(**_envelope(service), choices=[choice], usage=ChatUsage.of(done.usage))
            return JSONResponse(body.model_dump())
        stream = await service.open(slot, chat_request)
        # X-Accel-Buffering keeps proxies from collecting the stream into one piece.
        headers = {"x-accel-buffering": "no"}
        return StreamingResponse(
            _events(service, chat_request, stream), media_type="text/event-stream", headers=headers
        )

    async def models() -> Response:
        return JSONResponse(ModelList(data=[_card(service)]).model_dump())

    async def model(model: str) -> Response:
        _check_model(service, model)
        return JSONResponse(_card(service).model_dump())

    router.add_api_route("/chat/completions", chat, methods=["POST"], response_model=None)
    router.add_api_route("/models", models, methods=["GET"], response_model=None)
    router.add_api_route("/models/{model}", model, methods=["GET"], response_model=None)
    return router


async def read_json(request: Request) -> Any:
    """Read and decode a JSON body.

    Raises:
        ApiError: The body is of another type or is not JSON.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps web pages out: a browser sends JSON to another origin only after asking, and we never agree.
        raise ApiError(415, "unsupported_media_type", "send the body as content-type: application/json")
    body = await request.body()
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as e:
        reason = f"{e.msg} at character {e.pos}" if isinstance(e, json.JSONDecodeError) else "not readable"
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {reason}") from e


async def _events(service: ChatService, request: ChatRequest, stream: Stream) -> AsyncIterator[str]:
    envelope = _envelope(service)

    def event(delta: ChunkDelta, finish_reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()) -> str:
        reported = ChoiceLogprobs.of(logprobs) if request.logprobs else None
        choice = ChunkChoice(delta=delta, finish_reason=finish_reason, logprobs=reported)
        return _event(ChatChunk(**envelope, choices=[choice]))

    reason = "stop"
    yield event(ChunkDelta(role="assistant", content=""))
    try:
        async for delta in stream:
            reason = delta.finish_reason or reason
            if delta.text or delta.logprobs:
                yield event(ChunkDelta(content=delta.text), logprobs=delta.logprobs)
    except Exception as e:
        # The status line has left, so the error travels as an event; without [DONE] nobody takes the text as complete.
        error = as_api_error(e)
        service.metrics.rejected(error.code)
        yield f"data: {json.dumps(error.openai_body())}\n\n"
        return
    yield event(ChunkDelta(), reason)
    if request.stream_options is not None and request.stream_options.include_usage:
        yield _event(ChatChunk(**envelope, choices=[], usage=ChatUsage.of(stream.usage)))
    yield "data: [DONE]\n\n"


def _event(chunk: ChatChunk) -> str:
    return f"data: {chunk.model_dump_json()}\n\n"


def _envelope(service: ChatService) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{REQUEST_ID.get() or uuid4().hex}",
        "created": int(time.time()),
        "model": service.identity.name,
        "system_fingerprint": service.identity.fingerprint,
    }


def _card(service: ChatService) -> ModelCard:
    identity = service.identity
    return ModelCard(id=identity.name, created=identity.created, version=identity.version, digest=identity.digest)


def _check_model(service: ChatService, name: str) -> None:
    served = service.identity.name
    if name != served:
        message = f"model '{name[:80]}' is not served here; {nearest(name[:80], [served])}"
        raise ApiError(404, "model_not_found", message, param="model")
