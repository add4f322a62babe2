"""`/metrics` of a curation: the shards that are there, then the choice; and what training says of it later."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nvila.data.mixtures import Registry
from nvila_pipelines.curation.watching import CurationWatch
from nvila_pipelines.training.curated import curation_counts
from nvila_pipelines.training.mixtures import write_registry

Curate = Callable[..., int]


def scraped(port: int) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (one.labels["source"], one.labels["state"]): one.value
        for family in families
        for one in family.samples
        if one.name == "nvila_curation_records"
    }


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = int(probe.getsockname()[1])
    monkeypatch.setenv("NVILA_METRICS_ADDRESS", str(free))
    return free


def test_a_scrape_sees_shards_as_they_appear_and_then_the_choice(
    curate: Curate, models: dict[str, Path], llava: Any, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvila.curation.scoring_run import ScoringRun
    from nvila_pipelines.curation.finishing import finish

    seen: list[dict[tuple[str, str], float]] = []
    read = ScoringRun._read

    def reading(self: ScoringRun, number: int, phase: str) -> Any:
        seen.append(scraped(port))
        return read(self, number, phase)

    def finishing(*words: Any) -> Any:
        seen.append(scraped(port))
        return finish(*words)

    monkeypatch.setattr(ScoringRun, "_read", reading)
    monkeypatch.setattr("nvila_pipelines.curation.dataset_run.finish", finishing)
    data = llava(24, {9: "{broken"})
    words = ("--small", models["small"], "--large", models["large"], "--shard-size", "10", "--keep-rate", "vqa=25%")
    assert curate(data, *words, "--out", "out", "--threads", "1") == 0
    first, second, third, chosen = seen
    assert first == {}
    # Record 9 stands in the first shard, under the name of the file.
    assert second == {("vqa", "scored"): 5, ("shapes", "scored"): 4, ("llava", "quarantined"): 1}
    assert third == {("vqa", "scored"): 10, ("shapes", "scored"): 9, ("llava", "quarantined"): 1}
    assert {key: value for key, value in chosen.items() if value} == {
        ("vqa", "kept"): 3, ("vqa", "dropped"): 9, ("shapes", "kept"): 6, ("shapes", "dropped"): 5,
        ("llava", "quarantined"): 1,
    }  # fmt: skip
    with pytest.raises(OSError, match="refused"):
        scraped(port)
    # The training on it says the same again.
    from nvila.data.readers.locations import locate
    from nvila.data.selection_counts import count_selections

    repeated = count_selections([locate(str(tmp_path / "out"))])
    assert {(source, state): n for source, states in repeated.items() for state, n in states.items()} == {
        key: value for key, value in chosen.items() if value
    }


def test_a_port_that_is_taken_costs_a_notice_only(
    curate: Curate, scored: Path, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(socket.create_server(("127.0.0.1", port))):
        assert curate("--out", "out", "--keep-rate", "0.25") == 0
    assert "no /metrics: NVILA_METRICS_ADDRESS=127.0.0.1:" in capfd.readouterr().err


def test_a_damaged_shard_is_left_out_of_a_scrape(tmp_path: Path) -> None:
    from nvila.curation.shards import Shards

    (tmp_path / "scores-00000.parquet").write_bytes(b"nothing")
    watch = CurationWatch()
    watch.follow(Shards(directory=tmp_path, size=10, digest="x"))
    assert watch.counts() == {}


def test_training_finds_the_selections_behind_its_stages(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": ["a", "b"], "source": ["own", "own"], "delta": [1.0, 0.0], "kept": [True, False]})
    for name in ("step", "mine"):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "selection.parquet")
    (tmp_path / "data.jsonl").write_text('{"id": "a", "question": "Q", "answer": "A"}\n')
    (tmp_path / "data").mkdir()

    def config(*names: str) -> Any:
        return type("Config", (), {"stages": [type("Stage", (), {"data": name})() for name in names]})()

    def counted(*names: str) -> Any:
        return curation_counts(config(*names), tmp_path / "data", tmp_path / "step", Registry(), {})

    # What the step before left counts; names of the train step's own data are no files.
    assert counted("selected", "captions") == {"own": {"kept": 1, "dropped": 1}}
    both = counted("selected", f"{tmp_path}/data.jsonl@{tmp_path}/mine")
    assert both == {"own": {"kept": 2, "dropped": 2}}
    # With a registry, its names are all there are.
    write_registry(None, tmp_path / "data")
    (tmp_path / "step" / "selection.parquet").unlink()
    assert counted(f"{tmp_path}/data.jsonl@{tmp_path}/mine") == {"own": {"kept": 1, "dropped": 1}}
