"""One safetensors file: its header, checked before a byte of it is believed, and writing one tensor after another.

Only the header is parsed; tensors are ranges of bytes that are copied. So converting names needs neither torch nor
memory, and no bit of a weight can change. Layout: 8 bytes length (little endian), a JSON header, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.errors import CheckpointError

# The limit of the reference implementation; a header of a thousand tensors has about 100 kB.
MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 16 << 20
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_DAMAGED = "the file is damaged or not a safetensors file: download or save it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies: `nbytes` bytes of `path` from `offset` on, row-major and little endian."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the tensor in pieces of at most `CHUNK_BYTES`.

        Raises:
            CheckpointError: The file became shorter than its header says.
        """
        left = self.nbytes
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left:
                piece = file.read(min(left, CHUNK_BYTES))
                if not piece:
                    raise CheckpointError(f"{self.path} ended while it was read", _DAMAGED)
                left -= len(piece)
                yield piece


def finite_chunks(chunks: Iterator[bytes], dtype: str, where: str) -> Iterator[bytes]:
    """Pass the bytes of a tensor on, looking for NaN and infinity among 16 to 64-bit floats.

    Args:
        chunks: Whole elements each.
        dtype: Type of the elements.
        where: Names the tensor.

    Raises:
        CheckpointError: There are some.
    """
    import numpy as np

    for piece in chunks:
        if dtype == "BF16":  # an exponent of ones, which numpy does not know
            broken = int(np.count_nonzero(np.frombuffer(piece, "<u2") & 0x7F80 == 0x7F80))
        elif dtype in _FLOATS:
            broken = int(np.count_nonzero(~np.isfinite(np.frombuffer(piece, _FLOATS[dtype]))))
        else:
            broken = 0
        if broken:
            raise CheckpointError(
                f"{where} holds NaN or infinity",
                "take a checkpoint from before training diverged, or download it again",
            )
        yield piece


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingTensor:
    """A tensor to write; `chunks` is called once, when its turn has come."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[bytes]]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        CheckpointError: Size, JSON, types, shapes or offsets do not describe exactly the bytes that follow.
    """
    raw, data_start, data_bytes = _raw_header(path)
    entries = {name: _entry(path, name, value, data_start, data_bytes) for name, value in raw.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    at = data_start
    for name, entry in ordered:
        if entry.offset != at:
            what = "overlaps another tensor" if entry.offset < at else "leaves a gap in front of it"
            raise CheckpointError(f"{path}: tensor '{name}' {what}", _DAMAGED)
        at += entry.nbytes
    if at != data_start + data_bytes:
        raise CheckpointError(f"{path}: {data_start + data_bytes - at} bytes belong to no tensor", _DAMAGED)
    return dict(ordered)


def write_file(path: Path, tensors: Sequence[OutgoingTensor], wrote: Callable[[int], None]) -> None:
    """Write a safetensors file, one chunk in memory at a time.

    Args:
        path: Where to write.
        tensors: What to write, in this order.
        wrote: Called with the number of bytes after every chunk.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the file and like aligned data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in tensor.chunks():
                file.write(piece)
                wrote(len(piece))


def _raw_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header without its metadata, where the data starts and how many bytes it has."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: no header of {length} bytes fits into {size} bytes", _DAMAGED)
            text = file.read(length)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}", "check the path and its permissions") from e
    try:
        raw = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: the header is not JSON: {e}", _DAMAGED) from e
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object", _DAMAGED)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ of the header is not a map of strings", _DAMAGED)
    return raw, 8 + length, size - 8 - length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' stands there twice")
        found[name] = value
    return found


def _entry(path: Path, name: str, value: Any, data_start: int, data_bytes: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: tensor '{name}' lacks its type, shape or offsets", _DAMAGED) from None
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: tensor '{name}' has the unknown type {dtype!r}", _DAMAGED)
    if not isinstance(shape, list) or not all(_is_count(number) for number in (*shape, start, end)):
        raise CheckpointError(f"{path}: shape or offsets of tensor '{name}' are no counts", _DAMAGED)
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != nbytes or end > data_bytes:
        raise CheckpointError(
            f"{path}: tensor '{name}' of shape {tuple(shape)} has {nbytes} bytes, its offsets {start} to {end} of "
            f"{data_bytes} do not fit",
            _DAMAGED,
        )
    return TensorEntry(path=path, dtype=dtype, shape=tuple(shape), offset=data_start + start, nbytes=nbytes)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
