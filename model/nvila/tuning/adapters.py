"""Adapters on disk: what was learned, apart from its base, and tied to it by a digest.

An adapter folder is one that PEFT reads (`adapter_config.json`, `adapter_model.safetensors`), with what was fully
trained beside it (`trained.safetensors`: projector, norms), the processor, and `nvila_adapter.json`, which says which
base it belongs to. `nvila.assembly.load_model` takes such a folder wherever it takes a model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nvila.errors import CheckpointError
from nvila.finite import check_weights
from nvila.tuning.applying import ADAPTER, adapted_layers, apply_method, inject, lora_config, trained_names
from nvila.tuning.four_bit import KINDS, FourBitKind, kind_in, kind_on, to_four_bit, widen_model
from nvila.tuning.methods import TuneMethod

if TYPE_CHECKING:
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor

RECORD = "nvila_adapter.json"
LORA_FILE, TRAINED_FILE, PEFT_CONFIG = "adapter_model.safetensors", "trained.safetensors", "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."
_VERSION = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """What an adapter belongs to.

    Args:
        method: How it was trained.
        base: Folder of the base when it was trained.
        base_digest: Digest of the base (`base_digest`).
        four_bit: The 4-bit values that the base had; None for a wide base.
    """

    method: TuneMethod
    base: str
    base_digest: str
    four_bit: FourBitKind | None = None

    @classmethod
    def read(cls, directory: Path) -> AdapterRecord:
        """Read the record of an adapter folder.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        try:
            raw = json.loads((directory / RECORD).read_text(encoding="utf-8"))
            method, base = TuneMethod.from_dict(raw["method"]), raw["base"]
            # Records of version 0.1 do not say it; they were all written without a GPU.
            kind = base.get("four_bit", "int4" if method.language == "qlora" else None)
            if kind not in (None, *KINDS):
                raise ValueError(f"base.four_bit is {kind!r}, not one of {', '.join(KINDS)}")
            return cls(method=method, base=base["path"], base_digest=base["digest"], four_bit=kind)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{directory / RECORD} cannot be read: {e}", "point at a saved adapter") from e

    def write(self, directory: Path) -> None:
        """Write it into an adapter folder."""
        raw = {
            "version": _VERSION,
            "method": self.method.to_dict(),
            "base": {"path": self.base, "digest": self.base_digest, "four_bit": self.four_bit},
        }
        (directory / RECORD).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def is_adapter(directory: Path) -> bool:
    """Whether a folder is an adapter."""
    return (directory / RECORD).is_file()


def base_digest(directory: Path) -> str:
    """Return the identity of a base: of its configuration and weights; tokenizer files may differ.

    Raises:
        CheckpointError: The folder holds no weights.
    """
    files = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    if not files:
        raise CheckpointError(f"{directory} holds no safetensors weights", "point at a saved model")
    digest = hashlib.sha256()
    for path in [directory / "config.json", *files]:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def adapter_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the LoRA tensors under PEFT's names, and the other trained ones under those of the base."""
    lora: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name:
            # PEFT saves the magnitudes of DoRA as tensors of the layer, its matrices as layers.
            plain = name.replace(f".{ADAPTER}.weight", "" if "magnitude" in name else ".weight")
            lora[_PEFT_PREFIX + plain] = parameter.detach().cpu().contiguous()
        elif parameter.requires_grad:
            trained[name.replace(_BASE_LAYER, ".")] = parameter.detach().cpu().contiguous()
    return lora, trained


def save_adapter(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, directory: Path, record: AdapterRecord
) -> None:
    """Write what a prepared model has learned; the folder appears when it is complete.

    Args:
        model: A model that `apply_method` has prepared.
        processor: Its processor.
        directory: The folder, which must not exist.
        record: What it belongs to; which 4-bit values the base has is seen in the model.
    """
    from safetensors.torch import save_file

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    lora, trained = adapter_tensors(model)
    save_file(trained, partial / TRAINED_FILE, {"format": "pt"})
    if lora:
        save_file(lora, partial / LORA_FILE, {"format": "pt"})
        _save_peft_config(model, record, partial)
    model.config.save_pretrained(partial)
    model.generation_config.save_pretrained(partial)
    processor.save_pretrained(partial)
    replace(record, four_bit=kind_in(model)).write(partial)
    partial.rename(directory)


def load_adapter(
    directory: Path, base: Path | None = None, *, four_bit: bool | None = None, **options: Any
) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    """Load an adapter over its base, without merging.

    Args:
        directory: The adapter.
        base: Folder of the base; None takes where it was at training.
        four_bit: Keep the base's language model in 4 bits, or not; None does as the training did, and keeps it wide
            where this device's 4-bit values are others: wide ones are nearer to either.
        **options: For `nvila.assembly.load_model` of the base.

    Raises:
        CheckpointError: The base is not there or another one, or the adapter does not fit it.
    """
    from nvila.assembly import load_model
    from nvila.processing import NVILAProcessor

    record = AdapterRecord.read(directory)
    folder = checked_base(directory, record, base)
    model, _ = load_model(folder, **options)
    if _held_in_four_bits(record, model.device) if four_bit is None else four_bit:
        to_four_bit(model)
    attach(model, directory, record.method)
    processor = NVILAProcessor.from_pretrained(directory)
    model.eval()
    return model, processor


