"""Steady serving of many loads at once, for a load of the explorer's: see `energy.serving.steady`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy import EnergyModel
from energylens_vllm.energy.serving import Lengths, Steady
from energylens_vllm.energy.serving import steady as of_lengths

__all__ = ["Steady", "steady"]


def steady(
    model: EnergyModel,
    running: npt.ArrayLike,
    budget: npt.ArrayLike,
    prompt_tokens: float,
    output_tokens: float,
    prefix_cache_hit_rate: float = 0.0,
) -> Steady:
    """Closed queues of `running` requests on each data-parallel rank, whose steps take at most `budget` tokens: both
    broadcast to one shape. Lengths are means; all requests are taken to be alike."""
    prompts, outputs = (np.array([mean], dtype=np.float64) for mean in (prompt_tokens, output_tokens))
    return of_lengths(model, running, budget, Lengths.of(prompts, outputs, prefix_cache_hit_rate))
