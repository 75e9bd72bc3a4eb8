"""Steady serving: conservation, limits, and agreement with stepping through a queue."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyLensError, EnergyModel
from energylens_vllm.energy.serving import CHAT_HIT_RATE, spread_lengths

MODEL = EnergyModel("llama-3.1-8b")


def queue(
    concurrency: int, prompt: int, output: int, requests: int, budget: int = 8192
) -> tuple[float, float, float]:
    """(joules an output token, seconds a step, tokens a second) of running a closed queue step by step as vLLM
    schedules it, decodes first; the first and last requests are not counted."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.exponential(output, requests + concurrency).round(), 1).astype(int)
    waiting, running, done = list(lengths), [], 0
    energy_j = time_s = tokens = 0.0
    warm = concurrency
    while done < requests:
        while len(running) < concurrency and waiting:
            running.append([prompt, 0, waiting.pop()])  # prompt tokens left, context, output tokens left
        left, batch, produced = budget, [], 0
        for request in sorted(running, key=lambda r: r[0] > 0):
            new = min(request[0], left) if request[0] else 1
            if new > left or not new:
                continue
            batch.append((new, request[1]))
            left -= new
            request[1] += new
            request[0] = max(request[0] - new, 0) if request[0] else 0
            if not request[0]:
                request[2] -= 1
                produced += 1
        step = MODEL.step(batch)
        finished = [request for request in running if request[2] <= 0]
        running = [request for request in running if request[2] > 0]
        done += len(finished)
        if done > warm:
            energy_j, time_s, tokens = energy_j + step.energy_j, time_s + step.time_s, tokens + produced
    return energy_j / tokens, time_s, tokens / time_s


@pytest.mark.parametrize(("concurrency", "prompt", "output"), [(16, 500, 100), (64, 300, 60)])
def test_it_is_what_a_queue_settles_to(concurrency: int, prompt: int, output: int) -> None:
    rng = np.random.default_rng(0)
    samples = np.maximum(rng.exponential(output, 4000).round(), 1)
    load = MODEL.serving(concurrency, prompt, samples, prefix_cache_hit_rate=0.0)
    token_j, _, tokens_per_s = queue(concurrency, prompt, output, requests=8 * concurrency)
    assert load.energy_per_output_token_j == pytest.approx(token_j, rel=0.08)
    assert load.output_tokens_per_s == pytest.approx(tokens_per_s, rel=0.08)


def test_energies_and_rates_agree() -> None:
    load = MODEL.serving(concurrency=64, prompt_tokens=512, output_tokens=256)
    assert load.power_w == pytest.approx(load.energy_per_output_token_j * load.output_tokens_per_s)
    assert load.energy_per_request_j == pytest.approx(256 * load.energy_per_output_token_j)
    assert load.running == 64
    assert load.interval_j[0] < load.energy_per_output_token_j < load.interval_j[1]
    assert 0 < load.prefill_energy_share < 1


def test_cached_prefixes_spare_prefill() -> None:
    known = [MODEL.serving(64, 2000, 200, prefix_cache_hit_rate=rate) for rate in (0.0, 0.5, 0.9)]
    energies = [load.energy_per_output_token_j for load in known]
    assert energies == sorted(energies, reverse=True)
    assert all("prefix_hits_assumed" not in load.flags for load in known)
    assumed = MODEL.serving(64, 2000, 200)
    assert "prefix_hits_assumed" in assumed.flags
    assert energies[-1] < assumed.energy_per_output_token_j < energies[0]


def test_larger_batches_share_the_weights() -> None:
    loads = [MODEL.serving(n, 200, 500) for n in (1, 8, 64, 512)]
    energies = [load.energy_per_output_token_j for load in loads]
    assert energies == sorted(energies, reverse=True)
    latencies = [load.inter_token_latency_s for load in loads]
    assert latencies == sorted(latencies)


def test_context_can_be_given() -> None:
    short, long = (MODEL.serving(64, 500, 500, mean_context_tokens=c).energy_per_output_token_j for c in (700, 4000))
    assert short < long


def test_replicas_serve_twice_as_much() -> None:
    one = MODEL.serving(32, 500, 200)
    two = EnergyModel("llama-3.1-8b", Deployment(data_parallel_size=2)).serving(64, 500, 200)
    assert two.output_tokens_per_s == pytest.approx(2 * one.output_tokens_per_s)
    assert two.energy_per_output_token_j == pytest.approx(one.energy_per_output_token_j)
    assert two.power_w == pytest.approx(2 * one.power_w)


