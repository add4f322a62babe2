"""Decoding one stream: the engine's decoders against bf16 `transformers.generate` of the same model.

A decoder that changes the weights is also compared in quality: mean negative log-likelihood of a text and how often the
likeliest token is the same. Processor time of one thread; all take turns.

python benchmarks/inference/decode.py
python benchmarks/inference/decode.py --quick
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import Claim, claim, write_result
from smollm import build
from torch import Tensor

from nvila.data.records import Message, Part
from nvila.inference.attention import BlockBatch, Span
from nvila.inference.blocks import BlockPool
from nvila.inference.config import DecoderName
from nvila.inference.decoders import build_decoder, cache_shape
from nvila.inference.engine import Engine, EngineConfig, SamplingParams
from nvila.inference.prompt import model_inputs
from nvila.modeling import NVILAForConditionalGeneration

_DECODERS: tuple[DecoderName, ...] = ("transformers", "fused", "fused-int8")
_TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
_GOAL, _NLL, _AGREE = 2.0, 0.05, 0.95


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat, few tokens")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt, about")
    args = parser.parse_args()
    repeats, tokens = (1, 8) if args.quick else (5, 48)
    torch.set_num_threads(1)
    model, processor = build()
    text = _TEXT.read_text(encoding="utf-8")
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = processor.tokenizer.decode(ids[: args.prompt - 40])
    question = [Message(role="user", content=(Part(type="text", value=prompt),))]
    engines = {name: Engine(model, processor, EngineConfig(decoder=name, prefix_reuse=False)) for name in _DECODERS}
    inputs = model_inputs(processor, question, {})
    theirs, rates = [], {name: list[float]() for name in _DECODERS}
    for _ in range(repeats):
        theirs.append(_generate_rate(model, inputs, tokens))
        for name, engine in engines.items():
            rates[name].append(_rate(engine, question, tokens))
    sample = torch.tensor(ids[:256] if args.quick else ids[:1536])
    wide = _logits(model, "transformers", sample)
    claims: list[Claim] = []
    quality: dict[str, dict[str, float]] = {}
    for name in _DECODERS:
        found = _logits(model, name, sample)
        nll = [float(torch.nn.functional.cross_entropy(one[:-1], sample[1:])) for one in (found, wide)]
        agree = float((found.argmax(-1) == wide.argmax(-1)).float().mean())
        quality[name] = {"nll": nll[0], "nll_bf16": nll[1], "top1_agreement": agree}
        ratios = [ours / other for ours, other in zip(rates[name], theirs, strict=True)]
        good = abs(nll[0] - nll[1]) <= _NLL and agree >= _AGREE
        met = median(ratios) >= _GOAL and good
        note = f"NLL {nll[0]:.3f} against {nll[1]:.3f}, top-1 agreement {agree:.3f}"
        what = f"decode tokens/s, batch 1, {name} over transformers.generate in bf16, SmolLM2-135M"
        claims.append(claim(f"decode-{name}", what, ratios, "at least 2.0 at equal quality", met, note))
        print(f"{name}: {median(rates[name]):.1f} tokens/s, {median(ratios):.2f}x generate; {note}", flush=True)
    if args.quick:
        return 0
    details = {"generate": theirs, "rates": rates, "quality": quality, "prompt": inputs["input_ids"].shape[1]}
    print(f"written: {write_result('inference-decode', claims, details)}")
    return 0


def _rate(engine: Engine, question: list[Message], tokens: int) -> float:
    """Return tokens/s after the first token."""
    running = engine.stream(question, {}, SamplingParams(max_tokens=tokens))
    next(running)
    said, began = running.usage.completion_tokens, time.process_time()
    list(running)
    return (running.usage.completion_tokens - said) / (time.process_time() - began)


def _generate_rate(model: NVILAForConditionalGeneration, inputs: dict[str, Tensor], tokens: int) -> float:
    """Return tokens/s of `generate` after the first token: the whole less the prompt with one token."""

    def seconds(count: int) -> tuple[float, int]:
        began = time.process_time()
        out = cast("Any", model).generate(**inputs, max_new_tokens=count, do_sample=False)
        return time.process_time() - began, out.shape[1] - inputs["input_ids"].shape[1]

    (short, one), (long, many) = seconds(1), seconds(tokens)
    return (many - one) / (long - short)


@torch.inference_mode()
def _logits(model: NVILAForConditionalGeneration, name: DecoderName, ids: Tensor) -> Tensor:
    """Return logits of every position of a text."""
    pool = BlockPool(cache_shape(model), 2**28, 16)
    batch = BlockBatch(pool, [Span(list(range(1, 1 + pool.blocks_for(len(ids)))), 0, len(ids))])
    decoder = build_decoder(model, EngineConfig(decoder=name), pool)
    return decoder(model.get_input_embeddings()(ids), batch, torch.arange(len(ids))).float()


if __name__ == "__main__":
    sys.exit(main())
