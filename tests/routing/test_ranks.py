"""Choosing among the data-parallel ranks of one vLLM."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from energylens_vllm.routing import StepTable
from energylens_vllm.routing.decisions import Decisions
from energylens_vllm.routing.ranks import Load, Ranks

IDLE = Load(0, 0, 0.0)


class Counted:
    """Counts what is decided."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}

    def __call__(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        key = " ".join((name.removeprefix("energylens_routing_"), *labels))
        self.of[key] = self.of.get(key, 0.0) + value


def ranks(table: StepTable, count: int = 2, counted: Counted | None = None) -> Ranks:
    return Ranks(table, count, 1.0, 0.05, Decisions(counted or Counted()))


def test_requests_gather_on_one_rank_until_the_targets_bear_no_more(table: StepTable) -> None:
    chosen, held, r = [], [0, 0], ranks(table)
    for i in range(400):
        best = r.choose([Load(n, 0, None) for n in held], [i % 7, i] * 250, 256)
        assert best is not None
        chosen.append(best)
        held[best] += 1
    first = chosen[0]
    assert chosen[:30] == [first] * 30
    assert 1 - first in chosen  # but not for ever
    assert max(held) < 300


def test_what_waits_counts(table: StepTable) -> None:
    prompt = list(range(2000))
    r = ranks(table)
    assert r.choose([Load(8, 0, 0.01), IDLE], prompt) == 0
    assert r.choose([Load(8, 200, 0.01), IDLE], prompt) == 1


def test_a_full_cache_is_left_alone(table: StepTable) -> None:
    assert ranks(table).choose([Load(8, 0, 0.99), IDLE], [1] * 500) == 1


def test_prefixes_stay_where_they_are(table: StepTable) -> None:
    r, rng = ranks(table), random.Random(0)
    shared = [rng.randrange(30_000) for _ in range(8000)]
    both = [Load(8, 0, 0.05), Load(8, 0, 0.05)]
    first = r.choose(both, [*shared, 1])
    assert r.choose(both, [*(rng.randrange(30_000) for _ in range(500)), 2]) is not None
    assert first is not None
    busier = list(both)
    busier[1 - first] = Load(9, 0, 0.05)  # it would be a little cheaper there
    assert r.choose(busier, [*shared, 3]) == first


def test_it_learns_how_long_answers_and_steps_are(table: StepTable) -> None:
    r = ranks(table)
    for _ in range(500):
        r.ended(500, 20)
        r.timed(0, 1.0, 5.0)  # this rank's steps take five times as long
    busy = Load(64, 0, 0.05)
    assert r.choose([busy, busy], [1] * 500) == 1


def test_without_tokens_it_chooses_all_the_same(table: StepTable) -> None:
    counted = Counted()
    assert ranks(table, counted=counted).choose([IDLE, Load(4, 0, 0.0)], None) == 1
    assert counted.of["decisions_total least_joules"] == 1
    assert counted.of["saved_joules_total"] > 0


def test_memory_is_bounded(table: StepTable) -> None:
    r, rng = ranks(table), random.Random(0)

    def ask(count: int) -> None:
        for _ in range(count):
            r.choose([Load(3, 0, 0.1), IDLE], [rng.randrange(30_000) for _ in range(640)], 100)
            r.ended(640, rng.randrange(1, 500))

    ask(3000)  # 30k blocks: more than are kept
    tracemalloc.start()
    ask(3000)
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # Blocks that are kept are others by now; what counts is that there are no more of them.
    assert len(r._prefixes._seen["0"]) <= 16_384
    assert grown < 4_000_000


@pytest.mark.parametrize("count", [2, 8])
def test_all_ranks_may_be_chosen(table: StepTable, count: int) -> None:
    r = ranks(table, count)
    for best in range(count):
        loads = [Load(300, 300, 0.9)] * count
        loads[best] = Load(4, 0, 0.01)
        assert r.choose(loads, [1] * 100) == best
