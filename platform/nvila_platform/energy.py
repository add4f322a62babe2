"""The GPUs that this process may use: how many there are, and the energy that they took, from NVIDIA's NVML."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_DRIVER = Path("/proc/driver/nvidia/gpus")
_JOULES_PER_UNIT = 1e-3


class Gpus:
    """The visible GPUs.

    Args:
        count: How many there are.
        nvml: The `pynvml` module, initialised; None when it is not installed or there is no driver.
        handles: NVML's handle of each.
    """

    def __init__(self, count: int, nvml: Any = None, handles: tuple[Any, ...] = ()) -> None:
        self.count = count
        self._nvml = nvml
        self._handles = handles

    def joules(self) -> float | None:
        """Return the energy that all of them took since some fixed time, or None where no counter says so."""
        if self._nvml is None or not self._handles:
            return None
        try:
            units = sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)
        except self._nvml.NVMLError:  # older than Volta
            return None
        return float(units) * _JOULES_PER_UNIT


def open_gpus() -> Gpus:
    """Look for GPUs, without importing torch for it."""
    try:
        import pynvml
    except ImportError:
        return Gpus(_count_without_nvml())
    try:
        pynvml.nvmlInit()
        handles = tuple(_handle(pynvml, name) for name in _visible(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as e:
        logger.debug("NVML is not to be had: %s", e)
        return Gpus(_count_without_nvml())
    return Gpus(len(handles), pynvml, handles)


def _visible(count: int) -> list[str]:
    """Return indices or UUIDs of the devices that CUDA would use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(count)]
    names: list[str] = []
    for name in (part.strip() for part in chosen.split(",")):
        # As CUDA reads it: the first name that is none ends the list.
        if not name or name == "-1" or (name.isdecimal() and int(name) >= count):
            break
        names.append(name)
    return names


def _handle(nvml: Any, name: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)


def _count_without_nvml() -> int:
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0
    return len(_visible(len(list(_DRIVER.iterdir())))) if _DRIVER.is_dir() else 0
