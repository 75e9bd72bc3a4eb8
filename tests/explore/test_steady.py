"""Many loads at once say what `EnergyModel.serving` says of each."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.explore.steady import steady

DEPLOYMENTS = [
    ("llama-3.1-8b", Deployment()),
    ("llama-3.1-70b", Deployment(tensor_parallel_size=2, pipeline_parallel_size=2, quantization="fp8")),
    ("qwen3-30b-a3b", Deployment(data_parallel_size=2, enable_expert_parallel=True)),
    ("gemma-2-9b", Deployment(kv_cache_dtype="fp8")),  # two masks
]


@pytest.mark.parametrize(("model", "deployment"), DEPLOYMENTS, ids=[name for name, _ in DEPLOYMENTS])
@pytest.mark.parametrize("hit_rate", [0.0, 0.4])
def test_each_load_is_what_serving_predicts(model: str, deployment: Deployment, hit_rate: float) -> None:
    running = np.array([2, 7, 64, 300, 900])
    one = EnergyModel(model, deployment)
    ranks = deployment.data_parallel_size
    found = steady(one, running, deployment.max_num_batched_tokens, 700, 250, hit_rate)
    for i, count in enumerate(running):
        expected = one.serving(int(count) * ranks, 700, 250, prefix_cache_hit_rate=hit_rate)
        assert found.token_j[i] == pytest.approx(expected.energy_per_output_token_j)
        assert (found.low_j[i], found.high_j[i]) == pytest.approx(expected.interval_j)
        assert found.power_w[i] == pytest.approx(expected.power_w)
        assert found.tokens_per_s[i] == pytest.approx(expected.output_tokens_per_s)
        assert found.tpot_s[i] == pytest.approx(expected.inter_token_latency_s)
        assert found.ttft_s[i] == pytest.approx(expected.time_to_first_token_s)


def test_budgets_are_those_of_each_load() -> None:
    budgets = [512, 2048, 16384]
    found = steady(EnergyModel("llama-3.1-8b"), 128, budgets, 3000, 100)
    for i, budget in enumerate(budgets):
        one = EnergyModel("llama-3.1-8b", Deployment(max_num_batched_tokens=budget))
        expected = one.serving(128, 3000, 100, prefix_cache_hit_rate=0.0)
        assert found.token_j[i] == pytest.approx(expected.energy_per_output_token_j)
        assert found.ttft_s[i] == pytest.approx(expected.time_to_first_token_s)
    assert found.ttft_s[0] > found.ttft_s[2], "a prompt of many chunks takes many steps"


def test_components_sum_to_the_energy() -> None:
    found = steady(EnergyModel("qwen3-30b-a3b"), [1, 32, 512], 8192, 500, 100)
    assert sum(found.components_j.values()) == pytest.approx(found.token_j)
