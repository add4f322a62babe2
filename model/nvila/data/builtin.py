"""Data sets that come with installed packages, as streams of records: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from nvila.data import digit_clips, digit_pages, digits_vqa, easy_vqa
from nvila.data.readers.locations import locate
from nvila.data.readers.media import FileMedia
from nvila.data.readers.record import MediaSource, Record
from nvila.data.records import Part, Sample


class BuiltinStream:
    """The records of a built-in data set.

    Args:
        name: Its name.
        samples: Yields all samples anew; media are keyed by names of the data set's own.
        media: Where each medium is.
    """

    def __init__(self, name: str, samples: Callable[[], Iterator[Sample]], media: Callable[[str], MediaSource]) -> None:
        self._name = name
        self._samples = samples
        self._media = media
        self._count: int | None = None

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._name

    def count(self) -> int:
        """Return the number of records."""
        if self._count is None:
            self._count = sum(1 for _ in self._samples())
        return self._count

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records with start <= index < stop."""
        for index, sample in enumerate(islice(self._samples(), start, stop), start=start):
            yield Record(
                index=index,
                where=f"{self._name}:{index + 1}",
                sample=self._named(sample),
                media={self._key(part.value): self._media(part.value) for part in _media_of(sample)},
            )

    def _key(self, key: str) -> str:
        return f"{self._name.partition(':')[0]}/{key}"

    def _named(self, sample: Sample) -> Sample:
        def named(part: Part) -> Part:
            return part if part.type == "text" else replace(part, value=self._key(part.value))

        messages = [replace(message, content=tuple(map(named, message.content))) for message in sample.messages]
        return replace(sample, messages=tuple(messages))


def _media_of(sample: Sample) -> Iterator[Part]:
    return (part for message in sample.messages for part in message.content if part.type != "text")


def open_builtin(name: str) -> BuiltinStream:
    """Open a built-in data set.

    Args:
        name: One of `BUILTINS`.

    Raises:
        CapabilityError: The package that carries it is not installed.
    """
    return BUILTINS[name](name)


def _easy_vqa(split: easy_vqa.Split) -> Callable[[str], BuiltinStream]:
    def build(name: str) -> BuiltinStream:
        files = dict(easy_vqa.image_files(split))
        return BuiltinStream(name, lambda: easy_vqa.questions(split), lambda key: FileMedia(locate(str(files[key]))))

    return build


@dataclass(frozen=True, slots=True)
class _DigitMedia:
    digits: digits_vqa.DigitsVQA
    number: int

    def read(self) -> bytes:
        return self.digits.png(self.number)


def _digits_vqa(split: digits_vqa.Split) -> Callable[[str], BuiltinStream]:
    def build(name: str) -> BuiltinStream:
        digits = digits_vqa.DigitsVQA()
        return BuiltinStream(
            name,
            lambda: digits.questions(split),
            lambda key: _DigitMedia(digits, int(key.rpartition("/")[2])),
        )

    return build


@dataclass(frozen=True, slots=True)
class _PageMedia:
    pages: digit_pages.DigitPages
    key: str

    def read(self) -> bytes:
        return self.pages.png(self.key)


def _digit_pages(
    split: digits_vqa.Split, print: digit_pages.Print = digit_pages.SMALL
) -> Callable[[str], BuiltinStream]:
    def build(name: str) -> BuiltinStream:
        pages = digit_pages.DigitPages(print)
        return BuiltinStream(name, lambda: pages.questions(split), lambda key: _PageMedia(pages, key))

    return build


@dataclass(frozen=True, slots=True)
class _ClipMedia:
    clips: digit_clips.DigitClips
    key: str

    def read(self) -> bytes:
        return self.clips.mp4(self.key)


def _digit_clips(split: digits_vqa.Split, kinds: tuple[str, ...]) -> Callable[[str], BuiltinStream]:
    def build(name: str) -> BuiltinStream:
        clips = digit_clips.DigitClips()
        return BuiltinStream(name, lambda: clips.questions(split, kinds), lambda key: _ClipMedia(clips, key))

    return build


BUILTINS: Mapping[str, Callable[[str], BuiltinStream]] = {
    "easy-vqa": _easy_vqa("train"),
    "easy-vqa:test": _easy_vqa("test"),
    "digits-vqa": _digits_vqa("train"),
    "digits-vqa:test": _digits_vqa("test"),
    "digit-pages": _digit_pages("train"),
    "digit-pages:test": _digit_pages("test"),
    "digit-pages-large": _digit_pages("train", digit_pages.LARGE),
    "digit-pages-large:test": _digit_pages("test", digit_pages.LARGE),
    "digit-clips": _digit_clips("train", digit_clips.WORD_KINDS),
    "digit-clips:test": _digit_clips("test", digit_clips.WORD_KINDS),
    "digit-clips-when": _digit_clips("train", digit_clips.SPAN_KINDS),
    "digit-clips-when:test": _digit_clips("test", digit_clips.SPAN_KINDS),
}
