"""A folder of safetensors files: one file, or shards with the index that Hugging Face writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nvila.checkpoints.tensor_file import OutgoingTensor, TensorEntry, read_header, write_file
from nvila.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REFUSED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_AGAIN = "download or save the checkpoint again"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, not JSON, or holds no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", _AGAIN) from None
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}", "check the path and its permissions") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}", _AGAIN) from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", _AGAIN)
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, keys in the order given."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_folder(directory: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a folder by name.

    Raises:
        CheckpointError: There are no weights, weights that could execute code, a damaged file, or an index that does
            not fit the files beside it or points elsewhere.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a folder", "name the folder that holds the weights")
    refused = sorted(path.name for path in directory.iterdir() if path.suffix.lower() in REFUSED_SUFFIXES)
    if refused:
        raise CheckpointError(
            f"{directory / refused[0]} is in a format that can execute code on load",
            "convert it to safetensors where it came from, or move it away if it holds no weights",
        )
    if (directory / INDEX_FILE).is_file():
        return read_shards(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no safetensors weights", _AGAIN)
    if len(files) > 1:
        raise CheckpointError(
            f"{directory} holds {len(files)} safetensors files but no {INDEX_FILE}", "add the index that names them"
        )
    return read_header(files[0])


def write_folder(
    directory: Path, tensors: Sequence[OutgoingTensor], max_shard_bytes: int, wrote: Callable[[int], None]
) -> int:
    """Write tensors as one file, or as shards of at most `max_shard_bytes` with their index.

    A tensor larger than the limit gets a shard of its own.

    Returns:
        The number of weight files.
    """
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        write_file(directory / SINGLE_FILE, shards[0], wrote)
        return 1
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard, wrote)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_FILE, index)
    return len(shards)


def read_shards(directory: Path) -> dict[str, TensorEntry]:
    """Return the tensors of the shards that the index of a folder names.

    Raises:
        CheckpointError: A file is damaged, or the index does not fit the files beside it or points elsewhere.
    """
    index = directory / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", _AGAIN)
    found: dict[str, TensorEntry] = {}
    for shard in dict.fromkeys(weight_map.values()):
        entries = read_header(_shard_path(index, shard))
        for name, entry in entries.items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{entry.path}: tensor '{name}' is not what {index.name} says of it", _AGAIN)
            found[name] = entry
    missing = sorted(weight_map.keys() - found.keys())
    if missing:
        where = weight_map[missing[0]]
        raise CheckpointError(f"{index}: tensor '{missing[0]}' is missing from {where}", _AGAIN)
    # The order of the index is the order of the model, unlike that of the shards' files.
    return {name: found[name] for name in weight_map}


def _shard_path(index: Path, shard: object) -> Path:
    """Return the path of a shard; its name comes from outside and must stay in the folder."""
    if not isinstance(shard, str) or not shard.endswith(".safetensors") or set("/\\\0") & set(shard):
        raise CheckpointError(
            f"{index} names the shard {shard!r}, which is no safetensors file beside it",
            "do not use this checkpoint: an index names files of its own folder only",
        )
    path = index.parent / shard
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, {index.name} names it", "download the missing shard")
    return path


def _split(tensors: Sequence[OutgoingTensor], max_bytes: int) -> list[list[OutgoingTensor]]:
    shards: list[list[OutgoingTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards
