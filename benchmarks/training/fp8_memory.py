"""Memory of FP8 training, counted in bytes, and what the rounding costs: optimizer moments and saved activations.

A Qwen2 decoder learns to predict a repeating text for some steps; its moments are then rounded in both ways, and the
tensors that autograd keeps are counted. Bytes are counted, not measured, so the figures do not depend on the machine.

python benchmarks/training/fp8_memory.py              # three seeds
python benchmarks/training/fp8_memory.py --quick      # one seed, fewer steps
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import claim, write_result
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from nvila.training.optimizers import Fp8AdamW
from nvila.training.optimizers.fp8_moments import quantize_moment
from nvila.training.precision.saved_activations import PackedActivation, save_in_fp8

BETAS = (0.9, 0.95)
VOCABULARY = 256


def main() -> int:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps")
    args = parser.parse_args()
    seeds, steps = ([0], 20) if args.quick else ([0, 1, 2], 100)
    runs = [measure(seed, steps) for seed in seeds]
    for run in runs:
        print(run)

    def values(name: str) -> list[float]:
        return [run[name] for run in runs]

    found = [
        claim(
            "moment-bytes",
            "bytes of fp32 AdamW moments over those of FP8 AdamW",
            values("moments"),
            "at least 3.5",
            min(values("moments")) >= 3.5,
            "8 bytes a parameter against 2 and three fp32 numbers for every 128",
        ),
        claim(
            "update-error",
            "error of the update direction with plain E4M3 moments over that with expanded range",
            values("update"),
            "at least 1.5",
            min(values("update")) >= 1.5,
            "relative distance of m / (sqrt(v) + eps) from fp32: plain "
            + ", ".join(f"{run['plain']:.4f}" for run in runs)
            + "; expanded "
            + ", ".join(f"{run['expanded']:.4f}" for run in runs),
        ),
        claim(
            "activation-bytes",
            "bytes that a decoder in bf16 keeps for the backward pass over those with FP8 activations",
            values("activations"),
            "at least 1.5",
            min(values("activations")) >= 1.5,
            "attention and rotary embedding keep theirs in bf16; weights are not counted",
        ),
    ]
    path = write_result("training-fp8-memory-quick" if args.quick else "training-fp8-memory", found, {"runs": runs})
    print(f"written: {path}")
    return 0


def measure(seed: int, steps: int) -> dict[str, float]:
    """Train a decoder and take the figures of one seed."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    config._attn_implementation = "sdpa"
    model: Any = Qwen2ForCausalLM(config).train()
    wide = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS)
    narrow_model = copy.deepcopy(model)
    narrow = Fp8AdamW(narrow_model.parameters(), lr=1e-3, betas=BETAS)
    for step in range(steps):
        for optimizer, one in ((wide, model), (narrow, narrow_model)):
            if one is model or step == 0:
                ids = batch(step, seed)
                optimizer.zero_grad()
                one(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
    wide_bytes = sum(
        state[name].numel() * state[name].element_size()
        for state in wide.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    )
    errors = {expand: update_error(wide, expand=expand) for expand in (False, True)}
    decoder = copy.deepcopy(model.model).bfloat16()
    saving = copy.deepcopy(decoder)
    save_in_fp8(saving)
    return {
        "seed": seed,
        "moments": wide_bytes / narrow.state_bytes,
        "plain": errors[False],
        "expanded": errors[True],
        "update": errors[False] / errors[True],
        "activations": kept_bytes(decoder) / kept_bytes(saving),
    }


def batch(step: int, seed: int) -> Tensor:
    """Rows of a text that repeats with a period of its own."""
    draw = torch.Generator().manual_seed(1000 * seed + step)
    period = torch.randint(0, VOCABULARY, (8, 16), generator=draw)
    return period.repeat(1, 4)


def update_error(optimizer: torch.optim.Optimizer, *, expand: bool) -> float:
    """Relative distance of the update direction made of rounded moments from that of exact ones."""
    distance, size = 0.0, 0.0
    for state in optimizer.state.values():
        m, v = state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()
        rounded_m, rounded_v = (quantize_moment(x, expand=expand).dequantize(x.numel()) for x in (m, v))
        exact = m / (v.sqrt() + 1e-8)
        found = rounded_m / (rounded_v.sqrt() + 1e-8)
        # A second moment that was rounded to zero gives an update without bound, which AdamW would make, too.
        distance += float((found.clamp(-10, 10) - exact.clamp(-10, 10)).square().sum())
        size += float(exact.clamp(-10, 10).square().sum())
    return float((distance / size) ** 0.5)


def kept_bytes(decoder: nn.Module) -> int:
    """Bytes that autograd keeps after a forward pass, every storage once, weights left out."""
    seen: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x if x._base is None else x._base, nn.Parameter):
            seen[x.untyped_storage().data_ptr()] = x.detach()
        return x.detach()

    gc.collect()
    x = torch.randn(2, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(pack, lambda x: x):
        output = decoder(inputs_embeds=x).last_hidden_state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the walk touches deprecated attributes of torch
        packed = [one for one in gc.get_objects() if isinstance(one, PackedActivation)]
    assert output.requires_grad
    return sum(x.untyped_storage().nbytes() for x in seen.values()) + sum(one.num_bytes for one in packed)


if __name__ == "__main__":
    raise SystemExit(main())
