"""Communication beside computation on two real GPUs, and what the model of it says (energylens_vllm/energy/overlap.py).

    python benchmarks/overlap_gpu.py RESULTS.json            # a minute and a half on two GPUs
    python benchmarks/overlap_gpu.py RESULTS.json --replay   # runs nothing: what was measured beside what is predicted
    python benchmarks/overlap_gpu.py RESULTS.json --tiny     # on CPUs, with gloo: a trial of the script

One process a GPU, as energylens_vllm/calibrate/collectives.py measures, and the same clocks. A layer is a GEMM of
Llama-3-70B under TP 2 (o: 4096 x 8192, down: 14336 x 8192, bfloat16) and the all-reduce of what it makes. Its rows are
cut into stages, and a stage's all-reduce runs on a stream of high priority beside the next stage's GEMM. Communicators
are limited to some CTAs, each of which keeps an SM. The GEMM leaves as many SMs free (`spared`), because cuBLAS fills
all that it knows of with CTAs that stay until it ends. Four layers in a row have weights of their own, so that none
come from L2 that would not in a model.

The result has for each point seconds of a layer, the joules of each GPU over a window of its counter, and the clock;
and of some points when each kernel began and ended. Points that are too short for the counter have seconds alone. Those
that the time does not suffice for are missing, the least important last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # a machine for an hour has nothing installed

from in_process import Meter
from overlap_recorded import report

from energylens_vllm.calibrate import collectives as clocks

GPUS, LAYERS, COLUMNS = 2, 4, 8192
#: What a window of the counter and one that is only timed last, after what clock and power take to settle.
COUNTED_S, TIMED_S, SETTLE_S = 0.85, 0.12, 0.22
#: From the start: when no further point begins, and when the ranks are ended.
BUDGET_S, LIMIT_S = 78.0, 100.0
#: Launches of kernels and events enqueued at a time; a stage takes four.
MOST_ENQUEUED = 160
#: What NCCL takes if it is not limited, and the GEMM leaves it: communication_power_w is of as many
#: (energy/overlap.py: DRIVING_SMS).
UNLIMITED_SMS = 24


@dataclass(frozen=True)
class Point:
    """What one layer does: "idle", "gemm" or "all_reduce" alone, or a "pair" of both in `stages`.

    `ctas`: NCCL's, 0 for as many as it takes. `spared`: SMs that the GEMM leaves free. `graph`: from a CUDA graph.
    """

    what: str
    k: int = 0
    rows: int = 0
    stages: int = 1
    ctas: int = 0
    spared: int = 0
    graph: bool = False
    window_s: float = COUNTED_S


def points() -> Iterator[Point]:
    """All of them, the most important first."""
    ks, rows = (14336, 4096), (8192, 2048, 512)
    yield Point("idle")
    for k, m in itertools.product(ks, rows):
        yield Point("gemm", k, m)
        yield Point("pair", k, m)
    for m, ctas in [(8192, 1), *itertools.product(rows, (4, 16, 0))]:
        yield Point("all_reduce", 0, m, ctas=ctas)
    for k in ks:
        yield Point("gemm", k, 8192, spared=16)
        yield from (_pair(k, 8192, 4, ctas) for ctas in (16, 4, 0))
        yield from (_pair(k, 8192, stages, 16) for stages in (2, 8))
        yield from (_pair(k, 2048, stages, ctas) for stages, ctas in ((4, 16), (2, 16), (4, 4)))
        yield _pair(k, 512, 2, 16)
        yield replace(_pair(k, 8192, 4, 16), spared=0)
    yield _pair(4096, 8192, 4, 1)
    for k, m in itertools.product(ks, (4096, 2048, 1024, 512, 256, 128)):
        yield from (Point("gemm", k, m, spared=spared, window_s=TIMED_S) for spared in (0, 16))
    for m, ctas in itertools.product((4096, 1024, 256, 128), (4, 16, 0)):
        yield Point("all_reduce", 0, m, ctas=ctas, window_s=TIMED_S)
    for k, (stages, ctas) in itertools.product(ks, ((1, 0), (2, 16))):
        yield replace(_pair(k, 512, stages, ctas), graph=True)


def _pair(k: int, rows: int, stages: int, ctas: int) -> Point:
    return Point("pair", k, rows, stages, ctas, spared=(ctas or UNLIMITED_SMS) if stages > 1 else 0)


def traced() -> Iterator[Point]:
    """Points whose kernels are told one by one."""
    for k in (14336, 4096):
        yield from (_pair(k, 8192, 4, ctas) for ctas in (16, 4, 0))
        yield replace(_pair(k, 8192, 4, 16), spared=0)
        yield _pair(k, 2048, 2, 16)


def tiny() -> Iterator[Point]:
    """One of each, for a trial."""
    yield from (Point("idle"), Point("gemm", 64, 32), Point("gemm", 64, 32, spared=4, window_s=TIMED_S))
    yield from (Point("all_reduce", 0, 32, ctas=4), Point("pair", 64, 32), _pair(64, 32, 2, 4))


# -- in each rank -----------------------------------------------------------------------------------------------------


def rank(number: int, on_gpu: bool, started_s: float, folder: str) -> None:
    """Measure all points; a line of JSON for each as soon as it is done."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", number) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cuda.preferred_blas_library("cublaslt")  # the one that can spare SMs
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", rank=number, world_size=GPUS,
        timeout=timedelta(seconds=LIMIT_S),
    )  # fmt: skip
    clock = clocks.CudaClock(torch) if on_gpu else clocks.HostClock()
    layers = Layers(torch, dist, device)
    with open(pathlib.Path(folder) / f"rank{number}.jsonl", "w") as file:
        for point in points() if on_gpu else tiny():
            if clocks.agree(torch, dist, device, time.perf_counter() - started_s) > BUDGET_S:
                break
            row = asdict(point) | _measured(point, layers, clock, lambda s: clocks.agree(torch, dist, device, s))
            print(json.dumps(row), file=file, flush=True)
            if number == 0:
                print(f"[{time.perf_counter() - started_s:5.1f} s] {_line(row)}", flush=True)
        for point in traced() if on_gpu else ():
            launch = layers.launch(point)
            launch()
            kernels = _kernels(torch, launch) if number == 0 else launch()
            torch.cuda.synchronize()
            print(json.dumps(asdict(point) | dict(kernels=kernels)), file=file, flush=True)
    dist.barrier()


