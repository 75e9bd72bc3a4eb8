"""The one place where serving meets the step model: batches in, predictions out."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.correction import Correction, correct
from energylens_vllm.serving.learning import Learner
from energylens_vllm.serving.metrics import COMPONENTS, PHASES, WASTES

if TYPE_CHECKING:
    from energylens_vllm.energy import EnergyModel

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Predictions:
    """What N steps should take; every array has shape (N,). Joules are over all GPUs of the engine."""

    time_s: Array
    energy_j: Array
    components: Mapping[str, Array]  #: all of `metrics.COMPONENTS`; they sum to `energy_j`
    phases: Mapping[str, Array]  #: all of `metrics.PHASES`; they sum to `energy_j`
    low_j: Array  #: ends of the prediction interval
    high_j: Array
    flags: frozenset[str] = frozenset()  #: those of every step
    waste: Mapping[str, Array] = field(default_factory=dict)  #: some of `metrics.WASTES`; parts of `energy_j`
    correction: Correction | None = None  #: what learning needs, if they are corrected by it


class Predictor(Protocol):
    """Predicts the steps of one engine."""

    def predict(self, batches: Sequence[Batch]) -> Predictions:
        """What each batch should take, in order."""


class ModelPredictor:
    """Predicts with the step model of the engine's deployment, and with what a `learner` has learnt of its GPUs."""

    def __init__(self, model: EnergyModel) -> None:
        self.model = model
        self.learner: Learner | None = None

    def predict(self, batches: Sequence[Batch]) -> Predictions:
        """All batches at once: many steps cost the step model little more than one."""
        from energylens_vllm.energy.batch import steps_from_arrays

        rows = Rows.of(batches)
        steps = steps_from_arrays(rows.new, rows.computed, rows.offsets, self.model.masks, rows.decode)
        predicted, correction = self.model.predict(steps), None
        if self.learner is not None:
            predicted, correction = correct(self.model, self.learner, steps, predicted)
        nothing = np.zeros(len(batches))
        return Predictions(
            time_s=predicted.time_s,
            energy_j=predicted.energy_j,
            components={name: predicted.components.get(name, nothing) for name in COMPONENTS},
            phases={name: predicted.phases.get(name, nothing) for name in PHASES},
            low_j=predicted.low_j,
            high_j=predicted.high_j,
            flags=predicted.flags,
            waste=dict(zip(WASTES, (predicted.waste_j, predicted.padding_j), strict=True)),
            correction=correction,
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """The requests of several batches in compressed rows: batch i has requests offsets[i]:offsets[i + 1]."""

    new: Array
    computed: Integers
    decode: Booleans
    offsets: Integers

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Rows:
        """Raises EnergyLensError if the lists of a batch are not equally long."""
        sizes = [len(batch.request_ids) for batch in batches]
        offsets = np.zeros(len(batches) + 1, dtype=np.int64)
        np.cumsum(sizes, out=offsets[1:])
        computed = _integers([batch.computed_tokens for batch in batches])
        # Most steps are one token for each of hundreds of decoding requests: only the others' lists are read.
        new, decode = np.ones(offsets[-1]), np.ones(offsets[-1], dtype=np.bool_)
        for batch, size, start in zip(batches, sizes, offsets.tolist(), strict=False):
            if batch.num_decode_tokens != batch.num_tokens or batch.num_tokens != size:
                new[start : start + size] = batch.new_tokens
                decode[start : start + size] = batch.is_decode
        if len(computed) != len(new):
            raise EnergyLensError(f"batches: {len(new)} requests but {len(computed)} counts of computed tokens")
        return cls(new, computed, decode, offsets)


def _integers(lists: Sequence[Sequence[int] | Integers]) -> Integers:
    """All numbers of the lists. `struct` reads a list of Python's integers three times as fast as numpy does."""
    return np.concatenate(
        [
            numbers
            if isinstance(numbers, np.ndarray)
            else np.frombuffer(struct.pack(f"{len(numbers)}q", *numbers), dtype=np.int64)
            for numbers in lists
        ]
    )


def make_predictor(config: Mapping[str, object], deployment: Mapping[str, Any]) -> ModelPredictor:
    """The step model of a Hugging Face config under a deployment (arguments of `Deployment`).

    With data parallelism it predicts one rank: its own requests on its own GPUs. Raises EnergyLensError for a model, a
    GPU or a deployment that the step model does not know.
    """
    from energylens_vllm.energy import Deployment, EnergyModel

    predictor = ModelPredictor(EnergyModel(config, Deployment(**deployment)))
    predictor.predict([_PROBE])
    return predictor


#: A prompt beside a decode. A profile may lack coefficients of this model's kernels: found out now, not in each step.
_PROBE = Batch(["prompt", "decode"], [100, 1], [0, 100], [False, True], num_tokens=101, num_decode_tokens=1)
