"""The small friendly way in: `nvila.load(path).chat([Image("cat.jpg"), "What is this?"])`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from nvila.assembly import load_model
from nvila.errors import DataError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

Content = str | Sequence[Any]


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a conversation: a path, bytes, a file object, an array or a Pillow image."""

    source: Any


@dataclass(frozen=True, slots=True)
class Video:
    """A video of a conversation: a file, a directory of frames, or a list of frames.

    Args:
        source: What to read.
        num_frames: Frames to look at, instead of the model's own number.
        fps: Frames a second to look at, up to that number.
    """

    source: Any
    num_frames: int | None = None
    fps: float | None = None


def load(path: str | Path, **options: Any) -> ChatModel:
    """Load a model folder.

    Args:
        path: Folder that `save_pretrained`, a training run or `nvila convert` wrote.
        **options: Arguments of `from_pretrained`, such as `dtype`, `device_map` and `attn_implementation`.

    Raises:
        CheckpointError: The folder is not a complete model.

    Example:
        >>> model = nvila.load("runs/demo/model")  # doctest: +SKIP
        >>> model.chat([nvila.Image("cat.jpg"), "What animal is this?"])  # doctest: +SKIP
        'A cat.'
    """
    return ChatModel(*load_model(Path(path), **options))


class ChatModel:
    """A model with its processor.

    Args:
        model: Model in evaluation mode.
        processor: Its processor.
    """

    def __init__(self, model: NVILAForConditionalGeneration, processor: NVILAProcessor) -> None:
        self.model, self.processor = model, processor

    @overload
    def chat(self, content: Content, *, stream: Literal[False] = False, **options: Any) -> str: ...

    @overload
    def chat(self, content: Content, *, stream: Literal[True], **options: Any) -> Iterator[str]: ...

    def chat(
        self,
        content: Content,
        *,
        stream: bool = False,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        **options: Any,
    ) -> str | Iterator[str]:
        """Answer.

        Args:
            content: A text; or texts, `Image`s and `Video`s in the order in which the model should see them (Pillow
                images and `pathlib.Path`s of images are taken too); or messages `{"role", "content"}` for a
                conversation of several turns, with such content.
            stream: Return an iterator over pieces of the answer instead. Closing it stops the model.
            system: Text of the system turn.
            max_new_tokens: Longest answer in tokens.
            temperature: 0 takes the likeliest token; larger values flatten the distribution.
            **options: Further arguments of `generate`, such as `top_p`.

        Raises:
            DataError: The content is empty, or a medium cannot be read.
        """
        inputs = self._inputs(content, system)
        options["max_new_tokens"] = max_new_tokens
        options |= {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        if stream:
            return self._stream(inputs, options)
        ids = cast("Any", self.model).generate(**inputs, **options)
        answer = ids[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def _inputs(self, content: Content, system: str | None) -> Any:
        messages = as_messages(content)
        for part in (part for message in messages for part in message["content"]):
            if isinstance(video := part.get("video"), Video):
                part["video"] = self.processor.video_processor.load(
                    video.source, num_frames=video.num_frames, fps=video.fps
                )
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _stream(self, inputs: Any, options: dict[str, Any]) -> Iterator[str]:
        """Run the model in a thread, and hand out what it writes."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, errors = threading.Event(), list[BaseException]()

        def work() -> None:
            try:
                criteria = StoppingCriteriaList([_WhenSet(stop)])
                cast("Any", self.model).generate(**inputs, streamer=streamer, stopping_criteria=criteria, **options)
            except BaseException as e:  # it is raised in the caller's thread
                errors.append(e)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
            thread.join()
        if errors:
            raise errors[0]


class _WhenSet(StoppingCriteria):
    """Stops generation when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


def as_messages(content: Content) -> list[dict[str, Any]]:
    """Turn what `chat` takes into messages of the Hugging Face form.

    Raises:
        DataError: There is nothing in it.
    """
    if not content:
        raise DataError("there is nothing to answer", "give a text, or a list of media and texts")
    if isinstance(content, str):
        return [{"role": "user", "content": [_part(content)]}]
    parts: Sequence[Any] = content
    if isinstance(parts[0], Mapping) and "role" in parts[0]:
        return [dict(message) | {"content": _parts(message["content"])} for message in parts]
    return [{"role": "user", "content": _parts(content)}]


def _parts(content: Content) -> list[dict[str, Any]]:
    return [_part(content)] if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Any) -> dict[str, Any]:
    from PIL.Image import Image as Picture

    from nvila.data.video import Video as Frames

    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping):
        return dict(part)
    if isinstance(part, Image):
        return {"type": "image", "image": part.source}
    if isinstance(part, Picture | Path):
        return {"type": "image", "image": part}
    if isinstance(part, Video | Frames):
        return {"type": "video", "video": part}
    raise DataError(f"a {type(part).__name__} is no part of a message", "use texts, Image and Video")
