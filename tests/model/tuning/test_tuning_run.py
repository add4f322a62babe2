"""Whole runs: resume, the best weights, early stopping, and bases that cannot be tuned."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from nvila.assembly import load_model
from nvila.data.readers.record import CountedStream
from nvila.errors import CapabilityError, ConfigError, InfrastructureError, NvilaError
from nvila.packed_attention import joins_rows
from nvila.training.config import CheckpointConfig, PrecisionConfig
from nvila.training.interrupts import StopRequest
from nvila.training.observer import StageStart, StepRecord
from nvila.tuning.adapters import base_digest, is_adapter
from nvila.tuning.answering import answer_stream
from nvila.tuning.config import TuneConfig
from nvila.tuning.held_out import EarlyStopping, read_losses
from nvila.tuning.methods import learning_rates, parse_method
from nvila.tuning.run import Tuned, load_base, tune

if TYPE_CHECKING:
    from nvila.processing import NVILAProcessor
    from nvila.tuning.data import TuneData


def config_of(data: TuneData, method: str = "ln+lora", dropout: float = 0.05, **changes: Any) -> TuneConfig:
    chosen = parse_method(method, rank=8, alpha=32.0, dropout=dropout)
    values: dict[str, Any] = {
        "method": chosen,
        "rates": learning_rates(chosen, 5e-3),
        "batch_tokens": data.batch_tokens(8),
        "micro_batch_tokens": data.batch_tokens(4),
        "max_length": data.max_length,
        "steps": 6,
        "eval_every": 2,
    }
    return TuneConfig(**values | changes)


def run(config: TuneConfig, base: Path, data: TuneData, out: Path, **options: Any) -> Tuned:
    return tune(config, base, base_digest(base), data, out, **options)


class StopAfter:
    """Asks to stop after a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.request, self._step = StopRequest(), step

    def on_stage_start(self, start: StageStart) -> None: ...

    def on_step(self, record: StepRecord) -> None:
        if record.step == self._step:
            self.request.signal = signal.SIGTERM

    def on_notice(self, text: str) -> None: ...

    def on_stage_end(self, stage: str) -> None: ...


