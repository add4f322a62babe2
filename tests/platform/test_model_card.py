"""What a registered version says about itself, in a real MLflow."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from huggingface_hub import ModelCard as HubCard

from nvila.checkpoints.documents import Origin
from nvila_platform import mlflow_backend
from nvila_platform.lineage import Lineage
from nvila_platform.model_card import ModelCard, licence_warning, make_card, signature, version_warning
from nvila_platform.registration import register_model
from nvila_platform.registry import run_tags, version_tags
from nvila_platform.serving.model import NvilaModel
from nvila_platform.settings import Settings
from nvila_platform.store import ArtifactRef

REF = ArtifactRef(step="quantize", key="1" * 64, digest="2" * 64, uri="s3://models/quantize/1")


def node(step: str, digest: str, config: dict[str, str] | None = None, **inputs: Lineage) -> Lineage:
    return Lineage(
        step=step,
        digest=digest * 64,
        code_version="0.1+abc",
        finished_at="",
        config=config or {},
        metrics={},
        inputs=inputs,
    )


BASES = {"model.from.vision": "google/siglip", "model.from.language": "Qwen/Qwen2.5"}
LINEAGE = node("quantize", "2", model=node("train", "3", BASES, data=node("data", "4")))


def card(licence: str = "cc-by-nc-4.0") -> ModelCard:
    weights = Origin(licence=licence)
    return make_card("nvila", LINEAGE, weights, scores={"easy-vqa": 0.98}, figures={"quantized_bytes": 2048.0})


def test_the_card_is_one_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card().text())
    loaded = HubCard.load(tmp_path / "README.md")
    data = loaded.data.to_dict()
    assert data["license"] == "cc-by-nc-4.0"
    assert data["base_model"] == ["google/siglip", "Qwen/Qwen2.5"]
    assert data["base_model_relation"] == "quantized"
    assert data["pipeline_tag"] == "image-text-to-text"
    (result,) = loaded.data.eval_results or []
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("easy-vqa", "accuracy", 0.98)
    for text in ("must not be used commercially", "| easy-vqa | 0.9800 |", "| train | 333333333333 |", "in: prompt"):
        assert text in loaded.text


def test_a_card_without_bases_and_scores_is_one_too(tmp_path: Path) -> None:
    bare = make_card("nvila", node("train", "3"), Origin(), licence="apache-2.0")
    (tmp_path / "README.md").write_text(bare.text())
    data = HubCard.load(tmp_path / "README.md").data.to_dict()
    assert data["license"] == "apache-2.0"
    assert {"base_model", "base_model_relation", "model-index"}.isdisjoint(data)
    assert "commercially" not in bare.text()


@pytest.mark.parametrize(
    ("recipe", "weights", "expected"),
    [
        (None, "unknown", "unknown"),
        (None, "gemma", "gemma"),
        ("apache-2.0", "unknown", "apache-2.0"),
        ("apache-2.0", "gemma", "apache-2.0"),
        ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "apache-2.0", "cc-by-nc-4.0"),
    ],
)
def test_a_recipe_cannot_lift_a_restriction(recipe: str | None, weights: str, expected: str) -> None:
    assert make_card("nvila", LINEAGE, Origin(licence=weights), licence=recipe).origin.licence == expected


def test_bases_beside_the_weights_win() -> None:
    found = make_card("nvila", LINEAGE, Origin(base_models=("a/b",)))
    assert found.origin.base_models == ("a/b",)


def test_a_long_card_is_cut_at_a_line_for_the_database() -> None:
    long = make_card("nvila", LINEAGE, Origin(), figures={f"figure {number}": 1.0 for number in range(500)})
    assert len(long.description()) <= 5000
    assert long.description().endswith("|\n...")


def test_the_signature_is_what_the_endpoint_takes() -> None:
    served = NvilaModel.__new__(NvilaModel)
    said = signature()
    assert said.inputs.input_names() == [one["name"] for one in served.get_input_types()]
    assert said.inputs.required_input_names() == ["prompt"]
    assert said.outputs.input_names() == [one["name"] for one in served.get_output_types()]


def test_a_version_carries_licence_signature_and_description(
    tracked: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    client = mlflow_backend.connect(tracked)
    experiment = client.create_experiment("nvila", mlflow_backend.artifact_location(tracked))
    run_id = client.create_run(experiment, tags={"nvila.run_url": "https://kubeflow/1"}).info.run_id
    with caplog.at_level(logging.WARNING, "nvila_platform"):
        version = register_model(tracked, "nvila", REF, run_id, {}, card())
    assert "nvila: these weights must not be used commercially: their licence is cc-by-nc-4.0" in caplog.messages
    tags = version_tags(tracked, version)
    assert tags["nvila.licence"] == "cc-by-nc-4.0"
    assert tags["nvila.base_models"] == "google/siglip, Qwen/Qwen2.5"
    assert version_warning(tags) == licence_warning("cc-by-nc-4.0")
    assert json.loads(json.loads(tags["nvila.signature"])["outputs"])[0]["name"] == "text"
    assert "| easy-vqa | 0.9800 |" in str(client.get_model_version("nvila", "1").description)
    assert run_tags(tracked, run_id)["nvila.run_url"] == "https://kubeflow/1"

    from mlflow.models import Model

    folder = Path(client.download_artifacts(run_id, "model"))
    assert HubCard.load(folder / "README.md").data.license == "cc-by-nc-4.0"
    loaded = Model.load(folder)
    assert loaded.signature == signature()
    assert loaded.flavors == {"nvila": {"weights": REF.uri}}


def test_a_free_licence_warns_nobody(tracked: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nvila_platform"):
        version = register_model(tracked, "nvila", REF, None, {}, card("apache-2.0"))
    assert not caplog.messages
    assert version_warning(version_tags(tracked, version)) is None
