"""Measure points one after the other until each is stable, within a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from energylens_vllm.calibrate.measured import Log, Measured, Skipped
from energylens_vllm.calibrate.points import Point
from energylens_vllm.errors import EnergyLensError

#: One window. The energy counter advances each 0.1 s, and a window begins and ends as it does, to within a read (4 ms).
WINDOW_S = 1.0
#: Before the first window: clock, power and counter settle.
SETTLE_S = 0.4
#: Two windows in a row that agree to this in time and power are stable; after `MOST_WINDOWS` the last two have to do.
STABLE, MOST_WINDOWS = 0.01, 4
#: What a point takes at least, with making its data.
POINT_S = SETTLE_S + 2 * WINDOW_S + 0.3


class Unsupported(EnergyLensError):
    """This machine cannot run a point: no such kernel, or not enough memory."""


@dataclass(frozen=True, slots=True)
class Window:
    """Means over a window: seconds of a launch (0 if nothing ran), watts, SM clock, temperature; and what throttled."""

    time_s: float
    power_w: float
    clock_hz: float
    temperature_celsius: float
    throttled: frozenset[str] = frozenset()


class Load(Protocol):
    """A point that runs, over and over, from when it was made until it is closed."""

    library: str  #: whose kernel it is

    def window(self, seconds: float) -> Window:
        """Let it run for so long and say what was measured."""


class Machine(Protocol):
    """A GPU that runs points."""

    def load(self, point: Point) -> AbstractContextManager[Load]:
        """Make it ready to run. Raises Unsupported."""


@dataclass
class Progress:
    """What is told while it runs."""

    done: int
    total: int
    point: str
    elapsed_s: float
    budget_s: float


@dataclass
class Outcome:
    """What could not be measured, and how long everything took."""

    skipped: list[Skipped] = field(default_factory=list)
    elapsed_s: float = 0.0


def measure(
    machine: Machine,
    points: Sequence[Point],
    log: Log,
    budget_s: float,
    tell: Callable[[Progress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Measure the points that `log` does not have, and put them there."""
    started_s, outcome = clock(), Outcome()
    for number, point in enumerate(points):
        elapsed_s = clock() - started_s
        tell(Progress(number, len(points), point.name, elapsed_s, budget_s))
        if point.name in log.measured:
            continue
        if elapsed_s + POINT_S > budget_s:
            outcome.skipped.append(Skipped(point.name, f"the budget of {budget_s:.0f} s was spent"))
            continue
        try:
            log.add(_stable(machine, point))
        except Unsupported as error:
            outcome.skipped.append(Skipped(point.name, str(error)))
    outcome.elapsed_s = clock() - started_s
    tell(Progress(len(points), len(points), "", outcome.elapsed_s, budget_s))
    return outcome


def _stable(machine: Machine, point: Point) -> Measured:
    with machine.load(point) as load:
        load.window(SETTLE_S)
        windows = [load.window(WINDOW_S)]
        while len(windows) < MOST_WINDOWS:
            windows.append(load.window(WINDOW_S))
            if max(_spread(windows[-2:], "time_s"), _spread(windows[-2:], "power_w")) <= STABLE:
                break
        last = windows[-2:]
        return Measured(
            point=point.name,
            time_s=_mean(last, "time_s"),
            power_w=_mean(last, "power_w"),
            clock_hz=_mean(last, "clock_hz"),
            temperature_celsius=_mean(last, "temperature_celsius"),
            throttled=tuple(sorted(frozenset().union(*(window.throttled for window in last)))),
            library=load.library,
            windows=len(windows),
            time_spread=_spread(last, "time_s"),
            power_spread=_spread(last, "power_w"),
        )


def _mean(windows: Sequence[Window], name: str) -> float:
    return float(np.mean([getattr(window, name) for window in windows]))


def _spread(windows: Sequence[Window], name: str) -> float:
    values = [getattr(window, name) for window in windows]
    return max(values) / min(values) - 1 if min(values) > 0 else 0.0
