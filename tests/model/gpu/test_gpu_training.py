"""Training on a GPU: DeepSpeed against plain torch, attention, stages from end to end, and memory against the plan."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from nvila.assembly import load_model
from nvila.data.collation import Batch
from nvila.data.conversation import ConversationEncoder
from nvila.data.media import ImageTable
from nvila.data.packing import collate_packed, flatten, pack
from nvila.data.records import vqa_sample
from nvila.data.tensors import PixelCache
from nvila.modeling import NVILAForConditionalGeneration
from nvila.training.config import Fp8Config, ModelConfig, PartName, PrecisionConfig, StageConfig, TrainConfig
from nvila.training.engine import build_engine
from nvila.training.loop import model_inputs
from nvila.training.planning.memory import Share, stage_activations
from nvila.training.planning.sizes import meta_model, nvila_config, part_sizes
from nvila.training.planning.states import state_bytes
from nvila.training.run import set_attention, train, trained_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

pytestmark = pytest.mark.gpu
Move = Callable[[Any], Any]
ALL: dict[PartName, float] = {"vision": 1e-3, "projector": 1e-3, "language": 1e-3}


def stage(**changes: Any) -> StageConfig:
    values: dict[str, Any] = {
        "name": "s", "data": "d", "steps": 6, "lr": ALL, "images_per_step": 2, "schedule": "linear",
    }  # fmt: skip
    return StageConfig(**(values | changes))


@pytest.fixture
def losses(
    model: NVILAForConditionalGeneration, model_config: ModelConfig, batch: Batch, tiles: PixelCache, moved: Move
) -> Callable[..., list[float]]:
    """Train a copy of the model for some steps; DeepSpeed moves it to the device by itself."""
    inputs = model_inputs(batch, tiles.tensors(batch.images, ()))

    def run(**changes: Any) -> list[float]:
        config = TrainConfig(model=model_config, stages=(stage(),), **changes)
        trained = copy.deepcopy(model).train()
        if config.backend == "torch":
            trained = moved(trained)
        engine = build_engine(trained, trained_parts(trained, stage()), config)
        found = []
        for _ in range(4):
            loss = engine(**inputs).loss
            found.append(float(loss.detach()))
            engine.backward(loss)
            assert engine.step(1.0).applied
        assert next(engine.module.parameters()).device.type == "cuda"
        engine.close()
        return found

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.usefixtures("one_process")
def test_deepspeed_gives_the_losses_of_torch(
    losses: Callable[..., list[float]], zero_stage: int, precision: Any
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    chosen = PrecisionConfig(name=precision)
    expected = losses(backend="torch", precision=chosen)
    found = losses(backend="deepspeed", zero_stage=zero_stage, precision=chosen)
    assert found == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 0.02)


def test_bf16_is_bf16(losses: Callable[..., list[float]]) -> None:
    """fp32 and bf16 give losses that are near and not the same, as they would be if autocast had been switched off."""
    wide, narrow = (losses(backend="torch", precision=PrecisionConfig(name=name)) for name in ("fp32", "bf16"))
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.usefixtures("one_process")
def test_bf16_is_bf16_under_deepspeed(losses: Callable[..., list[float]]) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    wide, narrow = (losses(zero_stage=2, precision=PrecisionConfig(name=name)) for name in ("fp32", "bf16"))
    assert wide != pytest.approx(narrow, rel=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_packed_attention_gives_the_loss_and_gradient_of_eager(
    attention: Any, model: NVILAForConditionalGeneration, encoder: ConversationEncoder, tiles: PixelCache, moved: Move
) -> None:
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is built for one CUDA and one torch only")
    questions = [("a", "what color?", "red"), (None, "what?", "no"), ("b", "is there a circle?", "yes yes")]
    samples = [
        encoder(vqa_sample(id="x", source="s", image=image, question=question, answer=answer))
        for image, question, answer in questions
    ]
    packed = collate_packed(pack(samples, 128), pad_token_id=0)
    pixels = tiles.tensors(packed.images, ())
    pixels["pixel_values"] = pixels["pixel_values"].bfloat16()
    losses, gradients = [], []
    for name, inputs in (("eager", model_inputs(packed, {})), (attention, flatten(packed).model_inputs())):
        tried = moved(nn.Module.to(copy.deepcopy(model).train(), torch.bfloat16))
        if name == "sdpa":
            set_attention(tried, "sdpa")
        else:
            tried.model.language_model.set_attn_implementation(name)
        loss = tried(**moved({**inputs, **pixels})).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(tried.model.language_model.layers[0].self_attn.q_proj.weight.grad.float().flatten())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert float(torch.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.99


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.usefixtures("one_process")
def test_stages_train_and_leave_models_that_load_anywhere(
    backend: Any,
    precision: Any,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    image_table: ImageTable,
    tmp_path: Path,
) -> None:
    if backend == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    data = [
        vqa_sample(id=f"{key}{number}", source="s", image=key, question="what color is the shape?", answer=answer)
        for key in "abcdefgh"
        for number, answer in enumerate(("red", "blue"))
    ]
    rates: list[dict[PartName, float]] = [{"projector": 1e-3}, {"language": 1e-3}]
    stages = tuple(stage(name=name, lr=lr) for name, lr in zip(("one", "two"), rates, strict=True))
    fp8 = Fp8Config(backend="emulated", min_features=32)
    config = TrainConfig(
        model=model_config,
        stages=stages,
        backend=backend,
        attention="sdpa",
        precision=PrecisionConfig(name=precision, fp8=fp8),
    )
    final = train(config, {"d": data}, image_table, tokenizer, tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    loaded, _ = load_model(final)
    assert next(loaded.parameters()).device.type == "cpu"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planned_memory_is_what_cuda_allocates(precision: Any, device: str) -> None:
    """The plan's states and activations against the peak of a step; kernels keep little beside them."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    model = ModelConfig(
        vision=sizes | {
            "model_type": "siglip_vision_model", "num_attention_heads": 4, "image_size": 64, "patch_size": 4,
            "vision_use_head": False,
        },
        language=sizes | {
            "model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
            "vocab_size": 512, "pad_token_id": 0, "max_position_embeddings": 2048,
        },
        projector="mlp_downsample", select_layer=-2, max_length=2048,
    )  # fmt: skip
    config = nvila_config(model)
    config.image_token_id, config.image_end_token_id = 510, 509
    made = nn.Module.to(NVILAForConditionalGeneration(config).train(), device)
    made.set_attn_implementation("sdpa")
    rows, text = 8, 400
    ids = torch.randint(1, 400, (rows, config.num_image_tokens + text), device=device)
    ids[:, : config.num_image_tokens] = 510
    labels = ids.clone()
    labels[:, : config.num_image_tokens + text // 2] = -100
    pixels = torch.randn(rows, 3, 64, 64, device=device)
    run = TrainConfig(
        model=model, stages=(stage(),), attention="sdpa", backend="torch", precision=PrecisionConfig(name=precision)
    )
    engine = build_engine(made, trained_parts(made, stage()), run)

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=labels, pixel_values=pixels).loss)
        engine.step(1.0)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    parts = part_sizes(meta_model(nvila_config(model)), stage())
    states = state_bytes(
        sum(part.total for part in parts.values()),
        [size for part in parts.values() for size in part.trained],
        zero_stage=0,
        world=1,
        optimizer="adamw",
    )
    share = Share(
        rows=rows, row=config.num_image_tokens + text, tiles=rows, projected=rows, supervised=rows * text // 2
    )
    activations = stage_activations(run, stage(), nvila_config(model), share, checkpointing=False)
    planned = states.parameters + states.gradients + states.optimizer + activations
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
