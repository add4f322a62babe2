"""Replacing the served model while it answers: look, fetch, load beside the old one, switch, free the old one.

Nothing of an update touches what is served before the new version has answered a question. Whatever goes wrong, the
old version goes on; `/health`, the metrics and the log say so.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nvila.errors import ConfigError, NvilaError, ResourceError
from nvila_platform.model_source import UNKNOWN

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from nvila_platform.serving.served import Served
    from nvila_platform.serving.service import ChatService
    from nvila_platform.serving.source import Fetched, Plan

logger = logging.getLogger(__name__)

Outcome = Literal["current", "updated", "failed", "no_memory", "unreachable"]
_OUTCOMES: tuple[Outcome, ...] = ("updated", "failed", "no_memory", "unreachable")
_CGROUP = Path("/sys/fs/cgroup")
_GIB = 2**30
# After the last answer of a version: until the frames that answered it are gone.
_FREE_AFTER_S = 0.5
_SWITCH_S = 30.0


class Source(Protocol):
    """Where versions come from."""

    def look(self) -> Plan:
        """Find out what is to be served now; cheap."""

    def fetch(self, plan: Plan) -> Fetched:
        """Bring its files here, checked."""

    def load(self, fetched: Fetched) -> Served:
        """Load it, warm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOptions:
    """How a server updates its model.

    Args:
        interval_s: Seconds between two looks at the address; 0 looks only on SIGHUP.
        memory_gib: Most that the process may take while two versions are loaded; None for what the machine, or the
            container, has.

    Raises:
        ConfigError: One of them is no such number.
    """

    interval_s: float = 0.0
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.interval_s < float("inf"):
            raise ConfigError(f"the update interval is {self.interval_s}", "give seconds, 0 for SIGHUP alone")
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ConfigError(f"--memory-gib is {self.memory_gib}", "give a positive number of GiB")

    def check(self, plan: Plan) -> None:
        """Check that another version could be told from what was found.

        Raises:
            ConfigError: It could not.
        """
        for one in plan.located:
            if self.interval_s and one.digest == UNKNOWN:
                raise ConfigError(
                    f"{one.address} has no manifest.json, so that no change of it is seen",
                    "leave out --update-interval, or serve models:/NAME@ALIAS",
                )

    @property
    def budget_bytes(self) -> int:
        """The most memory, in bytes."""
        return memory_limit() if self.memory_gib is None else int(self.memory_gib * _GIB)