def test_a_resumed_run_ends_in_the_same_weights(color_data: TuneData, saved_model: Path, tmp_path: Path) -> None:
    config = config_of(color_data, checkpoints=CheckpointConfig(every_steps=100))
    whole = run(config, saved_model, color_data, tmp_path / "whole")
    stop = StopAfter(3)
    with pytest.raises(InfrastructureError, match="after step 4"):
        run(config, saved_model, color_data, tmp_path / "cut", observers=[stop], stop=stop.request)
    assert not (tmp_path / "cut" / "model").exists()
    resumed = run(config, saved_model, color_data, tmp_path / "cut")
    assert resumed.losses == whole.losses
    for file in ("trained.safetensors", "adapter_model.safetensors"):
        first, second = load_file(whole.directory / file), load_file(resumed.directory / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


class Counted:
    """A stream that counts more than it yields, as one whose files have shrunk."""

    def __init__(self, stream: CountedStream, more: int) -> None:
        self._stream, self._more = stream, more
        self.name, self.records = stream.name, stream.records

    def count(self) -> int:
        return self._stream.count() + self._more


def test_tuning_learns_and_the_best_weights_are_kept(
    color_data: TuneData, saved_model: Path, processor: NVILAProcessor, tmp_path: Path
) -> None:
    tuned = run(config_of(color_data, "full+full", steps=30, eval_every=5), saved_model, color_data, tmp_path / "out")
    assert tuned.best is not None
    assert tuned.best.loss < 0.5 * tuned.losses[0].loss
    model, _ = load_model(tuned.directory)
    assert color_data.held_out is not None
    answered = answer_stream(model, processor, color_data.held_out)
    assert len(answered) == color_data.held_out.count()
    right = sum(one.said == one.wanted for one in answered)
    assert right > len(answered) / 2
    # All are answered where fewer come than were counted, and the last batch is not full.
    less = Counted(color_data.held_out, more=1)
    assert [one.said for one in answer_stream(model, processor, less, batch_size=less.count())] == [
        one.said for one in answered
    ]


def test_an_early_end_keeps_the_weights_of_the_best_step(
    color_data: TuneData, saved_model: Path, tmp_path: Path
) -> None:
    config = config_of(color_data, "full+full", steps=40, eval_every=2, patience=2)
    config = replace(config, rates=learning_rates(config.method, 0.5))  # far too high: it gets worse
    tuned = run(config, saved_model, color_data, tmp_path / "out")
    assert tuned.best is not None
    assert tuned.best.step < tuned.steps < 40
    assert tuned.steps == tuned.best.step + 2 * 2
    kept, base = (load_file(folder / "model.safetensors") for folder in (tuned.directory, saved_model))
    if tuned.best.step == 0:
        assert all(torch.equal(kept[name], base[name]) for name in base)


def test_bf16_keeps_the_base_in_it_and_learns_in_fp32(color_data: TuneData, saved_model: Path, tmp_path: Path) -> None:
    config = config_of(color_data, "ln+qlora", precision=PrecisionConfig(name="bf16"))
    tuned = run(config, saved_model, color_data, tmp_path / "out")
    assert tuned.best is not None
    assert tuned.best.loss < tuned.losses[0].loss
    stored = load_file(tuned.directory / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_recomputed_activations_give_the_same_adapter(color_data: TuneData, saved_model: Path, tmp_path: Path) -> None:
    config = config_of(color_data, dropout=0.0)
    plain = run(config, saved_model, color_data, tmp_path / "plain")
    recomputed = run(replace(config, gradient_checkpointing=True), saved_model, color_data, tmp_path / "recomputed")
    first, second = (load_file(one.directory / "adapter_model.safetensors") for one in (plain, recomputed))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    assert plain.peak_bytes is not None
    assert recomputed.peak_bytes is not None
    assert recomputed.peak_bytes < plain.peak_bytes


def test_joined_rows_learn_what_rows_under_a_mask_do(color_data: TuneData, saved_model: Path, tmp_path: Path) -> None:
    joined = config_of(color_data, dropout=0.0)
    masked = replace(joined, attention="eager")
    assert color_data.budget(joined).flat
    for one, flat in ((joined, True), (masked, False), (replace(joined, samples_per_image=2), True)):
        model, _ = load_base(saved_model, one)
        assert joins_rows(model.model.language_model) == flat
    # Samples that share their image share a row, which needs a mask.
    assert not color_data.budget(replace(joined, samples_per_image=2)).flat
    first, second = (run(one, saved_model, color_data, tmp_path / one.attention) for one in (joined, masked))
    # The two add up in another order, and every step makes more of that; on a busy machine the last came to 1.01e-4.
    ours, theirs = ([one.loss for one in run.losses] for run in (first, second))
    assert ours[:-1] == pytest.approx(theirs[:-1], rel=1e-4)
    assert ours[-1] == pytest.approx(theirs[-1], rel=5e-4)
    stored = [load_file(one.directory / "adapter_model.safetensors") for one in (first, second)]
    assert all(torch.allclose(stored[0][name], stored[1][name], atol=1e-3) for name in stored[0])
    # No padding, no mask and no probabilities.
    assert first.peak_bytes is not None
    assert second.peak_bytes is not None
    assert first.peak_bytes < second.peak_bytes


def test_merged_runs_leave_a_whole_model(color_data: TuneData, saved_model: Path, tmp_path: Path) -> None:
    tuned = run(config_of(color_data), saved_model, color_data, tmp_path / "out", merged=True)
    assert not is_adapter(tuned.directory)
    load_model(tuned.directory)


def test_a_finished_run_is_not_done_again(color_data: TuneData, saved_model: Path, tmp_path: Path) -> None:
    config = config_of(color_data, steps=2)
    first = run(config, saved_model, color_data, tmp_path / "out")
    before = (first.directory / "trained.safetensors").stat().st_mtime_ns
    assert run(config, saved_model, color_data, tmp_path / "out") == first
    assert (first.directory / "trained.safetensors").stat().st_mtime_ns == before


def test_adapters_and_quantized_models_are_no_base(color_data: TuneData, saved_model: Path, tmp_path: Path) -> None:
    from nvila.quantization.config import QuantizationConfig
    from nvila.quantization.quantize import quantize_model
    from nvila.quantization.saved import save_quantized

    tuned = run(config_of(color_data, steps=2), saved_model, color_data, tmp_path / "out")
    with pytest.raises(CapabilityError, match="is an adapter"):
        run(config_of(color_data), tuned.directory, color_data, tmp_path / "again")
    model, _ = load_model(saved_model)
    scheme = QuantizationConfig(group_size=32)
    quantize_model(model, scheme)
    save_quantized(model, scheme, tmp_path / "quantized")
    with pytest.raises(CapabilityError, match="is quantized"):
        run(config_of(color_data), tmp_path / "quantized", color_data, tmp_path / "again")


def test_rates_must_fit_the_method(color_data: TuneData) -> None:
    with pytest.raises(ConfigError, match="rates are given for language"):
        config_of(color_data, rates={"language": 1e-3})


def test_early_stopping_goes_on_behind_the_step_of_a_checkpoint(tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 1.0, 1.5, 1.2, 1.1])
    model = torch.nn.Linear(2, 2)

    def stopping() -> EarlyStopping:
        return EarlyStopping(model=model, loss=lambda: next(values), directory=tmp_path, every=2, patience=2)

    one = stopping()
    one.begin(0)
    assert [one.after_step(step, 10) for step in (1, 2, 3, 4)] == [False] * 4
    assert one.best.step == 4
    again = stopping()
    again.begin(2)
    assert [found.step for found in read_losses(tmp_path)] == [0, 2]
    assert not again.after_step(4, 10)
    assert not again.after_step(6, 10)
    assert again.best.step == 6
    assert [found.step for found in read_losses(tmp_path)] == [0, 2, 4, 6]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    stopping = EarlyStopping(model=torch.nn.Linear(2, 2), loss=lambda: float("nan"), directory=tmp_path, every=1)
    with pytest.raises(NvilaError, match="held-out loss after step 0 is nan"):
        stopping.begin(0)
