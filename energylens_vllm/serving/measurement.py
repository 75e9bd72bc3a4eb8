"""What the meter reads, on its way to /metrics and to the pairing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from energylens_vllm.meter import Meter, Reading, State
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.observer import Step
from energylens_vllm.serving.pairing import Pairing
from energylens_vllm.serving.predictor import Predictions

#: gauge -> the field of `State`
_STATE = {
    "energylens_gpu_power_limit_watts": "limit_w",
    "energylens_gpu_sm_clock_hertz": "sm_clock_hz",
    "energylens_gpu_memory_clock_hertz": "memory_clock_hz",
    "energylens_gpu_temperature_celsius": "temperature_celsius",
}


class Measurement:
    """A listener of `StepObserver` that has something to tell even if there were no steps."""

    def __init__(
        self, meter: Meter, pairing: Pairing | None = None, on_limit: Callable[[float], None] = lambda limit_w: None
    ) -> None:
        """Without a pairing (nothing is predicted) it only exports. `on_limit` is told the lowest power limit in force
        of the GPUs, when it changes."""
        self.meter = meter
        self._pairing, self._on_limit = pairing, on_limit
        self._limits_w: dict[str, float] = {}
        self._last_end_s: dict[str, float] = {}
        self.watchers: list[Callable[[Sequence[Reading]], None]] = []  #: get each report's readings

    def __call__(self, steps: Sequence[Step], predictions: Predictions | None, increments: Increments) -> None:
        """Add what was read since the last report, then compare."""
        readings, limits_w = self.meter.take(), dict(self._limits_w)
        for reading in readings:
            self._add(reading, increments)
        if self._limits_w != limits_w:
            self._on_limit(min(self._limits_w.values()))
        for _, kind, count in self.meter.take_faults():
            increments.add("energylens_meter_faults_total", float(count), kind)
        increments.set("energylens_nvml_up", float(self.meter.is_up))
        now_s = self.meter.clock()
        for gpu, end_s in self._last_end_s.items():
            increments.set("energylens_gpu_reading_age_seconds", now_s - end_s, gpu)
        for watcher in self.watchers:
            watcher(readings)
        if self._pairing is not None:
            self._pairing.add(readings)
            self._pairing(steps, predictions, increments)

    def _add(self, reading: Reading, increments: Increments) -> None:
        gpu, state = reading.gpu, reading.state
        self._last_end_s[gpu] = reading.end_s
        if state.limit_w:
            self._limits_w[gpu] = state.limit_w
        increments.add("energylens_gpu_energy_joules_total", reading.energy_j, gpu)
        if reading.module_j:
            increments.add("energylens_gpu_module_energy_joules_total", reading.module_j, gpu)
        increments.set("energylens_gpu_power_watts", reading.power_w, gpu)
        increments.set("energylens_gpu_reading_trusted", float(reading.trusted), gpu)
        for name, value in _values(state):
            increments.set(name, value, gpu)
        for reason, seconds in reading.throttled_s.items():
            increments.add("energylens_gpu_throttled_seconds_total", seconds, gpu, reason)


def _values(state: State) -> list[tuple[str, float]]:
    """Gauges of what the GPU does say."""
    return [(name, value) for name, field in _STATE.items() if (value := getattr(state, field)) is not None]
