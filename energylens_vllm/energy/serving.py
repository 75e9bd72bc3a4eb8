"""Steady state of a server: a closed queue in which every request that ends is replaced by another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy.batch import Array, steps_of_mixtures
from energylens_vllm.errors import EnergyLensError

if TYPE_CHECKING:
    from energylens_vllm.energy.model import EnergyModel


#: Share of prompt tokens that prefix caching spares in chat traffic, where earlier turns have been served before.
#: Source: fitted with the H100 and B200 profiles on the chat runs of the ML.ENERGY Benchmark v3 (benchmarks/).
CHAT_HIT_RATE = 0.5


@dataclass(frozen=True, slots=True)
class ServingPrediction:
    """Means over time, of the whole deployment. `interval_j` is the 90 % interval of `energy_per_output_token_j`."""

    energy_per_output_token_j: float
    energy_per_request_j: float
    power_w: float
    output_tokens_per_s: float
    inter_token_latency_s: float  #: mean, interference by prefills included
    time_to_first_token_s: float  #: mean, from when a request is scheduled first
    step_time_s: float
    running: float  #: requests that run at a time
    prefill_energy_share: float
    interval_j: tuple[float, float]
    flags: frozenset[str]


def serve(
    model: EnergyModel,
    concurrency: float,
    prompt_tokens: npt.ArrayLike,
    output_tokens: npt.ArrayLike,
    mean_context_tokens: float | None = None,
    prefix_cache_hit_rate: float | None = None,
) -> ServingPrediction:
    """See `EnergyModel.serving`.

    Of n requests in a batch, each takes c steps for its prompt (chunks of what the token budget leaves) and then one
    for each further token, so r = n / (c + L - 1) requests start in a step. Their number in a step is Poisson; steps
    with k starting requests are predicted and averaged with its weights.
    """
    prompts, outputs = _samples("prompt_tokens", prompt_tokens), _samples("output_tokens", output_tokens)
    if not (isinstance(concurrency, int | float) and math.isfinite(concurrency) and concurrency > 0):
        raise EnergyLensError(f"concurrency: {concurrency!r} is not a positive number of requests")
    flags = set(model.flags)
    hit_rate = prefix_cache_hit_rate
    if hit_rate is None:
        hit_rate = CHAT_HIT_RATE
        flags.add("prefix_hits_assumed")
    if not 0 <= hit_rate < 1:
        raise EnergyLensError(f"prefix_cache_hit_rate: {hit_rate!r}; accepted: 0 up to, not including, 1")
    deployment = model.deployment
    prompt, output = float(prompts.mean()), float(outputs.mean())
    # A request that generates L tokens is met during its decode in proportion to L, half-way through on average.
    context = mean_context_tokens or prompt + float((outputs**2).mean() / (2 * output))
    ranks, in_flight = deployment.data_parallel_size, deployment.pipeline_parallel_size
    batch = min(concurrency / (ranks * in_flight), deployment.max_num_seqs)
    budget = deployment.max_num_batched_tokens
    uncached = prompt * (1 - hit_rate)
    chunks = math.ceil(uncached / max(budget - batch, 1.0))
    rate = min(batch / (chunks + output - 1), budget / (uncached + output - 1))

    starting = np.arange(math.ceil(rate + 5 * math.sqrt(rate)) + 2, dtype=np.float64)
    weights = np.exp(starting * math.log(rate) - rate - np.array([math.lgamma(k + 1) for k in starting]))
    weights /= weights.sum()
    new = np.minimum(starting * uncached, max(budget - batch, 1.0))
    if (mean := float((weights * new).sum())) > 0:  # what the budget cuts off is computed in other steps
        new = new * (rate * uncached / mean)
    decoding = np.maximum(batch - rate * chunks, 0.0) * np.ones_like(starting)
    steps = steps_of_mixtures(decoding, context, starting, new, uncached, prompt - uncached, model.masks)
    predicted = model.predict(steps)

    def mean_of(values: Array) -> float:
        return float((weights * values).sum())

    step_s, step_j = mean_of(predicted.time_s), mean_of(predicted.energy_j)
    tokens = rate * output  # generated in a step
    low, high = (mean_of(bound) / tokens for bound in (predicted.low_j, predicted.high_j))
    starts = weights[1:] * predicted.time_s[1:]
    first_s = float(starts.sum() / weights[1:].sum()) * chunks * in_flight
    return ServingPrediction(
        energy_per_output_token_j=step_j / tokens,
        energy_per_request_j=step_j / rate,
        power_w=ranks * step_j / step_s,
        output_tokens_per_s=ranks * tokens / step_s,
        inter_token_latency_s=in_flight * step_s,
        time_to_first_token_s=first_s,
        step_time_s=step_s,
        running=ranks * in_flight * batch,
        prefill_energy_share=mean_of(predicted.phases["prefill"]) / step_j,
        interval_j=(low, high),
        flags=frozenset(flags),
    )


def _samples(name: str, values: npt.ArrayLike) -> Array:
    try:
        samples = np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError):
        raise EnergyLensError(f"{name}: {values!r} is neither a number nor samples of numbers") from None
    if not samples.size or not np.all(np.isfinite(samples)) or samples.min() < 1:
        raise EnergyLensError(f"{name}: {values!r}; accepted: 1 or more tokens, or samples of that")
    return samples
