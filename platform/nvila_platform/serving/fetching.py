"""The one door through which media from other hosts come in.

Only https, only hosts on the list, only the port that https has. The name is resolved here, every address is checked,
and the connection goes to the address that was checked: a second answer of the name server changes nothing. Every
redirect is looked at like a first address. Bytes are counted while they arrive, and the clock runs from the beginning.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from nvila_platform.serving.addresses import Address, HostRules
from nvila_platform.serving.errors import ApiError

if TYPE_CHECKING:
    import httpcore

Resolve = Callable[[str, int], Sequence[str]]

_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_HTTPS_PORT = 443
_HEADERS = [(b"User-Agent", b"nvila"), (b"Accept", b"image/*, video/*"), (b"Accept-Encoding", b"identity")]
_LONGEST_URL = 2048


class MediaDoor:
    """Fetches media from hosts on a list.

    Args:
        hosts: Which hosts.
        timeout_s: For one medium, all redirects included.
        port: The only port of https addresses.
        resolve: Stands in for the system's resolver.
    """

    def __init__(
        self, hosts: HostRules, *, timeout_s: float, port: int = _HTTPS_PORT, resolve: Resolve | None = None
    ) -> None:
        self._hosts = hosts
        self._timeout_s = timeout_s
        self._port = port
        self._resolve = resolve or resolve_name
        # The system's authorities, or those of SSL_CERT_FILE.
        self._tls = ssl.create_default_context()

    async def fetch(self, url: str, *, most: int, param: str) -> bytes:
        """Return the bytes behind an https address.

        Args:
            url: The address.
            most: Most bytes.
            param: Path of the request field, for the error.

        Raises:
            ApiError: It may not be fetched, cannot be, takes too long or is too large.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(url, most)
        except TimeoutError as e:
            message = f"fetching the medium took over {self._timeout_s:g} s; send it as a data: URI"
            raise ApiError(400, "media_timeout", message, param=param) from e
        except ApiError as e:
            raise ApiError(e.status, e.code, e.message, param=param) from e

    async def _follow(self, url: str, most: int) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            answer = await self._get(self._checked(url), most)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise ApiError(400, "media_unavailable", f"the medium's host redirects more than {_MAX_REDIRECTS} times")

    def _checked(self, url: str) -> str:
        """Return the address as it is asked for.

        Raises:
            ApiError: It may not be asked for.
        """
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or ""), parts.port or self._port
        except ValueError as e:
            raise _forbidden("the address of the medium cannot be read") from e
        if len(url) > _LONGEST_URL or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            raise _forbidden("the address of the medium is too long or has characters that must be escaped")
        if parts.scheme.lower() != "https":
            raise _forbidden("media are fetched over https only")
        if parts.username is not None or parts.password is not None:
            raise _forbidden("the address of a medium may not hold a user or password")
        if port != self._port:
            raise _forbidden(f"media are fetched from port {self._port} only")
        if not self._hosts.allows_name(host.lower()):
            raise _forbidden("media are not fetched from this host; send the medium as a data: URI")
        return parts._replace(scheme="https", fragment="").geturl()

    async def _get(self, url: str, most: int) -> bytes | str:
        """Ask once; return the body, or where it is said to be."""
        import httpcore

        backend = _pinned_backend(self._hosts, self._resolve)
        try:
            async with (
                httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=backend, retries=0) as pool,
                pool.stream("GET", url, headers=[(b"Host", _host_header(url)), *_HEADERS]) as answer,
            ):
                headers = {name.lower(): value for name, value in answer.headers}
                if answer.status in _REDIRECTS and b"location" in headers:
                    return headers[b"location"].decode("latin-1")
                _check_answer(answer.status, headers, most)
                body = bytearray()
                async for piece in answer.aiter_stream():
                    body += piece
                    if len(body) > most:
                        raise _too_large(most)
                return bytes(body)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError, ssl.SSLError) as e:
            # Which of them it was would tell what answers inside.
            raise ApiError(400, "media_unavailable", "the medium cannot be fetched from its host") from e


def resolve_name(host: str, port: int) -> list[str]:
    """Ask the system's resolver for the addresses of a name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(address[0]) for *_, address in found]


def _pinned_backend(hosts: HostRules, resolve: Resolve) -> Any:
    """Make what opens connections: it resolves once, checks, and connects to what it checked."""
    from httpcore import AnyIOBackend, AsyncNetworkBackend

    class Pinned(AsyncNetworkBackend):
        async def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,  # the library's signature
            local_address: str | None = None,
            socket_options: Iterable[Any] | None = None,
        ) -> httpcore.AsyncNetworkStream:
            found = await asyncio.to_thread(resolve, host, port)
            address = _allowed(found, hosts)
            return await AnyIOBackend().connect_tcp(address, port, timeout, local_address, socket_options)

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(seconds)

    return Pinned()


def _allowed(found: Sequence[str], hosts: HostRules) -> str:
    """Return the address to connect to; one that is not allowed spoils the name, whatever else it has."""
    addresses: list[Address] = [ipaddress.ip_address(one.partition("%")[0]) for one in found]
    if not addresses or not all(hosts.allows_address(one) for one in addresses):
        raise _forbidden("the host of the medium has an address that nothing is fetched from")
    return str(addresses[0])


def _check_answer(status: int, headers: dict[bytes, bytes], most: int) -> None:
    if status != 200:
        raise ApiError(400, "media_unavailable", f"the medium's host answered {status}")
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise ApiError(400, "media_unavailable", "the medium's host sends it compressed, which is not asked for")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > most:
        raise _too_large(most)


def _too_large(most: int) -> ApiError:
    return ApiError(413, "media_too_large", f"the medium has over {most} bytes; send a smaller one")


def _forbidden(message: str) -> ApiError:
    return ApiError(400, "media_forbidden", message)


def _host_header(url: str) -> bytes:
    return urlsplit(url).netloc.encode()
