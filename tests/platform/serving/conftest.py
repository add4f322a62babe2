"""A server process with a deterministic engine, shared by the tests that only talk to it."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
from PIL import Image

from nvila_platform.serving import RunningServer, start_server

if TYPE_CHECKING:
    from nvila.configuration import NVILAConfig

HERE = Path(__file__).parent
VERSION = "7"
DIGEST = "sha256:0123456789abcdef0123"
# Small, so that a test can fill the queue.
CAPACITY = 3

StartWords = Callable[..., AbstractContextManager[RunningServer]]


def _words_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("words_server", HERE / "words_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def words() -> ModuleType:
    return _words_module()


@pytest.fixture(scope="session")
def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="session")
def png_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@pytest.fixture(scope="session")
def start_words() -> StartWords:
    """Start a server process whose engine answers in words."""

    def start(model_dir: Path, **options: Any) -> AbstractContextManager[RunningServer]:
        (model_dir / "config.json").touch()
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        return start_server(model_dir, "words", env={"PYTHONPATH": path}, module="words_server", **options)

    return start


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, start_words: StartWords) -> Iterator[RunningServer]:
    args = ("--max-requests", str(CAPACITY), "--max-running", "1", "--request-timeout", "20")
    log = tmp_path_factory.mktemp("logs") / "server.log"
    with start_words(
        tmp_path_factory.mktemp("model"), version=VERSION, digest=DIGEST, args=args, log_path=log
    ) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, trust_env=False, timeout=20.0) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a real model with weights of chance: whole prompts, tiles and tokens, in a few milliseconds."""
    import torch

    from nvila.assembly import build_model, build_processor, save_model
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.training.config import ModelConfig

    torch.set_num_threads(1)
    torch.manual_seed(11)
    tokenizer = build_word_tokenizer(["what color is the shape ?", 'blue red circle { } : " a'], model_max_length=512)
    config = ModelConfig(
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
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        },
        projector="mlp_downsample_2x2_fix",
        select_layer=-2,
        max_length=512,
    )
    path = tmp_path_factory.mktemp("tiny-model")
    model = build_model(config, tokenizer).eval()
    save_model(model, build_processor(cast("NVILAConfig", model.config), tokenizer), path)
    return path


@pytest.fixture(scope="session")
def tiny_processor(tiny_model: Path) -> Any:
    from nvila.assembly import load_model

    return load_model(tiny_model)[1]
