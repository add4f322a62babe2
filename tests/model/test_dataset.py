from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from nvila.data.conversation import ConversationEncoder
from nvila.data.dataset import load_samples
from nvila.data.media import ImageTable
from nvila.data.records import vqa_sample, write_jsonl
from nvila.data.tensors import PixelCache, encode_groups
from nvila.errors import DataError
from nvila.processing import NVILAProcessor


def test_a_split_is_read_from_its_file(tmp_path: Path) -> None:
    samples = [vqa_sample(id=str(i), source="s", image="a", question="q", answer="x") for i in range(3)]
    write_jsonl(tmp_path / "train.jsonl", samples)
    assert load_samples(tmp_path, "train") == samples


@pytest.mark.parametrize(("files", "listed"), [(["test", "captions"], "captions, test"), ([], "none")])
def test_unknown_split_lists_those_there_are(files: list[str], listed: str, tmp_path: Path) -> None:
    for name in files:
        write_jsonl(tmp_path / f"{name}.jsonl", [])
    with pytest.raises(DataError, match=f"has no split 'train' .it has: {listed}"):
        load_samples(tmp_path, "train")


def test_samples_of_an_image_become_one_group(encoder: ConversationEncoder) -> None:
    rows = [("a", "red"), ("b", "blue"), ("a", "yes")]
    samples = [
        vqa_sample(id=str(i), source="s", image=image, question="what?", answer=answer)
        for i, (image, answer) in enumerate(rows)
    ]
    groups = encode_groups(samples, encoder)
    assert [[sample.images for sample in group] for group in groups] == [[("a",), ("a",)], [("b",)]]
    assert groups[0] == [encoder(samples[0]), encoder(samples[2])]


def test_cached_tiles_equal_the_processors(
    image_table: ImageTable, pictures: dict[str, Image.Image], processor: NVILAProcessor
) -> None:
    size = processor.image_processor.size["height"]
    cache = PixelCache.build(image_table, ["c", "a", "b", "a"], size)
    assert set(cache.tiles) == {"a", "b", "c"}
    expected = processor.pixel_values([pictures[key] for key in "baab"])
    torch.testing.assert_close(cache(("b", "a", "a", "b")), expected, rtol=0, atol=1e-6)


def test_cached_tiles_take_one_byte_a_value(tiles: PixelCache) -> None:
    assert {tile.dtype for tile in tiles.tiles.values()} == {torch.uint8}


def test_text_alone_has_no_tiles(tiles: PixelCache) -> None:
    assert tiles(()).shape[:2] == (0, 3)


def test_tiles_handed_out_are_copies(tiles: PixelCache) -> None:
    first = tiles(("a",))
    expected = first.clone()
    first.zero_()
    assert torch.equal(tiles(("a",)), expected)
