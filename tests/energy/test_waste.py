"""Energy that ranks burn waiting for the one with the hottest experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from energylens_vllm.energy import Deployment, DualBatch, EnergyModel, Overlap, StepPrediction
from energylens_vllm.errors import EnergyLensError


def step(
    routing: str, gpus: int = 8, model: str = "qwen3-30b-a3b", parallel: bool = True, batch: int = 512
) -> StepPrediction:
    deployment = Deployment(
        gpu="H200-SXM", tensor_parallel_size=gpus, enable_expert_parallel=parallel, expert_routing=routing
    )
    return EnergyModel(model, deployment).step([(1, 500)] * batch)


def test_waste_grows_with_skew() -> None:
    even, some, much = (step(routing) for routing in ("uniform", "zipf:0.5", "zipf:1.0"))
    assert 0 <= even.waste_j < some.waste_j < much.waste_j
    assert even.waste_j < 0.02 * even.energy_j  # chance alone
    assert much.waste_j < much.components["static"]
    assert much.time_s > even.time_s


@pytest.mark.parametrize(
    ("routing", "gpus", "model"),
    [("zipf:1.0", 1, "qwen3-30b-a3b"), ("zipf:1.0", 4, "qwen3-30b-a3b"), ("uniform", 8, "llama-3.1-70b")],
)
def test_nobody_waits_where_all_gpus_have_all_experts_or_none(routing: str, gpus: int, model: str) -> None:
    assert step(routing, gpus, model, parallel=False).waste_j == 0


def test_waiting_that_the_host_hides_is_no_waste() -> None:
    """A long prompt runs without CUDA graphs: the host is behind, balanced or not."""
    deployment = Deployment(gpu="H200-SXM", tensor_parallel_size=8, enable_expert_parallel=True)
    even, uneven = (
        EnergyModel("qwen3-30b-a3b", replace(deployment, expert_routing=routing)).step([(1024, 0)])
        for routing in ("uniform", "zipf:1.0")
    )
    assert even.time_s == uneven.time_s
    assert uneven.waste_j == 0


def test_balancing_lowers_waste_and_copies_have_their_price() -> None:
    def balanced(**given: Any) -> StepPrediction:
        deployment = Deployment(
            gpu="H200-SXM", tensor_parallel_size=8, enable_expert_parallel=True, expert_routing="zipf:1.0", **given
        )
        return EnergyModel("qwen3-235b-a22b", deployment).step([(1, 500)] * 512)

    plain, placed = balanced(), balanced(enable_eplb=True)
    copied = balanced(enable_eplb=True, num_redundant_experts=32)
    assert plain.waste_j > placed.waste_j > copied.waste_j
    assert plain.time_s > placed.time_s
    assert plain.energy_j > placed.energy_j
    # All experts are awake in such a step, and copies are weights to read like others: more than balance spares.
    assert copied.components["weights"] > 1.05 * placed.components["weights"]
    assert copied.energy_j > plain.energy_j


def test_padding_is_what_the_fused_kernel_adds_to_the_rows() -> None:
    """One token on one GPU: its 8 experts take a tile of 16 rows each, 15 of them empty, at a share of a full one's."""
    model = EnergyModel("qwen3-30b-a3b", Deployment(gpu="H200-SXM"))
    share = model.profile["experts.padding_energy_share"]
    one = model.step([(1, 500)])
    assert one.padding_j / one.components["experts"] == pytest.approx(15 * share / (1 + 15 * share), rel=1e-6)
    full = model.step([(8192, 0)])
    assert 0 < full.padding_j < 0.1 * full.components["experts"]
    assert EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM")).step([(1, 500)]).padding_j == 0


def test_overlapped_steps_tell_padding_too() -> None:
    deployment = Deployment(gpu="H100-SXM", data_parallel_size=8, enable_expert_parallel=True)

    def padding_j(requests: int, overlap: Overlap | DualBatch | None = None) -> float:
        return EnergyModel("qwen3-30b-a3b", deployment, overlap=overlap).step([(1, 500)] * requests).padding_j

    halves = padding_j(512, DualBatch(decode_token_threshold=1))
    assert halves == pytest.approx(2 * padding_j(256), rel=0.05)
    assert halves > 1.5 * padding_j(512)
    assert padding_j(512, Overlap(stages=1, sms=1)) == pytest.approx(padding_j(512), rel=0.05)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"num_redundant_experts": -1}, "num_redundant_experts: -1"),
        ({"num_redundant_experts": 8}, "needs enable_eplb"),
        ({"enable_eplb": True}, "enable_eplb: needs enable_expert_parallel"),
    ],
)
def test_balancing_that_is_none_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(EnergyLensError, match=problem):
        Deployment(**given)


@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3", "llama-4-maverick"])
def test_counts_are_of_each_expert_layer_or_of_all_alike(model: str) -> None:
    """DeepSeek-V3 has 3 dense layers before 58 with experts, Llama 4 Maverick every other of 48."""
    plain = EnergyModel(model)
    layers = {"qwen3-30b-a3b": 48, "deepseek-v3": 58, "llama-4-maverick": 24}[model]
    experts = next(kernel.experts.total for kernel in plain.kernels if kernel.experts)
    uniform = plain.step([(1, 100)]).energy_j
    for rows in (1, layers):
        assert plain.with_expert_counts(np.ones((rows, experts))).step([(1, 100)]).energy_j == pytest.approx(uniform)
    with pytest.raises(EnergyLensError, match=rf"counts {layers - 1} layers, the model has {layers} with experts"):
        plain.with_expert_counts(np.ones((layers - 1, experts))).step([(1, 100)])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"expert_routing": "/nope"}, "expert_routing: '/nope' is for .* Llama-3.1-8B has none; accepted: 'uniform'"),
        ({"enable_eplb": True, "enable_expert_parallel": True}, "enable_eplb: True is for networks with experts"),
        ({"all2all_backend": "deepep_low_latency"}, "all2all_backend: 'deepep_low_latency' is for networks with"),
        (
            {"enable_dbo": True, "all2all_backend": "deepep_low_latency"},
            "all2all_backend: 'deepep_low_latency' is for networks with",
        ),
    ],
)
def test_what_is_for_experts_is_refused_without(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(EnergyLensError, match=problem):
        EnergyModel("llama-3.1-8b", Deployment(**given))


def test_data_parallel_ranks_all_wait() -> None:
    def waste(ranks: int) -> float:
        deployment = Deployment(
            gpu="H200-SXM", data_parallel_size=ranks, enable_expert_parallel=ranks > 1, expert_routing="zipf:1.0"
        )
        prediction = EnergyModel("qwen3-30b-a3b", deployment)
        found = prediction.step([(1, 500)] * 256 * ranks)
        return found.waste_j / prediction.idle_power_w

    assert waste(1) == 0
    assert waste(4) > 0
