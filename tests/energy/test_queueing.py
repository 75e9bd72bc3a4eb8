"""Open arrivals: the closed form against a simulation of every step with the same step model, and the simulation
against steps taken by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from energylens_vllm.energy import Deployment, EnergyModel, arrivals
from energylens_vllm.energy.arrivals import Trace, poisson_trace, read_trace, simulate
from energylens_vllm.energy.batch import Array, steps_from_requests
from energylens_vllm.energy.serving import CHAT_HIT_RATE, CHAT_SPREAD
from energylens_vllm.errors import EnergyLensError


def lengths() -> tuple[Array, Array]:
    """Long-tailed, as chats are."""
    random = np.random.default_rng(1)
    prompts = np.clip(random.lognormal(np.log(500), 0.8, 2000), 8, 6000).round()
    return prompts, np.clip(random.lognormal(np.log(120), 0.7, 2000), 2, 1000).round()


@pytest.fixture(scope="module")
def model() -> EnergyModel:
    return EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM"))


@pytest.mark.parametrize(
    ("rate", "limit", "requests", "ttft"), [(1.0, 1024, 1000, 0.15), (8.0, 1024, 700, 0.3), (6.0, 8, 500, 0.5)]
)
def test_open_serving_agrees_with_a_simulation_of_each_step(
    rate: float, limit: int, requests: int, ttft: float
) -> None:
    """`ttft`: what the 99th percentile may be off; a queue that often waits in line (limit 8) is the hardest."""
    model = EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=limit))
    trace = poisson_trace(rate, *lengths(), requests=requests)
    simulated = simulate(model, trace)
    found = model.open_serving(simulated.rate_per_s, trace.prompt_tokens, trace.output_tokens, 0.0)
    assert found.power_w == pytest.approx(simulated.power_w, rel=0.05)
    assert found.energy_per_output_token_j == pytest.approx(simulated.energy_per_output_token_j, rel=0.05)
    assert found.utilisation == pytest.approx(simulated.utilisation, abs=0.04)
    assert found.mean_tpot_s == pytest.approx(simulated.mean_tpot_s, rel=0.08)
    assert found.tpot_s[50] == pytest.approx(simulated.tpot_s[50], rel=0.1)
    assert found.tpot_s[99] == pytest.approx(simulated.tpot_s[99], rel=0.2)
    assert found.ttft_s[50] == pytest.approx(simulated.ttft_s[50], rel=0.2)
    assert found.ttft_s[99] == pytest.approx(simulated.ttft_s[99], rel=ttft)


@pytest.mark.parametrize(("rate", "power", "tpot"), [(0.5, 0.02, 0.06), (5.0, 0.08, 0.06)])
def test_ranks_that_share_experts_step_together(rate: float, power: float, tpot: float) -> None:
    """One request keeps all of them busy, and the longest prompt of any rank all the others waiting."""
    model = EnergyModel("qwen3-30b-a3b", Deployment(gpu="H200-SXM", data_parallel_size=4, enable_expert_parallel=True))
    trace = poisson_trace(rate, np.array([700.0]), lengths()[1], requests=300)
    simulated = simulate(model, trace)
    found = model.open_serving(simulated.rate_per_s, 700, trace.output_tokens, 0.0)
    assert found.power_w == pytest.approx(simulated.power_w, rel=power)
    assert found.utilisation == pytest.approx(simulated.utilisation, abs=0.04)
    assert found.mean_tpot_s == pytest.approx(simulated.mean_tpot_s, rel=tpot)
    assert found.mean_ttft_s == pytest.approx(simulated.mean_ttft_s, rel=0.1)
    assert found.ttft_s[50] == pytest.approx(simulated.ttft_s[50], rel=0.05)


def test_ranks_idle_together_or_each_alone() -> None:
    """Four ranks with a request in a while: all are busy with it, or one of the four."""
    for name, busy in (("qwen3-30b-a3b", 4), ("llama-3.1-8b", 1)):
        one, four = (EnergyModel(name, Deployment(gpu="H200-SXM", data_parallel_size=ranks)) for ranks in (1, 4))
        utilised = [model.open_serving(0.001, 500, 100, 0.0).utilisation for model in (one, four)]
        assert 4 * utilised[1] == pytest.approx(busy * utilised[0], rel=0.15)


def test_a_request_of_one_rank_takes_all_that_share_its_experts_along() -> None:
    sharing = EnergyModel("qwen3-30b-a3b", Deployment(gpu="H200-SXM", data_parallel_size=2))
    run = simulate(sharing, Trace(*(np.array([float(value)]) for value in (0, 700, 3, 0))))
    batches = [[(700, 0)], [(1, 700)], [(1, 701)]]
    seconds = joules = 0.0
    for batch in batches:
        busy = sharing.predict(steps_from_requests(batch, sharing.masks))
        other = sharing.predict(steps_from_requests([(1, 0)], sharing.masks, [True]))
        seconds += float(busy.time_s[0])
        joules += float((busy.energy_j + other.energy_j + (busy.time_s - other.time_s) * sharing.idle_power_w / 2)[0])
    assert run.rate_per_s == pytest.approx(1 / seconds)
    assert run.energy_per_request_j == pytest.approx(joules)


def test_what_chats_leave_to_compute_is_spread_as_in_a_closed_queue(model: EnergyModel) -> None:
    """Against prompts of which all but a lognormal rest is cached. The tail is short, as it is of other lengths."""
    random, mean = np.random.default_rng(2), 700.0
    rest = random.lognormal(0.0, CHAT_SPREAD, 2000)
    rest = np.ceil(rest * (1 - CHAT_HIT_RATE) * mean / rest.mean())
    cached = np.full(len(rest), CHAT_HIT_RATE * mean)
    outputs = random.choice(lengths()[1], len(rest))
    arrival_s = np.cumsum(random.exponential(1 / 8.0, len(rest)))
    simulated = simulate(model, Trace(arrival_s, cached + rest, outputs, cached))
    found = model.open_serving(simulated.rate_per_s, mean, outputs)
    assert "prefix_hits_assumed" in found.flags
    assert found.power_w == pytest.approx(simulated.power_w, rel=0.05)
    assert found.mean_tpot_s == pytest.approx(simulated.mean_tpot_s, rel=0.05)
    assert found.ttft_s[50] == pytest.approx(simulated.ttft_s[50], rel=0.1)
    assert found.mean_ttft_s == pytest.approx(simulated.mean_ttft_s, rel=0.15)
    assert found.ttft_s[90] == pytest.approx(simulated.ttft_s[90], rel=0.1)
    assert found.ttft_s[95] == pytest.approx(simulated.ttft_s[95], rel=0.25)


def test_a_quiet_server_idles_and_each_request_costs_what_it_costs_alone(model: EnergyModel) -> None:
    quiet = model.open_serving(0.001, 500, 100, 0.0)
    alone = simulate(model, Trace(*(np.array([float(value)]) for value in (0, 500, 100, 0))))
    assert quiet.utilisation == pytest.approx(0.001 * alone.energy_per_request_j / alone.power_w, rel=0.05)
    above_idle = alone.energy_per_request_j * (1 - model.idle_power_w / alone.power_w)
    assert quiet.power_w == pytest.approx(model.idle_power_w + 0.001 * above_idle, rel=0.002)


def test_near_its_limit_a_server_costs_what_a_full_closed_queue_does() -> None:
    model = EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=64))
    full = model.serving(64, 500, 200, prefix_cache_hit_rate=0.0)
    rate = 0.995 * full.output_tokens_per_s / 200
    near = model.open_serving(rate, 500, 200, 0.0)
    assert near.energy_per_output_token_j == pytest.approx(full.energy_per_output_token_j, rel=0.03)
    assert near.waiting_share > 0.5
    with pytest.raises(EnergyLensError, match=r"rate_per_s: .*accepted: less than"):
        model.open_serving(1.01 * full.output_tokens_per_s / 200, 500, 200, 0.0)


@pytest.mark.parametrize("limit", [1, 3])
def test_a_limit_below_the_pipelines_stages_leaves_some_empty(limit: int) -> None:
    deployment = Deployment(gpu="H200-SXM", pipeline_parallel_size=4, max_num_seqs=limit)
    model = EnergyModel("llama-3.1-8b", deployment)
    closed = model.serving(100, 500, 100, prefix_cache_hit_rate=0.0)
    rate = 0.999 * closed.output_tokens_per_s / 100
    found = model.open_serving(rate, 500, 100, 0.0)
    assert found.running == pytest.approx(limit, rel=0.01)
    assert found.power_w == pytest.approx(closed.power_w, rel=0.01)
    with pytest.raises(EnergyLensError, match=f"a batch of {limit} requests completes"):
        model.open_serving(1.01 * rate, 500, 100, 0.0)


def test_data_parallel_ranks_share_the_rate() -> None:
    one = EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM")).open_serving(3.0, 500, 100, 0.0)
    two = EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", data_parallel_size=2)).open_serving(6.0, 500, 100, 0.0)
    assert two.power_w == pytest.approx(2 * one.power_w)
    assert two.ttft_s == pytest.approx(one.ttft_s)
    assert two.idle_power_w == 2 * one.idle_power_w


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf"), "3"])
def test_a_rate_that_is_none_is_refused(model: EnergyModel, rate: float) -> None:
    with pytest.raises(EnergyLensError, match=r"rate_per_s: .* is not a positive number of requests a second"):
        model.open_serving(rate, 500, 100)


def test_a_request_alone_takes_its_steps_one_after_the_other(model: EnergyModel) -> None:
    run = simulate(model, Trace(*(np.array([float(value)]) for value in (5, 700, 4, 100))))
    steps = [model.step([(600, 100)], [False]), *(model.step([(1, 700 + i)]) for i in range(3))]
    assert run.ttft_s[50] == pytest.approx(steps[0].time_s)
    assert run.tpot_s[50] == pytest.approx(np.mean([step.time_s for step in steps[1:]]))
    idle_j = 5 * model.idle_power_w
    assert run.energy_per_request_j == pytest.approx(sum(step.energy_j for step in steps) + idle_j)


@pytest.mark.parametrize(
    ("given", "release", "ahead"),
    [(None, "0.25.1", True), (None, "0.11.1", False), (True, "0.11.1", True), (False, "0.25.1", False)],
)
def test_steps_are_scheduled_ahead_where_a_deployment_or_else_its_release_says_so(
    given: bool | None, release: str, ahead: bool
) -> None:
    deployment = Deployment(gpu="H200-SXM", async_scheduling=given, vllm_release=release)
    assert EnergyModel("llama-3.1-8b", deployment).async_scheduling is ahead


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_planned_together_are_those_planned_one_by_one(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment = Deployment(
        gpu="H200-SXM", max_num_seqs=4, max_num_batched_tokens=256, async_scheduling=ahead, enforce_eager=True
    )
    model = EnergyModel("llama-3.1-8b", deployment)
    trace = poisson_trace(12.0, np.array([30.0, 900.0]), np.array([1.0, 9.0, 20.0]), requests=40, hit_rate=0.1)
    together = simulate(model, trace)
    monkeypatch.setattr(arrivals, "PLANNED", 1)
    alone = simulate(model, trace)
    assert together.energy_per_request_j == pytest.approx(alone.energy_per_request_j, rel=1e-9)
    assert together.ttft_s == pytest.approx(alone.ttft_s, rel=1e-9)
    assert together.tpot_s == pytest.approx(alone.tpot_s, rel=1e-9)
    assert together.waiting_share == alone.waiting_share > 0


def test_traces_from_files(tmp_path: Path) -> None:
    azure, mooncake = tmp_path / "trace.csv", tmp_path / "trace.jsonl"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.9799600,4808,10\n"
    )
    mooncake.write_text('{"timestamp": 0, "input_length": 3180, "output_length": 8, "hash_ids": [1]}\n')
    trace = read_trace(azure, hit_rate=0.5)
    assert trace.arrival_s == pytest.approx([0, 0.052], abs=1e-5)
    assert trace.prompt_tokens.tolist() == [4808, 3180]
    assert trace.cached_tokens.tolist() == [2404, 1590]
    assert read_trace(mooncake).output_tokens.tolist() == [8]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,48x8,10\n", "a.csv line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,48\n", "a.csv line 2: KeyError"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 5}\n', "a.jsonl line 1"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 5, "output_length": 1}\n{"time\n', "a.jsonl line 2"),
        ("a.csv", "", "has no requests"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,0,10\n", "has no requests"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,inf,1\n", "line 2: .*not finite"),
    ],
)
def test_a_broken_trace_is_named(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(EnergyLensError, match=problem):
        read_trace(tmp_path / name)


def test_a_trace_of_impossible_requests_is_refused() -> None:
    good = [np.array([0.0, 1.0]), np.array([5.0, 5.0]), np.array([1.0, 1.0]), np.zeros(2)]
    for place, values in ((0, [1.0, 0.0]), (1, [5.0, 0.0]), (2, [0.0, 1.0]), (3, [5.0, 0.0]), (1, [np.nan, 5.0])):
        with pytest.raises(EnergyLensError, match="trace: "):
            Trace(*(np.array(values) if i == place else array for i, array in enumerate(good)))
    with pytest.raises(EnergyLensError, match="pipeline_parallel_size"):
        simulate(EnergyModel("llama-3.1-8b", Deployment(pipeline_parallel_size=2)), Trace(*good))
