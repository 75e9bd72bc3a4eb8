"""The simulator against mixed load recorded on an H200: energy, time to first token, time per token."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def validation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("routing_validation", ROOT / "benchmarks" / "routing_validation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_all_are_within_a_tenth(validation: ModuleType) -> None:
    found = validation.comparisons(ROOT / "tests" / "data", "H200 llama8b")
    assert [each.phase for each in found] == ["mix_r1", "mix_r4", "mix_r12", "mix_r30"]
    assert [each.requests for each in found] == [10, 53, 123, 328]
    for each in found:
        assert max(abs(error) for error in (each.energy, each.ttft, each.tpot)) < 0.1, each


def test_where_the_host_bounds_steps_its_recorded_speed_explains_most(validation: ModuleType) -> None:
    found = validation.comparisons(ROOT / "tests" / "data", "H200 qwen30b")
    for each in found:
        energy, ttft, tpot = each.same_host
        assert max(abs(energy), abs(tpot)) < 0.1, each
        assert abs(ttft) < 0.2, each
