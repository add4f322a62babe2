"""scripts/draw_dashboards.py: variables, numbers and panels, drawn from what a Prometheus answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import draw_dashboards
import pytest

Serve = Callable[[type[BaseHTTPRequestHandler]], AbstractContextManager[int]]


def test_variables_are_put_in_and_unknown_ones_match_anything() -> None:
    query = 'rate(x{model="$model",pod=~"$pod"}[$__rate_interval])'
    assert (
        draw_dashboards.filled(query, {"model": "eyes", "__rate_interval": "5m"})
        == 'rate(x{model="eyes",pod=~".*"}[5m])'
    )


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (0.354, "percentunit", "35.4 %"),
        (0.012, "s", "12 ms"),
        (12.0, "s", "12 s"),
        (0.0, "s", "0 s"),
        (2.5e9, "bytes", "2.5 GB"),
        (1234.0, "", "1.23 k"),
        (0.42, "currencyUSD", "$ 0.42"),
        (math.nan, "s", "-"),
    ],
)
def test_numbers_are_shown_as_people_read_them(value: float, unit: str, said: str) -> None:
    assert draw_dashboards.shown(value, unit) == said


def test_a_dashboard_is_drawn_and_panels_without_an_answer_are_named(
    tmp_path: Path, serve_http: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            query = parse_qs(address.query)["query"][0]
            asked.append((address.path, query))
            points = {"value": [1.0, "3"]} if address.path.endswith("/query") else {"values": [[1.0, "1"], [2.0, "2"]]}
            result = [] if query == "nothing" else [{"metric": {"pod": "a"}, **points}]
            status = 400 if query == "wrong" else 200
            body = {"error": "parse error"} if status == 400 else {"data": {"result": result}}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    def panel(kind: str, title: str, query: str, x: int) -> dict[str, Any]:
        place = {"x": x, "y": 0, "w": 8, "h": 8}
        return {"type": kind, "title": title, "gridPos": place, "targets": [{"expr": query}]}

    panels = [
        panel("timeseries", "Lines", "over_time", 0),
        panel("stat", "One", "now", 8),
        panel("stat", "None", "nothing", 16),
    ]
    monkeypatch.setattr(draw_dashboards, "DASHBOARDS", tmp_path)
    (tmp_path / "small.json").write_text(json.dumps({"title": "Small", "panels": panels}))
    with serve_http(Handler) as port:
        words = ["--prometheus", f"http://127.0.0.1:{port}", "--dest", str(tmp_path / "out")]
        assert draw_dashboards.main(words) == 0
        assert "2 panels drawn, 1 without data; None" in capsys.readouterr().out
        assert asked == [("/api/v1/query_range", "over_time"), ("/api/v1/query", "now"), ("/api/v1/query", "nothing")]
        assert (tmp_path / "out" / "dashboard-small.png").read_bytes().startswith(b"\x89PNG")

        (tmp_path / "small.json").write_text(
            json.dumps({"title": "Small", "panels": [panel("stat", "Bad", "wrong", 0)]})
        )
        assert draw_dashboards.main(words) == 1
        assert "error: Bad: wrong: parse error" in capsys.readouterr().err
    assert draw_dashboards.main(words) == 1
    assert "does not answer" in capsys.readouterr().err
