"""NVILA: efficient visual language models. What is learned and how; PyTorch and transformers only."""

from nvila._version import __version__

__all__ = ["__version__"]
