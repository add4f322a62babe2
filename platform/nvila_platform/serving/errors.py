"""Errors at the HTTP boundary: one exception type, one table of kinds, two body shapes."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

from nvila.errors import NvilaError

logger = logging.getLogger(__name__)

# Of the request at hand, for logs and answers.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
# When nothing better is known than that the cause should pass.
RETRY_AFTER_S = 5
# The code of failures of ours.
INTERNAL = "internal_error"
_INTERNAL = "the server failed on this request; its log has the details under the request id"


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        code: Stable word for programs; also a label of the reject counter, so it must come from a closed set.
        message: One line for people: what is wrong and how to fix it.
        param: Path of the request field at fault.
        retry_after_s: Seconds after which trying again makes sense.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """The `type` word of the OpenAI error object."""
        return _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to this error."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}

    def openai_body(self) -> dict[str, Any]:
        """The error object that OpenAI clients parse."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def body_for(self, path: str) -> dict[str, Any]:
        """The body in the shape of the protocol that `path` belongs to.

        The V1 and V2 inference protocols define `error` as a string; everything else speaks OpenAI.
        """
        if path.startswith(("/v1/", "/v2/")):
            where = f" [{self.param}]" if self.param else ""
            return {"error": self.message + where}
        return self.openai_body()


def internal_error() -> ApiError:
    """The answer to a failure of ours; what failed stays in the log."""
    return ApiError(500, INTERNAL, _INTERNAL)


def as_api_error(error: Exception, request_id: str | None = None) -> ApiError:
    """Translate any exception of the engine or a handler.

    Messages of errors that the client can act on are passed on; those of failures of ours (paths, shapes, names of
    internals) are logged and replaced.

    Args:
        error: What was raised.
        request_id: Of the request that it ended; None takes the one at hand, which threads of the engine have not.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NvilaError) and (error.http_status < 500 or error.http_status in (501, 503)):
        retry_after_s = RETRY_AFTER_S if error.retryable else None
        return ApiError(error.http_status, error.code, str(error), retry_after_s=retry_after_s)
    extra = {"request_id": REQUEST_ID.get() if request_id is None else request_id}
    logger.error("request failed: %s", error, exc_info=error, extra=extra)
    return internal_error()
