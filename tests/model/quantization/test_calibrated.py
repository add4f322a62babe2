"""Parts quantized with samples: errors per layer, what is left wide, what memory it takes."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvila.assembly import load_model
from nvila.configuration import NVILAConfig
from nvila.curation.nvila_scorer import NvilaScorer
from nvila.data.readers.record import CountedStream
from nvila.data.tensors import PixelCache
from nvila.errors import CapabilityError, CheckpointError, ConfigError, DataError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor
from nvila.quantization.config import Part, QuantizationConfig, Scheme
from nvila.quantization.quantize import quantize_model
from nvila.quantization.run import Measuring, quantize_in_parts, quantize_part
from nvila.quantization.samples import SampleSet, mark_answers, split_samples
from nvila.quantization.saved import restore_part
from nvila.quantization.schemes import is_quantized_layer

BOTH = QuantizationConfig(group_size=32)


class Told:
    """A reporter that keeps everything."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.notices: list[str] = []

    def progress(self, phase: str, done: int, total: int, metrics: object = None) -> None:
        assert 0 <= done <= total
        self.phases.append(phase)

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture(scope="module")
def sets(stream: CountedStream) -> tuple[SampleSet, SampleSet]:
    return split_samples(stream, calibrate=16, measure=24)


def never(part: Part) -> None:
    raise AssertionError(f"{part} must not be restored")


def test_samples_to_measure_on_are_others_than_those_to_calibrate_on(stream: CountedStream) -> None:
    for calibrate, measure in ((16, 24), (1, 1), (24, 24), (100, 100), (7, 3), (40, 0)):
        first, second = split_samples(stream, calibrate=calibrate, measure=measure)
        chosen = [{i for a, b in one.spans for i in range(a, b)} for one in (first, second)]
        assert not chosen[0] & chosen[1]
        assert len(first) == len(chosen[0]) == min(calibrate, 24)
        assert len(second) == min(measure, 24)
        assert [record.index for record in first.records()] == sorted(chosen[0])


def test_samples_are_spread_over_the_data(stream: CountedStream) -> None:
    first, _ = split_samples(stream, calibrate=8, measure=8)
    positions = [start for start, _ in first.spans]
    assert positions[0] < 4
    assert positions[-1] > 36


def test_a_single_record_is_not_enough(stream: CountedStream) -> None:
    class One:
        name = "one"

        def count(self) -> int:
            return 1

    with pytest.raises(DataError, match="one has 1 records"):
        split_samples(cast("CountedStream", One()), calibrate=1, measure=1)


def test_marks_agree_with_greedy_decoding_and_with_likelihoods(
    scorer: NvilaScorer, sets: tuple[SampleSet, SampleSet], tiles: PixelCache
) -> None:
    """An answer is exact just when greedy decoding writes it; the likelihood is the one that curation takes."""
    marks = mark_answers(scorer, sets[0])
    prompts = []
    for window, encoded in sets[0].windows(scorer):
        for one in encoded.values():
            labels = torch.tensor(one.labels)
            first = int((labels >= 0).nonzero()[0])
            pixels = scorer.pixels(window, _batch_of(one))
            with torch.inference_mode():
                out = scorer.model(input_ids=torch.tensor([one.ids]), **pixels).logits[0]
            target = torch.tensor(one.ids[first:])
            greedy = out[first - 1 : -1].argmax(-1)
            likely = out[first - 1 : -1].log_softmax(-1).gather(1, target.unsqueeze(1))
            prompts.append((bool((greedy == target).all()), int((greedy == target).sum()), -float(likely.sum())))
    assert len(marks) == len(prompts) == len(sets[0])
    for mark, (exact, right, nll) in zip(marks, prompts, strict=True):
        assert (mark.exact, mark.right_tokens) == (exact, right)
        assert mark.nll == pytest.approx(nll, rel=1e-4)


def _batch_of(encoded: Any) -> Any:
    from nvila.data.collation import collate

    return collate([[encoded]], 0)


