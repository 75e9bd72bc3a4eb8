"""GPUs that do what a test wants, behind NVML's own function signatures, in a time that runs only when it is spent."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import create_autospec

import pynvml
import pytest

READ_S = 0.004  #: one read of the energy counter
ADVANCE_S = 0.1  #: between its advances


class Time:
    """A clock; `wait` is a thread's wait, and tells it to stop at `end_s`."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.end_s = float("inf")

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.now_s += seconds
        return self.now_s >= self.end_s


@dataclass
class FakeGpu:
    """Draws `draws(time)` watts. Faults are switched on by tests."""

    index: int
    uuid: str
    time: Time
    draws: Callable[[float], float] = lambda time_s: 300.0
    name: str = "NVIDIA H200"
    mig: bool = False
    superchip: bool = False
    throttle_bits: int = 0
    counter_scale: float = 1.0  #: 2.0: it lies
    counter_bits: int = 64
    counter_start_j: float = 16835.28
    stuck_j: float | None = None
    error: int | None = None  #: what every call on it raises
    unsupported: set[str] = field(default_factory=set)  #: functions that raise NotSupported
    counter_reads: int = 0
    _counted: tuple[float, float] | None = None

    def true_j(self, since_s: float, until_s: float) -> float:
        """What it really spent, to 1 ms."""
        steps = max(1, round((until_s - since_s) / 1e-3))
        width_s = (until_s - since_s) / steps
        return sum(self.draws(since_s + (i + 0.5) * width_s) for i in range(steps)) * width_s

    def counter_mj(self) -> int:
        """Advances each 0.1 s, at times of its own."""
        self.counter_reads += 1
        self.time.now_s += READ_S
        phase_s = 0.037 + 0.011 * self.index
        tick_s = (self.time.now_s - phase_s) // ADVANCE_S * ADVANCE_S + phase_s
        if self._counted is None:
            self._counted = (tick_s, self.counter_start_j)
        since_s, joules = self._counted
        if tick_s > since_s:
            joules += self.counter_scale * self.true_j(since_s, tick_s)
            self._counted = (tick_s, joules)
        shown = joules if self.stuck_j is None else self.stuck_j
        return round(shown * 1e3) % 2**self.counter_bits

    def reload_driver(self) -> None:
        self._counted, self.counter_start_j = None, 0.0


class FakeNvml(types.ModuleType):
    """The real module's constants and exceptions, and of its functions those below, held to its own signatures."""

    def __init__(self, gpus: list[FakeGpu]) -> None:
        super().__init__("pynvml")
        self.gpus, self.users, self.init_error = gpus, 0, None
        for name, value in vars(pynvml).items():
            if isinstance(value, types.FunctionType):
                if (fake := getattr(self, f"_{name}", None)) is not None:
                    setattr(self, name, create_autospec(value, side_effect=fake))
            elif not name.startswith("__"):
                setattr(self, name, value)

    def _nvmlInit(self) -> None:
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)
        self.users += 1

    def _nvmlShutdown(self) -> None:
        assert self.users > 0
        self.users -= 1

    def _nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if not 0 <= index < len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._alive(self.gpus[index])

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        for gpu in self.gpus:
            if gpu.uuid == uuid:
                return self._alive(gpu)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def _alive(self, gpu: FakeGpu, function: str = "") -> FakeGpu:
        assert self.users > 0, "NVML is used while it is closed"
        if gpu.error is not None:
            raise pynvml.NVMLError(gpu.error)
        if function in gpu.unsupported:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return gpu

    def _nvmlDeviceGetIndex(self, handle: FakeGpu) -> int:
        return self._alive(handle).index

    def _nvmlDeviceGetUUID(self, handle: FakeGpu) -> str:
        return self._alive(handle).uuid

    def _nvmlDeviceGetMigMode(self, handle: FakeGpu) -> list[int]:
        return [int(self._alive(handle, "mig").mig)] * 2

    def _nvmlDeviceGetC2cModeInfoV(self, handle: FakeGpu) -> Any:
        return types.SimpleNamespace(isC2cEnabled=int(self._alive(handle, "c2c").superchip))

    def _nvmlDeviceGetTotalEnergyConsumption(self, handle: FakeGpu) -> int:
        return self._alive(handle, "counter").counter_mj()

    def _nvmlDeviceGetPowerUsage(self, handle: FakeGpu) -> int:
        gpu = self._alive(handle)
        return round(1e3 * gpu.draws(gpu.time.now_s)) + (200_000 if gpu.superchip else 0)

    def _nvmlDeviceGetFieldValues(self, handle: FakeGpu, fields: list[tuple[int, int]]) -> list[Any]:
        gpu = self._alive(handle)
        assert fields == [(pynvml.NVML_FI_DEV_POWER_AVERAGE, pynvml.NVML_POWER_SCOPE_GPU)]
        milliwatts = types.SimpleNamespace(uiVal=round(1e3 * gpu.draws(gpu.time.now_s)))
        return [types.SimpleNamespace(nvmlReturn=pynvml.NVML_SUCCESS, value=milliwatts)]

    def _nvmlDeviceGetEnforcedPowerLimit(self, handle: FakeGpu) -> int:
        self._alive(handle, "limit")
        return 700_000

    def _nvmlDeviceGetClockInfo(self, handle: FakeGpu, kind: int) -> int:
        self._alive(handle, "clocks")
        return {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}[kind]

    def _nvmlDeviceGetTemperature(self, handle: FakeGpu, sensor: int) -> int:
        self._alive(handle, "temperature")
        return 38

    def _nvmlDeviceGetCurrentClocksEventReasons(self, handle: FakeGpu) -> int:
        return self._alive(handle, "reasons").throttle_bits


@pytest.fixture
def time() -> Time:
    """See Time."""
    return Time()


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, time: Time) -> FakeNvml:
    """NVML with two H200s."""
    fake = FakeNvml([FakeGpu(i, f"GPU-{i}aaa{i}-0000", time) for i in range(2)])
    monkeypatch.setattr("energylens_vllm.meter.nvml.pynvml", fake)
    return fake
