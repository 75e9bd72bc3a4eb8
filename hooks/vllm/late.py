"""Change a vLLM module when something imports it, and not import it for that.

vLLM loads plugins in every process it starts, among them workers and a short-lived process that only inspects the
model. Importing what only engines and API servers need would cost each of them a second.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from energylens_vllm.hooks.vllm import status

Change = Callable[[ModuleType], None]


def when_imported(name: str, change: Change) -> None:
    """Call `change(module)` once module `name` has been imported: now if it is, else when it will be."""
    if (module := sys.modules.get(name)) is not None:
        _apply(change, module)
        return
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.changes.setdefault(name, []).append(change)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the awaited modules as Python would, and has `change` called after their code has run."""

    def __init__(self) -> None:
        self.changes: dict[str, list[Change]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        changes = self.changes.pop(name, None)  # so that the search below does not come back here
        if changes is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, changes)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, changes: Sequence[Change]) -> None:
        self._loader = loader
        self._changes = changes

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # nobody shall see us: inspect and pickle look at the loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for change in self._changes:
            _apply(change, module)


def _apply(change: Change, module: ModuleType) -> None:
    try:
        change(module)
    except Exception as error:  # most likely this release of vLLM has no such name
        status.unusable(error)
