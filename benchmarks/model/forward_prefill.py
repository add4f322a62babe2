"""Times NVILA against transformers' own LLaVA class: one training step's forward and backward pass, and prefill.

Both have the same tower, projector of the same two layers, decoder, weights and tokens, in one process; the repeats
alternate, and processor time of one thread is measured, so that a busy machine counts little. Before timing, the
logits of both are compared. The projector here does not compress, because LLaVA's cannot: what compression saves is
measured in scale_compress.py.

python benchmarks/model/forward_prefill.py
python benchmarks/model/forward_prefill.py --quick
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import Claim, claim, write_result
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from nvila.configuration import NVILAConfig
from nvila.modeling import NVILAForConditionalGeneration

_IMAGE, _VOCABULARY = 7, 32_000
_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}
_LANGUAGE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 4096,
}
_WHY = {
    "forward-backward": "one in nine positions is supervised: NVILA makes logits of those, LLaVA of all; and NVILA "
    "leaves out the tower's block behind the selected layer",
    "prefill": "NVILA leaves out the tower's block behind the selected layer",
}
# LLaVA's projector names by ours.
_PROJECTOR = {"layers.0": "linear_1", "layers.2": "linear_2"}


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--text", type=int, default=64, help="text tokens of a row; half of them are supervised")
    args = parser.parse_args()
    repeats = 3 if args.quick else 15
    torch.set_num_threads(1)
    ours, theirs = build()
    inputs = make_inputs(args.rows, args.text)
    check_equal(ours, theirs, inputs)
    claims: list[Claim] = []
    seconds: dict[str, Any] = {}
    for name, step in (("forward-backward", train_step), ("prefill", prefill)):
        pairs = interleave(partial(step, ours, inputs), partial(step, theirs, inputs), repeats)
        ratios = [llava / nvila for nvila, llava in pairs]
        seconds[name] = [{"nvila": round(nvila, 4), "llava": round(llava, 4)} for nvila, llava in pairs]
        what = f"processor time of LLaVA divided by that of NVILA, {name}"
        found = claim(name, what, ratios, "at least 1.0", median(ratios) >= 1.0, _WHY[name])
        claims.append(found)
        print(f"{name}: {found.ratio:.2f}x ({found.low:.2f} to {found.high:.2f})", flush=True)
    details = {"rows": args.rows, "positions": inputs["input_ids"].shape[1], "seconds": seconds}
    if args.quick:
        return 0
    print(f"written: {write_result('model-forward-prefill', claims, details)}")
    return 0


def build() -> tuple[NVILAForConditionalGeneration, LlavaForConditionalGeneration]:
    """Build both models with the same weights."""
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=dict(_VISION),
            text_config=dict(_LANGUAGE),
            image_token_index=_IMAGE,
            vision_feature_select_strategy="full",
            vision_feature_layer=-2,
        )
    )
    ours = NVILAForConditionalGeneration(
        NVILAConfig(
            vision_config=dict(_VISION),
            text_config=dict(_LANGUAGE),
            mm_projector_type="mlp2x_gelu",
            image_token_id=_IMAGE,
            video_token_id=_IMAGE + 1,
        )
    )
    ours.model.vision_tower.load_state_dict(theirs.model.vision_tower.state_dict())
    ours.model.language_model.load_state_dict(theirs.model.language_model.state_dict())
    ours.lm_head.load_state_dict(theirs.lm_head.state_dict())
    projector = theirs.model.multi_modal_projector.state_dict()
    renamed = {
        ours_name + name.removeprefix(theirs_name): tensor
        for ours_name, theirs_name in _PROJECTOR.items()
        for name, tensor in projector.items()
        if name.startswith(theirs_name)
    }
    ours.model.mm_projector.load_state_dict(renamed)
    return ours, theirs


def make_inputs(rows: int, text: int) -> dict[str, Tensor]:
    """Make a batch of one image and some text a row."""
    noise = torch.Generator().manual_seed(1)
    words = torch.randint(100, _VOCABULARY, (rows, text), generator=noise)
    image = torch.full((rows, (_VISION["image_size"] // _VISION["patch_size"]) ** 2), _IMAGE)
    ids = torch.cat([words[:, :8], image, words[:, 8:]], dim=1)
    labels = ids.clone()
    labels[:, : -text // 2] = -100
    pixels = torch.randn(rows, 3, 224, 224, generator=noise)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}


def check_equal(ours: Any, theirs: Any, inputs: dict[str, Tensor]) -> None:
    """Compare logits and losses before anything is timed."""
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, atol=1e-4, rtol=1e-4)


def train_step(model: Any, inputs: dict[str, Tensor]) -> None:
    """One forward and backward pass."""
    model.train()
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()


def prefill(model: Any, inputs: dict[str, Tensor]) -> None:
    """Run a prompt to the logits of its first answer token."""
    model.eval()
    with torch.inference_mode():
        given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        model(**given, use_cache=True, logits_to_keep=1)


def interleave(first: Callable[[], None], second: Callable[[], None], repeats: int) -> list[tuple[float, float]]:
    """Time both by turns, swapping who goes first; one round of each is not counted."""
    pairs = []
    for number in range(repeats + 1):
        if number % 2:
            a, b = _seconds(first), _seconds(second)
        else:
            b, a = _seconds(second), _seconds(first)
        pairs.append((a, b))
    return pairs[1:]


def _seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


if __name__ == "__main__":
    raise SystemExit(main())
