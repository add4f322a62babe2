"""NVILA without its language-model head: tower, projector, and the decoder on text with media spliced in.

Shape suffixes: B rows, L positions of a row, N visual tokens of a tile, T tiles of the batch, F video frames of the
batch, M visual tokens of the batch, C tower width, H language width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from nvila.checkpoints.shards import INDEX_FILE, read_shards
from nvila.configuration import NVILAConfig
from nvila.errors import CapabilityError, DataError
from nvila.finite import check_finite
from nvila.splicing import splice
from nvila.vision.projectors import MultimodalProjector
from nvila.vision.scales import merge_scales, tiles_to_raster
from nvila.vision.temporal import pool_frames
from nvila.vision.tiling import Grid


class NVILAPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading shared by the NVILA classes."""

    config_class = NVILAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "video", "text"]  # noqa: RUF012  # the base class declares it per instance
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights, as the base class does, from safetensors only; a quantized folder with its quantized layers.

        Raises:
            CheckpointError: The index of shards names files outside its folder, or does not fit those in it.
            CapabilityError: A quantized folder was asked for with options that its layers do not have.
        """
        folder = Path(kwargs.get("subfolder") or "")
        if isinstance(pretrained_model_name_or_path, str | os.PathLike):
            folder = Path(pretrained_model_name_or_path) / folder
            if (folder / INDEX_FILE).is_file():
                read_shards(folder)
            if (quantized := _load_quantized(folder, cls, args, kwargs)) is not None:
                return quantized
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class NVILAModel(NVILAPreTrainedModel):
    """Tower, projector and decoder without the language-model head."""

    def __init__(self, config: NVILAConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.mm_projector = MultimodalProjector(
            config.mm_projector_type, config.mm_channels, config.text_config.hidden_size
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding of the language model."""
        return cast("nn.Module", self.language_model.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor, image_blocks: Tensor | None = None) -> Tensor:
        """Encode the tiles of images.

        Args:
            pixel_values: Normalised tiles of shape (T, 3, height, width).
            image_blocks: See `forward`.

        Returns:
            Visual tokens of shape (T, N, H); with Dynamic-S2 those of all images one after the other, (M, H).
        """
        images, _ = self.encode_media(pixel_values, image_blocks)
        assert images is not None
        return images if self.config.uses_s2 else images.view(len(pixel_values), -1, images.shape[-1])

    def get_video_features(self, pixel_values_videos: Tensor, video_frames: Tensor | None = None) -> Tensor:
        """Encode and pool the frames (F, 3, height, width) of videos into visual tokens (M, H)."""
        _, videos = self.encode_media(None, None, pixel_values_videos, video_frames)
        assert videos is not None
        return videos

    def tower_features(self, pixel_values: Tensor) -> Tensor:
        """Run the tower up to the selected layer; the blocks behind it never influence the result.

        What the projector reads, and what images are compared by: it does not depend on the language model.

        Args:
            pixel_values: Normalised tiles or frames of shape (T, 3, height, width), on any device and of any type.

        Returns:
            Features of every patch, (T, patches, C) with C the width of the tower, on its device and of its type.
        """
        tower = self.vision_tower
        hidden_TNC = tower.embeddings(pixel_values.to(tower.device, tower.dtype))
        for block in tower.encoder.layers[: self.config.num_vision_blocks]:
            hidden_TNC = block(hidden_TNC, None)
        return cast("Tensor", hidden_TNC)

    def encode_media(
        self,
        pixel_values: Tensor | None,
        image_blocks: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Encode images and videos with one pass of the tower.

        Args:
            pixel_values: See `forward`, as for all arguments.
            image_blocks: Grids.
            pixel_values_videos: Frames.
            video_frames: Frames of each video.

        Returns:
            Visual tokens (M, H) of all images and of all videos; None for what was not given.

        Raises:
            DataError: The tiles are not those that `image_blocks` describe, or the frames not those of `video_frames`,
                or some hold NaN or infinity.
        """
        _check_finite(pixel_values=pixel_values, pixel_values_videos=pixel_values_videos)
        given = [pixels for pixels in (pixel_values, pixel_values_videos) if pixels is not None and len(pixels)]
        if not given:  # a training batch of text alone
            none = torch.empty(0, self.config.text_config.hidden_size, device=self.device, dtype=self.dtype)
            return (None if pixel_values is None else none), (None if pixel_values_videos is None else none)
        num_frames = 0 if pixel_values_videos is None else len(pixel_values_videos)
        blocks = [*self._blocks(pixel_values, image_blocks), *([None] * num_frames)]
        tokens_MH = self.project(self.tower_features(torch.cat(given) if len(given) > 1 else given[0]), blocks)
        num_video_tokens = num_frames * cast("NVILAConfig", self.config).num_image_tokens
        images_MH, frames_MH = tokens_MH.split([len(tokens_MH) - num_video_tokens, num_video_tokens])
        return (
            None if pixel_values is None else images_MH,
            None if pixel_values_videos is None else self.pool_videos(frames_MH, num_frames, video_frames),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_blocks: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | None = None,
        image_features: Tensor | None = None,
        video_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder on text with images and videos spliced in.

        Args:
            input_ids: (B, L) with one placeholder for every visual token.
            pixel_values: (T, 3, h, w) tiles of all images in the order of their placeholders.
            image_blocks: (images, 2) columns and rows of the last scale of each image, for Dynamic-S2; (0, 0) is an
                image of a single tile, and so is every image when it is left out.
            pixel_values_videos: (F, 3, h, w) frames of all videos in order.
            video_frames: (videos,) frames of each video; one video when left out.
            image_features: Visual tokens (..., H) made earlier; instead of `pixel_values`.
            video_features: The same for videos.
            attention_mask: (B, L) padding mask, or a (B, 1, L, L) boolean mask of allowed pairs (packed rows).
            position_ids: (B, L).
            past_key_values: Cache of earlier positions.
            inputs_embeds: (B, L, H) instead of `input_ids`, for callers that splice themselves.
            **kwargs: Passed to the language model.

        Returns:
            Hidden states (B, L, H), the cache, and what else the language model was asked for.

        Raises:
            DataError: Placeholders and media do not fit together, or media hold NaN or infinity.
        """
        if inputs_embeds is None:
            input_ids = cast("Tensor", input_ids)
            inputs_embeds = cast("Tensor", self.get_input_embeddings()(input_ids))
            images, videos = self.encode_media(
                pixel_values if image_features is None else None,
                image_blocks,
                pixel_values_videos if video_features is None else None,
                video_frames,
            )
            _check_finite(image_features=image_features, video_features=video_features)
            images = image_features if image_features is not None else images
            videos = video_features if video_features is not None else videos
            if images is not None or videos is not None or _is_prompt(input_ids, past_key_values):
                inputs_embeds = splice(inputs_embeds, input_ids, self.config.image_token_id, images, "image")
                inputs_embeds = splice(inputs_embeds, input_ids, self.config.video_token_id, videos, "video")
            if self.training and not _any_rows(images, videos):
                inputs_embeds = self._kept_in_step(inputs_embeds)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
            attention_mask = self._pair_mask(attention_mask, inputs_embeds.dtype)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return cast("BaseModelOutputWithPast", outputs)

    def _kept_in_step(self, embeds_BLH: Tensor) -> Tensor:
        """Run tower and projector for nothing where other processes may run them for their media.

        Processes that train together reduce the gradients of all trained parts, and under ZeRO 3 fetch the weights of
        all parts, trained or not: one that leaves a part out leaves the others waiting.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return embeds_BLH
        parameters = [*self.vision_tower.parameters(), *self.mm_projector.parameters()]
        takes_part = any(parameter.requires_grad or hasattr(parameter, "ds_id") for parameter in parameters)
        if torch.distributed.get_world_size() == 1 or not takes_part:
            return embeds_BLH
        size = self.config.tile_size
        blank = torch.zeros(1, 3, size, size, device=embeds_BLH.device)
        return embeds_BLH + 0 * self.project(self.tower_features(blank), [None]).sum().to(embeds_BLH.dtype)

    def project(self, features_TNC: Tensor, blocks: list[Grid | None]) -> Tensor:
        """Merge scales where the model has several, and project.

        Args:
            features_TNC: What `tower_features` made of the tiles of some images.
            blocks: Grid of the last scale of each image; None for one of a single tile.

        Returns:
            Visual tokens (M, H) of each image in raster order.
        """
        config = cast("NVILAConfig", self.config)
        if not config.uses_s2:
            return cast("Tensor", self.mm_projector(features_TNC)).flatten(0, 1)
        merged, grids = merge_scales(
            features_TNC, blocks, config.s2_scales, config.tile_size, config.s2_resize_output_to_scale_idx
        )
        return tiles_to_raster(self.mm_projector(merged), grids)

    def _blocks(self, pixel_values: Tensor | None, image_blocks: Tensor | None) -> list[Grid | None]:
        if pixel_values is None:
            return []
        if image_blocks is None:
            return [None] * len(pixel_values)
        return [Grid(columns, rows) if columns else None for columns, rows in image_blocks.tolist()]

    def pool_videos(self, frames_MH: Tensor, num_frames: int, video_frames: Tensor | None = None) -> Tensor:
        """Pool the tokens of every video over time and space, one level of the pyramid after the other.

        Args:
            frames_MH: Projected tokens of all frames.
            num_frames: How many frames they are.
            video_frames: Frames of each video; None for one video.

        Raises:
            DataError: The frames are not those of `video_frames`.
        """
        counts = [num_frames] if video_frames is None else video_frames.tolist()
        if sum(counts) != num_frames:
            raise DataError(
                f"video_frames counts {sum(counts)} frames but pixel_values_videos has {num_frames}",
                "pass the frames of all videos, one video after the other",
            )
        frames_FNH = frames_MH.view(num_frames, -1, frames_MH.shape[-1])
        levels = [
            level.flatten(0, 1)
            for video in frames_FNH.split(counts)
            for level in pool_frames(video, self.config.video_pool_sizes)
        ]
        return torch.cat(levels)

    def _pair_mask(self, allowed_B1LL: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn a boolean mask into what the attention implementation of the language model takes."""
        implementation = str(self.language_model.config._attn_implementation)
        if "flash" in implementation:
            raise CapabilityError(
                f"{implementation} takes no mask of pairs", "pass position_ids that restart at every sample instead"
            )
        if implementation != "eager":
            return allowed_B1LL
        bias = torch.zeros(allowed_B1LL.shape, dtype=dtype, device=allowed_B1LL.device)
        return bias.masked_fill_(~allowed_B1LL, torch.finfo(dtype).min)


# What `from_pretrained` may be given for a quantized folder: the rest would change or ignore its layers.
_QUANTIZED_OPTIONS = {
    "adapter_kwargs",  # the Auto classes always pass it where peft is installed
    "attn_implementation",
    "config",
    "device_map",
    "dtype",
    "local_files_only",
    "output_loading_info",
    "subfolder",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
}


def _load_quantized(folder: Path, cls: type, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Load a folder that `nvila.quantization` wrote; None if it is none."""
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.quantization.saved import is_quantized, load_quantized

    if not (folder / "config.json").is_file() or not is_quantized(folder):
        return None
    unknown = sorted(
        name for name, value in options.items() if name not in _QUANTIZED_OPTIONS and not name.startswith("_") and value
    )
    if unknown or args or not issubclass(cls, NVILAForConditionalGeneration):
        what = f"{unknown[0]} cannot be used" if unknown else f"{cls.__name__} cannot be loaded alone"
        raise CapabilityError(f"{folder} is quantized, so {what}", "load it as NVILAForConditionalGeneration")
    model = load_quantized(folder).eval()
    dtype = options.get("dtype", options.get("torch_dtype"))
    if dtype not in (None, "auto", model.dtype, str(model.dtype).removeprefix("torch.")):
        raise CapabilityError(
            f"{folder} was quantized in {model.dtype}, not {dtype}", "leave dtype out, or quantize a model of that type"
        )
    if (implementation := options.get("attn_implementation")) is not None:
        model.set_attn_implementation(implementation)
    place = options.get("device_map")
    if isinstance(place, dict):
        place = place.get("") if len(place) == 1 else "several devices"
    if place == "auto":
        place = "cuda" if torch.cuda.is_available() else "cpu"
    if place is not None:
        try:
            model.to(torch.device(place))
        except RuntimeError as e:
            raise CapabilityError(f"device_map={place!r} is no device for a quantized model", "name one device") from e
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model, info) if options.get("output_loading_info") else model


def _check_finite(**media: Tensor | None) -> None:
    for name, values in media.items():
        if values is not None:
            check_finite(values, name)


def _any_rows(*features: Tensor | None) -> bool:
    return any(one is not None and len(one) > 0 for one in features)


def _is_prompt(input_ids_BL: Tensor, cache: Cache | None) -> bool:
    """Whether these positions are the beginning of a text rather than an answer being written.

    An answer may hold anything, also the id of a placeholder; a prompt must not name media that were not given.
    """
    return input_ids_BL.shape[1] > 1 and (cache is None or not cache.get_seq_length())
