"""Points on a CUDA GPU: CUDA graphs of one kernel, replayed without a pause while the energy counter runs."""

from __future__ import annotations

import gc
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from energylens_vllm.calibrate.device import NO_TORCH, CalibrationError, Device
from energylens_vllm.calibrate.measure import Load, Unsupported, Window
from energylens_vllm.calibrate.points import Point
from energylens_vllm.meter import State

#: Seconds of work in a graph, in what is enqueued at a time, and how many of those wait: enough for a reading of the
#: counter (4 ms) to pass without the GPU running dry.
GRAPH_S, BURST_S, AHEAD = 5e-3, 20e-3, 4
MOST_LAUNCHES = 2000
#: How often the clock is read, and how long the thread sleeps between looks at the queue.
STATE_S, LOOK_S = 0.05, 2e-3


class Cuda:
    """The GPU number `index` of those visible. Nothing of CUDA is touched before the first point that needs it."""

    def __init__(self, device: Device, index: int) -> None:
        # vLLM is imported for its kernels alone: no plugin of it has a place here, and its log would hide ours.
        os.environ.update(VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import torch
        except ImportError:
            raise CalibrationError(NO_TORCH) from None
        self._torch, self._device, self._index = torch, device, index

    @property
    def sm_count(self) -> int:
        return int(self._torch.cuda.get_device_properties(self._index).multi_processor_count)

    @property
    def l2_bytes(self) -> float | None:
        size = getattr(self._torch.cuda.get_device_properties(self._index), "L2_cache_size", None)
        return float(size) if size else None

    @contextmanager
    def load(self, point: Point) -> Iterator[Load]:
        if point.kind == "idle" and not point.shape["context"]:
            if self._torch.cuda.is_initialized():
                raise Unsupported("this process has a CUDA context already; it has to be the first point")
            yield _Idle(self._device)
            return
        self._open()
        if point.kind == "idle":
            yield _Idle(self._device)
            return
        from energylens_vllm.calibrate.kernels import make

        launcher = make(point, self._torch.device("cuda", self._index))
        load: _Busy | _Launching
        try:
            if point.kind == "host":
                load = _Launching(self._torch, self._device, launcher.launch)
            else:
                load = _Busy(self._torch, self._device, launcher.launch, launcher.copies, launcher.library)
        except self._torch.OutOfMemoryError:
            raise Unsupported("not enough free GPU memory") from None
        except RuntimeError as error:
            raise Unsupported(f"no CUDA graph of it: {str(error).splitlines()[0][:160]}") from None
        try:
            yield load
        finally:
            load.close()
            del load, launcher
            gc.collect()
            self._torch.cuda.empty_cache()

    def _open(self) -> None:
        """Make a CUDA context on the GPU that the meter reads."""
        torch = self._torch
        if not torch.cuda.is_available():
            raise CalibrationError("calibrate: this torch finds no CUDA GPU; it may be a build for CPUs")
        torch.cuda.set_device(self._index)
        torch.empty(1, device=torch.device("cuda", self._index))
        torch.cuda.synchronize()
        uuid = str(getattr(torch.cuda.get_device_properties(self._index), "uuid", ""))
        if uuid and uuid.removeprefix("GPU-") != self._device.facts.uuid.removeprefix("GPU-"):
            raise CalibrationError(
                f"calibrate: CUDA's GPU {self._index} is GPU-{uuid.removeprefix('GPU-')}, NVML's is "
                f"{self._device.facts.uuid}; set CUDA_DEVICE_ORDER=PCI_BUS_ID"
            )


class _Readings:
    """What NVML said during a window."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._states: list[State] = []
        self._due_s = 0.0

    def look(self) -> None:
        if time.perf_counter() >= self._due_s:
            self._due_s = time.perf_counter() + STATE_S
            self._states.append(self._device.state())

    def window(self, time_s: float, begin: tuple[float, float], end: tuple[float, float]) -> Window:
        clocks = [state.sm_clock_hz for state in self._states if state.sm_clock_hz is not None]
        degrees = [state.temperature_celsius for state in self._states if state.temperature_celsius is not None]
        return Window(
            time_s=time_s,
            power_w=(end[1] - begin[1]) / (end[0] - begin[0]),
            clock_hz=_mean(clocks),
            temperature_celsius=_mean(degrees),
            throttled=frozenset().union(*(state.throttled for state in self._states)),
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class _Idle:
    library = "none"

    def __init__(self, device: Device) -> None:
        self._device = device

    def window(self, seconds: float) -> Window:
        readings, begin = _Readings(self._device), self._device.at_advance()
        while time.perf_counter() - begin[0] < seconds:
            readings.look()
            time.sleep(STATE_S)
        return readings.window(0.0, begin, self._device.at_advance())


class _Busy:
    """A kernel in a CUDA graph, replayed; the queue is kept filled by whoever waits."""

    def __init__(self, torch: Any, device: Device, launch: Callable[[int], object], copies: int, library: str) -> None:
        self._torch, self._device, self.library = torch, device, library
        launch_s = _launch_s(torch, launch, copies)
        rounds = max(1, round(GRAPH_S / launch_s / copies))
        launches = min(rounds * copies, max(MOST_LAUNCHES // copies, 1) * copies)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(launches):
                launch(i % copies)
        self._replays = max(1, round(BURST_S / (launches * launch_s)))
        self._launches = launches * self._replays
        self._waiting: deque[Any] = deque()
        self._done: deque[Any] = deque()

    def window(self, seconds: float) -> Window:
        readings, begin = _Readings(self._device), self._device.at_advance(self._feed)
        while len(self._done) > 1:
            self._done.popleft()
        while time.perf_counter() - begin[0] < seconds or len(self._done) < 3:
            self._feed()
            readings.look()
            time.sleep(LOOK_S)
        end = self._device.at_advance(self._feed)
        elapsed_s = self._done[0].elapsed_time(self._done[-1]) * 1e-3
        return readings.window(elapsed_s / (len(self._done) - 1) / self._launches, begin, end)

    def close(self) -> None:
        self._torch.cuda.synchronize()
        self._graph.reset()

    def _feed(self) -> None:
        while self._waiting and self._waiting[0].query():
            self._done.append(self._waiting.popleft())
        while len(self._waiting) < AHEAD:
            for _ in range(self._replays):
                self._graph.replay()
            event = self._torch.cuda.Event(enable_timing=True)
            event.record()
            self._waiting.append(event)


def _launch_s(torch: Any, launch: Callable[[int], object], copies: int) -> float:
    """About how long a launch takes, after warming up on a stream of its own, as capturing a graph demands."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(max(3, min(copies, 8))):
            launch(i % copies)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(5):
            launch(i % copies)
        end.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return max(float(begin.elapsed_time(end)) * 1e-3 / 5, 1e-6)


class _Launching:
    """A kernel that the host launches one by one: what takes the time is the host."""

    library = "torch"

    def __init__(self, torch: Any, device: Device, launch: Callable[[int], object]) -> None:
        self._torch, self._device, self._launch = torch, device, launch
        self._launched = 0

    def window(self, seconds: float) -> Window:
        readings, begin = _Readings(self._device), self._device.at_advance(self._feed)
        self._torch.cuda.synchronize()
        busy_s, launched = 0.0, self._launched
        while time.perf_counter() - begin[0] < seconds:
            before_s = time.perf_counter()
            self._feed()
            busy_s += time.perf_counter() - before_s
            readings.look()
        time_s = busy_s / (self._launched - launched)
        return readings.window(time_s, begin, self._device.at_advance(self._feed))

    def close(self) -> None:
        self._torch.cuda.synchronize()

    def _feed(self) -> None:
        for _ in range(200):
            self._launch(0)
        self._launched += 200
