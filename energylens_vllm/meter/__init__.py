"""What GPUs really spend: read in the background, one `Reading` after the other, whatever happens to the driver.

`meter.nvml` has the backend for NVIDIA GPUs; it is not imported here because most processes do without NVML.
"""

from energylens_vllm.meter.errors import GpuUnavailable, MeterError, MigRefused, NoMeter, NotSupported
from energylens_vllm.meter.gpu import Backend, Gpu, State
from energylens_vllm.meter.meter import Meter
from energylens_vllm.meter.track import Reading

__all__ = [
    "Backend",
    "Gpu",
    "GpuUnavailable",
    "Meter",
    "MeterError",
    "MigRefused",
    "NoMeter",
    "NotSupported",
    "Reading",
    "State",
]
