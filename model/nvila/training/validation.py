"""Looking at a model while it trains."""

from __future__ import annotations

from typing import Protocol


class Validator(Protocol):
    """Measures the model of a stage between its steps."""

    def begin(self, first_step: int) -> None:
        """The stage begins, or goes on after `first_step` steps; what was measured behind them comes again."""

    def after_step(self, step: int, steps: int) -> bool:
        """Look at the model after `step` of `steps` steps, if it is time; return whether to end the stage here."""
