"""Configuration of an NVILA model: a vision tower, a compressing projector and a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from nvila.errors import ConfigError, nearest
from nvila.time_tokens import TIME_TOKEN_FORMAT
from nvila.vision.projectors import PROJECTORS, num_output_tokens, projector_spec
from nvila.vision.temporal import checked_pool_sizes
from nvila.vision.tiling import TILINGS, TilingConfig


class NVILAConfig(PreTrainedConfig):
    """Configuration of `NVILAForConditionalGeneration` (arXiv 2412.04468).

    Fields have the names of the released checkpoints. Keys that are not listed here are kept as they are and written
    back on saving.

    Args:
        vision_config: SigLIP-style tower configuration, as a dict with `model_type` or a config object.
        text_config: Configuration of any decoder that `AutoModel` builds.
        mm_projector_type: Name in `nvila.vision.projectors.PROJECTORS`.
        mm_vision_select_layer: Which hidden state of the tower feeds the projector; -2 leaves out the last block
            and the final norm, as every released NVILA does.
        mm_vision_select_feature: `cls_patch` keeps every token of the tower. `patch` drops the first one, which a
            SigLIP tower does not have to spare, and is refused.
        image_token_id: Id of the placeholder that visual tokens of images replace.
        video_token_id: The same for videos.
        image_end_token_id: Id of the line feed whose embedding closes every image, tile or video frame.
        image_aspect_ratio: How an image becomes tiles, a name in `nvila.vision.tiling.TILINGS`.
        min_tiles: Fewest tiles that `dynamic` cuts.
        max_tiles: Most tiles that `dynamic` cuts, without its thumbnail, and that `dynamic_s2` cuts at its last scale.
        s2_scales: Sides in pixels of the scales of `dynamic_s2`, smallest first, as numbers or as a comma-separated
            string; the multiples 1, 2 and 3 of the tower's image size when nothing is given.
        s2_resize_output_to_scale_idx: Scale whose feature map sets the size of the merged one.
        num_video_frames: Frames taken of a video.
        fps: Frames a second to take instead, up to `num_video_frames`; 0 spreads the frames evenly.
        video_pool_sizes: Temporal, vertical and horizontal pooling of video tokens, one triple for every level of
            the pyramid (paper section 2.1, temporal compression).
        num_time_tokens: Tokens that stand for points in time; 0 turns temporal localisation off.
        time_token_format: How such a token is written.
        time_token_ids: Their ids.
        soft_ce_std: Width in tokens of the soft targets of time tokens.
        **kwargs: Fields of every configuration, and unknown keys.

    Raises:
        ConfigError: A name is unknown, a value is out of range, or the selected layer does not exist.
    """

    model_type = "nvila"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        mm_projector_type: str = "mlp_downsample_2x2_fix",
        mm_vision_select_layer: int = -2,
        mm_vision_select_feature: str = "cls_patch",
        image_token_id: int = 151649,
        video_token_id: int = 151650,
        image_end_token_id: int = 198,
        image_aspect_ratio: str = "resize",
        min_tiles: int = 1,
        max_tiles: int = 12,
        s2_scales: str | Sequence[int] | None = None,
        s2_resize_output_to_scale_idx: int = -1,
        num_video_frames: int = 8,
        fps: float = 0.0,
        video_pool_sizes: Sequence[Sequence[int]] = ((1, 1, 1),),
        num_time_tokens: int = 0,
        time_token_format: str = TIME_TOKEN_FORMAT,
        time_token_ids: Sequence[int] = (),
        soft_ce_std: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config, "siglip_vision_model")
        self.text_config = _sub_config(text_config, "qwen2")
        self.mm_projector_type = mm_projector_type
        self.mm_vision_select_layer = mm_vision_select_layer
        self.mm_vision_select_feature = mm_vision_select_feature
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.image_end_token_id = image_end_token_id
        self.image_aspect_ratio = image_aspect_ratio
        self.min_tiles, self.max_tiles = min_tiles, max_tiles
        self.s2_scales = _scales(s2_scales)
        self.s2_resize_output_to_scale_idx = s2_resize_output_to_scale_idx
        self.num_video_frames, self.fps = num_video_frames, fps
        self.video_pool_sizes = [list(size) for size in video_pool_sizes]
        self.num_time_tokens, self.time_token_format = num_time_tokens, time_token_format
        self.time_token_ids, self.soft_ce_std = list(time_token_ids), soft_ce_std
        if self.uses_s2 and not self.s2_scales:
            self.s2_scales = [self.tile_size * factor for factor in (1, 2, 3)]
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        self._check()

    @classmethod
    def from_preset(cls, name: str) -> NVILAConfig:
        """Build the configuration of a published variant, or of its tiny twin, without any download.

        Example:
            >>> NVILAConfig.from_preset("nvila-8b").num_image_tokens
            256

        Raises:
            ConfigError: The preset is unknown.
        """
        from nvila.presets import preset

        return cls(**preset(name))

    @property
    def num_vision_blocks(self) -> int:
        """How many blocks of the tower run before its features are taken."""
        layer: int = self.mm_vision_select_layer
        blocks: int = self.vision_config.num_hidden_layers
        return blocks + 1 + layer if layer < 0 else layer

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        size: int = self.vision_config.image_size
        return size

    @property
    def uses_s2(self) -> bool:
        """Whether features of several scales are merged (Dynamic-S2, paper section 2.1)."""
        return self.image_aspect_ratio == "dynamic_s2"

    @property
    def mm_channels(self) -> int:
        """Width of the features that enter the projector."""
        width: int = self.vision_config.hidden_size
        return width * (len(self.s2_scales) if self.uses_s2 else 1)

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one tile after the projector, without the closing line feed."""
        return num_output_tokens(self.mm_projector_type, self.tile_size // self.vision_config.patch_size)

    @property
    def tiling(self) -> TilingConfig:
        """How one image is cut into tiles."""
        scales = {"scales": tuple(self.s2_scales)} if self.uses_s2 else {}
        return TilingConfig(
            mode=self.image_aspect_ratio,
            tile_size=self.tile_size,
            min_tiles=self.min_tiles,
            max_tiles=self.max_tiles,
            **scales,
        )

    def _check(self) -> None:
        projector_spec(self.mm_projector_type)
        if not 0 < self.num_vision_blocks <= self.vision_config.num_hidden_layers:
            raise ConfigError(
                f"mm_vision_select_layer {self.mm_vision_select_layer} does not exist in a tower of "
                f"{self.vision_config.num_hidden_layers} blocks",
                "use a negative index, -1 for the last block",
            )
        if self.mm_vision_select_feature != "cls_patch":
            raise ConfigError(
                f"mm_vision_select_feature is '{self.mm_vision_select_feature}'; a SigLIP tower has no class token to "
                "drop",
                "use cls_patch",
            )
        if self.image_aspect_ratio not in TILINGS:
            raise ConfigError(
                f"unknown image_aspect_ratio '{self.image_aspect_ratio}'", nearest(self.image_aspect_ratio, TILINGS)
            )
        count, index = len(self.tiling.scales), self.s2_resize_output_to_scale_idx
        if self.uses_s2 and not -count <= index < count:
            raise ConfigError(f"s2_resize_output_to_scale_idx is {index}, but there are {count} scales", "-1 is usual")
        checked_pool_sizes(self.video_pool_sizes)


def _sub_config(value: dict[str, Any] | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    raw = dict(value or {})
    return AutoConfig.for_model(raw.pop("model_type", default_type), **raw)


def _scales(value: str | Sequence[int] | None) -> list[int]:
    parts = value.split(",") if isinstance(value, str) else (value or [])
    try:
        return [int(part) for part in parts if str(part).strip()]
    except ValueError:
        raise ConfigError(f"s2_scales is {value!r}", "write pixels separated by commas, such as 448,896,1344") from None


__all__ = ["PROJECTORS", "NVILAConfig"]
