"""The HTML report: what it shows, what it survives, and that it needs nothing but itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila_pipelines.report import write_plots, write_report

if TYPE_CHECKING:
    from tests.pipelines.report.conftest import FakeRun, MakeRun

ORDER = ["accuracy", "kinds", "sizes", "times", "quantization", "losses", "speed", "rates", "cost", "selection"]
ORDER += ["examples", "gate", "registered", "served", "lineage", "recipe", "machine"]
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Collects what the tests ask of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def named(self, *names: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def report_of(run: FakeRun, tmp_path: Path, **changes: Any) -> str:
    parts: dict[str, Any] = {"artifacts": run.artifacts, "summary": run.summary, "lineage": run.lineage} | changes
    return write_report(**parts, out=tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def section_of(html: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    assert found, name
    return found[0]


def without(run: FakeRun, *steps: str) -> dict[str, Path]:
    return {step: path for step, path in run.artifacts.items() if step not in steps}


@pytest.fixture
def run(make_run: MakeRun) -> FakeRun:
    return make_run()


def test_page_needs_nothing_but_itself(finished_page: str) -> None:
    page = Page(finished_page)
    assert len(finished_page.encode()) < 3 * 2**20
    assert not page.named("script", "link", "iframe", "object", "base", "form")
    sources = [tag.get("src", "") for tag in page.named("img")]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    links = [value for _, tag in page.tags for name, value in tag.items() if name in ("href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import|@font-face", finished_page)
    assert not [name for _, tag in page.tags for name in tag if name.startswith("on")]
    assert "default-src 'none'" in finished_page


def test_page_is_well_formed_and_accessible(finished_page: str) -> None:
    page = Page(finished_page)
    assert (page.unbalanced, page.open) == ([], [])
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert sorted(ids) == sorted(set(ids)), "several drawings must not share identifiers"
    targets = {link[1:] for tag in page.named("a", "use") for link in (tag.get("href"), tag.get("xlink:href")) if link}
    targets |= set(re.findall(r"url\(#([^)]+)\)", finished_page))
    assert targets <= set(ids)
    assert all(tag.get("alt") for tag in page.named("img"))
    assert all(tag.get("role") == "img" and tag.get("aria-label") for tag in page.named("svg"))
    assert len(page.named("svg")) == 4 + 4 + 8 + 4 + 1 + 1
    assert len(page.named("caption")) == len(page.named("table"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_sections_come_in_order(finished_page: str) -> None:
    assert re.findall(r'<section id="(\w+)">', finished_page) == ORDER


def test_title_line_names_verdict_model_run_and_time(finished: FakeRun, finished_page: str) -> None:
    header = finished_page.partition("</header>")[0]
    for text in ("quickstart", "passed", "models:/nvila-quickstart/3", finished.summary["run_id"], "3 min 50 s"):
        assert text in header


def test_headline_compares_models_with_blind_baselines(finished: FakeRun, finished_page: str) -> None:
    rows = re.findall(r"<tr><th.*?</tr>", section_of(finished_page, "accuracy"), re.DOTALL)
    shares = [match[0] for row in rows if (match := re.search(r"[\d.]+ %", row))]
    accuracy = finished.summary["accuracy"]
    expected = [accuracy[name] for name in ("majority", "text_majority", "wide", "quantized")] + [49 / 50]
    assert shares == [f"{share * 100:.1f} %" for share in expected]
    assert "49 of 50 questions over HTTP, median 38 ms" in rows[-1]


def test_kinds_end_with_all_questions(finished_page: str) -> None:
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', section_of(finished_page, "kinds"))
    assert [name for name, _ in rows] == ["open_color", "open_shape", "yes_no_color", "yes_no_shape", "all"]
    numbers = [[float(cell.replace(",", "")) for cell in re.findall(r">([-+\d.,]+)</td>", cells)] for _, cells in rows]
    assert sum(row[0] for row in numbers[:-1]) == numbers[-1][0] == 400
    assert all(row[4] == pytest.approx(row[3] - row[2], abs=0.11) for row in numbers)


def test_text_from_data_is_escaped(run: FakeRun, tmp_path: Path) -> None:
    attack = "<script>alert('x')</script>"
    run.summary["recipe"]["name"] = run.summary["model"] = run.summary["run_id"] = attack
    run.summary["versions"][attack] = attack
    run.summary["steps"][attack] = 1.0
    lineage = dataclasses.replace(run.lineage, step=attack, code_version=attack)
    html = report_of(run, tmp_path, artifacts=without(run, "train", "curate"), lineage=lineage)
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#39;question&#39;)&lt;/script&gt;" in section_of(html, "examples")
    assert Page(html).unbalanced == []


def test_source_names_are_text_and_never_formulas_or_markup(run: FakeRun, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("scores.parquet", "selection.parquet"):
        table = pq.read_table(run.artifacts["curate"] / name)
        sources = [f'"><b>$\\frac{{1}}$ {number % 40}' for number in range(table.num_rows)]
        index = table.column_names.index("source")
        pq.write_table(table.set_column(index, "source", pa.array(sources)), run.artifacts["curate"] / name)
    text = section_of(report_of(run, tmp_path), "selection")
    assert "<b>" not in text
    assert "the largest 12 of 40 sources are drawn" in text
    assert len(Page(text).named("figure")) == 12 + 1


def test_refused_run_says_why_parts_are_missing(run: FakeRun, tmp_path: Path) -> None:
    summary = {**run.summary, "passed": False, "model": None, "served": None}
    html = report_of(
        run, tmp_path, artifacts=without(run, "train", "curate", "register", "serve"), summary=summary, lineage=None
    )
    assert "refused" in html.partition("</header>")[0]
    assert "not registered" in html.partition("</header>")[0]
    assert "The gate refused the model, so the step register did not run." in section_of(html, "registered")
    assert "The gate refused the model, so the step serve did not run." in section_of(html, "served")
    assert "Served model" not in section_of(html, "accuracy")
    assert "<table" in section_of(html, "gate")
    assert "There is nothing to show." in section_of(html, "lineage")


def test_quantization_is_shown_by_part(run: FakeRun, tmp_path: Path) -> None:
    text = section_of(report_of(run, tmp_path), "quantization")
    assert "SmoothQuant" in text
    assert "2.25 (1.00 to 3.50)" in text
    assert "0.25 of tokens" in text
    assert "0.0100 (rounded 0.0200)" in text
    assert text.count("left wide") == 1


def damage_scores(run: FakeRun) -> None:
    (run.artifacts["curate"] / "scores.parquet").write_bytes(b"not parquet")


def cut_sizes(run: FakeRun) -> None:
    (run.artifacts["quantize"] / "sizes.json").write_text('{"wide": ')


def change_sizes(run: FakeRun) -> None:
    (run.artifacts["quantize"] / "sizes.json").write_text('{"narrow": {}}')


def break_metrics(run: FakeRun) -> None:
    with (run.artifacts["train"] / "metrics.jsonl").open("a") as out:
        out.write('{"stage": "ali')


def remove_predictions(run: FakeRun) -> None:
    (run.artifacts["evaluate-quantized"] / "predictions.jsonl").unlink()


def remove_images(run: FakeRun) -> None:
    (run.artifacts["data"] / "images.parquet").unlink()


@pytest.mark.parametrize(
    ("damage", "section", "why"),
    [
        pytest.param(damage_scores, "selection", "step curate cannot be read: scores.parquet", id="not-parquet"),
        pytest.param(cut_sizes, "sizes", "sizes.json cannot be read", id="cut-json"),
        pytest.param(change_sizes, "sizes", "unexpected form", id="other-json"),
        pytest.param(break_metrics, "losses", "metrics.jsonl has a broken line 121", id="cut-line"),
        pytest.param(remove_predictions, "examples", "has no predictions.jsonl", id="no-predictions"),
        pytest.param(remove_images, "examples", "step data has no images.parquet", id="no-images"),
    ],
)
def test_damaged_output_costs_only_its_section(
    run: FakeRun, tmp_path: Path, damage: Callable[[FakeRun], None], section: str, why: str
) -> None:
    damage(run)
    # Nothing is drawn: the steps with plots are absent or the damaged ones.
    plotted = {"selection": ("train",), "losses": ("curate",)}.get(section, ("train", "curate"))
    html = report_of(run, tmp_path, artifacts=without(run, *plotted))
    assert why in section_of(html, section)
    assert "<table" in section_of(html, "kinds")


def test_speed_and_rates_have_a_panel_a_stage_and_mark_skipped_steps(finished_page: str) -> None:
    speed, rates = section_of(finished_page, "speed"), section_of(finished_page, "rates")
    assert re.findall(r"<figcaption><strong>(.*?)</strong>", speed) == ["align", "vision", "language", "instruct"]
    assert re.findall(r"<figcaption><strong>(.*?)</strong>", rates)[:3] == [
        "align: learning rate",
        "align: gradient norm",
        "vision: learning rate",
    ]
    figures = speed.split("<figure")[1:]
    assert ["2 steps skipped" in figure for figure in figures] == [False, True, False, False]
    assert [figure.count("skipped") > 2 for figure in figures] == [False, True, False, False], "the legend of the marks"
    assert "255 samples/s at the end, memory 829.4 MiB" in speed


def test_cost_has_steps_stages_and_a_sum(finished_page: str) -> None:
    text = section_of(finished_page, "cost")
    assert re.findall(r'<th scope="col"[^>]*>(.*?)</th>', text) == ["Step", "Core-hours", "kWh estimated", "EUR"]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text)
    assert [name for name, _ in rows][2:8] == ["train", "- align", "- vision", "- language", "- instruct", "quantize"]
    cells = {name: re.findall(r'<td class="n"[^>]*>(.*?)</td>', row) for name, row in rows}
    assert cells["train"] == ["0.0328", "0.000328", "0.00164"]
    assert cells["- align"] == ["0.00657", "-", "-"]
    assert float(cells["all"][0]) == pytest.approx(220.2 / 3600, rel=0.01)
    assert "by the prices in the settings" in text


def test_run_without_history_or_manifests_says_so(run: FakeRun, tmp_path: Path) -> None:
    (run.artifacts["train"] / ".history.jsonl").unlink()
    for directory in run.artifacts.values():
        (directory / "manifest.json").write_text("{")
    html = report_of(run, tmp_path, artifacts=without(run, "curate"))
    assert "has no .history.jsonl" in section_of(html, "speed")
    assert "There is nothing to show." in section_of(html, "cost")
    assert "<svg" in section_of(html, "losses")


def test_plots_are_written_as_files(finished: FakeRun, tmp_path: Path) -> None:
    folder = write_plots(finished.artifacts, tmp_path / "plots", tmp_path)
    assert folder == tmp_path / "plots"
    names = {path.name for path in folder.iterdir()}
    assert {"loss-align.svg", "speed-vision.svg", "rates-align-gradient-norm.svg"} <= names
    assert len(names) == 4 + 4 + 8
    text = (folder / "speed-vision.svg").read_text()
    assert text.startswith("<svg")
    assert "var(--" not in text
    assert write_plots({}, tmp_path / "none", tmp_path) is None
    assert not (tmp_path / "none").exists()


def test_absent_step_is_named(run: FakeRun, tmp_path: Path) -> None:
    html = report_of(run, tmp_path, artifacts=without(run, "train", "curate", "evaluate-quantized"))
    assert "This run has no output of the step curate." in section_of(html, "selection")
    assert "This run has no evaluation of the quantized model." in section_of(html, "kinds")


def test_nothing_at_all_still_makes_a_page(tmp_path: Path) -> None:
    html = write_report({}, {}, None, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "unfinished" in html
    assert Page(html).unbalanced == []


def test_evaluations_are_found_by_what_they_hold(finished: FakeRun, finished_page: str, tmp_path: Path) -> None:
    swapped = {"evaluate-1": finished.artifacts["evaluate-quantized"], "evaluate": finished.artifacts["evaluate-wide"]}
    html = report_of(finished, tmp_path, artifacts=swapped)
    assert section_of(html, "kinds") == section_of(finished_page, "kinds")


def test_secrets_in_the_recipe_are_hidden(finished_page: str) -> None:
    text = section_of(finished_page, "recipe")
    assert "s3cr3t" not in text
    assert "precision: fp8" in text


def test_gate_shows_value_limit_and_interval(run: FakeRun, tmp_path: Path) -> None:
    path = run.artifacts["gate"] / "verdict.json"
    verdict = json.loads(path.read_text())
    verdict["checks"][0] |= {"passed": False, "value": 0.93125, "limit": 0.95}
    path.write_text(json.dumps(verdict))
    html = report_of(run, tmp_path, artifacts=without(run, "train", "curate"))
    text = section_of(html, "gate")
    first = re.findall(r"<tr><th scope=\"row\">.*?</tr>", text, re.DOTALL)[0]
    assert "refused" in first
    assert re.findall(r">([\d.]+)</td>", first) == ["0.9313", "0.95"]
    assert "95 % interval" in text
    assert "37 answers became wrong and 21 became right" in text


def test_plots_take_their_colours_and_font_from_the_page(finished_page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", finished_page, re.DOTALL)
    assert not [color for svg in drawings for color in re.findall(r"(?:fill|stroke): (#\w+)", svg)]
    assert not [svg for svg in drawings if "font-family" in svg or "<style" in svg]
    assert any("var(--kept)" in svg for svg in drawings)


def test_same_run_gives_the_same_page(finished: FakeRun, finished_page: str, tmp_path: Path) -> None:
    written = re.compile(r"<dt>Written</dt><dd>.*?</dd>")
    assert written.sub("", report_of(finished, tmp_path)) == written.sub("", finished_page)


def test_font_list_and_figures_stay_in_the_workspace(
    finished: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import json, os, sys; from pathlib import Path; from nvila_pipelines.report import write_report\n"
        "root, artifacts = Path(sys.argv[1]), {step: Path(path) for step, path in json.loads(sys.argv[2]).items()}\n"
        "write_report(artifacts, {'workspace': str(root)}, None, root / 'report.html')\n"
        "import matplotlib; print(matplotlib.get_cachedir(), os.environ.get('MPLCONFIGDIR'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MPLCONFIGDIR"}
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ws"), json.dumps(finished.artifacts, default=str)],
        env=environment | {"HOME": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(tmp_path / "ws" / "cache" / "matplotlib"), "None"], done.stderr
    assert list(home.iterdir()) == []
    # Read again as they are, which shows in what the next report says.
    figures = sorted((tmp_path / "ws" / "cache" / "matplotlib" / "figures").iterdir())
    assert figures
    for path in figures:
        path.write_text(path.read_text().replace("</svg>\n", "<!--kept--></svg>\n"))
    with monkeypatch.context() as patch:
        patch.setattr("nvila_pipelines.report.plots._svg", lambda *_, **__: pytest.fail("drawn again"))
        page = write_report(finished.artifacts, {"workspace": str(tmp_path / "ws")}, None, tmp_path / "again.html")
    assert "<!--kept-->" in page.read_text(encoding="utf-8")
