"""Time and joules of collectives among the GPUs of this machine, over message sizes.

One process a GPU, started here and joined through a file. Every rank repeats an operation as often as the others, and
reads its own GPU's energy counter meanwhile. Not in CUDA graphs: on two H100s graphs of NCCL 2.28's operations added
20 to 40 us to each, whatever its size, where launches that were enqueued took what NVIDIA's tables say. Launching takes
the host 25 to 40 us, though, so shorter operations are only known to take no longer. On CPUs the same code runs with
gloo: that is how it is tested, and no figure of it means anything.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from energylens_vllm.calibrate.device import NO_TORCH, CalibrationError, open_device

#: As docs/collectives.md defines the message of each.
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SIZES = tuple(2**power for power in (12, 15, 18, 21, 24, 26, 28))
#: What each operation is repeated for, of which the beginning is left to the counter and the clock to settle.
WINDOW_S, SETTLE_S = 1.3, 0.25
#: Seconds of work that are enqueued at a time, how many of those may wait, and how many launches: CUDA's queue holds a
#: thousand, beyond which launching waits.
BURST_S, AHEAD, MOST_LAUNCHES = 5e-3, 4, 200
#: Between readings of the counter, which take 4 ms.
READ_S = 2e-3
#: A row whose launching took this share of its time or more is bound by the host: the operation takes no longer.
HOST_BOUND = 0.8
#: From the start of the processes on; a peer that died makes the others wait for no longer.
LIMIT_S, PEER_S = 150.0, 60.0


class Counter(Protocol):
    """Joules of a rank's GPU since some time."""

    def counter_j(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Row:
    """An operation on a message of `bytes` among `gpus` GPUs: seconds and joules of one launch.

    `energy_j` is of all GPUs, static power included; `power_w` and `idle_power_w` of each (idle: with a CUDA context
    and nothing to do). None where there is no counter. `host_s`: seconds in which the host launches it.
    """

    op: str
    bytes: int
    gpus: int
    time_s: float
    energy_j: float | None
    power_w: list[float] | None
    idle_power_w: list[float] | None
    host_s: float

    @property
    def bound_by_host(self) -> bool:
        """Whether it may take less time than `time_s`, which is the host's."""
        return self.host_s >= HOST_BOUND * self.time_s


def nvml_counter(rank: int) -> Counter:
    """The energy counter of GPU number `rank`."""
    return open_device(rank).gpu


def measure_collectives(
    gpus: int,
    backend: str = "nccl",
    counter: Callable[[int], Counter] | None = nvml_counter,
    operations: Sequence[str] = OPERATIONS,
    sizes: Sequence[int] = SIZES,
    window_s: float = WINDOW_S,
) -> list[Row]:
    """Measure all operations at all sizes among GPUs 0 to `gpus` - 1. `counter` gives a rank's (picklable).

    Raises CalibrationError where a rank fails or does not come back.
    """
    if gpus < 2:
        raise CalibrationError(f"--gpus: {gpus}; accepted: 2 or more for collectives")
    try:
        from torch import multiprocessing
    except ImportError:
        raise CalibrationError(NO_TORCH) from None
    with tempfile.TemporaryDirectory(prefix="energylens-") as folder:
        arguments = (gpus, backend, counter, tuple(operations), tuple(sizes), window_s, folder)
        ranks = multiprocessing.spawn(_rank, args=arguments, nprocs=gpus, join=False)
        deadline_s = time.monotonic() + LIMIT_S
        try:
            while not ranks.join(timeout=1.0):
                if time.monotonic() > deadline_s:
                    raise CalibrationError(f"calibrate: collectives did not end within {LIMIT_S:.0f} s")
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            last = str(error).strip().splitlines()[-1]
            raise CalibrationError(f"calibrate: a rank of the collectives failed: {last}") from None
        finally:
            for process in ranks.processes:
                if process.is_alive():
                    process.kill()
        rows = json.loads((Path(folder) / "rows.json").read_text())
    return [Row(**row) for row in rows]


# -- in each rank -----------------------------------------------------------------------------------------------------


def _rank(
    rank: int, gpus: int, backend: str, counter: Callable[[int], Counter] | None, operations: Sequence[str],
    sizes: Sequence[int], window_s: float, folder: str,
) -> None:  # fmt: skip
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore", category=FutureWarning)  # names that newer releases of torch have other ones for
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast needs rights that containers often lack
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=gpus, timeout=timedelta(seconds=PEER_S),
        device_id=device if backend == "nccl" else None,
    )  # fmt: skip
    meter = None if counter is None else counter(rank)
    clock = CudaClock(torch) if backend == "nccl" else HostClock()
    agree(torch, dist, device, 0.0)  # makes the communicator
    idle_w = _idle(meter)
    rows: list[dict[str, Any]] = []
    for op in operations:
        for size in sizes:
            launch = _operation(torch, dist, op, size, gpus, device)
            dist.barrier()
            seconds = agree(torch, dist, device, launch_s(launch, clock))
            launches = max(1, min(MOST_LAUNCHES, round(BURST_S / seconds)))
            bursts = max(AHEAD + 2, math.ceil(window_s / (seconds * launches)))
            time_s, host_s, power_w = repeat(launch, launches, bursts, clock, meter)
            rows.append({"op": op, "bytes": size, "gpus": gpus, "time_s": time_s, "host_s": host_s, "power_w": power_w})
    everyone: list[Any] = [None] * gpus
    dist.all_gather_object(everyone, (idle_w, rows))
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps([asdict(row) for row in together(everyone)]))
    dist.barrier()
    with contextlib.suppress(Exception):  # everything is done; a rank that cannot say goodbye has still measured
        dist.destroy_process_group()


