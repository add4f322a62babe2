"""The server as it is, which also notes when its engine got each request and when it handed out the pieces.

`load.py` starts it in the server's place. Requests are told apart by their seeds. The clock is the machine's monotonic
one, so that a client's times can be compared. Written when the server ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from nvila.inference.delivery import Delivery
from nvila.inference.engine import Engine
from nvila_platform.launch.child import collect_rarely
from nvila_platform.serving.server import main

TIMES = "NVILA_BENCH_TIMES"

# By seed: taken over by the engine, first piece, last piece.
_times: dict[int, list[float]] = {}
_stream, _hand_out = Engine.stream, Delivery._hand_out


def stream(self: Engine, messages: Any, images: Any, params: Any, **options: Any) -> Any:
    """Note when the engine is asked."""
    _times[params.seed] = [time.monotonic(), 0.0, 0.0]
    return _stream(self, messages, images, params, **options)


def hand_out(self: Delivery) -> None:
    """Note when the pieces of a step are ready; what their readers do with them is the server's."""
    now = time.monotonic()
    for request, _, _ in self._made:
        times = _times.get(request.params.seed or 0)
        if times is not None:
            times[1], times[2] = times[1] or now, now
    _hand_out(self)


if __name__ == "__main__" and TIMES in os.environ:
    Engine.stream = stream  # type: ignore[method-assign]
    Delivery._hand_out = hand_out  # type: ignore[method-assign]
    collect_rarely()
    code = main()
    Path(os.environ[TIMES]).write_text(json.dumps(_times), encoding="utf-8")
    sys.exit(code)
