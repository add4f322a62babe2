"""`/metrics` of a training process, scraped over HTTP."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nvila.errors import CapabilityError, DataError, ResourceError
from nvila.training.config import TrainConfig
from nvila_platform.settings import Settings
from nvila_platform.training import TrainingObserver, observe_training
from nvila_platform.training.curation import CurationCollector
from nvila_platform.training.exporter import Exporter
from nvila_platform.training.scrape import ScrapeSink

if TYPE_CHECKING:
    from tests.platform.training.conftest import Heard, MakeRecord, MakeStart

    from nvila.data.selection_counts import CurationCounts

PRICED = Settings.load(environ={"NVILA_PRICE_PER_CORE_HOUR": "1", "NVILA_WATTS_PER_CORE": "10"})


def scrape(port: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return values by name and labels, and the help of every family."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    values = {"/".join((one.name, *one.labels.values())): one.value for one in samples}
    return values, {family.name: family.documentation for family in families}


def test_scrape_shows_totals_and_the_present(record: MakeRecord, start: MakeStart) -> None:
    sink = ScrapeSink("127.0.0.1:0")
    with TrainingObserver([sink], PRICED, peak_flops=1e6, flops={"align": lambda record: 2e5}) as observer:
        values, _ = scrape(sink.port)
        assert values == {"nvila_train_notices_total": 0}
        observer.on_stage_start(start())
        for step in range(1, 4):
            observer.on_step(record(step, skipped=step == 2))
        observer.on_notice("a spike")
        values, help_texts = scrape(sink.port)
        expected = {
            "steps_total": 3, "skipped_steps_total": 1, "tokens_total": 3000, "samples_total": 30, "images_total": 15,
            "step_seconds_total": 1.5, "data_wait_seconds_total": 0.3, "loss": 2.0, "gradient_norm": 0.5,
            "learning_rate_ratio": 1.0, "tokens_per_second": 2000, "samples_per_second": 20, "mfu_ratio": 0.4,
            "data_wait_ratio": 0.2, "remaining_seconds": 3.5, "planned_steps": 10,
        }  # fmt: skip
        assert {name: values[f"nvila_train_{name}/align"] for name in expected} == pytest.approx(expected)
        assert values["nvila_train_notices_total"] == 1
        assert values["nvila_train_memory_bytes"] > 10 * 2**20
        assert values["nvila_train_core_seconds_total/align"] >= 0
        assert values["nvila_train_energy_joules_estimated_total/align"] >= 0
        assert "nvila_train_gpu_seconds_total/align" not in values
        assert all(text.endswith(".") for text in help_texts.values())

        observer.on_stage_end("align")
        observer.on_stage_start(start("instruct"))
        values, _ = scrape(sink.port)
        assert values["nvila_train_tokens_total/align"] == 3000
        assert values["nvila_train_tokens_total/instruct"] == 0
        assert not [name for name in values if name.startswith("nvila_train_loss")]
    with pytest.raises(OSError, match="refused"):
        scrape(sink.port)


def test_training_repeats_what_curation_made_of_its_data(config: TrainConfig, heard: Heard, tmp_path: Path) -> None:
    asked: list[str] = []

    def count() -> CurationCounts:
        asked.append("once")
        return {"vqa": Counter(kept=3, dropped=2, quarantined=1)}

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = Settings.load(tmp_path, {"NVILA_METRICS_ADDRESS": str(port)})
    with observe_training(config, settings, out_dir=tmp_path, reporter=heard, curation=count):
        for _ in range(2):
            values, _ = scrape(port)
            found = {name: value for name, value in values.items() if "curation" in name}
            assert found == {f"nvila_curation_records/vqa/{state}": number for state, number in
                             (("kept", 3), ("dropped", 2), ("quarantined", 1))}  # fmt: skip
    assert asked == ["once"]
    # Nobody who offers no metrics reads a selection for them.
    observe_training(config, Settings.load(tmp_path, {}), out_dir=tmp_path, reporter=heard, curation=count).close()
    assert asked == ["once"]


def test_a_selection_that_cannot_be_read_costs_its_figures_only(
    config: TrainConfig, heard: Heard, tmp_path: Path
) -> None:
    def count() -> CurationCounts:
        raise DataError("selection.parquet is damaged", "curate again")

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = Settings.load(tmp_path, {"NVILA_METRICS_ADDRESS": str(port)})
    with observe_training(config, settings, out_dir=tmp_path, reporter=heard, curation=count):
        assert scrape(port)[0] == {"nvila_train_notices_total": 0}
    assert [text for text in heard.notices if "no figures of the curation: selection.parquet is damaged" in text]


def test_a_thousand_sources_are_a_hundred_labels() -> None:
    counts: CurationCounts = {f"s{number:04}": Counter(kept=number) for number in range(1000)}
    with closing(Exporter("127.0.0.1:0", CurationCollector(lambda: counts))) as exporter:
        values, _ = scrape(exporter.port)
    assert len(values) == 100
    assert values["nvila_curation_records/s0999/kept"] == 999
    assert values["nvila_curation_records/(others)/kept"] == sum(range(901))


def test_port_in_use_is_a_notice_and_training_goes_on(heard: Heard, config: TrainConfig, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match="choose another port"):
            ScrapeSink(f"127.0.0.1:{port}")
        settings = Settings.load(tmp_path, {"NVILA_METRICS_ADDRESS": str(port)})
        observe_training(config, settings, out_dir=tmp_path, reporter=heard).close()
    assert len(heard.notices) == 1
    assert heard.notices[0].startswith(f"no /metrics: NVILA_METRICS_ADDRESS=127.0.0.1:{port}")


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(CapabilityError, match=r"pip install 'nvila\[train\]'"):
        ScrapeSink("127.0.0.1:0")
