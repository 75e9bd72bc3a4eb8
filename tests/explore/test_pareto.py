from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm.explore.pareto import pareto_front


def beaten(points: np.ndarray, i: int) -> bool:
    """By definition: another is no worse in anything and better in something, or an earlier one is alike."""
    others = np.delete(points, i, axis=0)
    no_worse = np.all(others <= points[i], axis=1)
    return bool(
        np.any(no_worse & np.any(others < points[i], axis=1)) or np.any(np.all(points[:i] == points[i], axis=1))
    )


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_front_by_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = np.column_stack([rng.integers(0, 30, 300), rng.integers(0, 30, 300), rng.integers(1, 9, 300)])
    points = points.astype(float)
    front = pareto_front(*points.T)
    assert front.tolist() == [not beaten(points, i) for i in range(len(points))]
    assert 0 < front.sum() < len(points)


def test_of_nothing() -> None:
    assert pareto_front(np.empty(0), np.empty(0), np.empty(0)).tolist() == []
