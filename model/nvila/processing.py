"""The processor: images to pixel tensors, conversations to token ids with one placeholder for every visual token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from nvila.data.conversation import ConversationEncoder
from nvila.data.tokenizers import IMAGE_TOKEN
from nvila.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from nvila.data.records import Message


_BICUBIC = 3


def build_image_processor(image_size: int) -> SiglipImageProcessorPil:
    """Build the SigLIP image processor: resize to a square, scale to [-1, 1]."""
    return SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_convert_rgb=True,
    )


def pixel_levels(image: Image.Image, image_size: int) -> Tensor:
    """Turn an RGB image into a (3, size, size) tile of bytes.

    What `NVILAProcessor.pixel_values` has before it scales to [-1, 1], without that path's fixed cost of milliseconds
    an image, which is most of the work for small ones.
    """
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), _BICUBIC)
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.view(image_size, image_size, 3).permute(2, 0, 1).contiguous()


class NVILAProcessor(ProcessorMixin):
    """Image processor and tokenizer in one.

    Args:
        image_processor: Makes one square tile of an image.
        tokenizer: Tokenizer with the media tokens and a chat template.
        num_image_tokens: Visual tokens that the model makes of a tile.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = IMAGE_TOKEN
        if chat_template is None and tokenizer is not None:
            chat_template = tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)  # type: ignore[no-untyped-call]  # transformers leaves it untyped

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare model inputs.

        Args:
            images: Images in the order of their markers over all texts.
            text: One or more prompts with an `<image>` marker for every image.
            **kwargs: Passed to the tokenizer (`padding`, `return_tensors` ...).

        Returns:
            `input_ids`, `attention_mask` and, with images, `pixel_values`.

        Raises:
            DataError: Markers and images differ in number.
        """
        texts = [text] if isinstance(text, str) else list(text or [""])
        pictures = [] if images is None else list(images) if isinstance(images, Sequence) else [images]
        markers = sum(one.count(IMAGE_TOKEN) for one in texts)
        if markers != len(pictures):
            raise DataError(
                f"the text has {markers} image markers but {len(pictures)} images were given",
                f"write one {IMAGE_TOKEN} for every image",
            )
        kwargs.setdefault("return_tensors", "pt")
        kwargs.setdefault("padding", len(texts) > 1)
        expanded = [one.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens + "\n") for one in texts]
        data = dict(self.tokenizer(expanded, add_special_tokens=False, **kwargs))
        data.pop("token_type_ids", None)
        if pictures:
            data["pixel_values"] = self.pixel_values(pictures)
        return BatchFeature(data)

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """Turn images into normalised tiles of shape (T, 3, size, size)."""
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return torch.as_tensor(pixels, dtype=torch.float32)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokenise a conversation up to the opened assistant turn, visual placeholders included."""
        return ConversationEncoder(self.tokenizer, self.num_image_tokens, self.tokenizer.model_max_length).prompt(
            messages
        )


__all__ = ["NVILAProcessor", "build_image_processor", "pixel_levels"]
