"""Fit coefficients of a profile to measurements: least squares on logarithms, held near what is known already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from energylens_vllm.energy.batch import Array
from energylens_vllm.hardware.profile import GpuProfile

#: A residual of one prior standard deviation weighs as much as a relative error of this.
PRIOR_WEIGHT = 0.02
#: Relative errors beyond this count less than quadratically: one odd window does not bend the fit.
ROBUST_SCALE = 0.05
#: Step of a coefficient, in prior standard deviations, over which slopes are taken: wide enough to see past the kinks
#: of whole tiles and the tolerance to which the clock is found.
SLOPE_STEP = 0.02
#: One relative standard deviation of what is left of a single error where the offset of its group is known.
SCATTER = 0.05


def weigh_groups(errors: Array, groups: Sequence[str], std: float) -> Array:
    """Relative errors of which those of a group share an offset of its own, of standard deviation `std`: weighed for a
    fit, so that the sum of squares is that of independent errors of `SCATTER`.

    GPUs of one kind differ by several percent in the joules that the same work takes. Errors measured on one of them
    are not independent then, and ten of them say little more of the kind's mean than one; what they say of each other
    counts in full (generalised least squares with a random intercept).
    """
    weighed: Array = errors.copy()
    names = np.asarray(groups)
    for name in np.unique(names):
        inside = names == name
        mean = errors[inside].mean()
        kept = 1 / np.sqrt(1 + inside.sum() * (std / SCATTER) ** 2)
        weighed[inside] = errors[inside] - mean + kept * mean
    return weighed


def fit(
    profile: GpuProfile,
    free: Mapping[str, float],
    residuals: Callable[[GpuProfile], Array],
    source: str,
    near: Sequence[GpuProfile] = (),
) -> GpuProfile:
    """The profile with the coefficients `free` fitted, each with a relative standard deviation of its prior, which is
    its value in `profile`.

    `residuals` gives relative errors (log(predicted / measured)) of any shape (N,). A coefficient's new `std` is what
    the fit leaves of it: from the curvature at the optimum and the scatter of the residuals. `near`: where searches
    start, of which the best one counts; `profile` if there are none. The optimum of like measurements saves most of the
    steps. Needs scipy.
    """
    from scipy.optimize import least_squares

    names = list(free)
    start = np.log([profile[name] for name in names])
    spread = np.array([free[name] for name in names])

    def at(x: Array) -> GpuProfile:
        return profile.with_values(dict(zip(names, np.exp(start + spread * x), strict=True)), source)

    def errors(x: Array) -> Array:
        return np.concatenate([PRIOR_WEIGHT * x, residuals(at(x))])

    def slopes(x: Array) -> Array:
        here = errors(x)
        steps = SLOPE_STEP * np.eye(len(names))
        return np.stack([(errors(x + step) - here) / SLOPE_STEP for step in steps], axis=1)

    searches = [
        least_squares(
            errors, (np.log([each[name] for name in names]) - start) / spread, jac=slopes, loss="soft_l1",
            f_scale=ROBUST_SCALE, ftol=1e-3, xtol=1e-3, max_nfev=20,
        )
        for each in near or (profile,)
    ]  # fmt: skip
    found = min(searches, key=lambda search: search.cost)
    scatter = max(2 * found.cost / max(len(found.fun) - len(names), 1), 1e-12)
    covariance = scatter * np.linalg.pinv(found.jac.T @ found.jac)
    left = np.sqrt(np.diag(covariance)) * spread
    fitted = at(found.x)
    coefficients = dict(fitted.coefficients)
    for name, std in zip(names, left, strict=True):
        coefficients[name] = replace(coefficients[name], std=round(float(min(std, free[name])), 4))
    return replace(fitted, coefficients=coefficients)
