"""The terminal table, the number formats and the drawn lineage."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila_pipelines.report import formats, lineage_graph, render_summary
from nvila_pipelines.report.terminal import next_commands
from nvila_platform.lineage import Lineage

if TYPE_CHECKING:
    from tests.pipelines.report.conftest import FakeRun, MakeRun


@pytest.fixture
def run(make_run: MakeRun) -> FakeRun:
    return make_run()


def printed(summary: dict[str, Any], width: int = 120) -> str:
    from rich.console import Console

    out = io.StringIO()
    render_summary(summary, Console(file=out, width=width))
    return out.getvalue()


def test_table_shows_what_a_run_ends_with(run: FakeRun) -> None:
    sizes = {"wide": {"total": 4_816_896}, "quantized": {"total": 1_109_536}}
    text = printed({**run.summary, "sizes": sizes})
    assert "Used:   0.0612 core-hours, 0.00061 kWh (estimated), 0.0031 EUR" in text
    for row in ("blind.*37.3 %", "blind.*66.8 %", "wide.*4.6 MiB", "quantized.*points.*1.1 MiB"):
        assert re.search(row, text), row
    assert re.search("served.*98.0 %.*49 of 50 over HTTP, median 38 ms", text)
    assert re.search("train.*1 min 58 s", text)
    assert f"Report: {run.summary['report']}" in text
    assert "nvila serve models:/nvila-quickstart/3" in text
    assert "nvila ui" in text


def test_refused_run_offers_no_endpoint() -> None:
    text = printed({"passed": False, "accuracy": {"wide": 0.5, "quantized": 0.4}, "steps": {"data": 1.0}})
    assert "refused" in text
    assert "-10.00 points" in text
    assert "nvila serve" not in text


def test_names_are_no_markup_and_paths_are_quoted() -> None:
    text = printed({"run_id": "[red]x[/red]", "workspace": "my work", "steps": {"[bold]": 1.0}, "report": "/a [b]/r"})
    assert "[red]x[/red]" in text
    assert "[bold]" in text
    assert "/a [b]/r" in text
    assert "--workspace 'my work'" in text


def test_usual_workspace_need_not_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    usual, other = (next_commands({"workspace": str(tmp_path / name)}) for name in ("nvila-workspace", "other"))
    assert usual[0][0] == "nvila ui"
    assert other[0][0] == f"nvila ui --workspace {tmp_path / 'other'}"


def test_long_paths_stay_on_one_line(run: FakeRun) -> None:
    report = "/" + "long/" * 30 + "report.html"
    assert f"Report: {report}" in printed({**run.summary, "report": report}, width=60)


def test_terminal_table_needs_no_plotting() -> None:
    code = (
        "import sys; from rich.console import Console; from nvila_pipelines.report import render_summary\n"
        "render_summary({}, Console()); print(sorted({'matplotlib', 'jinja2', 'PIL', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.percent(None), "-"),
        (formats.percent(float("nan")), "-"),
        (formats.points(-0.0014), "-0.14"),
        (formats.points(None), "-"),
        (formats.size(None), "-"),
        (formats.size(900), "900 B"),
        (formats.size(3 * 2**30), "3.0 GiB"),
        (formats.duration(None), "-"),
        (formats.duration(59.96), "1 min 0 s"),
        (formats.duration(7380), "2 h 3 min"),
        (formats.number(0.00123456), "0.001235"),
        (formats.number(9673), "9,673"),
        (formats.step_time(0.0), "reused"),
        (formats.step_time(0.04), "0.0 s"),
        (formats.number(True), "True"),
        (formats.number(None), "-"),
    ],
)
def test_numbers_look_alike_everywhere(text: str, expected: str) -> None:
    assert text == expected


def node(step: str, digest: str, **inputs: Lineage) -> Lineage:
    return Lineage(step=step, digest=digest, code_version="1", finished_at="", config={}, metrics={}, inputs=inputs)


def test_lineage_draws_every_artifact_once(run: FakeRun) -> None:
    svg = lineage_graph.draw(run.lineage)
    steps = re.findall(r'<text class="step"[^>]*>(.*?)</text>', svg)
    assert steps == [
        *("easy_vqa", "data", "curate", "train", "evaluate wide", "quantize", "evaluate quantized", "gate", "register")
    ]
    assert svg.count('class="edge"') == 14


def test_what_an_artifact_was_made_of_stands_above_it(run: FakeRun) -> None:
    svg = lineage_graph.draw(run.lineage)
    heights = {
        digest: float(y) for y, digest in re.findall(r'<text class="digest" x="\d+" y="(\d+)">(\w+)</text>', svg)
    }

    def check(item: Lineage) -> None:
        for child in item.inputs.values():
            assert heights[child.digest[:12]] < heights[item.digest[:12]]
            check(child)

    check(run.lineage)


def test_lineage_of_a_copy_of_itself_ends() -> None:
    copied = node("copy", "a" * 64, source=node("", "a" * 64))
    svg = lineage_graph.draw(copied)
    assert (svg.count('class="node"'), svg.count('class="edge"'), ">copy</text>" in svg) == (1, 0, True)


def test_listing_has_whole_digests_and_inputs() -> None:
    rows = lineage_graph.listing(node("train", "b" * 64, data=node("", "a" * 64)))
    assert rows == (("train", "b" * 64, "1", "data " + "a" * 12), ("data", "a" * 64, "1", ""))


def test_listing_names_the_checkpoints_of_stages() -> None:
    train = replace(node("train", "b" * 64, data=node("", "a" * 64)), stages={"1-align": "c" * 64})
    (row,) = [row for row in lineage_graph.listing(train) if row[1] == "b" * 64]
    assert row[3] == f"data {'a' * 12}, 1-align {'c' * 12}"
