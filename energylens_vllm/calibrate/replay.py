"""Replay a recording through an energy model and score the predictions against what was measured."""

from __future__ import annotations

from dataclasses import dataclass, fields

from energylens_vllm.calibrate.recording import Recording, Window
from energylens_vllm.energy import EnergyModel


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
    by_phase: dict[str, list[Score]] = {}
    for window in recording.windows():
        by_phase.setdefault(window.phase, []).append(_score(window, recording, model))
    return [total(phase, [s for s in scores if s.measured] or scores) for phase, scores in by_phase.items()]


def total(name: str, scores: list[Score]) -> Score:
    """The sum of scores, named `name`."""
    sums = {field.name: sum(getattr(score, field.name) for score in scores) for field in fields(Score)[1:]}
    return Score(name, **sums)


def _score(window: Window, recording: Recording, model: EnergyModel) -> Score:
    idle_s = window.duration_s - window.busy_s
    idle_s = max(idle_s, 0.0) if idle_s == idle_s else 0.0
    idle_j = idle_s * model.idle_power_w
    sums = dict(steps=0.0, tokens=0.0, predicted_s=0.0, predicted_j=idle_j, low_s=0.0, high_s=0.0, low_j=idle_j,
                high_j=idle_j)  # fmt: skip
    for index, share in zip(window.steps, window.shares.tolist(), strict=True):
        requests = recording.requests(index)
        if not share or not requests:
            continue
        step = model.step(requests)
        sums["steps"] += share
        sums["tokens"] += share * sum(new for new, _ in requests)
        sums["predicted_s"] += share * step.time_s
        sums["predicted_j"] += share * step.energy_j
        for bound, seconds, joules in zip(("low", "high"), step.interval_s, step.interval_j, strict=True):
            sums[f"{bound}_s"] += share * seconds
            sums[f"{bound}_j"] += share * joules
    return Score(window.phase, idle_s=idle_s, measured_s=window.busy_s, measured_j=window.energy_j, **sums)
