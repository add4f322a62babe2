"""Pretrained parts that a recipe starts from: found on disk or on the Hub, checked, and put together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nvila.checkpoints.documents import DOCUMENTS
from nvila.errors import CapabilityError, CheckpointError, ConfigError, InfrastructureError
from nvila.training.config import BaseModels, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nvila.modeling import NVILAForConditionalGeneration

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Weights that cannot execute code, what describes them, and what may be done with them.
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.jinja", *DOCUMENTS)
_VISION_TYPES = ("siglip_vision_model", "siglip")
_LANGUAGE_TYPES = ("qwen2",)
_SAME = ("hidden_size", "num_hidden_layers")


def local_bases(base: BaseModels) -> BaseModels:
    """Return the parts as folders; what is named by a Hub id is downloaded, or taken from the Hub's cache.

    Raises:
        ConfigError: A part is neither a folder nor an id.
        InfrastructureError: The Hub does not have it, or cannot be reached.
        CapabilityError: A part is of a kind that cannot be built in.
    """
    found = BaseModels(vision=_local(base.vision, "vision"), language=_local(base.language, "language"))
    for part, folder, types in (
        ("vision", found.vision, _VISION_TYPES),
        ("language", found.language, _LANGUAGE_TYPES),
    ):
        kind = _config(Path(folder), part).get("model_type")
        if kind not in types:
            raise CapabilityError(
                f"model.from.{part}: {folder} is a '{kind}', which cannot be a {part} part",
                f"use a model of type {' or '.join(types)}",
            )
    return found


def base_tokenizer(base: BaseModels) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the language part.

    Raises:
        CheckpointError: The folder has none.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(base.language, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"model.from.language: {base.language} has no tokenizer: {e}", "save it there") from e
    return cast("PreTrainedTokenizerBase", loaded)


def build_from_bases(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> NVILAForConditionalGeneration:
    """Build a model from pretrained parts and a new projector.

    Raises:
        CheckpointError: A part has another width or depth than the recipe says.
    """
    from nvila.parts import build_from_parts

    base = local_bases(cast("BaseModels", config.base))
    for part, folder, expected in (
        ("vision", base.vision, config.vision),
        ("language", base.language, config.language),
    ):
        raw = _config(Path(folder), part)
        _check_shape(part, folder, raw.get("vision_config", raw), expected)
    fields = config.media_fields() | {
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.select_layer,
    }
    model, _ = build_from_parts(base.vision, base.language, "basic", tokenizer=tokenizer, **fields)
    return model


def with_local_bases(config: ModelConfig) -> ModelConfig:
    """Return a model whose pretrained parts are folders, checked against the recipe.

    Raises:
        ConfigError: As in `local_bases`, as are the errors below.
        CheckpointError: A part has another width or depth than the recipe says.
    """
    if config.base is None:
        return config
    base = local_bases(config.base)
    for part, folder, expected in (
        ("vision", base.vision, config.vision),
        ("language", base.language, config.language),
    ):
        raw = _config(Path(folder), part)
        _check_shape(part, folder, raw.get("vision_config", raw), expected)
    return replace(config, base=base)


def _local(name: str, part: str) -> str:
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if not _HUB_ID.fullmatch(name) or name.count("/") != 1:
        raise ConfigError(f"model.from.{part} is '{name}', which is no folder", "check the path, or give a Hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise InfrastructureError(
            f"model.from.{part}: '{name}' is no folder here, and the Hub did not give it: {type(e).__name__}",
            "check the name and the network, or download it and give the folder",
        ) from e


def _config(folder: Path, part: str) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"model.from.{part}: {path} cannot be read: {e}", "give a folder of a saved model") from e
    if not isinstance(raw, dict):
        raise CheckpointError(f"model.from.{part}: {path} is no configuration", "give a folder of a saved model")
    return raw


def _check_shape(part: str, folder: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in _SAME:
        if name in found and found[name] != expected[name]:
            raise CheckpointError(
                f"model.from.{part}: {folder} has {name} {found[name]}, model.{part}.{name} is {expected[name]}",
                "let the recipe say what the folder has, or give another folder",
            )