@pytest.mark.parametrize(
    ("vision", "language"), [("w8a8", "w4a16"), ("int8", "int8"), ("fp8", "fp8"), ("none", "w8a8")]
)
def test_each_scheme_has_a_report_by_part(
    vision: Scheme,
    language: Scheme,
    fresh_model: NVILAForConditionalGeneration,
    processor: NVILAProcessor,
    sets: tuple[SampleSet, SampleSet],
) -> None:
    config = QuantizationConfig(vision=vision, language=language, group_size=32)
    told = Told()
    measuring = Measuring(calibration=sets[0], evaluation=sets[1], budget=100, speed=vision == "w8a8")
    made, report = quantize_in_parts(fresh_model, processor, config, measuring, restore=never, reporter=told)
    assert made == config
    assert [one.part for one in report.parts] == [p for p in ("vision", "language") if config.scheme(p) != "none"]
    for one in report.parts:
        assert one.kept
        assert one.bytes_after < one.bytes_before
        assert one.before is not None
        assert one.after is not None
        assert one.after.num_samples == len(sets[1])
        assert len(one.layers) == (12 if one.part == "vision" else 14)
        # fp8 keeps three bits of mantissa, w4a16 four bits in all; int8 is far nearer.
        bound = {"w4a16": 0.2, "fp8": 0.06}.get(one.scheme, 0.03)
        assert all(0 < layer.error < bound for layer in one.layers)
        assert (one.speed_after is not None) == (vision == "w8a8")
        assert one.speed_after is None or one.speed_after.ttft_ms > 0
    assert report.sizes["quantized"]["total"] < report.sizes["wide"]["total"]
    assert {"measure wide", f"quantize {report.parts[-1].part}"} <= set(told.phases)
    assert not told.notices
    assert json.loads(json.dumps(report.to_dict()))["config"]["language"] == language


