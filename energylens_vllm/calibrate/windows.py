"""Measured windows of a recording, made ready to be predicted many times (for fits and scores)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from energylens_vllm.calibrate.recording import Recording
from energylens_vllm.einsum.kernel import Mask
from energylens_vllm.energy import EnergyModel
from energylens_vllm.energy.batch import Array, Steps, steps_from_arrays

#: Phases between the loads of a recording: caches fill, kernels are compiled, queues run empty.
TRANSIENT = ("warm", "fill", "flush", "drain")


class Predicted(NamedTuple):
    """What windows should have taken, with the bounds of 90 % intervals; each of shape (W,)."""

    busy_s: Array
    low_s: Array
    high_s: Array
    energy_j: Array
    low_j: Array
    high_j: Array


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """W windows and all of their steps.

    `first[w]` is window w's first step; `shares` the part of each step inside its window. `busy_s` is time in which
    steps ran, `idle_s` the rest of a window, `energy_j` what the counter advanced; each of shape (W,).
    """

    names: tuple[str, ...]
    steps: Steps
    shares: Array
    first: Array
    busy_s: Array
    idle_s: Array
    energy_j: Array

    def predict(self, model: EnergyModel) -> Predicted:
        """Seconds of the steps and joules of the windows."""
        steps, first = model.predict(self.steps), self.first.astype(np.int64)
        idle_j = self.idle_s * model.idle_power_w

        def total(values: Array) -> Array:
            return np.add.reduceat(values * self.shares, first)

        return Predicted(
            total(steps.time_s),
            total(steps.low_s),
            total(steps.high_s),
            total(steps.energy_j) + idle_j,
            total(steps.low_j) + idle_j,
            total(steps.high_j) + idle_j,
        )


def measured_windows(recording: Recording, masks: Sequence[Mask], most_steps: int = 200) -> Windows:
    """The windows of a recording in which a load was measured. Of more than `most_steps` steps alike in kind (one
    phase), evenly spaced ones stand for all."""
    names: list[str] = []
    chosen: list[npt.NDArray[np.int64]] = []
    shares: list[Array] = []
    first: list[int] = []
    measured: list[tuple[float, float, float]] = []
    for window in recording.windows():
        index = np.array(window.steps)[window.shares > 0]
        index = index[np.diff(recording.offsets)[index] > 0]
        if window.phase in TRANSIENT or window.energy_j != window.energy_j or not len(index):
            continue
        share = window.shares[index - window.steps.start]
        if len(index) > most_steps and window.phase.startswith(("decode", "prefill")):
            kept = np.linspace(0, len(index) - 1, most_steps).round().astype(int)
            share = share[kept] * (share.sum() / share[kept].sum())
            index = index[kept]
        first.append(sum(map(len, chosen)))
        names.append(window.phase)
        chosen.append(index)
        shares.append(share)
        measured.append((window.busy_s, max(window.duration_s - window.busy_s, 0.0), window.energy_j))
    steps = np.concatenate(chosen)
    sizes = np.diff(recording.offsets)[steps]
    requests = np.concatenate([np.arange(recording.offsets[i], recording.offsets[i + 1]) for i in steps])
    busy_s, idle_s, energy_j = np.array(measured).T
    return Windows(
        tuple(names),
        steps_from_arrays(
            recording.new_tokens[requests],
            recording.computed_tokens[requests],
            np.concatenate([[0], np.cumsum(sizes)]),
            masks,
        ),
        np.concatenate(shares),
        np.array(first, dtype=np.float64),
        busy_s,
        idle_s,
        energy_j,
    )
