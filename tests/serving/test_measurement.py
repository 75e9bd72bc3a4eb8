"""What is read of GPUs reaches /metrics, for eight of them within the limit of series, and when nothing runs too."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from energylens_vllm.meter import Reading, State
from energylens_vllm.meter.gpu import THROTTLE_REASONS
from energylens_vllm.serving.exporter import Exporter
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.measurement import Measurement
from energylens_vllm.serving.metrics import BY_NAME, MAX_SERIES_PER_ENGINE
from energylens_vllm.serving.observer import StepObserver
from energylens_vllm.serving.pairing import Pairing

STATE = State(700.0, 1.98e9, 3.2e9, 40.0, frozenset(THROTTLE_REASONS))


class FakeMeter:
    """Gives what a test puts in."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.faults: list[tuple[str, str, int]] = []
        self.is_up, self.now_s = True, 10.0

    def clock(self) -> float:
        return self.now_s

    def take(self) -> list[Reading]:
        readings, self.readings = self.readings, []
        return readings

    def take_faults(self) -> list[tuple[str, str, int]]:
        faults, self.faults = self.faults, []
        return faults


def reading(gpu: str, start_s: float, joules: float = 300.0, state: State = STATE) -> Reading:
    throttled_s = dict.fromkeys(state.throttled, 0.25)
    return Reading(gpu, start_s, start_s + 1.0, joules, "counter", state=state, throttled_s=throttled_s, module_j=500.0)


def test_eight_gpus_fit() -> None:
    registry, meter, increments = CollectorRegistry(), FakeMeter(), Increments()
    meter.readings = [reading(str(gpu), 8.0, 300.0 + gpu) for gpu in range(8)]
    meter.faults = [("", "error", 2), ("0", "lost", 1), ("1", "lost", 1)]
    Measurement(meter)((), None, increments)
    exporter = Exporter("m", [0], registry)
    exporter.set_build_info("1", "2")
    report = increments.take()
    report["set"].append(("energylens_profile_info", ("g", "s", "d", "q", "1", "1"), 1.0))
    exporter.export(0, [report])

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model_name": "m", "engine": "0"} | labels)

    assert value("energylens_gpu_energy_joules_total", gpu="7") == 307.0
    assert value("energylens_gpu_module_energy_joules_total", gpu="7") == 500.0
    assert value("energylens_gpu_power_watts", gpu="7") == 307.0
    assert value("energylens_gpu_power_limit_watts", gpu="0") == 700.0
    assert value("energylens_gpu_sm_clock_hertz", gpu="0") == 1.98e9
    assert value("energylens_gpu_temperature_celsius", gpu="0") == 40.0
    assert value("energylens_gpu_throttled_seconds_total", gpu="0", reason="power_cap") == 0.25
    assert value("energylens_gpu_reading_age_seconds", gpu="0") == 1.0
    assert value("energylens_gpu_reading_trusted", gpu="0") == 1.0
    assert value("energylens_nvml_up") == 1.0
    assert value("energylens_meter_faults_total", kind="lost") == 2.0
    assert value("energylens_plugin_failures_total", place="export") == 0.0
    samples = [s for family in registry.collect() for s in family.samples if not s.name.endswith("_created")]
    assert 250 < len(samples) <= MAX_SERIES_PER_ENGINE


def test_names_and_labels_are_those_of_the_table() -> None:
    increments, meter = Increments(), FakeMeter()
    meter.readings, meter.faults = [reading("0", 8.0)], [("0", "wrap", 1)]
    Measurement(meter)((), None, increments)
    report = increments.take()
    for name, labels, _ in (*report["add"], *report["set"]):
        assert len(labels) == len(BY_NAME[name].labels), name


def test_what_a_gpu_does_not_say_is_not_shown() -> None:
    increments, meter = Increments(), FakeMeter()
    meter.readings = [reading("0", 8.0, state=State())]
    Measurement(meter)((), None, increments)
    assert {name for name, _, _ in increments.take()["set"]} == {
        "energylens_gpu_power_watts",
        "energylens_gpu_reading_trusted",
        "energylens_gpu_reading_age_seconds",
        "energylens_nvml_up",
    }


def test_an_idle_engine_goes_on_reporting_and_a_lost_gpu_ages() -> None:
    meter = FakeMeter()
    observer = StepObserver(lambda work: work, None, clock=meter.clock)
    observer.listeners.append(Measurement(meter, Pairing(1, 300.0, lambda: observer.settled_s, window_s=2.0)))
    meter.readings = [reading("0", 8.0), reading("0", 9.0)]
    meter.now_s = 10.2
    observer.report()
    meter.is_up, meter.now_s = False, 40.0
    observer.report()
    first, second = observer.take_outbox()
    assert ("energylens_compared_energy_joules_total", ("predicted",), 600.0) in first["add"]
    assert {name: value for name, _, value in second["set"]} == {
        "energylens_nvml_up": 0.0,
        "energylens_gpu_reading_age_seconds": pytest.approx(30.0),
    }


def test_the_lowest_power_limit_in_force_is_told_when_it_changes() -> None:
    meter, told = FakeMeter(), list[float]()
    measurement = Measurement(meter, on_limit=told.append)
    for limits_w in ((700.0, 700.0), (700.0, 700.0), (700.0, 500.0), (None, None), (600.0, 700.0)):
        meter.readings = [
            reading(str(gpu), 8.0, state=State() if limit_w is None else State(limit_w=limit_w))
            for gpu, limit_w in enumerate(limits_w)
        ]
        measurement((), None, Increments())
    assert told == [700.0, 500.0, 600.0]
