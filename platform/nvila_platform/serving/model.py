"""The KServe model: the V1 and V2 inference protocols on the same engine as the OpenAI endpoints.

V1: `{"instances": [{"prompt": ..., "image": <data: URI>} | {"messages": [...]}], "parameters": {"max_tokens": ...}}`.
V2: BYTES tensors `prompt` and, optionally, `image` and `video` of one length; sampling in the request's `parameters`.
Images and videos are `data:` URIs, https addresses or store references, as everywhere.

Importing this module imports the KServe SDK, which takes seconds: only the server does, when it starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from kserve import InferInput, InferOutput, InferRequest, InferResponse, Model

from nvila.errors import nearest
from nvila_platform.serving.answers import ChatUsage
from nvila_platform.serving.cost import total
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.json_body import decode_json
from nvila_platform.serving.media import in_order
from nvila_platform.serving.schema import ChatRequest, parse_chat
from nvila_platform.serving.served import Target
from nvila_platform.serving.service import ChatService
from nvila_platform.serving.stream import Completion

_SAMPLING = (
    "frequency_penalty",
    "max_completion_tokens",
    "max_tokens",
    "presence_penalty",
    "repetition_penalty",
    "response_format",
    "seed",
    "stop",
    "temperature",
    "top_k",
    "top_p",
)
_INSTANCE = ("image", "messages", "prompt", "video")
_TENSORS = ("prompt", "image", "video")
_MEDIA = ("image", "video")
# Questions of one request whose media are decoded at once.
_TOGETHER = 8
# Parameters of the V2 protocol itself, not of the model.
_PROTOCOL_PARAMETERS = ("binary_data_output",)


class NvilaModel(Model):  # type: ignore[misc]  # the KServe SDK ships no types
    """Serves a `ChatService` over V1 `:predict` and V2 `infer`.

    Args:
        service: The served model.
        name: Which of its names this is: its own, or that of an adapter.
    """

    def __init__(self, service: ChatService, name: str) -> None:
        super().__init__(name)
        self._service = service

    async def healthy(self) -> bool:
        """Whether requests can be answered; KServe derives readiness from it."""
        return self._service.queue.healthy

    def load(self) -> bool:
        """Report readiness; the server loads the model itself, once."""
        return self._service.queue.healthy

    def get_input_types(self) -> list[dict[str, Any]]:
        """Describe the V2 inputs."""
        return [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in _TENSORS]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Describe the V2 outputs."""
        return [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("text", "finish_reason")]

    async def predict(
        self,
        payload: Any,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> dict[str, Any] | InferResponse:
        """Answer one decoded V1 or V2 request.

        Raises:
            ApiError: The request cannot be served.
        """
        if isinstance(payload, InferRequest):
            return await self._infer(payload)
        body = _decoded(payload)
        instances = body.get("instances")
        if not isinstance(instances, list) or not instances:
            raise ApiError(400, "missing_parameter", "'instances' must be a list with a question", param="instances")
        parameters = _parameters(body.get("parameters"))
        self._check_count(len(instances), "instances")
        requests = [self._request(i, raw, parameters, f"instances[{i}]") for i, raw in enumerate(instances)]
        target = self._service.target(self.name)
        answers = await self._answer(target, requests)
        return {"predictions": [_prediction(answer) for answer in answers]}

    async def _infer(self, payload: InferRequest) -> InferResponse:
        columns = {tensor.name: _column(tensor) for tensor in payload.inputs}
        if "prompt" not in columns:
            raise ApiError(400, "missing_parameter", "a BYTES tensor named 'prompt' is required", param="inputs")
        prompts = columns["prompt"]
        for kind in _MEDIA:
            count = len(columns.get(kind, prompts))
            if count != len(prompts):
                message = f"'{kind}' has {count} elements, 'prompt' has {len(prompts)}; an empty one means none"
                raise ApiError(400, "invalid_parameter", message, param="inputs")
        self._check_count(len(prompts), "inputs")
        given = {key: value for key, value in (payload.parameters or {}).items() if key not in _PROTOCOL_PARAMETERS}
        parameters = _parameters(given)
        requests = []
        for index in range(len(prompts)):
            raw = {name: _text(column[index]) for name, column in columns.items() if name == "prompt" or column[index]}
            requests.append(self._request(index, raw, parameters, f"inputs[{index}]"))
        target = self._service.target(self.name)
        answers = await self._answer(target, requests)
        outputs = [
            InferOutput("text", [len(answers)], "BYTES", [answer.text for answer in answers]),
            InferOutput("finish_reason", [len(answers)], "BYTES", [answer.finish_reason for answer in answers]),
        ]
        # Without an id the SDK fails on its own response model, after the work is done.
        return InferResponse(payload.id or uuid4().hex, self.name, outputs, model_version=target.identity.version)

    def _check_count(self, count: int, param: str) -> None:
        most = self._service.limits.max_instances
        if count > most:
            raise ApiError(400, "too_many_instances", f"{count} questions in one request, at most {most}", param=param)

    def _request(self, index: int, raw: Any, parameters: Mapping[str, Any], where: str) -> ChatRequest:
        if not isinstance(raw, dict):
            raise ApiError(400, "invalid_parameter", "must be an object with 'prompt' or 'messages'", param=where)
        for key in raw:
            if key not in _INSTANCE:
                raise ApiError(
                    400, "unknown_parameter", f"unknown field '{key}'; {nearest(key, _INSTANCE)}", param=where
                )
        if ("prompt" in raw) == ("messages" in raw) or ("messages" in raw and len(raw) > 1):
            message = "give either 'messages', or 'prompt' with 'image' or 'video'"
            raise ApiError(400, "invalid_parameter", message, param=where)
        messages = raw.get("messages") or [{"role": "user", "content": _parts(raw)}]
        try:
            return parse_chat({"model": self.name, "messages": messages, **parameters})
        except ApiError as e:
            param = f"{where}.{e.param}" if e.param else where
            raise ApiError(e.status, e.code, e.message, param=param) from e

    async def _answer(self, target: Target, requests: Sequence[ChatRequest]) -> list[Completion]:
        service = self._service
        costs = [service.cost(target, request, [request.messages]) for request in requests]
        with service.queue.admit(total(costs), target) as slot:
            together = asyncio.Semaphore(_TOGETHER)

            async def answer(request: ChatRequest) -> Completion:
                async with together:
                    return (await service.answer(slot, request, request.messages))[0]

            if len(requests) == 1:
                return [await answer(requests[0])]
            return await in_order([answer(request) for request in requests])


def _decoded(payload: Any) -> dict[str, Any]:
    # The SDK decodes a body only under the bare media type; with a charset, or none at all, it passes bytes on.
    if isinstance(payload, bytes):
        payload = decode_json(payload)
    if not isinstance(payload, dict):
        raise ApiError(400, "invalid_request", f"the body must be a JSON object, got {type(payload).__name__}")
    return payload


def _parameters(raw: Any) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ApiError(400, "invalid_parameter", "'parameters' must be an object", param="parameters")
    for key in raw:
        if key not in _SAMPLING:
            message = f"unknown parameter '{key}'; {nearest(str(key), _SAMPLING)}"
            raise ApiError(400, "unknown_parameter", message, param="parameters")
    return dict(raw)


def _parts(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    media = [{"type": f"{kind}_url", f"{kind}_url": {"url": raw[kind]}} for kind in _MEDIA if kind in raw]
    return [*media, {"type": "text", "text": raw["prompt"]}]


def _column(tensor: InferInput) -> list[str | bytes]:
    if tensor.name not in _TENSORS:
        message = f"unknown tensor '{tensor.name}'; {nearest(str(tensor.name), _TENSORS)}"
        raise ApiError(400, "unknown_parameter", message, param="inputs")
    if tensor.datatype != "BYTES":
        message = f"tensor '{tensor.name}' must have datatype BYTES, got {tensor.datatype}"
        raise ApiError(400, "invalid_parameter", message, param="inputs")
    try:
        values = tensor.as_numpy().ravel().tolist()
    except Exception as e:
        message = f"the data of tensor '{tensor.name}' does not match its shape {tensor.shape}"
        raise ApiError(400, "invalid_parameter", message, param="inputs") from e
    if not all(isinstance(value, str | bytes) for value in values):
        raise ApiError(400, "invalid_parameter", f"tensor '{tensor.name}' must hold strings", param="inputs")
    return list(values)


def _text(value: str | bytes) -> str:
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError as e:
        raise ApiError(400, "invalid_parameter", "tensors must hold UTF-8 text", param="inputs") from e


def _prediction(answer: Completion) -> dict[str, Any]:
    usage = ChatUsage.of(answer.usage).model_dump()
    return {"text": answer.text, "finish_reason": answer.finish_reason, "usage": usage}
