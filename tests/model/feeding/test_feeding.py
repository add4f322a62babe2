"""From a folder of files to the inputs of a forward pass: the same as inference makes, in any number of processes."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvila.data.collation import Batch, collate
from nvila.data.conversation import Encoded
from nvila.data.feeding import BatchFeed, MicroBatch
from nvila.data.media_tiles import MediaReader, stage_processor
from nvila.data.sample_store import SampleStore
from nvila.data.stage_data import quarantine_of
from nvila.errors import CheckpointError, ConfigError, DataError, InfrastructureError
from nvila.modeling import NVILAForConditionalGeneration
from nvila.processing import NVILAProcessor

OpenFeed = Callable[..., BatchFeed]


def take(feed: BatchFeed, steps: int) -> list[list[MicroBatch]]:
    return [next(feed) for _ in range(steps)]


def ids(steps: list[list[MicroBatch]]) -> Counter[tuple[int, ...]]:
    """Samples by their tokens, without rows of padding."""
    return Counter(one.ids for step in steps for micro in step for row in micro for one in row if not is_idle(one))


def is_idle(one: Encoded) -> bool:
    return all(label == -100 for label in one.labels)


def by_number(feed: BatchFeed) -> dict[tuple[int, ...], int]:
    """Numbers of samples by their tokens, which no two of this data share unless they show the same."""
    return {feed._encoder(one.sample, one.sizes).ids: n for n in range(len(feed._store)) for one in [feed._store[n]]}


def chat_of(feed: BatchFeed, number: int) -> list[dict[str, Any]]:
    def part(kind: str, value: str) -> dict[str, str]:
        return {"type": kind, {"text": "text", "image": "image", "video": "path"}[kind]: value}

    messages = feed._store[number].sample.messages
    return [{"role": one.role, "content": [part(p.type, p.value) for p in one.content]} for one in messages]


@pytest.mark.parametrize("mode", ["resize", "dynamic", "dynamic_s2"])
def test_training_sees_the_tokens_and_pixels_of_inference(
    mode: str, open_feed: OpenFeed, processor_of: Callable[[str], NVILAProcessor]
) -> None:
    feed = open_feed(mode=mode, max_length=300, micro_batch_tokens=300, batch_tokens=300, pack=False)
    seen = Counter[str]()
    while feed.state_dict()["epoch"] == 0 and sum(seen.values()) < 20:
        for row in (row for micro in next(feed) for row in micro):
            [one] = row
            number = next(n for n in range(20) if feed._encoder(feed._store[n].sample, feed._store[n].sizes) == one)
            inputs = processor_of(mode).apply_chat_template(
                chat_of(feed, number), tokenize=True, return_dict=True, processor_kwargs={"tile_all": True}
            )
            whole = inputs.pop("input_ids")[0].tolist()
            # What is behind the last label is left out in training.
            assert list(one.ids) == whole[: len(one.ids)]
            del inputs["attention_mask"]
            found = feed.tensors(one.images, one.videos)
            assert found.keys() == inputs.keys()
            assert all(torch.equal(found[name], inputs[name]) for name in found)
            seen[",".join(sorted(found))] += 1
    blocks = "image_blocks," if mode == "dynamic_s2" else ""
    assert seen == {"": 4, f"{blocks}pixel_values": 12, "pixel_values_videos,video_frames": 4}


def test_one_batch_mixes_texts_images_and_videos_as_the_model_takes_them(
    open_feed: OpenFeed, config_of: Callable[[str], Any]
) -> None:
    torch.manual_seed(0)
    feed = open_feed(mode="dynamic_s2", batch_tokens=2000, micro_batch_tokens=2000)
    [micro] = next(feed)
    batch = collate(micro, 0)
    assert batch.images
    assert batch.videos
    assert any(not one.images and not one.videos for one in flat(micro))
    model = NVILAForConditionalGeneration(config_of("dynamic_s2")).train()
    with torch.no_grad():
        together = model(**model_inputs(batch, feed)).loss
        alone = [(model(**model_inputs(one, feed)).loss, one.num_supervised) for one in map(single, flat(micro))]
    mean = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(together, mean, atol=1e-4, rtol=1e-4)


def single(one: Encoded) -> Batch:
    return collate([[one]], 0)


def flat(micro: MicroBatch) -> list[Encoded]:
    return [one for row in micro for one in row]


def model_inputs(batch: Batch, feed: BatchFeed) -> dict[str, Any]:
    text = {name: getattr(batch, name) for name in ("input_ids", "labels", "position_ids", "attention_mask")}
    return text | feed.tensors(batch.images, batch.videos)


def test_every_sample_comes_once_an_epoch_whatever_the_number_of_processes(open_feed: OpenFeed) -> None:
    whole = open_feed(pack=False, batch_tokens=250)
    steps = whole.steps_in(1)
    assert steps > 2
    alone = take(whole, steps)
    assert sum(ids(alone).values()) == 20
    for world in (2, 3):
        shares = [take(open_feed(pack=False, batch_tokens=250, rank=rank, world=world), steps) for rank in range(world)]
        for number in range(steps):
            assert len({len(share[number]) for share in shares}) == 1
            assert sum((ids([share[number]]) for share in shares), Counter()) == ids([alone[number]])


def test_a_stopped_feed_goes_on_behind_what_was_taken_not_behind_what_was_read_ahead(open_feed: OpenFeed) -> None:
    whole = take(open_feed(), 7)
    first = open_feed()
    take(first, 3)
    time.sleep(0.3)  # more steps are read ahead by now
    state = json.loads(json.dumps(first.state_dict()))
    second = open_feed()
    second.load_state_dict(state)
    assert take(second, 4) == whole[3:]
    # Also the same one may be set back.
    first.load_state_dict(state)
    assert take(first, 4) == whole[3:]
    first.close()
    assert take(first, 1) == take(second, 1)


def test_order_does_not_depend_on_who_decodes_faster(open_feed: OpenFeed, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(open_feed(), 6)
    decode = MediaReader.decode

    def slow(self: MediaReader, kind: Any, key: str, *args: Any) -> Any:
        time.sleep(0.02 if key.endswith("1.png") else 0)
        return decode(self, kind, key, *args)

    monkeypatch.setattr(MediaReader, "decode", slow)
    assert take(open_feed(), 6) == expected


def test_only_a_few_steps_are_read_ahead_and_waiting_is_measured(
    open_feed: OpenFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = MediaReader.decode

    def counted(self: MediaReader, kind: Any, key: str, *args: Any) -> Any:
        decoded.append(key)
        time.sleep(0.01)
        return decode(self, kind, key, *args)

    monkeypatch.setattr(MediaReader, "decode", counted)
    feed = open_feed(batch_tokens=150)
    one_epoch = feed.steps_in(1)
    assert feed.waited_s == 0
    next(feed)
    first = feed.waited_s
    assert first > 0.005
    time.sleep(1.0)
    # Of the step that was taken, of two that wait, and of one that waits to wait.
    assert len(decoded) <= 4 * 8 < 16 * one_epoch
    next(feed)
    assert feed.waited_s - first < 0.2


def test_a_closed_feed_leaves_no_thread(open_feed: OpenFeed) -> None:
    before = threading.active_count()
    feed = open_feed()
    next(feed)
    assert threading.active_count() > before
    feed.close()
    assert threading.active_count() == before


def test_samples_whose_media_break_are_left_out_and_written_down(open_feed: OpenFeed, folder: Path) -> None:
    good = ids(take(open_feed(max_bad=0.5), 5))
    (folder / "1.png").write_bytes(b"\x89PNG broken")
    (folder / "2.mp4").unlink()
    worlds = {}
    for world in (1, 2):
        feeds = [open_feed(max_bad=0.5, rank=rank, world=world) for rank in range(world)]
        worlds[world] = sum((ids(take(feed, 5)) for feed in feeds), Counter())
    assert worlds[1] == worlds[2]
    assert worlds[1] < good
    entries = quarantine_of(feeds[0]._store.directory)
    assert [entry["id"] for entry in entries] == ["r3", "r13", "r14"]
    assert "1.png" in str(entries[0]["reason"])
    assert str(entries[0]["where"]).endswith("data.jsonl:4")
    assert "does not exist" in str(entries[2]["reason"])


def test_too_many_broken_media_end_the_run_also_over_restarts(open_feed: OpenFeed, folder: Path) -> None:
    open_feed(max_bad=0.08)
    (folder / "2.mp4").write_bytes(b"no film")
    take(open_feed(max_bad=0.08), 6)  # one of twenty
    (folder / "1.mp4").unlink()
    with pytest.raises(DataError, match=r"2 of 20 samples .* more than the 8\.0% of max_bad.*bad-media-0"):
        take(open_feed(max_bad=0.08), 6)


def test_an_image_that_was_exchanged_for_one_of_another_shape_is_left_out(open_feed: OpenFeed, folder: Path) -> None:
    open_feed(max_bad=0.5)
    (folder / "0.png").write_bytes((folder / "2.png").read_bytes())
    feed = open_feed(max_bad=0.5)
    take(feed, 6)
    assert all("was (40, 30)" in str(entry["reason"]) for entry in quarantine_of(feed._store.directory))
    assert feed._bad.count == 4


def test_a_service_that_does_not_answer_is_no_fault_of_the_sample(
    open_feed: OpenFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = open_feed()

    def away(*_: Any) -> Any:
        raise InfrastructureError("the store does not answer", "try again")

    monkeypatch.setattr(MediaReader, "decode", away)
    for _ in range(2):
        with pytest.raises(InfrastructureError):
            take(feed, 9)
    assert feed._bad.count == 0


def test_a_process_without_rows_gets_padding_that_adds_nothing(
    open_feed: OpenFeed, config_of: Callable[[str], Any]
) -> None:
    feed = open_feed(rank=3, world=4, batch_tokens=600)
    idle = next(micro for step in take(feed, 9) for micro in step if is_idle(micro[0][0]))
    assert len(idle) == 1
    batch = collate(idle, 0)
    assert feed.tensors(batch.images, batch.videos) == {}
    model = NVILAForConditionalGeneration(config_of("dynamic")).train()
    loss = model(**model_inputs(batch, feed)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    gradients = [p.grad for p in model.model.language_model.layers.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_mixtures_repeat_and_cut_data_sets(open_feed: OpenFeed, folder: Path) -> None:
    path = folder / "data.jsonl"
    ones = ids(take(open_feed(), open_feed().steps_in(1)))
    feed = open_feed(f"{path}*2 + {path}")
    assert ids(take(feed, feed.steps_in(1))) == ones + ones + ones


def test_a_built_in_set_brings_its_media_along(open_feed: OpenFeed) -> None:
    pytest.importorskip("sklearn", reason="digits-vqa is an extra")
    feed = open_feed("digits-vqa:test", batch_tokens=150)
    batch = collate(next(feed)[0], 0)
    assert feed.tensors(batch.images, batch.videos)["pixel_values"].shape[1:] == (3, 16, 16)


def test_an_index_is_made_once_and_again_for_another_tiling(open_feed: OpenFeed, tmp_path: Path) -> None:
    for mode in ("dynamic", "dynamic", "resize"):
        open_feed(mode=mode)
    index = tmp_path / "index"
    assert len([path for path in index.iterdir() if path.is_dir()]) == 2
    for _ in range(2):
        open_feed(mode="dynamic", tiling="none")
    assert len([path for path in index.iterdir() if path.is_dir()]) == 3


def test_an_index_that_was_not_finished_is_made_anew(open_feed: OpenFeed, tmp_path: Path) -> None:
    directory = open_feed()._store.directory
    (directory / "index.json").unlink()
    (directory.with_name(f".{directory.name}.partial")).mkdir()
    assert len(open_feed()._store) == 20
    (directory / "columns.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"cannot be read.*delete it"):
        open_feed()


def test_samples_that_cannot_be_used_are_counted_and_named(open_feed: OpenFeed, folder: Path) -> None:
    lines = (folder / "data.jsonl").read_text().splitlines()
    long = json.loads(lines[2]) | {"id": "long"}
    long["conversations"][1]["value"] = "green " * 200
    gone = json.loads(lines[0]) | {"id": "gone", "image": "none.png"}
    silent = json.loads(lines[2]) | {"id": "silent"}
    silent["conversations"][1]["value"] = ""
    (folder / "data.jsonl").write_text("\n".join([*lines, *map(json.dumps, (long, gone, silent)), "{"]) + "\n")
    with pytest.raises(DataError, match=r"4 of 24 samples .* more than the 1\.0% of max_bad; first: data.jsonl:21"):
        open_feed()
    notices: list[str] = []
    feed = open_feed(max_bad=0.2, reporter=Notices(notices))
    assert len(feed._store) == 20
    assert "4 of 24 samples" in notices[0]
    reasons = {entry["id"]: str(entry["reason"]) for entry in quarantine_of(feed._store.directory)}
    assert "more than the limit of 150" in reasons["long"]
    assert "none.png does not exist" in reasons["gone"]
    assert set(reasons) == {"long", "gone", None}


class Notices:
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def progress(self, *_: Any, **__: Any) -> None:
        pass

    def notice(self, text: str) -> None:
        self.texts.append(text)


def test_empty_data_is_refused(open_feed: OpenFeed, folder: Path) -> None:
    (folder / "data.jsonl").write_text("")
    with pytest.raises(ConfigError, match="of a training stage is empty"):
        open_feed()


@pytest.mark.parametrize(("mode", "needed", "fewest"), [("resize", 5, 5), ("dynamic", 6, 6), ("dynamic_s2", 17, 17)])
def test_a_length_without_room_for_an_image_is_refused_with_both_numbers(
    mode: str, needed: int, fewest: int, open_feed: OpenFeed
) -> None:
    with pytest.raises(ConfigError, match=rf"max_length is {fewest}, but one image alone takes {needed} positions.*"):
        open_feed(mode=mode, max_length=fewest, micro_batch_tokens=300)


def test_scales_need_a_model_that_has_them(processor_of: Callable[[str], NVILAProcessor]) -> None:
    with pytest.raises(ConfigError, match=r"dynamic_s2 needs a model of several scales.*'dynamic' tiling"):
        stage_processor(processor_of("dynamic"), tiling="dynamic_s2")


def test_a_stage_changes_tiling_and_frames_but_not_the_model_s_processor(
    open_feed: OpenFeed, processor_of: Callable[[str], NVILAProcessor]
) -> None:
    processor = processor_of("dynamic")
    changed = stage_processor(processor, tiling="none", num_frames=2)
    assert (changed.image_processor.image_aspect_ratio, changed.video_processor.num_frames) == ("resize", 2)
    assert (processor.image_processor.image_aspect_ratio, processor.video_processor.num_frames) == ("dynamic", 4)
    feed = open_feed(num_frames=2, tiling="none", batch_tokens=2000, micro_batch_tokens=2000)
    batch = collate(next(feed)[0], 0)
    inputs = feed.tensors(batch.images, batch.videos)
    assert inputs["video_frames"].tolist() == [2] * 4
    assert len(inputs["pixel_values"]) == 16


def test_a_state_of_other_data_is_refused(open_feed: OpenFeed, folder: Path) -> None:
    state = open_feed().state_dict()
    other = open_feed(f"{folder / 'data.jsonl'}*2")
    with pytest.raises(CheckpointError, match="changed since the checkpoint"):
        other.load_state_dict(state)


def test_store_gives_samples_by_number_with_unread_media(open_feed: OpenFeed, folder: Path) -> None:
    store: SampleStore = open_feed()._store
    assert [store[number].sample.id for number in (7, 0, 19)] == ["r7", "r0", "r19"]
    [(medium, source)] = store[4].media.items()
    assert medium == ("video", str(folder / "0.mp4"))
    assert source.read() == (folder / "0.mp4").read_bytes()
    assert store[4].sizes == {medium: (4,)}
