"""The thread that reads the GPUs of one engine, and outlives whatever happens to them."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from energylens_vllm.meter.errors import MeterError
from energylens_vllm.meter.gpu import Backend, Gpu
from energylens_vllm.meter.track import Reading, Track

logger = logging.getLogger(__name__)

POWER_INTERVAL_S = 0.05  #: power changes each 50 to 100 ms
STATE_INTERVAL_S = 0.2
COUNTER_INTERVAL_S = 1.0
#: A counter is read until it advances, for at most this; it should each 100 ms.
ALIGNING_S = 0.15
#: Reading begins this long before the advance that is expected: two or three reads of 4 ms.
EARLY_S = 0.010
BACKOFF_S = (1.0, 60.0)  #: the first wait after a failure, and the longest; each is twice the one before
KEPT = 4096  #: readings that wait to be taken: an hour of one GPU


class Meter:
    """Reads in a thread from `start` on. `take` gives what was read; no call here ever waits for a GPU.

    `clock` must be that of whatever the readings are compared with. `wait(seconds)` returns whether to stop.
    """

    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self.is_up = False  #: whether the GPUs can be read now
        self.problem: MeterError | None = None  #: why not, or why not before
        self.clock = clock
        self._backend = backend
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._tracks: dict[str, Track] = {}  # by UUID: a GPU that comes back goes on with its own
        self._due_s: dict[str, float] = {}
        self._readings: deque[Reading] = deque(maxlen=KEPT)
        self._faults: Counter[tuple[str, str]] = Counter()
        self._taken_faults: Counter[tuple[str, str]] = Counter()

    @property
    def is_running(self) -> bool:
        """Whether the thread runs. It does not in a forked child, which has to call `start` for itself."""
        return self._thread is not None and self._process == os.getpid() and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread in this process, if it does not run here."""
        if self.is_running:
            return
        if self._process != os.getpid():  # what a parent has read is the parent's
            self._process = os.getpid()
            self._tracks, self._due_s = {}, {}
            self._readings.clear()
            self._stopped = threading.Event()
            self._wait = self._stopped.wait
        self._thread = threading.Thread(target=self.run, name="energylens-meter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it."""
        self._stopped.set()
        if self.is_running and self._thread is not None:
            self._thread.join()

    def take(self) -> list[Reading]:
        """What was read since the last call, each GPU's in order."""
        readings = []
        with contextlib.suppress(IndexError):
            while True:
                readings.append(self._readings.popleft())
        return readings

    def take_faults(self) -> list[tuple[str, str, int]]:
        """(GPU, one of track.FAULTS, how often) since the last call; the GPU is "" for what concerns all of them."""
        counts = Counter(self._faults)
        for track in list(self._tracks.values()):
            counts.update({(track.gpu, kind): count for kind, count in list(track.faults.items())})
        new = [(gpu, kind, count - self._taken_faults[gpu, kind]) for (gpu, kind), count in counts.items()]
        self._taken_faults = counts
        return [(gpu, kind, count) for gpu, kind, count in new if count]

    def run(self) -> None:
        """Read until stopped, connecting again after each failure."""
        backoff_s = BACKOFF_S[0]
        while True:
            started_s = self.clock()
            try:
                stopped = self._read(self._backend.open())
            except Exception as error:
                stopped = self._failed(error if isinstance(error, MeterError) else MeterError(f"meter: {error!r}"))
            finally:
                self.is_up = False
                self._backend.close()
            if self.clock() - started_s > BACKOFF_S[1]:  # it had worked for a while
                backoff_s = BACKOFF_S[0]
            if stopped or self._wait(backoff_s):
                return
            backoff_s = min(2 * backoff_s, BACKOFF_S[1])

    # -- parts ----------------------------------------------------------------------------------------------------

    def _failed(self, error: MeterError) -> bool:
        """Note it; whether there is no use in trying again."""
        if self.problem is None or str(error) != str(self.problem):
            logger.warning("energy is not measured%s: %s", "" if error.lasting else " for now, will try again", error)
        self.problem = error
        if self.is_up:
            for track in self._tracks.values():
                track.lost()
        else:
            self._faults["", "error"] += 1
        return error.lasting

    def _read(self, gpus: Sequence[Gpu]) -> bool:
        """Read until stopped (True) or a GPU fails (raises)."""
        tracked = [(gpu, self._track(gpu)) for gpu in gpus]
        state_due_s = self.clock()
        while True:
            for gpu, track in tracked:
                track.add_power(self.clock(), gpu.power_w())
            if self.clock() >= state_due_s:
                state_due_s = self.clock() + STATE_INTERVAL_S
                for gpu, track in tracked:
                    track.add_state(self.clock(), gpu.state())
            for gpu, track in tracked:
                if self.clock() >= self._due_s[gpu.uuid]:
                    self._read_energy(gpu, track)
            if not self.is_up:
                self.is_up = True
                if self.problem is not None:
                    logger.info("energy is measured again")
            next_s = min(self._due_s[gpu.uuid] for gpu, _ in tracked)  # an advance that is missed costs 25 more reads
            if self._wait(min(max(next_s - self.clock(), 0.0), POWER_INTERVAL_S)):
                return True

    def _track(self, gpu: Gpu) -> Track:
        self._due_s[gpu.uuid] = self.clock()
        if gpu.uuid not in self._tracks:
            self._tracks[gpu.uuid] = Track(gpu.label, gpu.counts)
        return self._tracks[gpu.uuid]

    def _read_energy(self, gpu: Gpu, track: Track) -> None:
        if track.counts == "nothing":
            time_s = self.clock()
            reading = track.add_time(time_s)
        else:
            time_s, raw_j = self._at_advance(gpu, track)
            reading = track.add_counter(time_s, raw_j)
        self._due_s[gpu.uuid] = time_s + COUNTER_INTERVAL_S - EARLY_S
        if reading is not None:
            self._readings.append(reading)

    def _at_advance(self, gpu: Gpu, track: Track) -> tuple[float, float]:
        """Read until the counter advances: (when, to what), to within the time that one read takes."""
        deadline_s = self.clock() + ALIGNING_S
        first = latest = gpu.counter_j()
        time_s = self.clock()
        while latest == first and time_s < deadline_s and not track.is_stuck:
            before_s = time_s
            track.add_power(before_s, gpu.power_w())
            latest, time_s = gpu.counter_j(), self.clock()
            if latest != first:
                time_s = (before_s + time_s) / 2
        return time_s, latest
