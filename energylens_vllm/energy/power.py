"""Power, energy and the clock: at the power limit a GPU slows until it draws what it may.

Energy of a step at relative clock r = f / f_max:

    E(r) = E_fixed + E_core V(r)^2 + P_static(r) t(r),     t(r) = t_1 + D (1 / r - 1)

E_core: what the SMs, caches and crossbar spend (all FLOPs and the on-chip share of every byte). E_fixed: what HBM and
links spend, whose supply does not follow the SM clock. V(r) = v_0 + (1 - v_0) r: the core voltage relative to that at
the top clock; dynamic CMOS energy per operation goes with V^2. P_static(r) = P_floor + (P_static - P_floor) r V(r)^2: a
clock tree that toggles whether or not there is work. t_1: the step's time at the top clock, D the part of it that
follows the clock. The clock is the largest r <= 1 with E(r) / t(r) <= limit; power rises with r, so bisection finds it.
Where even the lowest clock draws more, work is taken to wait until power is at the limit (not measured: limits are not
set that low).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from energylens_vllm.energy.batch import Array, Integers

#: Lowest relative clock considered: a Hopper's SMs do not run slower than 210 of 1980 MHz.
LOWEST_CLOCK = 0.1


@dataclass(frozen=True, slots=True)
class Power:
    """Of one GPU: static power at the top clock and without any, relative voltage without any, and the limit."""

    static_w: float
    floor_w: float
    voltage_floor: float
    limit_w: float


class Operating(NamedTuple):
    """Where a step runs; each of the steps' shape."""

    clock: Array  #: relative to the top clock
    time_s: Array
    voltage_squared: Array  #: factor on core energy
    static_w: Array


def operate(power: Power, time_s: Array, clocked_s: Array, fixed_j: Array, core_j: Array) -> Operating:
    """Solve for the clock of each step. All arrays of one shape; `time_s` is at the top clock.

    A step that takes no time runs at the top clock.
    """
    clock = np.ones_like(time_s)
    limited = fixed_j + core_j > (power.limit_w - power.static_w) * time_s
    if limited.any():
        part = (time_s[limited], clocked_s[limited], fixed_j[limited], core_j[limited])
        clock[limited] = _limited_clock(power, *part)
    seconds, squared, static_w = _at(power, clock, time_s, clocked_s)
    if (slowest := limited & (clock <= LOWEST_CLOCK)).any():
        spent_j = fixed_j[slowest] + core_j[slowest] * squared[slowest]
        seconds[slowest] = np.maximum(seconds[slowest], spent_j / (power.limit_w - static_w[slowest]))
    return Operating(clock, seconds, squared, static_w)


def _at(power: Power, clock: Array, time_s: Array | float, clocked_s: Array | float) -> tuple[Array, Array, Array]:
    """Seconds, voltage squared and static watts at a clock."""
    voltage = power.voltage_floor + (1 - power.voltage_floor) * clock
    squared = voltage * voltage
    return (
        time_s + clocked_s * (1 / clock - 1),
        squared,
        power.floor_w + (power.static_w - power.floor_w) * clock * squared,
    )


#: Ends of the 2^7 intervals in which a limited clock is looked for. They are the same for all steps, so what depends on
#: the clock alone is worked out once for each.
_CLOCKS = np.linspace(LOWEST_CLOCK, 1.0, 2**7 + 1)


def _limited_clock(power: Power, time_s: Array, clocked_s: Array, fixed_j: Array, core_j: Array) -> Array:
    """Bisection of `_CLOCKS`, and a straight line through the interval left: to 0.02 % of the clock."""
    stretch, squared, static_w = _at(power, _CLOCKS, 0.0, 1.0)
    budget_w = power.limit_w - static_w

    def excess_j(at: Integers) -> Array:
        seconds = time_s + clocked_s * stretch[at]
        return np.asarray(fixed_j + core_j * squared[at] - budget_w[at] * seconds)

    low = np.zeros(len(time_s), dtype=np.int64)
    for half in (64, 32, 16, 8, 4, 2, 1):
        low += half * (excess_j(low + half) <= 0)
    below, above = excess_j(low), excess_j(low + 1)
    share = np.divide(-below, above - below, out=np.zeros_like(time_s), where=above > below)
    return np.asarray(_CLOCKS[low] + np.clip(share, 0.0, 1.0) * (_CLOCKS[low + 1] - _CLOCKS[low]))
