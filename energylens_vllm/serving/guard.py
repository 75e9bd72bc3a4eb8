"""Serving goes on whatever the plugin does: failures are counted, and the first of each place is logged."""

from __future__ import annotations

import logging
from collections import Counter
from types import TracebackType

FAILURES = "energylens_plugin_failures_total"
logger = logging.getLogger(__name__)


class Guard:
    """Counts failures by place and logs the first of each place with its traceback."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()

    def at(self, place: str) -> _Guarded:
        """`with guard.at("predict"): ...` lets no exception out. `place` is one of `metrics.PLACES`."""
        return _Guarded(self, place)

    def failed(self, place: str) -> None:
        """Count the exception being handled."""
        self.failures[place] += 1
        if self.failures[place] == 1:
            logger.exception(
                "energylens failed at %s; serving goes on. Further failures there are only counted, in %s.",
                place,
                FAILURES,
            )

    def take(self) -> list[tuple[str, int]]:
        """(place, failures) since the last call. Places are never removed, so another thread may go on counting."""
        new = [(place, count - self._taken[place]) for place, count in list(self.failures.items())]
        self._taken.update(dict(new))
        return [(place, count) for place, count in new if count]


class _Guarded:
    __slots__ = ("_guard", "_place")

    def __init__(self, guard: Guard, place: str) -> None:
        self._guard = guard
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):  # none, or one that is meant to end the process
            return False
        self._guard.failed(self._place)
        return True
