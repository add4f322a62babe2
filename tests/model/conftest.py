"""A tiny NVILA with random weights, its processor and a few pictures; built once, because torch loads slowly."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerFast

    from nvila.configuration import NVILAConfig
    from nvila.data.conversation import ConversationEncoder
    from nvila.data.media import ImageTable
    from nvila.data.tensors import PixelCache
    from nvila.modeling import NVILAForConditionalGeneration
    from nvila.processing import NVILAProcessor
    from nvila.training.config import ModelConfig

TEXTS = (
    "what color is the shape? what shape is in the image? is there a red circle? describe the image.",
    "yes no red blue green circle rectangle triangle a the one two three stop here now",
    "you are a helpful assistant. first second",
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from nvila.data.tokenizers import build_word_tokenizer

    return build_word_tokenizer(TEXTS, model_max_length=128)


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    from nvila.training.config import ModelConfig

    return ModelConfig(
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        language={
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            # Wide, so that an untrained model already has clear preferences and argmax is no toss-up.
            "initializer_range": 0.2,
        },
        projector="mlp_downsample_2x2_fix",
        select_layer=-2,
        max_length=128,
    )


@pytest.fixture(scope="session")
def model(model_config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[NVILAForConditionalGeneration]:
    """Shared by all tests and therefore read-only; tests that train take `fresh_model`."""
    import torch

    from nvila.assembly import build_model

    torch.set_num_threads(1)
    torch.manual_seed(11)
    built = build_model(model_config, tokenizer).eval()
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    yield built
    changed = [name for name, tensor in built.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not changed, f"a test changed the shared model: {changed}"


@pytest.fixture
def fresh_model(model: NVILAForConditionalGeneration) -> NVILAForConditionalGeneration:
    return copy.deepcopy(model)


@pytest.fixture(scope="session")
def processor(model: NVILAForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> NVILAProcessor:
    from nvila.assembly import build_processor

    return build_processor(cast("NVILAConfig", model.config), tokenizer)


@pytest.fixture(scope="session")
def encoder(processor: NVILAProcessor, tokenizer: PreTrainedTokenizerFast) -> ConversationEncoder:
    from nvila.data.conversation import ConversationEncoder

    return ConversationEncoder(tokenizer, processor.num_image_tokens, 128)


@pytest.fixture(scope="session")
def pictures() -> dict[str, Image.Image]:
    """Eight pictures of noise, so that no two give the same visual tokens; 40 pixels wide to make resizing real."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(5)
    return {
        name: Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).convert("RGB") for name in "abcdefgh"
    }


@pytest.fixture(scope="session")
def image_table(pictures: dict[str, Image.Image], tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    from nvila.data.media import ImageTable, write_image_table

    path = tmp_path_factory.mktemp("images") / "images.parquet"
    write_image_table(path, ((name, _png(picture)) for name, picture in pictures.items()))
    return ImageTable.open(path)


@pytest.fixture(scope="session")
def tiles(image_table: ImageTable, processor: NVILAProcessor) -> PixelCache:
    from nvila.data.tensors import PixelCache

    return PixelCache.build(image_table, list(image_table.keys()), processor.image_processor.size["height"])


@pytest.fixture(scope="session")
def saved_model(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from nvila.assembly import save_model

    directory = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, processor, directory)
    return directory


@pytest.fixture(scope="session")
def launch_variables() -> Iterator[dict[str, str]]:
    """What a launcher would set for one process; the group that DeepSpeed opens lives until the session ends."""
    yield {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def one_process(launch_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test as the only process of a launched group."""
    for name, value in launch_variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def free_port() -> int:
    return _free_port()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
