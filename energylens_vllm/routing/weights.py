"""How requests should be shared among replicas, for a balancer that takes weights: what the policy would do with the
requests of the next moments, one after the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from energylens_vllm.routing.policy import FEASIBLE, INFEASIBLE, Config, Request, Snapshots, rank

#: Requests that are placed for a look at where they go: fewer would give weights in coarse steps, more cost time.
FEWEST, MOST = 8, 64


def shares(
    snapshots: Snapshots, request: Request, count: float, config: Config, seconds: float = 2.0
) -> list[float] | None:
    """The share of each replica of `count` requests like `request` that come within `seconds`; None if nothing is known
    of any of them.

    Each request is placed beside those before it, so a replica gets no more than the latency targets bear. Their
    prompts come one after the other, so they take a part of its time and do not wait all at once. `snapshots` is not
    changed.
    """
    ahead = replace(
        snapshots,
        running=snapshots.running.copy(),
        prefill_tokens_per_s=snapshots.prefill_tokens_per_s.copy(),
        kv_tokens_used=snapshots.kv_tokens_used.copy(),
    )
    number = int(min(max(round(count), FEWEST), MOST))
    each = max(count, 1.0) / number  # requests that one placed stands for
    placed = np.zeros(len(snapshots.fleet))
    previous = -1
    for _ in range(number):
        ranking = rank(ahead, replace(request, previous=previous), config)
        best = ranking.best
        if ranking.fallback or best is None or ranking.state[best] not in (FEASIBLE, INFEASIBLE):
            break
        placed[best] += 1
        ahead.running[best] += each
        ahead.prefill_tokens_per_s[best] += each * request.prompt_tokens / seconds
        ahead.kv_tokens_used[best] += each * request.prompt_tokens
        previous = best
    total = float(placed.sum())
    return [float(n) / total for n in placed] if total else None
