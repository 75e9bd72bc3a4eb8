"""Which choices no other one beats in every respect."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy.batch import Array


def pareto_front(cost: Array, latency: Array, gpus: Array) -> npt.NDArray[np.bool_]:
    """True for each of N points that no other point equals or beats in all three and beats in one. Shapes (N,), lower
    is better. Of points that are alike in all three, the first is kept."""
    front = np.zeros(len(cost), dtype=bool)
    best_latency = np.empty(0)  # of the front among fewer GPUs, by ascending cost
    best_cost = np.empty(0)
    for count in np.unique(gpus):
        here = np.flatnonzero(gpus == count)
        here = here[np.lexsort((latency[here], cost[here]))]
        # Latency must fall below that of everything cheaper, on as many GPUs and on fewer.
        before = np.concatenate([[np.inf], np.minimum.accumulate(latency[here])[:-1]])
        cheaper = np.searchsorted(best_cost, cost[here], side="right")
        fewer = np.concatenate([[np.inf], best_latency])[cheaper]
        kept = here[(latency[here] < before) & (latency[here] < fewer)]
        front[kept] = True
        cost_all = np.concatenate([best_cost, cost[kept]])
        latency_all = np.concatenate([best_latency, latency[kept]])
        order = np.argsort(cost_all, kind="stable")
        best_cost, best_latency = cost_all[order], np.minimum.accumulate(latency_all[order])
    return front
