"""Follows an engine's steps: what was scheduled, when it ended, what it should have cost; and reports the sums.

On the scheduler's path a step costs two clock readings and a few references: `scheduled` and `ended` only remember.
`report` does the work, for all steps since the last report together, because evaluating the step model for a hundred
steps costs little more than for one. A thread calls it while the engine thread waits for the GPU (`hooks/vllm/`).

With asynchronous scheduling or pipeline parallelism several steps are in flight, and a step's GPU time begins when the
one before ends. So a step's measured duration runs from the end of the step before, or from its own scheduling if that
was later: time without work is in no step.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.guard import FAILURES, Guard
from energylens_vllm.serving.increments import Increments, Report
from energylens_vllm.serving.metrics import COMPONENTS, FLAGS, PHASES
from energylens_vllm.serving.predictor import Predictions, Predictor

if TYPE_CHECKING:
    from energylens_vllm.serving.attribution import Attribution

MAX_IN_FLIGHT = 64  #: steps remembered between schedule() and update_from_output(); vLLM keeps a handful
#: ended steps kept for the next report (some 16 kB each with 256 requests); more are lost, and counted as unpredicted
MAX_UNREPORTED = 8192


@dataclass(slots=True)
class Step:
    """One executed step. Times are of `time.perf_counter()`, in seconds."""

    batch: Batch
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """The measured duration."""
        return self.end_s - self.start_s


#: A schedule() call that is under way is not seen before it ends.
UNSEEN_S = 0.05

#: gets each report's steps, in order and perhaps none, with their predictions (None if there are none), and may add to
#: the report
Listener = Callable[[Sequence[Step], Predictions | None, Increments], None]


class StepObserver:
    """Observes one engine.

    The engine's thread calls `scheduled`, `ended` and `take_outbox`; one other thread calls `report`, or the engine's
    own. They meet in two deques, whose ends are thread-safe, so nobody waits for a lock; only `report` has one, for an
    engine that cannot wait for the other thread's next.
    """

    def __init__(
        self,
        read: Callable[[Any], Batch],
        predictor: Predictor | None,
        report_interval_s: float = 5.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`read` makes a batch of what `scheduled` was given; without a predictor, steps are only counted."""
        self.clock = clock
        self.report_interval_s = report_interval_s
        self.has_reporter = False  #: whether a thread calls `report`; if not, the engine's own has to
        self.predictor = predictor
        self.guard = Guard()
        self.increments = Increments()  #: for the thread that reports, and its listeners
        self.listeners: list[Listener] = []
        self.attribution: Attribution | None = None  #: one of the listeners, if requests have accounts
        self.asking: set[str] = set()  #: requests that want to be told their energy
        self.outbox: deque[Report] = deque()  #: reports to be shipped; any thread may append
        self.num_dummy_steps = 0
        self.last_end_s = float("-inf")
        #: up to when all steps have been reported: those that have not, begin later
        self.settled_s = float("-inf")
        self._read = read
        self._in_flight: dict[int, tuple[object, Any, float]] = {}
        self._ended: deque[tuple[Any, float, float]] = deque(maxlen=MAX_UNREPORTED)
        self._num_ended = self._num_taken = 0
        self._reported_dummy_steps = 0
        self._next_report_s = clock()  # what is predicted for shall be known before the first step
        self._reporting = threading.Lock()

    def scheduled(self, key: object, work: Any, start_s: float) -> None:
        """A step was scheduled, beginning at `start_s`. `key` is any object that stands for it until it has ended."""
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            del self._in_flight[next(iter(self._in_flight))]
        self._in_flight[id(key)] = (key, work, start_s)

    def ended(self, key: object) -> None:
        """The step of `key` has ended now. One that was not seen being scheduled is ignored."""
        flight = self._in_flight.get(id(key))
        if flight is None:
            return
        end_s = self.clock()
        self._ended.append((flight[1], max(flight[2], self.last_end_s), end_s))
        self._num_ended += 1
        self.last_end_s = end_s
        del self._in_flight[id(key)]  # not before: at any time a step is in one of both

    def is_due(self, out_of_work: bool) -> bool:
        """Whether to call `report` now: the interval is over, or many steps wait, or no later one may come to do it."""
        return out_of_work or self.clock() >= self._next_report_s or len(self._ended) >= MAX_UNREPORTED // 4

    @property
    def has_unreported(self) -> bool:
        """Whether steps have ended since the last report."""
        return bool(self._ended)

    def take_outbox(self) -> list[Report]:
        """All that is to be shipped, perhaps nothing."""
        reports = []
        while self.outbox:
            try:
                reports.append(self.outbox.popleft())
            except IndexError:  # the other thread took it
                break
        return reports

    def report(self) -> None:
        """Predict and account for the steps that ended since the last call, and put a report into the outbox."""
        with self._reporting:
            self._report()

    def _report(self) -> None:
        self._next_report_s = self.clock() + self.report_interval_s
        settled_s = self._begun_s()
        steps, predictions = self._take_steps(), None
        self.settled_s = settled_s
        if steps:
            predictions = self._predict(steps)
            _add_steps(self.increments, steps)
            if predictions is None:
                self.increments.add("energylens_unpredicted_steps_total", float(len(steps)))
            else:
                _add_predictions(self.increments, steps, predictions)
            _add_flags(self.increments, steps, predictions)
        for listener in self.listeners:
            with self.guard.at("listen"):
                listener(steps, predictions, self.increments)
        self._add_counts()
        if report := self.increments.take():
            self.outbox.append(report)

    def _begun_s(self) -> float:
        """When the earliest step began to run that is yet to end; now, if there is none."""
        last_end_s = self.last_end_s
        in_flight = [start_s for _, _, start_s in list(self._in_flight.values())]
        return max(last_end_s, min([self.clock() - UNSEEN_S, *in_flight]))

    def _take_steps(self) -> list[Step]:
        num_ended, unread = self._num_ended, 0
        steps: list[Step] = []
        for _ in range(len(self._ended)):
            try:
                work, start_s, end_s = self._ended.popleft()
            except IndexError:  # pragma: no cover - the engine's thread only appends
                break
            self._num_taken += 1
            try:
                steps.append(Step(self._read(work), start_s, end_s))
            except Exception:
                self.guard.failed("read")
                unread += 1
        if (lost := num_ended - self._num_taken) > 0:
            self._num_taken += lost
            self.increments.add("energylens_unpredicted_steps_total", float(lost))
        if (lost > 0 or unread) and self.attribution is not None:
            self.attribution.lost()
        return steps

    def _predict(self, steps: Sequence[Step]) -> Predictions | None:
        if self.predictor is None:
            return None
        with self.guard.at("predict"):
            predictions = self.predictor.predict([step.batch for step in steps])
            _check(predictions, len(steps))
            return predictions
        return None

    def _add_counts(self) -> None:
        """Increments of what other threads count in plain integers."""
        dummy_steps = self.num_dummy_steps
        if new := dummy_steps - self._reported_dummy_steps:
            self.increments.add("energylens_dummy_steps_total", float(new))
            self._reported_dummy_steps = dummy_steps
        for place, failures in self.guard.take():
            self.increments.add(FAILURES, float(failures), place)


