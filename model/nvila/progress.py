"""Progress events of long operations.

The model layer only describes progress; who draws it (a terminal, JSON lines in a pod, MLflow) is decided above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Reporter(Protocol):
    """Receives progress of one long operation. Implementations must be cheap and must never raise."""

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report that `done` of `total` units of `phase` are finished, with optional metrics at this point."""

    def notice(self, text: str) -> None:
        """Report one line worth reading: a downgrade, a fallback, a skipped batch."""


class SilentReporter:
    """Drops everything; the default where nobody watches."""

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Ignore the event."""

    def notice(self, text: str) -> None:
        """Ignore the line."""


SILENT: Reporter = SilentReporter()


class PrefixedReporter:
    """Puts a word in front of every phase, for an operation that runs inside another."""

    def __init__(self, reporter: Reporter, prefix: str) -> None:
        self._reporter = reporter
        self._prefix = prefix

    def progress(self, phase: str, done: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Pass the event on under the longer name."""
        self._reporter.progress(f"{self._prefix} {phase}", done, total, metrics)

    def notice(self, text: str) -> None:
        """Pass the line on with the prefix."""
        self._reporter.notice(f"{self._prefix}: {text}")
