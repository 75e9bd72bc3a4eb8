"""The cascades that these tests read off: one dense, one of experts, one of latent attention."""

from __future__ import annotations

from pathlib import Path

import pytest

from energylens_vllm.einsum import Cascade, load_cascade

CASCADES = sorted((Path(__file__).parent / "cascades").glob("*.yaml"))


@pytest.fixture(scope="session")
def llama() -> Cascade:
    return load_cascade(Path(__file__).parent / "cascades" / "llama-3.1-8b.yaml")


@pytest.fixture(scope="session")
def qwen3_moe() -> Cascade:
    return load_cascade(Path(__file__).parent / "cascades" / "qwen3-30b-a3b.yaml")


@pytest.fixture(scope="session")
def deepseek() -> Cascade:
    return load_cascade(Path(__file__).parent / "cascades" / "deepseek-v2-lite.yaml")


@pytest.fixture(params=CASCADES, ids=lambda path: path.stem)
def any_cascade(request: pytest.FixtureRequest) -> Cascade:
    return load_cascade(request.param)
