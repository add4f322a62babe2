"""Typed errors shared by every layer.

Each class carries a machine-readable code, the process exit code and the HTTP status that a request boundary answers
with, so the mapping lives in one place. A message says what is wrong and where; the hint says how to fix it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class NvilaError(Exception):
    """Base of every error that a user can act on.

    Args:
        message: What went wrong, naming the field, file or value.
        hint: The one change that fixes it; empty when the message already says it.
    """

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[type[NvilaError], tuple[str, str]]:
        return type(self), (self.message, self.hint)

    @property
    def retryable(self) -> bool:
        """Whether running the same command again may succeed without any change."""
        return self.exit_code == 75

    def to_dict(self) -> dict[str, str]:
        """Return the plain form that crosses process boundaries."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class ConfigError(NvilaError):
    """A recipe, flag or environment value is wrong."""

    code = "config"
    exit_code = 2
    http_status = 400


class DataError(NvilaError):
    """A record, image or video cannot be used."""

    code = "data"
    http_status = 400


class CheckpointError(NvilaError):
    """Model files are missing, damaged or of another shape."""

    code = "checkpoint"


class ArtifactError(NvilaError):
    """A stored artifact is missing or does not match its digests."""

    code = "artifact"


class CapabilityError(NvilaError):
    """The chosen backend, device or installation cannot do what was asked."""

    code = "capability"
    http_status = 501


class ResourceError(NvilaError):
    """The machine ran out of something: disk space, memory, a free port."""

    code = "resource"


class GateError(NvilaError):
    """The evaluation gate refused the model."""

    code = "gate"


class InfrastructureError(NvilaError):
    """A service outside this process failed; the same command may pass later."""

    code = "infrastructure"
    exit_code = 75
    http_status = 503


class OverloadedError(NvilaError):
    """More requests came than the engine takes; the same one may pass later."""

    code = "overloaded"
    exit_code = 75
    http_status = 503


class DeadlineError(NvilaError):
    """A request's time ran out before its answer was complete."""

    code = "deadline"
    http_status = 504


ERRORS: dict[str, type[NvilaError]] = {
    cls.code: cls
    for cls in (
        NvilaError,
        ConfigError,
        DataError,
        CheckpointError,
        ArtifactError,
        CapabilityError,
        ResourceError,
        GateError,
        InfrastructureError,
        OverloadedError,
        DeadlineError,
    )
}


def error_from_dict(payload: dict[str, str]) -> NvilaError:
    """Rebuild an error that another process wrote with `NvilaError.to_dict`."""
    cls = ERRORS.get(payload.get("code", ""), NvilaError)
    return cls(payload.get("message", "unknown error"), payload.get("hint", ""))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint naming the known word nearest to `name`, or listing them all.

    Example:
        >>> nearest("quikstart", ["quickstart", "tiny"])
        "did you mean 'quickstart'?"
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(options)}" if options else "none are known"
