"""Steady state of a server: a closed queue in which every request that ends is replaced by another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy.batch import Array, Integers, steps_of_mixtures
from energylens_vllm.energy.pipeline import longest, partly
from energylens_vllm.energy.speculative import Speculation, drafting
from energylens_vllm.energy.station import Speed, station
from energylens_vllm.errors import EnergyLensError

if TYPE_CHECKING:
    from energylens_vllm.energy.model import EnergyModel, Predictions


#: Share of prompt tokens that prefix caching spares in chat traffic, where earlier turns have been served before.
#: Source: fitted with the H100 and B200 profiles on the chat runs of the ML.ENERGY Benchmark v3 (benchmarks/).
CHAT_HIT_RATE = 0.6
#: Standard deviation of the logarithm of what a chat prompt leaves to compute: most bring a sentence, some a document.
#: Source: times between tokens of those runs, of which a step in ten waits for 80 tokens of prompts and one in a
#: hundred for 1,300, at a mean of 270 (dense models, 128 requests).
CHAT_SPREAD = 1.7
#: Steps with prompts of such lengths are taken apart at these quantiles of what they compute.
SPREAD_QUANTILES = (0.0, 0.5, 0.8, 0.95, 1.0)


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
    bubble_share: float = 0.0  #: of the time, in which stages wait for longer steps in front, ranks for those beside


@dataclass(frozen=True, slots=True)
class Lengths:
    """Means of what requests hold, and `context` of one that decodes."""

    prompt: float
    uncached: float  #: of the prompt, tokens that the prefix cache does not spare
    output: float
    context: float
    spread: float = 0.0  #: standard deviation of the logarithm of `uncached` among prompts

    @classmethod
    def of(
        cls, prompts: Array, outputs: Array, hit_rate: float, context: float | None = None, spread: float = 0.0
    ) -> Lengths:
        """Of samples. A request that generates L tokens is met during its decode in proportion to L, half-way through
        on average."""
        prompt, output = float(prompts.mean()), float(outputs.mean())
        met = prompt + float((outputs**2).mean() / (2 * output))
        return cls(prompt, prompt * (1 - hit_rate), output, met if context is None else context, spread)


@dataclass(frozen=True, slots=True)
class Mixtures:
    """The steps of B batches in steady state: with k = 0, 1, .. starting requests, and how often each occurs.

    Arrays are of shape (S,), all batches' steps together, unless they say (B,)."""

    weights: Array  #: of a step among its batch's
    batch: Integers  #: which batch a step is of
    starting: Array  #: prompts that start in it
    predicted: Predictions
    rate: Array  #: requests that start in a step, of shape (B,)
    chunks: Array  #: steps that a prompt takes, of shape (B,)

    def mean(self, values: Array) -> Array:
        """Over the steps of each batch."""
        return self._sum(self.weights * values)

    def mean_of_starts(self, values: Array) -> Array:
        """Over those steps of each batch in which a request starts."""
        weights = self.weights * (self.starting > 0)
        return self._sum(weights * values) / self._sum(weights)

    def between_ends_s(self, together: int) -> Array:
        """Seconds from one step's end to the next, where each waits for the longest of `together`."""
        if together == 1:
            return self.mean(self.predicted.time_s)
        return longest(self.predicted.time_s, self.weights, self.batch, len(self.rate), together)

    def _sum(self, values: Array) -> Array:
        return np.asarray(np.bincount(self.batch, values, len(self.rate)), dtype=np.float64)


def mixtures(
    model: EnergyModel, batch: Array, budget: Array, lengths: Lengths, drafts: Speculation | None = None
) -> Mixtures:
    """Of `batch` requests in a data-parallel rank's step of at most `budget` tokens, both of shape (B,); with `drafts`,
    each decode verifies those of a request. All steps are predicted at once.

    Each request takes c steps for its prompt (chunks of what the token budget leaves) and then one for each further
    token, so r = n / (c + L - 1) of them start in a step. Their number in a step is Poisson.
    """
    decoded, kept = (drafts.num_speculative_tokens + 1, drafts.tokens_per_step) if drafts else (1, 1.0)
    uncached, room = lengths.uncached, np.maximum(budget - batch * decoded, 1.0)
    chunks = np.ceil(uncached / room)
    decodes = (lengths.output - 1) / kept  # steps that a request decodes in
    rate = np.minimum(batch / (chunks + decodes), budget / (uncached + decodes * decoded))
    most = np.ceil(rate + 5 * np.sqrt(rate)).astype(np.int64) + 2
    of = np.repeat(np.arange(len(rate)), most)
    starting = (np.arange(len(of)) - (np.cumsum(most) - most)[of]).astype(np.float64)
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most.max(), dtype=np.float64)))])
    weights = np.exp(starting * np.log(rate)[of] - rate[of] - factorial[starting.astype(np.int64)])
    weights /= np.bincount(of, weights)[of]
    parts, busy = (len(SPREAD_QUANTILES) - 1 if lengths.spread else 1), starting > 0
    if parts > 1:  # in the order of `spread_lengths`
        of = np.concatenate([of[~busy], np.tile(of[busy], parts)])
    starting, weights, new = spread_lengths(starting, weights, uncached, lengths.spread)
    each = np.divide(new, starting, out=np.full_like(new, uncached), where=starting > 0)
    new = np.minimum(new, room[of])
    mean = np.bincount(of, weights * new)  # what the budget cuts off is computed in other steps
    new = new * np.divide(rate * uncached, mean, out=np.ones_like(mean), where=mean > 0)[of]
    decoding = np.maximum(batch - rate * chunks, 0.0)[of]
    steps = steps_of_mixtures(
        decoding, lengths.context, starting, new, each, lengths.prompt - uncached, model.masks, decoded
    )  # fmt: skip
    return Mixtures(weights, of, starting, model.predict(steps), rate, chunks)


