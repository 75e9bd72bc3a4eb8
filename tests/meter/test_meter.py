"""The thread: aligned reads, failures of every kind, and processes that fork or spawn."""

from __future__ import annotations

import multiprocessing
import os
import time as real_time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pynvml
import pytest

from energylens_vllm.meter import Meter, Reading, State
from energylens_vllm.meter.nvml import Nvml


def run(meter: Meter, time: object, seconds: float, events: dict[float, Callable[[], None]] | None = None) -> None:
    """Let it read for so long; `events` happen at their second."""
    start_s, pending = time.now_s, sorted((events or {}).items())
    time.end_s = start_s + seconds

    def wait(pause_s: float) -> bool:
        until_s = time.now_s + pause_s
        while pending and until_s - start_s >= pending[0][0]:
            at_s, happens = pending.pop(0)
            time.now_s = max(time.now_s, start_s + at_s)
            happens()
        return type(time).wait(time, max(until_s - time.now_s, 0.0))

    meter._wait = wait
    meter.run()


@pytest.fixture
def meter(nvml: object, time: object) -> Meter:
    return Meter(Nvml(), clock=time, wait=time.wait)


def by_gpu(readings: list[Reading], gpu: str) -> list[Reading]:
    return [reading for reading in readings if reading.gpu == gpu]


def test_readings_are_of_whole_advances(meter: Meter, nvml: object, time: object) -> None:
    """Under a load that changes all the time, each reading is what was spent between its two times."""
    for gpu in nvml.gpus:
        gpu.draws = lambda s: 150.0 + 400.0 * ((s * 0.7) % 1 > 0.5)
    run(meter, time, 30.0)
    readings = meter.take()
    for gpu in nvml.gpus:
        own = by_gpu(readings, str(gpu.index))
        assert len(own) == 29
        assert [r.start_s for r in own[1:]] == [r.end_s for r in own[:-1]]
        assert all(0.9 <= r.duration_s <= 1.2 for r in own)
        for reading in own:
            # 4 ms of a read at either end
            assert reading.energy_j == pytest.approx(gpu.true_j(reading.start_s, reading.end_s), abs=550 * 0.004)
        assert all(r.trusted for r in own)
        assert own[0].state == State(700.0, 1.98e9, 3.201e9, 38.0)
    assert not meter.take_faults()
    assert not meter.take()


def test_the_counter_is_read_seldom(meter: Meter, nvml: object, time: object) -> None:
    run(meter, time, 100.0)
    assert nvml.gpus[0].counter_reads < 100 * 6 + 40


def test_a_stuck_counter_costs_no_time(meter: Meter, nvml: object, time: object) -> None:
    nvml.gpus[0].stuck_j = 5.0
    run(meter, time, 100.0)
    assert nvml.gpus[0].counter_reads < 300
    readings = by_gpu(meter.take(), "0")
    assert sum(r.energy_j for r in readings) == pytest.approx(300.0 * sum(r.duration_s for r in readings))
    assert ("0", "stuck", 1) in meter.take_faults()


