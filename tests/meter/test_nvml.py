"""Which GPUs are meant, what they say, and what NVML's errors become."""

from __future__ import annotations

import pynvml
import pytest

from energylens_vllm.meter import GpuUnavailable, MeterError, MigRefused, NoMeter, NotSupported
from energylens_vllm.meter.nvml import Nvml


@pytest.mark.parametrize(
    ("visible", "first", "count", "labels"),
    [
        (None, 0, None, ["0", "1"]),
        (None, 1, 1, ["1"]),
        ("1,0", 0, None, ["1", "0"]),
        ("1,0", 1, 1, ["0"]),
        ("GPU-1aaa1-0000", 0, 1, ["1"]),
        ("GPU-1", 0, 1, ["1"]),
        (" 1 , GPU-0aaa0-0000", 0, 2, ["1", "0"]),
        ("1,-1,0", 0, None, ["1"]),
    ],
)
def test_the_gpus_of_an_engine(nvml: object, visible: str | None, first: int, count: int, labels: list[str]) -> None:
    backend = Nvml(visible, first, count)
    assert [gpu.label for gpu in backend.open()] == labels
    backend.close()


@pytest.mark.parametrize(
    ("visible", "first", "count", "message"),
    [
        ("2", 0, None, "Invalid Argument"),
        ("1", 0, 2, "GPUs 0 to 1 of 1"),
        ("", 0, None, "there are not that many"),
        ("GPU-", 0, None, "the beginning of 2 GPUs"),
        ("GPU-7", 0, None, "the beginning of 0 GPUs"),
    ],
)
def test_gpus_that_are_not_there(nvml: object, visible: str, first: int, count: int, message: str) -> None:
    backend = Nvml(visible, first, count)
    with pytest.raises(NoMeter, match=message):
        backend.open()
    backend.close()


def test_mig_is_refused_with_what_to_do(nvml: object) -> None:
    nvml.gpus[1].mig = True
    for visible in (None, "1", "MIG-0a0a0a0a-0000"):
        backend = Nvml(visible)
        with pytest.raises(MigRefused, match=r"whole GPU, not of a MIG instance.*predictions go on.*-mig 0"):
            backend.open()
        backend.close()
    assert Nvml("0").open()[0].label == "0"  # the other is not concerned


@pytest.mark.parametrize(
    ("code", "becomes"),
    [
        (pynvml.NVML_ERROR_NOT_SUPPORTED, NotSupported),
        (pynvml.NVML_ERROR_NO_PERMISSION, NoMeter),
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, NoMeter),
        (pynvml.NVML_ERROR_GPU_IS_LOST, GpuUnavailable),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, GpuUnavailable),
        (pynvml.NVML_ERROR_UNINITIALIZED, GpuUnavailable),
        (pynvml.NVML_ERROR_UNKNOWN, GpuUnavailable),
        (424242, GpuUnavailable),
    ],
)
def test_errors_are_typed(nvml: object, code: int, becomes: type[MeterError]) -> None:
    (gpu,) = Nvml("0").open()
    nvml.gpus[0].error = code
    for read in (gpu.power_w, gpu.counter_j):
        with pytest.raises(becomes, match="NVML: "):
            read()


def test_a_gpu_says(nvml: object) -> None:
    nvml.gpus[0].throttle_bits = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    gpu, _ = Nvml().open()
    assert (gpu.counts, gpu.uuid, gpu.power_w()) == ("gpu", "GPU-0aaa0-0000", 300.0)
    assert gpu.counter_j() == pytest.approx(16835.28, abs=60)
    state = gpu.state()
    assert (state.limit_w, state.sm_clock_hz, state.memory_clock_hz) == (700.0, 1.98e9, 3.201e9)
    assert (state.temperature_celsius, state.throttled) == (38.0, {"power_cap"})


def test_what_a_gpu_does_not_support_is_none(nvml: object) -> None:
    nvml.gpus[0].unsupported = {"mig", "c2c", "counter", "limit", "clocks", "temperature", "reasons"}
    gpu, _ = Nvml().open()
    state = gpu.state()
    assert gpu.counts == "nothing"
    assert (state.limit_w, state.sm_clock_hz, state.temperature_celsius, state.throttled) == (None, None, None, set())


def test_on_a_superchip_power_is_of_the_gpu_alone(nvml: object) -> None:
    nvml.gpus[0].superchip = True
    gpu, _ = Nvml().open()
    assert (gpu.counts, gpu.power_w()) == ("module", 300.0)


def test_users_of_the_library_are_counted(nvml: object) -> None:
    backend = Nvml()
    backend.close()
    for _ in range(2):
        backend.open()
        assert nvml.users == 1
        backend.close()
        backend.close()
        assert nvml.users == 0
