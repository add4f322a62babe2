"""Convert a checkpoint from one layout to another, tensor by tensor."""

from __future__ import annotations

import copy
import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.checkpoints.configs import (
    SOURCE_KEY,
    Fields,
    Files,
    blank_files,
    complete,
    origin_of,
    read_fields,
    sources_of,
    unknown_fields,
    write_fields,
)
from nvila.checkpoints.embedding_rows import resized_chunks, resized_shape
from nvila.checkpoints.expected import build_config, check_tensors, complete_fields
from nvila.checkpoints.layouts import (
    CONFIG_FILE,
    EMBEDDING,
    HEAD,
    HF,
    LAYOUTS,
    NVILA,
    PART_FOLDERS,
    VILA,
    Checkpoint,
    describe_name,
    from_ours,
    open_checkpoint,
)
from nvila.checkpoints.shards import write_folder, write_json
from nvila.checkpoints.tensor_file import OutgoingTensor, finite_chunks
from nvila.checkpoints.tokenizer_files import (
    KEPT_FOLDER,
    TokenFacts,
    add_media_tokens,
    copy_files,
    load_tokenizer,
    media_token_ids,
    tokenizer_folder,
    write_preprocessor,
    write_processor,
)
from nvila.errors import CheckpointError, ConfigError, ResourceError, nearest
from nvila.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nvila.configuration import NVILAConfig

