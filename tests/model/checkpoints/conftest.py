"""A tiny checkpoint with the published names and shapes, as the original code would have written it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nvila.checkpoints.shards import INDEX_FILE
from nvila.data.tokenizers import build_word_tokenizer

WIDTH, HIDDEN, KV, INTER, LAYERS, BLOCKS = 16, 32, 16, 48, 2, 3
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
    "projector_hidden_act": "gelu_fast",
}
TEXT = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 1e6,
    "use_mrope": False,
}
TOP = {
    "architectures": ["LlavaLlamaModel"],
    "model_type": "llava_llama",
    "llm_cfg": "/data/runs/sft/llm",
    "vision_tower_cfg": {"model_type": "siglip_vision_model", "local": True},
    "mm_projector_cfg": {"mm_projector_type": "mlp_downsample"},
    "resume_path": "/data/runs/sft",
    "image_aspect_ratio": "dynamic_s2",
    "dynamic_s2": True,
    "s2": False,
    "s2_scales": "16,32,48",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "cls_patch",
    "max_tiles": 12,
    "video_encoder": json.dumps({"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[2, 1, 1]]}),
    "model_dtype": "torch.bfloat16",
    "something_of_theirs": {"nested": [1, "two", None]},
}


def projector_shapes(kind: str, channels: int) -> dict[str, tuple[int, ...]]:
    if kind == "mlp_downsample_3x3_fix":
        norms, linears = (
            {1: 9 * channels, 4: 3 * channels},
            {2: (3 * channels, 9 * channels), 5: (HIDDEN, 3 * channels)},
        )
        linears[7] = (HIDDEN, HIDDEN)
    else:
        norms, linears = {1: 4 * channels}, {2: (HIDDEN, 4 * channels), 4: (HIDDEN, HIDDEN)}
    shapes: dict[str, tuple[int, ...]] = {}
    for index, width in norms.items():
        shapes |= {f"layers.{index}.weight": (width,), f"layers.{index}.bias": (width,)}
    for index, (rows, columns) in linears.items():
        shapes |= {f"layers.{index}.weight": (rows, columns), f"layers.{index}.bias": (rows,)}
    return shapes


def llm_shapes(rows: int, *, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": (HIDDEN,), f"{at}.post_attention_layernorm.weight": (HIDDEN,)}
        for name, size in (("q", HIDDEN), ("k", KV), ("v", KV)):
            shapes |= {
                f"{at}.self_attn.{name}_proj.weight": (size, HIDDEN),
                f"{at}.self_attn.{name}_proj.bias": (size,),
            }
        shapes[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (INTER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INTER)
    return shapes if tied else {**shapes, "lm_head.weight": (rows, HIDDEN)}


def tower_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 4, 4),
        "vision_model.embeddings.patch_embedding.bias": (WIDTH,),
        "vision_model.embeddings.position_embedding.weight": (16, WIDTH),
        "vision_model.post_layernorm.weight": (WIDTH,),
        "vision_model.post_layernorm.bias": (WIDTH,),
    }
    for block in range(BLOCKS):
        at = f"vision_model.encoder.layers.{block}"
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{name}.weight": (WIDTH,), f"{at}.{name}.bias": (WIDTH,)}
        for name in ("q", "k", "v", "out"):
            at_proj = f"{at}.self_attn.{name}_proj"
            shapes |= {f"{at_proj}.weight": (WIDTH, WIDTH), f"{at_proj}.bias": (WIDTH,)}
        shapes |= {f"{at}.mlp.fc1.weight": (24, WIDTH), f"{at}.mlp.fc1.bias": (24,)}
        shapes |= {f"{at}.mlp.fc2.weight": (WIDTH, 24), f"{at}.mlp.fc2.bias": (WIDTH,)}
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(7)
    return {name: (torch.randn(shape, generator=noise) * 0.3).to(dtype) for name, shape in shapes.items()}


def words(*, media: bool) -> PreTrainedTokenizerFast:
    tokenizer = build_word_tokenizer(["what color is it? red blue green", "describe the image."], model_max_length=64)
    if media:
        tokenizer.add_tokens(["<vila/sentinel>"], special_tokens=True)
        return tokenizer
    # As published for the larger models: the original code adds the media tokens when it loads.
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    gone = {"<image>", "<vila/video>"}
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] not in gone]
    names = [name for name in backend["model"]["vocab"] if name not in gone]
    backend["model"]["vocab"] = {name: index for index, name in enumerate(names)}
    for token in backend["added_tokens"]:
        token["id"] = backend["model"]["vocab"][token["content"]]
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        model_max_length=64,
    )


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    dump(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def make_vila(
    root: Path,
    *,
    tied: bool = False,
    media: bool = True,
    dtype: torch.dtype = torch.float32,
    projector: str = "mlp_downsample",
    top: dict[str, Any] | None = None,
    sharded: bool = False,
    rows: int | None = None,
) -> Path:
    """Write a checkpoint as the original code does, with the names and shapes of the published ones."""
    tokenizer = words(media=media)
    rows = rows or len(tokenizer)
    config = {**TOP, **(top or {})}
    dump(root / "config.json", config)
    dump(root / "llm" / "config.json", {**TEXT, "vocab_size": rows, "tie_word_embeddings": tied})
    dump(root / "vision_tower" / "config.json", VISION)
    dump(root / "mm_projector" / "config.json", {"model_type": "v2l_projector", "mm_projector_type": projector})
    dump(root / "vision_tower" / "preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.6], "theirs": 1})
    dump(root / "llm" / "generation_config.json", {"eos_token_id": [tokenizer.eos_token_id], "temperature": 0.7})
    tokenizer.save_pretrained(root / "llm")
    channels = WIDTH * (3 if config.get("dynamic_s2") else 1)
    llm = random_tensors(llm_shapes(rows, tied=tied), dtype)
    if sharded:
        halves = [dict(list(llm.items())[::2]), dict(list(llm.items())[1::2])]
        names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        for name, half in zip(names, halves, strict=True):
            save_file(half, root / "llm" / name, {"format": "pt"})
        weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        dump(root / "llm" / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    else:
        save_file(llm, root / "llm" / "model.safetensors")
    save_file(random_tensors(tower_shapes(), dtype), root / "vision_tower" / "model.safetensors")
    shapes = projector_shapes(projector, channels)
    save_file(random_tensors(shapes, dtype), root / "mm_projector" / "model.safetensors")
    return root


def weights(root: Path) -> dict[str, Tensor]:
    """All tensors below a folder, by folder and name."""
    found: dict[str, Tensor] = {}
    for path in sorted(root.rglob("*.safetensors")):
        found |= {f"{path.parent.relative_to(root)}/{name}": value for name, value in load_file(path).items()}
    return found


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (value.dtype, value.shape) == (b[name].dtype, b[name].shape)
        assert torch.equal(value.view(torch.uint8), b[name].view(torch.uint8)), name


def configs(root: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(root)): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.json"))
        if path.name != INDEX_FILE
    }


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file({name: value.clone() for name, value in change(load_file(path)).items()}, path)


class Tiny:
    """What the tests of this folder build and look at checkpoints with."""

    TOP = TOP
    WIDTH = WIDTH
    HIDDEN = HIDDEN
    make = staticmethod(make_vila)
    words = staticmethod(words)
    weights = staticmethod(weights)
    configs = staticmethod(configs)
    edit = staticmethod(edit)
    dump = staticmethod(dump)
    change_weights = staticmethod(change_weights)
    assert_same_weights = staticmethod(assert_same_weights)
    llm_shapes = staticmethod(llm_shapes)
    tower_shapes = staticmethod(tower_shapes)
    projector_shapes = staticmethod(projector_shapes)


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def vila(tmp_path: Path) -> Path:
    """An original checkpoint that a test may damage."""
    return make_vila(tmp_path / "vila")
