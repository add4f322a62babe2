"""One process of a tuning that runs in several; torchrun starts them."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(path: str) -> None:
    """Do a process's share of the training that a file asks for."""
    from nvila.progress import SILENT
    from nvila_pipelines.cli.tune import quiet_libraries
    from nvila_pipelines.tuning.preparing import read
    from nvila_pipelines.tuning.request import TuneRequest
    from nvila_pipelines.tuning.training import train
    from nvila_platform.settings import Settings
    from nvila_platform.telemetry import EventLog
    from nvila_platform.tracking import open_tracker

    quiet_libraries()
    request, order = TuneRequest.load(Path(path))
    settings, out = Settings.load(), Path(order["out"])
    own_gpu(request.device)
    if os.environ.get("RANK", "0") != "0":
        train(request, read(request, settings, SILENT), order["digest"], out, settings, SILENT, None)
        return
    with (
        EventLog(Path(order["events"]), step="tune") as reporter,
        open_tracker(settings, f"train {out.name}", order["tracking"]) as tracker,
    ):
        prepared = read(request, settings, reporter)
        train(request, prepared, order["digest"], out, settings, reporter, tracker)


def own_gpu(device: str) -> None:
    """Take the GPU of this process's number, so that `cuda` names it."""
    if device == "cuda":
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


if __name__ == "__main__":
    main(sys.argv[1])
