"""From a digest back to everything it was made of, by walking manifests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nvila.errors import ArtifactError
from nvila_platform.artifacts import FileEntry
from nvila_platform.store import ArtifactStore

EXTERNAL = ""
# Folders of training: the number of the stage and its name.
_STAGE = re.compile(r"\d+-[a-z0-9_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """One artifact and, by input name, the artifacts it was made of.

    Args:
        step: The step that made it; `EXTERNAL` for a digest that is not in the store, such as a downloaded data set.
        digest: The artifact's digest.
        code_version: Version of the code that made it.
        finished_at: UTC time in ISO form.
        config: The configuration's values under dotted names.
        metrics: Numbers that the step reported.
        inputs: The artifacts it was made of.
        stages: Digest of the checkpoint of each stage that a training left in it, by folder: `1-align`.
    """

    step: str
    digest: str
    code_version: str
    finished_at: str
    config: Mapping[str, str | int | float | bool | None]
    metrics: Mapping[str, float]
    inputs: Mapping[str, Lineage]
    stages: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain nested form for `--json` and reports."""
        return {
            "step": self.step,
            "digest": self.digest,
            "code_version": self.code_version,
            "finished_at": self.finished_at,
            "config": dict(self.config),
            "metrics": dict(self.metrics),
            "stages": dict(self.stages),
            "inputs": {name: node.to_dict() for name, node in self.inputs.items()},
        }

    def walk(self) -> Iterator[Lineage]:
        """Yield this artifact and all it was made of; one that was used twice comes twice."""
        yield self
        for child in self.inputs.values():
            yield from child.walk()

    def lines(self) -> Iterator[str]:
        """Yield the tree as indented text, one artifact a line."""
        yield from self._lines("", 0)

    def _lines(self, name: str, depth: int) -> Iterator[str]:
        label = f"{name}: " if name else ""
        made_by = self.step or "external"
        yield f"{'  ' * depth}{label}{made_by} {self.digest[:12]} {self.code_version}".rstrip()
        for stage, digest in self.stages.items():
            yield f"{'  ' * (depth + 1)}{stage}: stage {digest[:12]}"
        for child_name, child in self.inputs.items():
            yield from child._lines(child_name, depth + 1)


def trace(store: ArtifactStore, digest: str) -> Lineage:
    """Return the lineage of the artifact with this digest.

    Args:
        store: Where the manifests are.
        digest: The whole digest, as an answer, a registry version or a manifest carries it.

    Raises:
        ArtifactError: The store has no such artifact.
    """
    node = _trace(store, digest, above=frozenset())
    if node.step == EXTERNAL:
        raise ArtifactError(
            f"no artifact with digest {digest} in the store", "check the digest and the workspace or NVILA_STORE_URI"
        )
    return node


def _trace(store: ArtifactStore, digest: str, above: frozenset[str]) -> Lineage:
    # A step that only copies its input has its digest's own step among its inputs; the walk must end all the same.
    ref = store.find(digest) if digest not in above else None
    if ref is None:
        return Lineage(step=EXTERNAL, digest=digest, code_version="", finished_at="", config={}, metrics={}, inputs={})
    manifest = store.manifest(ref)
    return Lineage(
        step=manifest.step,
        digest=digest,
        code_version=manifest.code_version,
        finished_at=manifest.finished_at,
        config=dict(_flat(manifest.config, "")),
        metrics=dict(manifest.metrics),
        inputs={name: _trace(store, value, above | {digest}) for name, value in sorted(manifest.inputs.items())},
        stages=_stages(manifest.outputs),
    )


def _stages(outputs: Iterable[FileEntry]) -> dict[str, str]:
    """Return a digest of each folder that a stage of training wrote, made of its files' names and digests."""
    files: dict[str, list[list[str]]] = {}
    for entry in outputs:
        folder, _, name = entry.path.partition("/")
        if name and _STAGE.fullmatch(folder):
            files.setdefault(folder, []).append([name, entry.sha256])
    return {
        folder: hashlib.sha256(json.dumps(sorted(files[folder])).encode()).hexdigest()
        for folder in sorted(files, key=lambda one: int(one.partition("-")[0]))
    }


def _flat(value: Any, name: str) -> Iterator[tuple[str, str | int | float | bool | None]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, ", ".join(str(item) for item in value)
    elif value is None or isinstance(value, str | int | float | bool):
        yield name, value
