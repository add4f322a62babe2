"""Which tensors a configuration calls for, and whether a checkpoint has exactly those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nvila.checkpoints.layouts import EMBEDDING, HEAD, HF, Checkpoint, describe_name
from nvila.checkpoints.tensor_file import TensorEntry
from nvila.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig

Shape = tuple[int, ...]
_PROJECTOR = "model.mm_projector."
_AGAIN = "download or save the checkpoint again"


def build_config(fields: Mapping[str, Any], where: str) -> NVILAConfig:
    """Build our configuration from fields.

    Raises:
        CheckpointError: A value is impossible or a part of an unknown kind.
    """
    from huggingface_hub.errors import StrictDataclassError

    from nvila.configuration import NVILAConfig

    try:
        return NVILAConfig(**fields)
    except ConfigError as e:
        raise CheckpointError(f"{where}: {e.message}", e.hint) from e
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as e:
        reason = " ".join(str(e).split())
        raise CheckpointError(f"{where}: the configuration cannot be used: {reason}", "correct that value") from e


def expected_shapes(config: NVILAConfig) -> dict[str, Shape]:
    """Return name and shape of every tensor of a model; nothing is allocated."""
    import torch

    from nvila.modeling import NVILAForConditionalGeneration

    with torch.device("meta"):
        model = NVILAForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def complete_fields(fields: dict[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Fill in, in place, what a layout leaves to code or to shapes.

    Flat original checkpoints do not store projector and tiling, and older towers not whether they have a pooling head.

    Returns:
        Notices about decisions that the reader may want to know.
    """
    notices = []
    vision, tensors = fields["vision_config"], checkpoint.tensors
    has_head = any(name.startswith("model.vision_tower.head.") for name in tensors)
    vision.setdefault("vision_use_head", has_head)
    first = next((entry for name, entry in tensors.items() if name == EMBEDDING), None)
    if first is not None:
        fields["dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(first.dtype, "float32")
    if checkpoint.layout == HF and "mm_projector_type" not in fields:
        plain = build_config({**fields, "image_aspect_ratio": "resize"}, f"{checkpoint.root}/config.json")
        name, scales = _identify(plain, checkpoint)
        lite = checkpoint.configs["config.json"].get("model_type") == "nvila_lite"
        fields["mm_projector_type"] = name
        fields.setdefault("image_aspect_ratio", "dynamic_s2" if scales > 1 else "dynamic" if lite else "resize")
        if scales > 1:
            fields.setdefault("s2_scales", [plain.tile_size * factor for factor in range(1, scales + 1)])
        notices.append(f"projector and tiling are not stored: the shapes say {name}, {fields['image_aspect_ratio']}")
    return notices


def check_tensors(checkpoint: Checkpoint, config: NVILAConfig) -> None:
    """Compare a checkpoint with what its configuration calls for.

    Raises:
        CheckpointError: A tensor is missing, unknown, or of another shape; the message has its name in the layout.
    """
    expected = expected_shapes(config)
    if EMBEDDING not in expected:
        raise CheckpointError(
            f"{checkpoint.root}: the language model {config.text_config.model_type} has no embed_tokens",
            "other layouts know language models with the names of Qwen and Llama only; keep the checkpoint as it is",
        )
    tensors, layout, root = checkpoint.tensors, checkpoint.layout, checkpoint.root
    optional = {HEAD} if config.tie_word_embeddings else set()
    for name in sorted(expected.keys() - tensors.keys() - optional):
        shown = describe_name(layout, name)
        hint = "set tie_word_embeddings to true if the head is the embedding" if name == HEAD else _AGAIN
        raise CheckpointError(f"{root} lacks the tensor '{shown}' of shape {expected[name]}", hint)
    for name in sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(
            f"{tensors[name].path} holds the tensor '{describe_name(layout, name)}', which its configuration has no "
            "place for",
            "check layer counts and mm_projector_type in the configuration, or remove the tensor",
        )
    for name, entry in tensors.items():
        if entry.shape != expected[name]:
            raise CheckpointError(
                f"{entry.path}: tensor '{describe_name(layout, name)}' has the shape {entry.shape}, its configuration "
                f"says {expected[name]}",
                "correct the configuration, or download the file again",
            )
    if config.tie_word_embeddings and HEAD in tensors and not _same_bytes(tensors[HEAD], tensors[EMBEDDING]):
        raise CheckpointError(
            f"{tensors[HEAD].path}: the head is said to be the embedding but differs from it",
            "set tie_word_embeddings to false in the configuration of the language model",
        )


def _identify(config: NVILAConfig, checkpoint: Checkpoint) -> tuple[str, int]:
    """Return the projector and the number of scales that fit the projector's shapes."""
    import torch

    from nvila.vision.projectors import PROJECTORS, MultimodalProjector

    found = {name: entry.shape for name, entry in checkpoint.tensors.items() if name.startswith(_PROJECTOR)}
    width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    for scales in (3, 1, 2):
        for name in PROJECTORS:
            try:
                with torch.device("meta"):
                    layers = MultimodalProjector(name, width * scales, hidden)
            except ConfigError:
                continue  # a variant that cannot join these widths
            if found == {f"{_PROJECTOR}{key}": tuple(value.shape) for key, value in layers.state_dict().items()}:
                return name, scales
    raise CheckpointError(
        f"{checkpoint.root}: no projector has tensors of these shapes", "add mm_projector_type to config.json"
    )


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    return (one.dtype, one.nbytes) == (other.dtype, other.nbytes) and all(
        a == b for a, b in zip(one.chunks(), other.chunks(), strict=True)
    )
