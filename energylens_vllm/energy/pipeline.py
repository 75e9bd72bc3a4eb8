"""Bubbles: what steps of unequal length cost when several are in flight, or end together.

vLLM keeps as many batches in flight as there are stages, and each needs its own last tokens before it starts again: the
batches go round in a ring and none overtakes another. While the longest of them passes a stage, those behind it wait,
so a round takes as many of the longest as there are stages, and the mean time between steps' ends is that of the
longest of m steps rather than of one,

    E[max(t_1 .. t_m)] = sum over steps by ascending time of t (F(t)^m - F(before t)^m)

The test lets batches go round: within 3 % for 2 stages, 6 % for 4 and 13 % for 8, from above. Stages of unequal length
are in t already, which is the slowest stage's. Uniform steps, as pure decodes are, make no bubbles.

Data-parallel ranks that share experts exchange tokens in every layer, so a step of any takes as long as that of the
rank with most to do: with R ranks and m stages, the longest of R m steps, each as if all ranks had like batches.

A pipeline that is not full goes round faster where hosts are what holds a full one up (`partly`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from energylens_vllm.energy.batch import Array, Integers


def longest(time_s: Array, weights: Array, load: Integers, loads: int, stages: int) -> Array:
    """Mean of the longest of `stages` steps drawn from each load. Shapes (N,), N steps with their weights, which sum to
    1 in each load; `load` is ascending, 0 .. loads - 1. Returns shape (loads,)."""
    order = np.lexsort((time_s, load))
    below = np.cumsum(weights[order])
    at = load[order]
    whole = np.bincount(at, weights[order], loads)
    start = np.concatenate([[0.0], np.cumsum(whole)[:-1]])
    upto = np.clip(below - start[at], 0.0, 1.0)
    before = np.where(np.concatenate([[True], at[1:] != at[:-1]]), 0.0, np.concatenate([[0.0], upto[:-1]]))
    return np.asarray(np.bincount(at, time_s[order] * (upto**stages - before**stages), loads), dtype=np.float64)


def partly(batches: npt.ArrayLike, stages: int, pass_share: float) -> tuple[Array, Array]:
    """(length of a round, steps in a time) with 1 to `stages` batches in flight, over those of a full pipeline.

    A round takes a step's time for each batch, but no less than one batch needs to pass the GPUs of all stages, which
    is `pass_share` of a full round: hosts work on a batch's next step while GPUs pass it on.
    """
    full = np.asarray(batches, dtype=np.float64) / stages
    taken = np.maximum(full, pass_share)
    return taken, full / taken
