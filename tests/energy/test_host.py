"""The host's time: added up in one process, side by side in several."""

from __future__ import annotations

import pytest

from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.hardware.profile import load_profile

PROFILE = load_profile("H100-SXM").at_release("0.25.1")
SLOW = PROFILE.with_values({"host.sequence_s": 1.0}, "a host so slow that nothing else counts")


def seconds(gpus: int, profile: object = SLOW) -> float:
    deployment = Deployment(gpu="H100-SXM", tensor_parallel_size=gpus, vllm_release="0.25.1")
    return EnergyModel("llama-3.1-8b", deployment, profile).step([(1, 100)] * 10).time_s  # type: ignore[arg-type]


def test_engine_and_worker_share_a_process_on_one_gpu() -> None:
    assert seconds(1) == pytest.approx(10.0, rel=0.01)


def test_the_slower_of_engine_and_worker_counts_on_several() -> None:
    share = max(PROFILE["host.engine_share"], 1 - PROFILE["host.engine_share"])
    assert seconds(2) == pytest.approx(10.0 * share, rel=0.01)
    assert seconds(2) == pytest.approx(seconds(4), rel=1e-3)