def test_a_lying_counter_is_flagged(meter: Meter, nvml: object, time: object) -> None:
    nvml.gpus[1].counter_scale = 2.0
    run(meter, time, 30.0)
    readings = meter.take()
    assert all(r.trusted for r in by_gpu(readings, "0"))
    assert not any(r.trusted for r in by_gpu(readings, "1")[11:])
    assert meter.take_faults() == [("1", "disagreement", 1)]


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNKNOWN])
def test_a_lost_gpu_comes_back(
    meter: Meter, nvml: object, time: object, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    up: list[bool] = []

    def lose() -> None:
        up.append(meter.is_up)
        nvml.gpus[0].error = error

    def find() -> None:
        up.append(meter.is_up)
        nvml.gpus[0].error = None

    run(meter, time, 60.0, {10.0: lose, 30.0: find, 55.0: lambda: up.append(meter.is_up)})
    assert up == [True, False, True]
    own = by_gpu(meter.take(), "0")
    assert sum(r.energy_j for r in own) == pytest.approx(300.0 * sum(r.duration_s for r in own), rel=1e-3)
    assert own[-1].end_s - own[0].start_s > 57.0  # the counter went on while it was not seen
    assert [r.trusted for r in own].count(False) == 1
    faults = {(gpu, kind): count for gpu, kind, count in meter.take_faults()}
    assert faults["0", "lost"] == faults["1", "lost"] == 1
    assert 3 <= faults["", "error"] <= 5  # after 1, 2, 4, 8, 16 s
    assert len([r for r in caplog.records if "will try again" in r.getMessage()]) == 1


def test_a_reloaded_driver_starts_the_counter_anew(meter: Meter, nvml: object, time: object) -> None:
    def unload() -> None:
        nvml.init_error = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
        for gpu in nvml.gpus:
            gpu.error = pynvml.NVML_ERROR_UNINITIALIZED

    def load() -> None:
        nvml.init_error = None
        for gpu in nvml.gpus:
            gpu.error = None
            gpu.reload_driver()

    run(meter, time, 40.0, {10.0: unload, 15.0: load})
    own = by_gpu(meter.take(), "0")
    assert sum(r.energy_j for r in own) == pytest.approx(300.0 * sum(r.duration_s for r in own), rel=1e-3)
    assert [later.start_s - earlier.end_s > 0 for earlier, later in pairwise(own)].count(True) == 1
    assert ("0", "reset", 1) in meter.take_faults()


@pytest.mark.parametrize(
    ("cause", "says"), [("library", "Library Not Found"), ("mig", "MIG"), ("none", "not that many")]
)
def test_what_will_not_change_is_not_tried_again(
    nvml: object, time: object, cause: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    nvml.init_error = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND if cause == "library" else None
    nvml.gpus[0].mig = cause == "mig"
    meter = Meter(Nvml("" if cause == "none" else None), clock=time, wait=time.wait)
    run(meter, time, 1000.0)
    assert time.now_s == 1000.0  # it has not waited once
    assert not meter.is_up
    assert says in str(meter.problem)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert nvml.users == 0


def test_what_nobody_foresaw_does_not_end_it(time: object) -> None:
    class Broken:
        opened = 0

        def open(self) -> list[object]:
            self.opened += 1
            raise ZeroDivisionError("on purpose")

        def close(self) -> None:
            pass

    backend = Broken()
    meter = Meter(backend, clock=time, wait=time.wait)
    run(meter, time, 300.0)
    assert 6 <= backend.opened <= 10  # 1, 2, 4, ... 60, 60 s
    assert "on purpose" in str(meter.problem)


class Steady:
    """A GPU that needs no NVML, in real time, for processes that a fake module does not reach."""

    label, uuid, counts = "0", "GPU-0", "gpu"

    def __init__(self) -> None:
        self.opened_in: list[int] = []

    def open(self) -> list[Steady]:
        self.opened_in.append(os.getpid())
        return [self]

    def close(self) -> None:
        pass

    def power_w(self) -> float:
        return 100.0

    def counter_j(self) -> float:
        return real_time.perf_counter() // 0.1 * 10.0

    def state(self) -> State:
        return State()


def measure(meter: Meter) -> list[Reading]:
    meter.start()
    readings: list[Reading] = []
    until_s = real_time.monotonic() + 20.0
    while len(readings) < 2 and real_time.monotonic() < until_s:
        real_time.sleep(0.05)
        readings += meter.take()
    meter.stop()
    return readings


def in_child(backend: Steady, meter: Meter | None, answer: object) -> None:
    meter = meter or Meter(backend)
    running_before = meter.is_running
    readings = measure(meter)
    answer.put((running_before, len(readings), readings[-1].power_w, backend.opened_in[-1] == os.getpid()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_measures_for_itself(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its parent measures already, and it has got the parent's meter by forking."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where a spawned child finds this module
    context = multiprocessing.get_context(method)
    backend, answer = Steady(), context.Queue()
    parents = Meter(backend)
    parents.start()
    try:
        child = context.Process(target=in_child, args=(backend, parents if method == "fork" else None, answer))
        child.start()
        running_before, count, power_w, opened_here = answer.get(timeout=60)
        child.join(timeout=60)
        assert (running_before, child.exitcode) == (False, 0)
        assert count >= 2
        assert power_w == pytest.approx(100.0, rel=0.05)
        assert opened_here
        assert parents.is_running
    finally:
        parents.stop()
    assert not parents.is_running