DEFAULT_SHARD_BYTES = 5_000_000_000
# Not part of a model: who saved it and how its classes are called.
_INCIDENTAL = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion did.

    Attributes:
        path: The folder that was written.
        source_layout: Layout of the source.
        layout: Layout of `path`.
        num_tensors: Tensors written.
        num_bytes: Bytes of weights written.
        num_files: Weight files written.
        added_tokens: Media tokens that the tokenizer lacked.
    """

    path: Path
    source_layout: str
    layout: str
    num_tensors: int
    num_bytes: int
    num_files: int
    added_tokens: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain form."""
        return {
            "path": str(self.path),
            "from": self.source_layout,
            "to": self.layout,
            "tensors": self.num_tensors,
            "bytes": self.num_bytes,
            "files": self.num_files,
            "added_tokens": self.added_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Everything that is decided before the first byte is written."""

    to: str
    config: NVILAConfig
    files: Files
    rows: int
    kept: bool
    released: bool
    tokens: TokenFacts | None
    tokenizer: PreTrainedTokenizerBase | None


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    reporter: Reporter = SILENT,
) -> Conversion:
    """Convert a checkpoint; weights keep every bit, and no tensor is in memory as a whole.

    The folder gets its name when it is complete, so an interrupted conversion leaves nothing that looks like a model.

    Args:
        source: Folder of a checkpoint in any layout.
        target: Folder to write; it must not exist, or be empty.
        to: One of `nvila.checkpoints.LAYOUTS`.
        max_shard_bytes: Size from which weights are spread over several files.
        reporter: Hears of progress in MiB.

    Raises:
        ConfigError: The layout is unknown or the one that the source has.
        CheckpointError: The source is damaged, refused, holds NaN or infinity or does not fit its configuration, or the
            target is taken.
        ResourceError: The disk is full.
    """
    if to not in LAYOUTS:
        raise ConfigError(f"unknown layout '{to}'", nearest(to, LAYOUTS))
    if max_shard_bytes < 1:
        raise ConfigError(f"a shard of {max_shard_bytes} bytes holds nothing", "use a size such as 5GB")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} exists already", "name a new folder, or remove this one")
    checkpoint = open_checkpoint(source)
    if checkpoint.layout == to:
        raise ConfigError(f"{source} has the layout '{to}' already", f"layouts: {', '.join(LAYOUTS)}")
    if checkpoint.skipped:
        reporter.notice(f"left out {len(checkpoint.skipped)} tensors that the model computes: {checkpoint.skipped[0]}")
    plan = _plan(checkpoint, to, reporter)
    with _building(target) as folder:
        tensors = _outgoing(checkpoint, plan)
        _check_space(folder, sum(tensor.nbytes for tensor in tensors))
        num_files = _write_weights(folder, to, tensors, max_shard_bytes, reporter)
        _write_others(folder, checkpoint, plan)
    return Conversion(
        path=target,
        source_layout=checkpoint.layout,
        layout=to,
        num_tensors=len(tensors),
        num_bytes=sum(tensor.nbytes for tensor in tensors),
        num_files=num_files,
        added_tokens=plan.tokens.added if plan.tokens else [],
    )


def _plan(checkpoint: Checkpoint, to: str, reporter: Reporter) -> _Plan:
    where = str(checkpoint.root)
    fields = read_fields(checkpoint.layout, checkpoint.configs, where)
    for notice in complete_fields(fields, checkpoint):
        reporter.notice(notice)
    check_tensors(checkpoint, build_config(fields, where))
    rows = checkpoint.tensors[EMBEDDING].shape[0]
    released = origin_of(checkpoint.layout, checkpoint.configs) != NVILA
    record: dict[str, Any] = {}
    tokens, tokenizer, kept = None, None, False
    folder = tokenizer_folder(checkpoint.layout, checkpoint.root)
    if to == NVILA:
        tokenizer = load_tokenizer(folder)
        tokens = add_media_tokens(tokenizer, sentinel=released)
        fields |= tokens.fields
        record = {"tokens": tokens.length, "rows": rows, "rows_after": max(rows, tokens.length)}
        rows = record["rows_after"]
    elif checkpoint.layout == NVILA:
        kept, rows = _kept_tokenizer(checkpoint, rows)
    elif to == HF and (folder / "tokenizer_config.json").is_file():
        fields |= media_token_ids(load_tokenizer(folder))
    fields["text_config"]["vocab_size"] = rows
    config = build_config(fields, where)
    return _Plan(
        to=to,
        config=config,
        files=_target_files(checkpoint, to, complete(fields, config), config, record),
        rows=rows,
        kept=kept,
        released=released,
        tokens=tokens,
        tokenizer=tokenizer,
    )


def _kept_tokenizer(checkpoint: Checkpoint, rows: int) -> tuple[bool, int]:
    """Decide whether the tokenizer files that came with a model still belong to it, and how many rows they have."""
    record = checkpoint.configs[CONFIG_FILE].get(SOURCE_KEY)
    if not isinstance(record, dict) or not (checkpoint.root / KEPT_FOLDER / "tokenizer_config.json").is_file():
        return False, rows
    length = len(load_tokenizer(checkpoint.root))
    if (record.get("tokens"), record.get("rows_after")) != (length, rows):
        return False, rows
    return True, int(record.get("rows", rows))


def _target_files(
    checkpoint: Checkpoint, to: str, fields: Fields, config: NVILAConfig, record: dict[str, Any]
) -> Files:
    """Return the configuration files of the target.

    Files that travelled along are the start; then only fields that have another meaning by now are written.
    """
    sources = sources_of(checkpoint.layout, checkpoint.configs)
    origin = origin_of(checkpoint.layout, checkpoint.configs)
    # Our files about a model from elsewhere say which tokens it gained, which is decided anew.
    if to in sources and not (to == NVILA and origin != NVILA):
        files = copy.deepcopy(sources[to])
        before = _meaning(replace(checkpoint, layout=to, configs=files))
        write_fields(to, files, _changes(before, config.to_dict(), fields))
    else:
        files = blank_files(to, config)
        write_fields(to, files, fields)
        sources.pop(to, None)
        files[CONFIG_FILE][SOURCE_KEY] = {"origin": origin, "configs": sources, **record}
    for key, value in unknown_fields(checkpoint.layout, checkpoint.configs).items():
        # A name that our class uses for something else stays where it came from, under SOURCE_KEY.
        if to != NVILA or not hasattr(config, key):
            files[CONFIG_FILE][key] = value
    return files


def _meaning(checkpoint: Checkpoint) -> Fields:
    """Return all fields of a checkpoint, defaults included, in one form."""
    fields = read_fields(checkpoint.layout, checkpoint.configs, str(checkpoint.root))
    complete_fields(fields, checkpoint)
    full: Fields = build_config(fields, str(checkpoint.root)).to_dict()
    return full


def _changes(before: Fields, after: Fields, fields: Fields) -> Fields:
    """Return the given fields whose meaning changed; of the parts, only their keys that did."""
    changed: Fields = {}
    for key, value in fields.items():
        if key in ("text_config", "vision_config"):
            old, new = before[key], after[key]
            part = {k: new[k] for k in new if k not in _INCIDENTAL and old.get(k) != new[k]}
            if part:
                changed[key] = part
        elif key not in _INCIDENTAL and before.get(key) != after.get(key):
            changed[key] = value
    return changed


def _outgoing(checkpoint: Checkpoint, plan: _Plan) -> list[OutgoingTensor]:
    tensors = []
    for name, entry in checkpoint.tensors.items():
        if name == HEAD and plan.config.tie_word_embeddings:
            continue  # checked to be the embedding
        shape, nbytes, chunks = entry.shape, entry.nbytes, entry.chunks
        if name in (EMBEDDING, HEAD) and plan.rows != entry.shape[0]:
            shape, nbytes = resized_shape(entry, plan.rows)
            chunks = partial(resized_chunks, entry, plan.rows)
        theirs = from_ours(plan.to, name)
        where = f"{entry.path}: tensor '{describe_name(checkpoint.layout, name)}'"
        checked = partial(_checked, chunks, entry.dtype, where)
        tensors.append(OutgoingTensor(name=theirs, dtype=entry.dtype, shape=shape, nbytes=nbytes, chunks=checked))
    return tensors


def _checked(chunks: Callable[[], Iterator[bytes]], dtype: str, where: str) -> Iterator[bytes]:
    return finite_chunks(chunks(), dtype, where)


def _write_weights(
    folder: Path, to: str, tensors: list[OutgoingTensor], max_shard_bytes: int, reporter: Reporter
) -> int:
    wrote = _progress(reporter, sum(tensor.nbytes for tensor in tensors))
    if to != VILA:
        return write_folder(folder, tensors, max_shard_bytes, wrote)
    num_files = 0
    for part in PART_FOLDERS:
        (folder / part).mkdir()
        own = [
            OutgoingTensor(
                name=tensor.name.removeprefix(f"{part}/"),
                dtype=tensor.dtype,
                shape=tensor.shape,
                nbytes=tensor.nbytes,
                chunks=tensor.chunks,
            )
            for tensor in tensors
            if tensor.name.startswith(f"{part}/")
        ]
        num_files += write_folder(folder / part, own, max_shard_bytes, wrote)
    return num_files


def _write_others(folder: Path, checkpoint: Checkpoint, plan: _Plan) -> None:
    for name, config in plan.files.items():
        write_json(folder / name, config)
    copy_files(checkpoint.layout, checkpoint.root, plan.to, folder, kept=plan.kept)
    if plan.to == NVILA:
        assert plan.tokenizer is not None
        write_processor(folder, plan.config, plan.tokenizer, released=plan.released)
    else:
        write_preprocessor(folder / "vision_tower" if plan.to == VILA else folder, plan.config.vision_config.image_size)


def _progress(reporter: Reporter, total: int) -> Callable[[int], None]:
    mib, done, shown = 1 << 20, 0, -1

    def wrote(nbytes: int) -> None:
        nonlocal done, shown
        done += nbytes
        if -(-done // mib) != shown:  # tensors are many and small
            shown = -(-done // mib)
            reporter.progress("write MiB", shown, -(-total // mib))

    return wrote


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{folder.parent} has {free / 1e9:.1f} GB left, the weights need {needed / 1e9:.1f} GB",
            "free some space, or write to another disk",
        )


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    """Give a folder that becomes `target` if the block ends well, and vanishes if it does not."""
    parent = target.absolute().parent
    folder = parent / f".{target.name}.partial-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, target.name)
        folder.mkdir()
        yield folder
        if target.is_dir():
            target.rmdir()  # empty, or convert() had refused
        folder.rename(target)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk of {parent} is full", "free some space, or write to another disk") from e
        raise CheckpointError(f"{e.filename or target} failed: {e.strerror or e}", "check path and permissions") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path, name: str) -> None:
    """Remove what conversions to the same target left that were killed."""
    for path in parent.glob(f".{glob.escape(name)}.partial-*"):
        try:
            os.kill(int(path.name.rpartition("-")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError):
            continue  # another user's process, or a name that is not ours
