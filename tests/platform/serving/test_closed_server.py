"""A server that is closed, fetches from one host and has a media store: what strangers and forbidden addresses get."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.bad_requests import CHAT, V1, V2, body, check, image, picture, serves

KEY = "nvila-key-of-the-tests"
PNG = picture()


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory, start_words: Any) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("closed")
    (folder / "keys").write_text(
        f"tests {hashlib.sha256(KEY.encode()).hexdigest()}\nslow {hashlib.sha256(b'slow').hexdigest()} 6\n"
    )
    store = folder / "media"
    (store / "inner").mkdir(parents=True)
    (store / "inner" / "a.png").write_bytes(PNG)
    (store / ".hidden.png").write_bytes(PNG)
    (folder / "outside.png").write_bytes(PNG)
    (store / "link.png").symlink_to(folder / "outside.png")
    args = ("--api-keys", str(folder / "keys"), "--media-host", "media.test", "--production")
    with (
        start_words(folder, args=(*args, "--media-store", str(store))) as running,
        httpx.Client(base_url=running.base_url, trust_env=False, timeout=30.0) as client,
    ):
        client.headers["authorization"] = f"Bearer {KEY}"
        yield client


FORBIDDEN = [
    "http://media.test/x.png",
    "https://other.test/x.png",
    "https://media.test.other.test/x.png",
    "https://notmedia.test/x.png",
    "https://sub.media.test/x.png",
    "https://media.test:8443/x.png",
    "https://media.test:99999/x.png",
    "https://user:word@media.test/x.png",
    "https://media.test@other.test/x.png",
    "https://other.test#@media.test/x.png",
    "https://other.test\\@media.test/x.png",
    "https://media.test%00.other.test/x.png",
    "https://media.test /x.png",
    "https://127.0.0.1/x.png",
    "https://127.1/x.png",
    "https://2130706433/x.png",
    "https://0x7f000001/x.png",
    "https://017700000001/x.png",
    "https://0/x.png",
    "https://[::1]/x.png",
    "https://[::ffff:127.0.0.1]/x.png",
    "https://[fe80::1%25eth0]/x.png",
    "https://169.254.169.254/latest/meta-data/",
    "https://metadata.google.internal/",
    "https://localhost/x.png",
    "https://kubernetes.default.svc/api",
    "https://minio.nvila.svc.cluster.local/x.png",
    "https://m\u00e9dia.test/x.png",
    "https:///x.png",
    "https://media.test/" + "a" * 3000,
]


@pytest.mark.parametrize("url", FORBIDDEN, ids=lambda url: url[8:50])
def test_forbidden_addresses(closed: httpx.Client, url: str) -> None:
    answer = closed.post(CHAT, json=image(url))
    check(answer, 400, "media_forbidden")
    assert answer.json()["error"]["param"] == "messages[0].content[0].image_url.url"
    serves(closed)


def test_an_allowed_host_that_does_not_answer_tells_nothing(closed: httpx.Client) -> None:
    check(closed.post(CHAT, json=image("https://media.test/x.png")), 400, "media_unavailable")
    serves(closed)


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("store:../outside.png", "invalid_media_reference"),
        ("store:/etc/passwd", "invalid_media_reference"),
        ("store:inner/../../outside.png", "invalid_media_reference"),
        ("store:inner//a.png", "invalid_media_reference"),
        ("store:.hidden.png", "invalid_media_reference"),
        ("store:inner\\a.png", "invalid_media_reference"),
        ("store:", "invalid_media_reference"),
        ("store:a%2e%2e/b", "invalid_media_reference"),
        ("store:link.png", "media_not_found"),
        ("store:inner", "media_not_found"),
        ("store:none.png", "media_not_found"),
    ],
)
def test_references_that_lead_nowhere(closed: httpx.Client, reference: str, code: str) -> None:
    check(closed.post(CHAT, json=image(reference)), 400, code)
    serves(closed)


def test_a_reference_is_read_from_the_store(closed: httpx.Client) -> None:
    answer = closed.post(CHAT, json=image("store:inner/a.png"))
    assert answer.json()["choices"][0]["message"]["content"] == "40x30"


@pytest.mark.parametrize(
    "value",
    [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, V1, V2, "/openai/v1/models"])
def test_without_the_key_nothing_is_answered(closed: httpx.Client, value: str | None, path: str) -> None:
    headers = {} if value is None else {"authorization": value}
    method = "GET" if path.endswith("models") else "POST"
    answer = httpx.request(method, f"{closed.base_url}{path}", headers=headers, json=body(), trust_env=False)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY not in answer.text
    serves(closed)


def test_probes_and_metrics_need_no_key_and_there_is_no_playground(closed: httpx.Client) -> None:
    for path in ("/health", "/metrics", "/v2/health/live", "/v2/health/ready"):
        assert httpx.get(f"{closed.base_url}{path}", trust_env=False).status_code == 200
    for path in ("/playground", "/playground/tiles", "/openapi.json"):
        assert closed.get(path).status_code == 404


def test_a_key_with_a_rate_is_held_to_it(closed: httpx.Client) -> None:
    headers = {"authorization": "Bearer slow"}
    answers = [closed.get("/openai/v1/models", headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 429, 429]
    assert answers[1].json()["error"]["code"] == "rate_limited"
    assert 1 <= int(answers[1].headers["retry-after"]) <= 10
    serves(closed)
