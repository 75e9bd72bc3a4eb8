"""Open arrivals: requests come at a rate, at random, and the server is as busy as that makes it.

Poisson arrivals at rate r. A server that holds n requests completes mu(n) of them a second, the throughput of a closed
queue of n; beyond the batch limit M requests wait in line. The number in it then has the product form

    p(n) ~ r^n / (mu(1) mu(2) .. mu(n)),     mu(n) = mu(M) for n > M

(`station`; exact for processor sharing, whatever the lengths, while none waits in line). p(0) is the time in which GPUs
idle, at the power of an engine that waits. A data-parallel rank is a server of its own, which takes its share of the
requests. Ranks that share experts are one: they step together as long as any of them has a request (vLLM's ranks
without one run dummy batches), and idle together. Arrivals find the server in p(n), too, so percentiles are over draws
of n, of lengths, and of what else happens:

time to first token   the rest of the step under way; with asynchronous scheduling the next one, which is scheduled
                      already; the line, beyond M, shorter the more alike requests are (by (1 + c^2) / 2 with
                      their outputs' variation c: Allen and Cunneen's approximation of M/G/m); then as many steps as
                      prompt tokens in front and its own take
time per output token mean step time over a request's life, in which n moves: with a correlation that falls as
                      exp(-t / life) its mean over a life has the share 2 / e of n's variance; and the steps with
                      prefills that happen to fall in it

Draws are of a fixed seed: the same load gives the same figures. `tests/energy/test_queueing.py` compares with a
simulation of every step (`arrivals.simulate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy.batch import Array, steps_of_mixtures
from energylens_vllm.energy.serving import Lengths, lengths_of, samples, speed, steady
from energylens_vllm.energy.station import Speed, arrivals, interpolated, log_weights
from energylens_vllm.errors import EnergyLensError

if TYPE_CHECKING:
    from energylens_vllm.energy.model import EnergyModel

#: Percentiles of latencies that are given.
PERCENTILES = (50, 90, 95, 99)
#: Numbers of requests whose steps are predicted; those between are interpolated.
GRID = 24
DRAWS = 8192


@dataclass(frozen=True, slots=True)
class OpenServing:
    """Means over time and percentiles over requests, of the whole deployment. `ttft_s` and `tpot_s` are by
    percentile (50, 90, 95, 99)."""

    rate_per_s: float
    energy_per_output_token_j: float  #: idle time included
    energy_per_request_j: float
    power_w: float
    idle_power_w: float  #: while no request is served
    utilisation: float  #: share of the time in which requests are served
    running: float  #: requests in a batch, mean
    waiting_share: float  #: requests that find a full batch
    mean_ttft_s: float
    mean_tpot_s: float
    ttft_s: Mapping[int, float]
    tpot_s: Mapping[int, float]
    flags: frozenset[str]


def serve_openly(
    model: EnergyModel,
    rate_per_s: float,
    prompt_tokens: npt.ArrayLike,
    output_tokens: npt.ArrayLike,
    prefix_cache_hit_rate: float | None = None,
) -> OpenServing:
    """See `EnergyModel.open_serving`."""
    prompts, outputs = samples("prompt_tokens", prompt_tokens), samples("output_tokens", output_tokens)
    if not (isinstance(rate_per_s, int | float) and math.isfinite(rate_per_s) and rate_per_s > 0):
        raise EnergyLensError(f"rate_per_s: {rate_per_s!r} is not a positive number of requests a second")
    lengths, flags = lengths_of(model, prompts, outputs, prefix_cache_hit_rate)
    servers = model.servers
    server = _Server.of(model, lengths)
    rate = rate_per_s / servers
    full = float(server.speed.completions_per_s[-1])
    if rate >= full:
        raise EnergyLensError(
            f"rate_per_s: {rate_per_s:g}; accepted: less than {servers * full:.4g}, which a "
            f"batch of {model.deployment.max_num_seqs} requests completes"
        )
    seen = arrivals(server.speed, np.array([rate]), np.array([server.most]))
    power_w = servers * float(seen.power_w[0, 0])
    held, chance = _occupancy(server.speed.completions_per_s, rate)
    chats = prefix_cache_hit_rate is None
    uncached = lengths.uncached * (_lognormal(lengths.spread) if chats else prompts / lengths.prompt)
    draws = _Draws.of(held, chance)
    variation = float(outputs.var() / outputs.mean() ** 2)
    ttft_s = draws.first_token_s(model, server, rate, lengths, uncached, variation)
    tpot_s = draws.token_s(server, outputs, held, chance)
    return OpenServing(
        rate_per_s=float(rate_per_s),
        energy_per_output_token_j=power_w / (rate_per_s * lengths.output),
        energy_per_request_j=power_w / rate_per_s,
        power_w=power_w,
        idle_power_w=model.idle_power_w,
        utilisation=1 - float(seen.idle_share[0, 0]),
        running=servers * float(seen.running[0, 0]),
        waiting_share=float(seen.waiting_share[0, 0]),
        mean_ttft_s=float(ttft_s.mean()),
        mean_tpot_s=float(tpot_s.mean()),
        ttft_s=percentiles(ttft_s),
        tpot_s=percentiles(tpot_s),
        flags=flags,
    )


def percentiles(values: Array) -> dict[int, float]:
    return dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True))


@cache
def _lognormal(spread: float) -> Array:
    """Quantiles, as many as draws, of mean 1."""
    normal = NormalDist()
    drawn = np.exp(spread * np.array([normal.inv_cdf((i + 0.5) / DRAWS) for i in range(DRAWS)]))
    return np.asarray(drawn / drawn.mean())


@dataclass(frozen=True, slots=True)
class _Server:
    """What steps by itself, with n = 1 .. M requests: a data-parallel rank, or all that share experts. Arrays of shape
    (M,), but for `sizes` and `decode_s`, which are of shape (N,)."""

    speed: Speed
    step_variance: Array
    sizes: Array
    decode_s: Array  #: between a request's tokens while no prompt starts, at `sizes`
    ranks: int
    stages: int

    @classmethod
    def of(cls, model: EnergyModel, lengths: Lengths) -> _Server:
        limit, stages = model.deployment.max_num_seqs, model.deployment.pipeline_parallel_size
        ranks = model.lockstep_ranks
        most = ranks * limit
        reach = max(most, stages)  # with a limit below the stages, some are empty at all times
        sizes = np.unique(np.geomspace(stages, reach, GRID).round())
        full = steady(model, sizes / ranks, model.deployment.max_num_batched_tokens, lengths)
        steps, time_s = full.steps, full.steps.predicted.time_s
        variance = steps.mean(time_s**2) - steps.mean(time_s) ** 2
        return cls(
            speed=speed(model, sizes, full, lengths.output).limited(most),
            step_variance=stages * interpolated(reach, sizes, np.maximum(variance, 1e-18))[:most],
            sizes=sizes,
            decode_s=stages * time_s[steps.starting == 0],
            ranks=ranks,
            stages=stages,
        )

    @property
    def most(self) -> int:
        """M."""
        return len(self.step_variance)

    @property
    def batches(self) -> int:
        """Over which requests are spread: one for each rank and stage."""
        return self.ranks * self.stages

    @property
    def step_s(self) -> Array:
        """Seconds between a request's tokens."""
        return self.speed.tpot_s