def _check(predictions: Predictions, num_steps: int) -> None:
    """Raises EnergyLensError for what would spoil counters for good: they can neither fall nor forget a NaN."""
    named = {
        "time_s": predictions.time_s,
        "energy_j": predictions.energy_j,
        "low_j": predictions.low_j,
        "high_j": predictions.high_j,
        **predictions.components,
        **predictions.phases,
        **predictions.waste,
    }
    if wrong := [name for name, values in named.items() if values.shape != (num_steps,)]:
        raise EnergyLensError(f"predictions: {wrong[0]} has shape {named[wrong[0]].shape} for {num_steps} steps")
    together = np.array(list(named.values()))
    if not (together.min() >= 0.0 and together.max() < np.inf):
        wrong = [name for name, values in named.items() if not (values.min() >= 0.0 and values.max() < np.inf)]
        raise EnergyLensError(f"predictions: {wrong[0]} is negative or not finite in some step")


def _add_steps(increments: Increments, steps: Sequence[Step]) -> None:
    batches = [step.batch for step in steps]
    for phase, count in Counter(batch.phase for batch in batches).items():
        increments.add("energylens_steps_total", float(count), phase)
    num_tokens = sum(batch.num_tokens for batch in batches)
    num_decode_tokens = sum(batch.num_decode_tokens for batch in batches)
    increments.add("energylens_tokens_total", float(num_tokens - num_decode_tokens), "prefill")
    increments.add("energylens_tokens_total", float(num_decode_tokens), "decode")
    cached = sum(sum(batch.cached_tokens.values()) for batch in batches if batch.cached_tokens)
    increments.add("energylens_cached_tokens_total", float(cached))
    drafts = sum(sum(batch.draft_tokens.values()) for batch in batches if batch.draft_tokens)
    increments.add("energylens_draft_tokens_total", float(drafts))


def _add_predictions(increments: Increments, steps: Sequence[Step], predictions: Predictions) -> None:
    for phase in PHASES:
        increments.add_all("energylens_predicted_energy_joules_total", predictions.phases[phase].tolist(), phase)
    for component in COMPONENTS:
        joules = predictions.components[component].tolist()
        increments.add_all("energylens_predicted_component_energy_joules_total", joules, component)
    for reason, wasted in predictions.waste.items():
        increments.add_all("energylens_predicted_waste_joules_total", wasted.tolist(), reason)
    increments.add_all("energylens_predicted_energy_bound_joules_total", predictions.low_j.tolist(), "lower")
    increments.add_all("energylens_predicted_energy_bound_joules_total", predictions.high_j.tolist(), "upper")
    increments.observe("energylens_step_energy_joules", predictions.energy_j.tolist())
    durations, expected = [step.duration_s for step in steps], predictions.time_s.tolist()
    increments.add_all("energylens_predicted_step_time_seconds_total", expected)
    increments.add_all("energylens_measured_step_time_seconds_total", durations)
    ratios = [measured / time_s for measured, time_s in zip(durations, expected, strict=True) if time_s > 0.0]
    increments.observe("energylens_step_time_ratio", ratios)


def _add_flags(increments: Increments, steps: Sequence[Step], predictions: Predictions | None) -> None:
    """Count for each flag the steps that have it, from the batch or from its prediction."""
    every = frozenset() if predictions is None else predictions.flags
    counts: Counter[str] = Counter()
    for flags, count in Counter(step.batch.flags for step in steps).items():
        for flag in {flag if flag in FLAGS else "other" for flag in flags | every}:
            counts[flag] += count
    for flag, count in counts.items():
        increments.add("energylens_flagged_steps_total", float(count), flag)
