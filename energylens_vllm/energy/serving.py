"""Steady state of a server: a closed queue in which every request that ends is replaced by another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy.batch import Array, steps_of_mixtures
from energylens_vllm.energy.pipeline import longest
from energylens_vllm.energy.speculative import Speculation, drafting
from energylens_vllm.errors import EnergyLensError

if TYPE_CHECKING:
    from energylens_vllm.energy.model import EnergyModel, Predictions


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
    bubble_share: float = 0.0  #: of the time, in which a pipeline's stages wait for longer steps in front


@dataclass(frozen=True, slots=True)
class Lengths:
    """Means of what requests hold, and `context` of one that decodes."""

    prompt: float
    uncached: float  #: of the prompt, tokens that the prefix cache does not spare
    output: float
    context: float

    @classmethod
    def of(cls, prompts: Array, outputs: Array, hit_rate: float, context: float | None = None) -> Lengths:
        """Of samples. A request that generates L tokens is met during its decode in proportion to L, half-way through
        on average."""
        prompt, output = float(prompts.mean()), float(outputs.mean())
        met = prompt + float((outputs**2).mean() / (2 * output))
        return cls(prompt, prompt * (1 - hit_rate), output, context or met)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The steps of a batch in steady state: with k = 0, 1, .. starting requests, and how often each occurs."""

    weights: Array
    predicted: Predictions
    rate: float  #: requests that start in a step
    chunks: int  #: steps that a prompt takes

    def mean(self, values: Array) -> float:
        """Over steps."""
        return float((self.weights * values).sum())

    def between_ends_s(self, stages: int) -> float:
        """Seconds from one step's end to the next in a pipeline of `stages`."""
        if stages == 1:
            return self.mean(self.predicted.time_s)
        one = np.zeros(len(self.weights), dtype=np.int64)
        return float(longest(self.predicted.time_s, self.weights, one, 1, stages)[0])


def mixture(model: EnergyModel, batch: float, lengths: Lengths, drafts: Speculation | None = None) -> Mixture:
    """Of `batch` requests in a data-parallel rank's step; with `drafts`, each decode verifies those of a request.

    Each takes c steps for its prompt (chunks of what the token budget leaves) and then one for each further token, so
    r = n / (c + L - 1) requests start in a step. Their number in a step is Poisson.
    """
    budget = model.deployment.max_num_batched_tokens
    decoded, kept = (drafts.num_speculative_tokens + 1, drafts.tokens_per_step) if drafts else (1, 1.0)
    uncached, room = lengths.uncached, max(budget - batch * decoded, 1.0)
    chunks = math.ceil(uncached / room)
    decodes = (lengths.output - 1) / kept  # steps that a request decodes in
    rate = min(batch / (chunks + decodes), budget / (uncached + decodes * decoded))
    starting = np.arange(math.ceil(rate + 5 * math.sqrt(rate)) + 2, dtype=np.float64)
    weights = np.exp(starting * math.log(rate) - rate - np.array([math.lgamma(k + 1) for k in starting]))
    weights /= weights.sum()
    new = np.minimum(starting * uncached, room)
    if (mean := float((weights * new).sum())) > 0:  # what the budget cuts off is computed in other steps
        new = new * (rate * uncached / mean)
    decoding = np.maximum(batch - rate * chunks, 0.0) * np.ones_like(starting)
    steps = steps_of_mixtures(
        decoding, lengths.context, starting, new, uncached, lengths.prompt - uncached, model.masks, decoded
    )  # fmt: skip
    return Mixture(weights, model.predict(steps), rate, chunks)


def serve(
    model: EnergyModel,
    concurrency: float,
    prompt_tokens: npt.ArrayLike,
    output_tokens: npt.ArrayLike,
    mean_context_tokens: float | None = None,
    prefix_cache_hit_rate: float | None = None,
    drafts: Speculation | None = None,
) -> ServingPrediction:
    """See `EnergyModel.serving`: the mean over the steps of a `mixture`."""
    prompts, outputs = samples("prompt_tokens", prompt_tokens), samples("output_tokens", output_tokens)
    if not (isinstance(concurrency, int | float) and math.isfinite(concurrency) and concurrency > 0):
        raise EnergyLensError(f"concurrency: {concurrency!r} is not a positive number of requests")
    hit_rate, flags = hits(model, prefix_cache_hit_rate)
    lengths = Lengths.of(prompts, outputs, hit_rate, mean_context_tokens)
    deployment = model.deployment
    ranks, in_flight = deployment.data_parallel_size, deployment.pipeline_parallel_size
    batch = min(concurrency / ranks, deployment.max_num_seqs) / in_flight
    steps = mixture(model, batch, lengths, drafts)
    predicted = steps.predicted
    alone_s, step_s = steps.mean(predicted.time_s), steps.between_ends_s(in_flight)
    bubble_s = step_s - alone_s
    bubble_j = bubble_s * model.idle_power_w / ranks
    step_j = steps.mean(predicted.energy_j) + bubble_j
    kept, draft_j = 1.0, 0.0
    if drafts is not None:
        draft_s, draft_j = drafting(model, drafts, batch, lengths)
        kept, step_s, step_j = drafts.tokens_per_step, step_s + draft_s, step_j + draft_j
        flags |= drafts.flags
    tokens = steps.rate * lengths.output  # generated in a step
    low, high = ((steps.mean(bound) + draft_j + bubble_j) / tokens for bound in (predicted.low_j, predicted.high_j))
    starts = steps.weights[1:] * predicted.time_s[1:]
    first_s = float(starts.sum() / steps.weights[1:].sum()) * steps.chunks * in_flight
    return ServingPrediction(
        energy_per_output_token_j=step_j / tokens,
        energy_per_request_j=step_j / steps.rate,
        power_w=ranks * step_j / step_s,
        output_tokens_per_s=ranks * tokens / step_s,
        inter_token_latency_s=in_flight * step_s / kept,
        time_to_first_token_s=first_s,
        step_time_s=step_s,
        running=ranks * in_flight * batch,
        prefill_energy_share=steps.mean(predicted.phases["prefill"]) / step_j,
        interval_j=(low, high),
        flags=flags,
        bubble_share=bubble_s / step_s,
    )


def hits(model: EnergyModel, rate: float | None) -> tuple[float, frozenset[str]]:
    """The share of prompt tokens that the prefix cache spares, and the model's flags with what was assumed of it."""
    if rate is None:
        return CHAT_HIT_RATE, model.flags | {"prefix_hits_assumed"}
    if not 0 <= rate < 1:
        raise EnergyLensError(f"prefix_cache_hit_rate: {rate!r}; accepted: 0 up to, not including, 1")
    return rate, model.flags


def samples(name: str, values: npt.ArrayLike) -> Array:
    """A number, or samples, as an array. Raises EnergyLensError for anything below 1."""
    try:
        given = np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError):
        raise EnergyLensError(f"{name}: {values!r} is neither a number nor samples of numbers") from None
    if not given.size or not np.all(np.isfinite(given)) or given.min() < 1:
        raise EnergyLensError(f"{name}: {values!r}; accepted: 1 or more tokens, or samples of that")
    return given
