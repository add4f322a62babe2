"""What the server answers with: a loaded version, the names it goes by, and who still needs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from nvila.data.records import Message, Part
from nvila.errors import ConfigError, nearest
from nvila_platform.serving.cost import VisualRates, rates_of
from nvila_platform.serving.errors import ApiError

if TYPE_CHECKING:
    from nvila_platform.serving.engine import ChatEngine
    from nvila_platform.serving.identity import ModelIdentity

logger = logging.getLogger(__name__)

_WARM_UP_SIDE = 64
_SHOWN = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A model and the adapters over it, as one thing that is loaded, served and replaced together.

    Args:
        identity: The model.
        adapters: What is selectable by name beside it.

    Raises:
        ConfigError: Two of them have one name.
    """

    identity: ModelIdentity
    adapters: tuple[ModelIdentity, ...] = ()

    def __post_init__(self) -> None:
        names = [one.name for one in self]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two models are named '{twice}'", "give each its own, with --name or --adapter")

    def __iter__(self) -> Iterator[ModelIdentity]:
        yield self.identity
        yield from self.adapters

    def find(self, name: str) -> ModelIdentity:
        """Return the model of this name.

        Raises:
            ApiError: There is none.
        """
        for one in self:
            if one.name == name:
                return one
        shown = name[:_SHOWN]
        message = f"model '{shown}' is not served here; {nearest(shown, [one.name for one in self])}"
        raise ApiError(404, "model_not_found", message, param="model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The model that a request is for; it stays the same to the end of the answer, whatever is loaded meanwhile."""

    served: Served
    identity: ModelIdentity
    engine: ChatEngine
    rates: VisualRates


class Served:
    """A loaded version.

    Args:
        version: Who it is.
        engine: Answers; one with adapters has a method `adapter` that returns the engine of each.

    Attributes:
        users: Requests that were admitted to it and have not ended; counted in the event loop's thread.
        on_free: Called when they have all ended, once another version is served.
    """

    def __init__(self, version: Version, engine: ChatEngine) -> None:
        self.version = version
        self.engine = engine
        self.users = 0
        self.on_free: Callable[[], None] | None = None
        adapted: Any = engine
        engines = [engine, *(cast("ChatEngine", adapted.adapter(one.name)) for one in version.adapters)]
        self._targets = {
            identity.name: Target(served=self, identity=identity, engine=own, rates=rates_of(own))
            for identity, own in zip(version, engines, strict=True)
        }

    def target(self, name: str | None = None) -> Target:
        """Return what answers under a name; None stands for the model itself.

        Raises:
            ApiError: Nothing does.
        """
        return self._targets[(self.version.identity if name is None else self.version.find(name)).name]

    def warm_up(self) -> None:
        """Answer a question with each, about an image where it can see, so that no caller pays for what is made once.

        Raises:
            NvilaError: It cannot answer.
        """
        began = time.monotonic()
        for target in self._targets.values():
            _answer_once(target.engine)
        logger.info("warmed up in %.1f s", time.monotonic() - began)


def _answer_once(engine: ChatEngine) -> None:
    from PIL import Image

    from nvila.inference.engine import SamplingParams

    sees = getattr(engine, "processor", None) is not None
    parts = [Part(type="text", value="hello")]
    if sees:
        parts.insert(0, Part(type="image", value="it"))
    images = {"it": Image.new("RGB", (_WARM_UP_SIDE, _WARM_UP_SIDE))} if sees else {}
    generation = engine.stream(
        [Message(role="user", content=tuple(parts))], images, SamplingParams(max_tokens=2, temperature=0.0)
    )
    try:
        generation.deliver(lambda _: None)
    finally:
        generation.close()


@dataclass(slots=True)
class Lineage:
    """Which model answers a request; written where that is decided, read where the headers are made."""

    identity: ModelIdentity | None = field(default=None)


LINEAGE: ContextVar[Lineage | None] = ContextVar("lineage", default=None)


def answered_by(identity: ModelIdentity) -> None:
    """Note which model answers the request at hand."""
    lineage = LINEAGE.get()
    if lineage is not None:
        lineage.identity = identity
