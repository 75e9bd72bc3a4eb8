"""A server as a queueing station: open arrivals at one whose speed depends on how many requests it holds.

Requests arrive at random (Poisson), run together as vLLM batches them, and wait in line beyond `max_num_seqs`. The
server is a processor-sharing station whose completion rate mu(n) is the throughput of a closed queue of n requests; the
number of requests in it has the product form

    p(n) ~ lambda^n / (mu(1) mu(2) .. mu(n)),     mu(n) = mu(M) for n > M

whatever the distribution of lengths while none waits (Baskett, Chandy, Muntz and Palacios, "Open, closed, and mixed
networks of queues with different classes of customers", J. ACM 22, 1975). p(0) is the time that GPUs idle. Means then
follow from Little's law. What is here does not know what makes the server as fast as it is: `queueing` asks for one
server and draws percentiles, `explore` for thousands of rates and batch limits at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from energylens_vllm.energy.batch import Array, Integers
from energylens_vllm.energy.pipeline import partly


@dataclass(frozen=True, slots=True)
class Speed:
    """A server that runs n = 1 .. N requests; every array has shape (N,)."""

    completions_per_s: Array
    power_w: Array
    tpot_s: Array
    ttft_s: Array  #: without waiting in line
    idle_w: float

    def limited(self, most: int) -> Speed:
        """The same server where no more than `most` requests run."""
        return replace(
            self,
            completions_per_s=self.completions_per_s[:most],
            power_w=self.power_w[:most],
            tpot_s=self.tpot_s[:most],
            ttft_s=self.ttft_s[:most],
        )


@dataclass(frozen=True, slots=True)
class Arrivals:
    """For R rates and B batch limits, means over time; arrays of shape (R, B). NaN where requests come faster than
    they complete."""

    power_w: Array
    tpot_s: Array
    ttft_s: Array
    running: Array
    idle_share: Array
    waiting_share: Array  #: requests that find a full batch and wait in line


def arrivals(speed: Speed, rate_per_s: Array, limits: Integers) -> Arrivals:
    """What servers of one speed do under each arrival rate (R,) with each batch limit (B,), 1 <= limit <= N."""
    n = np.arange(1, len(speed.completions_per_s) + 1)
    logs = log_weights(rate_per_s, speed.completions_per_s)  # (R, N)
    peak = np.maximum(logs.max(axis=1, keepdims=True), 0.0)
    weights, none = np.exp(logs - peak), np.exp(-peak)  # of n = 1 .. N, and of an empty server

    at = limits - 1
    full = speed.completions_per_s[at]  # (B,)
    load = rate_per_s[:, None] / full
    stable = load < 1
    load = np.where(stable, load, np.nan)
    last = weights[:, at]
    beyond = last * load / (1 - load)  # weight of all n above the limit

    def mean(values: Array) -> Array:
        """Of what a server in state n does; a full one does it in every state above, too."""
        total: Array = np.cumsum(weights * values, axis=1)[:, at] + beyond * values[at]
        return total

    total = none + np.cumsum(weights, axis=1)[:, at] + beyond
    in_line = last * load / (1 - load) ** 2 / total  # mean number that wait
    done = mean(speed.completions_per_s)
    return Arrivals(
        power_w=(none * speed.idle_w + mean(speed.power_w)) / total,
        tpot_s=mean(speed.completions_per_s * speed.tpot_s) / done,
        ttft_s=mean(speed.completions_per_s * speed.ttft_s) / done + in_line / rate_per_s[:, None],
        running=mean(n.astype(np.float64)) / total,
        idle_share=none / total,
        waiting_share=(last + beyond) / total,
    )


def log_weights(rate_per_s: Array, completions_per_s: Array) -> Array:
    """log(p(n) / p(0)) for n = 1 .. N, of shape (R, N) for R rates and speeds of shape (N,)."""
    n = np.arange(1, len(completions_per_s) + 1)
    logs: Array = np.multiply.outer(np.log(rate_per_s), n) - np.cumsum(np.log(completions_per_s))
    return logs


def station(
    sizes: Array, completions_per_s: Array, power_w: Array, tpot_s: Array, ttft_s: Array, idle_w: float,
    pass_share: float,
) -> Speed:  # fmt: skip
    """A server at 1 .. sizes[-1] requests, from closed queues of `sizes`: ascending, and the first as many as there are
    pipeline stages.

    Fewer requests than pipeline stages leave as many stages empty: completions and power above idle are in proportion
    (`partly`, of which `pass_share` is).
    """
    most, stages = int(sizes[-1]), int(sizes[0])
    taken, part = partly(np.minimum(np.arange(1, most + 1), stages), stages, pass_share)
    return Speed(
        completions_per_s=interpolated(most, sizes, completions_per_s) * part,
        power_w=idle_w + (interpolated(most, sizes, power_w) - idle_w) * part,
        tpot_s=interpolated(most, sizes, tpot_s) * taken,
        ttft_s=interpolated(most, sizes, ttft_s),
        idle_w=idle_w,
    )


def interpolated(limit: int, sizes: Array, values: Array) -> Array:
    """Values at 1 .. limit of a quantity known at `sizes` (ascending): by powers of n between them, and held below."""
    n = np.arange(1, limit + 1, dtype=np.float64)
    found: Array = np.exp(np.interp(np.log(n), np.log(sizes), np.log(values)))
    return found
