"""Replay a recording through an energy model and score the predictions against what was measured."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from energylens_vllm.calibrate.recording import Recording, Window
from energylens_vllm.energy import EnergyModel
from energylens_vllm.energy.batch import Array, steps_from_arrays


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the steps of a phase; where it was measured, over the part of them that lies inside its windows.

    `predicted_j` and its 90 % bounds are of the steps and of `idle_s` seconds of idle GPUs. `measured_s` (time in which
    steps ran) and `measured_j` are NaN if the phase was not measured, or too briefly for the counter.
    """

    phase: str
    steps: float
    tokens: float
    idle_s: float
    predicted_s: float
    predicted_j: float
    low_s: float
    high_s: float
    low_j: float
    high_j: float
    measured_s: float
    measured_j: float

    @property
    def time_error(self) -> float:
        """Predicted over measured step time, less one."""
        return self.predicted_s / self.measured_s - 1

    @property
    def energy_error(self) -> float:
        """Predicted over measured energy, less one."""
        return self.predicted_j / self.measured_j - 1

    @property
    def measured(self) -> bool:
        return self.measured_j == self.measured_j


def replay(recording: Recording, model: EnergyModel) -> list[Score]:
    """The score of each phase, in order of first appearance."""
    predicted = _Predicted.of(recording, model)
    by_phase: dict[str, list[Score]] = {}
    for window in recording.windows():
        by_phase.setdefault(window.phase, []).append(_score(window, predicted))
    return [total(phase, [s for s in scores if s.measured] or scores) for phase, scores in by_phase.items()]


def total(name: str, scores: list[Score]) -> Score:
    """The sum of scores, named `name`."""
    sums = {field.name: sum(getattr(score, field.name) for score in scores) for field in fields(Score)[1:]}
    return Score(name, **sums)


@dataclass(frozen=True, slots=True, eq=False)
class _Predicted:
    """All steps of a recording, predicted at once; zeros where a step ran nothing. Joules are of all GPUs."""

    tokens: Array
    time_s: Array
    low_s: Array
    high_s: Array
    energy_j: Array
    low_j: Array
    high_j: Array
    idle_power_w: float

    @classmethod
    def of(cls, recording: Recording, model: EnergyModel) -> _Predicted:
        steps = steps_from_arrays(recording.new_tokens, recording.computed_tokens, recording.offsets, model.masks)
        ranks = model.deployment.data_parallel_size
        rank = model.predict(steps.share(ranks) if ranks > 1 else steps)
        ran = steps.tokens > 0

        def over(ranks: int, values: Array) -> Array:
            return np.where(ran, ranks * values, 0.0)

        return cls(
            tokens=steps.tokens,
            time_s=over(1, rank.time_s),
            low_s=over(1, rank.low_s),
            high_s=over(1, rank.high_s),
            energy_j=over(ranks, rank.energy_j),
            low_j=over(ranks, rank.low_j),
            high_j=over(ranks, rank.high_j),
            idle_power_w=model.idle_power_w,
        )


def _score(window: Window, predicted: _Predicted) -> Score:
    here = slice(window.steps.start, window.steps.stop)
    idle_s = max(window.duration_s - window.busy_s, 0.0) if window.duration_s == window.duration_s else 0.0
    idle_j = idle_s * predicted.idle_power_w

    def inside(values: Array) -> float:
        return float(window.shares @ values[here])

    return Score(
        window.phase,
        steps=inside((predicted.tokens > 0).astype(float)),
        tokens=inside(predicted.tokens),
        idle_s=idle_s,
        predicted_s=inside(predicted.time_s),
        predicted_j=inside(predicted.energy_j) + idle_j,
        low_s=inside(predicted.low_s),
        high_s=inside(predicted.high_s),
        low_j=inside(predicted.low_j) + idle_j,
        high_j=inside(predicted.high_j) + idle_j,
        measured_s=window.busy_s,
        measured_j=window.energy_j,
    )
