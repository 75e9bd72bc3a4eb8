"""Modules are changed when they are imported, and a failing change harms no import."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest

from energylens_vllm.hooks.vllm import late, status


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package with a module `inner` that holds a class."""
    name = f"latepackage_{tmp_path.name}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "inner.py").write_text("class Thing:\n    size = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(status, "problem", None)
    return name


def enlarge(module: ModuleType) -> None:
    module.Thing.size += 1


def test_a_module_that_is_imported_later(package: str) -> None:
    late.when_imported(f"{package}.inner", enlarge)
    late.when_imported(f"{package}.inner", enlarge)
    assert package not in sys.modules
    module = importlib.import_module(f"{package}.inner")
    assert module.Thing.size == 3
    assert "class Thing" in inspect.getsource(module.Thing)
    assert isinstance(pickle.loads(pickle.dumps(module.Thing())), module.Thing)
    assert importlib.reload(module).Thing.size == 1


def test_a_module_that_is_imported_already(package: str) -> None:
    module = importlib.import_module(f"{package}.inner")
    late.when_imported(f"{package}.inner", enlarge)
    assert module.Thing.size == 2


def test_a_module_that_does_not_exist(package: str) -> None:
    late.when_imported(f"{package}.missing", enlarge)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{package}.missing")


def test_a_failing_change_harms_no_import(package: str, caplog: pytest.LogCaptureFixture) -> None:
    late.when_imported(f"{package}.inner", lambda module: module.absent)
    assert importlib.import_module(f"{package}.inner").Thing.size == 1
    assert status.problem is not None
    assert "has no attribute 'absent'" in status.problem
    assert "cannot start" in caplog.text


def test_unless_the_plugin_is_required(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(status.REQUIRED_VARIABLE, "1")
    late.when_imported(f"{package}.inner", lambda module: module.absent)
    with pytest.raises(RuntimeError, match=r"the energylens plugin cannot start: .*absent"):
        importlib.import_module(f"{package}.inner")