def mixture(model: EnergyModel, batch: float, lengths: Lengths, drafts: Speculation | None = None) -> Mixtures:
    """`mixtures` of one batch, with the deployment's token budget."""
    budget = model.deployment.max_num_batched_tokens
    return mixtures(model, np.array([batch], dtype=np.float64), np.array([budget], dtype=np.float64), lengths, drafts)


def spread_lengths(starting: Array, weights: Array, mean: float, spread: float) -> tuple[Array, Array, Array]:
    """Steps by the number of starting prompts, with their weights, taken apart by the tokens that those prompts bring.

    Lengths are lognormal. Their sum over a step's prompts is taken for lognormal too, with the sum's mean and variance
    (Fenton and Wilkinson), and stands for itself by the mean between each two of `SPREAD_QUANTILES`. Returns starting
    prompts, weights and tokens.
    """
    if not spread:
        return starting, weights, starting * mean
    busy = starting > 0
    count = starting[busy]
    sigma = np.sqrt(np.log1p(np.expm1(spread**2) / count))
    normal = NormalDist()
    cuts = [normal.inv_cdf(q) for q in SPREAD_QUANTILES[1:-1]]
    # Of a lognormal, the values below its quantile z hold the share Phi(z - sigma) of the mean.
    below = [np.zeros_like(sigma), *(np.vectorize(normal.cdf)(cut - sigma) for cut in cuts), np.ones_like(sigma)]
    part = np.diff(SPREAD_QUANTILES)
    tokens = [(high - low) / share * count * mean for low, high, share in zip(below, below[1:], part, strict=False)]
    none = ~busy
    return (
        np.concatenate([starting[none], np.tile(count, len(part))]),
        np.concatenate([weights[none], *(share * weights[busy] for share in part)]),
        np.concatenate([np.zeros(none.sum()), *tokens]),
    )


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
    for name, given in (("concurrency", concurrency), ("mean_context_tokens", mean_context_tokens)):
        number = given is None or isinstance(given, int | float | np.number)
        if not number or (given is not None and not 0 < given < math.inf):
            what = "requests" if name == "concurrency" else "tokens"
            raise EnergyLensError(f"{name}: {given!r} is not a positive number of {what}")
    lengths, flags = lengths_of(model, prompts, outputs, prefix_cache_hit_rate, mean_context_tokens)
    deployment = model.deployment
    ranks = deployment.data_parallel_size
    running = min(float(concurrency) / ranks, float(deployment.max_num_seqs))
    least = fewest(model)
    budget = np.array([deployment.max_num_batched_tokens], dtype=np.float64)
    found = steady(model, np.array([max(running, least)]), budget, lengths, drafts)

    def one(values: Array) -> float:
        return float(values[0])

    # With fewer, one request is a batch, and with less than that there is none for the rest of the time.
    stages = deployment.pipeline_parallel_size
    batches = min(running / least, 1.0) * stages
    taken, pace = partly(max(batches, 1.0), stages, one(found.pass_share))
    rate = float(pace) * min(batches, 1.0)
    power_w = model.idle_power_w + rate * (one(found.power_w) - model.idle_power_w)
    tokens_per_s = rate * one(found.tokens_per_s)
    token_j = power_w / tokens_per_s
    dearer = token_j / one(found.token_j)  # by static power of what is empty
    return ServingPrediction(
        energy_per_output_token_j=token_j,
        energy_per_request_j=token_j * lengths.output,
        power_w=power_w,
        output_tokens_per_s=tokens_per_s,
        inter_token_latency_s=float(taken) * one(found.tpot_s),
        time_to_first_token_s=one(found.ttft_s),
        step_time_s=one(found.step_s),
        running=ranks * running,
        prefill_energy_share=one(found.prefill_share) / dearer,
        interval_j=(one(found.low_j) * dearer, one(found.high_j) * dearer),
        flags=flags | (drafts.flags if drafts is not None else frozenset()),
        bubble_share=one(found.bubble_share),
    )


def fewest(model: EnergyModel) -> float:
    """Requests of a data-parallel rank that leave no stage of its pipeline empty; with fewer, completions and power
    above idle are in proportion (`partly`). Ranks that share experts step together, so that one request keeps all of
    them busy."""
    return model.deployment.pipeline_parallel_size / model.lockstep_ranks


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
    step_s: Array
    pass_share: Array  #: of the time between a batch's steps, what it needs to pass the stages with none in its way
    bubble_share: Array
    prefill_share: Array  #: of the energy
    components_j: dict[str, Array]  #: joules an output token, by what they are spent on; drafts' are not in it
    steps: Mixtures  #: that it is the mean of