def together(everyone: Sequence[tuple[float | None, Sequence[dict[str, Any]]]]) -> list[Row]:
    """Rows of all ranks from each rank's: the slowest rank's time, and everybody's power over it."""
    rows = []
    idle_w = [idle for idle, _ in everyone if idle is not None]
    for ranks in zip(*(rows for _, rows in everyone), strict=True):
        time_s = max(row["time_s"] for row in ranks)
        power_w = [row["power_w"] for row in ranks if row["power_w"] is not None]
        whole = len(power_w) == len(ranks)
        rows.append(Row(
            op=ranks[0]["op"], bytes=ranks[0]["bytes"], gpus=ranks[0]["gpus"], time_s=time_s,
            energy_j=sum(power_w) * time_s if whole else None, power_w=power_w if whole else None,
            idle_power_w=idle_w if len(idle_w) == len(ranks) else None, host_s=max(row["host_s"] for row in ranks),
        ))  # fmt: skip
    return rows


def _operation(torch: Any, dist: Any, op: str, size: int, gpus: int, device: Any) -> Callable[[], object]:
    """One launch of `op` on a message of about `size` bytes of random numbers. An all-reduce takes the maximum: a sum
    would have grown to infinity, which toggles few wires, after a hundred launches on the same tensor."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    part = max(size // dtype.itemsize // gpus, 1)
    whole = torch.empty(part * gpus, device=device, dtype=dtype).normal_()
    piece = whole[:part].clone()
    if op == "all_reduce":
        return lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX)
    if op == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, piece)
    if op == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(piece, whole)
    into = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(into, whole)


def agree(torch: Any, dist: Any, device: Any, value: float) -> float:
    """The largest of the ranks' values."""
    largest = torch.tensor([value], dtype=torch.float32, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())


class HostClock:
    """Work that is done when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class CudaClock:
    """Work that is enqueued."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


def launch_s(launch: Callable[[], object], clock: Any, times: int = 3) -> float:
    """About how long a launch takes; the first is not counted."""
    launch()
    begin = clock.mark()
    for _ in range(times):
        launch()
    return max(float(clock.seconds(begin, clock.mark())) / times, 1e-6)


def repeat(
    launch: Callable[[], object], launches: int, bursts: int, clock: Any, meter: Counter | None
) -> tuple[float, float, float | None]:
    """Seconds of a launch, those of them in which the host launches it, and mean watts, over `bursts` of `launches`."""
    marks: list[Any] = []
    host_s = 0.0
    with Readings(meter) as readings:
        for burst in range(bursts):
            before_s = time.perf_counter()
            for _ in range(launches):
                launch()
            host_s += time.perf_counter() - before_s
            marks.append(clock.mark())
            if burst >= AHEAD:
                clock.wait(marks[burst - AHEAD])
        clock.wait(marks[-1])
    time_s = clock.seconds(marks[0], marks[-1]) / (len(marks) - 1) / launches
    return time_s, host_s / bursts / launches, readings.power_w()


def _idle(meter: Counter | None) -> float | None:
    with Readings(meter) as readings:
        time.sleep(0.0 if meter is None else WINDOW_S)
    return readings.power_w()


class Readings:
    """Of an energy counter that advances now and then: power is what it gains between two advances. As a context it
    reads in a thread of its own, because a read takes 4 ms in which the host could not launch anything."""

    def __init__(self, meter: Counter | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._meter, self._clock, self._started_s = meter, clock, clock()
        self._last: tuple[float, float] | None = None
        self._advances: list[tuple[float, float]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Readings:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while self._meter is not None and not self._stopped.wait(READ_S):
            self.look()

    def look(self) -> None:
        """Read it once."""
        if self._meter is None:
            return
        before_s = self._clock()
        joules = self._meter.counter_j()
        now_s = (before_s + self._clock()) / 2
        if self._last is not None and joules != self._last[1]:
            self._advances.append(((self._last[0] + now_s) / 2, joules))
        self._last = now_s, joules

    def power_w(self) -> float | None:
        """Mean watts from the first advance after settling to the last; None if there are not two."""
        settled = [(at_s, joules) for at_s, joules in self._advances if at_s - self._started_s >= SETTLE_S]
        if len(settled) < 2:
            return None
        (begin_s, begin_j), (end_s, end_j) = settled[0], settled[-1]
        return (end_j - begin_j) / (end_s - begin_s)
