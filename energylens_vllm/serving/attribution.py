"""Each request's joules, of which not one is lost or counted twice.

`shares` says whose joules a step's joules are, as floats. Floats do not sum exactly, so accounts are kept in whole
units of `increments.GRID` (15 picojoules), in which the counters on /metrics are kept too. The energy of a report's
steps is rounded to whole units and the rest carried to the next report; among the requests the running sum of their
shares is rounded. So each gets its share to within a unit, and at any time all accounts, open and closed, sum exactly
to the energy of all steps, but for less than one unit that is still carried.

What is attributed is the predicted energy of steps. Idle energy is in no step, so nobody is charged for it. The energy
of a request that is preempted and computed again is its own, twice; one that is aborted has what it had until then.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.increments import GRID, Increments
from energylens_vllm.serving.metrics import PHASES
from energylens_vllm.serving.observer import Step
from energylens_vllm.serving.predictor import Predictions, Rows
from energylens_vllm.serving.shares import Prices, Spared, shares

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Account:
    """What one request has cost so far. Joules are exact multiples of `increments.GRID`."""

    request_id: str
    prefill_j: float
    decode_j: float
    prefill_tokens: int  #: tokens computed, those computed again after a preemption included
    decode_tokens: int
    cached_tokens: int  #: prompt tokens found in a prefix cache
    saved_j: float  #: what those would have cost
    complete: bool  #: False if some of its steps have no prediction

    @property
    def energy_j(self) -> float:
        return self.prefill_j + self.decode_j

    def as_dict(self) -> dict[str, float | int | bool]:
        """For JSON: names carry units."""
        return {
            "joules": self.energy_j,
            "prefill_joules": self.prefill_j,
            "decode_joules": self.decode_j,
            "saved_joules": self.saved_j,
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
            "cached_tokens": self.cached_tokens,
            "complete": self.complete,
        }


class Attribution:
    """A listener of `StepObserver`. `listeners` get the accounts of requests that have finished."""

    def __init__(
        self,
        prices: Prices,
        spared: Spared,
        rule: str = "shapley",
        settled: Callable[[], float] = lambda: float("inf"),
    ) -> None:
        """`settled` says up to when all steps have been reported."""
        self.listeners: list[Callable[[Sequence[Account]], None]] = []
        self._prices, self._spared, self._rule, self._settled = prices, spared, rule, settled
        self._slots: dict[str, int] = {}  # request -> its row in the arrays below
        self._free: list[int] = []
        self._units = np.zeros((0, 2), dtype=np.int64)  # by phase, in the order of PHASES
        self._tokens = np.zeros((0, 2), dtype=np.int64)
        self._cached: dict[str, tuple[int, float]] = {}
        self._incomplete: set[str] = set()
        self._finished: deque[tuple[float, str]] = deque()  # when, which; the engine's thread appends
        self._carried_j: list[float] = []  # energy that is less than a unit
        self._has_lost = False  # whether there were steps that will not be reported

    def __call__(self, steps: Sequence[Step], predictions: Predictions | None, increments: Increments) -> None:
        """Charge the steps of one report, then close the accounts of requests that have finished in them."""
        batches = [step.batch for step in steps]
        if batches and predictions is None:
            for batch in batches:
                self._incomplete.update(batch.request_ids)
                self._slots_of([batch])
        elif batches and predictions is not None:
            self._charge(batches, predictions, increments)
        if self._has_lost:
            self._has_lost = False
            self._incomplete.update(self._slots)
        for batch in batches:
            if batch.cached_tokens:
                self._add_cached(batch, increments)
        done = [request_id for batch in batches for request_id in batch.finished_request_ids]
        settled_s = self._settled()
        while self._finished and self._finished[0][0] <= settled_s:
            done.append(self._finished.popleft()[1])
        self._close(done, increments)

    def lost(self) -> None:
        """Steps before those of the next report will not be reported: whoever is open by then may have been in them."""
        self._has_lost = True

    def finish(self, request_ids: Iterable[str], time_s: float) -> None:
        """These have finished or were aborted by `time_s`; when all steps until then are reported, they are closed.

        Any thread may call this, also for those that a batch names as finished: there may be none, or it may be lost.
        """
        self._finished.extend((time_s, request_id) for request_id in request_ids)

    def account(self, request_id: str) -> Account | None:
        """What a request that has not been closed has cost so far; None if it has had no step."""
        slot = self._slots.get(request_id)
        if slot is None:
            return None
        prefill_j, decode_j = (self._units[slot] * GRID).tolist()
        prefill_tokens, decode_tokens = self._tokens[slot].tolist()
        cached_tokens, saved_j = self._cached.get(request_id, (0, 0.0))
        complete = request_id not in self._incomplete
        return Account(request_id, prefill_j, decode_j, prefill_tokens, decode_tokens, cached_tokens, saved_j, complete)

    @property
    def open_accounts(self) -> list[Account]:
        """Of all requests that have not been closed."""
        return [account for request_id in self._slots if (account := self.account(request_id)) is not None]

    # -- parts ----------------------------------------------------------------------------------------------------

    def _charge(self, batches: Sequence[Batch], predictions: Predictions, increments: Increments) -> None:
        rows = Rows.of(batches)
        joules = shares(rows, predictions.components, self._prices, self._rule)
        units, self._carried_j = whole_units(joules, predictions.energy_j, self._carried_j)
        cells = 2 * self._slots_of(batches) + rows.decode
        size = self._units.size
        # Sums in floats, which are exact for whole numbers below 2**53 (131 kJ, in one report of one request).
        self._units += np.bincount(cells, units, size).astype(np.int64).reshape(-1, 2)
        self._tokens += np.bincount(cells, rows.new, size).astype(np.int64).reshape(-1, 2)
        decode_units = int(units[rows.decode].sum())
        for phase, spent in zip(PHASES, (int(units.sum()) - decode_units, decode_units), strict=True):
            increments.add("energylens_attributed_energy_joules_total", spent * GRID, phase)

    def _slots_of(self, batches: Sequence[Batch]) -> Integers:
        """The slot of each row. Most steps have the requests of the step before."""
        known, parts, before = self._slots, [], None
        for batch in batches:
            if batch.request_ids != before:
                before = batch.request_ids
                for request_id in before:
                    if request_id not in known:
                        known[request_id] = self._new_slot()
                part = np.array([known[request_id] for request_id in before], dtype=np.int64)
            parts.append(part)
        return np.concatenate(parts)

    def _new_slot(self) -> int:
        if not self._free:
            used, more = len(self._units), max(64, len(self._units))
            self._units = np.concatenate([self._units, np.zeros((more, 2), dtype=np.int64)])
            self._tokens = np.concatenate([self._tokens, np.zeros((more, 2), dtype=np.int64)])
            self._free = list(range(used + more - 1, used - 1, -1))
        return self._free.pop()

    def _add_cached(self, batch: Batch, increments: Increments) -> None:
        saved_j = self._spared.joules(list(batch.cached_tokens.values())).tolist()
        for (request_id, tokens), joules in zip(batch.cached_tokens.items(), saved_j, strict=True):
            before_tokens, before_j = self._cached.get(request_id, (0, 0.0))
            self._cached[request_id] = (before_tokens + tokens, before_j + joules)
        increments.add_all("energylens_saved_energy_joules_total", saved_j)

    def _close(self, request_ids: Iterable[str], increments: Increments) -> None:
        closed = [account for request_id in request_ids if (account := self._take(request_id)) is not None]
        if not closed:
            return
        increments.observe("energylens_request_energy_joules", [account.prefill_j for account in closed], "prefill")
        decoded = [account.decode_j for account in closed if account.decode_tokens]
        if decoded:
            increments.observe("energylens_request_energy_joules", decoded, "decode")
        for listener in self.listeners:
            listener(closed)

    def _take(self, request_id: str) -> Account | None:
        account = self.account(request_id)
        if account is not None:
            slot = self._slots.pop(request_id)
            self._units[slot] = self._tokens[slot] = 0
            self._free.append(slot)
            self._cached.pop(request_id, None)
            self._incomplete.discard(request_id)
        return account


def whole_units(joules: Array, energy_j: Array, carried_j: Sequence[float]) -> tuple[Integers, list[float]]:
    """`joules` of each row in whole units of GRID, which sum to `energy_j` of all steps and what was carried; and what
    is left of that, which is less than a unit.

    The running sum is rounded and not each row, so no share is off by more than a unit, or below 0.
    """
    exact = [*energy_j.tolist(), *carried_j]
    total = round(math.fsum(exact) / GRID)
    sums = np.cumsum(joules)
    bounds = np.rint(sums / max(sums[-1], np.finfo(np.float64).tiny) * total).astype(np.int64)
    bounds[-1] = total
    left_j = math.fsum([*exact, -total * GRID])
    return np.diff(bounds, prepend=0), [left_j] if left_j else []
