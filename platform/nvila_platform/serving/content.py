"""Messages of a request and the media in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nvila_platform.serving.media import MediaSource


class Strict(BaseModel):
    """Refuses what it does not know, and values of other types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(Strict):
    """Literal text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where the image is: here, always the image itself as a `data:` URI."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """One image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Strict):
    """Where the video is, and how its frames are sampled; without a rate they are spread evenly."""

    url: str
    num_frames: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, gt=0, le=120)


class VideoPart(Strict):
    """One video, as vLLM takes it."""

    type: Literal["video_url"]
    video_url: VideoUrl


class FramesPart(Strict):
    """One video as a list of images, in order."""

    type: Literal["video"]
    video: list[str] = Field(min_length=1)
    fps: float | None = Field(default=None, gt=0, le=120)


MediaPart: TypeAlias = ImagePart | VideoPart | FramesPart


class ChatMessage(Strict):
    """One turn; plain text content is read as one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart | VideoPart | FramesPart, Field(discriminator="type")]] = Field(
        min_length=1
    )
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, raw: Any) -> Any:
        # Clients send an earlier answer back as they got it, with null for each kind of content it did not have.
        return {key: value for key, value in raw.items() if value is not None} if isinstance(raw, dict) else raw

    @field_validator("content", mode="before")
    @classmethod
    def _text_as_part(cls, raw: Any) -> Any:
        return [{"type": "text", "text": raw}] if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _media_from_users(self) -> ChatMessage:
        if self.role != "user" and any(not isinstance(part, TextPart) for part in self.content):
            raise ValueError(f"only user messages may hold images and videos, this one is from {self.role}")
        return self


def media_sources(messages: Sequence[ChatMessage], num_frames: int) -> list[MediaSource]:
    """List the media of a conversation in order.

    Args:
        messages: The conversation.
        num_frames: Frames of a video for which the request names no number.
    """
    found = []
    for turn, message in enumerate(messages):
        for position, part in enumerate(message.content):
            if not isinstance(part, TextPart):
                found.append(_source(part, f"messages[{turn}].content[{position}]", num_frames))
    return found


def _source(part: MediaPart, where: str, num_frames: int) -> MediaSource:
    if isinstance(part, ImagePart):
        return MediaSource(kind="image", urls=(part.image_url.url,), param=f"{where}.image_url.url")
    if isinstance(part, FramesPart):
        count = len(part.video)
        return MediaSource(
            kind="frames", urls=tuple(part.video), param=f"{where}.video", num_frames=count, fps=part.fps or 0.0
        )
    video = part.video_url
    return MediaSource(
        kind="video",
        urls=(video.url,),
        param=f"{where}.video_url.url",
        num_frames=video.num_frames or num_frames,
        fps=video.fps or 0.0,
    )
