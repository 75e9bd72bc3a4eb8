"""NVML of a GPU that draws 150 W: the energy counter advances each 0.1 s, and a reading of it takes 4 ms."""

import time

NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
NVML_SUCCESS, NVML_ERROR_INVALID_ARGUMENT, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION = 0, 2, 3, 4
NVML_ERROR_NOT_FOUND, NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND = 6, 12, 13
NVML_DEVICE_MIG_ENABLE, NVML_FI_DEV_POWER_AVERAGE, NVML_POWER_SCOPE_GPU = 1, 185, 0
nvmlClocksEventReasonSwPowerCap, nvmlClocksEventReasonHwSlowdown = 0x4, 0x8
nvmlClocksEventReasonSwThermalSlowdown, nvmlClocksEventReasonHwThermalSlowdown = 0x20, 0x40
nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80
POWER_W = 150.0
_start_s = time.perf_counter()


class NVMLError(Exception):
    def __init__(self, value=NVML_ERROR_NOT_SUPPORTED):
        super().__init__(f"error {value}")
        self.value = value


class _Memory:
    total = 80 << 30


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return 8


def nvmlDeviceGetIndex(gpu):
    return gpu


def nvmlDeviceGetUUID(gpu):
    return f"GPU-{gpu}"


def nvmlDeviceGetMigMode(gpu):
    return [0, 0]


def nvmlDeviceGetC2cModeInfoV(gpu):
    raise NVMLError


def nvmlDeviceGetCurrentClocksEventReasons(gpu):
    return nvmlClocksEventReasonSwPowerCap


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
