"""NVILA: vision tower -> space-to-channel projector -> tokens spliced into a causal language model.

Shape suffixes: B rows, L positions of a row, N visual tokens of a tile, T tiles of the batch, F video frames of the
batch, M visual tokens of the batch, C tower width, H language width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from nvila.configuration import NVILAConfig
from nvila.errors import CapabilityError, DataError
from nvila.generation import MediaGenerationMixin
from nvila.language_head import build_head
from nvila.losses import IGNORE_INDEX, SoftTargets, head_cross_entropy, token_nll
from nvila.splicing import splice
from nvila.vision.projectors import MultimodalProjector
from nvila.vision.scales import merge_scales, tiles_to_raster
from nvila.vision.temporal import pool_frames
from nvila.vision.tiling import Grid

# Logits below this many elements are made at once: one product beats several, and 64 MiB is little.
_WHOLE_LOGITS = 2**24


@dataclass
class NVILAOutput(ModelOutput):
    """What a forward pass returns.

    `logits` is absent when labels were given: the loss then looks at supervised positions only and the full
    (B, L, V) matrix is never made.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


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
            DataError: The tiles are not those that `image_blocks` describe, or the frames not those of `video_frames`.
        """
        given = [pixels for pixels in (pixel_values, pixel_values_videos) if pixels is not None and len(pixels)]
        if not given:  # a training batch of text alone
            none = torch.empty(0, self.config.text_config.hidden_size, device=self.device, dtype=self.dtype)
            return (None if pixel_values is None else none), (None if pixel_values_videos is None else none)
        num_frames = 0 if pixel_values_videos is None else len(pixel_values_videos)
        blocks = [*self._blocks(pixel_values, image_blocks), *([None] * num_frames)]
        tokens_MH = self._project(self._tower_features(torch.cat(given) if len(given) > 1 else given[0]), blocks)
        num_video_tokens = num_frames * cast("NVILAConfig", self.config).num_image_tokens
        images_MH, frames_MH = tokens_MH.split([len(tokens_MH) - num_video_tokens, num_video_tokens])
        return (
            None if pixel_values is None else images_MH,
            None if pixel_values_videos is None else self._pool(frames_MH, num_frames, video_frames),
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
            DataError: Placeholders and media do not fit together.
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
            images = image_features if image_features is not None else images
            videos = video_features if video_features is not None else videos
            if images is not None or videos is not None or _is_prompt(input_ids, past_key_values):
                inputs_embeds = splice(inputs_embeds, input_ids, self.config.image_token_id, images, "image")
                inputs_embeds = splice(inputs_embeds, input_ids, self.config.video_token_id, videos, "video")
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

    def _tower_features(self, pixels_TCHW: Tensor) -> Tensor:
        """Run the tower up to the selected layer; the blocks behind it never influence the result."""
        tower = self.vision_tower
        hidden_TNC = tower.embeddings(pixels_TCHW.to(tower.device, tower.dtype))
        for block in tower.encoder.layers[: self.config.num_vision_blocks]:
            hidden_TNC = block(hidden_TNC, None)
        return cast("Tensor", hidden_TNC)

    def _project(self, features_TNC: Tensor, blocks: list[Grid | None]) -> Tensor:
        """Merge scales where the model has several, and project; tokens (M, H) of each image in raster order."""
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

    def _pool(self, frames_MH: Tensor, num_frames: int, video_frames: Tensor | None) -> Tensor:
        """Pool the tokens of every video over time and space, one level of the pyramid after the other."""
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


class NVILAForConditionalGeneration(NVILAPreTrainedModel, MediaGenerationMixin):
    """NVILA with a language-model head: train with `labels`, answer with `generate`."""

    def __init__(self, config: NVILAConfig) -> None:
        super().__init__(config)
        self.model = NVILAModel(config)
        self.lm_head = build_head(config.text_config)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{self._embedding_name()}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the language-model head."""
        head: nn.Module = self.lm_head
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language-model head."""
        self.lm_head = value

    def get_image_features(self, pixel_values: Tensor, image_blocks: Tensor | None = None) -> Tensor:
        """Encode tiles (T, 3, h, w) into visual tokens (T, N, H), or (M, H) with Dynamic-S2."""
        features: Tensor = self.model.get_image_features(pixel_values, image_blocks)
        return features

    def get_video_features(self, pixel_values_videos: Tensor, video_frames: Tensor | None = None) -> Tensor:
        """Encode frames (F, 3, h, w) into pooled visual tokens (M, H)."""
        features: Tensor = self.model.get_video_features(pixel_values_videos, video_frames)
        return features

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
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> NVILAOutput:
        """Compute the loss (with `labels`) or the logits (without).

        Args:
            input_ids: See `NVILAModel.forward`, as for the other arguments not listed here.
            pixel_values: Tiles.
            image_blocks: Grids of Dynamic-S2.
            pixel_values_videos: Frames.
            video_frames: Frames of each video.
            image_features: Visual tokens of images made earlier.
            video_features: Visual tokens of videos made earlier.
            attention_mask: Padding or pair mask.
            position_ids: Positions.
            past_key_values: Cache.
            inputs_embeds: Embeddings instead of ids.
            labels: (B, L) target ids, -100 where nothing is supervised. The loss is the mean over all supervised
                positions of the batch; in training, time tokens have soft targets (`nvila.time_tokens`).
            logits_to_keep: Compute logits for the last positions only; 0 means all.
            num_items_in_batch: Divide the summed loss by this instead, as gradient accumulation over several batches
                does.
            **kwargs: Passed to the language model.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_blocks=image_blocks,
            pixel_values_videos=pixel_values_videos,
            video_frames=video_frames,
            image_features=image_features,
            video_features=video_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        loss = logits = None
        if labels is not None:
            loss = self._loss(outputs.last_hidden_state, labels, num_items_in_batch)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            chosen = logits_to_keep if isinstance(logits_to_keep, Tensor) else keep
            logits = self.lm_head(outputs.last_hidden_state[:, chosen])
        return NVILAOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def supervised_nll(self, hidden_BLH: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every supervised token.

        Args:
            hidden_BLH: Hidden states; position i predicts the label at i + 1.
            labels_BL: Target ids or -100.

        Returns:
            The likelihoods in fp32, one for each supervised label in row-major order, and the (B, L) mask of the
            labels they belong to.
        """
        mask_BL = labels_BL != IGNORE_INDEX
        mask_BL[:, 0] = False
        hidden_MH, targets_M = hidden_BLH[:, :-1][mask_BL[:, 1:]], labels_BL[mask_BL]
        if len(targets_M) * self.lm_head.out_features <= _WHOLE_LOGITS:
            return token_nll(self.lm_head(hidden_MH), targets_M), mask_BL
        return head_cross_entropy(self.lm_head, hidden_MH, targets_M, reduction="none"), mask_BL

    def _loss(self, hidden_BLH: Tensor, labels_BL: Tensor, num_items: int | Tensor | None) -> Tensor:
        """Sum the loss of every supervised token and divide it by their number."""
        targets_BL = labels_BL[:, 1:]
        mask_BL = targets_BL != IGNORE_INDEX
        hidden_MH, targets_M = hidden_BLH[:, :-1][mask_BL], targets_BL[mask_BL]
        soft = self._soft_targets() if self.training and self.config.time_token_ids else None
        if len(targets_M) * self.lm_head.out_features <= _WHOLE_LOGITS:
            total = token_nll(self.lm_head(hidden_MH), targets_M, soft).sum()
        else:
            total = head_cross_entropy(self.lm_head, hidden_MH, targets_M, reduction="sum", soft=soft)
        return total / (max(1, len(targets_M)) if num_items is None else num_items)

    def _soft_targets(self) -> SoftTargets:
        """Spread the target of a time token over its neighbours; the weights of the tokens sum to 1."""
        ids_K = torch.tensor(self.config.time_token_ids, device=self.lm_head.weight.device)
        distances_KK = (ids_K - ids_K.unsqueeze(1)).float()
        return SoftTargets(ids_K, (-(distances_KK**2) / (2 * self.config.soft_ce_std**2)).softmax(1))

    def _embedding_name(self) -> str:
        """Where the decoder keeps its token embedding; families name it differently."""
        decoder = self.model.language_model
        embedding = decoder.get_input_embeddings()
        return next(name for name, module in decoder.named_modules() if module is embedding)


def _is_prompt(input_ids_BL: Tensor, cache: Cache | None) -> bool:
    """Whether these positions are the beginning of a text rather than an answer being written.

    An answer may hold anything, also the id of a placeholder; a prompt must not name media that were not given.
    """
    return input_ids_BL.shape[1] > 1 and (cache is None or not cache.get_seq_length())


__all__ = ["IGNORE_INDEX", "NVILAConfig", "NVILAForConditionalGeneration", "NVILAModel", "NVILAOutput"]
