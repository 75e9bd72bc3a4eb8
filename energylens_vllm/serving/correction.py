"""Predictions with learnt factors: all steps of a report at once, and what windows of them can teach.

Factors on energy act inside the step model, before the clock is solved for (`energy.factors`). Those on time act on the
steps that come out: static energy follows time, and at the power limit all energy does, because power is the limit's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from energylens_vllm.serving.learning import ENERGY, HALF_WIDTH_90, Learner

if TYPE_CHECKING:
    from energylens_vllm.energy import EnergyModel
    from energylens_vllm.energy.batch import Steps
    from energylens_vllm.energy.model import Predictions

Array = npt.NDArray[np.float64]

#: component -> the factor that it follows below the power limit
_FACTOR_OF = {
    "static": "static",
    "host_gap": "static",
    "linear": "compute",
    "attention": "compute",
    "experts": "compute",
    "weights": "memory",
    "kv_cache": "memory",
    "activations": "memory",
    "communication": "communication",
}


@dataclass(frozen=True, slots=True)
class Correction:
    """N steps' share in learning; every array begins with N."""

    uncorrected_j: Array  #: by the profile alone
    intercept_j: Array  #: corrected energy is this,
    slopes_j: Array  #: plus these times the factors of `learning.ENERGY`; shape (N, 6)
    untimed_s: Array  #: corrected time without the factor on time
    time_kind: npt.NDArray[np.int64]  #: which of `learning.TIME` that is


def correct(model: EnergyModel, learner: Learner, steps: Steps, plain: Predictions) -> tuple[Predictions, Correction]:
    """Predict `steps` with what was learnt; `plain` is what `model` says of them."""
    factors, on_energy = learner.factors, learner.on_energy
    in_force = replace(on_energy, limit=on_energy.limit * model.factors.limit)  # on top of the limit that is in force
    found = plain if on_energy.is_neutral() else model.with_factors(in_force).predict(steps)
    kind = (steps.decode_tokens < steps.tokens).astype(np.int64)
    on_time = learner.on_time[kind]
    is_limited = found.clock < 1.0
    on_work = np.where(is_limited, on_time, 1.0)
    components = {
        name: joules * (on_time if _FACTOR_OF[name] == "static" else on_work)
        for name, joules in found.components.items()
    }
    energy_j = np.sum(list(components.values()), axis=0)
    slopes_j = np.zeros((len(energy_j), len(ENERGY)))
    for name, joules in components.items():
        column = ENERGY.index(_FACTOR_OF[name])
        slopes_j[:, column] += np.where(is_limited, 0.0, joules) / factors[column]
    limit = ENERGY.index("limit")
    slopes_j[:, limit] = np.where(is_limited, energy_j, 0.0) / factors[limit]
    ratio = np.divide(energy_j, found.energy_j, out=np.ones_like(energy_j), where=found.energy_j > 0)
    low_j, high_j = found.low_j * ratio, found.high_j * ratio
    if learner.is_applied:
        width = _half_width(learner, plain, energy_j, slopes_j)
        low_j, high_j = energy_j / (1 + width), energy_j * (1 + width)
    prefill_j = np.minimum(found.phases["prefill"] * ratio, energy_j)
    corrected = replace(
        found,
        time_s=found.time_s * on_time,
        energy_j=energy_j,
        components=components,
        phases={"prefill": prefill_j, "decode": energy_j - prefill_j},
        low_j=low_j,
        high_j=high_j,
        low_s=found.low_s * on_time,
        high_s=found.high_s * on_time,
        waste_j=found.waste_j * on_time,
        padding_j=found.padding_j * on_work,
    )
    return corrected, Correction(plain.energy_j, energy_j - slopes_j @ factors, slopes_j, found.time_s, kind)


def _half_width(learner: Learner, plain: Predictions, energy_j: Array, slopes_j: Array) -> Array:
    """Of the 90 % intervals, relative: what is not known of the factors, and how windows scatter.

    Not wider than the profile's own, which knows nothing of this GPU, unless windows do scatter by more.
    """
    own = (plain.high_j / np.maximum(plain.energy_j, 1e-30) - 1.0) / HALF_WIDTH_90
    total_j = np.maximum(energy_j, 1e-30)
    unknown = np.einsum("ni,ij,nj->n", slopes_j, learner.energy.covariance, slopes_j) / total_j**2
    prefill = np.divide(plain.phases["prefill"], plain.energy_j, out=np.zeros_like(total_j), where=plain.energy_j > 0)
    scatter = learner.scatter.of(np.column_stack([np.zeros_like(prefill), 1.0 - prefill, prefill]))
    return np.asarray(HALF_WIDTH_90 * np.sqrt(np.maximum(np.minimum(own**2, unknown + scatter), scatter)))