def _measured(point: Point, layers: Layers, clock: Any, agree: Callable[[float], float]) -> dict[str, Any]:
    """Seconds of a layer, and when (perf_counter) they were measured."""
    if point.what == "idle":
        start_s = time.perf_counter()
        time.sleep(SETTLE_S + point.window_s)
        return dict(time_s=None, host_s=None, start_s=start_s + SETTLE_S, end_s=time.perf_counter())
    launch = layers.launch(point)
    enqueued = 1 if point.graph else 4 * LAYERS * point.stages

    def repeat(window_s: float, seconds: float) -> tuple[float, float]:
        seconds = agree(seconds)
        launches = max(1, min(MOST_ENQUEUED // enqueued, round(clocks.BURST_S / seconds)))
        bursts = max(clocks.AHEAD + 2, math.ceil(window_s / (seconds * launches)))
        return clocks.repeat(launch, launches, bursts, clock, None)[:2]

    settled_s, _ = repeat(SETTLE_S if point.window_s == COUNTED_S else TIMED_S / 2, clocks.launch_s(launch, clock))
    start_s = time.perf_counter()
    time_s, host_s = repeat(point.window_s, settled_s)
    return dict(time_s=time_s / LAYERS, host_s=host_s / LAYERS, start_s=start_s, end_s=time.perf_counter())


def _line(row: dict[str, Any]) -> str:
    named = " ".join(f"{key} {value}" for key, value in row.items() if key in Point.__dataclass_fields__)
    return named if row["time_s"] is None else f"{named}: {row['time_s'] * 1e6:.1f} us, host {row['host_s'] * 1e6:.1f}"


class Layers:
    """`LAYERS` GEMMs and their all-reduces, ready to be launched as any point says."""

    def __init__(self, torch: Any, dist: Any, device: Any) -> None:
        self._torch, self._dist, self._device = torch, dist, device
        self._on_gpu = device.type == "cuda"
        self._columns = COLUMNS if self._on_gpu else 64
        self._groups: dict[int, Any] = {}
        self._made: tuple[int, int, Any] = (0, 0, None)
        self._beside = torch.cuda.Stream(priority=-1) if self._on_gpu else None

    def launch(self, point: Point) -> Callable[[], object]:
        """One launch of all layers."""
        torch = self._torch
        if self._on_gpu:
            torch._C._set_sm_carveout_experimental(point.spared or None)
        x, weights, out = self._operands(point.k, point.rows)
        if point.what == "gemm":
            return lambda: [torch.mm(x, weight, out=out) for weight in weights]
        group = self._group(point.ctas)
        # A sum would grow to infinity, which toggles few wires.
        reduce = lambda part: self._dist.all_reduce(part, op=self._dist.ReduceOp.MAX, group=group)  # noqa: E731
        if point.what == "all_reduce":
            return lambda: [reduce(out) for _ in range(LAYERS)]
        parts = list(zip(x.chunk(point.stages), out.chunk(point.stages), strict=True))
        if not self._on_gpu:
            return lambda: [(torch.mm(a, w, out=b), reduce(b)) for w in weights for a, b in parts]
        beside, made = self._beside, [torch.cuda.Event() for _ in parts]

        def pairs() -> None:
            computing = torch.cuda.current_stream()
            for weight in weights:
                for (a, b), event in zip(parts, made, strict=True):
                    torch.mm(a, weight, out=b)
                    event.record(computing)
                    beside.wait_event(event)
                    with torch.cuda.stream(beside):
                        reduce(b)
                computing.wait_stream(beside)

        return self._graph(pairs) if point.graph else pairs

    def _graph(self, launch: Callable[[], None]) -> Callable[[], object]:
        torch = self._torch
        launch()  # makes the communicator, which cannot be made while capturing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # torch's watchdog of NCCL asks CUDA meanwhile
            launch()
        replay: Callable[[], object] = graph.replay
        return replay

    def _operands(self, k: int, rows: int) -> tuple[Any, list[Any], Any]:
        """Of the usual spread; those of the last point if they fit."""
        if self._made[:2] != (k, rows):
            self._made = (0, 0, None)  # not two at a time
            dtype = self._torch.bfloat16 if self._on_gpu else self._torch.float32
            random = lambda *shape: self._torch.empty(*shape, device=self._device, dtype=dtype).normal_()  # noqa: E731
            weights = [random(self._columns, k).mul_(k**-0.5).t() for _ in range(LAYERS if k else 0)]
            self._made = (k, rows, (random(rows, k), weights, random(rows, self._columns)))
        x, weights, out = self._made[2]
        return x, weights, out

    def _group(self, ctas: int) -> Any:
        """All ranks, joined by a communicator of as many CTAs."""
        if ctas not in self._groups:
            options = None
            if self._on_gpu:
                options = self._dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
                if ctas:
                    options.config.min_ctas = options.config.max_ctas = ctas
            self._groups[ctas] = self._dist.new_group(pg_options=options)
        return self._groups[ctas]


def _kernels(torch: Any, launch: Callable[[], object]) -> list[dict[str, Any]]:
    """The kernels of a launch in the order of their beginnings."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        launch()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = sorted((event for event in events if event.get("cat") == "kernel"), key=lambda event: event["ts"])
    return [
        dict(name=event["name"][:80], start_us=event["ts"] - kernels[0]["ts"], time_us=event["dur"],
             **{key: event["args"].get(key) for key in ("stream", "grid", "block")})
        for event in kernels
    ]  # fmt: skip


# -- in the process that starts them ----------------------------------------------------------------------------------


def measure(path: pathlib.Path, on_gpu: bool) -> None:
    """Run the ranks and write what they have measured, also where one of them fails."""
    import torch
    from torch import multiprocessing

    started_s = time.perf_counter()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast needs rights that containers often lack
    meters = [Meter(gpu) for gpu in range(GPUS)]
    for meter in meters:
        meter.start()
    error = None
    with tempfile.TemporaryDirectory(prefix="energylens-") as folder:
        ranks = multiprocessing.spawn(rank, args=(on_gpu, started_s, folder), nprocs=GPUS, join=False)
        try:
            while not ranks.join(timeout=1.0):
                if time.perf_counter() - started_s > LIMIT_S:
                    raise TimeoutError(f"the ranks did not end within {LIMIT_S:.0f} s")
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        finally:
            for process in ranks.processes:
                if process.is_alive():
                    process.kill()
        files = sorted(pathlib.Path(folder).glob("rank*.jsonl"))
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for meter in meters:
        meter.stop()
    together = list(zip(*lines, strict=False))
    rows = [
        first | dict(
            rank_s=[each["time_s"] for each in (first, *others)],
            gpus=[_window(meter, each) for meter, each in zip(meters, (first, *others), strict=True)],
        )
        for first, *others in together if "kernels" not in first
    ]  # fmt: skip
    result = dict(
        device=[meter.device() for meter in meters], torch=torch.__version__, cuda=torch.version.cuda,
        nccl=torch.cuda.nccl.version() if on_gpu else None, nvls=os.environ.get("NCCL_NVLS_ENABLE"),
        gpus=GPUS, layers=LAYERS, columns=COLUMNS if on_gpu else 64, wall_s=time.perf_counter() - started_s,
        error=error, points=rows, traces=[first for first, *_ in together if "kernels" in first],
    )  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(rows)} points and {len(result['traces'])} traces in {result['wall_s']:.0f} s: {path}")
    if error:
        sys.exit(error)


def _window(meter: Meter, row: dict[str, Any]) -> dict[str, float] | None:
    return meter.window(row["start_s"], row["end_s"]) if row["window_s"] >= COUNTED_S else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true", help="a trial on CPUs")
    parser.add_argument("--replay", action="store_true", help="compare RESULTS with the model")
    arguments = parser.parse_args()
    if arguments.replay:
        print(report(arguments.results))
        return
    measure(arguments.results, on_gpu=not arguments.tiny)


if __name__ == "__main__":
    main()
