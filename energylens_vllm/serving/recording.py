"""Records an engine's steps and its GPUs' energy counters while `energylens record` asks for it.

Each engine leaves a note of itself in a folder of the user's (`ENGINE.json`, ENGINE being its process and index). Who
wants a recording puts `ENGINE.request` beside it; the reporting thread sees that at its next report, keeps what each
report brings, and writes `ENGINE.npz` (docs/formats.md) when the time is over, the request has gone, or the recording
is as large as it may get. `ENGINE.status` says how far it is. Nothing here is on the scheduler's path, only sizes of
batches are kept, never a token, and only the user whose folder it is can ask.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from energylens_vllm.files import whole
from energylens_vllm.meter import Reading
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.observer import Step
from energylens_vllm.serving.predictor import Predictions

#: A recording ends when it has as many (step, request) pairs: 8 bytes each, some ten minutes of 250 requests at a time.
MOST_REQUESTS = 16_000_000
#: Steps are numbered in phases of this length, which `energylens replay` scores one by one.
PHASE_S = 10.0
LONGEST_S = 3600.0


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: `id` tells this request from others."""

    id: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Status:
    """How far the recording of request `id` is: "recording", "done" or "failed" (`problem` says why).

    `full`: whether it ended because it was as large as it may get.
    """

    id: str
    state: str
    steps: int = 0
    seconds: float = 0.0
    readings: int = 0
    full: bool = False
    problem: str = ""


def files(folder: Path, engine: str) -> dict[str, Path]:
    """Paths of an engine's files by kind."""
    return {kind: folder / f"{engine}.{kind}" for kind in ("json", "request", "status", "npz")}


def write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with whole(path) as file:
        file.write(text)


@dataclass(slots=True)
class _Kept:
    """One recording under way. Times are of the observer's clock."""

    request: Request
    begin_s: float
    steps: list[tuple[float, float, int]] = field(default_factory=list)  #: (start, end, requests)
    new: list[npt.NDArray[np.int32]] = field(default_factory=list)
    computed: list[npt.NDArray[np.int32]] = field(default_factory=list)
    readings: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  #: GPU -> (time, J since it began)
    requests: int = 0

    def add(self, steps: Sequence[Step]) -> bool:
        """Keep steps; whether there is no room for more."""
        for step in steps:
            if step.start_s < self.begin_s:
                continue
            if self.requests >= MOST_REQUESTS:
                return True
            self.steps.append((step.start_s, step.end_s, len(step.batch.new_tokens)))
            self.new.append(np.array(step.batch.new_tokens, dtype=np.int32))
            self.computed.append(np.array(step.batch.computed_tokens, dtype=np.int32))
            self.requests += len(step.batch.new_tokens)
        return False

    def read(self, readings: Sequence[Reading]) -> None:
        for reading in readings:
            if reading.start_s < self.begin_s:
                continue
            series = self.readings.setdefault(reading.gpu, [(reading.start_s, 0.0)])
            series.append((reading.end_s, series[-1][1] + reading.energy_j))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """As docs/formats.md has them."""
        begin = np.array([step[0] for step in self.steps])
        phase = ((begin - self.begin_s) // PHASE_S).astype(np.int64)
        names = [f"live_{int(i * PHASE_S)}s" for i in range(int(phase[-1]) + 1)]
        arrays: dict[str, npt.NDArray[Any]] = {
            "off": np.concatenate([[0], np.cumsum([step[2] for step in self.steps])]),
            "n": np.concatenate(self.new),
            "c": np.concatenate(self.computed),
            "t0": begin,
            "t2": np.array([step[1] for step in self.steps]),
            "phase": phase,
            "phases": np.array(names),
        }
        if (counter := self._counter()) is not None:
            arrays["en"] = counter
        return arrays

    def _counter(self) -> npt.NDArray[np.float64] | None:
        """Rows of (s, mJ) over all GPUs: at the times at which the first was read, where all were."""
        series = [np.array(rows) for rows in self.readings.values()]
        if not series:
            return None
        begin, end = max(rows[0, 0] for rows in series), min(rows[-1, 0] for rows in series)
        times = series[0][:, 0]
        times = times[(times >= begin) & (times <= end)]
        joules = np.sum([np.interp(times, rows[:, 0], rows[:, 1]) for rows in series], axis=0)
        return np.stack([times, 1e3 * joules], axis=1) if len(times) > 1 else None


class StepRecording:
    """A listener of `StepObserver` that records when asked to, in `folder` under the name `engine`.

    `about` is what the note says of the engine, `capture_sizes` its CUDA-graph sizes (None if unknown). Raises OSError
    if the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        engine: str,
        about: Mapping[str, Any],
        capture_sizes: Sequence[int] | None,
        clock: Callable[[], float],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._files = files(folder, engine)
        self._sizes, self._clock = capture_sizes, clock
        self._kept: _Kept | None = None
        self._last_id = ""
        forget(folder, engine)
        write(self._files["json"], json.dumps(dict(about), default=str))

    def read(self, readings: Sequence[Reading]) -> None:
        """Take what the meter read."""
        if self._kept is not None:
            self._kept.read(readings)

    def __call__(self, steps: Sequence[Step], predictions: Predictions | None, increments: Increments) -> None:
        """Begin, go on, or end. A failure ends the recording, is told to who asked, and goes on to the observer."""
        request = self._request()
        if self._kept is None and request is None:
            return
        try:
            if self._kept is None:
                assert request is not None
                self._kept, self._last_id = _Kept(request, self._clock()), request.id
            kept = self._kept
            full = kept.add(steps)
            seconds = self._clock() - kept.begin_s
            # One report more than asked for, as the last steps are in flight.
            if full or request is None or request.id != kept.request.id or seconds >= kept.request.seconds:
                self._finish(kept, full, seconds)
            else:
                self._tell(Status(kept.request.id, "recording", len(kept.steps), seconds, _rows(kept)))
        except Exception as error:
            self._kept = None
            with contextlib.suppress(OSError):
                self._tell(Status(self._last_id, "failed", problem=f"{type(error).__name__}: {error}"))
            raise

    def _finish(self, kept: _Kept, full: bool, seconds: float) -> None:
        self._kept = None
        if not kept.steps:
            self._tell(Status(kept.request.id, "failed", problem="the engine ran no step meanwhile"))
            return
        arrays = kept.arrays()
        if self._sizes is not None:
            arrays["capture_sizes"] = np.array(self._sizes, dtype=np.int64)
        with whole(self._files["npz"], "wb") as file:
            savez: Any = np.savez  # its annotations know no arrays by name; not compressed, as others wait here
            savez(file, **arrays)
        self._tell(Status(kept.request.id, "done", len(kept.steps), seconds, _rows(kept), full))

    def _tell(self, status: Status) -> None:
        write(self._files["status"], json.dumps(asdict(status)))

    def _request(self) -> Request | None:
        """What is asked for now, unless it has been done already or cannot be read."""
        try:
            raw = json.loads(self._files["request"].read_text())
            request = Request(str(raw["id"]), min(float(raw["seconds"]), LONGEST_S))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if self._kept is None and request.id == self._last_id else request


def _rows(kept: _Kept) -> int:
    return max((len(rows) for rows in kept.readings.values()), default=0)


def forget(folder: Path, engine: str) -> None:
    """Remove what an engine has left."""
    for path in files(folder, engine).values():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
