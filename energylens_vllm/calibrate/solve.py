"""Robust least squares in numpy: what calibrating a GPU needs, without scipy beside torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from energylens_vllm.energy.batch import Array

#: Steps in which the gradient is taken and the damping moves; and when an iteration's gain is too small to go on.
STEP, FASTER, SLOWER, ENOUGH = 1e-3, 0.3, 4.0, 1e-5
MOST_ITERATIONS = 60


class Solution(NamedTuple):
    """x of shape (K,), the residuals there (N,), their weights (N,) and derivatives (N, K)."""

    x: Array
    residuals: Array
    weights: Array
    jacobian: Array


def least_squares(residuals: Callable[[Array], Array], start: Array, scale: float) -> Solution:
    """The x that minimises the sum of 2 s^2 (sqrt(1 + (r / s)^2) - 1) over the residuals r, with s = `scale`: squares
    near 0, slopes beyond, so that one odd residual does not bend the rest (soft L1).

    Levenberg and Marquardt's method on reweighted residuals, derivatives by differences.
    """
    x = np.asarray(start, dtype=np.float64)
    at, damping = residuals(x), 1e-3
    cost = _cost(at, scale)
    jacobian = _derivatives(residuals, x, at)
    for _ in range(MOST_ITERATIONS):
        weights = 1 / np.sqrt(1 + (at / scale) ** 2)
        square = jacobian.T @ (weights[:, None] * jacobian)
        slope = jacobian.T @ (weights * at)
        step = np.linalg.solve(square + damping * np.diag(np.maximum(np.diag(square), 1e-12)), -slope)
        there = residuals(x + step)
        gain = cost - _cost(there, scale)
        if not gain > 0:
            damping *= SLOWER
            if damping > 1e8:
                break
            continue
        x, at, cost, damping = x + step, there, cost - gain, damping * FASTER
        jacobian = _derivatives(residuals, x, at)
        if gain < ENOUGH * cost:
            break
    return Solution(x, at, 1 / np.sqrt(1 + (at / scale) ** 2), jacobian)


def _cost(residuals: Array, scale: float) -> float:
    return float(np.sum(2 * scale**2 * (np.sqrt(1 + (residuals / scale) ** 2) - 1)))


def _derivatives(residuals: Callable[[Array], Array], x: Array, at: Array) -> Array:
    columns = [(residuals(x + STEP * unit) - at) / STEP for unit in np.eye(len(x))]
    return np.stack(columns, axis=1)
