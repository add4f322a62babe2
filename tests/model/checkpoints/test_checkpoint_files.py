from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.checkpoints import tensor_file
from nvila.checkpoints.embedding_rows import resized_chunks
from nvila.checkpoints.encoders import BASIC_VIDEO, POOLING_VIDEO, check_image_encoder, pool_sizes_of, video_encoder
from nvila.checkpoints.shards import INDEX_FILE, read_folder, write_folder
from nvila.checkpoints.tensor_file import OutgoingTensor, TensorEntry, read_header, write_file
from nvila.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "c": torch.zeros(0, 2),
    "d": torch.tensor(True),
}


def outgoing(entries: dict[str, TensorEntry]) -> list[OutgoingTensor]:
    return [
        OutgoingTensor(name=name, dtype=e.dtype, shape=e.shape, nbytes=e.nbytes, chunks=e.chunks)
        for name, e in entries.items()
    ]


def raw_file(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(start: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def test_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    entries = read_header(path)
    assert entries.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        entry = entries[name]
        assert entry.shape == tuple(value.shape)
        data = path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert data == value.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(entry.chunks()) == data


def test_written_file_is_what_the_library_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 5)
    save_file(TENSORS, tmp_path / "x.safetensors")
    wrote: list[int] = []
    write_file(tmp_path / "y.safetensors", outgoing(read_header(tmp_path / "x.safetensors")), wrote.append)
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == TENSORS.keys()
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in TENSORS.items())
    assert max(wrote) <= 5
    assert sum(wrote) == 24 + 8 + 1


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", b"", "not a JSON object"),
        (b"{nonsense", b"", "not JSON"),
        (b"\xff\xfe{}", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a":1,"a":2}', b"", "'a' stands there twice"),
        ({"__metadata__": {"format": 1}}, b"", "map of strings"),
        ({"a": 1}, b"", "lacks its type"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"", "lacks its type"),
        ({"a": tensor(0, 4, dtype="PICKLE")}, b"1234", "unknown type 'PICKLE'"),
        ({"a": tensor(0, 4, shape=[-1])}, b"1234", "no counts"),
        ({"a": tensor(0, 4, shape=[True])}, b"1234", "no counts"),
        ({"a": tensor(0, 4, shape=4)}, b"1234", "no counts"),
        ({"a": tensor(-4, 4, shape=[2])}, b"1234", "no counts"),
        ({"a": tensor(0, 4, shape=[2])}, b"1234", "has 8 bytes"),
        ({"a": tensor(0, 8)}, b"1234", "has 8 bytes"),
        ({"a": tensor(0, 4), "b": tensor(0, 4)}, b"1234", "overlaps"),
        ({"a": tensor(0, 4), "b": tensor(8, 12)}, b"123456789abc", "gap"),
        ({"a": tensor(0, 4)}, b"12345678", "4 bytes belong to no tensor"),
    ],
)
def test_header_that_does_not_describe_its_file_is_refused(
    tmp_path: Path, header: Any, data: bytes, message: str
) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert "download or save it again" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="no header"):
        read_header(tmp_path / "x.safetensors")


def test_unreadable_and_shrinking_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "x.safetensors")
    save_file(TENSORS, tmp_path / "y.safetensors")
    entry = read_header(tmp_path / "y.safetensors")["b"]
    (tmp_path / "y.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="ended while it was read"):
        list(entry.chunks())


@pytest.mark.parametrize(("limit", "files"), [(1000, 1), (32, 2), (1, 3)])
def test_shards_and_their_index_give_the_same_tensors(tmp_path: Path, limit: int, files: int) -> None:
    tensors = {"a": TENSORS["a"], "b": TENSORS["b"], "e": TENSORS["a"] + 1}
    save_file(tensors, tmp_path / "x.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    assert write_folder(out, outgoing(read_header(tmp_path / "x.safetensors")), limit, lambda _: None) == files
    assert len(list(out.glob("*.safetensors"))) == files
    assert (out / INDEX_FILE).is_file() == (files > 1)
    found = read_folder(out)
    assert {name: b"".join(entry.chunks()) for name, entry in found.items()} == {
        name: value.view(torch.uint8).numpy().tobytes() for name, value in tensors.items()
    }


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for name in "ab":
        save_file({name: TENSORS[name]}, tmp_path / f"{name}.safetensors")
    write_index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../a.safetensors"}, "is no safetensors file beside it"),
        ({"a": "/etc/a.safetensors"}, "is no safetensors file beside it"),
        ({"a": "..\\a.safetensors"}, "is no safetensors file beside it"),
        ({"a": "a.bin"}, "is no safetensors file beside it"),
        ({"a": 3}, "is no safetensors file beside it"),
        ({"a": "c.safetensors"}, r"c\.safetensors is missing"),
        ({"a": "a.safetensors", "z": "a.safetensors"}, "'z' is missing from a.safetensors"),
        ({"z": "a.safetensors"}, "tensor 'a' is not what"),
        ({"a": "b.safetensors", "b": "b.safetensors"}, "'a' is missing from b.safetensors"),
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
    ],
)
def test_index_that_does_not_fit_its_folder_is_refused(sharded: Path, weight_map: Any, message: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_folder(sharded)


def test_links_to_a_download_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes((sharded / "a.safetensors").read_bytes())
    (sharded / "a.safetensors").unlink()
    (sharded / "a.safetensors").symlink_to(tmp_path / "blob")
    assert read_folder(sharded).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / INDEX_FILE).write_text("{"), "is not JSON"),
        (lambda folder: (folder / INDEX_FILE).write_text("[]"), "no JSON object"),
        (lambda folder: (folder / INDEX_FILE).unlink(), "2 safetensors files but no"),
        (lambda folder: (folder / "x.BIN").touch(), "execute code"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "no safetensors weights"),
    ],
)
def test_folder_of_another_kind_is_refused(sharded: Path, damage: Any, message: str) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        read_folder(sharded)


