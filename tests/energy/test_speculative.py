"""Speculative decoding: what a step yields, and when drafts pay."""

from __future__ import annotations

import pytest

from energylens_vllm.energy import Deployment, EnergyModel, ServingPrediction, Speculation
from energylens_vllm.errors import EnergyLensError

MODEL = EnergyModel("llama-3.1-70b", Deployment(gpu="H100-SXM", tensor_parallel_size=4))
DRAFT = EnergyModel("llama-3.2-1b", Deployment(gpu="H100-SXM", tensor_parallel_size=4))


def load(concurrency: float, speculation: Speculation | None = None) -> ServingPrediction:
    return MODEL.serving(concurrency, 500, 300, prefix_cache_hit_rate=0.0, speculation=speculation)


@pytest.mark.parametrize(("count", "rate", "tokens"), [(4, 0.0, 1.0), (4, 1.0, 5.0), (3, 0.5, 1.875), (1, 0.8, 1.8)])
def test_tokens_of_a_step(count: int, rate: float, tokens: float) -> None:
    assert Speculation(count, rate).tokens_per_step == pytest.approx(tokens)


def test_drafts_that_are_kept_spare_steps_of_few_requests() -> None:
    plain, drafted = load(4), load(4, Speculation(3, 0.8))
    gain = Speculation(3, 0.8).tokens_per_step
    assert drafted.inter_token_latency_s == pytest.approx(plain.inter_token_latency_s / gain, rel=0.15)
    assert drafted.energy_per_output_token_j < 0.5 * plain.energy_per_output_token_j
    assert drafted.output_tokens_per_s > 2 * plain.output_tokens_per_s


def test_drafts_that_are_never_kept_only_cost() -> None:
    plain, drafted = load(256), load(256, Speculation(4, 0.0))
    assert drafted.energy_per_output_token_j > 1.2 * plain.energy_per_output_token_j
    assert drafted.inter_token_latency_s > plain.inter_token_latency_s


def test_a_batch_that_fills_the_gpu_gains_less_than_a_small_one() -> None:
    drafts = Speculation(4, 0.6)

    def ratio(n: float) -> float:
        return load(n, drafts).energy_per_output_token_j / load(n).energy_per_output_token_j

    assert ratio(2) < ratio(64) < ratio(512)


def test_a_draft_model_costs_its_steps() -> None:
    free, drafted = load(8, Speculation(3, 0.7)), load(8, Speculation(3, 0.7, DRAFT))
    assert drafted.step_time_s > free.step_time_s
    assert drafted.energy_per_output_token_j > free.energy_per_output_token_j
    step = DRAFT.step([(1, 650)] * 8)
    assert drafted.step_time_s - free.step_time_s == pytest.approx(3 * step.time_s, rel=0.2)
    assert "acceptance_assumed" in drafted.flags


def test_refusals() -> None:
    with pytest.raises(EnergyLensError, match="num_speculative_tokens: 0"):
        Speculation(0, 0.5)
    with pytest.raises(EnergyLensError, match=r"acceptance_rate: 1\.5"):
        Speculation(2, 1.5)
    with pytest.raises(EnergyLensError, match="the draft model is on 1 GPUs"):
        load(8, Speculation(3, 0.7, EnergyModel("llama-3.2-1b", Deployment(gpu="H100-SXM"))))
