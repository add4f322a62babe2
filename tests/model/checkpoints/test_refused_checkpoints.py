"""Checkpoints that are refused, and conversions that fail or stop half-way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nvila.checkpoints import convert, detect_layout, tensor_file
from nvila.errors import CheckpointError, ConfigError, ResourceError
from nvila.progress import SilentReporter

if TYPE_CHECKING:
    from tests.model.checkpoints.conftest import Tiny

NORM = "model.norm.weight"


def test_source_that_is_no_checkpoint_is_refused(vila: Path, tiny: Tiny, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent", "is not a folder"),
        (tmp_path, r"config\.json is missing"),
        (vila / "vision_tower", "model_type 'siglip_vision_model' is not an NVILA model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            detect_layout(path)
    shutil.rmtree(vila / "mm_projector")
    with pytest.raises(CheckpointError, match=r"mm_projector is missing .*llm, vision_tower, mm_projector"):
        convert(vila, tmp_path / "out", "nvila")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"video_encoder": "os.system"}, "video_encoder is 'os.system'"),
        ("config.json", {"image_encoder": {"_target_": "x.Y"}}, "image_encoder is 'x.Y'"),
        ("config.json", {"s2": True, "dynamic_s2": False}, "before NVILA"),
        ("config.json", {"s2_scales": "a,b"}, "s2_scales is 'a,b'"),
        ("config.json", {"mm_vision_select_layer": -9}, "mm_vision_select_layer -9 does not exist"),
        ("config.json", {"mm_vision_select_feature": "patch"}, "cls_patch"),
        ("llm/config.json", {"quantization_config": {"bits": 4}}, r"llm/config\.json: the model is quantized"),
        ("llm/config.json", {"model_type": "no_such_model"}, "configuration cannot be used: .*no_such_model"),
        ("llm/config.json", {"num_hidden_layers": "x"}, "configuration cannot be used"),
        ("llm/config.json", {"num_hidden_layers": 3}, r"lacks the tensor 'llm/model\.layers\.2\."),
        ("llm/config.json", {"num_hidden_layers": 1}, r"holds the tensor 'llm/model\.layers\.1\..*layer counts"),
        ("llm/config.json", {"vocab_size": 7}, r"llm/.*\.weight' has the shape .* says \(7, 32\)"),
        ("llm/config.json", {"tie_word_embeddings": True}, "differs from it .*tie_word_embeddings to false"),
        ("mm_projector/config.json", {"mm_projector_type": "mlp_downsampel"}, "did you mean 'mlp_downsample'"),
        ("mm_projector/config.json", {"mm_projector_type": None}, "no mm_projector_type"),
        ("mm_projector/config.json", {"mm_projector_type": "mlp_downsample_3x3_fix"}, "lacks the tensor 'mm_projector"),
        ("vision_tower/config.json", {"vision_use_head": True}, r"lacks the tensor 'vision_tower/vision_model\.head"),
    ],
)
def test_configuration_that_the_weights_contradict_is_refused(
    vila: Path, tiny: Tiny, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    tiny.edit(vila / file, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(vila, tmp_path / "out", "nvila")
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["vila"]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("llm", lambda w: {k: v for k, v in w.items() if k != NORM}, r"lacks the tensor 'llm/model\.norm\.weight'"),
        ("llm", lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "set tie_word_embeddings to true"),
        ("llm", lambda w: w | {"model.more": torch.zeros(1)}, r"model\.safetensors holds the tensor 'llm/model\.more'"),
        ("llm", lambda w: w | {"stranger": torch.zeros(1)}, "holds the tensor 'llm/stranger'"),
        ("llm", lambda w: w | {NORM: torch.zeros(31)}, r"'llm/model\.norm\.weight' has the shape \(31,\), .* \(32,\)"),
        ("mm_projector", lambda w: w | {"layers.9.bias": torch.zeros(1)}, r"'mm_projector/layers\.9\.bias'"),
        (
            "vision_tower",
            lambda w: w | {"post_layernorm.bias": w["vision_model.post_layernorm.bias"]},
            "under two names",
        ),
    ],
)
def test_missing_extra_and_misshapen_tensors_are_named(
    vila: Path, tiny: Tiny, tmp_path: Path, part: str, change: Callable[..., Any], message: str
) -> None:
    tiny.change_weights(vila / part, change)
    with pytest.raises(CheckpointError, match=message):
        convert(vila, tmp_path / "out", "hf")


@pytest.mark.parametrize(("part", "name"), [("llm", NORM), ("llm", "model.embed_tokens.weight")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(
    vila: Path, tiny: Tiny, tmp_path: Path, part: str, name: str, value: float
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights[name].view(-1)[-1] = value
        return weights

    tiny.change_weights(vila / part, spoil)
    with pytest.raises(CheckpointError, match=rf"llm/model\.safetensors: tensor 'llm/{name}' holds NaN or infinity"):
        convert(vila, tmp_path / "out", "nvila")
    assert [path.name for path in tmp_path.iterdir()] == ["vila"]


def test_damaged_pickled_and_traversing_files_are_refused(vila: Path, tiny: Tiny, tmp_path: Path) -> None:
    path = vila / "llm" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"llm/model\.safetensors"):
        convert(vila, tmp_path / "out", "nvila")
    path.write_bytes(data)
    index = vila / "llm" / "model.safetensors.index.json"
    tiny.dump(index, {"weight_map": {NORM: "../../secret.safetensors"}})
    with pytest.raises(CheckpointError, match="no safetensors file beside it"):
        convert(vila, tmp_path / "out", "nvila")
    index.unlink()
    (vila / "llm" / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="execute code"):
        convert(vila, tmp_path / "out", "nvila")


def test_head_equal_to_a_tied_embedding_is_dropped(vila: Path, tiny: Tiny, tmp_path: Path) -> None:
    tiny.edit(vila / "llm" / "config.json", tie_word_embeddings=True)
    tiny.change_weights(vila / "llm", lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"]})
    convert(vila, tmp_path / "out", "hf")
    assert "./llm.lm_head.weight" not in tiny.weights(tmp_path / "out")


def test_flat_projector_of_unknown_shapes_is_refused(vila: Path, tiny: Tiny, tmp_path: Path) -> None:
    convert(vila, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    del config["mm_projector_type"]
    tiny.dump(tmp_path / "hf" / "config.json", config)
    tiny.change_weights(tmp_path / "hf", lambda w: w | {"mm_projector.layers.1.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="no projector has tensors of these shapes"):
        convert(tmp_path / "hf", tmp_path / "out", "nvila")
    tiny.dump(tmp_path / "hf" / "config.json", {"model_type": "nvila"})
    with pytest.raises(CheckpointError, match="has no text_config"):
        convert(tmp_path / "hf", tmp_path / "out", "nvila")


def test_other_language_models_keep_our_layout(vila: Path, tiny: Tiny, tmp_path: Path) -> None:
    tiny.edit(vila / "llm" / "config.json", model_type="gpt2", n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(CheckpointError, match="language model gpt2 has no embed_tokens"):
        convert(vila, tmp_path / "out", "hf")


def test_tokenizer_that_cannot_be_used_is_refused(vila: Path, tmp_path: Path) -> None:
    (vila / "llm" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot load the tokenizer in"):
        convert(vila, tmp_path / "out", "nvila")
    (vila / "llm" / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is missing"):
        convert(vila, tmp_path / "out", "nvila")


def test_wrong_wishes_are_refused_before_anything_is_read(vila: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'vila'"):
        convert(vila, tmp_path / "out", "vilaa")
    with pytest.raises(ConfigError, match="has the layout 'vila' already"):
        convert(vila, tmp_path / "out", "vila")
    with pytest.raises(ConfigError, match="a shard of 0 bytes"):
        convert(vila, tmp_path / "out", "hf", max_shard_bytes=0)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    for taken in (tmp_path / "taken", tmp_path / "taken" / "x"):
        with pytest.raises(CheckpointError, match="exists already"):
            convert(vila, taken, "hf")


def test_empty_target_folder_is_taken(vila: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(vila, tmp_path / "out", "hf")
    assert detect_layout(tmp_path / "out") == "hf"


class _Stop(SilentReporter):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def progress(self, *_: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), ResourceError),
        (OSError(5, "Input/output error"), CheckpointError),
    ],
)
def test_failed_conversion_leaves_nothing(
    vila: Path, tmp_path: Path, error: BaseException, raised: type[BaseException]
) -> None:
    with pytest.raises(raised):
        convert(vila, tmp_path / "deep" / "out", "hf", reporter=_Stop(error))
    assert not list((tmp_path / "deep").iterdir())


def test_full_disk_is_noticed_before_writing(vila: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ResourceError, match="the weights need"):
        convert(vila, tmp_path / "out", "hf")


class _Watch(SilentReporter):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[str] = set()

    def progress(self, *_: object) -> None:
        self.seen |= {path.name for path in self.folder.iterdir()}


def test_folder_has_its_name_when_it_is_complete(vila: Path, tmp_path: Path) -> None:
    """A conversion that is killed therefore leaves no model, and the next one to the same folder clears up."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for owner in (gone.pid, running.pid, "x"):
        (tmp_path / f".out.partial-{owner}").mkdir()
    watch = _Watch(tmp_path)
    convert(vila, tmp_path / "out", "hf", reporter=watch)
    running.communicate(b"\n")
    others = {"vila", f".out.partial-{running.pid}", ".out.partial-x"}
    assert watch.seen == {f".out.partial-{os.getpid()}", *others}
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


@pytest.mark.parametrize("to", ["hf", "nvila"])
def test_weights_are_streamed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 1 << 16)
    start = tiny.make(tmp_path / "start", rows=200_000)
    convert(start, tmp_path / "first", to)  # brings in what is imported late
    tracemalloc.start()
    convert(start, tmp_path / "second", to)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "second" / "model.safetensors").stat().st_size > 50e6
    assert peak < 10e6
