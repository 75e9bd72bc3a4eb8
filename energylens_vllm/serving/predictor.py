"""The one place where serving meets the step model: batches in, predictions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from energylens_vllm.serving.batch import Batch


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one step should take. `components` and `phases` each sum to `energy_j`, which is over all GPUs."""

    time_s: float
    energy_j: float
    components: Mapping[str, float]  #: all of `metrics.COMPONENTS`
    phases: Mapping[str, float]  #: all of `metrics.PHASES`
    interval_j: tuple[float, float]
    flags: frozenset[str]


class Predictor(Protocol):
    """Predicts the steps of one engine."""

    def predict(self, batches: Sequence[Batch]) -> Sequence[Prediction]:
        """One prediction for each batch, in order."""


def make_predictor(config: Mapping[str, object], deployment: Mapping[str, object]) -> Predictor:
    """The step model of a Hugging Face config under a deployment (arguments of `Deployment`).

    Raises EnergyLensError for a model or a deployment that the step model does not know.
    """
    raise NotImplementedError
