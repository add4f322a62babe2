"""Building, saving and loading whole models: weights, configuration, tokenizer and image processor in one folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerBase,
)

from nvila.checkpoints.shards import REFUSED_SUFFIXES
from nvila.configuration import NVILAConfig
from nvila.data.tokenizers import IMAGE_TOKEN, VIDEO_TOKEN, token_id
from nvila.errors import CheckpointError, ConfigError
from nvila.finite import check_weights
from nvila.image_processing import NVILAImageProcessor
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.time_tokens import add_time_tokens
from nvila.training.config import ModelConfig

logger = logging.getLogger(__name__)


def register_auto_classes() -> None:
    """Make `AutoConfig`, `AutoModelForImageTextToText`, `AutoProcessor` and `AutoImageProcessor` know NVILA."""
    AutoConfig.register("nvila", NVILAConfig, exist_ok=True)
    AutoModelForImageTextToText.register(NVILAConfig, NVILAForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(NVILAConfig, NVILAProcessor, exist_ok=True)
    AutoImageProcessor.register(NVILAConfig, image_processor_classes={"pil": NVILAImageProcessor}, exist_ok=True)


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> NVILAForConditionalGeneration:
    """Build a model from the parts of a recipe; seed torch before for reproducible new weights.

    Args:
        config: The parts; pretrained ones are loaded from their folders (`nvila.base_models.local_bases`).
        tokenizer: Tokenizer of the language model; it gets the tokens that it lacks.

    Raises:
        CheckpointError: Pretrained parts are of another shape than the recipe says.
        ConfigError: The vocabulary has no room for the tokenizer.
    """
    if config.base is not None:
        from nvila.base_models import build_from_bases

        return build_from_bases(config, tokenizer)
    times = add_time_tokens(tokenizer, config.time_tokens) if config.time_tokens else []
    language: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        **config.language,
    }
    if language["vocab_size"] < len(tokenizer):
        raise ConfigError(
            f"model.language.vocab_size is {language['vocab_size']}, but the tokenizer has {len(tokenizer)} tokens",
            f"use {len(tokenizer)} or more, or null",
        )
    nvila = NVILAConfig(
        vision_config=dict(config.vision),
        text_config=language,
        mm_projector_type=config.projector,
        mm_vision_select_layer=config.select_layer,
        image_token_id=token_id(tokenizer, IMAGE_TOKEN),
        video_token_id=token_id(tokenizer, VIDEO_TOKEN),
        image_end_token_id=tokenizer("\n", add_special_tokens=False)["input_ids"][0],
        time_token_ids=times,
        **config.media_fields(),
    )
    return NVILAForConditionalGeneration(nvila)


def build_processor(model_config: NVILAConfig, tokenizer: PreTrainedTokenizerBase) -> NVILAProcessor:
    """Build the processor that belongs to a model."""
    return NVILAProcessor.from_config(model_config, tokenizer)


def save_model(
    model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    directory: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model and processor as a Hugging Face folder (safetensors).

    Args:
        model: The model.
        processor: Its processor.
        directory: The folder.
        weights: Weights by name, for a model that does not hold them itself.
    """
    model.save_pretrained(directory, state_dict=None if weights is None else dict(weights))
    processor.save_pretrained(directory)


def load_model(
    directory: Path, *, base: Path | None = None, **options: Any
) -> tuple[NVILAForConditionalGeneration, NVILAProcessor]:
    """Load a folder that `save_model` wrote; a quantized folder comes back with its quantized layers.

    An adapter (`nvila.tuning.adapters`) comes back over its base, not merged.

    Args:
        directory: The folder.
        base: Of an adapter: where its base is now; None takes where it was when the adapter was trained.
        **options: Arguments of `from_pretrained`, such as `dtype`, `device_map` and `attn_implementation`; not for
            quantized folders.

    Raises:
        CheckpointError: The folder is not a complete model, holds files that could execute code, or weights that are
            NaN or infinite; or an adapter belongs to another base.
    """
    from safetensors import SafetensorError

    from nvila.quantization.saved import is_quantized, load_quantized
    from nvila.tuning.adapters import is_adapter, load_adapter

    check_model_files(directory)
    register_auto_classes()
    if is_adapter(directory):
        return load_adapter(directory, base, **options)
    try:
        model = load_quantized(directory) if is_quantized(directory) else _load_wide(directory, options)
        processor = NVILAProcessor.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise CheckpointError(f"cannot load a model from {directory}: {e}", "make the model artifact again") from e
    model.eval()
    return model, processor


def check_model_files(directory: Path) -> None:
    """Refuse folders that are no model or that hold pickled weights.

    Raises:
        CheckpointError: With the file that is missing or refused.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} is not a model folder: config.json is missing", "point at a saved model")
    refused = sorted(path.name for path in directory.iterdir() if path.suffix.lower() in REFUSED_SUFFIXES)
    if refused:
        raise CheckpointError(
            f"{directory} holds {refused[0]}, a format that can execute code on load",
            "convert the weights to safetensors",
        )
    if not list(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory} holds no safetensors weights", "save the model with save_pretrained")


def _load_wide(directory: Path, options: Mapping[str, Any]) -> NVILAForConditionalGeneration:
    """Load unquantized weights; what would be a warning of transformers (new random weights!) is an error here."""
    loaded: Any = NVILAForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, report = cast("tuple[NVILAForConditionalGeneration, dict[str, Any]]", loaded)
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    if wrong := sorted([*report["missing_keys"], *report["unexpected_keys"], *mismatched]):
        raise CheckpointError(
            f"the weights in {directory} do not fit its config.json: {wrong[0]} is missing, unknown or misshapen",
            "make the model artifact again",
        )
    check_weights(dict(model.named_parameters()), str(directory))
    return model
