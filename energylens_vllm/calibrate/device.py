"""What NVML says of the GPU that is to be calibrated, and whether it can be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.meter import Gpu, GpuUnavailable, MeterError, State
from energylens_vllm.meter.nvml import Nvml

NO_TORCH = "calibrate: torch is not installed; install vLLM, or energylens-vllm[calibrate]"
#: A counter that does not advance for as long is stuck; it should each 100 ms.
STUCK_S = 1.0


class CalibrationError(EnergyLensError):
    """A GPU cannot be calibrated."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A GPU by its driver. Bandwidth is nominal: bus width times twice the memory clock, as in data sheets."""

    name: str
    uuid: str
    index: str  #: NVML's number of it
    driver: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    top_clock_hz: float
    limit_w: float
    processes: int  #: that use it for computing


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU: its facts, and its meter."""

    facts: Facts
    gpu: Gpu

    def at_advance(self, meanwhile: Callable[[], None] = lambda: None) -> tuple[float, float]:
        """When the energy counter next advances (perf_counter, s), and to what (J)."""
        deadline_s = time.perf_counter() + STUCK_S
        first = self.gpu.counter_j()
        while time.perf_counter() < deadline_s:
            meanwhile()
            before_s = time.perf_counter()
            latest = self.gpu.counter_j()
            if latest != first:
                return (before_s + time.perf_counter()) / 2, latest
        raise CalibrationError(f"calibrate: the energy counter of GPU {self.facts.index} does not advance")

    def state(self) -> State:
        return self.gpu.state()


def open_device(index: int) -> Device:
    """GPU number `index` of those that CUDA_VISIBLE_DEVICES shows.

    Raises MigRefused, NoMeter or CalibrationError, each with one line that says what to do.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # CUDA's numbers are NVML's then
    (gpu,) = Nvml(os.environ.get("CUDA_VISIBLE_DEVICES"), first=index, count=1).open()
    if gpu.counts != "gpu":
        what = "has no energy counter" if gpu.counts == "nothing" else "shares its energy counter with a CPU"
        raise CalibrationError(f"calibrate: GPU {index} {what}, so joules of its kernels cannot be measured")
    try:
        return Device(_facts(gpu), gpu)
    except pynvml.NVMLError as error:
        raise GpuUnavailable(f"NVML: {error}") from error


def _facts(gpu: Gpu) -> Facts:
    handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
    memory_hz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM) * 1e6
    limit_w = gpu.state().limit_w
    if limit_w is None:
        raise MeterError(f"calibrate: GPU {gpu.label} does not tell its power limit")
    others = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return Facts(
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        uuid=gpu.uuid,
        index=gpu.label,
        driver=_text(pynvml.nvmlSystemGetDriverVersion()),
        memory_bytes=float(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        bandwidth_bytes_per_s=pynvml.nvmlDeviceGetMemoryBusWidth(handle) / 8 * 2 * memory_hz,
        top_clock_hz=pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1e6,
        limit_w=limit_w,
        processes=sum(process.pid != os.getpid() for process in others),
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
