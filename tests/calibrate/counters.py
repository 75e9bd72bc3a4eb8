"""An energy counter that ranks in processes of their own can have: so many watts, and an advance each 0.1 s."""

from __future__ import annotations

import time


class Steady:
    def __init__(self, watts: float) -> None:
        self.watts = watts

    def counter_j(self) -> float:
        time.sleep(0.002)
        return int(time.perf_counter() * 10) / 10 * self.watts


def of_rank(rank: int) -> Steady:
    return Steady(200.0 + 100.0 * rank)


def that_fails(rank: int) -> Steady:
    raise RuntimeError(f"rank {rank} has no counter")
