"""Predicted and measured energy of the same stretches of time.

Never of single steps: the energy counter advances each 100 ms, in which several steps may run, with asynchronous
scheduling two are in flight, and between bursts the GPU idles. So a window runs from one reading of the counter to a
later one. Steps that cross its ends are in it with the part of their time that is; what is left of its time is idle,
at idle power. Each GPU has windows of its own, because the counters advance at different moments, and of an engine's
prediction its even share.

With a learner (`serving/learning.py`) each window also says what it would have been without what was learnt, and how it
hangs on the factors to be learnt: its evidence.

A window is left out if the meter is not to be trusted over it, or if some step in it has no prediction. Its error is
then not known, which is not the same as small.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from energylens_vllm.meter import Reading
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.learning import ENERGY, HALF_WIDTH_90, Evidence, Learner
from energylens_vllm.serving.observer import Step
from energylens_vllm.serving.predictor import Predictions

Array = npt.NDArray[np.float64]

#: A step that begins sooner than this after the one before belongs to a busy engine: host time between steps is part
#: of what is predicted for a step. (The same as in `calibrate.recording`.)
IDLE_GAP_S = 0.1
#: Over 5 s what is not known of when exactly the counter advanced (a read: 4 ms) is 0.1 %. Shorter windows show
#: transients, as of the clock: on recorded steps the error of 1 s is two to three times that of 5 s (docs/meter.md).
WINDOW_S = 5.0
#: Steps are kept for this long for readings that are late.
KEPT_S = 30.0


@dataclass(frozen=True, slots=True)
class Window:
    """What was predicted and measured over one stretch of time, over all GPUs of the engine."""

    start_s: float
    end_s: float
    measured_j: float
    predicted_j: float
    low_j: float  #: ends of the prediction interval
    high_j: float
    busy_share: float  #: of the time, how much steps ran
    uncorrected_j: float  #: what the profile alone predicts
    evidence: Evidence | None = None  #: with a learner, what it can learn from

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_j / self.measured_j - 1.0


#: what is added up of the steps of a window
_COLUMNS = ("predicted", "low", "high", "prefill", "uncorrected", "intercept", *ENERGY)
_SLOPES = slice(_COLUMNS.index("intercept") + 1, None)
_IDLE = ENERGY.index("idle")


@dataclass(slots=True)
class _Part:
    """A window of one GPU while it grows."""

    start_s: float
    end_s: float
    measured_j: float = 0.0
    joules: Array = field(default_factory=lambda: np.zeros(len(_COLUMNS)))
    busy_s: float = 0.0
    trusted: bool = True
    predicted: bool = True


class Pairing:
    """A listener of `StepObserver`; `add` gives it the meter's readings.

    `settled` says up to when all steps are reported: no other has begun before. `idle_power_w` is of one GPU. Of an
    engine that spans hosts only the GPUs of this one are `metered`. `learner` corrects what is predicted, and learns.
    `idle_std` is how sure idle power is, relative, as long as nothing is learnt.
    """

    def __init__(
        self,
        num_gpus: int,
        idle_power_w: float,
        settled: Callable[[], float],
        window_s: float = WINDOW_S,
        metered: int | None = None,
        learner: Learner | None = None,
        idle_std: float = 0.0,
    ) -> None:
        self.listeners: list[Callable[[Window], None]] = []  #: get each window that was compared
        self._num_gpus, self._idle_power_w, self._window_s = num_gpus, idle_power_w, window_s
        self._metered = metered or num_gpus
        self._settled, self._learner, self._idle_std = settled, learner, idle_std
        self._waiting: deque[Reading] = deque()
        self._steps = _Timeline()
        self._open: dict[str, _Part] = {}
        self._closed: defaultdict[str, deque[_Part]] = defaultdict(deque)
        self._predicted_j = self._measured_j = 0.0

    def add(self, readings: Iterable[Reading]) -> None:
        """Take what was read since the last call."""
        self._waiting.extend(readings)

    def __call__(self, steps: Sequence[Step], predictions: Predictions | None, increments: Increments) -> None:
        """Take the steps of one report, and compare what can be compared."""
        self._steps.extend(steps, predictions)
        settled_s = self._settled()
        if settled_s - self._steps.last_end_s < IDLE_GAP_S:  # the next step may yet turn out to have begun there
            settled_s = self._steps.last_end_s
        # Readings of different GPUs are not in one order of time, so one that has to wait must not hold up the others.
        waiting, self._waiting = self._waiting, deque()
        for reading in waiting:
            if reading.end_s <= settled_s:
                self._grow(reading)
            else:
                self._waiting.append(reading)
        while len(self._closed) == self._metered and all(self._closed.values()):
            self._compare([parts.popleft() for parts in self._closed.values()], increments)
        self._steps.forget(min([settled_s - KEPT_S, *(reading.start_s for reading in self._waiting)]))

    # -- parts ----------------------------------------------------------------------------------------------------

    def _grow(self, reading: Reading) -> None:
        part = self._open.get(reading.gpu)
        if part is None or part.end_s != reading.start_s:  # the first, or there is a gap
            part = self._open[reading.gpu] = _Part(reading.start_s, reading.end_s)
        joules, busy_s, predicted = self._steps.between(reading.start_s, reading.end_s)
        idle_j = max(reading.duration_s - busy_s, 0.0) * self._idle_power_w
        part.joules = part.joules + joules / self._num_gpus + self._idle(idle_j)
        part.busy_s += busy_s
        part.measured_j += reading.energy_j
        part.trusted &= reading.trusted
        part.predicted &= predicted
        part.end_s = reading.end_s
        if part.end_s - part.start_s >= self._window_s:
            self._closed[reading.gpu].append(self._open.pop(reading.gpu))

    def _idle(self, uncorrected_j: float) -> Array:
        """Idle energy, as the columns have it."""
        factor, std = 1.0, self._idle_std
        if self._learner is not None and self._learner.is_applied:
            factor, std = self._learner.on_idle, self._learner.idle_std
        joules = np.zeros(len(_COLUMNS))
        width = 1.0 + HALF_WIDTH_90 * std
        joules[:3] = uncorrected_j * factor * np.array([1.0, 1.0 / width, width])
        joules[_COLUMNS.index("uncorrected")] = uncorrected_j
        joules[_SLOPES.start + _IDLE] = uncorrected_j
        return joules

    def _compare(self, parts: Sequence[_Part], increments: Increments) -> None:
        measured_j = sum(part.measured_j for part in parts)
        if not all(part.trusted for part in parts) or measured_j <= 0.0:
            increments.add("energylens_uncompared_windows_total", 1.0, "meter")
            return
        if not all(part.predicted for part in parts):
            increments.add("energylens_uncompared_windows_total", 1.0, "prediction")
            return
        joules = np.sum([part.joules for part in parts], axis=0)
        predicted_j, low_j, high_j, prefill_j, uncorrected_j, intercept_j = joules[: _SLOPES.start].tolist()
        evidence = None
        if self._learner is not None:
            idle_j = float(joules[_SLOPES][_IDLE]) * self._learner.on_idle
            shares = np.array([idle_j, predicted_j - prefill_j - idle_j, prefill_j]) / max(predicted_j, 1e-30)
            evidence = Evidence(measured_j, intercept_j, joules[_SLOPES], np.clip(shares, 0.0, 1.0))
        window = Window(
            min(part.start_s for part in parts),
            max(part.end_s for part in parts),
            measured_j,
            predicted_j,
            low_j,
            high_j,
            sum(part.busy_s for part in parts) / sum(part.end_s - part.start_s for part in parts),
            uncorrected_j,
            evidence,
        )
        self._predicted_j += predicted_j
        self._measured_j += measured_j
        increments.add("energylens_compared_energy_joules_total", predicted_j, "predicted")
        increments.add("energylens_compared_energy_joules_total", measured_j, "measured")
        increments.add("energylens_absolute_error_joules_total", abs(predicted_j - measured_j))
        increments.observe("energylens_relative_error", [window.error])
        increments.set("energylens_bias_ratio", self._predicted_j / self._measured_j - 1.0)
        inside = "inside" if low_j <= measured_j <= high_j else "outside"
        increments.add("energylens_compared_windows_total", 1.0, inside)
        increments.add("energylens_uncorrected_energy_joules_total", uncorrected_j)
        increments.add("energylens_uncorrected_absolute_error_joules_total", abs(uncorrected_j - measured_j))
        if evidence is not None and self._learner is not None:
            increments.add("energylens_learning_windows_total", 1.0, self._learner.learn(evidence))
        for listener in self.listeners:
            listener(window)


class _Timeline:
    """Steps one after the other, with what was predicted for each."""

    def __init__(self) -> None:
        self._start_s = self._end_s = np.empty(0)
        self._joules = np.empty((0, len(_COLUMNS)))  # NaN where there is no prediction
        self.last_end_s = float("-inf")

    def extend(self, steps: Sequence[Step], predictions: Predictions | None) -> None:
        if not steps:
            return
        start_s, end_s = spans(steps, self.last_end_s)
        joules = np.full((len(steps), len(_COLUMNS)), np.nan)
        if predictions is not None:
            joules = _columns(predictions)
        self.last_end_s = float(end_s[-1])
        self._start_s = np.concatenate([self._start_s, start_s])
        self._end_s = np.concatenate([self._end_s, end_s])
        self._joules = np.concatenate([self._joules, joules])

    def between(self, start_s: float, end_s: float) -> tuple[Array, float, bool]:
        """Joules (as `_COLUMNS`) and seconds of the steps inside, and whether all of them are predicted."""
        here = slice(
            int(np.searchsorted(self._end_s, start_s, side="right")), int(np.searchsorted(self._start_s, end_s))
        )
        starts_s, ends_s, joules = self._start_s[here], self._end_s[here], self._joules[here]
        inside_s = np.minimum(ends_s, end_s) - np.maximum(starts_s, start_s)
        total: Array = (inside_s / (ends_s - starts_s)) @ joules
        return total, float(inside_s.sum()), not bool(np.isnan(joules).any())

    def forget(self, before_s: float) -> None:
        """Drop the steps that ended before."""
        kept = slice(int(np.searchsorted(self._end_s, before_s)), None)
        self._start_s, self._end_s, self._joules = self._start_s[kept], self._end_s[kept], self._joules[kept]


def spans(steps: Sequence[Step], last_end_s: float) -> tuple[Array, Array]:
    """When each step began and ended; `last_end_s` is when the one before them did. A busy engine's step begins where
    the one before ends."""
    end_s = np.array([step.end_s for step in steps])
    start_s = np.array([step.start_s for step in steps])
    before_s = np.concatenate([[last_end_s], end_s[:-1]])
    return np.where(start_s - before_s < IDLE_GAP_S, before_s, start_s), end_s


def _columns(predictions: Predictions) -> Array:
    """What is kept of each step."""
    energy_j, correction = predictions.energy_j, predictions.correction
    bounds = (predictions.low_j, predictions.high_j, predictions.phases["prefill"])
    if correction is None:
        return np.column_stack([energy_j, *bounds, energy_j, energy_j, np.zeros((len(energy_j), len(ENERGY)))])
    return np.column_stack([energy_j, *bounds, correction.uncorrected_j, correction.intercept_j, correction.slopes_j])
