"""What gateways' tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.routing import StepTable

sys.path.insert(0, str(Path(__file__).parent))
from replicas import package


@pytest.fixture(scope="session")
def table() -> StepTable:
    """Of an H200 that serves 256 requests at once."""
    return StepTable.compile(EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=256)), 400_000)


@pytest.fixture(scope="session")
def package_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """See `package`."""
    return package(tmp_path_factory.mktemp("package"))