def test_calibration_beats_rounding_layer_by_layer(scorer: NvilaScorer, sets: tuple[SampleSet, SampleSet]) -> None:
    layers = quantize_part(scorer, "language", BOTH, Measuring(calibration=sets[0]))
    assert sum(one.error for one in layers) < 0.95 * sum(one.rounded for one in layers)
    assert all(one.error <= 1.02 * one.rounded for one in layers)
    assert {one.name for one in layers if one.clipped} == {
        f"{block}.{name}"
        for block in (0, 1)
        for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_smoothquant_and_awq_help_where_outliers_were_planted(
    fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor, sets: tuple[SampleSet, SampleSet]
) -> None:
    """Scale some channels up behind the norms and down in the weights: the model is the same, rounding is not."""
    from nvila.quantization.folding import apply_fold, folds_of

    for part in (fresh_model.model.vision_tower.encoder.layers, fresh_model.model.language_model.layers):
        for block in part:
            for fold in folds_of(block):
                if "norm" in fold.before:
                    scale = torch.ones(len(block.get_submodule(fold.before).weight))
                    scale[::8] = 1 / 40
                    apply_fold(block, fold, scale)
    scorer = NvilaScorer(fresh_model, processor)
    for part, gain in (("vision", 0.5), ("language", 0.8)):
        errors = quantize_part(scorer, cast("Part", part), BOTH, Measuring(calibration=sets[0]))
        behind = [one for one in errors if one.name.endswith(("q_proj", "k_proj", "v_proj", "fc1", "gate_proj"))]
        assert behind
        assert sum(one.error for one in behind) < gain * sum(one.rounded for one in behind), part


def test_a_part_over_its_budget_is_left_wide_and_named(
    saved_model: Path, sets: tuple[SampleSet, SampleSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marks are made up: the tower loses nothing, the decoder half of all answers."""
    model, processor = load_model(saved_model)
    wide = {name: value.clone() for name, value in model.state_dict().items()}
    told = Told()
    calls = iter([0, 0, 50])
    real = mark_answers

    def worse(scorer: NvilaScorer, samples: SampleSet, **options: Any) -> Any:
        from dataclasses import replace

        lost = next(calls)
        marks = real(scorer, samples, **options)
        share = len(marks) * lost // 100
        return [
            replace(mark, exact=index >= share, right_tokens=0 if index < share else mark.num_tokens)
            for index, mark in enumerate(marks)
        ]

    monkeypatch.setattr("nvila.quantization.run.mark_answers", worse)
    measuring = Measuring(calibration=sets[0], evaluation=sets[1], budget=1.0, speed=False)
    config, report = quantize_in_parts(
        model, processor, BOTH, measuring, restore=lambda part: restore_part(model, saved_model, part), reporter=told
    )
    assert (config.vision, config.language) == ("w8a8", "none")
    assert report.left_wide == ("language",)
    assert told.notices == ["language is left wide: w4a16 loses 50.00 points of answers, the budget is 1"]
    assert report.after == report.parts[0].after
    assert report.sizes["quantized"]["language"] == report.sizes["wide"]["language"]
    for name, value in model.state_dict().items():
        if "language_model" in name or "projector" in name:
            assert torch.equal(value, wide[name]), name
    assert is_quantized_layer(model.model.vision_tower.encoder.layers[0].mlp.fc1)
    assert not is_quantized_layer(model.model.language_model.layers[0].mlp.up_proj)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_tokens_count_where_they_lose_more_than_answers(
    saved_model: Path, sets: tuple[SampleSet, SampleSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long answers are never exact: a part that ruins their tokens must still be noticed."""
    from nvila.quantization.samples import AnswerMarks

    model, processor = load_model(saved_model)
    shares = iter([40, 40, 30])

    def marks(*_: Any, **__: Any) -> list[AnswerMarks]:
        right = next(shares)
        return [AnswerMarks(exact=False, right_tokens=right, num_tokens=50, nll=1.0)] * 10

    monkeypatch.setattr("nvila.quantization.run.mark_answers", marks)
    measuring = Measuring(calibration=sets[0], evaluation=sets[1], budget=5.0, speed=False)
    _, report = quantize_in_parts(
        model, processor, BOTH, measuring, restore=lambda part: restore_part(model, saved_model, part)
    )
    loss = report.parts[1].loss
    assert loss is not None
    assert (loss.of, round(loss.points, 6)) == ("tokens", 20.0)
    assert report.left_wide == ("language",)


def test_what_cannot_be_restored_is_named(fresh_model: NVILAForConditionalGeneration, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lack model\.vision_tower"):
        restore_part(fresh_model, tmp_path, "vision")


def test_without_samples_it_is_rounding(
    model: NVILAForConditionalGeneration, fresh_model: NVILAForConditionalGeneration, processor: NVILAProcessor
) -> None:
    rounded = copy.deepcopy(model)
    quantize_model(rounded, BOTH)
    _, report = quantize_in_parts(fresh_model, processor, BOTH, Measuring(), restore=never)
    assert {one.method for one in report.parts} == {"round to nearest"}
    assert report.after is None
    for name, value in rounded.state_dict().items():
        other = fresh_model.state_dict()[name]
        assert torch.equal(getattr(value, "qdata", value), getattr(other, "qdata", other)), name


def test_text_alone_cannot_calibrate_a_tower(
    scorer: NvilaScorer, tmp_path: Path, fresh_model: NVILAForConditionalGeneration
) -> None:
    from nvila.data.readers.opening import DatasetSpec, open_dataset

    line = {"id": "1", "conversations": [{"from": "human", "value": "is there?"}, {"from": "gpt", "value": "yes"}]}
    path = tmp_path / "text.jsonl"
    path.write_text((json.dumps(line) + "\n") * 4, encoding="utf-8")
    samples, _ = split_samples(open_dataset(DatasetSpec(path=str(path))), calibrate=2, measure=2)
    with pytest.raises(CapabilityError, match=r"none of the calibration samples has media .*--vision none"):
        quantize_part(scorer, "vision", BOTH, Measuring(calibration=samples))
    assert quantize_part(scorer, "language", BOTH, Measuring(calibration=samples))


def test_unusable_samples_are_an_error_and_not_an_empty_calibration(scorer: NvilaScorer, tmp_path: Path) -> None:
    from nvila.data.readers.opening import DatasetSpec, open_dataset

    line = {"id": "1", "image": "nowhere.png", "conversations": [{"from": "human", "value": "<image>\nred?"}]}
    path = tmp_path / "bad.jsonl"
    path.write_text((json.dumps(line) + "\n") * 4, encoding="utf-8")
    samples, others = split_samples(open_dataset(DatasetSpec(path=str(path))), calibrate=2, measure=2)
    with pytest.raises(DataError, match=r"none of 2 samples of .* can be used"):
        quantize_part(scorer, "language", BOTH, Measuring(calibration=samples))
    with pytest.raises(DataError, match=r"none of 2 samples of .* can be used"):
        mark_answers(scorer, others)


class UnitOffsetNorm(nn.Module):
    """A norm whose scale is one more than its weight, as in some families: nothing can be divided out of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)


def test_a_norm_that_takes_no_scale_is_found_out_and_left(
    scorer: NvilaScorer, sets: tuple[SampleSet, SampleSet]
) -> None:
    for block in scorer.model.model.language_model.layers:
        block.input_layernorm = UnitOffsetNorm(64)
        block.input_layernorm.weight.data[::8] = 30.0
    told = Told()
    layers = quantize_part(scorer, "language", BOTH, Measuring(calibration=sets[0]), told)
    assert [text for text in told.notices if "input_layernorm of this family" in text]
    assert not [one for one in layers if one.folded and one.name.endswith(("q_proj", "k_proj"))]
    kept = [block.input_layernorm.weight.detach().max().item() for block in scorer.model.model.language_model.layers]
    assert kept == [30.0, 30.0]


def test_layers_of_several_kinds_of_attention_are_rounded_and_named(
    scorer: NvilaScorer, sets: tuple[SampleSet, SampleSet]
) -> None:
    scorer.model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    try:
        told = Told()
        assert quantize_part(scorer, "language", BOTH, Measuring(calibration=sets[0]), told) == ()
    finally:
        scorer.model.config.text_config.layer_types = ["full_attention", "full_attention"]
    assert told.notices == ["language has layers of several kinds of attention: rounded to nearest, not calibrated"]
    assert is_quantized_layer(scorer.model.model.language_model.layers[0].mlp.up_proj)


@pytest.mark.parametrize(("field", "value"), [("budget", -1.0), ("alpha", 1.5)])
def test_settings_out_of_range_are_refused(field: str, value: float) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=str(value)):
        Measuring(**options)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they live; files are not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and type(tensor) is Tensor:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._seen and not storage.filename:
                    self._seen.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def test_memory_stays_under_the_wide_model_and_one_block(
    processor: NVILAProcessor, sets: tuple[SampleSet, SampleSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As small against this block as they are against one of a real model.
    monkeypatch.setattr("nvila.quantization.schemes.CHUNK_ELEMENTS", 1 << 15)
    monkeypatch.setattr("nvila.quantization.statistics.KEPT_ROWS", 32)
    monkeypatch.setattr("nvila.quantization.scales.NUM_RATIOS", 3)
    monkeypatch.setattr("nvila.quantization.scales.CLIP_STEPS", 4)
    few = SampleSet(stream=sets[0].stream, spans=sets[0].spans[:2])
    with LiveBytes() as live:
        torch.manual_seed(0)
        model = NVILAForConditionalGeneration(large_config(processor)).bfloat16().eval()
        gc.collect()
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        block = sum(p.numel() * p.element_size() for p in model.model.language_model.layers[0].parameters())
        assert block * 8 < whole
        assert abs(live.now - whole) < 0.05 * whole
        live.peak = live.now
        gc.disable()  # which else runs when it likes
        try:
            quantize_part(NvilaScorer(model, processor), "language", BOTH, Measuring(calibration=few))
        finally:
            gc.enable()
        gc.collect()
        assert live.peak < whole + block
        assert live.now < 0.7 * whole  # the rounded blocks took the place of the wide ones


def large_config(processor: NVILAProcessor) -> NVILAConfig:
    """A model for the tiny processor whose weights are large against the activations of a few samples."""
    return NVILAConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 10,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=processor.tokenizer.convert_tokens_to_ids("<vila/video>"),
        image_end_token_id=processor.tokenizer("\n", add_special_tokens=False)["input_ids"][0],
    )
