"""Steady serving of many loads at once: the algebra of `EnergyModel.serving`, for arrays of batch sizes and budgets.

One call of the step model evaluates every load of a deployment, which is what makes thousands of deployments cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy import EnergyModel, Predictions
from energylens_vllm.energy.batch import Array, steps_of_mixtures
from energylens_vllm.energy.pipeline import longest


@dataclass(frozen=True, slots=True)
class Steady:
    """N closed queues of one engine, means over time; every array has shape (N,). Energies and rates are of the whole
    engine, all its data-parallel ranks together. The bounds are of the 90 % interval of `token_j`."""

    token_j: Array  #: joules an output token
    low_j: Array
    high_j: Array
    power_w: Array
    tokens_per_s: Array  #: output tokens
    tpot_s: Array  #: between tokens of a request
    ttft_s: Array  #: of a request, from when it is scheduled first
    components_j: dict[str, Array]  #: joules an output token, by what they are spent on


def steady(
    model: EnergyModel,
    running: npt.ArrayLike,
    budget: npt.ArrayLike,
    prompt_tokens: float,
    output_tokens: float,
    prefix_cache_hit_rate: float = 0.0,
) -> Steady:
    """Closed queues of `running` requests on each data-parallel rank, whose steps take at most `budget` tokens.

    `running` (at least the pipeline's stages) and `budget` broadcast to shape (N,). Row i is what
    `EnergyModel.serving` says of a deployment with `max_num_batched_tokens` budget[i] and a concurrency of running[i]
    on each rank: see there for how a step's batch follows.
    """
    requests, budgets = np.broadcast_arrays(np.asarray(running, np.float64), np.asarray(budget, np.float64))
    ranks, in_flight = model.deployment.data_parallel_size, model.deployment.pipeline_parallel_size
    output = float(output_tokens)
    context = prompt_tokens + output / 2
    batch = requests / in_flight
    uncached = prompt_tokens * (1 - prefix_cache_hit_rate)
    room = np.maximum(budgets - batch, 1.0)  # for prefill, in a step
    chunks = np.ceil(uncached / room)
    rate = np.minimum(batch / (chunks + output - 1), budgets / (uncached + output - 1))  # requests that start in a step

    # Steps with k = 0, 1, .. starting requests, each load's in a row of its own: Poisson weights.
    most = np.ceil(rate + 5 * np.sqrt(rate)).astype(np.int64) + 2
    load = np.repeat(np.arange(len(rate)), most)
    first = np.cumsum(most) - most
    starting = (np.arange(len(load)) - first[load]).astype(np.float64)
    weights = np.exp(starting * np.log(rate)[load] - rate[load] - _log_factorial(int(most.max()))[starting.astype(int)])

    def over_steps(values: Array) -> Array:
        total: Array = np.add.reduceat(values, first)
        return total

    weights /= over_steps(weights)[load]
    new = np.minimum(starting * uncached, room[load])
    kept = over_steps(weights * new)  # what the budget cuts off is computed in other steps
    new *= np.divide(rate * uncached, kept, out=np.ones_like(kept), where=kept > 0)[load]
    decoding = np.maximum(batch - rate * chunks, 0.0)[load]
    steps = steps_of_mixtures(decoding, context, starting, new, uncached, prompt_tokens - uncached, model.masks)
    predicted = model.predict(steps)

    tokens = rate * output  # generated in a step
    step_s, step_j = over_steps(weights * predicted.time_s), over_steps(weights * predicted.energy_j)
    bubble_j = np.zeros_like(step_j)
    if in_flight > 1:  # batches in flight wait for the longest of them
        alone_s, step_s = step_s, longest(predicted.time_s, weights, load, len(rate), in_flight)
        bubble_j = (step_s - alone_s) * model.idle_power_w / ranks
        step_j = step_j + bubble_j
    begun = np.where(starting > 0, weights, 0.0)
    return Steady(
        token_j=step_j / tokens,
        low_j=(over_steps(weights * predicted.low_j) + bubble_j) / tokens,
        high_j=(over_steps(weights * predicted.high_j) + bubble_j) / tokens,
        power_w=ranks * step_j / step_s,
        tokens_per_s=ranks * tokens / step_s,
        tpot_s=in_flight * step_s,
        ttft_s=over_steps(begun * predicted.time_s) / over_steps(begun) * chunks * in_flight,
        components_j={
            name: (over_steps(weights * part) + (bubble_j if name == "static" else 0.0)) / tokens
            for name, part in _parts(predicted).items()
        },
    )


def _parts(predicted: Predictions) -> dict[str, Array]:
    return {name: joules for name, joules in predicted.components.items() if joules.any()}


def _log_factorial(count: int) -> Array:
    """log k! of k = 0 .. count - 1."""
    logs: Array = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, max(count, 2), dtype=np.float64)))])[:count]
    return logs
