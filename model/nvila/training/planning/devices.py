"""The GPUs that a plan knows by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nvila.errors import ConfigError, nearest
from nvila.training.hardware import Peak, peak_of

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
        peak: What it can do, by the table that a running training is measured against too.
    """

    name: str
    memory_gib: float
    peak: Peak


def _gpu(name: str, memory_gib: float, device: str) -> Gpu:
    peak = peak_of(device)
    assert peak is not None, device
    return Gpu(name=name, memory_gib=memory_gib, peak=peak)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 40, "A100"),
        _gpu("a100-80gb", 80, "A100"),
        _gpu("h100", 80, "H100"),
        _gpu("h200", 141, "H200"),
        _gpu("l40s", 48, "L40S"),
        _gpu("rtx-4090", 24, "RTX 4090"),
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
