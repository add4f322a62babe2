"""Which part of a model is quantized how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from nvila.errors import ConfigError, nearest

Scheme = Literal["none", "w8a8", "w4a16", "int8", "fp8"]
Part = Literal["vision", "language"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
PARTS: tuple[Part, ...] = get_args(Part)
QUANT_METHOD = "nvila-torchao"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """Schemes for the two towers; projector, embeddings, norms and the language-model head stay wide.

    `w8a8` is int8 weights with one scale a channel and int8 activations with one dynamic scale a token. `w4a16` is
    4-bit weights in groups along the input, `int8` and `fp8` are weights of 8 bits with one scale a channel; of these
    three the activations stay wide.

    Args:
        vision: Scheme of the vision tower.
        language: Scheme of the decoder.
        group_size: Input channels that share a 4-bit scale.

    Raises:
        ConfigError: A scheme is unknown, or the group size no positive number.
    """

    vision: Scheme = "w8a8"
    language: Scheme = "w4a16"
    group_size: int = 128

    def __post_init__(self) -> None:
        for part in PARTS:
            if (scheme := self.scheme(part)) not in SCHEMES:
                raise ConfigError(f"quantize.{part} is '{scheme}'", nearest(str(scheme), SCHEMES))
        if self.group_size < 1:
            raise ConfigError(f"quantize.group_size is {self.group_size}", "use 32, 64 or 128")

    def scheme(self, part: Part) -> Scheme:
        """Return the scheme of a part."""
        return self.vision if part == "vision" else self.language

    def only(self, *parts: Part) -> QuantizationConfig:
        """Return the configuration with every other part left wide."""
        return QuantizationConfig(
            vision=self.vision if "vision" in parts else "none",
            language=self.language if "language" in parts else "none",
            group_size=self.group_size,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the `quantization_config` of config.json."""
        return {"quant_method": QUANT_METHOD, **asdict(self)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> QuantizationConfig:
        """Read a `quantization_config`.

        Raises:
            ConfigError: It was written by another method.
        """
        values = dict(raw)
        if (method := values.pop("quant_method", None)) != QUANT_METHOD:
            raise ConfigError(f"quantization_config.quant_method is {method!r}", f"this reader knows {QUANT_METHOD}")
        return cls(**values)
