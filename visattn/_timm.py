"""Our backbones enter timm's registry when both packages are imported, in whichever order.

timm takes seconds to import and most commands of ours do without it. So importing visattn does not import timm: it
registers at once if timm is there already, and otherwise right after somebody has imported it.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType


def register() -> None:
    """Register the backbones with timm, now or as soon as timm is imported."""
    if "timm" in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


def _register_now() -> None:
    importlib.import_module("visattn.backbones")


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Finds timm as Python would, and adds one step behind its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm":
            return None
        # A search is no import: others look whether timm is there and do without it. So nothing changes here.
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    """timm's own loader; what follows the import is the registration."""

    def __init__(self, loader: importlib.abc.Loader, finder: _AfterTimm) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader  # from here on the module looks like any other
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register_now()
