"""Beside the pairing, which teaches energy: teaches times, shows what is known, and has it kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.learning import TIME, Learner
from energylens_vllm.serving.learnt_file import LearntFile
from energylens_vllm.serving.metrics import LEARNING_STATES
from energylens_vllm.serving.observer import Step
from energylens_vllm.serving.pairing import spans
from energylens_vllm.serving.predictor import Predictions

#: Times are learnt from so many predicted seconds of steps together. With steps in flight a step's output is taken
#: while the next is launched, so of one step's time some may be counted for its neighbour.
TIME_WINDOW_S = 2.0
#: A step that took so many times what was predicted (and a second) was no step alone: something was compiled, or the
#: process stopped.
LONGEST, SHORTEST_S = 4.0, 0.25
SAVED_EACH_WINDOWS = 12  #: a minute of them


class Learning:
    """A listener of `StepObserver`, to come after the pairing."""

    def __init__(self, learner: Learner, file: LearntFile | None = None) -> None:
        self.learner = learner
        self._file = file
        self._saved_windows = learner.windows
        self._measured_s, self._predicted_s = 0.0, np.zeros(len(TIME))
        self._last_end_s = float("-inf")

    def __call__(self, steps: Sequence[Step], predictions: Predictions | None, increments: Increments) -> None:
        """Take the steps of one report."""
        if predictions is not None and predictions.correction is not None:
            self._learn_times(steps, predictions)
        show(increments, self.learner.state)
        for name, (factor, std) in self.learner.estimates().items():
            increments.set("energylens_learning_factor", factor, name)
            increments.set("energylens_learning_factor_std", std, name)
        if self._file is not None and self.learner.windows - self._saved_windows >= SAVED_EACH_WINDOWS:
            self._saved_windows = self.learner.windows
            self._file.save(self.learner)

    def _learn_times(self, steps: Sequence[Step], predictions: Predictions) -> None:
        assert predictions.correction is not None
        untimed_s, kind = predictions.correction.untimed_s, predictions.correction.time_kind
        start_s, end_s = spans(steps, self._last_end_s)
        measured_s = end_s - start_s
        self._last_end_s = float(end_s[-1])
        alone = measured_s <= LONGEST * np.maximum(predictions.time_s, SHORTEST_S)
        self._measured_s += float(measured_s[alone].sum())
        self._predicted_s += np.bincount(kind[alone], untimed_s[alone], len(TIME))
        if self._predicted_s.sum() >= TIME_WINDOW_S:
            self.learner.learn_time(self._measured_s, self._predicted_s)
            self._measured_s, self._predicted_s = 0.0, np.zeros(len(TIME))


def show(increments: Increments, state: str) -> None:
    """Report which of `metrics.LEARNING_STATES` there is."""
    for each in LEARNING_STATES:
        increments.set("energylens_learning_state", float(each == state), each)
