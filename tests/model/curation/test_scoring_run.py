"""Scoring shard by shard: equal to single passes, equal for any number of processes, and nothing lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from nvila.assembly import load_model
from nvila.curation.problems import Problem
from nvila.curation.scorers import Scorer, load_scorer
from nvila.curation.scoring_run import ScoringRun, Size
from nvila.curation.shards import Shards
from nvila.curation.windows import FrameSampling
from nvila.data.conversation import ConversationEncoder
from nvila.data.records import Message, Part, Sample, vqa_sample
from nvila.errors import ArtifactError, ConfigError, DataError


@pytest.fixture
def scoring(small_model: Path, saved_model: Path, tmp_path: Path) -> Any:
    """Make runs of one data set that share a directory."""
    loaded: dict[Path, Scorer] = {}

    def make(stream: Any, out: str = "shards", digest: str = "d", size: int = 8, **options: Any) -> Any:
        def load(which: Size) -> Scorer:
            folder = {"small": small_model, "large": saved_model}[which]
            loaded[folder] = loaded.get(folder) or load_scorer(folder, dtype="fp32", device="cpu")
            return loaded[folder]

        shards = Shards(directory=tmp_path / out, size=size, digest=digest)
        samplings = frozenset({FrameSampling(8, 0.0)})
        values: dict[str, Any] = {"load": load, "samplings": samplings, "batch_tokens": 256, **options}
        return ScoringRun(stream=stream, shards=shards, **values)

    return make


def table_of(run: Any) -> pa.Table:
    return pa.concat_tables([run.shards.read(number) for number in run.shards.finished()])


def test_scores_equal_single_passes(scoring: Any, vqa_stream: Any, saved_model: Path, pictures: Any) -> None:
    stream = vqa_stream(20)
    run = scoring(stream)
    run.run()
    rows = table_of(run).to_pylist()
    assert [row["index"] for row in rows] == list(range(20))
    assert {row["status"] for row in rows} == {"ok"}
    model, processor = load_model(saved_model)
    encoder = ConversationEncoder(processor.tokenizer, processor.num_image_tokens, 128)
    for row, (sample, *_) in zip(rows, stream.rows, strict=True):
        assert (row["id"], row["source"], row["where"]) == (sample.id, sample.source, f"memory:{row['index'] + 1}")
        encoded = encoder(sample)
        pixels = processor.pixel_values([pictures[sample.images[0].removesuffix(".png")]])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([encoded.ids]), pixel_values=pixels).logits[0]
        labels = torch.tensor(encoded.labels)
        at = (labels != -100).nonzero().flatten()
        expected = -logits[at - 1].log_softmax(-1)[torch.arange(len(at)), labels[at]].sum()
        assert row["nll_large"] == pytest.approx(float(expected), rel=1e-4)
        assert row["tokens_large"] == len(at)
        assert row["nll_small"] != row["nll_large"]


@pytest.mark.parametrize("size", [15, 16], ids=["last-shard-is-short", "last-shard-is-full"])
def test_any_number_of_processes_gives_the_same_files(scoring: Any, vqa_stream: Any, size: int) -> None:
    alone = scoring(vqa_stream(size), "alone")
    alone.run()
    for rank in (2, 0, 1):
        scoring(vqa_stream(size), "three", rank=rank, world=3).run()
    three = scoring(vqa_stream(size), "three")
    alone.shards.tidy()
    three.shards.tidy()
    assert alone.shards.finished() == three.shards.finished()
    names = {path.name: path.read_bytes() for path in alone.shards.directory.iterdir()}
    assert names == {path.name: path.read_bytes() for path in three.shards.directory.iterdir()}


@pytest.mark.slow
def test_one_model_after_the_other_gives_the_same_files(scoring: Any, vqa_stream: Any) -> None:
    stream = vqa_stream(11, (3, (None, {}, "broken JSON")))
    both = scoring(stream, "both")
    both.run()
    one = scoring(stream, "one", sequential=True)
    one.run()
    assert {path.name for path in one.shards.directory.iterdir()} > {"small-00000.parquet", "scores-00000.parquet"}
    one.shards.tidy()
    names = {path.name: path.read_bytes() for path in both.shards.directory.iterdir()}
    assert names == {path.name: path.read_bytes() for path in one.shards.directory.iterdir()}


def test_data_that_changed_between_the_models_is_noticed(scoring: Any, vqa_stream: Any) -> None:
    run = scoring(vqa_stream(7), sequential=True)
    run._pass("small", "small", run._half)
    with pytest.raises(ArtifactError, match="has other records than the data set now"):
        scoring(vqa_stream(5), sequential=True).run()


@pytest.mark.parametrize("sequential", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_positions_that_a_damaged_file_lacks_have_their_rows(scoring: Any, vqa_stream: Any, sequential: bool) -> None:
    stream = vqa_stream(20)

    class Damaged:
        name = "damaged"

        def records(self, start: int = 0, stop: int | None = None) -> Any:
            return (record for record in stream.records(start, stop) if not 5 <= record.index < 10)

    run = scoring(Damaged(), total=20, sequential=sequential)
    run.run()
    run.run_features()
    rows = table_of(run).to_pylist()
    assert [row["index"] for row in rows] == list(range(20))
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["unreadable"] * 5 + ["ok"] * 10
    assert rows[6]["reason"] == "the file that should hold this record is damaged"
    assert (rows[6]["where"], rows[6]["source"]) == ("damaged:7", "a")
    features = [run.shards.read(number, "features")["features"].to_pylist() for number in range(3)]
    assert [len(part) for part in features] == [8, 8, 4]
    assert features[0][6] is None


def test_finished_shards_are_not_scored_again(scoring: Any, vqa_stream: Any) -> None:
    def refuse(which: Size) -> Scorer:
        raise AssertionError(f"loads the {which} model")

    scoring(vqa_stream(20)).run()
    scoring(vqa_stream(20), load=refuse).run()
    scoring(vqa_stream(20), load=refuse, sequential=True).run()


def test_scores_of_another_configuration_are_refused(scoring: Any, vqa_stream: Any) -> None:
    scoring(vqa_stream(3)).run()
    with pytest.raises(ConfigError, match="scores of another configuration") as refused:
        scoring(vqa_stream(3), digest="other").run()
    assert "choose another folder" in refused.value.hint


def test_a_damaged_shard_is_named(scoring: Any, vqa_stream: Any) -> None:
    run = scoring(vqa_stream(3))
    run.run()
    run.shards.path(0).write_bytes(b"no table")
    with pytest.raises(ArtifactError, match=r"scores-00000\.parquet is damaged"):
        scoring(vqa_stream(3)).run()


def text_sample(id: str, answer: str, question: str = "is there a red circle?") -> Sample:
    return vqa_sample(id=id, source="a", image=None, question=question, answer=answer)


def bad_rows(memory: type) -> list[tuple[tuple[Any, Any, Any], str, str]]:
    picture = vqa_sample(id="p", source="a", image="p.png", question="what?", answer="red")
    film = Sample(
        id="v",
        source="a",
        messages=(
            Message(role="user", content=(Part(type="video", value="v.mp4"), Part(type="text", value="what?"))),
            Message(role="assistant", content=(Part(type="text", value="red"),)),
        ),
    )
    open_end = dataclasses.replace(picture, messages=picture.messages[:1])
    return [
        ((None, {}, "broken JSON"), "unreadable", "broken JSON"),
        ((None, {}, "no answer: the last turn is not the assistant's"), "no_answer", "no answer: the last turn"),
        ((open_end, {"p.png": memory(b"")}, None), "no_answer", "the last turn is no answer"),
        ((text_sample("w", "  \n"), {}, None), "no_answer", "the last turn is no answer"),
        ((picture, {}, None), "bad_media", "image 'p.png' is nowhere"),
        ((picture, {"p.png": memory(None)}, None), "bad_media", "images/gone.png does not exist"),
        ((picture, {"p.png": memory(b"GIF89a broken")}, None), "bad_media", "an image of 13 bytes"),
        ((film, {"v.mp4": memory(b"no film")}, None), "bad_media", ""),
        ((text_sample("l", "red " * 200), {}, None), "too_long", "small model: 2"),
    ]


def test_each_bad_record_has_its_status_and_reason(scoring: Any, vqa_stream: Any, request: Any) -> None:
    memory = type(vqa_stream(1).rows[0][1]["a.png"])
    cases = bad_rows(memory)
    changed = [(2 * number, row) for number, (row, *_) in enumerate(cases)]
    run = scoring(vqa_stream(2 * len(cases), *changed))
    run.run()
    rows = table_of(run).to_pylist()
    for number, (_, status, reason) in enumerate(cases):
        row = rows[2 * number]
        assert row["status"] == status, row
        assert (row["reason"] or "").startswith(reason), row
        assert row["nll_large"] is None or status == "too_long"
        assert rows[2 * number + 1]["status"] == "ok"


def test_a_sample_without_a_number_does_not_spoil_its_row(scoring: Any, vqa_stream: Any, saved_model: Path) -> None:
    # The questions about one picture share a row, in which a NaN would spread.
    broken: Any = load_scorer(saved_model, dtype="fp32", device="cpu")
    token = broken.processor.tokenizer("triangle", add_special_tokens=False)["input_ids"][0]
    broken.model.get_input_embeddings().register_forward_hook(
        lambda module, given, out: out.masked_fill((given[0] == token).unsqueeze(-1), torch.nan)
    )
    run = scoring(vqa_stream(9), load=lambda which: broken)
    run.run()
    statuses = [row["status"] for row in table_of(run).to_pylist()]
    assert statuses == ["ok"] * 6 + ["not_finite"] + ["ok"] * 2
    assert table_of(run).to_pylist()[6]["reason"] == "small model: the log-likelihood is nan"


def test_a_run_stops_as_soon_as_too_much_is_bad(scoring: Any, vqa_stream: Any) -> None:
    bad: Any = [(index, (None, {}, "broken JSON")) for index in (0, 5, 6)]
    stream = vqa_stream(40, *bad)
    scoring(stream, "enough", max_bad=3 / 40, total=40).run()
    run = scoring(stream, max_bad=2 / 40, total=40)
    with pytest.raises(DataError, match=r"3 of 40 records \(7.5%\) .* 3 unreadable; first: memory:1: broken JSON"):
        run.run()
    assert run.shards.present() == [0], "it does not go on"
    # Started again, what is bad already counts before anything more is scored.
    with pytest.raises(DataError, match="3 of 40"):
        scoring(stream, max_bad=2 / 40, total=40, load=lambda which: pytest.fail("scores on")).run()


def test_progress_counts_the_rank_s_own_records(scoring: Any, vqa_stream: Any) -> None:
    seen: list[tuple[str, int, int]] = []

    class Keep:
        def progress(self, phase: str, done: int, total: int, metrics: object = None) -> None:
            seen.append((phase, done, total))

        def notice(self, text: str) -> None:
            pytest.fail(text)

    scoring(vqa_stream(20), rank=1, world=2, total=20, reporter=Keep()).run()
    assert seen[-1] == ("score", 8, 8)


def test_a_problem_is_a_value() -> None:
    assert Problem(status="too_long", reason="x") == Problem(status="too_long", reason="x")
