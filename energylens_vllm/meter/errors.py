"""What can go wrong with a meter. `lasting` says whether trying again is useless."""

from __future__ import annotations

from energylens_vllm.errors import EnergyLensError


class MeterError(EnergyLensError):
    """Energy cannot be read."""

    lasting = False


class NotSupported(MeterError):
    """This GPU or driver has no such reading; others of it may still work."""


class GpuUnavailable(MeterError):
    """The GPU or its driver has gone (lost, reset, reloaded, not ready). It may come back."""


class NoMeter(MeterError):
    """There is nothing to read: no NVML library, no permission, or no GPU of that name."""

    lasting = True


class MigRefused(MeterError):
    """The GPU is partitioned, and its counter is that of all partitions together."""

    lasting = True