def _occupancy(completions_per_s: Array, rate: float) -> tuple[npt.NDArray[np.int64], Array]:
    """n = 0, 1, .. and their chances, up to where they no longer matter."""
    full = completions_per_s[-1]
    beyond = math.ceil(math.log(1e-9) / math.log(rate / full)) if rate < full else 0
    speeds = np.concatenate([completions_per_s, np.full(min(beyond, 200_000), full)])
    logs = np.concatenate([[0.0], log_weights(np.array([rate]), speeds)[0]])
    chance = np.exp(logs - logs.max())
    return np.arange(len(logs)), chance / chance.sum()


@dataclass(frozen=True, slots=True)
class _Draws:
    """What arrivals find: `held` requests, and how far the step under way has come."""

    held: npt.NDArray[np.int64]
    random: np.random.Generator

    @classmethod
    def of(cls, held: npt.NDArray[np.int64], chance: Array) -> _Draws:
        even = (np.arange(DRAWS) + 0.5) / DRAWS  # as many draws of each n as its chance says
        random = np.random.default_rng(0)
        found = held[np.minimum(np.searchsorted(np.cumsum(chance), even), len(held) - 1)]
        return cls(random.permutation(found), random)

    def first_token_s(
        self, model: EnergyModel, server: _Server, rate: float, lengths: Lengths, uncached: Array, variation: float
    ) -> Array:
        """Seconds from arrival to the first token of each draw, at `rate` requests a second to the server, `uncached`
        tokens of which are drawn from. `variation`: squared, of how long requests run. A step takes as long as that of
        the rank with most new tokens; that with the request's own prompt is taken for it."""
        random, count, most = self.random, len(self.held), server.most
        running = np.minimum(self.held, most)
        decoding = np.minimum(running, most - 1.0) / server.batches
        room = np.maximum(model.deployment.max_num_batched_tokens - decoding, 1.0)
        part, whole, rate_of_batch = lengths.uncached, lengths.prompt, rate / server.batches

        def step_s(new: Array) -> Array:
            """Of steps that prefill `new` tokens beside what runs."""
            steps = steps_of_mixtures(
                decoding, max(whole, 1.0), np.ceil(new / part), new, part, whole - part, model.masks
            )
            return model.predict(steps).time_s

        def prompts_of(mean: Array) -> Array:
            """Tokens of as many prompts as arrive while `mean` of them do."""
            number = random.poisson(mean)
            drawn = random.choice(uncached, (count, max(int(number.max()), 1)))
            total: Array = np.where(np.arange(drawn.shape[1]) < number[:, None], drawn, 0.0).sum(axis=1)
            return total

        busy = running > 0

        def usual() -> Array:
            """A step's seconds, with the prompts that came during one before it."""
            before_s = server.step_s[np.maximum(running, 1) - 1] / server.stages
            most_new = np.max([prompts_of(rate_of_batch * before_s) for _ in range(server.ranks)], axis=0)
            return np.where(busy, step_s(np.minimum(most_new, room)), 0.0)

        # A moment falls into long steps more often: of four, each is the one under way in proportion to its time.
        few = np.stack([usual() for _ in range(4)])
        chosen = (few.cumsum(axis=0) < random.random(count) * few.sum(axis=0)).sum(axis=0)
        under_way = few[np.minimum(chosen, 3), np.arange(count)]
        came = random.random(count)  # of the step under way, the part before the arrival
        # With asynchronous scheduling the next step is scheduled already, with what came during the one before.
        next_s = usual() * model.async_scheduling
        line = np.maximum(self.held - most + 1, 0)
        line_s = np.where(line > 0, random.gamma(np.maximum(line, 1)) / server.speed.completions_per_s[-1], 0.0)
        line_s *= (1 + variation) / 2
        in_front = prompts_of(rate_of_batch * under_way * came)
        behind = prompts_of(rate_of_batch * under_way * (1 - came))
        until = in_front + random.choice(uncached, count)
        steps = np.maximum(np.ceil(until / room), 1.0)
        last_s = step_s(np.clip(until + behind - (steps - 1) * room, 1.0, room))
        own_s = server.stages * ((steps - 1) * step_s(room) + last_s)
        return np.asarray((1 - came) * under_way + next_s + line_s + own_s)

    def token_s(self, server: _Server, outputs: Array, held: npt.NDArray[np.int64], chance: Array) -> Array:
        """Mean seconds between tokens of each draw."""
        most = server.most
        mean = float((chance * np.minimum(held, most)).sum()) + 1
        over_life = mean + math.sqrt(2 / math.e) * (np.minimum(self.held + 1, most) - mean)
        n = np.clip(over_life, 1, most)
        sizes = np.arange(1, most + 1)
        step_s = np.interp(n, sizes, server.step_s)
        tokens = np.maximum(self.random.choice(outputs, len(n)), 2.0)
        spread = np.sqrt(np.interp(n, sizes, server.step_variance) / tokens)
        fastest = np.interp(n, server.sizes, server.decode_s)
        return np.asarray(
            np.maximum(step_s + spread * self.random.standard_normal(len(n)), np.minimum(fastest, step_s))
        )
