"""Bubbles: the closed form against batches that go round a pipeline."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.batch import Array
from energylens_vllm.energy.pipeline import longest


def go_round(time_s: Array, weights: Array, stages: int, steps: int = 8000) -> float:
    """Mean seconds between ends of steps, each of which starts when the one `stages` before it has left the last."""
    drawn = np.random.default_rng(0).choice(time_s, steps, p=weights)
    left = np.zeros((steps, stages))
    for i in range(steps):
        ready = left[i - stages, -1] if i >= stages else 0.0
        for stage in range(stages):
            ready = max(ready, left[i - 1, stage] if i else 0.0) + drawn[i]
            left[i, stage] = ready
    return float(left[-1, -1] / steps)


@pytest.mark.parametrize(("stages", "off"), [(2, 0.03), (4, 0.06), (8, 0.13)])
@pytest.mark.parametrize(("chance", "long"), [(0.02, 2.0), (0.1, 10.0), (0.3, 3.0)])
def test_batches_in_flight_wait_for_the_longest(stages: int, off: float, chance: float, long: float) -> None:
    times, weights = np.array([long, 1.0]), np.array([chance, 1 - chance])
    found = longest(times, weights, np.zeros(2, dtype=np.int64), 1, stages)[0]
    assert found == pytest.approx(go_round(times, weights, stages), rel=off)
    assert found == pytest.approx(long - (long - 1) * (1 - chance) ** stages)


def test_loads_are_kept_apart() -> None:
    times, weights = np.array([2.0, 1.0, 5.0, 4.0, 3.0]), np.array([0.5, 0.5, 0.2, 0.2, 0.6])
    found = longest(times, weights, np.array([0, 0, 1, 1, 1]), 2, 2)
    assert found == pytest.approx([1.75, 3 * 0.36 + 4 * (0.64 - 0.36) + 5 * (1 - 0.64)])


def test_steps_alike_make_no_bubbles_and_prompts_do() -> None:
    model = EnergyModel("llama-3.1-70b", Deployment(gpu="H100-SXM", tensor_parallel_size=2, pipeline_parallel_size=4))
    few, many = (model.serving(64, prompt, 400, prefix_cache_hit_rate=0.0) for prompt in (16, 6000))
    assert 0 <= few.bubble_share < 0.05
    assert few.bubble_share < many.bubble_share < 1
    alone = EnergyModel("llama-3.1-70b", Deployment(gpu="H100-SXM", tensor_parallel_size=8))
    assert alone.serving(64, 6000, 400, prefix_cache_hit_rate=0.0).bubble_share == 0
