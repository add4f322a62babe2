"""NVILA: vision tower -> space-to-channel projector -> tokens spliced into a causal language model.

Shape suffixes: B rows, L positions of a row, T tiles of the batch, F video frames of the batch, N visual tokens of a
tile, M visual or supervised tokens of the batch, H language width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from nvila.backbone import NVILAModel, NVILAPreTrainedModel
from nvila.configuration import NVILAConfig
from nvila.generation import MediaGenerationMixin
from nvila.language_head import build_head
from nvila.losses import (
    IGNORE_INDEX,
    WHOLE_LOGITS,
    calls_must_agree,
    head_cross_entropy,
    supervised_nll,
    token_nll,
)
from nvila.time_tokens import soft_targets


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


class NVILAForConditionalGeneration(NVILAPreTrainedModel, MediaGenerationMixin):
    """NVILA with a language-model head: train with `labels`, answer with `generate`."""

    def __init__(self, config: NVILAConfig) -> None:
        super().__init__(config)
        self.model = NVILAModel(config)
        self.lm_head = build_head(config.text_config)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{self._embedding_name()}.weight"}
        self.post_init()

    @classmethod
    def from_parts(cls, *, vision: Any, language: Any, variant: str = "nvila-lite", **options: Any) -> Any:
        """Assemble a new model, and its processor, from a SigLIP tower and any causal language model.

        The modules of given models are taken over, not copied. The embeddings get exactly one row for every token,
        new ones with the mean of the old; the projector is new.

        Args:
            vision: Tower: a configuration (object or dict), a model, or a local folder.
            language: The same of any decoder that `AutoModelForCausalLM` builds.
            variant: Name in `nvila.parts.VARIANTS`.
            **options: `tokenizer` (the one in the folder of `language` by default; it is changed), `dtype`, and fields
                of `NVILAConfig` that replace those of the variant.

        Returns:
            The model and the `NVILAProcessor`.

        Raises:
            ConfigError: The variant is unknown, or there is no tokenizer.
            CapabilityError: A part is of a kind that does not fit.
        """
        from nvila.parts import build_from_parts

        return build_from_parts(vision, language, variant, **options)

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
        return supervised_nll(self.lm_head, hidden_BLH, labels_BL)

    def _loss(self, hidden_BLH: Tensor, labels_BL: Tensor, num_items: int | Tensor | None) -> Tensor:
        """Sum the loss of every supervised token and divide it by their number."""
        targets_BL = labels_BL[:, 1:]
        mask_BL = targets_BL != IGNORE_INDEX
        hidden_MH, targets_M = hidden_BLH[:, :-1][mask_BL], targets_BL[mask_BL]
        times = self.config.time_token_ids if self.training else []
        soft = soft_targets(times, self.config.soft_ce_std) if times else None
        few = len(targets_M) * self.lm_head.out_features <= WHOLE_LOGITS
        if few and not calls_must_agree(self.lm_head):
            soft = soft.to(targets_M.device) if soft is not None else None
            total = token_nll(self.lm_head(hidden_MH), targets_M, soft).sum()
        else:
            total = head_cross_entropy(self.lm_head, hidden_MH, targets_M, reduction="sum", soft=soft)
        return total / (max(1, len(targets_M)) if num_items is None else num_items)

    def _embedding_name(self) -> str:
        """Where the decoder keeps its token embedding; families name it differently."""
        decoder = self.model.language_model
        embedding = decoder.get_input_embeddings()
        return str(next(name for name, module in decoder.named_modules() if module is embedding))


__all__ = ["IGNORE_INDEX", "NVILAConfig", "NVILAForConditionalGeneration", "NVILAModel", "NVILAOutput"]
