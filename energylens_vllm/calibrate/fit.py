"""Fit coefficients of a profile to measurements: least squares on logarithms, held near what is known already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from energylens_vllm.energy.batch import Array
from energylens_vllm.hardware.profile import GpuProfile

#: A residual of one prior standard deviation weighs as much as a relative error of this.
PRIOR_WEIGHT = 0.02
#: Relative errors beyond this count less than quadratically: one odd window does not bend the fit.
ROBUST_SCALE = 0.05


def fit(
    profile: GpuProfile, free: Mapping[str, float], residuals: Callable[[GpuProfile], Array], source: str
) -> GpuProfile:
    """The profile with the coefficients `free` fitted, each with a relative standard deviation of its prior, which is
    its value in `profile`.

    `residuals` gives relative errors (log(predicted / measured)) of any shape (N,). A coefficient's new `std` is what
    the fit leaves of it: from the curvature at the optimum and the scatter of the residuals. Needs scipy.
    """
    from scipy.optimize import least_squares

    names = list(free)
    start = np.log([profile[name] for name in names])
    spread = np.array([free[name] for name in names])

    def at(x: Array) -> GpuProfile:
        return profile.with_values(dict(zip(names, np.exp(start + spread * x), strict=True)), source)

    def errors(x: Array) -> Array:
        return np.concatenate([PRIOR_WEIGHT * x, residuals(at(x))])

    found = least_squares(
        errors, np.zeros(len(names)), loss="soft_l1", f_scale=ROBUST_SCALE, diff_step=1e-3, max_nfev=40
    )
    scatter = max(2 * found.cost / max(len(found.fun) - len(names), 1), 1e-12)
    covariance = scatter * np.linalg.pinv(found.jac.T @ found.jac)
    left = np.sqrt(np.diag(covariance)) * spread
    fitted = at(found.x)
    coefficients = dict(fitted.coefficients)
    for name, std in zip(names, left, strict=True):
        coefficients[name] = replace(coefficients[name], std=round(float(min(std, free[name])), 4))
    return replace(fitted, coefficients=coefficients)
