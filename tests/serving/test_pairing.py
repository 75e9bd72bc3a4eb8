"""Windows hold the same steps on both sides; on recorded steps they come to what `energylens replay` says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from energylens_vllm.calibrate import recording as recordings
from energylens_vllm.calibrate.live import live, read, readings_of
from energylens_vllm.calibrate.recording import Recording, load
from energylens_vllm.calibrate.replay import replay
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.meter import Reading
from energylens_vllm.serving import pairing as pairing_module
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.metrics import COMPONENTS
from energylens_vllm.serving.observer import Step
from energylens_vllm.serving.pairing import Pairing, Window
from energylens_vllm.serving.predictor import Predictions

DATA = Path(__file__).parents[1] / "data"
IDLE_W = 100.0


def batch(new: Sequence[int] = (1,), computed: Sequence[int] = (64,)) -> Batch:
    decodes = [n == 1 and c > 0 for n, c in zip(new, computed, strict=True)]
    num_decode_tokens = sum(n for n, decode in zip(new, decodes, strict=True) if decode)
    return Batch([str(i) for i in range(len(new))], new, computed, decodes, sum(new), num_decode_tokens)


def predictions(joules: Sequence[float]) -> Predictions:
    energy_j = np.array(joules)
    return Predictions(
        time_s=np.ones(len(energy_j)),
        energy_j=energy_j,
        components=dict.fromkeys(COMPONENTS, energy_j / len(COMPONENTS)),
        phases={"prefill": energy_j / 2, "decode": energy_j / 2},
        low_j=energy_j * 0.9,
        high_j=energy_j * 1.2,
    )


class Bench:
    """A pairing whose steps and readings are given by hand."""

    def __init__(self, num_gpus: int = 1, window_s: float = 1.0) -> None:
        self.settled_s, self.increments = 0.0, Increments()
        self.pairing = Pairing(num_gpus, IDLE_W, lambda: self.settled_s, window_s)
        self.windows: list[Window] = []
        self.pairing.listeners.append(self.windows.append)

    def steps(self, *steps: tuple[float, float, float | None], settled_s: float | None = None) -> None:
        """(start, end, joules); no joules for a step without a prediction."""
        self.settled_s = settled_s if settled_s is not None else max(end for _, end, _ in steps)
        known = [joules for _, _, joules in steps if joules is not None]
        predicted = predictions(known) if len(known) == len(steps) else None
        self.pairing([Step(batch(), start, end) for start, end, _ in steps], predicted, self.increments)

    def reading(self, start_s: float, end_s: float, joules: float, gpu: str = "0", trusted: bool = True) -> None:
        self.pairing.add([Reading(gpu, start_s, end_s, joules, "counter", trusted)])

    def added(self) -> dict[str, float]:
        sums: defaultdict[str, float] = defaultdict(float)
        for name, labels, value in self.increments.take().get("add", []):
            sums[" ".join((name.removeprefix("energylens_"), *labels))] += value
        return dict(sums)


def test_steps_across_the_ends_count_by_their_time_inside() -> None:
    bench = Bench()
    bench.reading(1.0, 2.0, 500.0)
    bench.steps((0.5, 1.5, 300.0), (1.5, 1.75, 100.0), (1.75, 2.75, 400.0))
    (window,) = bench.windows
    assert window.predicted_j == pytest.approx(150 + 100 + 100)
    assert (window.low_j, window.high_j) == pytest.approx((315.0, 420.0))
    assert (window.measured_j, window.busy_share) == (500.0, 1.0)
    assert window.error == pytest.approx(-0.3)


def test_idle_time_is_predicted_as_idle() -> None:
    bench = Bench(window_s=4.0)
    bench.reading(0.0, 4.0, 600.0)
    bench.steps((0.5, 1.0, 200.0), (2.0, 3.0, 300.0), settled_s=4.0)
    (window,) = bench.windows
    assert window.predicted_j == pytest.approx(500.0 + 2.5 * IDLE_W)
    assert window.low_j == pytest.approx(450.0 + 2.5 * IDLE_W)
    assert window.busy_share == 1.5 / 4


def test_an_idle_engine_is_compared_too() -> None:
    bench = Bench()
    bench.reading(0.0, 1.0, 110.0)
    bench.steps(settled_s=1.0)
    assert bench.windows[0].predicted_j == IDLE_W


def test_a_short_pause_belongs_to_the_step_after_it() -> None:
    bench = Bench()
    bench.reading(0.0, 1.0, 100.0)
    bench.steps((0.0, 0.5, 50.0), (0.55, 1.0, 50.0))
    assert bench.windows[0].predicted_j == pytest.approx(100.0)
    assert bench.windows[0].busy_share == pytest.approx(1.0)


def test_a_window_waits_until_its_steps_are_known() -> None:
    bench = Bench()
    bench.reading(0.0, 1.0, 100.0)
    bench.steps((0.0, 0.9, 90.0))
    assert not bench.windows
    bench.steps((0.9, 1.1, 20.0))
    assert bench.windows[0].predicted_j == pytest.approx(100.0)


def test_readings_are_joined_to_windows() -> None:
    bench = Bench(window_s=2.0)
    for second in range(5):
        bench.reading(second, second + 1, 10.0 * (second + 1))
    bench.steps(*((i / 2, (i + 1) / 2, 5.0) for i in range(10)))
    assert [(w.start_s, w.end_s, w.measured_j) for w in bench.windows] == [(0, 2, 30.0), (2, 4, 70.0)]
    assert [w.predicted_j for w in bench.windows] == pytest.approx([20.0, 20.0])


def test_a_gap_between_readings_is_in_no_window() -> None:
    bench = Bench(window_s=2.0)
    for start_s in (0.0, 5.0, 6.0):
        bench.reading(start_s, start_s + 1, 10.0)
    bench.steps((0.0, 8.0, 80.0))
    assert [(w.start_s, w.end_s) for w in bench.windows] == [(5.0, 7.0)]


def test_each_gpu_has_its_own_moments() -> None:
    """Of 40 J in each step, each of two GPUs has 20."""
    bench = Bench(num_gpus=2)
    bench.reading(0.00, 1.00, 30.0, "0")
    bench.reading(0.07, 1.07, 50.0, "1")
    bench.steps((0.0, 1.0, 40.0), (1.0, 2.0, 80.0))
    (window,) = bench.windows
    assert window.measured_j == 80.0
    assert window.predicted_j == pytest.approx(20.0 + 20.0 * 0.93 + 40.0 * 0.07)


def test_one_gpu_that_lags_does_not_mix_up_windows() -> None:
    bench = Bench(num_gpus=2)
    for second in range(3):
        bench.reading(second, second + 1, 10.0, "0")
    bench.steps((0.0, 3.0, 60.0))
    assert not bench.windows
    for second in range(3):
        bench.reading(second, second + 1, 30.0, "1")
    bench.steps((3.0, 4.0, 20.0))
    assert [w.measured_j for w in bench.windows] == [40.0] * 3
    assert [w.predicted_j for w in bench.windows] == pytest.approx([20.0] * 3)


def test_what_is_not_known_is_not_compared() -> None:
    bench = Bench()
    bench.reading(0.0, 1.0, 100.0, trusted=False)
    bench.reading(1.0, 2.0, 100.0)
    bench.reading(2.0, 3.0, 100.0)
    bench.steps((0.0, 1.0, 100.0))
    bench.steps((1.0, 2.0, None))
    bench.steps((2.0, 3.0, 90.0))
    assert [w.start_s for w in bench.windows] == [2.0]
    assert bench.added() == {
        "uncompared_windows_total meter": 1.0,
        "uncompared_windows_total prediction": 1.0,
        "compared_windows_total inside": 1.0,
        "compared_energy_joules_total predicted": 90.0,
        "compared_energy_joules_total measured": 100.0,
        "absolute_error_joules_total": 10.0,
        "uncorrected_energy_joules_total": 90.0,
        "uncorrected_absolute_error_joules_total": 10.0,
    }


def test_the_report_has_error_and_bias() -> None:
    bench = Bench()
    for second, joules in enumerate((80.0, 200.0)):
        bench.reading(second, second + 1, 100.0)
        bench.steps((second, second + 1, joules))
    report = bench.increments.take()
    assert report["observe"] == [("energylens_relative_error", (), [pytest.approx(-0.2), pytest.approx(1.0)])]
    assert report["set"] == [("energylens_bias_ratio", (), pytest.approx(0.4))]
    assert ("energylens_absolute_error_joules_total", (), 120.0) in report["add"]
    assert ("energylens_compared_windows_total", ("outside",), 2.0) in report["add"]


def test_old_steps_are_dropped_and_late_readings_still_find_theirs() -> None:
    bench = Bench()
    for second in range(200):
        bench.steps((second, second + 1, 50.0))
    assert len(bench.pairing._steps._end_s) < 40
    bench.reading(180.0, 181.0, 60.0)
    bench.steps((200.0, 201.0, 50.0))
    assert bench.windows[0].predicted_j == pytest.approx(50.0)


def test_a_pause_is_the_same_as_in_recordings() -> None:
    assert pairing_module.IDLE_GAP_S == recordings.IDLE_GAP_S


# -- recorded steps, in the time in which they were recorded -----------------------------------------------------------


def joined(recorded: Recording, windows: Sequence[Window]) -> dict[str, tuple[float, float]]:
    """(predicted, measured) joules of each of the recording's phases, from the small windows inside its windows."""
    starts = np.array([w.start_s for w in windows])
    sums: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    ran_from_s = recorded._ran_from_s()
    for window in recorded.windows():
        if window.energy_j != window.energy_j:
            continue
        edge = ran_from_s[window.steps.start] + recordings.SETTLE_S
        begin_s = recorded.counter[np.searchsorted(recorded.counter[:, 0], edge), 0]
        first = int(np.searchsorted(starts, begin_s))
        last = int(np.searchsorted(starts, begin_s + window.duration_s - 1e-6))
        for small in windows[first:last]:
            predicted_j, measured_j = sums[window.phase]
            sums[window.phase] = (predicted_j + small.predicted_j, measured_j + small.measured_j)
    return sums


