"""However steps are cut into reports and however reports are spread over servers, the sums come out the same."""

from __future__ import annotations

import math
import random
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from energylens_vllm.serving.increments import GRID, Increments

JOULES = st.floats(0.0, 5000.0, allow_subnormal=False)


@given(st.lists(JOULES, min_size=1, max_size=200), st.integers(1, 40), st.integers(1, 4), st.randoms())
def test_counters_equal_the_exact_sum_to_a_grid_step(
    steps: list[float], per_report: int, servers: int, shuffle: random.Random
) -> None:
    increments, shipped = Increments(), []
    for start in range(0, len(steps), per_report):
        for joules in steps[start : start + per_report]:
            increments.add("energy", joules, "decode")
        shipped += [value for _, _, value in increments.take().get("add", [])]
    shuffle.shuffle(shipped)
    counters = [sum(shipped[server::servers]) for server in range(servers)]
    exact = sum(map(Fraction, steps))
    assert abs(Fraction(sum(counters)) - exact) <= Fraction(GRID)  # half a step of the grid, and fsum's last bit


def test_sums_do_not_depend_on_the_order() -> None:
    chance = random.Random(0)
    increments, shipped = Increments(), []
    for _ in range(5000):
        increments.add("energy", chance.expovariate(1 / 15.0))
        shipped += [value for _, _, value in increments.take()["add"]]
    forwards, backwards = sum(shipped), sum(reversed(shipped))
    chance.shuffle(shipped)
    assert forwards == backwards == sum(shipped) == math.fsum(shipped)


def test_a_report_has_everything_once() -> None:
    increments = Increments()
    increments.add("tokens", 3.0, "decode")
    increments.add("tokens", 4.0, "decode")
    increments.add("tokens", 0.0, "prefill")
    increments.set("state", 1.0, "ready")
    increments.set("state", 0.0, "ready")
    increments.observe("joules", (1.0, 2.0))
    increments.observe("joules", (3.0,))
    assert increments.take() == {
        "add": [("tokens", ("decode",), 7.0)],
        "set": [("state", ("ready",), 0.0)],
        "observe": [("joules", (), [1.0, 2.0, 3.0])],
    }
    assert increments.take() == {}
