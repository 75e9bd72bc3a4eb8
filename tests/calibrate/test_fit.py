"""Fits: what is put in comes out, and errors that share an offset weigh as what they are."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm.calibrate.fit import SCATTER, fit, weigh_groups
from energylens_vllm.hardware.profile import GpuProfile, load_profile

BYTE, FLOP = "energy.memory_j_per_byte", "energy.bfloat16.j_per_flop"


def test_a_fit_finds_what_measurements_say() -> None:
    known = load_profile("H200-SXM")
    truth = known.with_values({BYTE: known[BYTE] * 1.3, FLOP: known[FLOP] * 0.8}, "made up")
    bytes_, flops = np.array([1e9, 4e9, 2e9, 5e8]), np.array([1e12, 2e11, 8e11, 3e12])

    def joules(profile: GpuProfile) -> np.ndarray:  # type: ignore[type-arg]
        return profile[BYTE] * bytes_ + profile[FLOP] * flops

    def residuals(trial: GpuProfile) -> np.ndarray:  # type: ignore[type-arg]
        return np.log(joules(trial) / joules(truth))

    free = {BYTE: 5.0, FLOP: 5.0}  # priors too wide to hold anything back
    fitted = fit(known, free, residuals, "a test")
    assert fitted[BYTE] == pytest.approx(truth[BYTE], rel=1e-3)
    assert fitted[FLOP] == pytest.approx(truth[FLOP], rel=1e-3)
    again = fit(known, free, residuals, "a test", near=[truth])
    assert again[BYTE] == pytest.approx(truth[BYTE], rel=1e-3)


def test_a_prior_holds_where_measurements_say_nothing() -> None:
    known = load_profile("H200-SXM")
    fitted = fit(known, {BYTE: 0.2}, lambda trial: np.zeros(3), "a test")
    assert fitted[BYTE] == pytest.approx(known[BYTE])
    assert fitted.coefficients[BYTE].std <= 0.2


def test_groups_without_offsets_are_left_alone() -> None:
    errors = np.array([0.02, -0.01, 0.04])
    assert weigh_groups(errors, ["a", "a", "b"], std=0.0) == pytest.approx(errors)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_groups_weigh_as_their_covariance_says(size: int) -> None:
    """r' C^-1 r of errors with a common offset: C = scatter^2 I + std^2 11'."""
    errors, std = np.random.default_rng(size).normal(0.03, 0.04, size), 0.06
    covariance = SCATTER**2 * np.eye(size) + std**2
    weighed = weigh_groups(errors, ["unit"] * size, std)
    assert weighed @ weighed / SCATTER**2 == pytest.approx(errors @ np.linalg.solve(covariance, errors))