@pytest.mark.parametrize(
    ("name", "config"), [("h200_vllm/llama8b", "llama-3.1-8b"), ("h200_vllm/qwen30b", "qwen3-30b-a3b")]
)
def test_on_recorded_steps_it_says_what_replay_says(name: str, config: str) -> None:
    model = EnergyModel(config, Deployment(gpu="H200-SXM"))
    recorded, run = load(DATA / f"{name}_steps.npz"), read(DATA / f"{name}_steps.npz")
    readings = readings_of(run)
    windows = live(run.steps, readings, model, learn=False, window_s=0.0).windows
    assert all(reading.trusted for reading in readings)  # counter and power agree on a real GPU

    by_phase = joined(recorded, windows)
    scores = [score for score in replay(recorded, model) if score.measured]
    pairs = [by_phase[score.phase] for score in scores]
    assert len(by_phase) == len(scores) > 25
    assert [measured for _, measured in pairs] == pytest.approx([s.measured_j for s in scores], rel=1e-6)
    assert [predicted for predicted, _ in pairs] == pytest.approx([s.predicted_j for s in scores], rel=1e-3)

    def wmape(pairs: Sequence[tuple[float, float]]) -> float:
        return sum(abs(p - m) for p, m in pairs) / sum(m for _, m in pairs)

    of_replay = wmape([(score.predicted_j, score.measured_j) for score in scores])
    print(f"{name}: wMAPE {wmape(pairs):.4%} of paired windows, {of_replay:.4%} of replay, over {len(pairs)} phases")
    assert wmape(pairs) == pytest.approx(of_replay, abs=2e-4)
