"""The simulator against mixed load recorded on an H200: energy and time per token, not the first token's time, which it
does not reach (docs/routing.md)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.calibrate.recording import load
from energylens_vllm.cli.simulate import replica_table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "model"), [("llama8b", "llama-3.1-8b"), ("qwen30b", "qwen3-30b-a3b")])
def test_energy_and_time_per_token_are_within_a_tenth(name: str, model: str) -> None:
    spec = importlib.util.spec_from_file_location("routing_validation", ROOT / "benchmarks" / "routing_validation.py")
    assert spec is not None
    assert spec.loader is not None
    validation = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = validation  # dataclasses look their module up
    spec.loader.exec_module(validation)
    recording = load(ROOT / "tests" / "data" / "h200_vllm" / f"{name}_steps.npz")
    table = replica_table(EnergyModel(model, Deployment(gpu="H200-SXM", max_num_seqs=512)))
    for phase in ("mix_r4", "mix_r30"):
        found = validation.compare(recording, phase, table)
        assert found.requests > 50
        assert abs(found.energy) < 0.1
        assert abs(found.tpot) < 0.1
