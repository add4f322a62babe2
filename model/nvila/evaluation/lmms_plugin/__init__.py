"""NVILA as a model of lmms-eval: `python -m lmms_eval --model nvila --model_args pretrained=FOLDER --tasks NAMES`.

lmms-eval finds this by the entry point `lmms_eval.models`; it brings tasks, data and scorers, and NVILA answers. It is
an extra, `nvila[lmms-eval]`, and nothing else here imports it.
"""

from __future__ import annotations

from typing import Any

NAME = "nvila"
CLASS = "nvila.evaluation.lmms_plugin.model.Nvila"


def manifest() -> Any:
    """Return what lmms-eval wants to know of a model: its name and the path of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=CLASS)
