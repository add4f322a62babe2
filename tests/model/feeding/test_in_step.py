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
from nvila.data.conversation import ConversationEncoder

WORKER = Path(__file__).with_name("zero3_worker.py")


def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zero3_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
