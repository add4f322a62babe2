"""The three layouts of an NVILA checkpoint: which is which, and what a tensor is called in each.

`nvila` is the folder that `save_pretrained` of our model writes, `vila` the original with one folder for each part, and
`hf` the flat one with prefixed original names. Everything between reading and writing uses our names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvila.checkpoints.shards import INDEX_FILE, read_folder, read_json
from nvila.checkpoints.tensor_file import TensorEntry, read_header
from nvila.errors import CheckpointError

NVILA, VILA, HF = "nvila", "vila", "hf"
LAYOUTS = (NVILA, VILA, HF)
CONFIG_FILE = "config.json"
PART_FOLDERS = ("llm", "vision_tower", "mm_projector")
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
# Prefix in the layout, ours. Names are written with the first row that fits and read with any: SigLIP towers that
# transformers 5 saved have no inner prefix. The folder of a part counts as the start of its names.
_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    NVILA: (("", ""),),
    VILA: (
        ("llm/lm_head.", "lm_head."),
        ("llm/model.", "model.language_model."),
        ("vision_tower/vision_model.", "model.vision_tower."),
        ("mm_projector/", "model.mm_projector."),
        ("vision_tower/", "model.vision_tower."),
    ),
    HF: (
        ("llm.lm_head.", "lm_head."),
        ("llm.model.", "model.language_model."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("mm_projector.", "model.mm_projector."),
        ("vision_tower.", "model.vision_tower."),
    ),
}
# Buffers that older savers kept; the model computes them.
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint; no weights are in memory.

    Attributes:
        layout: One of `LAYOUTS`.
        root: Its folder.
        configs: Configuration files by path below the root.
        tensors: Tensors by our name.
        skipped: Names of tensors that are left out because the model computes them.
    """

    layout: str
    root: Path
    configs: dict[str, dict[str, Any]]
    tensors: dict[str, TensorEntry]
    skipped: list[str] = field(default_factory=list)


def detect_layout(path: Path) -> str:
    """Return the layout of a checkpoint folder.

    Raises:
        CheckpointError: It is no NVILA checkpoint.
    """
    root = _root(path)
    config = read_json(root / CONFIG_FILE)
    kind = config.get("model_type")
    if kind in ("llava_llama", "vila") or "llm_cfg" in config or (root / "llm").is_dir():
        return VILA
    if kind not in ("nvila", "nvila_lite"):
        raise CheckpointError(
            f"{root / CONFIG_FILE}: model_type {kind!r} is not an NVILA model", "point at an NVILA checkpoint"
        )
    # Both flat layouts call themselves nvila; their tensors do not look alike.
    return HF if any(name.startswith(("llm.", "mm_projector.")) for name in _some_names(root)) else NVILA


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint in any layout.

    Raises:
        CheckpointError: A file is missing, damaged, refused, or the model is quantized.
    """
    layout, root = detect_layout(path), _root(path)
    configs = {CONFIG_FILE: read_json(root / CONFIG_FILE)}
    folders = {"": root}
    if layout == VILA:
        folders = {f"{part}/": _part_folder(root, part) for part in PART_FOLDERS}
        configs |= {f"{prefix}{CONFIG_FILE}": read_json(folder / CONFIG_FILE) for prefix, folder in folders.items()}
    for name, config in configs.items():
        if "quantization_config" in config:
            raise CheckpointError(f"{root / name}: the model is quantized", "convert the model it was quantized from")
    found = {
        f"{prefix}{name}": entry for prefix, folder in folders.items() for name, entry in read_folder(folder).items()
    }
    skipped = [name for name in found if name.endswith(_COMPUTED)]
    tensors: dict[str, TensorEntry] = {}
    for name, entry in found.items():
        if name in skipped:
            continue
        ours = to_ours(layout, name)
        if ours in tensors:
            raise CheckpointError(f"{entry.path}: tensor '{name}' stands there under two names", "remove one of them")
        tensors[ours] = entry
    return Checkpoint(layout=layout, root=root, configs=configs, tensors=tensors, skipped=skipped)


def to_ours(layout: str, name: str) -> str:
    """Return our name of a tensor, or the name itself where no rule fits (validation then reports it as unknown).

    Example:
        >>> to_ours("hf", "llm.model.norm.weight")
        'model.language_model.norm.weight'
    """
    for theirs, ours in _PREFIXES[layout]:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def from_ours(layout: str, name: str) -> str:
    """Return the name of one of our tensors in a layout.

    Example:
        >>> from_ours("vila", "model.vision_tower.post_layernorm.bias")
        'vision_tower/vision_model.post_layernorm.bias'
    """
    for theirs, ours in _PREFIXES[layout]:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"{name} is not a name of ours")


def _root(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder", "name the folder of a checkpoint")
    inner = path / "model"
    return inner if not (path / CONFIG_FILE).is_file() and (inner / CONFIG_FILE).is_file() else path


def _part_folder(root: Path, part: str) -> Path:
    """Return the folder of a part. Paths inside the configuration are of the machine that trained: not followed."""
    folder = root / part
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing", f"a checkpoint of this layout has {', '.join(PART_FOLDERS)}")
    return folder


def _some_names(root: Path) -> list[str]:
    if (root / INDEX_FILE).is_file():
        return [str(name) for name in read_json(root / INDEX_FILE).get("weight_map") or {}]
    return [name for path in sorted(root.glob("*.safetensors"))[:1] for name in read_header(path)]


def describe_name(layout: str, ours: str) -> str:
    """Return how a tensor is called in a layout, for messages."""
    try:
        return from_ours(layout, ours)
    except AssertionError:
        return ours


__all__ = [
    "HF",
    "LAYOUTS",
    "NVILA",
    "VILA",
    "Checkpoint",
    "describe_name",
    "detect_layout",
    "from_ours",
    "open_checkpoint",
    "to_ours",
]
