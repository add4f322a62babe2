"""16 streams together against one at a time, on one engine; and the first token with and without the media cache.

Processor time of one thread, so that a busy machine counts little; both ways take turns.

python benchmarks/inference/concurrency.py
python benchmarks/inference/concurrency.py --quick
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import claim, write_result
from PIL import Image
from smollm import build

from nvila.data.records import Message, Part
from nvila.inference.engine import Engine, EngineConfig, SamplingParams
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

_GOAL_TOGETHER, _GOAL_CACHED = 4.0, 3.0


def main() -> int:
    """Run, print the figures, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat, few tokens")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--decoder", default="transformers", choices=("transformers", "fused", "fused-int8"))
    args = parser.parse_args()
    repeats, tokens = (1, 8) if args.quick else (3, args.tokens)
    torch.set_num_threads(1)
    model, processor = build()
    together: list[float] = []
    alone: list[float] = []
    first: list[float] = []
    for _ in range(repeats):
        for running, rates in ((1, alone), (args.streams, together)):
            config = EngineConfig(max_running=running, prefix_reuse=False, decoder=args.decoder)
            rate, waits = _tokens_per_second(Engine(model, processor, config), args.streams, tokens)
            rates.append(rate)
        first.append(quantiles(waits, n=20)[-1])
    ratios = [many / one for many, one in zip(together, alone, strict=True)]
    firsts = {reuse: _first_tokens(model, processor, repeats, prefix_reuse=reuse) for reuse in (True, False)}
    cached = {reuse: [one / other for one, other in zip(*times, strict=True)] for reuse, times in firsts.items()}
    print(f"{args.streams} streams: {median(together):.1f} tokens/s, one at a time {median(alone):.1f}")
    print(f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); p95 first token {median(first):.2f} s")
    for reuse, found in cached.items():
        way = "the engine as it is" if reuse else "without prefix reuse"
        print(f"first token, known picture, {way}: {median(found):.2f}x ({min(found):.2f} to {max(found):.2f}) faster")
    if args.quick:
        return 0
    what = f"tokens/s of {args.streams} concurrent streams over one at a time, SmolLM2-135M, decoder {args.decoder}"
    claims = [
        claim("concurrency", what, ratios, "at least 4.0", median(ratios) >= _GOAL_TOGETHER, "one thread's time"),
        claim(
            "media-cache",
            "time to the first token of a question about an image, image not known over known",
            cached[True],
            "at least 3.0",
            median(cached[True]) >= _GOAL_CACHED,
            "another question about the same image, the engine as it is: visual tokens are kept by the image's digest, "
            "keys and values of the prompt's beginning by its tokens and those digests; tower of 12 layers, 12 tiles",
        ),
        claim(
            "media-cache-alone",
            "the same without prefix reuse, as for an image that comes behind another text",
            cached[False],
            "reported",
            True,
            "what remains is the decoder's work on the prompt of 517 tokens; cutting tiles is 1% of it",
        ),
    ]
    details = {
        "decoder": args.decoder,
        "tokens_per_second": {"together": together, "alone": alone},
        "p95_first_token_s": first,
        "first_token_s": {
            "with prefix reuse" if reuse else "without": {"unknown": cold, "known": warm}
            for reuse, (cold, warm) in firsts.items()
        },
    }
    print(f"written: {write_result('inference-concurrency', claims, details)}")
    return 0


def _tokens_per_second(engine: Engine, streams: int, tokens: int) -> tuple[float, list[float]]:
    """Return the rate of all streams, and how long each waited for its first token."""
    params = SamplingParams(max_tokens=tokens)
    began = time.process_time()
    running = [engine.stream(_question(f"Tell me a story about number {i}."), {}, params) for i in range(streams)]
    waits = []
    for one in running:
        next(one)
        waits.append(time.process_time() - began)
        # One at a time: its answer is read to the end before the next one can begin.
        if engine.config.max_running == 1:
            list(one)
    for one in running:
        list(one)
    total = sum(one.usage.completion_tokens for one in running)
    return total / (time.process_time() - began), waits


def _first_tokens(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, repeats: int, *, prefix_reuse: bool
) -> tuple[list[float], list[float]]:
    """Time the first token about a new image and then, with another question, about the same one."""
    engine = Engine(model, processor, EngineConfig(prefix_reuse=prefix_reuse))
    cold: list[float] = []
    warm: list[float] = []
    for number in range(repeats + 1):
        picture = Image.effect_noise((896, 672), 40 + number).convert("RGB")
        for question, times in (("What is shown?", cold), ("Is it a map?", warm)):
            began = time.process_time()
            with_image = [Part(type="image", value="it"), Part(type="text", value=question)]
            running = engine.stream(
                [Message(role="user", content=tuple(with_image))], {"it": picture}, SamplingParams(max_tokens=1)
            )
            list(running)
            times.append(time.process_time() - began)
    return cold[1:], warm[1:]  # the first round warms up


def _question(text: str) -> list[Message]:
    return [Message(role="user", content=(Part(type="text", value=text),))]


if __name__ == "__main__":
    sys.exit(main())
