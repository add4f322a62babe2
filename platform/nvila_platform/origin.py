"""From an answer back to where its model came from: endpoint, version, the gate's verdict, every artifact below."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from nvila.errors import ArtifactError, ConfigError, InfrastructureError, NvilaError
from nvila.progress import SILENT, Reporter
from nvila_platform.artifacts import read_manifest
from nvila_platform.lineage import EXTERNAL, Lineage, trace
from nvila_platform.registry import REGISTRY, ModelVersion, aliases_of, resolve, version_tags, versions_of
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactStore, open_store

GATE = "nvila.gate"
# Tags of a version that a reader of its origin wants to see.
SHOWN_TAGS = ("nvila.licence", "nvila.base_models", "nvila.code_version", "nvila.run_url", "nvila.gate.state")
_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{64}")
_TIMEOUT_S = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What an endpoint says about itself.

    Args:
        url: Its address.
        name: Name that clients ask for.
        version: Version in the registry, or `unregistered`.
        digest: Digest of what it serves.
    """

    url: str
    name: str
    version: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate said.

    Args:
        digest: Of the gate's artifact.
        passed: Whether the model may be deployed.
        checks: Name of each check and whether it passed.
    """

    digest: str
    passed: bool
    checks: dict[str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Everything that is known about where a model came from.

    Args:
        asked: What was asked about.
        served: The endpoint, when that was asked about.
        version: Version in the registry; None when it has none.
        aliases: Names that point at the version.
        tags: Facts that the registry keeps about it.
        verdict: Of the gate; None when no gate saw it.
        artifact: The artifact and all it was made of.
        evidence: The gate's artifact and all it was made of; None when no gate saw it.
    """

    asked: str
    served: Served | None
    version: ModelVersion | None
    aliases: tuple[str, ...]
    tags: dict[str, str]
    verdict: Verdict | None
    artifact: Lineage
    evidence: Lineage | None

    @property
    def root(self) -> Lineage:
        """The node from which everything is reached."""
        return self.evidence or self.artifact

    def artifacts(self) -> list[Lineage]:
        """Return every artifact once, the newest first."""
        found = [*self.root.walk(), *self.artifact.walk()]
        return list({node.digest: node for node in found}.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the plain form."""
        return {
            "asked": self.asked,
            "served": asdict(self.served) if self.served else None,
            "model": self.version.model_uri if self.version else "",
            "aliases": list(self.aliases),
            "tags": self.tags,
            "verdict": asdict(self.verdict) if self.verdict else None,
            "artifact": self.artifact.to_dict(),
        }


def find_origin(settings: Settings, asked: str) -> Origin:
    """Find out where a model came from.

    Args:
        settings: Where the store and the registry are.
        asked: Address of an endpoint, `models:/NAME@ALIAS`, `models:/NAME/VERSION`, a digest, or an artifact's folder.

    Raises:
        ConfigError: It is none of these, or there is no such model or folder.
        ArtifactError: The store does not have it.
        InfrastructureError: The endpoint, the registry or the store cannot be reached.
    """
    store = open_store(settings)
    served = ask_endpoint(asked) if asked.startswith(("http://", "https://")) else None
    version = resolve(settings, asked) if asked.startswith(REGISTRY) else None
    digest = version.digest if version else _digest(asked, served)
    if version is None:
        version = _version(versions_of(settings, digest), served)
    tags = version_tags(settings, version) if version else {}
    gate = tags.get(GATE, "")
    evidence = trace(store, gate) if gate and store.find(gate) else None
    return Origin(
        asked=asked,
        served=served,
        version=version,
        aliases=tuple(aliases_of(settings, version)) if version else (),
        tags={name: tags[name] for name in SHOWN_TAGS if name in tags},
        verdict=_verdict(store, gate) if evidence else None,
        artifact=trace(store, digest),
        evidence=evidence,
    )


def ask_endpoint(url: str) -> Served:
    """Ask a server of ours what it serves; that needs no key.

    Raises:
        InfrastructureError: It does not answer, or is not ready.
        ConfigError: It is no server of ours, or does not know the digest of its model.
    """
    address = f"{url.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - the caller's own endpoint
            said = json.load(answer)
        served = Served(url=url, name=said["model"], version=said["version"], digest=said["digest"])
    except urllib.error.HTTPError as e:
        e.close()  # it is the answer, whose connection is open
        if e.code == HTTPStatus.SERVICE_UNAVAILABLE:
            raise InfrastructureError(f"{address}: the model is not ready", "try again later") from e
        raise ConfigError(f"{address} answers {e.code}", "give the address of a server of `nvila serve`") from e
    except (KeyError, TypeError) as e:
        raise ConfigError(f"{address} is not of `nvila serve`", "give the address of one that is") from e
    except (OSError, ValueError) as e:
        reason = str(getattr(e, "reason", e)).partition("\n")[0]
        hint = "is it running, and reachable from here?"
        raise InfrastructureError(f"{address} does not answer: {reason}", hint) from e
    if not _DIGEST.fullmatch(served.digest):
        hint = "only what came out of the store has a lineage; serve it by its registry address"
        raise ConfigError(f"{url} serves a model of digest {served.digest!r}", hint)
    return replace(served, digest=_bare(served.digest))


def verify_all(
    store: ArtifactStore, artifacts: list[Lineage], reporter: Reporter = SILENT
) -> Iterator[tuple[Lineage, str]]:
    """Read every artifact again and compare each file with its digest.

    Yields:
        The artifact and what is wrong with it; an empty text when nothing is.
    """
    for number, node in enumerate(artifacts, 1):
        reporter.progress("verify", number, len(artifacts))
        if node.step == EXTERNAL:
            yield node, "not in the store: it came from outside"
            continue
        try:
            ref = store.find(node.digest)
            if ref is None:
                raise ArtifactError(f"{node.digest[:12]} is gone from the store", "")
            store.fetch(ref)
        except NvilaError as e:
            yield node, e.message
        else:
            yield node, ""


def _digest(asked: str, served: Served | None) -> str:
    if served:
        return served.digest
    if _DIGEST.fullmatch(asked):
        return _bare(asked)
    if Path(asked).is_dir():
        for folder in (Path(asked), Path(asked).parent):
            manifest = read_manifest(folder)
            if manifest is not None:
                return manifest.digest
        raise ConfigError(f"{asked} is no artifact: it has no manifest", "give the folder of a finished step")
    raise ConfigError(
        f"{asked} is no endpoint, model, digest or folder",
        "give http://HOST:PORT, models:/NAME@ALIAS, the 64 digits of a digest, or an artifact's folder",
    )


def _version(versions: list[ModelVersion], served: Served | None) -> ModelVersion | None:
    """Choose the version that the endpoint names, or the newest."""
    if served is not None:
        named = [one for one in versions if str(one.version) == served.version]
        versions = [one for one in named if one.name == served.name] or named or versions
    return versions[0] if versions else None


def _verdict(store: ArtifactStore, digest: str) -> Verdict | None:
    ref = store.find(digest)
    if ref is None:
        return None
    try:
        found = json.loads((store.fetch(ref) / "verdict.json").read_text(encoding="utf-8"))
        checks = {str(check["name"]): bool(check["passed"]) for check in found["checks"]}
        return Verdict(digest=digest, passed=bool(found["passed"]), checks=checks)
    except (OSError, ValueError, KeyError, TypeError, ArtifactError):
        # The tree says what there is; `--verify` says what is wrong with it.
        return None


def _bare(digest: str) -> str:
    return digest.removeprefix("sha256:")
