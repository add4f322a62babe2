"""The door for media of other hosts, against a real TLS server on this machine."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nvila.errors import ConfigError
from nvila_platform.serving.addresses import HostRules, rules
from nvila_platform.serving.errors import ApiError
from nvila_platform.serving.fetching import MediaDoor

HOST = "media.test"
LOOPBACK = "127.0.0.0/8"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.headers['host']}{self.path}")
        getattr(self, f"say_{self.path.split('?')[0].strip('/')}")()

    def say_image(self) -> None:
        self.say(200, b"pixels")

    def say_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1000))
        except OSError:
            pass

    def say_slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass

    def say_large(self) -> None:
        self.say(200, b"x" * 2000)

    def say_zipped(self) -> None:
        self.say(200, b"xx", ("content-encoding", "gzip"))

    def say_gone(self) -> None:
        self.say(404, b"internal words")

    def say_to(self) -> None:
        self.say(302, b"", ("location", self.path.partition("?")[2]))

    def say(self, status: int, content: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("content-length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    def __init__(self, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that do not trust us, or leave, are part of the tests."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate that signs itself, for `HOST`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def server(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    made = Server(certificate)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def fetch(
    server: Server, path: str, *, networks: tuple[str, ...] = (LOOPBACK,), found: tuple[str, ...] = ("127.0.0.1",)
) -> bytes:
    door = MediaDoor(
        rules([HOST], networks), timeout_s=3.0, port=server.server_port, resolve=lambda _host, _port: found
    )
    url = f"https://{HOST}:{server.server_port}{path}"
    return asyncio.run(door.fetch(url, most=1000, param="p"))


def refusal(server: Server, path: str, **options: tuple[str, ...]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetch(server, path, **options)
    assert caught.value.param == "p"
    assert "internal" not in caught.value.message
    return caught.value


def test_a_medium_of_a_host_on_the_list_is_fetched(server: Server) -> None:
    assert fetch(server, "/image") == b"pixels"
    assert server.asked == [f"{HOST}:{server.server_port}/image"]


@pytest.mark.parametrize(
    "found",
    [("127.0.0.1",), ("10.0.0.1",), ("8.8.8.8", "127.0.0.1"), ("::1",), ("::ffff:127.0.0.1",), ()],
    ids=["loopback", "private", "one-of-two", "six", "mapped", "none"],
)
def test_a_name_that_leads_inside_is_not_connected_to(server: Server, found: tuple[str, ...]) -> None:
    assert refusal(server, "/image", networks=(), found=found).code == "media_forbidden"
    assert server.asked == []


def test_the_name_is_asked_for_once_and_the_checked_address_is_used(server: Server) -> None:
    """A name server that answers otherwise the second time changes nothing."""
    answers = [["127.0.0.1"], ["10.0.0.1"]]
    door = MediaDoor(
        rules([HOST], [LOOPBACK]), timeout_s=2.0, port=server.server_port, resolve=lambda *_: answers.pop(0)
    )
    url = f"https://{HOST}:{server.server_port}/image"
    assert asyncio.run(door.fetch(url, most=1000, param="p")) == b"pixels"
    assert answers == [["10.0.0.1"]]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/large", 413, "media_too_large"),
        ("/endless", 413, "media_too_large"),
        ("/slow", 400, "media_timeout"),
        ("/zipped", 400, "media_unavailable"),
        ("/gone", 400, "media_unavailable"),
    ],
)
def test_size_and_time_are_bounded_while_it_arrives(server: Server, path: str, status: int, code: str) -> None:
    began = time.monotonic()
    error = refusal(server, path)
    assert (error.status, error.code) == (status, code)
    assert time.monotonic() - began < 8.0


def test_redirects_are_followed_a_little(server: Server) -> None:
    here = f"https://{HOST}:{server.server_port}"
    assert fetch(server, f"/to?{here}/image") == b"pixels"
    assert fetch(server, "/to?/image") == b"pixels"
    assert refusal(server, "/to?/to?/to?/to?/image").code == "media_unavailable"


@pytest.mark.parametrize(
    "target",
    [
        "http://media.test/image",
        "https://other.test/image",
        "https://127.0.0.1/image",
        "file:///etc/passwd",
        "//localhost/",
    ],
)
def test_redirects_are_looked_at_like_first_addresses(server: Server, target: str) -> None:
    assert refusal(server, f"/to?{target}").code == "media_forbidden"
    assert len(server.asked) == 1


def test_a_certificate_that_nobody_signed_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    assert refusal(server, "/image").code == "media_unavailable"
    assert server.asked == []


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_addresses_of_the_inside_are_known_in_every_form(address: str, allowed: bool) -> None:
    assert HostRules(hosts=(HOST,)).allows_address(ipaddress.ip_address(address)) is allowed


def test_a_private_network_can_be_opened_by_name() -> None:
    made = rules([HOST], ["10.1.0.0/16"])
    assert made.allows_address(ipaddress.ip_address("10.1.9.9"))
    assert not made.allows_address(ipaddress.ip_address("10.2.0.1"))


@pytest.mark.parametrize(
    ("rule", "host", "allowed"),
    [
        ("a.test", "a.test", True),
        ("a.test", "b.a.test", False),
        ("*.a.test", "b.a.test", True),
        ("*.a.test", "a.test", False),
        ("*.a.test", "xa.test", False),
        ("*.local", "printer.local", False),
        ("store.nvila.svc", "store.nvila.svc", True),
    ],
)
def test_names_are_matched_whole(rule: str, host: str, allowed: bool) -> None:
    assert rules([rule], []).allows_name(host) is allowed


@pytest.mark.parametrize(("hosts", "networks"), [(["a b"], []), (["UPPER.test"], []), ([HOST], ["10.0.0.1/8"])])
def test_rules_that_mean_nothing_are_refused(hosts: list[str], networks: list[str]) -> None:
    with pytest.raises(ConfigError):
        rules(hosts, networks)
