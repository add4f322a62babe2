"""`/metrics` of a process that trains or curates: one address, and what is read when somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvila.errors import CapabilityError, ResourceError

if TYPE_CHECKING:
    from prometheus_client.registry import Collector


class Exporter:
    """Listens on an address until it is closed.

    Args:
        address: `host:port`; port 0 takes a free one.
        collectors: Who is asked.

    Raises:
        CapabilityError: prometheus-client is not installed.
        ResourceError: The address cannot be listened on.
    """

    def __init__(self, address: str, *collectors: Collector) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as e:
            raise CapabilityError("NVILA_METRICS_ADDRESS needs prometheus-client", "pip install 'nvila[train]'") from e
        registry = CollectorRegistry()
        for collector in collectors:
            registry.register(collector)
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host, registry)
        except OSError as e:
            raise ResourceError(
                f"NVILA_METRICS_ADDRESS={address}: {e.strerror or e}", "choose another port, or unset it"
            ) from e

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
