"""The processor: media to pixel tensors, conversations to ids with one placeholder for every visual token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from nvila.chat_messages import Conversation, render
from nvila.data.media_layout import MediaLayout, spelling
from nvila.data.rendering import Renderer
from nvila.data.tokenizers import IMAGE_TOKEN, VIDEO_TOKEN, token_id
from nvila.errors import CheckpointError, DataError
from nvila.image_processing import NVILAImageProcessor, flat_images
from nvila.prompts import (
    BoundTemplate,
    MediaTokens,
    TokenCount,
    check_counts,
    encode,
    media_kinds,
    pad_rows,
    spell_markers,
)
from nvila.video_processing import NVILAVideoProcessor, flat_videos
from nvila.vision.resampling import levels, resample

if TYPE_CHECKING:
    from PIL import Image

    from nvila.configuration import NVILAConfig
    from nvila.data.records import Message

# Arguments of `__call__` that `apply_chat_template` takes too.
_OPTIONS = (
    "fps",
    "max_length",
    "num_frames",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "tile_all",
    "truncation",
)


def pixel_levels(image: Image.Image, image_size: int) -> Tensor:
    """Turn an RGB image into a (3, size, size) tile of bytes.

    What `NVILAProcessor.pixel_values` has before it scales to [-1, 1].
    """
    return resample(levels(image), image_size, image_size)


@dataclass(frozen=True, slots=True)
class _Media:
    """The media of a batch: the model's tensors, and for every prompt the layouts in order."""

    tensors: dict[str, Any]
    layouts: list[list[MediaLayout]]


