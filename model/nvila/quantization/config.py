"""Which part of a model is quantized how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nvila.errors import ConfigError

VisionScheme = Literal["none", "w8a8"]
LanguageScheme = Literal["none", "w4a16"]
QUANT_METHOD = "nvila-torchao"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """Schemes for the two towers; projector, embeddings, norms and the language-model head stay wide.

    Args:
        vision: `w8a8` is int8 weights with one scale a channel and int8 activations with one dynamic scale a token.
        language: `w4a16` is 4-bit weights in groups along the input, activations wide.
        group_size: Input channels that share a 4-bit scale.
    """

    vision: VisionScheme = "w8a8"
    language: LanguageScheme = "w4a16"
    group_size: int = 128

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
