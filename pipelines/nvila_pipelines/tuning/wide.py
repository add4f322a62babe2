"""Finding what can learn behind an address: a quantized version leads to the weights that it was made of."""

from __future__ import annotations

import logging
from pathlib import Path

from nvila.errors import NvilaError
from nvila_platform.lineage import trace
from nvila_platform.settings import Settings
from nvila_platform.store import open_store

logger = logging.getLogger(__name__)


def wide_of(folder: Path, digest: str, settings: Settings) -> Path:
    """Return the folder of the wide model that a quantized one of the store was made of.

    A wide model, and one whose origin the store does not have, come back as they are.

    Args:
        folder: The model.
        digest: Digest of its artifact.
        settings: Where the store is.
    """
    from nvila.quantization.saved import is_quantized

    if not is_quantized(folder):
        return folder
    store = open_store(settings)
    try:
        source = trace(store, digest).inputs.get("model")
        ref = store.find(source.digest) if source is not None else None
    except NvilaError:
        return folder
    if ref is None:
        return folder
    wide = store.fetch(ref) / "model"
    logger.warning("the model is quantized; what it was made of is tuned: %s", wide)
    return wide
