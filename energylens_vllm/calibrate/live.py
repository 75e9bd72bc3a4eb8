"""A recorded run, sent through meter, prediction, pairing and learning in the time in which it was recorded.

So what an engine would have exported and learnt can be told from a recording, with any profile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from energylens_vllm.calibrate.recording import Recording, RecordingError, load
from energylens_vllm.energy import EnergyModel
from energylens_vllm.meter.track import Reading, Track
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.learning import Learner, unlearnt_idle_std
from energylens_vllm.serving.learning_listener import Learning
from energylens_vllm.serving.observer import Step
from energylens_vllm.serving.pairing import WINDOW_S, Pairing, Window
from energylens_vllm.serving.predictor import ModelPredictor

Array = npt.NDArray[np.float64]

REPORT_S = 1.0  #: seconds between reports, as of a server with `attribution`


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Steps in the order in which they ended, and what the GPU said meanwhile: rows of (s, W) and of (s, J)."""

    steps: Sequence[Step]
    power: Array
    counter: Array

    @property
    def duration_s(self) -> float:
        """From the first to the last reading of the counter."""
        return float(self.counter[-1, 0] - self.counter[0, 0])


def read(path: str | os.PathLike[str], phases: Callable[[str], bool] = lambda _: True) -> Run:
    """The part of a recording (.npz with `pw` and `en`) from the first step in one of `phases` to the last.

    Raises RecordingError if it has no power, no counter or no such step.
    """
    recording = load(path)
    with np.load(path) as arrays:
        power = arrays["pw"][:, :2] * (1.0, 1e-3) if "pw" in arrays else np.empty((0, 2))
    ran = (np.diff(recording.offsets) > 0) & np.isfinite(recording.end_s)
    wanted = np.array([phases(name) for name in recording.phases])[recording.phase] & ran
    if not len(recording.counter) or not len(power) or not wanted.any():
        raise RecordingError(f"{path}: no step of these phases, or no readings of power and counter (pw, en)")
    first, last = np.flatnonzero(wanted)[[0, -1]].tolist()
    begin_s, end_s = recording.start_s[first], recording.end_s[last]
    steps = _steps(recording, [i for i in np.flatnonzero(ran).tolist() if first <= i <= last])
    return Run(steps, _within(power, begin_s, end_s), _within(recording.counter, begin_s, end_s))


def joined(runs: Sequence[Run]) -> Run:
    """One run after the other, with a pause between of as long as a GPU's counter takes to advance."""
    steps: list[Step] = []
    power: list[Array] = []
    counter: list[Array] = []
    at_s = at_j = 0.0
    for run in runs:
        begin_s, begin_j = run.counter[0]
        ended = [step for step in run.steps if step.start_s >= begin_s and step.end_s <= run.counter[-1, 0]]
        steps += [Step(step.batch, step.start_s - begin_s + at_s, step.end_s - begin_s + at_s) for step in ended]
        power.append(run.power[run.power[:, 0] >= begin_s] + np.array([at_s - begin_s, 0.0]))
        counter.append(run.counter + np.array([at_s - begin_s, at_j - begin_j]))
        last_w = run.power[-1, 1]
        at_s, at_j = counter[-1][-1, 0] + 0.1, counter[-1][-1, 1] + 0.1 * last_w
        power[-1] = power[-1][power[-1][:, 0] < at_s]
    return Run(steps, np.concatenate(power), np.concatenate(counter))


@dataclass(frozen=True, slots=True, eq=False)
class Lived:
    """What came of it: each compared window, and what was learnt."""

    windows: list[Window]
    learner: Learner | None
    increments: Increments


def readings_of(run: Run) -> list[Reading]:
    """What a meter reports of it."""
    track, readings = Track("0", "gpu"), []
    events = [(s, 0, watts) for s, watts in run.power.tolist()] + [(s, 1, j) for s, j in run.counter.tolist()]
    for at_s, is_counter, value in sorted(events):
        if not is_counter:
            track.add_power(at_s, value)
        elif (reading := track.add_counter(at_s, value)) is not None:
            readings.append(reading)
    return readings


def live(
    steps: Sequence[Step],
    readings: Sequence[Reading],
    model: EnergyModel,
    learn: bool = True,
    window_s: float = WINDOW_S,
) -> Lived:
    """Serve `steps`, in order, with the predictions of `model`, and show it `readings`, report by report."""
    predictor, increments, now_s = ModelPredictor(model), Increments(), [0.0]
    num_gpus, learning = model.deployment.num_gpus, None
    if learn:
        predictor.learner = Learner(model)
        learning = Learning(predictor.learner)
    windows: list[Window] = []
    pairing = Pairing(
        num_gpus, model.idle_power_w / num_gpus, lambda: now_s[0], window_s,
        metered=len({reading.gpu for reading in readings}), learner=predictor.learner,
        idle_std=unlearnt_idle_std(model),
    )  # fmt: skip
    pairing.listeners.append(windows.append)
    readings = sorted(readings, key=lambda reading: reading.end_s)
    step, read = 0, 0
    while read < len(readings):
        now_s[0] = readings[read].end_s + REPORT_S
        first = read
        while read < len(readings) and readings[read].end_s <= now_s[0]:
            read += 1
        pairing.add(readings[first:read])
        first = step
        while step < len(steps) and steps[step].end_s <= now_s[0]:
            step += 1
        ended = steps[first:step]
        if step < len(steps):  # the one that runs now
            now_s[0] = min(now_s[0], max(steps[step].start_s, steps[step - 1].end_s if step else 0.0))
        predicted = predictor.predict([each.batch for each in ended]) if ended else None
        pairing(ended, predicted, increments)
        if learning is not None:
            learning(ended, predicted, increments)
    return Lived(windows, predictor.learner, increments)


def wmape(windows: Sequence[Window], corrected: bool = True) -> float:
    """Absolute error over measured energy, of windows together."""
    errors = [abs((w.predicted_j if corrected else w.uncorrected_j) - w.measured_j) for w in windows]
    return sum(errors) / sum(w.measured_j for w in windows)


def _steps(recording: Recording, chosen: Sequence[int]) -> list[Step]:
    """As an engine's observer has them: each begins when the one before ends, or when it is scheduled."""
    steps = []
    end_s = [float(recording.end_s[i]) for i in chosen]
    begin_s = [float("-inf"), *end_s]
    for i, (before_s, ended_s) in zip(chosen, pairwise(begin_s), strict=True):
        new, computed = zip(*recording.requests(i), strict=True)
        decodes = [n == 1 and c > 0 for n, c in zip(new, computed, strict=True)]
        num_decodes = sum(decodes)
        batch = Batch([str(k) for k in range(len(new))], new, computed, decodes, sum(new), num_decodes)
        steps.append(Step(batch, max(float(recording.start_s[i]), before_s), ended_s))
    return steps


def _within(rows: Array, begin_s: float, end_s: float) -> Array:
    return rows[(rows[:, 0] >= begin_s) & (rows[:, 0] <= end_s)]
