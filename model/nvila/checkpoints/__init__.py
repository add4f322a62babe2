"""Checkpoints of all layouts: ours, the original three-folder one and the flat one, read and written.

Only safetensors, no code, and no name found in a file is ever imported.
"""

from nvila.checkpoints.convert import Conversion, convert
from nvila.checkpoints.layouts import LAYOUTS, detect_layout

__all__ = ["LAYOUTS", "Conversion", "convert", "detect_layout"]
