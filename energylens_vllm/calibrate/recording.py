"""Recorded engine steps: read from a file, and what was measured beside them. The format is in docs/formats.md."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from energylens_vllm.errors import EnergyLensError

#: A GPU that has waited this long for a new step was idle; between steps of a busy engine it is a few ms at most.
IDLE_GAP_S = 0.1
#: What a phase begins with and is not scored: the counter lags by 0.1 s, clocks and batch settle within this.
SETTLE_S = 0.5
#: A counter that advances each 0.1 s is read to 10 % or better over this.
SHORTEST_WINDOW_S = 1.0
#: What is read of a .npz file.
ARRAYS = ("off", "n", "c", "t0", "t2", "phase", "phases", "en", "capture_sizes")


class RecordingError(EnergyLensError):
    """A file that is not a recording of engine steps."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A stretch of time in one phase: its steps and, where it was measured, their time and energy.

    `shares[k]` is the part of step `steps[k]` that ran inside the window. `busy_s` is the part of `duration_s` in which
    a step ran. `energy_j` is of all GPUs, idle time included. The three are NaN where nothing was measured.
    """

    phase: str
    steps: range
    shares: NDArray[np.float64]
    duration_s: float = float("nan")
    busy_s: float = float("nan")
    energy_j: float = float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """Engine steps in the order they were scheduled.

    Step i holds requests `offsets[i]:offsets[i + 1]` of `new_tokens` and `computed_tokens`, and belongs to phase
    `phases[phase[i]]`. `start_s` and `end_s` are when it was scheduled and when its output was taken (monotonic
    seconds, NaN if unknown). `counter` has a row (time in s, energy counter in J) for each reading. `capture_sizes` are
    the CUDA-graph sizes that batches were padded to: empty if eager, None if unknown.
    """

    offsets: NDArray[np.int64]
    new_tokens: NDArray[np.int64]
    computed_tokens: NDArray[np.int64]
    phase: NDArray[np.int64]
    phases: tuple[str, ...]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    counter: NDArray[np.float64]
    capture_sizes: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.phase)

    def requests(self, step: int) -> list[tuple[int, int]]:
        """(new tokens, computed tokens) of each request of a step; empty for a step that ran nothing."""
        here = slice(self.offsets[step], self.offsets[step + 1])
        return list(zip(self.new_tokens[here].tolist(), self.computed_tokens[here].tolist(), strict=True))

    def windows(self) -> list[Window]:
        """The stretches of steps of one phase, in order, each with what was measured over it."""
        ran_from_s = self._ran_from_s()
        edges = [0, *(np.flatnonzero(np.diff(self.phase)) + 1).tolist(), len(self)]
        return [self._window(range(*edge), ran_from_s) for edge in pairwise(edges)]

    def _ran_from_s(self) -> NDArray[np.float64]:
        """When each step began to run: with async scheduling it is scheduled while the one before still runs."""
        earlier_end_s = np.concatenate([self.start_s[:1], np.fmax.accumulate(self.end_s)[:-1]])
        return np.where(self.start_s - earlier_end_s < IDLE_GAP_S, earlier_end_s, self.start_s)

    def _window(self, steps: range, ran_from_s: NDArray[np.float64]) -> Window:
        """The window from the first to the last counter reading in `steps`, so that its energy is not interpolated."""
        phase, here = self.phases[self.phase[steps[0]]], slice(steps.start, steps.stop)
        start_s, end_s = ran_from_s[here], self.end_s[here]
        # The output of the phase's last step is taken when the next phase steps, which may be a pause later.
        last_end_s = np.fmax.reduce(end_s[:-1]) if len(end_s) > 1 else end_s[0]
        first, last = np.searchsorted(self.counter[:, 0], [start_s[0] + SETTLE_S, last_end_s])
        if (
            np.isnan(last_end_s)
            or last - first < 2
            or self.counter[last - 1, 0] - self.counter[first, 0] < SHORTEST_WINDOW_S
        ):
            return Window(phase, steps, np.ones(len(steps)))
        (begin, begin_j), (end, end_j) = self.counter[first], self.counter[last - 1]
        inside_s = np.nan_to_num(np.minimum(end_s, end) - np.maximum(start_s, begin)).clip(min=0.0)
        shares = np.divide(inside_s, end_s - start_s, out=np.zeros(len(steps)), where=inside_s > 0)
        return Window(phase, steps, shares, float(end - begin), float(inside_s.sum()), float(end_j - begin_j))


def load(path: str | os.PathLike[str]) -> Recording:
    """Read a recording: `.npz` with arrays, or JSON lines `{"requests": [[new, computed], ...]}`.

    Raises RecordingError naming the file, and the line or the array that is wrong.
    """
    file = Path(path)
    if not file.is_file():
        raise RecordingError(f"recording: no file {os.fspath(path)!r}")
    with file.open("rb") as stream:
        begins_as_zip = stream.read(2) == b"PK"
    recording = _from_npz(file) if begins_as_zip or file.suffix == ".npz" else _from_json_lines(file)
    for what, tokens, least in (("new", recording.new_tokens, 1), ("computed", recording.computed_tokens, 0)):
        if (wrong := np.flatnonzero(tokens < least)).size:
            step = np.searchsorted(recording.offsets, wrong[0], side="right") - 1
            raise RecordingError(
                f"{file}: a request of step {step} has {tokens[wrong[0]]} {what} tokens; accepted: {least} or more"
            )
    return recording


def _from_npz(file: Path) -> Recording:
    arrays = _arrays(file)
    offsets, new_tokens, computed_tokens = (_whole_numbers(file, arrays, name) for name in ("off", "n", "c"))
    steps = len(offsets) - 1
    if steps < 1:
        raise RecordingError(f"{file}: it has no steps")
    phase = _whole_numbers(file, arrays, "phase") if "phase" in arrays else np.zeros(steps, np.int64)
    phases = tuple(str(name) for name in arrays["phases"]) if "phases" in arrays else ("all",)
    start_s, end_s = (_seconds(file, arrays, name, steps) for name in ("t0", "t2"))
    counter = _counter(file, arrays["en"]) if "en" in arrays else np.empty((0, 2))
    sizes = tuple(_whole_numbers(file, arrays, "capture_sizes").tolist()) if "capture_sizes" in arrays else None
    lengths = {"off": steps, "phase": len(phase), "t0": len(start_s), "t2": len(end_s)}
    wrong = [name for name, length in lengths.items() if length != steps]
    if wrong:
        raise RecordingError(f"{file}: array {wrong[0]!r} has {lengths[wrong[0]]} steps, 'off' has {steps}")
    end_s[~(end_s > start_s)] = np.nan  # its output was never taken
    divided = offsets[0] == 0 and np.diff(offsets).min() >= 0 and offsets[-1] == len(new_tokens)
    if not divided or len(new_tokens) != len(computed_tokens):
        raise RecordingError(f"{file}: 'off' does not divide the {len(new_tokens)} 'n' and {len(computed_tokens)} 'c'")
    if phase.min(initial=0) < 0 or phase.max(initial=0) >= len(phases):
        raise RecordingError(f"{file}: 'phase' names phase {phase.max()}, 'phases' has {len(phases)}")
    return Recording(offsets, new_tokens, computed_tokens, phase, phases, start_s, end_s, counter, sizes)


def _arrays(file: Path) -> dict[str, NDArray[np.generic]]:
    """All arrays that are read here."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ARRAYS if name in archive}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise RecordingError(f"{file}: cut short or damaged, not a readable .npz file ({error})") from None
    missing = [name for name in ("off", "n", "c") if name not in arrays]
    if missing:
        raise RecordingError(f"{file}: array {missing[0]!r} is missing; needed: off, n, c")
    return arrays


