"""Power, energy and the clock: at the power limit a GPU slows until it draws what it may.

Energy of a step at relative clock r = f / f_max:

    E(r) = E_fixed + E_core * V(r)^2 + P_static(r) * t(r),     t(r) = t_1 + D * (1 / r - 1)

with E_core what the SMs, caches and crossbar spend (all FLOPs and the on-chip share of every byte), E_fixed what HBM
and links spend, whose supply does not follow the SM clock, V(r) = v_0 + (1 - v_0) r the core voltage relative to that at the top clock (dynamic CMOS energy per operation
goes with V^2), P_static(r) = P_floor + (P_static - P_floor) * r * V(r)^2 (a clock tree that toggles whether or not
there is work), t_1 the step's time at the top clock and D the part of it that follows the clock. The clock is the
largest r <= 1 with E(r) / t(r) <= limit; power rises with r, so bisection finds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

#: Lowest relative clock considered: 0.25 of 1980 MHz is below what any limit >= 200 W asks for.
LOWEST_CLOCK = 0.25


class Operating(NamedTuple):
    """Where a step runs: relative clock, seconds, and joules split by what the clock does to them."""

    clock: Any
    time_s: Any
    voltage_squared: Any  #: factor on core energy
    static_w: Any


def operate(
    time_s: Any, clocked_s: Any, fixed_j: Any, core_j: Any, static_w: float, floor_w: float,
    voltage_floor: float, limit_w: float,
) -> Operating:  # fmt: skip
    """Solve for the clock of each step. Arrays of any one shape; `time_s` > 0 is at the top clock."""

    def at(clock: Any) -> tuple[Any, Any, Any, Any]:
        voltage = voltage_floor + (1 - voltage_floor) * clock
        squared = voltage * voltage
        seconds = time_s + clocked_s * (1 / clock - 1)
        static = floor_w + (static_w - floor_w) * clock * squared
        return seconds, squared, static, (fixed_j + core_j * squared) / seconds + static

    seconds, squared, static, watts = at(1.0)
    clock = np.ones_like(seconds)
    if not np.any(watts > limit_w):
        return Operating(clock, seconds, squared + np.zeros_like(seconds), static + np.zeros_like(seconds))
    low, high = np.full_like(seconds, LOWEST_CLOCK), clock
    for _ in range(12):  # to 0.02 % of the clock
        middle = (low + high) / 2
        over = at(middle)[3] > limit_w
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    clock = np.where(watts > limit_w, low, 1.0)
    seconds, squared, static, _ = at(clock)
    return Operating(clock, seconds, squared, static)
