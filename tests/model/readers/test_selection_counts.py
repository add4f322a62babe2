"""What saved selections say of every source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvila.data.readers.locations import locate
from nvila.data.selection_counts import count_selections
from nvila.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


def write(path: Path, table: pa.Table) -> Path:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def test_records_are_kept_dropped_or_without_a_score(tmp_path: Path) -> None:
    import pyarrow as pa

    columns = {
        "id": list("abcde"),
        "source": ["vqa", "vqa", "vqa", "charts", "charts"],
        "delta": [1.0, -1.0, None, 0.5, None],
        "kept": [True, False, False, True, False],
    }
    folder = write(tmp_path / "one" / "selection.parquet", pa.table(columns)).parent
    expected = {"vqa": {"kept": 1, "dropped": 1, "quarantined": 1}, "charts": {"kept": 1, "quarantined": 1}}
    assert count_selections([locate(str(folder))]) == expected
    # One selection behind two stages is one; two selections add up.
    other = write(tmp_path / "two.parquet", pa.table(columns).drop_columns(["delta"]))
    places = [locate(str(folder)), locate(str(folder)), locate(str(other))]
    assert count_selections(places)["vqa"] == {"kept": 2, "dropped": 3, "quarantined": 1}


def test_what_says_too_little_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([1, 2]))
    assert count_selections(locate(str(tmp_path / name)) for name in ("data.json", ".", "missing")) == {}


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "selection.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"selection\.parquet"):
        count_selections([locate(str(tmp_path))])
