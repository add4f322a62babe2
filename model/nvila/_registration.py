"""Tells transformers about NVILA as soon as somebody asks it for an Auto class, and not before.

`import nvila` has to stay cheap: no torch, no transformers. The Auto classes have to know NVILA after it all the same,
whatever was imported first. So the first access to `transformers.Auto...` or `transformers.pipeline` registers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Arrange for the registration; once and again does no harm."""
    if _AUTO in sys.modules:  # somebody may hold an Auto class already
        _register()
    elif "transformers" in sys.modules:
        _watch()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from nvila.assembly import register_auto_classes

    register_auto_classes()


def _watch() -> None:
    """Have the lazy modules of transformers register before they hand out an Auto class for the first time.

    The class and not the module, because transformers makes its module anew while it is being imported.
    """
    lazy: Any = type(sys.modules["transformers"])
    plain = lazy.__getattr__

    def getattr_registering(module: ModuleType, name: str) -> Any:
        asked = module.__name__ == "transformers" and (name.startswith("Auto") or name == "pipeline")
        if asked and not _importing():
            _register()  # when it fails, in the middle of some import, the next one who asks tries again
            lazy.__getattr__ = plain
        value = plain(module, name)
        if asked and lazy.__getattr__ is not plain:
            # The lazy module keeps what it has found once, and we would not be asked again.
            vars(module).pop(name, None)
        return value

    lazy.__getattr__ = getattr_registering


def _importing() -> bool:
    """Whether a module of ours asks, on its own way in; it cannot be registered before it is there."""
    # Of a copy: another thread may import something meanwhile.
    ours = [module for name, module in sys.modules.copy().items() if name.startswith("nvila.")]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in ours)


class _Finder(MetaPathFinder):
    """Sees transformers being imported, and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find transformers as every other finder would, with a loader that watches it."""
        if fullname != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        # transformers puts a lazy module in the place of the one that was executed.
        _watch()
