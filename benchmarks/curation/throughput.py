"""Compares scoring a data set with the bare forward pass of both models, and with one sample at a time.

Two small NVILA models with random weights score questions of easy-VQA, several to a picture. Ours is all that a
process of `nvila curate` does: reading, decoding, tiling, tokenising, batching, both models, writing shards. Bare is
the forward pass of both models and the loss on the very same batches, made beforehand. Naive prepares and runs every
sample alone, for a twentieth of the questions.

python benchmarks/curation/throughput.py            # 500 questions, five repeats
python benchmarks/curation/throughput.py --quick    # 300 questions, two repeats
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_result import Claim, claim, write_result

BATCH_TOKENS = 4096
THREADS = 1  # several would measure who else wants the cores
# Wide enough that the models and not the interpreter are what takes time, as with real ones.
SIZES = {"small": (128, 4), "large": (256, 6)}
_NAIVE_SHARE = 20
Step = Callable[[], object]


def main() -> int:
    """Run, print a table, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer questions, two repeats")
    args = parser.parse_args()
    from nvila_platform.launch import calm_threads

    calm_threads()
    import torch

    torch.set_num_threads(THREADS)
    records, repeats = (300, 2) if args.quick else (500, 5)
    with tempfile.TemporaryDirectory(prefix="nvila-bench-") as scratch:
        steps = prepare(Path(scratch), records)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                seconds[name].append(round(time.perf_counter() - started, 3))
                share = _NAIVE_SHARE if name == "naive" else 1
                print(f"{name:6} {records / share / seconds[name][-1]:9.1f} samples/s", flush=True)
    path = write_result(
        "curation-throughput-quick" if args.quick else "curation-throughput",
        claims(seconds),
        {"records": records, "batch_tokens": BATCH_TOKENS, "threads": THREADS, "sizes": SIZES, "seconds": seconds},
    )
    print(f"written: {path}")
    return 0


def prepare(scratch: Path, records: int) -> dict[str, Step]:
    """Build models, data and batches; return what is timed."""
    from nvila.curation.scorers import load_scorer
    from nvila.data.mixtures import Registry

    scorers = {
        size: load_scorer(build(scratch / size, *shape), dtype="fp32", device="cpu") for size, shape in SIZES.items()
    }
    stream = Registry().open("easy-vqa")
    ours = scoring(scratch / "shards", stream, scorers, records)
    return {"ours": ours, "bare": bare(stream, scorers, records), "naive": naive(stream, scorers, records)}


def build(folder: Path, width: int, layers: int) -> Path:
    """Save a model with random weights whose vocabulary is the words of easy-VQA."""
    import torch

    from nvila.assembly import build_model, build_processor, save_model
    from nvila.data import easy_vqa
    from nvila.data.tokenizers import build_word_tokenizer
    from nvila.training.config import ModelConfig

    words = [message.text for sample in easy_vqa.questions("test") for message in sample.messages]
    tokenizer = build_word_tokenizer(words, model_max_length=256)
    tower = {"model_type": "siglip_vision_model", "image_size": 64, "patch_size": 4, "vision_use_head": False}
    decoder = {"model_type": "qwen2", "num_key_value_heads": 2, "max_position_embeddings": 256}
    shape = {"hidden_size": width, "intermediate_size": 4 * width}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": 4}
    config = ModelConfig(
        vision=tower | shape,
        language=decoder | shape,
        projector="mlp_downsample_2x2_fix",
        select_layer=-2,
        max_length=256,
    )
    torch.manual_seed(width)
    model = build_model(config, tokenizer).eval()
    save_model(model, build_processor(model.config, tokenizer), folder)
    return folder


def scoring(folder: Path, stream: Any, scorers: dict[str, Any], records: int) -> Step:
    """Return a whole run of one process over the first records."""
    from nvila.curation.scoring_run import ScoringRun
    from nvila.curation.shards import Shards

    class First:
        name = stream.name

        def records(self, start: int = 0, stop: int | None = None) -> Any:
            return stream.records(start, min(records, records if stop is None else stop))

    def run() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shards = Shards(directory=folder, size=4096, digest="bench")
        samplings = frozenset({scorers["small"].sampling, scorers["large"].sampling})
        ScoringRun(
            stream=First(),
            load=lambda size: scorers[size],
            samplings=samplings,
            shards=shards,
            batch_tokens=BATCH_TOKENS,
        ).run()

    return run


def bare(stream: Any, scorers: dict[str, Any], records: int) -> Step:
    """Return the forward passes and losses of all batches of both models, with their tensors made beforehand."""
    import torch

    from nvila.curation.encoding import score_all
    from nvila.curation.scoring import nvila_hidden
    from nvila.curation.windows import windows
    from nvila.data.collation import collate
    from nvila.losses import supervised_nll

    made: list[tuple[Any, Any, Any]] = []
    for scorer in scorers.values():
        for window in windows(stream.records(0, records), frozenset({scorer.sampling})):
            encoded = encoded_of(scorer, window)

            def keep(rows: Any, scorer: Any = scorer, window: Any = window) -> Any:
                from nvila.curation.scoring import AnswerScore

                batch = collate(rows, 0)
                made.append((scorer.model, batch, scorer._pixels(window, batch)))
                return [AnswerScore(nll=0.0, num_tokens=1) for row in rows for _ in row]

            score_all(encoded, BATCH_TOKENS, keep)

    @torch.inference_mode()
    def run() -> None:
        for model, batch, pixels in made:
            supervised_nll(model.lm_head, nvila_hidden(model, batch, pixels), batch.labels)[0].tolist()

    return run


def encoded_of(scorer: Any, window: Any) -> Any:
    """Tokenise a window as the scorer does."""
    from nvila.curation.encoding import encode_all
    from nvila.data.conversation import ConversationEncoder

    processor = scorer.processor
    encoder = ConversationEncoder(
        processor.tokenizer,
        processor.num_image_tokens,
        2**31,
        layouts=lambda media: scorer._layouts(window, media),
    )
    return encode_all(window, encoder, 256)


def naive(stream: Any, scorers: dict[str, Any], records: int) -> Step:
    """Return one forward pass for every sample and model, prepared when it is its turn; a part of the records."""
    from nvila.curation.windows import windows

    def run() -> None:
        for window in windows(stream.records(0, records // _NAIVE_SHARE), frozenset(), max_records=1):
            for scorer in scorers.values():
                scorer.score(window, BATCH_TOKENS)

    return run


def claims(seconds: dict[str, list[float]]) -> list[Claim]:
    """Turn times into claims."""
    against_bare = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["bare"], strict=True)]
    against_naive = [
        _NAIVE_SHARE * theirs / ours for ours, theirs in zip(seconds["ours"], seconds["naive"], strict=True)
    ]
    middle = sorted(against_bare)[len(against_bare) // 2]
    gain = sorted(against_naive)[len(against_naive) // 2]
    return [
        claim(
            "throughput-bare",
            "samples a second of scoring over those of the bare forward passes on the same batches",
            against_bare,
            "at least 0.8",
            middle >= 0.8,
        ),
        claim(
            "throughput-naive",
            "samples a second of scoring over those of one sample at a time",
            against_naive,
            "at least 3",
            gain >= 3,
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
