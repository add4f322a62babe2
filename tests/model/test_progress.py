from __future__ import annotations

import pytest

from nvila.progress import SILENT, Reporter


def test_silent_reporter_takes_every_event_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    reporter: Reporter = SILENT
    reporter.progress("train", 1, 2)
    reporter.progress("train", 2, 2, {"loss": 0.5})
    reporter.notice("a line")
    assert capfd.readouterr() == ("", "")
