"""A GPU that behaves exactly as a profile says, but for noise; time passes there only when it is spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from energylens_vllm.calibrate.measure import Load, Unsupported, Window
from energylens_vllm.calibrate.points import Point, expected, operating_clock
from energylens_vllm.calibrate.reference import slower_in_steps
from energylens_vllm.hardware import GpuProfile

TOP_CLOCK_HZ = 1980e6
#: Clock of a GPU without a CUDA context, over the top clock.
SLEEPING = 0.17


@dataclass
class SimulatedGpu:
    """A `measure.Machine`. `noise`: relative standard deviation of time and power."""

    truth: GpuProfile
    noise: float = 0.0
    library: str = "vllm"
    without: frozenset[str] = frozenset()  #: kinds of points that it does not support
    seed: int = 0
    now_s: float = 0.0
    loaded: list[str] = field(default_factory=list)
    interrupt_at: int | None = None  #: the point, by number, at which somebody presses Ctrl-C
    # What the command asks of a real one.
    sm_count: int = 132
    l2_bytes: float | None = None

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def clock(self) -> float:
        return self.now_s

    @contextmanager
    def load(self, point: Point) -> Iterator[Load]:
        if point.kind in self.without:
            raise Unsupported(f"no {point.kind} here")
        if len(self.loaded) == self.interrupt_at:
            raise KeyboardInterrupt
        self.loaded.append(point.name)
        yield _Load(self, point)


@dataclass
class _Load:
    gpu: SimulatedGpu
    point: Point

    @property
    def library(self) -> str:
        return self.gpu.library

    def window(self, seconds: float) -> Window:
        gpu, point = self.gpu, self.point
        gpu.now_s += seconds
        asleep = point.kind == "idle" and not point.shape["context"]
        clock = SLEEPING if asleep else operating_clock(point, gpu.truth)
        time_s = expected(point, gpu.truth, clock).time_s / slower_in_steps(point)
        power_w = expected(point, gpu.truth, clock, time_s or None).power_w

        def noisy(value: float) -> float:
            return value * (1 + gpu.noise * float(gpu.random.standard_normal()))

        capped = frozenset({"power_cap"}) if clock < 1 and not asleep else frozenset()
        return Window(noisy(time_s), noisy(power_w), clock * TOP_CLOCK_HZ, 45.0, capped)
