"""Importing the package is quick and loads nothing heavy: vLLM's processes all do it at start."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

import energylens_vllm

HEAVY = ("torch", "vllm", "pynvml", "transformers", "ray", "litellm", "pandas", "scipy")


def probe(statement: str) -> tuple[float, list[str]]:
    """Seconds that `statement` takes in a new process, and which heavy modules it loaded."""
    code = (
        "import json, sys, time; start = time.perf_counter()\n"
        f"{statement}\n"
        f"print(json.dumps([time.perf_counter() - start, [m for m in {HEAVY} if m in sys.modules]]))"
    )
    seconds, loaded = json.loads(subprocess.check_output([sys.executable, "-c", code], text=True))
    return seconds, loaded


@pytest.mark.parametrize(
    ("statement", "limit_s"),
    [
        ("import energylens_vllm", 0.3),
        ("import energylens_vllm.cli", 0.3),
        ("import energylens_vllm.hooks.vllm", 0.3),  # what each of vLLM's processes loads
        ("from energylens_vllm import Deployment, EnergyModel", 3.0),  # numpy and yaml; the limit is for a busy machine
    ],
)
def test_import_is_quick_and_light(statement: str, limit_s: float) -> None:
    runs = [probe(statement) for _ in range(3)]
    assert [loaded for _, loaded in runs] == [[], [], []]
    assert statistics.median(seconds for seconds, _ in runs) < limit_s


def test_names_are_public_and_lazy() -> None:
    for name in energylens_vllm.__all__:
        assert getattr(energylens_vllm, name) is not None
        assert name in dir(energylens_vllm)
    with pytest.raises(AttributeError, match="no attribute 'EnergyModle'"):
        energylens_vllm.EnergyModle  # noqa: B018
