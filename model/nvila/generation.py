"""How `generate` treats media: encoded once, given to the first step, repeated row by row for beams and samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from nvila.splicing import repeat_rows

# Later steps find the media in the cache.
MEDIA_INPUTS = (
    "pixel_values",
    "image_blocks",
    "image_features",
    "pixel_values_videos",
    "video_frames",
    "video_features",
)


class MediaGenerationMixin(GenerationMixin):
    """Generation for a model whose `model` part has `encode_media`."""

    model: Any
    config: Any

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pass media to the first step only, or to all of them when there is no cache."""
        media = {name: kwargs.pop(name, None) for name in MEDIA_INPUTS}
        wanted = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]  # mixin
        return inputs | media if wanted else inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Repeat every row `expand_size` times; a tile is no row, so the media are encoded and repeated by rows."""
        repeated: dict[str, Tensor] = {}
        if expand_size > 1 and input_ids is not None:
            media = {name: kwargs.pop(name, None) for name in MEDIA_INPUTS}
            repeated = self._repeat_media(input_ids, expand_size, **media)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]  # mixin
        ids, expanded = expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, expanded | repeated

    def _repeat_media(
        self, input_ids: Tensor, times: int, *, image_features: Any, video_features: Any, **pixels: Any
    ) -> dict[str, Tensor]:
        images, videos = self.model.encode_media(**pixels)
        features = {
            "image_features": (image_features if image_features is not None else images, self.config.image_token_id),
            "video_features": (video_features if video_features is not None else videos, self.config.video_token_id),
        }
        return {
            name: repeat_rows(tokens, input_ids, token_id, times)
            for name, (tokens, token_id) in features.items()
            if tokens is not None
        }
