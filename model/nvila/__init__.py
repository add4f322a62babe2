"""NVILA: efficient visual language models. What is learned and how; PyTorch and transformers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nvila import _registration
from nvila._version import __version__

if TYPE_CHECKING:
    from nvila.chat import ChatModel, Image, Video, load
    from nvila.configuration import NVILAConfig
    from nvila.image_processing import NVILAImageProcessor
    from nvila.modeling import NVILAForConditionalGeneration, NVILAModel
    from nvila.processing import NVILAProcessor
    from nvila.video_processing import NVILAVideoProcessor

# Loaded when first used, so that `import nvila` needs no torch.
_HOMES = {
    "ChatModel": "nvila.chat",
    "Image": "nvila.chat",
    "NVILAConfig": "nvila.configuration",
    "NVILAForConditionalGeneration": "nvila.modeling",
    "NVILAImageProcessor": "nvila.image_processing",
    "NVILAModel": "nvila.modeling",
    "NVILAProcessor": "nvila.processing",
    "NVILAVideoProcessor": "nvila.video_processing",
    "Video": "nvila.chat",
    "load": "nvila.chat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nvila' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "ChatModel",
    "Image",
    "NVILAConfig",
    "NVILAForConditionalGeneration",
    "NVILAImageProcessor",
    "NVILAModel",
    "NVILAProcessor",
    "NVILAVideoProcessor",
    "Video",
    "__version__",
    "load",
]

_registration.install()
