"""Step tables that tests share, as they take a moment to make."""

from __future__ import annotations

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.routing import StepTable


@pytest.fixture(scope="session")
def model() -> EnergyModel:
    return EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=256))


@pytest.fixture(scope="session")
def table(model: EnergyModel) -> StepTable:
    return StepTable.compile(model, 800_000)


@pytest.fixture(scope="session")
def small(model: EnergyModel) -> StepTable:
    """The same with so little cache that requests are preempted."""
    return StepTable.compile(model, 6_000)
