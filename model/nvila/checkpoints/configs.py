"""Configuration of a checkpoint, from any layout to the fields of `NVILAConfig` and back.

Whatever we do not understand is carried along: the configuration files of other layouts travel inside ours under
`SOURCE_KEY`, so that converting back starts from what was there and changes only fields that differ since.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

from nvila.checkpoints.encoders import check_image_encoder, pool_sizes_of, video_encoder
from nvila.checkpoints.layouts import CONFIG_FILE, HF, NVILA, PART_FOLDERS, VILA
from nvila.errors import CheckpointError

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig

Files = dict[str, dict[str, Any]]
Fields = dict[str, Any]

SOURCE_KEY = "nvila_source"
LLM_CONFIG, TOWER_CONFIG, PROJECTOR_CONFIG = (f"{part}/{CONFIG_FILE}" for part in PART_FOLDERS)
# Fields with the same name and form in every layout.
_SHARED = (
    "image_aspect_ratio",
    "max_tiles",
    "min_tiles",
    "mm_vision_select_feature",
    "mm_vision_select_layer",
    "num_time_tokens",
    "num_video_frames",
    "fps",
    "s2_resize_output_to_scale_idx",
    "soft_ce_std",
    "time_token_format",
    "time_token_ids",
)
_OURS = (
    *_SHARED,
    "dtype",
    "image_end_token_id",
    "image_token_id",
    "mm_projector_type",
    "s2_scales",
    "text_config",
    "tie_word_embeddings",
    "video_pool_sizes",
    "video_token_id",
    "vision_config",
)
_HOUSEKEEPING = ("architectures", "auto_map", "model_type", "torch_dtype", "transformers_version", SOURCE_KEY)
# Keys of the original top-level file whose meaning is known; all others are passed on at top level.
_VILA_KEYS = (
    *("chat_template", "drop_path_rate", "dynamic_s2", "hidden_size", "image_encoder", "interpolate_mode", "llm_cfg"),
    *("mm_hidden_size", "mm_projector_cfg", "mm_projector_lr", "mm_use_im_patch_token", "mm_use_im_start_end"),
    *("model_dtype", "resume_path", "s2", "s2_max_split_size", "tune_language_model", "tune_mm_projector"),
    *("tune_vision_tower", "version", "video_encoder", "video_max_tiles", "vision_resolution", "vision_tower_cfg"),
    "vision_tower_lr",
)


def read_fields(layout: str, files: Files, where: str) -> Fields:
    """Return what configuration files say, as fields of `NVILAConfig`; absent ones have that class's defaults.

    Args:
        layout: Layout of the files.
        files: Configuration files by path below the root.
        where: Folder, for messages.

    Raises:
        CheckpointError: A part is missing or asks for something that NVILA models do not have.
    """
    top = files[CONFIG_FILE]
    if layout == VILA:
        return _read_vila(files, where)
    fields = {key: copy.deepcopy(top[key]) for key in _OURS if top.get(key) is not None}
    for part in ("text_config", "vision_config"):
        if not isinstance(fields.get(part), dict):
            raise CheckpointError(f"{where}/{CONFIG_FILE} has no {part}", "download or save the checkpoint again")
        fields[part] = _plain(fields[part])
    fields.setdefault("tie_word_embeddings", bool(fields["text_config"].get("tie_word_embeddings", False)))
    return fields


def unknown_fields(layout: str, files: Files) -> Fields:
    """Return the top-level keys that no layout of ours gives a meaning."""
    known = {*_OURS, *_HOUSEKEEPING, *(_VILA_KEYS if layout == VILA else ())}
    return {key: value for key, value in files[CONFIG_FILE].items() if key not in known}


def origin_of(layout: str, files: Files) -> str:
    """Return the layout that a checkpoint had before it was ever converted."""
    carried = files[CONFIG_FILE].get(SOURCE_KEY)
    return str(carried.get("origin", layout)) if isinstance(carried, dict) else layout


def sources_of(layout: str, files: Files) -> dict[str, Files]:
    """Return the configuration files that travelled inside a checkpoint, and its own, by layout."""
    carried = files[CONFIG_FILE].get(SOURCE_KEY)
    found = copy.deepcopy(carried.get("configs", {})) if isinstance(carried, dict) else {}
    own = {name: _plain(config) for name, config in files.items()}
    own[CONFIG_FILE].pop(SOURCE_KEY, None)
    return {**found, layout: own}


def complete(fields: Fields, config: NVILAConfig) -> Fields:
    """Return fields with the defaults of those that a layout may leave out."""
    full = config.to_dict()
    return {key: full[key] for key in (*_SHARED, "s2_scales", "video_pool_sizes")} | fields


def write_fields(layout: str, files: Files, fields: Fields) -> None:
    """Set fields in the configuration files of a layout, in place."""
    if layout == VILA:
        _write_vila(files, fields)
        return
    files[CONFIG_FILE].update(copy.deepcopy(fields))


def blank_files(layout: str, config: NVILAConfig) -> Files:
    """Return configuration files of a layout that name its classes and hold no fields yet."""
    if layout == NVILA:
        return {CONFIG_FILE: {"architectures": ["NVILAForConditionalGeneration"], "model_type": "nvila"}}
    if layout == HF:
        lite = "3x3" in config.mm_projector_type and config.image_aspect_ratio == "dynamic"
        name = "NVILALite" if lite else "NVILA"
        kind = "nvila_lite" if lite else "nvila"
        return {CONFIG_FILE: {"architectures": [f"{name}ForConditionalGeneration"], "model_type": kind}}
    return {
        CONFIG_FILE: {
            "architectures": ["LlavaLlamaModel"],
            "model_type": "llava_llama",
            "version": "auto",
            "hidden_size": config.text_config.hidden_size,
            "mm_hidden_size": config.mm_channels,
        },
        LLM_CONFIG: {},
        TOWER_CONFIG: {"architectures": ["SiglipVisionModel"]},
        PROJECTOR_CONFIG: {"architectures": ["MultimodalProjector"], "model_type": "v2l_projector"},
    }


def _read_vila(files: Files, where: str) -> Fields:
    top, llm, tower = files[CONFIG_FILE], files[LLM_CONFIG], files[TOWER_CONFIG]
    path = f"{where}/{CONFIG_FILE}"
    if top.get("s2") and not top.get("dynamic_s2"):
        raise CheckpointError(f"{path}: s2 without dynamic_s2 is a tower of models before NVILA", "use an NVILA model")
    check_image_encoder(top.get("image_encoder"), path)
    fields = {key: copy.deepcopy(top[key]) for key in _SHARED if top.get(key) is not None}
    # A tower with several scales has them for every image, whatever the tiling says (a video model).
    if top.get("dynamic_s2"):
        fields["image_aspect_ratio"] = "dynamic_s2"
        fields["s2_scales"] = _numbers(top.get("s2_scales", "448,896,1344"), path)
    projector = files[PROJECTOR_CONFIG].get("mm_projector_type")
    if not isinstance(projector, str):
        raise CheckpointError(f"{where}/{PROJECTOR_CONFIG} has no mm_projector_type", "add the name of the projector")
    fields |= {
        "mm_projector_type": projector,
        "video_pool_sizes": pool_sizes_of(top.get("video_encoder"), path),
        "text_config": _plain(llm),
        "vision_config": _plain(tower),
        "tie_word_embeddings": bool(llm.get("tie_word_embeddings", False)),
    }
    return fields


def _write_vila(files: Files, fields: Fields) -> None:
    top, llm = files[CONFIG_FILE], files[LLM_CONFIG]
    top.update({key: fields[key] for key in _SHARED if key in fields})
    if "image_aspect_ratio" in fields:
        top["dynamic_s2"] = fields["image_aspect_ratio"] == "dynamic_s2"
    if fields.get("s2_scales"):
        top["s2_scales"] = ",".join(str(scale) for scale in fields["s2_scales"])
        top["s2_max_split_size"] = fields["s2_scales"][0]
    if "video_pool_sizes" in fields:
        top["video_encoder"] = video_encoder(fields["video_pool_sizes"])
    if "mm_projector_type" in fields:
        files[PROJECTOR_CONFIG]["mm_projector_type"] = fields["mm_projector_type"]
    if "dtype" in fields:
        top["model_dtype"] = f"torch.{fields['dtype']}"
        for name in (LLM_CONFIG, TOWER_CONFIG, PROJECTOR_CONFIG):
            files[name]["torch_dtype"] = fields["dtype"]
    llm.update(_for_older_readers(fields.get("text_config", {})))
    files[TOWER_CONFIG].update(_for_older_readers(fields.get("vision_config", {})))
    if "tie_word_embeddings" in fields:
        llm["tie_word_embeddings"] = fields["tie_word_embeddings"]
    for part in PART_FOLDERS:
        top.setdefault(f"{part}_cfg", copy.deepcopy(files[f"{part}/{CONFIG_FILE}"]))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Copy the configuration of a part without what would make a reader run code that lies in the checkpoint."""
    return {key: copy.deepcopy(value) for key, value in config.items() if key not in ("auto_map", "custom_pipelines")}


def _for_older_readers(config: dict[str, Any]) -> dict[str, Any]:
    """Repeat under their former names what transformers renamed since the original layout was made."""
    older = {key: copy.deepcopy(value) for key, value in config.items() if key not in ("dtype", "_name_or_path")}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
    return older


def _numbers(scales: object, path: str) -> list[int]:
    parts = scales.split(",") if isinstance(scales, str) else scales
    try:
        return [int(part) for part in cast("list[Any]", parts)]  # anything but a list is the TypeError
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: s2_scales is {scales!r}", "write pixels such as 448,896,1344") from None
