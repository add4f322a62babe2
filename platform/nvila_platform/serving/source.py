"""Where the served model and its adapters come from, looked at once at start and again for every update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.errors import ConfigError
from nvila_platform.model_source import DEFAULT_NAME, Located, fetch, locate
from nvila_platform.serving.identity import ModelIdentity
from nvila_platform.serving.served import Served, Version
from nvila_platform.settings import Settings

if TYPE_CHECKING:
    from nvila.inference.config import EngineConfig
    from nvila_platform.serving.engine import ChatEngine

# Loads a model folder with the adapters of these names.
Load = Callable[[Path, Mapping[str, Path]], "ChatEngine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the addresses mean now: who will answer, and which files that takes."""

    version: Version
    located: tuple[Located, ...]

    def same_model(self, other: Version) -> bool:
        """Whether these are the versions of `other`."""
        return [(one.name, one.version, one.digest) for one in self.version] == [
            (one.name, one.version, one.digest) for one in other
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A plan whose files are on this machine, checked."""

    version: Version
    folders: tuple[Path, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, of the adapters too."""
        return sum(path.stat().st_size for folder in self.folders for path in folder.glob("*.safetensors"))


class ModelSource:
    """Finds, fetches and loads what a server serves.

    Args:
        address: The model: a folder, `models:/NAME@ALIAS` or `s3://BUCKET/PREFIX`.
        settings: Where registry and stores are.
        load: Loads it.
        name: Name that clients ask for; None takes the registered one.
        version: Version to report, instead of the registered one, of what is found first.
        digest: Digest to report, instead of the artifact's, of what is found first.
        adapters: Addresses of adapters by the names that clients ask for.
    """

    def __init__(
        self,
        address: str | Path,
        settings: Settings,
        load: Load,
        *,
        name: str | None = None,
        version: str | None = None,
        digest: str | None = None,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        self._address = address
        self._settings = settings
        self._load = load
        self._name, self._given = name, (version, digest)
        self._first: Located | None = None
        self._adapters = dict(adapters or {})

    def look(self) -> Plan:
        """Find out what the addresses mean now; nothing is fetched.

        Raises:
            NvilaError: One of them means nothing, or its registry or store cannot be reached.
        """
        model = locate(self._address, self._settings)
        adapters = {name: locate(address, self._settings) for name, address in self._adapters.items()}
        self._first = self._first or model
        # What the caller knows of a model, nobody knows of the one that comes after it.
        number, digest = self._given if model == self._first else (None, None)
        identity = ModelIdentity(
            name=self._name or model.name, version=number or model.version, digest=digest or model.digest
        )
        version = Version(identity=identity, adapters=tuple(_identity(one, name) for name, one in adapters.items()))
        return Plan(version=version, located=(model, *adapters.values()))

    def fetch(self, plan: Plan) -> Fetched:
        """Bring the files here and check them against their digests.

        Raises:
            NvilaError: Some are missing or damaged, or the store cannot be reached.
        """
        folders = tuple(fetch(one, self._settings) for one in plan.located)
        dated = [
            replace(one, created=int(folder.stat().st_mtime)) for one, folder in zip(plan.version, folders, strict=True)
        ]
        return Fetched(version=Version(identity=dated[0], adapters=tuple(dated[1:])), folders=folders)

    def load(self, fetched: Fetched) -> Served:
        """Load the model and its adapters, and have each answer once.

        Raises:
            NvilaError: It cannot be loaded, or does not answer.
        """
        names = [one.name for one in fetched.version.adapters]
        engine = self._load(fetched.folders[0], dict(zip(names, fetched.folders[1:], strict=True)))
        served = Served(fetched.version, engine)
        served.warm_up()
        return served


def engine_loader(config: Callable[[], EngineConfig]) -> Load:
    """Return what loads our own engine; torch is imported only then."""

    def load(folder: Path, adapters: Mapping[str, Path]) -> ChatEngine:
        from nvila.inference.engine import Engine

        return Engine.load(folder, config(), adapters=adapters)

    return load


def parse_adapters(given: Sequence[str]) -> dict[str, str]:
    """Read `NAME=ADDRESS` words.

    Raises:
        ConfigError: One is none, or a name comes twice.
    """
    adapters: dict[str, str] = {}
    for word in given:
        name, equals, address = word.partition("=")
        if not (name and equals and address):
            raise ConfigError(
                f"--adapter {word!r} is not NAME=ADDRESS", "write --adapter colors=DIR or colors=models:/..."
            )
        if name in adapters:
            raise ConfigError(f"two adapters are named '{name}'", "give each a name of its own")
        adapters[name] = address
    return adapters


def _identity(located: Located, name: str) -> ModelIdentity:
    return ModelIdentity(name=name, version=located.version, digest=located.digest)


__all__ = ["DEFAULT_NAME", "Fetched", "ModelSource", "Plan", "engine_loader", "parse_adapters"]
