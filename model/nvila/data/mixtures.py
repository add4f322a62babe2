"""Data sets by name, and mixtures of them.

A registry is a YAML file that gives names to data sets (`path`, and how to read it) and to mixtures of names
(`charts + docs*3`). Built-in data sets and plain paths need no registry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvila.data.builtin import BUILTINS, open_builtin
from nvila.data.mixture_expression import Term, parse_expression
from nvila.data.readers.formats import FORMATS, data_files
from nvila.data.readers.locations import FileSystems, Location, files_below, locate, reading
from nvila.data.readers.opening import DatasetSpec, open_dataset
from nvila.data.readers.record import CountedStream, Record
from nvila.data.selections import SelectedStream, open_selection
from nvila.errors import ConfigError, nearest
from nvila.yaml_text import parse_yaml

_SUFFIXES = tuple(suffix for format in FORMATS.values() for suffix in format.suffixes)


class _Entry(BaseModel):
    """A data set in a registry file; fields as in `DatasetSpec`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str = Field(min_length=1)
    format: str | None = None
    media_dir: str | None = None
    source: str | None = Field(default=None, min_length=1)
    rename: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One data set of an expanded mixture.

    Args:
        name: Its name, or its path.
        times: How often it is repeated.
        selections: What it is cut down to, one after the other.
    """

    name: str
    times: int = 1
    selections: tuple[Location, ...] = ()


class Registry:
    """Names of data sets and mixtures.

    Args:
        datasets: Data sets by name.
        mixtures: Expressions by name.
        home: Folder that relative paths in them start from; None is the working directory.
        filesystems: File systems by scheme besides local files.
    """

    def __init__(
        self,
        datasets: Mapping[str, DatasetSpec] | None = None,
        mixtures: Mapping[str, str] | None = None,
        *,
        home: Location | None = None,
        filesystems: FileSystems | None = None,
    ) -> None:
        self._datasets = dict(datasets or {})
        self._mixtures = dict(mixtures or {})
        self._home = home
        self._filesystems = filesystems or {}

    @classmethod
    def load(cls, path: str, filesystems: FileSystems | None = None) -> Registry:
        """Read a registry file.

        Raises:
            ConfigError: It is not YAML, or an entry is neither a data set nor a mixture; the message names it.
            DataError: It cannot be read.
        """
        file = locate(path, filesystems)
        try:
            text = file.read().decode()
        except UnicodeDecodeError as e:
            raise ConfigError(f"{file.uri} is no UTF-8 text", "write YAML") from e
        entries = parse_yaml(text, where=file.uri)
        if not isinstance(entries, dict):
            raise ConfigError(f"{file.uri} is no mapping of names", "write NAME: {path: ...} or NAME: a + b")
        datasets: dict[str, DatasetSpec] = {}
        mixtures: dict[str, str] = {}
        for name, entry in entries.items():
            where = f"{file.uri}: {name}"
            _check_name(name, where)
            if isinstance(entry, str):
                parse_expression(entry)
                mixtures[name] = entry
            else:
                datasets[name] = _spec(entry, where)
        return cls(datasets, mixtures, home=file.parent, filesystems=filesystems)

    @property
    def names(self) -> list[str]:
        """All names, built-in ones included."""
        return sorted({*self._datasets, *self._mixtures, *BUILTINS})

    def expand(self, expression: str) -> list[Leaf]:
        """Take a mixture apart down to its data sets, in the order in which they are written.

        Raises:
            ConfigError: A name is unknown, mixtures contain each other, or the expression cannot be read.
        """
        return list(self._expanded(expression, None, ()))

    def files(self, expression: str) -> list[Location]:
        """Return the data files and selections behind an expression, each once; built-in data sets have none.

        Media that records name are not among them.

        Raises:
            ConfigError: As in `expand`.
            DataError: There is no data.
        """
        found: dict[str, Location] = {}
        for leaf in self.expand(expression):
            places = list(leaf.selections)
            if leaf.name not in BUILTINS:
                spec = self._datasets.get(leaf.name, DatasetSpec(path=leaf.name))
                base = self._home if leaf.name in self._datasets else None
                places += [file for file, _ in data_files(locate(spec.path, self._filesystems, base), spec.format)]
            for place in places:
                with reading(place.uri):
                    files = [place] if place.is_file() else files_below(place)
                found |= {file.uri: file for file in files}
        return list(found.values())

    def open(self, expression: str) -> CountedStream:
        """Open a name, a path, or a mixture of them.

        Raises:
            ConfigError: As in `expand`; or a selection is missing.
            DataError: There is no data.

        Example:
            >>> Registry().open("easy-vqa + digits-vqa*2").count()  # doctest: +SKIP
            55831
        """
        opened: dict[str, CountedStream] = {}
        streams: list[CountedStream] = []
        for leaf in self.expand(expression):
            stream = opened.get(leaf.name) or self._open(leaf.name)
            opened[leaf.name] = stream
            for place in leaf.selections:
                stream = SelectedStream(stream, open_selection(place, stream.name))
            streams += [stream] * leaf.times
        return streams[0] if len(streams) == 1 else MixtureStream(expression, streams)

    def _open(self, name: str) -> CountedStream:
        if name in BUILTINS:
            return open_builtin(name)
        if name in self._datasets:
            return open_dataset(self._datasets[name], name=name, filesystems=self._filesystems, base=self._home)
        return open_dataset(DatasetSpec(path=name), filesystems=self._filesystems)

    def _expanded(self, expression: str, base: Location | None, chain: tuple[str, ...]) -> Iterator[Leaf]:
        """Yield the leaves of an expression; relative paths in it start from `base`."""
        for term in self._terms(expression, base):
            selections = () if term.selection is None else (locate(term.selection, self._filesystems, base),)
            for leaf in self._named(term.name, base, chain):
                yield replace(leaf, times=leaf.times * term.times, selections=leaf.selections + selections)

    def _terms(self, expression: str, base: Location | None) -> list[Term]:
        # A file may be called a+b.jsonl.
        is_path = expression not in self.names and self._is_there(expression, base)
        return [Term(expression)] if is_path else parse_expression(expression)

    def _named(self, name: str, base: Location | None, chain: tuple[str, ...]) -> Iterator[Leaf]:
        if name in chain:
            raise ConfigError(
                f"mixtures contain each other: {' -> '.join((*chain, name))}", f"take '{name}' out of one"
            )
        if name in self._mixtures:
            yield from self._expanded(self._mixtures[name], self._home, (*chain, name))
        elif name in self._datasets or name in BUILTINS:
            yield Leaf(name)
        else:
            yield Leaf(self._path(name, base))

    def _path(self, name: str, base: Location | None) -> str:
        """Return the address of a path; what neither looks like one nor is there is a wrong name."""
        is_path = "/" in name or name.lower().endswith(_SUFFIXES) or self._is_there(name, base)
        if not is_path:
            raise ConfigError(f"there is no data set '{name}'", nearest(name, self.names))
        return locate(name, self._filesystems, base).uri

    def _is_there(self, text: str, base: Location | None) -> bool:
        try:
            place = locate(text, self._filesystems, base)
        except ConfigError:
            return False
        return bool(place.fs.exists(place.path))


class MixtureStream:
    """Several streams, one after the other.

    Args:
        name: Name of the mixture.
        streams: Its parts; one that is repeated stands several times.
    """

    def __init__(self, name: str, streams: list[CountedStream]) -> None:
        self._name = name
        self._streams = streams

    @property
    def name(self) -> str:
        """Name of the mixture."""
        return self._name

    def count(self) -> int:
        """Return the number of records."""
        return sum(stream.count() for stream in self._streams)

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Yield the records with start <= index < stop.

        Raises:
            DataError: A part cannot be read.
        """
        base = 0
        for stream in self._streams:
            if stop is not None and base >= stop:
                return
            for record in stream.records(max(0, start - base), None if stop is None else stop - base):
                yield replace(record, index=base + record.index) if base else record
                if stop is not None and base + record.index == stop - 1:
                    return  # before the part is counted, which may mean to read it
            base += stream.count()


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not name or set(name) & set("+*@\"' \t\n"):
        raise ConfigError(f"{where} is no name of a data set", "use no blanks, quotes, +, * or @")
    if name in BUILTINS:
        raise ConfigError(f"{where} is the name of a built-in data set", "choose another one")


def _spec(entry: Any, where: str) -> DatasetSpec:
    try:
        fields = _Entry.model_validate(entry)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        path = ".".join(map(str, error["loc"]))
        if error["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: unknown field '{path}'", nearest(path, _Entry.model_fields)) from e
        if error["type"] == "missing":
            raise ConfigError(f"{where} has no {path}", "name its file, folder or pattern") from e
        expected = str(error["msg"]).removeprefix("Input should be ")
        raise ConfigError(f"{where}{f'.{path}' if path else ''} is {error['input']!r}", f"expected {expected}") from e
    try:
        return DatasetSpec(**fields.model_dump())
    except ConfigError as e:
        raise ConfigError(f"{where}: {e.message}", e.hint) from e
