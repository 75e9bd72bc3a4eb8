"""8-bit experts as vLLM 0.11 ran them: DeepGEMM over as many rows as there could be."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm.energy import Deployment, EnergyModel, StepPrediction
from energylens_vllm.energy.kernel_time import CONTIGUOUS_ROWS, contiguous_rows


def step(release: str, batch: int, quantization: str | None = "fp8") -> StepPrediction:
    deployment = Deployment(
        gpu="H100-SXM", tensor_parallel_size=4, enable_expert_parallel=True, quantization=quantization,
        vllm_release=release,
    )  # fmt: skip
    return EnergyModel("qwen3-235b-a22b", deployment).step([(1, 1000)] * batch)


@pytest.mark.parametrize(("tokens", "selected", "local"), [(1, 8, 32), (8, 8, 64), (1000, 8, 16), (3, 1, 4)])
def test_rows_hold_any_routing(tokens: int, selected: int, local: int) -> None:
    """Whichever experts the pairs choose, each expert's rows start at a multiple of 128 (compute_aligned_M)."""
    rows = float(contiguous_rows(np.array([float(tokens * selected)]), local)[0])
    assert rows % CONTIGUOUS_ROWS == 0
    rng = np.random.default_rng(tokens)
    for _ in range(20):
        chosen = rng.multinomial(tokens * selected, rng.dirichlet(np.full(local, 0.3)))
        assert np.sum(-(-chosen // CONTIGUOUS_ROWS) * CONTIGUOUS_ROWS) <= rows


def test_no_tokens_have_no_rows() -> None:
    assert contiguous_rows(np.zeros(1), 32) == 0


def test_a_few_tokens_cost_nearly_as_much_as_many() -> None:
    old, new = ([step(release, batch) for batch in (1, 64)] for release in ("0.11.1", "0.25.1"))
    assert old[1].components["experts"] < 2 * old[0].components["experts"]
    assert new[1].components["experts"] > 4 * new[0].components["experts"]


def test_sixteen_bit_experts_have_only_the_rows_they_need() -> None:
    few, many = (step("0.11.1", batch, None) for batch in (1, 64))
    assert many.components["experts"] > 4 * few.components["experts"]
