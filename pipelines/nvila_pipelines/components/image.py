"""The container image of all components."""

from nvila import __version__

# The letters "python" in the name tell kfp's local runner that the image's command is Python.
IMAGE = f"ghcr.io/nvila-platform/nvila-python:{__version__}"