def steady(
    model: EnergyModel, running: npt.ArrayLike, budget: npt.ArrayLike, lengths: Lengths,
    drafts: Speculation | None = None,
) -> Steady:  # fmt: skip
    """Closed queues of `running` requests on each data-parallel rank, whose steps take at most `budget` tokens.

    A step waits for the longest of those in flight in a pipeline, and of those of all ranks that share experts, whose
    batches are drawn independently: the docstring of `pipeline`.

    `running` (at least `fewest`) and `budget` broadcast to shape (N,). Row i is what
    `EnergyModel.serving` says of a deployment with `max_num_batched_tokens` budget[i] and a concurrency of running[i]
    on each rank; one call of the step model evaluates all of them, which is what makes thousands of deployments cheap.
    """
    requests, budgets = np.broadcast_arrays(np.asarray(running, np.float64), np.asarray(budget, np.float64))
    ranks, in_flight = model.deployment.data_parallel_size, model.deployment.pipeline_parallel_size
    batch = requests / in_flight
    steps = mixtures(model, batch, budgets, lengths, drafts)
    predicted = steps.predicted
    alone_s, step_s = steps.mean(predicted.time_s), steps.between_ends_s(in_flight * model.lockstep_ranks)
    bubble_s = step_s - alone_s
    bubble_j = bubble_s * model.idle_power_w / ranks
    step_j = steps.mean(predicted.energy_j) + bubble_j
    kept, draft_j = 1.0, np.zeros_like(step_j)
    if drafts is not None:
        added = np.array([drafting(model, drafts, float(each), lengths) for each in batch])
        draft_j = added[:, 1]
        kept, step_s, step_j = drafts.tokens_per_step, step_s + added[:, 0], step_j + draft_j
    tokens = steps.rate * lengths.output  # generated in a step
    return Steady(
        token_j=step_j / tokens,
        low_j=(steps.mean(predicted.low_j) + draft_j + bubble_j) / tokens,
        high_j=(steps.mean(predicted.high_j) + draft_j + bubble_j) / tokens,
        power_w=ranks * step_j / step_s,
        tokens_per_s=ranks * tokens / step_s,
        tpot_s=in_flight * step_s / kept,
        ttft_s=steps.mean_of_starts(predicted.time_s) * steps.chunks * in_flight,
        step_s=step_s,
        pass_share=steps.mean(predicted.gpu_s) / step_s,
        bubble_share=bubble_s / step_s,
        prefill_share=steps.mean(predicted.phases["prefill"]) / step_j,
        components_j={
            name: (steps.mean(joules) + (bubble_j if name == "static" else 0.0)) / tokens
            for name, joules in predicted.components.items()
            if joules.any()
        },
        steps=steps,
    )


def speed(model: EnergyModel, sizes: Array, full: Steady, output_tokens: float) -> Speed:
    """A server at 1 .. sizes[-1] requests, from closed queues of `sizes` requests (see `station`): a data-parallel
    rank, or all that step together, with an even share of the requests each."""
    servers = model.servers
    return station(
        sizes,
        full.tokens_per_s / (servers * output_tokens),
        full.power_w / servers,
        full.tpot_s,
        full.ttft_s,
        model.idle_power_w / servers,
        float(full.pass_share[0]),
    )


def lengths_of(
    model: EnergyModel, prompts: Array, outputs: Array, hit_rate: float | None, context: float | None = None
) -> tuple[Lengths, frozenset[str]]:
    """Lengths of samples; of prompts, if nobody says how much of them the prefix cache spares, what chat traffic leaves
    to compute. And the model's flags, with what was assumed."""
    if hit_rate is None:
        lengths = Lengths.of(prompts, outputs, CHAT_HIT_RATE, context, CHAT_SPREAD)
        return lengths, model.flags | {"prefix_hits_assumed"}
    if not 0 <= hit_rate < 1:
        raise EnergyLensError(f"prefix_cache_hit_rate: {hit_rate!r}; accepted: 0 up to, not including, 1")
    return Lengths.of(prompts, outputs, hit_rate, context, log_std(prompts)), model.flags


def log_std(values: Array) -> float:
    """Standard deviation of the logarithm of what is lognormal with the mean and variance of `values`."""
    return float(np.sqrt(np.log1p(values.var() / values.mean() ** 2)))


def samples(name: str, values: npt.ArrayLike) -> Array:
    """A number, or samples, as an array. Raises EnergyLensError for anything below 1."""
    try:
        given = np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError):
        raise EnergyLensError(f"{name}: {values!r} is neither a number nor samples of numbers") from None
    if not given.size or not np.all(np.isfinite(given)) or given.min() < 1:
        raise EnergyLensError(f"{name}: {values!r}; accepted: 1 or more tokens, or samples of that")
    return given
