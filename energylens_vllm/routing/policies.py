"""Policies of the simulator: what gateways do today, and ours. Each is `choose(state, arrival) -> replica`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from energylens_vllm.errors import unknown
from energylens_vllm.routing.engine import Engine
from energylens_vllm.routing.expected import ExpectedOutput
from energylens_vllm.routing.policy import DEFAULT, Config, Request, Snapshots, rank
from energylens_vllm.routing.table import StepTable
from energylens_vllm.routing.trace import Arrival

Choose = Callable[[Arrival, float], int]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a policy may look at: engines' live state, what is believed of them, targets."""

    engines: Sequence[Engine]
    beliefs: Sequence[StepTable]
    ttft_s: float
    tpot_s: float
    seed: int = 0


def round_robin(setting: Setting) -> Choose:
    turn = -1

    def choose(arrival: Arrival, now: float) -> int:
        nonlocal turn
        turn = (turn + 1) % len(setting.engines)
        return turn

    return choose


def at_random(setting: Setting) -> Choose:
    draw = random.Random(setting.seed)
    return lambda arrival, now: draw.randrange(len(setting.engines))


def _held(engine: Engine) -> int:
    return engine.running + len(engine.waiting)


def power_of_two(setting: Setting) -> Choose:
    draw, engines = random.Random(setting.seed), setting.engines
    several = range(len(engines))
    return lambda arrival, now: min(draw.sample(several, min(2, len(several))), key=lambda i: _held(engines[i]))


def least_request(setting: Setting) -> Choose:
    """Fewest requests; ties at random, as gateways break them."""
    draw, engines = random.Random(setting.seed), setting.engines
    return lambda arrival, now: min(range(len(engines)), key=lambda i: (_held(engines[i]), draw.random()))


def prefix_aware(setting: Setting) -> Choose:
    """The replica that has most of the prompt cached, unless it holds far more requests than the least (as SGLang's
    and Ray's routers balance: beyond 1.5 times and 32 more); without a match, least request."""
    engines, spread = setting.engines, least_request(setting)

    def choose(arrival: Arrival, now: float) -> int:
        hits = [engine.cached_tokens(arrival) for engine in engines] if arrival.prefix else [0]
        held = [_held(engine) for engine in engines]
        if max(held) > 32 + min(held) and max(held) > 1.5 * min(held):
            return spread(arrival, now)
        if max(hits) > 0.1 * arrival.prompt_tokens:
            return max(range(len(engines)), key=lambda i: (hits[i], -held[i]))
        return spread(arrival, now)

    return choose


#: Requests that fill-first puts on a replica before it opens the next.
FILL = 64


def pack(setting: Setting) -> Choose:
    """Fill first: the fullest replica that holds fewer than FILL requests; if all are full, the least."""
    engines = setting.engines

    def choose(arrival: Arrival, now: float) -> int:
        held = [_held(engine) for engine in engines]
        room = [i for i in range(len(engines)) if held[i] < FILL]
        return max(room, key=lambda i: (held[i], -i)) if room else min(range(len(engines)), key=held.__getitem__)

    return choose


def llm_d(setting: Setting) -> Choose:
    """llm-d's default weights: queue 2, KV cache use 2, prefix 3, each scored from 0 to 1 over the replicas."""
    engines, draw = setting.engines, random.Random(setting.seed)

    def choose(arrival: Arrival, now: float) -> int:
        waiting = [len(engine.waiting) for engine in engines]
        low, high = min(waiting), max(waiting)
        best, chosen = -1.0, 0
        for i, engine in enumerate(engines):
            queue = 1.0 if high == low else (high - waiting[i]) / (high - low)
            free = 1 - engine.kv_tokens_used / engine.table.kv_tokens
            hit = engine.cached_tokens(arrival) / arrival.prompt_tokens if arrival.prefix else 0.0
            score = 2 * queue + 2 * free + 3 * hit + 1e-6 * draw.random()
            if score > best:
                best, chosen = score, i
        return chosen

    return choose


#: Weight of each look at a replica's decode steps in what is learnt of its speed.
LEARNING = 0.05


def energy(setting: Setting, config: Config = DEFAULT) -> Choose:
    """Ours: `rank` with live state, believed step tables, what is learnt of output lengths from the requests that have
    ended, and how long decode steps took over what was predicted for them."""
    engines = setting.engines
    snapshots = Snapshots.empty(setting.beliefs)
    previous, expected = -1, ExpectedOutput()
    seen = [0] * len(engines)
    cached = np.zeros(len(engines))
    readers = [belief.reader() for belief in setting.beliefs]
    order, prompts = -1, 0.0

    def choose(arrival: Arrival, now: float) -> int:
        nonlocal previous, order, prompts
        for i, engine in enumerate(engines):
            n = len(engine.members)
            snapshots.running[i] = _held(engine)
            snapshots.waiting_tokens[i] = engine.waiting_tokens
            snapshots.kv_tokens_used[i] = engine.kv_tokens_used
            snapshots.mean_context[i] = engine.context / n + engine.count if n else 0.0
            snapshots.prefill_tokens_per_s[i] = engine.prefill_rate(now)
            if arrival.prefix:
                cached[i] = engine.cached_tokens(arrival)
            for job in engine.finished[seen[i] :]:
                expected.learn(job.arrival.prompt_tokens, job.arrival.output_tokens)
            seen[i] = len(engine.finished)
            event = engine.event
            # What the plugin measures of a step.
            if n and event is not None and event.decodes == n and not event.chunks:
                ratio = event.step_s / readers[i].decode(n, engine.context / n + engine.count)[0]
                snapshots.time_factor[i] += LEARNING * (ratio - snapshots.time_factor[i])
        prompts += arrival.prompt_tokens - (cached.max() if arrival.prefix else 0.0)
        request = Request(
            arrival.prompt_tokens,
            expected.tokens(arrival.prompt_tokens),
            cached,
            setting.ttft_s,
            setting.tpot_s,
            typical_prompt_tokens=prompts / (order + 2),
            short_output=expected.short,
            previous=previous,
        )
        ranking = rank(snapshots, request, config)
        chosen = ranking.best
        assert chosen is not None
        previous, order = chosen, order + 1
        return chosen

    return choose


POLICIES: dict[str, Callable[[Setting], Choose]] = {
    "round-robin": round_robin,
    "random": at_random,
    "power-of-two": power_of_two,
    "least-request": least_request,
    "prefix-aware": prefix_aware,
    "pack": pack,
    "llm-d": llm_d,
    "energy": energy,
}


def policy(name: str) -> Callable[[Setting], Choose]:
    """A policy by name. Raises EnergyLensError with the near match."""
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES)
    return POLICIES[name]
