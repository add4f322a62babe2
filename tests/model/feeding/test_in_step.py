"""Processes that train together stay in step when one of them has text only: real processes, ZeRO 3, gloo."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from nvila.assembly import load_model
from nvila.data.collation import collate
from nvila.data.conversation import ConversationEncoder
from nvila.data.records import vqa_sample
from nvila.losses import head_cross_entropy
from nvila.modeling import NVILAForConditionalGeneration

WORKER = Path(__file__).with_name("zero3_worker.py")


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make this process believe that it is one of two; returns what it asked the other one about."""
    asked: list[int] = []

    def reduce(value: torch.Tensor, _: object) -> None:
        asked.append(int(value))
        value.fill_(5)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    return asked


def gradients_of_text(
    model: NVILAForConditionalGeneration, encoder: ConversationEncoder
) -> dict[str, torch.Tensor | None]:
    text = encoder(vqa_sample(id="t", source="s", image=None, question="what shape?", answer="red circle"))
    batch = collate([[text]], 0)
    model.train()
    model.zero_grad()
    model(
        input_ids=batch.input_ids, labels=batch.labels, position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
    ).loss.backward()  # fmt: skip
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def is_seen(name: str, model: NVILAForConditionalGeneration) -> bool:
    """Whether a parameter of tower or projector influences anything."""
    blocks = range(model.config.num_vision_blocks)
    tower = ("model.vision_tower.embeddings", *(f"model.vision_tower.encoder.layers.{n}." for n in blocks))
    return name.startswith((*tower, "model.mm_projector"))


def test_text_alone_leaves_gradients_of_zero_where_other_processes_may_have_some(
    fresh_model: NVILAForConditionalGeneration, encoder: ConversationEncoder, two: list[int]
) -> None:
    found = gradients_of_text(fresh_model, encoder)
    seen = [name for name in found if is_seen(name, fresh_model)]
    assert len(seen) > 20
    assert all(found[name] is not None and not found[name].any() for name in seen)  # type: ignore[union-attr]
    assert not two  # weights that are not sharded need no agreement


def test_text_alone_leaves_the_tower_out_in_one_process_and_where_it_is_frozen(
    fresh_model: NVILAForConditionalGeneration, encoder: ConversationEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = gradients_of_text(fresh_model, encoder)
    assert all(alone[name] is None for name in alone if is_seen(name, fresh_model))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    fresh_model.model.vision_tower.requires_grad_(False)
    fresh_model.model.mm_projector.requires_grad_(False)
    frozen = gradients_of_text(fresh_model, encoder)
    assert all(frozen[name] is None for name in frozen if is_seen(name, fresh_model))


def test_a_sharded_head_is_called_as_often_as_any_process_needs(
    two: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 6, bias=False)
    hidden, targets = torch.randn(7, 4, requires_grad=True), torch.randint(0, 6, (7,))
    expected = torch.nn.functional.cross_entropy(head(hidden), targets)
    [expected_gradient] = torch.autograd.grad(expected, hidden)
    vars(head.weight)["ds_id"] = 0  # what ZeRO 3 leaves on a parameter
    calls: list[int] = []
    head.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    found = head_cross_entropy(head, hidden, targets, chunk_tokens=3)
    assert two == [3]
    assert calls == [3, 3, 1, 0, 0]
    found.backward()
    assert len(calls) == 10
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(hidden.grad, expected_gradient)


def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zero3_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "language"])
def test_gradients_of_two_processes_of_which_one_has_no_media_are_those_of_one(
    frozen: bool, saved_model: Path, free_port: int, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is an extra")
    shutil.copytree(saved_model, tmp_path / "model")
    if frozen:
        (tmp_path / "frozen").touch()
    processes = []
    for rank in ("0", "1"):
        launched = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
        processes.append(subprocess.Popen([sys.executable, str(WORKER), str(tmp_path)], env=os.environ | launched))
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = load_file(tmp_path / "gradients.safetensors")
    model, processor = load_model(tmp_path / "model")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and ("vision" in name or "projector" in name)))
    model.train()
    module = worker()
    own = module.rows(ConversationEncoder(processor.tokenizer, processor.num_image_tokens, 128))
    model(**module.inputs([row for share in own for row in share], 0)).loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=2e-6, rtol=2e-4, msg=name)
            compared += 1
    assert compared > (20 if frozen else 50)
