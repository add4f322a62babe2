"""Answers that follow a JSON schema: which tokens may come next, through the llguidance library."""

from __future__ import annotations

import json
import threading
from collections.abc import Set
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nvila.errors import CapabilityError, ConfigError, DataError


class GrammarFactory:
    """Makes constraints for one tokenizer; what it needs of the vocabulary is prepared once, at the first use.

    Args:
        tokenizer: A fast tokenizer.
        stop_ids: Tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Set[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = sorted(stop_ids)
        self._prepared: Any = None
        self._lock = threading.Lock()

    def json(self, schema: str) -> JsonConstraint:
        """Return the constraint of one answer.

        Raises:
            CapabilityError: llguidance is not installed.
            ConfigError: The schema is no JSON schema, or nothing can satisfy it.
        """
        try:
            from llguidance import LLMatcher
        except ImportError as e:
            raise CapabilityError("answers by JSON schema need llguidance", "pip install 'nvila[serve]'") from e
        try:
            json.loads(schema)
        except ValueError as e:
            raise ConfigError(f"json_schema is not JSON: {e}", "pass the schema as a JSON text") from e
        # Compact: with spaces allowed anywhere, a greedy answer may be spaces without end.
        grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"json_schema cannot be followed: {_one_line(matcher.get_error())}", "correct the schema")
        constraint = JsonConstraint(matcher, len(self._tokenizer))
        if not constraint.allowed().any():
            raise ConfigError(
                "json_schema cannot be followed: no token of this model may begin the answer", "relax the schema"
            )
        return constraint

    def _vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._prepared is None:
                # Without slices: they prepare common JSON text, which small vocabularies do not hold.
                try:
                    self._prepared = from_tokenizer(cast("Any", self._tokenizer), eos_token=self._stop_ids)
                except ValueError as e:
                    raise CapabilityError(
                        "answers by JSON schema need a tokenizer of bytes or pieces, this one has whole words",
                        "leave the schema out",
                    ) from e
            return self._prepared


class JsonConstraint:
    """The state of one constrained answer.

    Args:
        matcher: The library's matcher.
        vocabulary: Number of tokens.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> Tensor:
        """Return which tokens may come next, a boolean tensor over the tokenizer's vocabulary."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        return (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: self._vocabulary].bool()

    def accept(self, token: int) -> None:
        """Take a chosen token.

        Raises:
            DataError: The token does not fit; the constraint has come to a dead end.
        """
        if not self._matcher.consume_token(token):
            raise DataError(
                f"the answer cannot be continued by its schema: {_one_line(self._matcher.get_error())}",
                "relax the schema",
            )

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        return bool(self._matcher.is_stopped())


def _one_line(text: str) -> str:
    return " ".join(str(text).split())[:200]
