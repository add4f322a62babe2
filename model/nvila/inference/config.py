"""What the engine may use, and how it divides its work."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from nvila.errors import ConfigError

Shed = Literal["newest", "oldest"]
DecoderName = Literal["auto", "transformers", "fused", "fused-int8"]
Compile = Literal["auto", "on", "off"]
_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds and sizes of one engine.

    Args:
        kv_cache_bytes: Memory of all keys and values; a hard limit.
        block_size: Positions of one block of it.
        media_cache_bytes: Memory of visual tokens kept for media that are asked about again.
        max_running: Requests that are worked on at once.
        max_waiting: Requests that wait for a place; beyond it `shed` decides.
        shed: Who is refused when too many wait: the newest or the one that has waited longest.
        step_tokens: Most prompt tokens of one step, so that a long prompt does not hold up the others.
        encode_tiles: Most tiles and frames that the tower gets at once.
        prefix_reuse: Whether prompts that begin alike share their keys and values.
        decoder: What runs the language model, see `nvila.inference.decoders`; `auto` is `transformers`, which takes
            every model.
        compile: Whether decoding is compiled (CPU) or recorded as CUDA graphs, before the first request. `auto` does it
            where it was measured to help: not on a CPU; on CUDA it is timed at the start and kept if it is faster.
    """

    kv_cache_bytes: int = _GIB // 2
    block_size: int = 16
    media_cache_bytes: int = _GIB // 4
    max_running: int = 16
    max_waiting: int = 256
    shed: Shed = "newest"
    step_tokens: int = 512
    encode_tiles: int = 32
    prefix_reuse: bool = True
    decoder: DecoderName = "auto"
    compile: Compile = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("media_cache_bytes", "max_waiting") else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ConfigError(f"{field.name} is {value}", f"use {least} or more")
        if self.shed not in ("newest", "oldest"):
            raise ConfigError(f"shed is '{self.shed}'", "use newest or oldest")
        if self.compile not in ("auto", "on", "off"):
            raise ConfigError(f"compile is '{self.compile}'", "use auto, on or off")
