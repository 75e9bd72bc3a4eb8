"""NVIDIA GPUs through nvidia-ml-py. Thin: every decision is made elsewhere."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import pynvml

from energylens_vllm.meter.errors import GpuUnavailable, MeterError, MigRefused, NoMeter, NotSupported
from energylens_vllm.meter.gpu import State

P = ParamSpec("P")
T = TypeVar("T")

_ERRORS: dict[int, type[MeterError]] = {
    pynvml.NVML_ERROR_NOT_SUPPORTED: NotSupported,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: NotSupported,
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: NoMeter,
    pynvml.NVML_ERROR_NO_PERMISSION: NoMeter,
    pynvml.NVML_ERROR_NOT_FOUND: NoMeter,
    pynvml.NVML_ERROR_INVALID_ARGUMENT: NoMeter,
}
_THROTTLE_BITS = {
    "power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "sw_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hw_thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hw_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}


def _typed(call: Callable[P, T]) -> Callable[P, T]:
    """Turn NVML's errors into ours; those not in the table mean that something is amiss now (GpuUnavailable)."""

    @functools.wraps(call)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except pynvml.NVMLError as error:
            raise _ERRORS.get(error.value, GpuUnavailable)(f"NVML: {error}") from error

    return wrapper


class Nvml:
    """GPUs number `first` to `first + count` of those that `visible` (a CUDA_VISIBLE_DEVICES) shows; all if None.

    Nothing is called before `open`, so an instance may be made before a fork. Numbers are NVML's, which follow the PCI
    bus as CUDA's do under CUDA_DEVICE_ORDER=PCI_BUS_ID; they differ only in hosts with unlike GPUs.
    """

    def __init__(self, visible: str | None = None, first: int = 0, count: int | None = None) -> None:
        self._visible, self._first, self._count = visible, first, count
        self._is_open = False

    @_typed
    def open(self) -> Sequence[NvmlGpu]:
        """Connect. Raises MigRefused for a partitioned GPU, NoMeter for one that is not there."""
        return [NvmlGpu(name) for name in self._chosen()]

    @_typed
    def look(self) -> list[tuple[str, NvmlGpu | MeterError]]:
        """Connect, and give each GPU's product name with the GPU, or with why it cannot be measured. Raises MeterError
        only if there is nothing to look at."""
        return [_looked_at(name) for name in self._chosen()]

    @_typed
    def driver(self) -> str:
        """Its version, once connected."""
        return _text(pynvml.nvmlSystemGetDriverVersion())

    def close(self) -> None:
        """Give the library back; NVML counts its users, so vLLM's own use of it goes on."""
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _chosen(self) -> list[int | str]:
        """Connect; the names of the GPUs that this is about."""
        pynvml.nvmlInit()
        self._is_open = True
        names = self._names()
        last = len(names) if self._count is None else self._first + self._count
        if last > len(names) or last == self._first:
            shown = "all" if self._visible is None else f"CUDA_VISIBLE_DEVICES={self._visible!r}"
            wanted = f"GPUs {self._first} to {last - 1}" if last > self._first else "GPUs"
            raise NoMeter(f"{wanted} of {len(names)} ({shown}): there are not that many")
        return names[self._first : last]

    def _names(self) -> list[int | str]:
        """Indices or UUIDs, as CUDA reads the variable: up to the first that is none."""
        if self._visible is None:
            return list(range(pynvml.nvmlDeviceGetCount()))
        names: list[int | str] = []
        for text in map(str.strip, self._visible.split(",")):
            if text.startswith("MIG-"):
                raise _mig(f"CUDA_VISIBLE_DEVICES names {text}")
            if text.startswith("GPU-"):
                names.append(self._whole_uuid(text))
            elif text.isdecimal():
                names.append(int(text))
            else:
                break
        return names

    def _whole_uuid(self, start: str) -> str:
        """CUDA takes the beginning of a UUID where it is unambiguous; NVML wants the whole."""
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        matches = [uuid for uuid in map(_uuid, handles) if uuid.startswith(start)]
        if len(matches) != 1:
            raise NoMeter(f"CUDA_VISIBLE_DEVICES: {start!r} is the beginning of {len(matches)} GPUs' UUIDs, not of one")
        return matches[0]


class NvmlGpu:
    """One GPU, by its index or UUID."""

    @_typed
    def __init__(self, name: int | str) -> None:
        self._handle = _handle(name)
        self.uuid = _uuid(self._handle)
        self.label = str(pynvml.nvmlDeviceGetIndex(self._handle))
        if self._try(lambda: pynvml.nvmlDeviceGetMigMode(self._handle)[0]) == pynvml.NVML_DEVICE_MIG_ENABLE:
            raise _mig(f"GPU {self.label} is in MIG mode")
        # On a superchip (GH200, GB200: GPU and CPU joined by C2C) counter and plain power are those of the module.
        c2c = self._try(lambda: pynvml.nvmlDeviceGetC2cModeInfoV(self._handle))
        self._on_superchip = c2c is not None and bool(c2c.isC2cEnabled)
        counter = self._try(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        self.counts: Literal["gpu", "module", "nothing"] = (
            "nothing" if counter is None else "module" if self._on_superchip else "gpu"
        )

    @_typed
    def power_w(self) -> float:
        if not self._on_superchip:
            return float(pynvml.nvmlDeviceGetPowerUsage(self._handle)) * 1e-3
        fields = [(pynvml.NVML_FI_DEV_POWER_AVERAGE, pynvml.NVML_POWER_SCOPE_GPU)]
        value = pynvml.nvmlDeviceGetFieldValues(self._handle, fields)[0]
        if value.nvmlReturn != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(value.nvmlReturn)
        return float(value.value.uiVal) * 1e-3

    @_typed
    def counter_j(self) -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * 1e-3

    @_typed
    def state(self) -> State:
        handle, attempt = self._handle, self._try
        limit_mw = attempt(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        sm_mhz = attempt(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        memory_mhz = attempt(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM))
        celsius = attempt(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
        bits = attempt(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0
        return State(
            limit_w=None if limit_mw is None else limit_mw * 1e-3,
            sm_clock_hz=None if sm_mhz is None else sm_mhz * 1e6,
            memory_clock_hz=None if memory_mhz is None else memory_mhz * 1e6,
            temperature_celsius=None if celsius is None else float(celsius),
            throttled=frozenset(reason for reason, bit in _THROTTLE_BITS.items() if bits & bit),
        )

    def _try(self, read: Callable[[], Any]) -> Any:
        """What `read` returns, None where this GPU has no such reading."""
        try:
            return read()
        except pynvml.NVMLError as error:
            if _ERRORS.get(error.value) is NotSupported:
                return None
            raise


def _looked_at(name: int | str) -> tuple[str, NvmlGpu | MeterError]:
    product = ""
    try:
        product = _product(name)
        return product, NvmlGpu(name)
    except MeterError as error:
        return product, error


@_typed
def _product(name: int | str) -> str:
    return _text(pynvml.nvmlDeviceGetName(_handle(name)))


def _handle(name: int | str) -> Any:
    return (pynvml.nvmlDeviceGetHandleByIndex if isinstance(name, int) else pynvml.nvmlDeviceGetHandleByUUID)(name)


def _uuid(handle: Any) -> str:
    return _text(pynvml.nvmlDeviceGetUUID(handle))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _mig(what: str) -> MigRefused:
    return MigRefused(
        f"{what}: NVML counts the energy of the whole GPU, not of a MIG instance, so it would be wrong for each; "
        "predictions go on. To measure, use a GPU without MIG (nvidia-smi -i GPU -mig 0)"
    )
