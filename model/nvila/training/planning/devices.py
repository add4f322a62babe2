"""What GPUs can do, from the vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nvila.errors import ConfigError, nearest

GIB = 2**30
_UNITS = {
    "": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": GIB,
    "tib": 2**40,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    Args:
        name: As recipes spell it.
        memory_gib: Memory in GiB.
        bf16_tflops: Peak of dense bf16 products with fp32 sums, in 1e12 operations a second.
        fp8_tflops: The same for FP8; None without FP8 units.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float | None = None


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100-40gb", memory_gib=40, bf16_tflops=312),
        Gpu(name="a100-80gb", memory_gib=80, bf16_tflops=312),
        Gpu(name="h100", memory_gib=80, bf16_tflops=989, fp8_tflops=1979),
        Gpu(name="h200", memory_gib=141, bf16_tflops=989, fp8_tflops=1979),
        Gpu(name="l40s", memory_gib=48, bf16_tflops=362, fp8_tflops=733),
        Gpu(name="rtx-4090", memory_gib=24, bf16_tflops=165, fp8_tflops=330),
    )
}


def gpu_named(name: str) -> Gpu:
    """Look up a GPU.

    Raises:
        ConfigError: It is not in the table.
    """
    if name not in GPUS:
        raise ConfigError(f"unknown GPU '{name}'", nearest(name, GPUS))
    return GPUS[name]


def parse_memory(text: str) -> int:
    """Return bytes of an amount such as 80GiB; without a unit it is GiB.

    Raises:
        ConfigError: It is no amount.

    Example:
        >>> parse_memory("80GiB") == 80 * 2**30
        True
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b|b)?", text.strip().lower())
    if not found or float(found[1]) == 0:
        raise ConfigError(f"'{text}' is no amount of memory", "write a number and a unit, such as 80GiB")
    return int(float(found[1]) * (_UNITS[found[2]] if found[2] else GIB))
