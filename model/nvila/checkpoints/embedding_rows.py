"""Rows of the embedding and of the head for tokens that a tokenizer gained, and taking them away again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nvila.checkpoints.tensor_file import TensorEntry
from nvila.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def resized_chunks(entry: TensorEntry, rows: int) -> Iterator[bytes]:
    """Yield the bytes of a (V, H) matrix with another number of rows; new ones are the mean of the old.

    The mean makes a new token as likely as an average one, as the original code does it.
    """
    old_rows = entry.shape[0]
    left = min(rows, old_rows) * (entry.nbytes // old_rows)
    for piece in entry.chunks():
        yield piece[:left]
        left -= len(piece[:left])
        if not left:
            break
    if rows > old_rows:
        yield _mean_row(entry) * (rows - old_rows)


def resized_shape(entry: TensorEntry, rows: int) -> tuple[tuple[int, ...], int]:
    """Return shape and bytes of the matrix with `rows` rows."""
    return (rows, *entry.shape[1:]), entry.nbytes // entry.shape[0] * rows


def _mean_row(entry: TensorEntry) -> bytes:
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    if entry.dtype not in dtypes:
        raise CheckpointError(f"{entry.path}: an embedding of type {entry.dtype} cannot gain rows", "use 16 or 32 bits")
    dtype, width = dtypes[entry.dtype], entry.shape[1]
    row_bytes = entry.nbytes // entry.shape[0]
    total = torch.zeros(width, dtype=torch.float64)
    rest = b""
    for piece in entry.chunks():
        data = rest + piece
        whole = len(data) // row_bytes * row_bytes
        if whole:
            total += _rows(data[:whole], dtype, width).double().sum(0)
        rest = data[whole:]
    mean = (total / entry.shape[0]).to(dtype)
    return mean.view(torch.uint8).numpy().tobytes()


def _rows(data: bytes, dtype: torch.dtype, width: int) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, width)
