"""What gateways' tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.routing import StepTable

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def table() -> StepTable:
    """Of an H200 that serves 256 requests at once."""
    return StepTable.compile(EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=256)), 400_000)


@pytest.fixture(scope="session")
def package_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PYTHONPATH that has this package, for interpreters that it is not installed in."""
    folder = tmp_path_factory.mktemp("package") / "energylens_vllm"
    folder.mkdir()
    for source in [*(ROOT / "energylens_vllm").iterdir(), ROOT / "hooks", ROOT / "dashboards"]:
        if source.name != "__pycache__":
            (folder / source.name).symlink_to(source)
    return str(folder.parent)
