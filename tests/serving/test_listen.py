"""What an engine's observer is given to do, as the settings say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.meter import NoMeter
from energylens_vllm.meter.gpu import Gpu
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.learning import ENERGY, FIRST, NAMES, Learner
from energylens_vllm.serving.learning_listener import Learning
from energylens_vllm.serving.listen import _follow_limit, measure
from energylens_vllm.serving.metrics import MAX_SERIES_PER_ENGINE, METRICS
from energylens_vllm.serving.observer import StepObserver
from energylens_vllm.serving.predictor import ModelPredictor
from energylens_vllm.serving.settings import Settings

MODEL = EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM"))


class NoGpu:
    """A backend that has nothing to read."""

    def open(self) -> Sequence[Gpu]:
        raise NoMeter("no GPU here")

    def close(self) -> None:
        pass


def observer() -> StepObserver:
    return StepObserver(lambda work: work, ModelPredictor(MODEL))


def gauges(observed: StepObserver) -> dict[tuple[str, tuple[str, ...]], float]:
    observed.report()
    return {(name, labels): value for report in observed.take_outbox() for name, labels, value in report["set"]}


def batch(requests: int) -> Batch:
    return Batch([str(i) for i in range(requests)], [1] * requests, [500] * requests, [True] * requests, requests,
                 requests)  # fmt: skip


def test_learning_is_on_by_default_and_starts_from_what_the_profile_says(tmp_path: Path) -> None:
    observed = observer()
    measure(observed, NoGpu(), 1, Settings(learning_folder=str(tmp_path))).stop()
    shown = gauges(observed)
    assert shown["energylens_learning_state", ("waiting",)] == 1.0
    assert [shown["energylens_learning_factor", (name,)] for name in NAMES] == [1.0] * len(NAMES)
    predictor = observed.predictor
    assert isinstance(predictor, ModelPredictor)
    predicted, plain = predictor.predict([batch(8)]), ModelPredictor(MODEL).predict([batch(8)])
    assert predicted.energy_j == pytest.approx(plain.energy_j)
    assert plain.correction is None
    assert not list(tmp_path.iterdir())


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    observed = observer()
    measure(observed, NoGpu(), 1, Settings(learning=False, learning_folder=str(tmp_path))).stop()
    shown = gauges(observed)
    assert shown["energylens_learning_state", ("off",)] == 1.0
    assert not any(isinstance(listener, Learning) for listener in observed.listeners)
    predictor = observed.predictor
    assert isinstance(predictor, ModelPredictor)
    assert predictor.learner is None


def test_what_was_learnt_before_is_used_at_once(tmp_path: Path) -> None:
    settings = Settings(learning_folder=str(tmp_path))
    observed = observer()
    measure(observed, NoGpu(), 1, settings).stop()
    (learning,) = (listener for listener in observed.listeners if isinstance(listener, Learning))
    learning.learner.energy.factors[:3] = 1.2
    learning.learner.windows = 40
    assert learning._file is not None
    learning._file.save(learning.learner)

    again = observer()
    measure(again, NoGpu(), 1, settings).stop()
    predictor = again.predictor
    assert isinstance(predictor, ModelPredictor)
    ratio = predictor.predict([batch(8)]).energy_j / ModelPredictor(MODEL).predict([batch(8)]).energy_j
    assert ratio == pytest.approx(np.array([1.2]))


def test_nowhere_is_a_folder_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("", None):
        observed = observer()
        measure(observed, NoGpu(), 1, Settings(learning_folder=folder)).stop()
        (learning,) = (listener for listener in observed.listeners if isinstance(listener, Learning))
        assert learning._file is None
    assert not list(tmp_path.iterdir())


def test_a_lower_power_limit_is_predicted_for() -> None:
    observed = observer()
    predictor = observed.predictor
    assert isinstance(predictor, ModelPredictor)
    predictor.learner = Learner(MODEL)
    prefill = Batch(["a"], [8192], [0], [False], 8192, 0)
    before = predictor.predict([prefill])
    _follow_limit(predictor, 700.0)
    assert predictor.model is MODEL  # as the profile has it
    _follow_limit(predictor, 500.0)
    for learnt in (False, True):
        if learnt:
            predictor.learner.windows = FIRST
            predictor.learner.energy.factors[ENERGY.index("memory")] = 1.1
        after = predictor.predict([prefill])
        assert after.energy_j / after.time_s == pytest.approx(before.energy_j / before.time_s * 5 / 7, rel=2e-3)
        assert after.time_s > 1.1 * before.time_s
        assert after.correction is not None
        uncorrected_w = after.correction.uncorrected_j / after.time_s
        assert uncorrected_w == pytest.approx(after.energy_j / after.time_s, rel=0.02)
    _follow_limit(predictor, 700.0)
    predictor.learner = None
    assert predictor.predict([prefill]).energy_j == pytest.approx(before.energy_j)


def test_all_that_there_can_be_of_eight_gpus_is_exported() -> None:
    """With every setting on and every reason for throttling, within the limit of series."""
    at_start = sum(metric.series for metric in METRICS)
    of_gpu = [m for m in METRICS if m.label_names[:1] == ("gpu",) and m.name != "energylens_profile_info"]
    per_gpu = sum(len(metric.labels[1][1]) if len(metric.labels) > 1 else 1 for metric in of_gpu)
    others = [m for m in METRICS if not m.series and m not in of_gpu and m.label_names != ("coefficient",)]
    later = sum(math.prod(len(values) or 1 for _, values in metric.labels) for metric in others)
    assert at_start + 8 * per_gpu + 2 * len(NAMES) + later <= MAX_SERIES_PER_ENGINE
