"""Putting visual tokens into the embeddings of a text, and telling when the two do not belong together.

Shape suffixes: B rows, L positions of a row, M visual tokens of the batch, H language width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nvila.errors import DataError

Kind = Literal["image", "video"]


def splice(embeds_BLH: Tensor, input_ids_BL: Tensor, token_id: int, features: Tensor | None, kind: Kind) -> Tensor:
    """Put visual tokens where their placeholders are, in order.

    Args:
        embeds_BLH: Embeddings of the text.
        input_ids_BL: Its ids.
        token_id: The placeholder.
        features: Visual tokens of shape (..., H), rows of the batch one after the other; None for none.
        kind: What the placeholder stands for, for the message.

    Returns:
        Embeddings (B, L, H); the given tensor where there is nothing to put in.

    Raises:
        DataError: Placeholders and visual tokens differ in number.
    """
    positions = (input_ids_BL == token_id).flatten().nonzero().squeeze(1)
    given = 0 if features is None else features.numel() // features.shape[-1]
    if len(positions) != given:
        raise DataError(
            f"the text has {len(positions)} {kind} placeholders but the {kind}s give {given} visual tokens",
            f"pass exactly the {kind}s that the text names",
        )
    if features is None or not given:
        return embeds_BLH
    tokens = features.reshape(-1, features.shape[-1]).to(embeds_BLH.device, embeds_BLH.dtype)
    return embeds_BLH.flatten(0, 1).index_copy(0, positions, tokens).view_as(embeds_BLH)


def repeat_rows(features: Tensor, input_ids_BL: Tensor, token_id: int, times: int) -> Tensor:
    """Repeat the visual tokens of every row, for a batch whose rows are repeated one by one.

    Args:
        features: Visual tokens of shape (..., H).
        input_ids_BL: Ids of the rows before they are repeated.
        token_id: The placeholder.
        times: How often each row is repeated.

    Returns:
        Tensor of shape (M * times, H).
    """
    tokens = features.reshape(-1, features.shape[-1])
    counts: Sequence[int] = (input_ids_BL == token_id).sum(1).tolist()
    return torch.cat([piece for piece in tokens.split(list(counts)) for _ in range(times)])
