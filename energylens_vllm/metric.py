"""What one exported metric is: the tables in `serving/metrics.py` and `routing/decisions.py` are made of these."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric. `labels` maps each further label to its values, or to () where they are not known yet."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    unit: str  #: as in the name: joules, seconds, tokens, ...; "" for a ratio or an info metric
    help: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    buckets: tuple[float, ...] = ()  #: upper bounds of a histogram, +Inf left out
    from_start: bool = True  #: whether series known beforehand exist, at 0, before anything was told of them

    @property
    def label_names(self) -> tuple[str, ...]:
        """Its labels without the common ones, in the order in which values are given."""
        return tuple(name for name, _ in self.labels)

    def known_label_values(self) -> Iterator[tuple[str, ...]]:
        """Each combination of label values that is there from the start; none if one label's values are not known."""
        if not self.from_start:
            return iter(())
        return itertools.product(*(values for _, values in self.labels))

    @property
    def series(self) -> int:
        """Time series an engine has of it from the start (a histogram has one a bucket, +Inf, _sum and _count)."""
        combinations = sum(1 for _ in self.known_label_values())
        return combinations * (len(self.buckets) + 3 if self.type == "histogram" else 1)
