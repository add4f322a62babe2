"""What a training process runs on: peak speed of its device, and memory in use."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from nvila.training.config import Precision

_TERA = 1e12
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Dense matrix throughput of a device by its data sheet, in TFLOPS with fp32 accumulation, without sparsity."""

    bf16: float
    fp8: float | None = None


# The first pattern that fits a device's name wins, so the narrower ones come first.
PEAKS: dict[str, Peak] = {
    r"H100 PCIe": Peak(bf16=756, fp8=1513),
    r"H100 NVL": Peak(bf16=835, fp8=1671),
    r"H[12]00|GH200": Peak(bf16=989, fp8=1979),
    r"H20\b": Peak(bf16=148, fp8=296),
    r"GB200|B200": Peak(bf16=2250, fp8=4500),
    r"A100": Peak(bf16=312),
    r"A800": Peak(bf16=312),
    r"L40S": Peak(bf16=362, fp8=733),
    r"L40\b": Peak(bf16=181, fp8=362),
    r"L4\b": Peak(bf16=121, fp8=242),
    r"A10G?\b": Peak(bf16=125),
    r"A40\b": Peak(bf16=150),
    r"RTX 4090": Peak(bf16=165, fp8=330),
}


def peak_flops(device: str, precision: Precision) -> float | None:
    """Return the operations a second that one device could do at best, or None where nothing is known.

    A device that trains in fp32 is measured against nothing: its peak depends on whether TF32 is allowed.

    Args:
        device: Name as `torch.cuda.get_device_name` gives it.
        precision: Precision of the run; fp8 is measured against the FP8 peak.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16")
        989000000000000.0
    """
    peak = peak_of(device)
    found = None if peak is None else {"bf16": peak.bf16, "fp8": peak.fp8, "fp32": None}[precision]
    return None if found is None else found * _TERA


def peak_of(device: str) -> Peak | None:
    """Look a device up in the table by its name."""
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, device)), None)


def device_name() -> str:
    """Return the name of this process's CUDA device, or an empty string where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def memory_bytes() -> int:
    """Return the most memory that tensors took on the CUDA device so far, or this process's resident memory on CPU."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not on Linux
        return 0
