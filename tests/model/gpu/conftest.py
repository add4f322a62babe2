"""Tests that need a CUDA device: each compares it with what the CPU or a wider type gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nvila.data.collation import Batch
    from nvila.data.conversation import ConversationEncoder


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda"


@pytest.fixture
def moved(device: str) -> Callable[[Any], Any]:
    """Move a model or the tensors of a mapping to the device."""
    import torch
    from torch import nn

    def move(what: nn.Module | dict[str, Tensor | int]) -> Any:
        if isinstance(what, nn.Module):
            return nn.Module.to(what, device)
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in what.items()}

    return move


@pytest.fixture(scope="session")
def batch(encoder: ConversationEncoder) -> Batch:
    """Three samples about two images in two rows, the second with padding."""
    from nvila.data.collation import collate
    from nvila.data.records import vqa_sample

    rows = [[("a", "what color?", "red"), ("a", "what shape?", "the circle")], [("b", "is there a circle?", "yes")]]
    groups = [
        [encoder(vqa_sample(id="x", source="s", image=i, question=q, answer=a)) for i, q, a in row] for row in rows
    ]
    return collate(groups, pad_token_id=0)
