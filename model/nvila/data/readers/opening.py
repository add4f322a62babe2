"""Open a data set: a path or address, and how to read it."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from nvila.data.dataset import IMAGES_FILE
from nvila.data.readers.formats import FormattedFile, data_files
from nvila.data.readers.json_array import JsonArray
from nvila.data.readers.json_lines import JsonLines
from nvila.data.readers.locations import WILDCARDS, FileSystems, Location, locate
from nvila.data.readers.media import MediaFolder, TableFile
from nvila.data.readers.parsing import KNOWN_FIELDS, RecordParser
from nvila.data.readers.rows import DataFile
from nvila.data.readers.stream import FileStream, Part
from nvila.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """What is known about a data set before it is opened.

    Args:
        path: A file, a folder, a pattern, or one of these at `s3://bucket/...`.
        format: Name of its format; None recognises it.
        media_dir: Folder that paths in records start from and must stay in; None is the folder of each data file.
        source: Source of every record; None takes what records name, else the name of the data set.
        rename: Fields of the files by the names that they have here, such as `{"query": "question"}`.
    """

    path: str
    format: str | None = None
    media_dir: str | None = None
    source: str | None = None
    rename: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.rename.values():
            if name not in KNOWN_FIELDS:
                raise ConfigError(f"rename: there is no field '{name}'", nearest(name, KNOWN_FIELDS))


def open_dataset(
    spec: DatasetSpec,
    *,
    name: str | None = None,
    filesystems: FileSystems | None = None,
    base: Location | None = None,
) -> FileStream:
    """Open a data set of files.

    Args:
        spec: Where it is and how to read it.
        name: Its name; None takes the file's or folder's.
        filesystems: File systems by scheme besides local files, such as `{"s3": ...}`.
        base: Folder that relative paths start from; None is the working directory.

    Raises:
        ConfigError: The format or the location cannot be told.
        DataError: There is no data.

    Example:
        >>> stream = open_dataset(DatasetSpec(path="llava.jsonl", media_dir="images"))  # doctest: +SKIP
        >>> [record.problem for record in stream.records(stop=2)]  # doctest: +SKIP
        [None, None]
    """
    location = locate(spec.path, filesystems, base)
    name = name or _dataset_name(location.path)
    media_dir = locate(spec.media_dir, filesystems, base) if spec.media_dir is not None else None
    files = data_files(location, spec.format)
    root = _common_folder(file for file, _ in files)
    formats = {kind: kind() for _, kind in files}
    tables = {} if media_dir is not None else _image_tables(files)
    parts = []
    for file, kind in files:
        short = posixpath.relpath(file.path, root)
        parser = RecordParser(
            name=short,
            stem=_stem(short),
            uri=file.uri,
            media=MediaFolder(home=file.parent, root=media_dir or file.parent, table=tables.get(file.parent.path)),
            source=spec.source or name,
            force_source=spec.source is not None,
            rename=spec.rename,
        )
        parts.append(Part(file=DataFile(location=file, name=short), format=formats[kind], parse=parser))
    return FileStream(name, parts)


def _image_tables(files: Iterable[FormattedFile]) -> dict[str, TableFile | None]:
    """Return the image tables that lie beside samples, by folder."""
    tables: dict[str, TableFile | None] = {}
    for file, kind in files:
        if kind in (JsonArray, JsonLines) and file.parent.path not in tables:
            tables[file.parent.path] = TableFile.beside(file, IMAGES_FILE)
    return tables


def _common_folder(files: Iterable[Location]) -> str:
    return posixpath.commonpath([posixpath.dirname(file.path) for file in files])


def _dataset_name(path: str) -> str:
    """Return the name of a file, or of the folder that a pattern looks into."""
    names = [name for name in path.split("/") if not WILDCARDS & set(name)]
    return _stem(names[-1]) if names and names[-1] else path


def _stem(path: str) -> str:
    """Return a path without the suffixes of its file."""
    folder, name = posixpath.split(path)
    return posixpath.join(folder, name.partition(".")[0] or name)
