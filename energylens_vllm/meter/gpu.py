"""What the meter asks of a vendor's library. Each method raises a `MeterError` of the kind that says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

#: why a GPU runs below its top clock; what a vendor reports beyond these is left out
THROTTLE_REASONS = ("power_cap", "sw_thermal", "hw_thermal", "hw_slowdown", "power_brake")


@dataclass(frozen=True, slots=True)
class State:
    """What is worth knowing beside energy; None where a GPU does not say."""

    limit_w: float | None = None
    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    temperature_celsius: float | None = None
    throttled: frozenset[str] = frozenset()  #: of THROTTLE_REASONS, those in force now


class Gpu(Protocol):
    """One GPU."""

    label: str  #: its number on this host
    uuid: str
    #: what its energy counter counts: this GPU; the module that it shares with a CPU; or it has none
    counts: Literal["gpu", "module", "nothing"]

    def power_w(self) -> float:
        """Power of the GPU alone, averaged by the driver over up to a second. Cheap: ask often."""

    def counter_j(self) -> float:
        """The energy counter, in joules since the driver was loaded. Slow (4 ms), and advances each 100 ms."""

    def state(self) -> State:
        """Its clocks, limits and temperature."""


class Backend(Protocol):
    """A vendor's library, for the GPUs of one engine."""

    def open(self) -> Sequence[Gpu]:
        """Connect, or connect again after `close`. Raises MeterError."""

    def close(self) -> None:
        """Let go of the library. Never raises."""
