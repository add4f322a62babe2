"""Configuration of an NVILA model: a vision tower, a compressing projector and a causal language model."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from nvila.errors import ConfigError
from nvila.vision.projectors import PROJECTORS, num_output_tokens, projector_spec


class NVILAConfig(PreTrainedConfig):
    """Configuration of `NVILAForConditionalGeneration` (arXiv 2412.04468).

    Args:
        vision_config: SigLIP-style tower configuration, as a dict with `model_type` or a config object.
        text_config: Configuration of any decoder that `AutoModel` builds.
        mm_projector_type: Name in `nvila.vision.projectors.PROJECTORS`.
        mm_vision_select_layer: Which hidden state of the tower feeds the projector; -2 leaves out the last block
            and the final norm, as every released NVILA does.
        image_token_id: Id of the placeholder that visual tokens replace.
        image_end_token_id: Id of the line feed whose embedding closes every image.

    Raises:
        ConfigError: The projector name is unknown or the selected layer does not exist.
    """

    model_type = "nvila"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        mm_projector_type: str = "mlp_downsample_2x2_fix",
        mm_vision_select_layer: int = -2,
        image_token_id: int = 151649,
        image_end_token_id: int = 198,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config, "siglip_vision_model")
        self.text_config = _sub_config(text_config, "qwen2")
        projector_spec(mm_projector_type)
        self.mm_projector_type = mm_projector_type
        self.mm_vision_select_layer = mm_vision_select_layer
        self.image_token_id = image_token_id
        self.image_end_token_id = image_end_token_id
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)
        if not 0 < self.num_vision_blocks <= self.vision_config.num_hidden_layers:
            raise ConfigError(
                f"mm_vision_select_layer {mm_vision_select_layer} does not exist in a tower of "
                f"{self.vision_config.num_hidden_layers} blocks",
                "use a negative index, -1 for the last block",
            )

    @property
    def num_vision_blocks(self) -> int:
        """How many blocks of the tower run before its features are taken."""
        layer: int = self.mm_vision_select_layer
        blocks: int = self.vision_config.num_hidden_layers
        return blocks + 1 + layer if layer < 0 else layer

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens of one tile after the projector, without the closing line feed."""
        grid = self.vision_config.image_size // self.vision_config.patch_size
        return num_output_tokens(self.mm_projector_type, grid)


def _sub_config(value: dict[str, Any] | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    raw = dict(value or {})
    return AutoConfig.for_model(raw.pop("model_type", default_type), **raw)


__all__ = ["PROJECTORS", "NVILAConfig"]
