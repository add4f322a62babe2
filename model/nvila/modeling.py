"""NVILA: vision tower -> space-to-channel projector -> tokens spliced into a causal language model.

Shape suffixes: B rows, L positions of a row, N visual tokens of a tile, T tiles of the batch, C tower width,
H language width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from nvila.configuration import NVILAConfig
from nvila.errors import DataError
from nvila.vision.projectors import MultimodalProjector

IGNORE_INDEX = -100


@dataclass
class NVILAOutput(ModelOutput):
    """What a forward pass returns.

    `logits` is absent when labels were given: the loss then looks at supervised positions only and the full
    (B, L, V) matrix is never made.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None


class NVILAPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading shared by the NVILA classes."""

    config_class = NVILAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012  # the base class declares it per instance
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _no_split_modules = ["SiglipEncoderLayer", "Qwen2DecoderLayer"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


class NVILAModel(NVILAPreTrainedModel):
    """Tower, projector and decoder without the language-model head."""

    def __init__(self, config: NVILAConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.mm_projector = MultimodalProjector(
            config.mm_projector_type, config.vision_config.hidden_size, config.text_config.hidden_size
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding of the language model."""
        return cast("nn.Module", self.language_model.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            pixel_values: Normalised tiles of shape (T, 3, height, width).

        Returns:
            Visual tokens of shape (T, N, H).
        """
        if not len(pixel_values):  # a training batch of text alone
            return pixel_values.new_empty(0, self.config.num_image_tokens, self.config.text_config.hidden_size)
        tower = self.vision_tower
        hidden_TNC = tower.embeddings(pixel_values.to(tower.dtype))
        # The blocks behind the selected layer never influence the result, so they are not run.
        for block in tower.encoder.layers[: self.config.num_vision_blocks]:
            hidden_TNC = block(hidden_TNC, None)
        features: Tensor = self.mm_projector(hidden_TNC)
        return features

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Cache | None]:
        """Run the decoder on text with images spliced in.

        Args:
            input_ids: (B, L) with one image placeholder for every visual token.
            pixel_values: (T, 3, h, w) tiles in the order of their placeholders.
            image_features: (T, N, H) visual tokens made earlier; instead of `pixel_values`.
            attention_mask: (B, L) padding mask, or a (B, 1, L, L) boolean mask of allowed pairs (packed rows).
            position_ids: (B, L).
            past_key_values: Cache of earlier positions.
            inputs_embeds: (B, L, H) instead of `input_ids`, for callers that splice themselves.
            **kwargs: Passed to the language model.

        Returns:
            Hidden states (B, L, H) and the cache.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None and image_features is None:
                image_features = self.get_image_features(pixel_values)
            if image_features is not None:
                inputs_embeds = self._splice(cast("Tensor", input_ids), inputs_embeds, image_features)
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = self._pair_mask(attention_mask, inputs_embeds.dtype)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return outputs.last_hidden_state, outputs.past_key_values

    def _splice(self, input_ids_BL: Tensor, embeds_BLH: Tensor, features_TNH: Tensor) -> Tensor:
        """Put visual tokens where the placeholders are, in order."""
        mask_BL = input_ids_BL == self.config.image_token_id
        expected, given = int(mask_BL.sum()), features_TNH.shape[0] * features_TNH.shape[1]
        # masked_scatter is silent when features are left over, so the counts are compared here.
        if expected != given:
            raise DataError(
                f"the text has {expected} image placeholders but the images give {given} visual tokens",
                "pass exactly the images that the text names",
            )
        features = features_TNH.reshape(-1, features_TNH.shape[-1]).to(embeds_BLH.dtype)
        return embeds_BLH.masked_scatter(mask_BL.unsqueeze(-1), features)

    def _pair_mask(self, allowed_B1LL: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn a boolean mask into what the attention implementation of the language model takes."""
        if self.language_model.config._attn_implementation != "eager":
            return allowed_B1LL
        bias = torch.zeros(allowed_B1LL.shape, dtype=dtype, device=allowed_B1LL.device)
        return bias.masked_fill_(~allowed_B1LL, torch.finfo(dtype).min)


class NVILAForConditionalGeneration(NVILAPreTrainedModel, GenerationMixin):
    """NVILA with a language-model head: train with `labels`, answer with `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NVILAConfig) -> None:
        super().__init__(config)
        self.model = NVILAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the language-model head."""
        head: nn.Module = self.lm_head
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language-model head."""
        self.lm_head = value

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode tiles (T, 3, h, w) into visual tokens (T, N, H)."""
        features: Tensor = self.model.get_image_features(pixel_values)
        return features

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> NVILAOutput:
        """Compute the loss (with `labels`) or the logits (without).

        Args:
            input_ids: See `NVILAModel.forward`, as for the other arguments not listed here.
            pixel_values: Tiles.
            image_features: Visual tokens made earlier.
            attention_mask: Padding or pair mask.
            position_ids: Positions.
            past_key_values: Cache.
            inputs_embeds: Embeddings instead of ids.
            labels: (B, L) target ids, -100 where nothing is supervised. The loss is the mean over all supervised
                positions of the batch.
            logits_to_keep: Compute logits for the last positions only; 0 means all.
            **kwargs: Passed to the language model.
        """
        hidden_BLH, cache = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_features=image_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if labels is not None:
            return NVILAOutput(loss=self.supervised_nll(hidden_BLH, labels)[0].mean(), past_key_values=cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        return NVILAOutput(
            logits=self.lm_head(hidden_BLH[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else keep]),
            past_key_values=cache,
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
        logits = self.lm_head(hidden_BLH[:, :-1][mask_BL[:, 1:]]).float()
        return nn.functional.cross_entropy(logits, labels_BL[mask_BL], reduction="none"), mask_BL

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pass images to the first step only; later steps find them in the cache."""
        pixel_values, image_features = kwargs.pop("pixel_values", None), kwargs.pop("image_features", None)
        first = kwargs.get("is_first_iteration", False)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]  # mixin
        if first or not kwargs.get("use_cache", True):
            inputs["pixel_values"], inputs["image_features"] = pixel_values, image_features
        return inputs


__all__ = ["IGNORE_INDEX", "NVILAConfig", "NVILAForConditionalGeneration", "NVILAModel", "NVILAOutput"]