class Updater:
    """Watches an address, in a thread of its own, and replaces what is served.

    Args:
        service: What serves.
        source: Where versions come from.
        options: When to look, and what memory there is.
        cache_bytes: What an engine takes beside its weights.
        registry: Where the metrics live.
    """

    def __init__(
        self,
        service: ChatService,
        source: Source,
        options: UpdateOptions,
        *,
        cache_bytes: Callable[[], int],
        registry: CollectorRegistry,
    ) -> None:
        from prometheus_client import Counter, Gauge

        self._service = service
        self._source = source
        self._options = options
        self._cache_bytes = cache_bytes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = threading.Event()
        self._begun = threading.Event()
        self._asked = False
        self._closed = threading.Event()
        self._plan: Plan | None = None
        self._refused: Plan | None = None
        self._status: dict[str, str] = {"state": "current"}
        self._thread = threading.Thread(target=self._run, name="updates", daemon=True)
        name = service.identity.name
        updates = Counter("nvila:model_updates", "Updates by outcome.", ("model_name", "outcome"), registry=registry)
        self._counted = {outcome: updates.labels(name, outcome) for outcome in _OUTCOMES}
        self._failing = Gauge(
            "nvila:model_update_failing",
            "Whether the version to serve could not be put in place.",
            ("model_name",),
            registry=registry,
        ).labels(name)
        self._loaded = Gauge(
            "nvila:models_loaded",
            "Versions in memory, two during an update.",
            ("model_name",),
            registry=registry,
        ).labels(name)

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note the loop that runs the server."""
        self._loop = loop
        self._begun.set()

    def start(self) -> None:
        """Begin to watch; a first version is served by now."""
        self._loaded.set(1)
        self._thread.start()

    def ask(self) -> None:
        """Look now, also for a version that was broken when it was tried; for SIGHUP."""
        self._asked = True
        self._wake.set()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop watching; a version that is being loaded is given up."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def status(self) -> dict[str, str]:
        """Return what `/health` says: the state, and of a failure the version and the kind of error."""
        return self._status

    def check(self, *, again: bool = False) -> Outcome:
        """Look once, and replace the model if another version is to be served.

        Args:
            again: Try a version that did not work before.
        """
        self._plan = None
        try:
            return self._update(again=again)
        except ResourceError as e:
            return self._failed("no_memory", e)
        except NvilaError as e:
            return self._failed("unreachable" if e.retryable else "failed", e)
        except Exception as e:
            # Loading runs code of several libraries; none of it may end the server that answers.
            logger.exception("an update failed")
            return self._failed("failed", NvilaError(type(e).__name__))

    def _update(self, *, again: bool) -> Outcome:
        plan = self._plan = self._source.look()
        if plan.same_model(self._service.version):
            self._well()
            return "current"
        if plan == self._refused and not again:
            return "failed"
        self._status = {"state": "loading", "version": plan.version.identity.version}
        self._put_in_place(plan)
        self._well()
        self._counted["updated"].inc()
        return "updated"

    def _put_in_place(self, plan: Plan) -> None:
        """Fetch, load and switch.

        Raises:
            NvilaError: The old version serves on.
        """
        if [one.name for one in plan.version] != [one.name for one in self._service.version]:
            raise ConfigError(f"the address now means '{plan.version.identity.name}'", "start another server for it")
        fetched = self._source.fetch(plan)
        self._check_memory(fetched)
        new = self._source.load(fetched)
        if self._closed.is_set():
            return
        free = threading.Event()
        self._loaded.inc()
        self._begun.wait()
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._switch(new, free.set), self._loop).result(_SWITCH_S)
        identity = new.version.identity
        logger.info("version %s (%s) is served now; older answers go on", identity.version, identity.digest[:19])
        threading.Thread(target=self._collect, args=(free,), name="free", daemon=True).start()

    async def _switch(self, new: Served, on_free: Callable[[], None]) -> None:
        self._service.replace(new, on_free)

    def _collect(self, free: threading.Event) -> None:
        """Wait until nobody needs the old version any more, and give its memory back."""
        while not free.wait(1.0):
            if self._closed.is_set():
                return
        # The frames that handled the last answer are still there when it ends.
        time.sleep(_FREE_AFTER_S)
        gc.collect()
        self._loaded.dec()
        logger.info("the old version has no more answers and is freed")

    def _check_memory(self, fetched: Fetched) -> None:
        """Refuse a version that does not fit beside the one that serves.

        Raises:
            ResourceError: With the figures.
        """
        used, budget = memory_used(), self._options.budget_bytes
        needed = fetched.weight_bytes + self._cache_bytes()
        if used + needed > budget:
            raise ResourceError(
                f"version {fetched.version.identity.version} needs about {needed / _GIB:.2f} GiB beside the "
                f"{used / _GIB:.2f} GiB in use, the budget is {budget / _GIB:.2f} GiB",
                "give the process more memory, or start it again with the new version",
            )

    def _well(self) -> None:
        self._refused = None
        self._failing.set(0)
        self._status = {"state": "current"}

    def _failed(self, outcome: Outcome, error: NvilaError) -> Outcome:
        """Say why the old version serves on; a version that does not work is not tried again unasked."""
        status = {"state": outcome, "error": error.code}
        wanted = "the model"
        if self._plan is not None:
            identity = self._plan.version.identity
            status |= {"version": identity.version, "digest": identity.digest}
            wanted = f"version {identity.version}"
            self._refused = None if outcome == "unreachable" else self._plan
        # A registry that stays away is no news at every look.
        level = logging.DEBUG if status == self._status else logging.ERROR
        serving = self._service.identity.version
        logger.log(level, "%s is not put in place, version %s serves on: %s", wanted, serving, error)
        self._counted[outcome].inc()
        self._failing.set(1)
        self._status = status
        return outcome

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(self._options.interval_s or None)
            self._wake.clear()
            if self._closed.is_set():
                return
            again, self._asked = self._asked, False
            self.check(again=again)


def memory_used() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_limit() -> int:
    """Return what this process may take: of its container, or of the machine."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int((_CGROUP / "memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return machine


def health_of(updater: Updater | None) -> dict[str, Any]:
    """Return what `/health` says about updates."""
    return {} if updater is None else {"update": updater.status()}
