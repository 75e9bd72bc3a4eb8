"""What an engine has to add to the metrics since it last reported, and how it stays exact on the way.

Each report reaches only one of several API servers, and Prometheus' multi-process mode adds the servers' counters, so
what travels are increments. A float sum depends on the order of its terms, and that order is not ours. Therefore what
is shipped of a counter is rounded to a multiple of `GRID` = 2**-36 (15 picojoules, 15 picoseconds), and the rest is
carried to the next report: sums of such multiples are exact in any order below 2**17 (131 kJ; above, as exact as any
float64 counter). So at any time the counter on /metrics plus what is still to be shipped is the exact sum of the
per-step values, and after any number of steps the two differ by less than 15 picojoules, not by a growing error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import TypedDict

GRID = 2.0**-36

Series = tuple[str, tuple[str, ...]]  #: a metric's name and the values of its own labels


class Report(TypedDict, total=False):
    """What goes over the wire, in types any serializer takes. Each entry begins with a name and label values."""

    add: list[tuple[str, tuple[str, ...], float]]
    set: list[tuple[str, tuple[str, ...], float]]
    observe: list[tuple[str, tuple[str, ...], list[float]]]


def added(reports: Iterable[Report], name: str) -> float:
    """What all series of a counter gain in these reports."""
    return sum(value for report in reports for each, _, value in report.get("add", ()) if each == name)


class Increments:
    """Collects what one thread has to report. Not safe for several threads: each has its own."""

    def __init__(self) -> None:
        self._add: defaultdict[Series, list[float]] = defaultdict(list)
        self._set: dict[Series, float] = {}
        self._observe: defaultdict[Series, list[float]] = defaultdict(list)

    def add(self, name: str, value: float, *labels: str) -> None:
        """Raise a counter by `value` >= 0."""
        self._add[name, labels].append(value)

    def add_all(self, name: str, values: Iterable[float], *labels: str) -> None:
        """Raise a counter by each of `values` >= 0, as if one after the other."""
        self._add[name, labels].extend(values)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._set[name, labels] = float(value)

    def observe(self, name: str, values: Iterable[float], *labels: str) -> None:
        """Add observations to a histogram."""
        self._observe[name, labels].extend(values)

    def take(self) -> Report:
        """What was collected since the last call, empty if there is nothing to tell."""
        report: Report = {}
        if added := self._take_added():
            report["add"] = added
        if self._set:
            report["set"] = [(name, labels, value) for (name, labels), value in self._set.items()]
            self._set.clear()
        if self._observe:
            # Python's own floats: vLLM's serializer, which carries the report, need not know others.
            report["observe"] = [
                (name, labels, list(map(float, values))) for (name, labels), values in self._observe.items()
            ]
            self._observe.clear()
        return report

    def _take_added(self) -> list[tuple[str, tuple[str, ...], float]]:
        added = []
        for (name, labels), values in self._add.items():
            total = math.fsum(values)
            shipped = round(total / GRID) * GRID
            values[:] = (total - shipped,) if total != shipped else ()
            if shipped:
                added.append((name, labels, shipped))
        return added
