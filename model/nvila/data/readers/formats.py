"""The formats that are read, and how one is recognised."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable
from typing import Any

from nvila.data.dataset import IMAGES_FILE
from nvila.data.readers.arrow import Arrow
from nvila.data.readers.json_array import BOM, JsonArray
from nvila.data.readers.json_lines import JsonLines
from nvila.data.readers.locations import Location, expand, files_below, files_in, reading
from nvila.data.readers.parquet import Parquet
from nvila.data.readers.rows import Format
from nvila.data.readers.webdataset import SIZES_FILE, WebDataset
from nvila.errors import ConfigError, DataError, nearest

FORMATS: dict[str, type[Format]] = {
    format.name: format for format in (JsonArray, JsonLines, Parquet, Arrow, WebDataset)
}
# What `datasets` writes beside its Arrow files.
_STATE_FILE, _SPLITS_FILE = "state.json", "dataset_dict.json"
_NO_DATA = (IMAGES_FILE, SIZES_FILE, _STATE_FILE, _SPLITS_FILE, "dataset_info.json", "dataset_infos.json")
_SNIFFED_BYTES = 4096
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257

_SPLIT = re.compile(r"(train|val|valid|validation|dev|test|eval)(?=[-_.]|$)", re.IGNORECASE)

FormattedFile = tuple[Location, type[Format]]


def data_files(location: Location, format: str | None = None) -> list[FormattedFile]:
    """Return the data files that a location stands for, each with its format.

    Args:
        location: A file, a folder or a pattern.
        format: Name of the format; None recognises it from names and contents.

    Raises:
        ConfigError: The format is unknown or cannot be recognised, or a folder holds data of several.
        DataError: Nothing is there, or nothing that can be read.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"'{format}' is not a data format", nearest(format, FORMATS))
    found: list[FormattedFile] = []
    for place in expand(location):
        if place.is_file():
            found.append((place, FORMATS[format] if format else _recognise(place)))
        else:
            found += _of_folder(place, format)
    return found


def _of_folder(folder: Location, format: str | None) -> list[FormattedFile]:
    if format in (None, Arrow.name):
        if folder.below(_SPLITS_FILE).is_file():
            splits = ", ".join(folder.below(str(name)).uri for name in _listed(folder.below(_SPLITS_FILE), "splits"))
            raise ConfigError(f"{folder.uri} holds several splits", f"name one of them: {splits}")
        if folder.below(_STATE_FILE).is_file():
            return [(folder.below(name), Arrow) for name in _saved_files(folder.below(_STATE_FILE))]
    # Subfolders only where the folder has no data itself: beside data they hold its media.
    by_format = _by_format(files_in(folder), format) or _by_format(files_below(folder), format)
    filled = sorted(by_format)
    if not filled:
        raise DataError(f"{folder.uri} holds no {format or 'data'} files", f"formats: {', '.join(FORMATS)}")
    if len(filled) > 1:
        raise ConfigError(f"{folder.uri} holds {' and '.join(filled)} files", "name the format, a pattern or a file")
    files = by_format[filled[0]]
    _refuse_splits(folder, files)
    return [(file, FORMATS[format] if format else _recognise(file)) for file in files]


def _refuse_splits(folder: Location, files: Iterable[Location]) -> None:
    """Ask which split is meant; read as one, a model would be trained on what it is tested on."""
    found: dict[str, str] = {}  # a pattern by split
    for file in files:
        place = folder.path
        for part in posixpath.relpath(file.path, folder.path).split("/"):
            if split := _SPLIT.match(part):
                found.setdefault(split[1].lower(), folder.at(posixpath.join(place, f"{split[1]}*")).uri)
            place = posixpath.join(place, part)
    if len(found) > 1:
        patterns = ", ".join(sorted(found.values()))
        raise ConfigError(
            f"{folder.uri} holds the splits {' and '.join(sorted(found))}", f"name one of them: {patterns}"
        )


def _by_format(files: Iterable[Location], format: str | None) -> dict[str, list[Location]]:
    """Sort data files by the format that their names say."""
    found: dict[str, list[Location]] = {}
    for file in files:
        for name in [format] if format else FORMATS:
            is_data = posixpath.basename(file.path) not in _NO_DATA
            if is_data and file.path.lower().endswith(FORMATS[name].suffixes):
                found.setdefault(name, []).append(file)
    return found


def _recognise(file: Location) -> type[Format]:
    path = file.path.lower()
    by_name = next((kind for kind in FORMATS.values() if path.endswith(kind.suffixes)), None)
    # Files that people call .json hold an array, or lines.
    if by_name is not None and by_name is not JsonArray:
        return by_name
    with reading(file.uri), file.open() as stream:
        head = stream.read(_SNIFFED_BYTES)
    if head.startswith(b"PAR1"):
        return Parquet
    if head.startswith(b"ARROW1"):
        return Arrow
    if head[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        return WebDataset
    text = head.removeprefix(BOM).lstrip()
    if text.startswith(b"["):
        return JsonArray
    if text.startswith(b"{") and _is_line(text):
        return JsonLines
    if by_name is JsonArray:
        raise DataError(f"{file.uri} holds neither an array of records nor one record a line", "write one of them")
    raise ConfigError(f"the format of {file.uri} is not recognised", f"name it: {', '.join(FORMATS)}")


def _is_line(text: bytes) -> bool:
    """Tell whether the first line is a whole record, as far as can be seen."""
    line, separator, _ = text.partition(b"\n")
    if not separator and len(text) >= _SNIFFED_BYTES // 2:
        return True
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _saved_files(state: Location) -> list[str]:
    """Return the names of the Arrow files that `save_to_disk` wrote, in its order."""
    entries = _listed(state, "_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    found = [name for name in names if isinstance(name, str) and name and "/" not in name]
    if len(found) < len(names):
        raise DataError(f"{state.uri} names files that are none", "write the data set again with save_to_disk")
    return found


def _listed(file: Location, name: str) -> list[Any]:
    try:
        values = json.loads(file.read())[name]
        if isinstance(values, list):
            return values
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise DataError(f"{file.uri} has no list '{name}'", "write the data set again with save_to_disk")
