"""`python -m nvila_platform.serving`: serve one model directory."""

from __future__ import annotations

import sys

from nvila_platform.launch.child import collect_rarely
from nvila_platform.serving.server import main

if __name__ == "__main__":
    collect_rarely()
    sys.exit(main())