class NVILAProcessor(ProcessorMixin):
    """Image processor, video processor and tokenizer in one.

    Args:
        image_processor: Makes the tiles of images; a dict as saved is taken too.
        tokenizer: Tokenizer with the media tokens and a chat template. It is set to pad on the left, which is where
            padding belongs in rows that are to be answered; set `padding_side` to have it otherwise.
        num_image_tokens: Visual tokens that the model makes of a tile.
        video_processor: Makes the tiles of video frames.
        video_pool_sizes: How the model pools video tokens.
        chat_template: Instead of the tokenizer's.
        **kwargs: Passed to the base class.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int = 256,
        video_processor: Any = None,
        video_pool_sizes: Sequence[Sequence[int]] = ((1, 1, 1),),
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None:
            chat_template = tokenizer.chat_template if chat_template is None else chat_template
            # An answer follows the end of its row; pipelines pad as the tokenizer says and not as we do.
            tokenizer.padding_side = "left"
        super().__init__(tokenizer, chat_template=chat_template, **kwargs)  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        if image_processor is None or isinstance(image_processor, Mapping):
            image_processor = NVILAImageProcessor.from_saved(dict(image_processor or {}))
        if video_processor is None:
            video_processor = {"size": image_processor.size}
        if isinstance(video_processor, Mapping):
            video_processor = NVILAVideoProcessor(**video_processor)
        self.image_processor, self.video_processor = image_processor, video_processor
        self.num_image_tokens = num_image_tokens
        self.video_pool_sizes = [list(size) for size in video_pool_sizes]
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Parts that the base class stores in files of their own; the others are in processor_config.json."""
        return ["tokenizer"]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Leave the first place to the image processor, which the base class fills from processor_config.json."""
        if "image_processor" not in (processor_dict or {}):
            raise CheckpointError(
                f"{pretrained_model_name_or_path} has no processor_config.json with an image processor",
                "save the processor beside the model",
            )
        load: Any = super()._get_arguments_from_pretrained
        return [None, *load(pretrained_model_name_or_path, processor_dict, **kwargs)]

    @classmethod
    def from_config(cls, config: NVILAConfig, tokenizer: PreTrainedTokenizerBase) -> NVILAProcessor:
        """Build the processor that belongs to a model."""
        return cls(
            NVILAImageProcessor.from_config(config),
            tokenizer,
            num_image_tokens=config.num_image_tokens,
            video_processor=NVILAVideoProcessor.from_config(config),
            video_pool_sizes=config.video_pool_sizes,
        )

    @classmethod
    def from_preset(cls, name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> NVILAProcessor:
        """Build the processor of a preset without any download.

        Args:
            name: A preset of `nvila.presets`.
            tokenizer: Tokenizer with the media tokens. The default one knows bytes and the special tokens only, under
                the preset's ids: right for counting visual tokens and for the tiny presets, not for released weights.

        Raises:
            ConfigError: The preset is unknown.
        """
        from nvila.configuration import NVILAConfig
        from nvila.parts import byte_tokenizer

        config = NVILAConfig.from_preset(name)
        return cls.from_config(config, byte_tokenizer(config) if tokenizer is None else tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that `__call__` may return."""
        names = [self.tokenizer, self.image_processor, self.video_processor]
        return [name for part in names for name in part.model_input_names if name != "token_type_ids"]

    @property
    def media_tokens(self) -> MediaTokens:
        """How many tokens media take."""
        return MediaTokens(num_image_tokens=self.num_image_tokens, video_pool_sizes=self.video_pool_sizes)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare model inputs.

        Args:
            images: Images in the order of their markers over all texts, or one list for every text.
            text: One or more prompts with an `<image>` marker for every image and a `<vila/video>` for every video.
            videos: Videos, likewise; a path, a `Video` or a list of frames each.
            **kwargs: `padding` (False, True, "longest" or "max_length"), `padding_side`, `max_length`,
                `pad_to_multiple_of`, `truncation`, `return_tensors` ("pt", or None for lists); `tile_all` to tile
                every image as in training, where otherwise only a prompt's single image is tiled; `num_frames` and
                `fps` to sample videos otherwise than the processor does.

        Returns:
            `input_ids`, `attention_mask` and, with media, `pixel_values`, `image_blocks` (only `dynamic_s2`),
            `pixel_values_videos` and `video_frames`.

        Raises:
            DataError: Markers and media differ in number, or a medium cannot be read.
        """
        texts = [text] if isinstance(text, str) else list(text or [""])
        pictures, clips = flat_images(images), flat_videos(videos)
        kinds = [media_kinds(one) for one in texts]
        check_counts(sum(row.count("image") for row in kinds), len(pictures), "image")
        check_counts(sum(row.count("video") for row in kinds), len(clips), "video")
        queues = {"image": iter(pictures), "video": iter(clips)}
        media = self._media([[(kind, next(queues[kind])) for kind in row] for row in kinds], **_media_options(kwargs))
        rows = [
            encode(self.tokenizer, spell_markers(one, layouts), layouts)
            for one, layouts in zip(texts, media.layouts, strict=True)
        ]
        return BatchFeature({**self._batch(rows, len(texts) > 1, **kwargs), **media.tensors})

    def apply_chat_template(  # type: ignore[override]  # one signature for both results
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations, and with `tokenize` prepare model inputs from them and the media that they hold.

        Markers and other special tokens in the text parts are text: they reach the model as the characters they are.

        Args:
            conversation: Messages `{"role", "content"}`, or a list of such lists. A content is a text or a list of
                parts: `{"type": "text", "text"}`, `{"type": "image", "image" | "path" | "url"}` and
                `{"type": "video", "video" | "path"}`, in any order.
            chat_template: Instead of the processor's own.
            add_generation_prompt: Open the assistant's turn. Rows to be answered are padded on the left.
            continue_final_message: Leave the last message open, for the model to go on with it.
            tokenize: Return model inputs instead of text.
            return_dict: Return all inputs; otherwise `input_ids` alone.
            return_tensors: "pt", or None for lists.
            processor_kwargs: Arguments of `__call__`.
            **kwargs: Arguments of `__call__`, or variables of the template.

        Raises:
            DataError: A part is of an unknown kind, or a medium cannot be read.
        """
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs} | dict(processor_kwargs or {})
        template = BoundTemplate(self.tokenizer, chat_template=chat_template or self.chat_template, **kwargs)
        renderer = Renderer(cast("PreTrainedTokenizerBase", template))
        batch = bool(conversation) and not isinstance(conversation[0], Mapping)
        parsed = [Conversation.parse(one) for one in (conversation if batch else [conversation])]
        mode = "open" if continue_final_message else "answer" if add_generation_prompt else "whole"
        if not tokenize:
            unspelled = [[MediaLayout((1,))] * len(one.kinds) for one in parsed]
            texts = [render(renderer, one, row, mode)[0] for one, row in zip(parsed, unspelled, strict=True)]
            return texts if batch else texts[0]
        options.setdefault("padding_side", "right" if mode == "whole" else "left")
        media = self._media(
            [list(zip(one.kinds, one.sources, strict=True)) for one in parsed], **_media_options(options)
        )
        rows = [
            encode(self.tokenizer, text, layouts, cuts)
            for one, layouts in zip(parsed, media.layouts, strict=True)
            for text, cuts in [render(renderer, one, layouts, mode)]
        ]
        inputs = BatchFeature({**self._batch(rows, batch, return_tensors=return_tensors, **options), **media.tensors})
        return inputs if return_dict else inputs["input_ids"]

    def count_tokens(
        self,
        image_sizes: Sequence[tuple[int, int]] = (),
        video_frames: Sequence[int] = (),
        text: str | None = None,
        *,
        tile_all: bool = False,
    ) -> TokenCount:
        """Count the positions of a prompt without any pixels.

        Args:
            image_sizes: Width and height of each image.
            video_frames: Frames sampled from each video.
            text: The prompt. Media whose markers it does not hold are put in front of it; None counts media alone.
            tile_all: Tile every image, as in training.

        Raises:
            DataError: The text has some markers, but not those of the media.
            ConfigError: A pool size does not divide the frames of a video.
        """
        tile = self.tiles(len(image_sizes), tile_all)
        plans = [self.image_processor.plan(*size, tile=tile) for size in image_sizes]
        layouts = {
            "image": [self.media_tokens.image(plan, tiled=tile) for plan in plans],
            "video": [self.media_tokens.video(frames) for frames in video_frames],
        }
        text = text or ""
        for kind, marker in (("video", VIDEO_TOKEN), ("image", IMAGE_TOKEN)):
            if marker not in text:
                text = marker * len(layouts[kind]) + text
            check_counts(text.count(marker), len(layouts[kind]), kind)
        queues = {kind: iter(row) for kind, row in layouts.items()}
        ordered = [next(queues[kind]) for kind in media_kinds(text)]
        total = len(encode(self.tokenizer, spell_markers(text, ordered), ordered))
        visual = sum(run for layout in ordered for run in layout.runs)
        return TokenCount(visual=visual, text=total - visual, tiles=tuple(plan.grids for plan in plans))

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """Turn images into normalised tiles of shape (T, 3, size, size), one for each image."""
        pixels: Tensor = self.image_processor(list(images), tile=False)["pixel_values"]
        return pixels

    def prompt_ids(self, messages: Sequence[Message], layouts: Sequence[MediaLayout] | None = None) -> list[int]:
        """Tokenise a conversation up to the opened assistant turn, visual placeholders included.

        Args:
            messages: The conversation.
            layouts: What each medium becomes, in order; None for images of one tile.
        """
        kinds = [part.type for message in messages for part in message.content if part.type != "text"]
        if layouts is None:
            layouts = [MediaLayout((self.num_image_tokens,))] * len(kinds)
        template = BoundTemplate(self.tokenizer, chat_template=self.chat_template)
        renderer = Renderer(cast("PreTrainedTokenizerBase", template))
        text, cuts = renderer.prompt(messages, spelling(kinds, layouts))
        return encode(self.tokenizer, text, layouts, cuts)

    def tiles(self, num_images: int, tile_all: bool = False) -> bool:
        """Whether the images of a prompt are tiled: the reference tiles a single image only, except in training."""
        return bool(self.image_processor.tiles_images and (tile_all or num_images == 1))

    def _media(
        self,
        rows: Sequence[Sequence[tuple[str, Any]]],
        *,
        tile_all: bool = False,
        num_frames: int | None = None,
        fps: float | None = None,
    ) -> _Media:
        """Read the media of every prompt, given as (kind, source) in order, and make tensors and layouts."""
        tiled = [self.tiles(sum(kind == "image" for kind, _ in row), tile_all) for row in rows]
        images = [
            (source, tile) for row, tile in zip(rows, tiled, strict=True) for kind, source in row if kind == "image"
        ]
        videos = [source for row in rows for kind, source in row if kind == "video"]
        tensors: dict[str, Any] = {}
        queues: dict[str, Iterator[MediaLayout]] = {"image": iter(()), "video": iter(())}
        if images:
            loaded = self.image_processor.load_all([source for source, _ in images])
            tiles = [tile for _, tile in images]
            plans = [self.image_processor.plan(*one.size, tile=tile) for one, tile in zip(loaded, tiles, strict=True)]
            tensors |= self.image_processor.tensors(loaded, plans)
            queues["image"] = map(lambda plan, tile: self.media_tokens.image(plan, tiled=tile), plans, tiles)
        if videos:
            tensors |= self.video_processor(videos, num_frames=num_frames, fps=fps)
            queues["video"] = map(self.media_tokens.video, tensors["video_frames"].tolist())
        return _Media(tensors, [[next(queues[kind]) for kind, _ in row] for row in rows])

    def _batch(
        self,
        rows: list[list[int]],
        batch: bool,
        *,
        padding: bool | str | None = None,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool | str = False,
        return_tensors: str | None = "pt",
        **unknown: Any,
    ) -> Mapping[str, Any]:
        if unknown:
            raise DataError(f"the processor has no argument '{min(unknown)}'", "see NVILAProcessor.__call__")
        if truncation and max_length is not None:
            rows = [self._truncated(row, max_length) for row in rows]
        padding = batch if padding is None else padding
        if not padding:
            data: Mapping[str, Any] = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
            if return_tensors and len({len(row) for row in rows}) > 1:
                raise DataError("rows of different length make no tensor", "pass padding=True")
        else:
            pad = self.tokenizer.pad_token_id
            data = pad_rows(
                rows,
                # A tokenizer without one still batches: the mask hides whatever stands there.
                (self.tokenizer.eos_token_id or 0) if pad is None else pad,
                side=padding_side or self.tokenizer.padding_side,
                length=max_length if padding == "max_length" else None,
                multiple=pad_to_multiple_of or 1,
            )
        return {name: torch.tensor(value) for name, value in data.items()} if return_tensors else data

    def _truncated(self, ids: list[int], max_length: int) -> list[int]:
        placeholders = {token_id(self.tokenizer, IMAGE_TOKEN), token_id(self.tokenizer, VIDEO_TOKEN)}
        if cut := sum(token in placeholders for token in ids[max_length:]):
            raise DataError(
                f"a prompt of {len(ids)} tokens loses {cut} visual tokens when cut to {max_length}",
                "raise max_length or send fewer or smaller media",
            )
        return ids[:max_length]


def _media_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take out of keyword arguments those that say how media are read."""
    return {name: kwargs.pop(name) for name in ("tile_all", "num_frames", "fps") if name in kwargs}


__all__ = ["NVILAProcessor", "TokenCount", "pixel_levels"]