def _whole_numbers(file: Path, arrays: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.int64]:
    values = arrays[name]
    whole = values.ndim == 1 and (values.dtype.kind in "iu" or (values.dtype.kind == "f" and _all_whole(values)))
    if not whole:
        raise RecordingError(f"{file}: array {name!r} is not one row of whole numbers")
    return values.astype(np.int64)


def _all_whole(values: NDArray[np.generic]) -> bool:
    numbers = values.astype(np.float64)
    return bool(np.all(np.isfinite(numbers) & (numbers == np.floor(numbers))))


def _seconds(file: Path, arrays: Mapping[str, NDArray[np.generic]], name: str, steps: int) -> NDArray[np.float64]:
    if name not in arrays:
        return np.full(steps, np.nan)
    values = arrays[name]
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise RecordingError(f"{file}: array {name!r} is not one row of seconds")
    return values.astype(np.float64)


def _counter(file: Path, readings: NDArray[np.generic]) -> NDArray[np.float64]:
    """Rows of (s, J) from rows of (s, mJ, ...)."""
    if readings.ndim != 2 or readings.shape[1] < 2 or readings.dtype.kind not in "iuf":
        raise RecordingError(f"{file}: array 'en' does not hold rows of time and energy")
    return readings[:, :2].astype(np.float64) * (1.0, 1e-3)


def _from_json_lines(file: Path) -> Recording:
    steps: list[list[list[int]]] = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            requests = json.loads(line)["requests"]
            if not all(type(new) is type(computed) is int and max(new, computed) < 2**62 for new, computed in requests):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise RecordingError(
                f'{file}, line {number}: not a step; accepted: {{"requests": [[new tokens, computed tokens], ...]}}'
            ) from None
        steps.append(requests)
    if not steps:
        raise RecordingError(f"{file}: it has no steps")
    pairs = np.array([pair for step in steps for pair in step], dtype=np.int64).reshape(-1, 2)
    unknown = np.full(len(steps), np.nan)
    return Recording(
        offsets=np.cumsum([0, *(len(step) for step in steps)]),
        new_tokens=pairs[:, 0],
        computed_tokens=pairs[:, 1],
        phase=np.zeros(len(steps), np.int64),
        phases=("all",),
        start_s=unknown,
        end_s=unknown,
        counter=np.empty((0, 2)),
    )
