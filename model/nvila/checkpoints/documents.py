"""Licence and model card beside weights: read, and carried along to what is made of them.

A model card is README.md in the form of the Hugging Face Hub; its head says `license` and `base_model`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvila.licences import UNKNOWN, combined

CARD_FILE = "README.md"
DOCUMENTS = ("LICENSE*", "LICENCE*", "NOTICE*", "README*")
# Names in a card's `license` that only refer to another field of it.
_ELSEWHERE = ("other", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where weights come from.

    Args:
        licence: Its name on the Hugging Face Hub; `unknown` where nothing says it.
        base_models: What they were made of.
    """

    licence: str = UNKNOWN
    base_models: tuple[str, ...] = ()


def documents_of(folder: Path) -> list[Path]:
    """Return the documents beside weights, by name."""
    return sorted(path for pattern in DOCUMENTS for path in folder.glob(pattern) if path.is_file())


def carry_documents(source: Path, target: Path) -> None:
    """Copy the documents of a model to one that was made of it; those that are there stay."""
    for path in documents_of(source):
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def read_origin(folder: Path) -> Origin:
    """Read what a model's card says; a folder without a card, or with one that cannot be read, says nothing."""
    head = _head(folder / CARD_FILE)
    licence = str(head.get("license") or "")
    if licence in _ELSEWHERE:
        licence = str(head.get("license_name") or UNKNOWN)
    bases = head.get("base_model") or ()
    bases = bases if isinstance(bases, list | tuple) else (bases,)
    return Origin(licence=licence.lower(), base_models=tuple(str(base) for base in bases))


def licence_fields(licence: str) -> tuple[str, str | None]:
    """Return `license` and `license_name` of a card; several licences together are none that the Hub knows.

    Example:
        >>> licence_fields("gemma"), licence_fields("gemma and llama3")
        (('gemma', None), ('other', 'gemma and llama3'))
    """
    return (licence, None) if " and " not in licence else ("other", licence)


def write_base_documents(parts: Mapping[str, tuple[str, Path]], target: Path) -> None:
    """Write the card of a model that is made of pretrained parts, and carry their licences along.

    Args:
        parts: Name and folder of the pretrained model, by part.
        target: Folder of the new model.
    """
    from huggingface_hub import ModelCardData

    licence = combined(read_origin(folder).licence for _, folder in parts.values())
    licence_id, licence_name = licence_fields(licence)
    data = ModelCardData(
        base_model=list(dict.fromkeys(name for name, _ in parts.values())),
        license=licence_id,
        license_name=licence_name,
    )
    lines = [f"- {part}: {name} ({read_origin(folder).licence})" for part, (name, folder) in parts.items()]
    text = "\n".join(["---", data.to_yaml(), "---", "Made of these pretrained parts:", "", *lines, ""])
    (target / CARD_FILE).write_text(text, encoding="utf-8")
    for part, (_, folder) in parts.items():
        for path in documents_of(folder):
            if not path.name.startswith("README"):
                shutil.copyfile(path, target / f"{path.stem}.{part}{path.suffix}")


def _head(card: Path) -> Mapping[str, object]:
    import yaml

    try:
        text = card.read_text(encoding="utf-8")
        head = yaml.safe_load(text.partition("\n---")[0]) if text.startswith("---\n") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}
