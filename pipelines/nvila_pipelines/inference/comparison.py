"""Ways to serve one model, side by side on one's own data: what `nvila bench serve` measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from nvila.errors import DataError
from nvila_pipelines.curation.spec import DataSpec

if TYPE_CHECKING:
    from nvila.data.readers.record import RecordStream
    from nvila.inference.config import EngineConfig
    from nvila.inference.engine import Engine
    from nvila.inference.load import LoadRun, Prompt
    from nvila.progress import Reporter

HEAD = (
    "way",
    "tokens/s",
    "x generate",
    "first token p50",
    "p95",
    "between tokens p50",
    "p95",
    "media known",
    "prompt known",
    "same answers",
)
_REPEATS = 3
BASELINE = "generate, one at a time"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRequest:
    """What to compare.

    Args:
        model: Folder of the model, wide or quantized.
        data: Data set whose questions are asked.
        requests: How many of its conversations.
        max_tokens: Most tokens of an answer.
        streams: Numbers of callers that the engine serves at once.
        decoder: What runs the language model.
        compile: Whether decoding is compiled: auto, on or off.
        dtype: Type of the weights; None is that of the stored ones.
        device: Where to work.
    """

    model: Path
    data: DataSpec
    requests: int = 32
    max_tokens: int = 64
    streams: tuple[int, ...] = (1, 4, 16)
    decoder: str = "auto"
    compile: str = "auto"
    dtype: str | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to serve, over all repeats.

    Args:
        name: What was done.
        tokens_per_s: Median over repeats.
        ratio: Median of how many times as many as with `generate` in the same repeat.
        low: Smallest ratio of a repeat.
        high: Largest.
        first_token_ms: 50th and 95th percentile over all requests, their media prepared within.
        between_ms: The same of the time between neighbouring pieces; None where every answer came as one piece.
        media_known: Share of look-ups of media that found visual tokens; None when nothing was looked up.
        prompt_known: Share of the prompts' tokens whose keys and values were there already.
        same_answers: Share of answers that are those of `generate`, token by token.
    """

    name: str
    tokens_per_s: float
    ratio: float
    low: float
    high: float
    first_token_ms: tuple[float, float]
    between_ms: tuple[float, float] | None
    media_known: float | None
    prompt_known: float | None
    same_answers: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(slots=True)
class _Runs:
    """What one way measured so far."""

    runs: list[LoadRun] = field(default_factory=list)
    media_found: int = 0
    media_asked: int = 0
    cached: int = 0
    prompted: int = 0


def compare_serving(request: ServingRequest, reporter: Reporter) -> list[Way]:
    """Ask the same questions in every way, in turns, each engine with empty caches.

    Raises:
        NvilaError: The model or the data cannot be used.
    """
    from nvila.inference.engine import Engine, SamplingParams
    from nvila.inference.load import run_engine, run_generate

    first = _load(request)
    params = SamplingParams(max_tokens=request.max_tokens)
    prompts = choose_prompts(first, request, reporter)
    found = {BASELINE: _Runs()} | {_name(streams): _Runs() for streams in request.streams}
    total = 1 + _REPEATS * len(found)
    reporter.progress("serve", 0, total)
    run_generate(first, prompts[:1], params)  # warms up
    run_engine(first, prompts[:1], params, streams=1)
    done = 1
    for _ in range(_REPEATS):
        found[BASELINE].runs.append(run_generate(first, prompts, params))
        done += 1
        reporter.progress("serve", done, total)
        for streams in request.streams:
            engine = Engine(first.model, first.processor, _config(request, streams))
            runs = found[_name(streams)]
            runs.runs.append(run_engine(engine, prompts, params, streams=streams))
            _count(runs, engine)
            done += 1
            reporter.progress("serve", done, total)
    return [_way(name, runs, found[BASELINE]) for name, runs in found.items()]