def test_a_file_is_no_folder(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_folder(sharded / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_new_rows_are_the_mean_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"m": matrix}, tmp_path / "m.safetensors")
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", chunk)
    entry = read_header(tmp_path / "m.safetensors")["m"]
    grown = torch.frombuffer(bytearray(b"".join(resized_chunks(entry, 7))), dtype=dtype).view(7, 3)
    assert torch.equal(grown[:5], matrix)
    assert torch.equal(grown[5:], matrix.double().mean(0).to(dtype).expand(2, 3))
    assert b"".join(resized_chunks(entry, 2)) == matrix[:2].view(torch.uint8).numpy().tobytes()


def test_rows_of_whole_numbers_have_no_mean(tmp_path: Path) -> None:
    save_file({"m": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="type I8 cannot gain rows"):
        list(resized_chunks(read_header(tmp_path / "m.safetensors")["m"], 3))


POOLED = {"_target_": POOLING_VIDEO, "pool_sizes": [[8, 1, 1]]}


@pytest.mark.parametrize(
    ("value", "sizes"),
    [
        (None, [[1, 1, 1]]),
        (BASIC_VIDEO, [[1, 1, 1]]),
        ({"_target_": BASIC_VIDEO, "end_token": "\n"}, [[1, 1, 1]]),
        (POOLED, [[8, 1, 1]]),
        (json.dumps(POOLED), [[8, 1, 1]]),
        ({**POOLED, "start_token": None, "sep_token": None, "parent": None}, [[8, 1, 1]]),
        (video_encoder([[1, 1, 1]]), [[1, 1, 1]]),
        (video_encoder([[4, 2, 2], [1, 1, 1]]), [[4, 2, 2], [1, 1, 1]]),
    ],
)
def test_video_encoder_in_every_form(value: object, sizes: list[list[int]]) -> None:
    assert pool_sizes_of(value, "config.json") == sizes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("os.system", "video_encoder is 'os.system'"),
        ({"_target_": "llava.model.encoders.TSPVideoEncode"}, "did you mean 'llava.model.encoders.TSPVideoEncoder'"),
        ({"pool_sizes": [[1, 1, 1]]}, "video_encoder is"),
        ("{", "is not JSON"),
        (3, "video_encoder is 3"),
        ({**POOLED, "pool_sizes": []}, "pool_sizes"),
        ({**POOLED, "pool_sizes": [[8, 1]]}, "pool_sizes"),
        ({**POOLED, "pool_sizes": [[0, 1, 1]]}, "pool_sizes"),
        ({**POOLED, "pool_sizes": "8,1,1"}, "pool_sizes"),
        ({**POOLED, "start_token": "<s>"}, "start_token of video_encoder is '<s>'"),
    ],
)
def test_unknown_encoder_is_named_and_never_imported(value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        pool_sizes_of(value, "config.json")


def test_image_encoder_is_the_plain_one() -> None:
    check_image_encoder('{"_target_": "llava.model.encoders.BasicImageEncoder"}', "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: image_encoder is 'subprocess\.Popen'"):
        check_image_encoder({"_target_": "subprocess.Popen", "args": ["true"]}, "config.json")
