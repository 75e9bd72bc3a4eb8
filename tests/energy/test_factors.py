"""Factors change what they name, in physical ways, and nothing that is compiled."""

from __future__ import annotations

import pytest

from energylens_vllm.einsum import block, build_cascade
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.factors import Factors

STEP = [(100, 0), (1, 100), (1, 1000)]
GROUP = {
    "static": "static",
    "host_gap": "static",
    "linear": "compute",
    "attention": "compute",
    "experts": "compute",
    "communication": "communication",
    "weights": "memory",
    "kv_cache": "memory",
    "activations": "memory",
}


@pytest.fixture(scope="module")
def model() -> EnergyModel:
    return EnergyModel("qwen3-30b-a3b", Deployment(gpu="H200-SXM", tensor_parallel_size=2))


def test_each_component_follows_its_factor(model: EnergyModel) -> None:
    factors = Factors(static=1.1, memory=0.9, compute=1.2, communication=0.8)
    before, after = model.step(STEP), model.with_factors(factors).step(STEP)
    for component, joules in before.components.items():
        assert after.components[component] == pytest.approx(joules * getattr(factors, GROUP[component]))
    assert sum(after.components.values()) == pytest.approx(after.energy_j)
    assert sum(after.phases.values()) == pytest.approx(after.energy_j)
    assert after.time_s == before.time_s  # far from the power limit


@pytest.mark.parametrize("stages", [1, 2])
def test_a_network_without_attention_follows_them_too(stages: int) -> None:
    layers = build_cascade(
        "layers", ranks={"t": "tokens", "d": 4096}, tensors={"quantized": "W"},
        blocks=[block("layer", {"linear": "X[t,d] = X[t,d] * W[d]"}, count=4)],
    )  # fmt: skip
    model = EnergyModel(layers, Deployment(gpu="H200-SXM", pipeline_parallel_size=stages))
    before, after = model.step(STEP), model.with_factors(Factors(compute=1.2)).step(STEP)
    assert after.components["linear"] == pytest.approx(1.2 * before.components["linear"])
    assert sum(after.phases.values()) == pytest.approx(after.energy_j)


def test_factors_replace_those_before_and_leave_the_model_alone(model: EnergyModel) -> None:
    before = model.step(STEP)
    changed = model.with_factors(Factors(static=1.3, memory=0.7, limit=0.5))
    assert changed.with_factors(Factors()).step(STEP) == before
    assert model.step(STEP) == before
    assert changed.idle_power_w == pytest.approx(1.3 * model.idle_power_w)


def test_at_the_power_limit_dearer_work_takes_longer_and_the_limit_holds() -> None:
    model = EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM"))
    prefill = [(8192, 0)]
    limit_w = model.profile["power.limit_w"] * model.profile["power.limit_share"]
    before, after = model.step(prefill), model.with_factors(Factors(compute=1.2)).step(prefill)
    lower = model.with_factors(Factors(limit=0.8)).step(prefill)
    assert before.power_w == pytest.approx(limit_w, rel=2e-3)
    assert after.power_w == pytest.approx(limit_w, rel=2e-3)
    assert after.time_s > 1.03 * before.time_s
    assert lower.power_w == pytest.approx(0.8 * limit_w, rel=2e-3)
