"""Real recipes on data and base models of one's own: a registry, folders of parts, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from nvila.assembly import load_model
from nvila.base_models import local_bases
from nvila.data.selection_counts import CurationCounts
from nvila.errors import CapabilityError, CheckpointError, ConfigError, DataError, InfrastructureError
from nvila.progress import SILENT
from nvila.training.config import BaseModels
from nvila_pipelines.lifecycle import new_run
from nvila_pipelines.recipe import load_recipe
from nvila_pipelines.steps.runner import run_step
from nvila_pipelines.steps.train_process import main
from nvila_pipelines.training.checks import check_trainable
from nvila_pipelines.training.mixtures import read_mixtures, write_registry
from nvila_platform.settings import Settings
from nvila_platform.store import open_store
from nvila_platform.training.scrape import ScrapeSink


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> BaseModels:
    """Folders of a tower and of a decoder with its tokenizer, in the widths of the tiny recipes."""
    root = tmp_path_factory.mktemp("bases")
    tower = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=4
    )
    SiglipVisionModel(tower).save_pretrained(root / "vision")
    # As Qwen's, bytes and special tokens without gaps, but no merges.
    backend = Tokenizer(BPE({character: id for id, character in enumerate(sorted(ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    decoder = Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer) + 7, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(decoder).save_pretrained(root / "language")
    tokenizer.save_pretrained(root / "language")
    return BaseModels(vision=str(root / "vision"), language=str(root / "language"))


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    rows = []
    for number, (colour, size) in enumerate([("red", (64, 32)), ("green", (32, 64)), ("red", (40, 40))]):
        Image.new("RGB", size, colour).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>what is it ?"}, {"from": "gpt", "value": colour}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "mine.jsonl").write_text(lines, encoding="utf-8")
    path = tmp_path / "sets.yaml"
    path.write_text("mine: {path: mine.jsonl}\nboth: mine*2\n", encoding="utf-8")
    return path


def test_a_recipe_trains_on_a_registry_from_base_models(bases: BaseModels, registry: Path, tmp_path: Path) -> None:
    words = [
        f"train.stages.{stage}.{field}"
        for stage in ("align", "vision")
        for field in ("steps=2", "images_per_step=2", "data=both")
    ]
    overrides = [
        *words, "train.stages.language=null", "train.stages.instruct=null", "data.dataset=null",
        f"data.registry={registry}", f"model.from={{vision: {bases.vision}, language: {bases.language}}}",
    ]  # fmt: skip
    recipe = load_recipe("nvila-lite-8b-tiny", overrides)
    check_trainable(recipe)
    run = new_run(recipe, Settings.load(tmp_path / "ws", {}))
    store = open_store(run.settings)
    data = run_step("data", recipe, {}, run)
    selection = run_step("curate", recipe, {"data": data}, run)
    values = {
        "config": recipe.train_config().to_dict(), "data": str(store.fetch(data)),
        "selection": str(store.fetch(selection)), "out": str(tmp_path / "out"), "events": str(tmp_path / "events"),
    }  # fmt: skip
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(values), encoding="utf-8")
    main(str(spec))
    trained, processor = load_model(tmp_path / "out" / "2-vision")
    start = SiglipVisionModel.from_pretrained(bases.vision)
    ours = trained.model.vision_tower.state_dict()
    theirs = {name.removeprefix("vision_model."): value for name, value in start.state_dict().items()}
    # The last block and the norm behind it never learn, so they are still the base model's; the first block has.
    assert ours["encoder.layers.2.mlp.fc1.weight"].equal(theirs["encoder.layers.2.mlp.fc1.weight"])
    assert not ours["encoder.layers.0.mlp.fc1.weight"].equal(theirs["encoder.layers.0.mlp.fc1.weight"])
    decoder = Qwen2ForCausalLM.from_pretrained(bases.language)
    layer = "layers.0.mlp.up_proj.weight"
    assert trained.model.language_model.state_dict()[layer].equal(decoder.model.state_dict()[layer])
    assert trained.config.image_aspect_ratio == "dynamic"
    assert len(processor.tokenizer) == trained.config.text_config.vocab_size


def test_the_licences_of_pretrained_parts_go_along(bases: BaseModels, tmp_path: Path) -> None:
    from nvila.checkpoints.documents import Origin, read_origin
    from nvila_pipelines.steps.train import carry_licences

    carry_licences(None, tmp_path)
    assert not list(tmp_path.iterdir())
    carry_licences(bases, tmp_path)
    assert read_origin(tmp_path) == Origin(base_models=(bases.vision, bases.language))


def test_training_offers_what_curation_made_of_its_data(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "chosen").mkdir()
    columns = {"id": ["0", "1", "2"], "source": ["mine"] * 3, "delta": [1.0, 0.5, None], "kept": [True, True, False]}
    pq.write_table(pa.table(columns), tmp_path / "chosen" / "selection.parquet")
    registry.write_text("mine: {path: mine.jsonl}\nboth: mine@chosen\n", encoding="utf-8")
    overrides = [
        "train.stages.align={images_per_step: null, batch_tokens: 2000, steps: null, epochs: 1, data: both}",
        "train.stages.vision=null", "train.stages.language=null", "train.stages.instruct=null", "data.dataset=null",
        f"data.registry={registry}", "train.backend=torch",
    ]  # fmt: skip
    write_registry(str(registry), tmp_path)
    values = {
        "config": load_recipe("nvila-lite-8b-tiny", overrides).train_config().to_dict(), "data": str(tmp_path),
        "selection": str(tmp_path), "out": str(tmp_path / "out"), "events": str(tmp_path / "events"),
    }  # fmt: skip
    offered: list[CurationCounts | None] = []

    class Sink(ScrapeSink):
        def __init__(self, address: str, curation: CurationCounts | None = None) -> None:
            offered.append(curation)
            super().__init__("127.0.0.1:0", curation)

    monkeypatch.setattr("nvila_platform.training.observing.ScrapeSink", Sink)
    monkeypatch.setenv("NVILA_METRICS_ADDRESS", "9464")
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(values), encoding="utf-8")
    main(str(spec))
    assert offered == [{"mine": {"kept": 2, "quarantined": 1}}]


def test_a_stage_with_a_token_budget_reads_a_registry_where_it_lies(registry: Path, tmp_path: Path) -> None:
    overrides = [
        "train.stages.align={images_per_step: null, batch_tokens: 2000, steps: null, epochs: 2, data: both}",
        "train.stages.vision=null", "train.stages.language=null", "train.stages.instruct=null", "data.dataset=null",
        f"data.registry={registry}", "train.backend=torch",
    ]  # fmt: skip
    recipe = load_recipe("nvila-lite-8b-tiny", overrides)
    check_trainable(recipe)
    write_registry(str(registry), tmp_path)
    values = {
        "config": recipe.train_config().to_dict(), "data": str(tmp_path), "selection": str(tmp_path),
        "out": str(tmp_path / "out"), "events": str(tmp_path / "events"),
    }  # fmt: skip
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(values), encoding="utf-8")
    main(str(spec))
    _, processor = load_model(tmp_path / "out" / "1-align")
    # New weights: the words are those of the data.
    assert {"green", "red", "what"} <= processor.tokenizer.get_vocab().keys()
    assert list((tmp_path / "out" / ".data").iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vision": "/nowhere"}, ConfigError, "model.from.vision is '/nowhere', which is no folder"),
        ({"language": "vision"}, CapabilityError, "is a 'siglip_vision_model', which cannot be a language part"),
        ({"vision": "language"}, CapabilityError, "is a 'qwen2', which cannot be a vision part"),
        ({"vision": "empty"}, CheckpointError, "config.json cannot be read"),
        ({"vision": "list"}, CheckpointError, "config.json is no configuration"),
    ],
)
def test_base_models_that_cannot_be_used_are_named(
    bases: BaseModels, tmp_path: Path, change: dict[str, str], error: type[Exception], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]", encoding="utf-8")
    folders = {
        "vision": bases.vision, "language": bases.language, "empty": str(tmp_path / "empty"),
        "list": str(tmp_path / "list"),
    }  # fmt: skip
    values = {"vision": bases.vision, "language": bases.language}
    values |= {part: folders.get(name, name) for part, name in change.items()}
    with pytest.raises(error, match=message):
        local_bases(BaseModels(**values))


def test_a_base_model_of_another_width_is_refused(bases: BaseModels) -> None:
    words = [f"model.from={{vision: {bases.vision}, language: {bases.language}}}", "model.language.hidden_size=128"]
    recipe = load_recipe("nvila-lite-8b-tiny", words)
    with pytest.raises(CheckpointError, match=r"has hidden_size 64, model\.language\.hidden_size is 128"):
        check_trainable(recipe)


def test_what_the_hub_does_not_give_may_be_tried_again(bases: BaseModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InfrastructureError, match=r"model\.from\.vision: 'someone/something' is no folder here"):
        local_bases(BaseModels(vision="someone/something", language=bases.language))


def test_a_registry_that_is_missing_or_a_mixture_without_samples_is_named(
    tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"data\.registry .*absent\.yaml does not exist"):
        write_registry(str(tmp_path / "absent.yaml"), tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"id": "1"}\n', encoding="utf-8")
    registry.write_text("mine: {path: mine.jsonl}\nbad: {path: bad.jsonl}\n", encoding="utf-8")
    write_registry(str(registry), tmp_path)
    told: list[str] = []
    monkeypatch.setattr(type(SILENT), "notice", lambda _, text: told.append(text))
    with pytest.raises(DataError, match="mixture 'bad' has no usable sample"):
        read_mixtures(["bad"], tmp_path, SILENT)
    datasets, media = read_mixtures(["mine + bad"], tmp_path, SILENT)
    assert len(datasets["mine + bad"]) == len(media.sources) == 3
    assert told == ["1 records of 'mine + bad' cannot be used and are left out"]
    with pytest.raises(ConfigError, match="mien"):
        read_mixtures(["mien"], tmp_path, SILENT)