def choose_prompts(engine: Engine, request: ServingRequest, reporter: Reporter) -> list[Prompt]:
    """Take the first conversations of the data that the model can answer at full length.

    Raises:
        DataError: There is none.
    """
    from nvila.curation.windows import FrameSampling
    from nvila.inference.engine import SamplingParams
    from nvila_pipelines.curation.spec import open_stream

    stream = open_stream(request.data)
    video = engine.processor.video_processor
    params = SamplingParams(max_tokens=request.max_tokens)
    capacity = min(engine.max_length, engine.stats().blocks * engine.config.block_size)
    prompts: list[Prompt] = []
    skipped, reason = 0, ""
    for prompt in _conversations(stream, FrameSampling(video.num_frames, video.fps)):
        try:
            running = engine.stream(prompt.messages, prompt.media, params)
            running.close()
            room = capacity - running.usage.prompt_tokens
            if room < request.max_tokens:
                raise DataError(f"the prompt leaves room for {room} tokens of the answer")
        except DataError as e:
            skipped, reason = skipped + 1, e.message
            continue
        prompts.append(prompt)
        if len(prompts) == request.requests:
            break
    if not prompts:
        raise DataError(
            f"no conversation of {stream.name} can be asked" + (f": {reason}" if reason else ""),
            "use data with answers, or a smaller --max-tokens",
        )
    if skipped:
        reporter.notice(f"{skipped} conversations are left out, the last one because {reason}")
    if len(prompts) < request.requests:
        reporter.notice(f"{stream.name} has {len(prompts)} conversations that can be asked, not {request.requests}")
    return prompts


def way_row(way: Way) -> tuple[str, ...]:
    """Return the row of a way under `HEAD`."""
    from nvila_pipelines.report.formats import MISSING, percent

    return (
        way.name,
        f"{way.tokens_per_s:.1f}",
        f"{way.ratio:.2f} ({way.low:.2f} to {way.high:.2f})",
        *(f"{value:.1f} ms" for value in way.first_token_ms),
        *(MISSING if value is None else f"{value:.1f} ms" for value in way.between_ms or (None, None)),
        percent(way.media_known),
        percent(way.prompt_known),
        percent(way.same_answers),
    )


def _load(request: ServingRequest) -> Engine:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from nvila.inference.engine import Engine

    disable_progress_bar()
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    options: dict[str, Any] = {} if request.dtype is None else {"dtype": kinds[request.dtype]}
    return Engine.load(request.model, _config(request, 1), device_map=request.device, **options)


def _config(request: ServingRequest, streams: int) -> EngineConfig:
    from nvila.inference.config import EngineConfig

    given: dict[str, Any] = {"decoder": request.decoder, "compile": request.compile}
    return EngineConfig(max_running=streams, **given)


def _conversations(stream: RecordStream, sampling: Any) -> Iterator[Prompt]:
    """Yield the questions of a data set with their decoded media; records without an answer are passed by."""
    from nvila.curation.windows import windows
    from nvila.data.records import Sample
    from nvila.inference.load import Prompt

    # Small windows: most callers want a few conversations, and what is decoded ahead of them is for nothing.
    for window in windows(stream.records(), frozenset({sampling}), max_records=16):
        for sample in window.samples:
            if not isinstance(sample, Sample):
                continue
            messages = sample.messages[:-1]
            parts = [part for message in messages for part in message.content if part.type != "text"]
            media = {
                part.value: window.images[part.value] if part.type == "image" else window.videos[part.value, sampling]
                for part in parts
            }
            yield Prompt(messages=messages, media=media)


def _count(runs: _Runs, engine: Engine) -> None:
    stats = engine.stats()
    runs.media_found += stats.media_hits
    runs.media_asked += stats.media_hits + stats.media_misses
    for trace in runs.runs[-1].traces:
        assert trace.usage is not None
        runs.cached += trace.usage.cached_tokens
        runs.prompted += trace.usage.prompt_tokens


def _way(name: str, own: _Runs, baseline: _Runs) -> Way:
    ratios = [mine.tokens_per_s / other.tokens_per_s for mine, other in zip(own.runs, baseline.runs, strict=True)]
    traces = [trace for run in own.runs for trace in run.traces]
    answers = [pair for run, base in zip(own.runs, baseline.runs, strict=True) for pair in _pairs(run, base)]
    gaps = [gap for trace in traces for gap in trace.gaps_s]
    return Way(
        name=name,
        tokens_per_s=median(run.tokens_per_s for run in own.runs),
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        first_token_ms=_percentiles([trace.first_token_s for trace in traces]),
        between_ms=_percentiles(gaps) if gaps else None,
        media_known=own.media_found / own.media_asked if own.media_asked else None,
        prompt_known=own.cached / own.prompted if own.prompted else None,
        same_answers=sum(list(mine) == list(other) for mine, other in answers) / len(answers),
    )


def _pairs(run: LoadRun, base: LoadRun) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    for mine, other in zip(run.traces, base.traces, strict=True):
        yield mine.token_ids, other.token_ids


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the 50th and 95th percentile in milliseconds."""
    from nvila.inference.load import percentile

    return 1000 * percentile(seconds, 50), 1000 * percentile(seconds, 95)


def _name(streams: int) -> str:
    return f"engine, {streams} at once" if streams > 1 else "engine, one at a time"
