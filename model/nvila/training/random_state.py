"""The state of all random number generators of a process, in JSON form."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state(noise: torch.Generator) -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's generators and of the augmentation's."""
    numpy_state: Any = np.random.get_state(legacy=False)
    state = {
        "python": random.getstate(),
        "numpy": numpy_state | {"state": numpy_state["state"] | {"key": numpy_state["state"]["key"].tolist()}},
        "torch": _text(torch.get_rng_state()),
        "noise": _text(noise.get_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: Mapping[str, Any], noise: torch.Generator) -> None:
    """Go on with what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(dict(state["numpy"]) | {"state": state["numpy"]["state"] | {"key": keys}})
    torch.set_rng_state(_bytes(state["torch"]))
    noise.set_state(_bytes(state["noise"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
