"""Tables against the step model that they are made from."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm import EnergyModel
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.routing import StepTable


def test_decode_steps_are_the_models(model: EnergyModel, table: StepTable) -> None:
    reader = table.reader()
    for n, context in ((1, 300), (7, 1500), (64, 1024), (200, 3000)):
        step = model.step([(1, context - 1)] * n)
        time_s, energy_j = reader.decode(n, context)
        assert time_s == pytest.approx(step.time_s, rel=0.01)
        assert energy_j == pytest.approx(step.energy_j, rel=0.01)


def test_mixed_steps_are_near_the_models(model: EnergyModel, table: StepTable) -> None:
    reader, random = table.reader(), np.random.default_rng(0)
    errors = []
    for _ in range(100):
        n, context, computed = int(random.integers(0, 200)), int(random.integers(100, 3000)), random.choice([0, 2000])
        new = int(np.exp(random.uniform(np.log(50), np.log(6000))))
        step = model.step([(1, context)] * n + [(new, int(computed))], [True] * n + [False])
        pairs = new * computed + new * (new + 1) / 2
        gpu_s, energy_j, host_s = reader.mixed(n, context + 1, new, pairs)
        errors.append((max(gpu_s, host_s) / step.time_s - 1, energy_j / step.energy_j - 1))
    assert np.abs(np.median(errors, axis=0)).max() < 0.01  # no bias
    assert np.median(np.abs(errors), axis=0).max() < 0.04


def test_more_beside_others_costs_less_than_alone(table: StepTable) -> None:
    assert (table.marginal_j[0] > table.marginal_j[8]).all()
    assert (table.marginal_j >= 0).all()


def test_a_scaled_table_is_wrong_by_its_factors(table: StepTable) -> None:
    wrong = table.scaled(1.2, 0.8)
    assert wrong.reader().decode(8, 500)[0] == pytest.approx(1.2 * table.reader().decode(8, 500)[0])
    assert wrong.reader().mixed(8, 500, 700, 1e5) == pytest.approx(
        [factor * value for factor, value in zip((1.2, 0.8, 1.2), table.reader().mixed(8, 500, 700, 1e5), strict=True)]
    )


def test_a_cache_of_nothing_is_refused(model: EnergyModel) -> None:
    with pytest.raises(EnergyLensError, match="kv_tokens"):
        StepTable.compile(model, 0)