def _held_in_four_bits(record: AdapterRecord, device: torch.device) -> bool:
    here = kind_on(device)
    if record.four_bit not in (None, here):
        logger.warning("trained over %s, this device has %s: the base is kept wide", record.four_bit, here)
    return record.four_bit == here


def load_beside(
    model: NVILAForConditionalGeneration, base: Path, adapters: Mapping[str, Path]
) -> dict[str, tuple[NVILAForConditionalGeneration, NVILAProcessor]]:
    """Load adapters over a base that is loaded already; they share its weights, and it stays as it is.

    An adapter has its own copies of what was trained in full (norms, projector), and, if it was trained over 4 bits, of
    the language model in 4 bits.

    Args:
        model: The base.
        base: Its folder.
        adapters: Folders by name.

    Raises:
        CheckpointError: An adapter belongs to another base, or does not fit it.
    """
    from nvila.processing import NVILAProcessor

    digest = base_digest(base)
    loaded = {}
    for name, directory in adapters.items():
        if not is_adapter(directory):
            raise CheckpointError(f"{directory} is no adapter: {RECORD} is missing", "give what nvila tune saved")
        record = AdapterRecord.read(directory)
        checked_base(directory, record, base, digest)
        own = sharing_copy(model, set(trained_names(model, record.method)))
        if _held_in_four_bits(record, own.device):
            to_four_bit(own)
        attach(own, directory, record.method)
        loaded[name] = (own.eval(), NVILAProcessor.from_pretrained(directory))
    return loaded


def sharing_copy(model: NVILAForConditionalGeneration, own: Set[str]) -> NVILAForConditionalGeneration:
    """Return another model over the same tensors, except for parameters of the given names, which are copied."""
    shared: dict[int, Any] = {id(value): value for name, value in model.named_parameters() if name not in own}
    shared |= {id(value): value for _, value in model.named_buffers()}
    return copy.deepcopy(model, shared)


def checked_base(directory: Path, record: AdapterRecord, base: Path | None = None, found: str | None = None) -> Path:
    """Return the folder of an adapter's base.

    Args:
        directory: The adapter.
        record: Its record.
        base: Where the base is; None takes where it was at training.
        found: The digest of that base, where it is known.

    Raises:
        CheckpointError: It is not there, or another one than the adapter was trained on.
    """
    folder = Path(record.base) if base is None else base
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the base of the adapter {directory} is not at {folder}", "bring it there, or say where it is with --base"
        )
    found = base_digest(folder) if found is None else found
    if found != record.base_digest:
        raise CheckpointError(
            f"the adapter {directory} belongs to a base with digest {record.base_digest[:12]}, "
            f"{folder} has {found[:12]}",
            "use the base that it was trained on, or tune again on this one",
        )
    return folder


def attach(model: NVILAForConditionalGeneration, directory: Path, method: TuneMethod) -> None:
    """Put the tensors of an adapter into a loaded base, in place.

    Raises:
        CheckpointError: They are missing, damaged, of another shape, or hold NaN or infinity.
    """
    names = set(trained_names(model, method))
    targets = adapted_layers(model, method)
    if targets:
        inject(model, lora_config(method, targets))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    stored = {**_read(directory / TRAINED_FILE), **(_read(directory / LORA_FILE) if targets else {})}
    check_weights(stored, str(directory))
    parameters = {_stored_name(name): parameter for name, parameter in model.named_parameters()}
    wanted = {name for name in parameters if name.startswith(_PEFT_PREFIX)} | names
    if wrong := sorted(wanted ^ stored.keys()):
        what = "missing" if wrong[0] in wanted else "unknown"
        raise CheckpointError(
            f"the adapter {directory} does not fit its base: {wrong[0]} is {what}",
            "save the adapter again",
        )
    with torch.no_grad():
        for name, value in stored.items():
            target = parameters[name]
            if target.shape != value.shape:
                raise CheckpointError(
                    f"{name} of the adapter {directory} is {tuple(value.shape)}, the base has {tuple(target.shape)}",
                    "use the base that it was trained on",
                )
            target.copy_(value)


def merge(model: NVILAForConditionalGeneration) -> NVILAForConditionalGeneration:
    """Add what LoRA has learned to the weights, in place; the model is an ordinary one afterwards.

    A base in 4 bits is widened first, so that nothing that was learned is rounded away.
    """
    from peft.tuners.lora import LoraLayer

    widen_model(model)
    adapted = [(name, child) for name, child in model.named_modules() if isinstance(child, LoraLayer)]
    for name, child in adapted:
        layer: Any = child
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        if leftover in vars(model):
            delattr(model, leftover)
    return model


def prepare(model: NVILAForConditionalGeneration, method: TuneMethod, seed: int) -> None:
    """Apply a method with LoRA matrices that follow from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        apply_method(model, method)


def _stored_name(name: str) -> str:
    if f".{ADAPTER}." in name:
        return _PEFT_PREFIX + name.replace(f".{ADAPTER}.weight", "" if "magnitude" in name else ".weight")
    return name.replace(_BASE_LAYER, ".")


def _save_peft_config(model: NVILAForConditionalGeneration, record: AdapterRecord, directory: Path) -> None:
    from peft.tuners.lora import LoraLayer

    targets = [name for name, child in model.named_modules() if isinstance(child, LoraLayer)]
    config = lora_config(record.method, targets)
    config.base_model_name_or_path = record.base
    config.inference_mode = True
    config.save_pretrained(os.fspath(directory))


def _read(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"cannot read {path}: {e}", "save the adapter again") from e
