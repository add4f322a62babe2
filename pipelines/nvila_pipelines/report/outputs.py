"""Read access to the step directories of one run, with an error that says why something is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvila.errors import ArtifactError
from nvila_platform.artifacts import read_manifest

AFTER_GATE = ("register", "serve")
_HINT = "run the same command again: finished steps are reused"


class Outputs:
    """The step directories of one run.

    Args:
        directories: Step name to directory. The evaluations are found by what they hold, under any name that starts
            with "evaluate".
        refused: Whether the gate refused the model, which explains the absence of what comes after it.
    """

    def __init__(self, directories: Mapping[str, Path], *, refused: bool) -> None:
        self._directories = dict(directories)
        self._refused = refused

    def file(self, step: str, name: str) -> Path:
        """Return the path of an existing file or directory.

        Raises:
            ArtifactError: The step did not run, or its directory lacks the file.
        """
        directory = self._directories.get(step)
        if directory is None:
            if self._refused and step in AFTER_GATE:
                raise ArtifactError(f"The gate refused the model, so the step {step} did not run.")
            raise ArtifactError(f"This run has no output of the step {step}.")
        path = directory / name
        if not path.exists():
            raise ArtifactError(f"The output of the step {step} has no {name}.", _HINT)
        return path

    def json(self, step: str, name: str) -> dict[str, Any]:
        """Return a file that holds one JSON object.

        Raises:
            ArtifactError: It is missing or no JSON object.
        """
        return _json_object(self.file(step, name))

    def rows(self, step: str, name: str) -> Iterator[dict[str, Any]]:
        """Yield the objects of a JSON-lines file.

        Raises:
            ArtifactError: It is missing or a line is no JSON object.
        """
        return _json_rows(self.file(step, name))

    def columns(self, step: str, name: str, names: Sequence[str]) -> dict[str, list[Any]]:
        """Return columns of a Parquet file.

        Raises:
            ArtifactError: It is missing, damaged or lacks a column.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.file(step, name)
        try:
            table = pq.read_table(path, columns=list(names))
            return {column: table[column].to_pylist() for column in names}
        except (OSError, KeyError, pa.ArrowException) as e:
            raise ArtifactError(f"The file {name} of the step {step} cannot be read: {e}", _HINT) from e

    def metrics(self) -> dict[str, dict[str, float]]:
        """Return what each step's manifest reports, by step; a directory without a sound one is left out."""
        found = {}
        for step, directory in self._directories.items():
            try:
                manifest = read_manifest(directory)
            except ArtifactError:
                continue
            if manifest is not None:
                found[step] = dict(manifest.metrics)
        return found

    def evaluation(self, model: str) -> tuple[dict[str, Any], Path]:
        """Return the results of the model ("wide" or "quantized") and the directory that they are in.

        Raises:
            ArtifactError: No evaluation of that model is there, or one is damaged.
        """
        for step, directory in self._directories.items():
            path = directory / "results.json"
            if step.startswith("evaluate") and path.exists():
                results = _json_object(path)
                if results.get("model") == model:
                    return results, directory
        raise ArtifactError(f"This run has no evaluation of the {model} model.")


def predictions(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the predictions that an evaluation directory holds.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    path = directory / "predictions.jsonl"
    if not path.exists():
        raise ArtifactError("The evaluation has no predictions.jsonl.", _HINT)
    return _json_rows(path)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ArtifactError(f"The file {path.name} cannot be read: {e}", _HINT) from e
    if not isinstance(value, dict):
        raise ArtifactError(f"The file {path.name} is no JSON object.", _HINT)
    return value


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ArtifactError(f"The file {path.name} has a broken line {number}: {e}", _HINT) from e
            if not isinstance(row, dict):
                raise ArtifactError(f"Line {number} of the file {path.name} is no JSON object.", _HINT)
            yield row
