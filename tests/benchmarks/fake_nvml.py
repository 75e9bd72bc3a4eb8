"""NVML of a GPU that draws 150 W: the energy counter advances each 0.1 s, and a reading of it takes 4 ms."""

import time

NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
POWER_W = 150.0
_start_s = time.perf_counter()


class NVMLError(Exception):
    pass


class _Memory:
    total = 80 << 30


def nvmlInit():
    pass


def nvmlSystemGetDriverVersion():
    return "0.0"


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetName(gpu):
    return b"Fake GPU"


def nvmlDeviceGetMemoryInfo(gpu):
    return _Memory


def nvmlDeviceGetEnforcedPowerLimit(gpu):
    return 700_000


def nvmlDeviceGetMaxClockInfo(gpu, kind):
    return 1980


def nvmlDeviceGetClockInfo(gpu, kind):
    return 1500


def nvmlDeviceGetTemperature(gpu, sensor):
    return 40


def nvmlDeviceGetPowerUsage(gpu):
    return POWER_W * 1e3


def nvmlDeviceGetTotalEnergyConsumption(gpu):
    time.sleep(0.004)
    return int((time.perf_counter() - _start_s) // 0.1 * 0.1 * POWER_W * 1e3)
