"""The clock that a power limit leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energylens_vllm.energy.power import LOWEST_CLOCK, Power, operate

H200 = Power(static_w=122.0, floor_w=78.0, voltage_floor=0.4, limit_w=690.0)


def run(power: Power, time_s: float, clocked_s: float, fixed_j: float, core_j: float) -> tuple[float, float, float]:
    """(clock, seconds, mean watts)"""
    at = operate(power, *(np.array([value]) for value in (time_s, clocked_s, fixed_j, core_j)))
    joules = fixed_j + core_j * at.voltage_squared[0] + at.static_w[0] * at.time_s[0]
    return float(at.clock[0]), float(at.time_s[0]), float(joules / at.time_s[0])


def test_below_the_limit_nothing_slows() -> None:
    assert run(H200, 0.01, 0.01, 2.0, 2.0) == (1.0, 0.01, pytest.approx(122 + 400))


def test_at_the_limit_power_meets_it_and_time_grows() -> None:
    clock, time_s, watts = run(H200, 0.1, 0.1, 10.0, 90.0)
    assert watts == pytest.approx(690.0, rel=2e-3)
    assert 0.5 < clock < 1.0
    assert time_s == pytest.approx(0.1 / clock, rel=1e-9)


def test_memory_bound_work_does_not_wait_for_the_clock() -> None:
    clock, time_s, _ = run(H200, 0.1, 0.0, 10.0, 60.0)
    assert clock < 1.0
    assert time_s == 0.1


def test_no_work_takes_no_time() -> None:
    at = operate(H200, *(np.zeros(2),) * 4)
    assert at.clock.tolist() == [1.0, 1.0]
    assert at.time_s.tolist() == [0.0, 0.0]


@given(
    st.floats(1e-4, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1000.0), st.floats(0.0, 2000.0), st.floats(300.0, 1000.0)
)
def test_no_mean_power_beyond_the_limit(
    time_s: float, clocked: float, fixed_w: float, core_w: float, limit_w: float
) -> None:
    power = Power(122.0, 78.0, 0.4, limit_w)
    clock, _, watts = run(power, time_s, clocked * time_s, fixed_w * time_s, core_w * time_s)
    assert LOWEST_CLOCK <= clock <= 1.0
    assert watts <= limit_w * 1.001


def test_a_lower_limit_is_never_faster() -> None:
    times = [run(Power(122.0, 78.0, 0.4, limit), 0.1, 0.08, 12.0, 60.0)[1] for limit in (700, 600, 500, 400)]
    assert times == sorted(times)
    assert times[-1] > times[0]
