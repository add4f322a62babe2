"""What `nvila quantize MODEL` was asked for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.errors import ConfigError
from nvila.quantization.config import QuantizationConfig
from nvila_pipelines.curation.spec import DataSpec

EXPORTS = ("compressed-tensors", "gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationRequest:
    """A model, what shall become of it, and the data that it is calibrated and measured with.

    Args:
        model: Folder of the wide model.
        model_digest: Identity of its files.
        config: Schemes.
        data: Data set to calibrate and measure on; None rounds to nearest and measures nothing.
        data_digest: Identity of the data set's files.
        calibrate: Samples to calibrate on.
        measure: Other samples, to measure on; 0 measures no accuracy, so that every part is kept.
        budget: Points of accuracy that a part may lose.
        alpha: Strength of SmoothQuant.
        exports: Other forms of the language part, names in `EXPORTS`.
        dtype: Type of what stays wide; None is that of the stored weights.
        device: Where to work.
        speed: Whether to time requests.
    """

    model: Path
    model_digest: str
    config: QuantizationConfig
    data: DataSpec | None = None
    data_digest: str | None = None
    calibrate: int = 128
    measure: int = 512
    budget: float = 1.0
    alpha: float = 0.5
    exports: tuple[str, ...] = ()
    dtype: str | None = None
    device: str = "cpu"
    speed: bool = True

    def __post_init__(self) -> None:
        if self.config.vision == self.config.language == "none":
            raise ConfigError("neither part is to be quantized", "choose one: --vision w8a8 or --language w4a16")

    def to_config(self) -> dict[str, Any]:
        """Return what the result depends on, for the content key and the manifest."""
        return {
            "quantize": self.config.to_dict(),
            "data": None if self.data is None else self.data.data,
            "calibrate": self.calibrate if self.data else 0,
            "measure": self.measure if self.data else 0,
            "budget": self.budget,
            "alpha": self.alpha,
            "exports": sorted(self.exports),
            "dtype": self.dtype,
            "device": self.device,
            "speed": self.speed,
        }


def fitting_group(folder: Path, vision: str, language: str) -> int:
    """Return 128, or the largest power of two from 16 on that divides all widths of the parts with 4-bit weights."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    widths: list[int] = []
    for scheme, section in ((vision, "vision_config"), (language, "text_config")):
        if scheme == "w4a16":
            part = raw.get(section, {})
            widths += [part[name] for name in ("hidden_size", "intermediate_size") if isinstance(part.get(name), int)]
    common = math.gcd(*widths) if widths else 128
    return next((size for size in (128, 64, 32, 16) if common % size == 0), 128)
