"""From a conversation to tokens and media. Media that are known by their content are not prepared a second time.

Shape suffixes: L positions of a prompt, T tiles or frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nvila.data.records import Message, Part
from nvila.errors import DataError
from nvila.inference.media import MediaCache, Medium, digest_of

if TYPE_CHECKING:
    from PIL import Image

    from nvila.configuration import NVILAConfig
    from nvila.data.media_layout import MediaLayout
    from nvila.data.video import Video
    from nvila.processing import NVILAProcessor

    Media = Mapping[str, Image.Image | Video]


class PromptReader:
    """Makes tokens and media of conversations, as the processor does for `generate`.

    Args:
        processor: The model's processor.
        config: The model's configuration.
        cache: What the tower need not see again; tiles are cut only for media that it lacks.
        salt: Tells its media apart from the same ones before another tower.
    """

    def __init__(self, processor: NVILAProcessor, config: NVILAConfig, cache: MediaCache, salt: bytes = b"") -> None:
        self._salt = salt
        self._processor = processor
        self._placeholders = {"image": config.image_token_id, "video": config.video_token_id}
        self._cache = cache

    def read(self, messages: Sequence[Message], media: Media) -> tuple[list[int], list[Medium]]:
        """Return the prompt's tokens and its media.

        Raises:
            DataError: There are no messages, or a medium is missing or cannot be used.
        """
        parts = _media_parts(messages, media)
        tile = self._processor.tiles(sum(part.type == "image" for part in parts))
        read = [self._medium(part, media[part.value], tile) for part in parts]
        ids = self._processor.prompt_ids(messages, [layout for _, layout in read])
        ids_L = torch.tensor(ids)
        placed = [medium for medium, _ in read]
        for kind, token in self._placeholders.items():
            mine = [(medium, layout) for medium, layout in read if medium.is_video == (kind == "video")]
            counts = [sum(layout.runs) for _, layout in mine]
            places = (ids_L == token).nonzero().squeeze(1)
            if sum(counts) != len(places):
                raise DataError(f"{len(places)} placeholders are not those of {len(mine)} {kind}s of the prompt")
            for (medium, _), own in zip(mine, places.split(counts), strict=True):
                medium.places = own
        return ids, placed

    def count_visual(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt are visual."""
        return sum(token in self._placeholders.values() for token in ids)

    def _medium(self, part: Part, source: Image.Image | Video, tile: bool) -> tuple[Medium, MediaLayout]:
        if part.type == "image":
            image, processor = self._processor.image_processor.load(source), self._processor.image_processor
            plan = processor.plan(*image.size, tile=tile)
            medium = Medium(
                digest=digest_of(image.tobytes(), ("image", image.size, plan, self._salt)),
                cut=partial(processor.tile_levels, image, plan),
                normalise=processor.normalise,
                num_tiles=plan.num_tiles,
                block=plan.block,
                is_video=False,
            )
            layout = self._processor.media_tokens.image(plan, tiled=tile)
        else:
            video, reader = self._processor.video_processor.load(source), self._processor.video_processor
            medium = Medium(
                digest=digest_of(video.frames.tobytes(), ("video", video.frames.shape, self._salt)),
                cut=partial(reader.frame_levels, video),
                normalise=reader.normalise,
                num_tiles=len(video),
                block=None,
                is_video=True,
            )
            layout = self._processor.media_tokens.video(len(video))
        if medium.digest not in self._cache:
            medium.prepare()
        return medium, layout


def model_inputs(processor: NVILAProcessor, messages: Sequence[Message], media: Media) -> dict[str, Tensor]:
    """Return what `generate` takes for one conversation: `input_ids` and the tensors of its media.

    Raises:
        DataError: As `PromptReader.read`.
    """
    _media_parts(messages, media)

    def content(part: Part) -> dict[str, object]:
        return {"type": part.type, part.type: part.value if part.type == "text" else media[part.value]}

    conversation = [
        {"role": message.role, "content": [content(part) for part in message.content]} for message in messages
    ]
    inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    inputs.pop("attention_mask")
    return dict(inputs)


def _media_parts(messages: Sequence[Message], media: Media) -> list[Part]:
    if not messages:
        raise DataError("the conversation has no messages", "give at least one user message")
    parts = [part for message in messages for part in message.content if part.type != "text"]
    for part in parts:
        if part.value not in media:
            raise DataError(f"{part.type} '{part.value}' of the conversation was not given", "send every medium")
    return parts


__all__ = ["PromptReader", "model_inputs"]