def test_a_request_alone_reads_the_weights_of_each_stage_once() -> None:
    """It passes the stages one after the other, while the others idle."""
    four = EnergyModel("llama-3.1-8b", Deployment(pipeline_parallel_size=4))
    one, alone = (model.serving(1, 500, 200, prefix_cache_hit_rate=0.0) for model in (MODEL, four))
    assert alone.inter_token_latency_s == pytest.approx(one.inter_token_latency_s, rel=0.2)
    above_idle = [
        load.energy_per_output_token_j - model.idle_power_w / load.output_tokens_per_s
        for model, load in ((MODEL, one), (four, alone))
    ]
    assert above_idle[1] == pytest.approx(above_idle[0], rel=0.1)
    assert alone.power_w == pytest.approx(alone.energy_per_output_token_j * alone.output_tokens_per_s)
    assert alone.interval_j[0] < alone.energy_per_output_token_j < alone.interval_j[1]


def test_full_stages_take_up_where_empty_ones_end() -> None:
    four = EnergyModel("llama-3.1-70b", Deployment(tensor_parallel_size=2, pipeline_parallel_size=4))
    below, at, above = (four.serving(n, 500, 200) for n in (3.999, 4, 4.001))
    for name in ("energy_per_output_token_j", "power_w", "output_tokens_per_s", "inter_token_latency_s"):
        assert getattr(below, name) == pytest.approx(getattr(at, name), rel=1e-3)
        assert getattr(above, name) == pytest.approx(getattr(at, name), rel=1e-3)


def test_a_request_that_is_hardly_ever_there_leaves_idle_power() -> None:
    rare = MODEL.serving(1e-6, 500, 200)
    assert rare.power_w == pytest.approx(MODEL.idle_power_w, rel=1e-4)
    assert rare.output_tokens_per_s == pytest.approx(1e-6 * MODEL.serving(1, 500, 200).output_tokens_per_s)


def test_ranks_that_share_experts_step_together_for_one_request() -> None:
    """Each reads the weights of its layers, with a request or without."""
    sharing = EnergyModel("qwen3-30b-a3b", Deployment(data_parallel_size=4, enable_expert_parallel=True))
    dense = EnergyModel("llama-3.1-8b", Deployment(data_parallel_size=4))
    for model, least in ((sharing, 1), (dense, 4)):
        idle_w, all_busy_w = model.idle_power_w, model.serving(least, 500, 200).power_w
        share = (model.serving(least / 2, 500, 200).power_w - idle_w) / (all_busy_w - idle_w)
        assert share == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean_context_tokens": 0}, "mean_context_tokens: 0 is not a positive number of tokens"),
        ({"mean_context_tokens": -5}, "mean_context_tokens: -5"),
        ({"concurrency": "8"}, "concurrency: '8'"),
        ({"concurrency": 0}, "concurrency: 0"),
        ({"concurrency": float("nan")}, "concurrency: nan"),
        ({"prompt_tokens": -1}, "prompt_tokens: -1"),
        ({"output_tokens": []}, "output_tokens"),
        ({"output_tokens": "many"}, "output_tokens: 'many'"),
        ({"prefix_cache_hit_rate": 1.0}, "prefix_cache_hit_rate: 1.0"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"concurrency": 8, "prompt_tokens": 100, "output_tokens": 100}
    with pytest.raises(EnergyLensError, match=message):
        MODEL.serving(**(arguments | given))  # type: ignore[arg-type]


@pytest.mark.parametrize("spread", [0.3, 1.0, 1.7])
def test_lengths_taken_apart_keep_weights_tokens_and_prompts(spread: float) -> None:
    starting, weights = np.arange(6.0), np.array([0.3, 0.3, 0.2, 0.1, 0.06, 0.04])
    counts, shares, tokens = spread_lengths(starting, weights, 270.0, spread)
    assert shares.sum() == pytest.approx(1)
    assert shares @ counts == pytest.approx(weights @ starting)
    assert shares @ tokens == pytest.approx(270 * weights @ starting)
    assert np.all(tokens[counts == 0] == 0)


def test_parts_of_lengths_are_the_means_of_a_lognormal() -> None:
    draws = np.sort(np.random.default_rng(0).lognormal(-(1.2**2) / 2, 1.2, 400_000))
    _, shares, tokens = spread_lengths(np.array([1.0]), np.array([1.0]), 1.0, 1.2)
    parts = np.split(draws, [200_000, 320_000, 380_000])
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05])
    assert tokens == pytest.approx([part.mean() for part in parts], rel=0.03)


def test_short_prompts_of_chat_ride_along_in_graphs() -> None:
    """As many tokens in a few long prompts push fewer steps beyond the largest graph than in prompts of one length."""
    model = EnergyModel("qwen3-30b-a3b")
    chat = model.serving(256, 700, 900)
    even = model.serving(256, 700, 900, prefix_cache_hit_rate=CHAT_HIT_RATE)
    assert chat.inter_token_latency_s < even.inter_token_latency_s
    assert chat.energy_per_output_token_j == pytest.approx(even.energy_per_output_token_j, rel=0.1)
