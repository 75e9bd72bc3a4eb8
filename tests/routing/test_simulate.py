"""The simulator: nothing is lost, vLLM's scheduling rules hold, and it agrees with what was recorded."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from energylens_vllm.cli import main
from energylens_vllm.routing import Forecast, ReplicaPower, StepTable, advise_power
from energylens_vllm.routing.engine import Engine
from energylens_vllm.routing.policies import POLICIES
from energylens_vllm.routing.simulate import simulate
from energylens_vllm.routing.trace import Arrival, at_load, read_arrivals


def load_of(count: int, rate: float, seed: int = 0) -> list[Arrival]:
    random = np.random.default_rng(seed)
    at = np.cumsum(random.exponential(1 / rate, count))
    prompts, outputs = random.lognormal(6, 0.6, count), random.lognormal(5, 0.5, count)
    return [Arrival(float(a), int(p) + 1, int(o) + 1) for a, p, o in zip(at, prompts, outputs, strict=True)]


def test_one_request_takes_its_steps(table: StepTable) -> None:
    engine = Engine(table)
    job = engine.submit(Arrival(0.0, 100, 50), 0, 0.0)
    engine.advance(1e9)
    reader = table.reader()
    gpu_s, prefill_j, host_s = reader.mixed(0, 1.0, 100, 100 * 101 / 2)
    prefill_s = max(gpu_s, host_s)
    decodes = [reader.decode(1, 100 + i) for i in range(1, 50)]
    assert job.first_s == pytest.approx(prefill_s)
    assert job.end_s == pytest.approx(prefill_s + sum(each[0] for each in decodes))
    assert engine.energy_j == pytest.approx(prefill_j + sum(each[1] for each in decodes))


def test_two_steps_are_in_flight(table: StepTable) -> None:
    """An arrival waits for the step that runs and for the one that is scheduled already; without asynchronous
    scheduling for the one that runs only."""
    reader = table.reader()
    prompt_s, _, launch_s = reader.mixed(0, 1.0, 4000, 4000 * 4001 / 2)
    first_s = max(prompt_s, launch_s)
    decode_s = reader.decode(1, 4001)[0]
    other_s, _, launch_s = reader.mixed(1, 4002.0, 2000, 2000 * 2001 / 2)
    for asynchronous in (True, False):
        engine = Engine(table, asynchronous=asynchronous)
        one = engine.submit(Arrival(0.0, 4000, 50), 0, 0.0)
        engine.advance(first_s / 2)
        other = engine.submit(Arrival(first_s / 2, 2000, 50), 1, first_s / 2)
        engine.advance(1e9)
        assert one.first_s == pytest.approx(first_s)
        if asynchronous:  # launched as soon as the first output is there, while the step between still runs
            expected_s = max(first_s + decode_s + other_s, first_s + launch_s)
        else:
            expected_s = first_s + max(other_s, launch_s)
        assert other.first_s == pytest.approx(expected_s, rel=0.01)


def test_an_arrival_among_decodes_waits_two_steps_at_most(table: StepTable) -> None:
    engine = Engine(table)
    engine.submit(Arrival(0.0, 100, 2000), 0, 0.0)
    step_s = table.reader().decode(1, 300)[0]
    waits = []
    for i in range(1, 20):
        now = 0.1 * i + i * step_s / 20
        engine.advance(now)
        job = engine.submit(Arrival(now, 600, 1), i, now)
        engine.advance(now + 0.09)
        waits.append(job.first_s - now)
    gpu_s, _, launch_s = table.reader().mixed(1, 300.0, 600, 600 * 601 / 2)
    # The rest of the step that runs; then the next runs while the prompt is launched.
    least_s = max(gpu_s + step_s, launch_s)
    assert least_s * 0.99 < min(waits) < max(waits) < 1.05 * (least_s + step_s)
    assert max(waits) - min(waits) > 0.7 * step_s


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_ends_under_every_policy(table: StepTable, small: StepTable, name: str) -> None:
    outcome = simulate(name, [table, small, table], load_of(300, 40), seed=1)
    assert outcome.output_tokens == sum(each.output_tokens for each in load_of(300, 40))
    assert np.isfinite([outcome.energy_j, *outcome.ttft_s, *outcome.tpot_s]).all()
    assert outcome.energy_j >= 3 * table.idle_w * outcome.duration_s * 0.9


def test_a_full_cache_preempts_the_last_and_everything_is_given_back(small: StepTable) -> None:
    engine = Engine(small)
    jobs = []
    for i, arrival in enumerate(load_of(60, 50)):
        engine.advance(arrival.at_s)
        jobs.append(engine.submit(arrival, i, arrival.at_s))
        held = engine.whole + engine.prefill_blocks if not engine.members else engine._used(engine.count)
        assert held <= engine.blocks
    engine.advance(1e9)
    assert engine.preemptions > 0
    assert all(job.left == 0 or job.ends <= engine.count for job in jobs)
    assert not np.isnan([job.end_s for job in jobs]).any()
    assert (engine.running, engine.kv_tokens_used, engine.waiting_tokens, len(engine.waiting)) == (0, 0, 0, 0)
    assert engine._used(engine.count) == 0


def test_long_prompts_are_chunked(table: StepTable) -> None:
    engine = Engine(table)
    engine.submit(Arrival(0.0, 20_000, 2), 0, 0.0)
    chunks = []
    while engine.event is not None:
        chunks.append(sum(new for _, new in engine.event.chunks))
        engine.advance(engine.event.end_s)
    assert chunks == [8192, 8192, 20_000 - 2 * 8192, 0]  # and a step for the second token


def test_prefixes_are_found_again(table: StepTable) -> None:
    arrivals = [Arrival(float(i), 1500, 20, prefix=(1, 2)) for i in range(5)]
    assert simulate("round-robin", [table], arrivals).hit_tokens == 4 * 1024
    assert simulate("round-robin", [table] * 5, arrivals).hit_tokens == 0
    assert simulate("prefix-aware", [table] * 5, arrivals).hit_tokens == 4 * 1024


def test_gathering_saves_and_holds_the_targets(table: StepTable) -> None:
    arrivals = load_of(600, 8)
    ours, least = (simulate(name, [table] * 4, arrivals, 1.0, 0.05, seed=3) for name in ("energy", "least-request"))
    assert ours.energy_per_output_token_j < 0.7 * least.energy_per_output_token_j
    assert ours.attainment >= least.attainment - 0.005


def test_short_answers_are_not_late_behind_long_prompts(table: StepTable) -> None:
    """Prompts of seconds and some answers of a few tokens, at a fifth of what the fleet can do."""
    random = np.random.default_rng(5)
    at = np.cumsum(random.exponential(1 / 2.5, 500))
    prompts, outputs = random.lognormal(8.9, 1.0, 500).clip(100, 60_000), random.lognormal(5, 1.5, 500).clip(2, 1000)
    arrivals = [
        Arrival(*each)
        for each in zip(at.tolist(), prompts.astype(int).tolist(), outputs.astype(int).tolist(), strict=True)
    ]
    ours, least = (simulate(name, [table] * 8, arrivals, 5.0, 0.05, seed=3) for name in ("energy", "least-request"))
    assert ours.attainment >= least.attainment
    assert ours.energy_per_output_token_j < 0.95 * least.energy_per_output_token_j


def test_a_belief_that_is_wrong_by_a_fifth_costs_little(table: StepTable) -> None:
    arrivals = load_of(600, 30)
    beliefs = [table.scaled(0.8, 0.8), table.scaled(1.2, 1.2)] * 2
    right, wrong = (
        simulate("energy", [table] * 4, arrivals, 1.0, 0.05, believed, seed=3) for believed in (None, beliefs)
    )
    assert wrong.energy_per_output_token_j < 1.1 * right.energy_per_output_token_j
    assert wrong.attainment > 0.97


def test_many_requests_are_quick(table: StepTable) -> None:
    arrivals = load_of(2000, 20)
    start = time.process_time()
    simulate("energy", [table] * 8, arrivals, 1.0, 0.05)
    assert (time.process_time() - start) * 19_366 / 2000 < 60


def test_traces_are_read(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.9799600,48,10\n"
                     "2023-11-16 18:17:03.9799600,4,1\n2023-11-16 18:17:05.0,4,0\n")  # fmt: skip
    assert read_arrivals(azure) == [Arrival(0.0, 4, 1), Arrival(pytest.approx(1.0), 48, 10)]
    assert at_load(read_arrivals(azure), 2)[1].at_s == pytest.approx(0.5)
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text(json.dumps({"timestamp": 0, "input_length": 6, "output_length": 5, "hash_ids": [3]}) + "\n")
    assert read_arrivals(mooncake) == [Arrival(0.0, 6, 5, (3,))]
    own = tmp_path / "own.csv"
    own.write_text("t,p,o\n1.5,3,4\n")
    assert read_arrivals(own, ("t", "p", "o")) == [Arrival(0.0, 3, 4)]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "own.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{i},100,20\n" for i in range(5)))
    command = ["simulate", "--model", "llama-3.1-8b", "--trace", str(trace), "--max-num-seqs", "32"]
    assert main([*command, "--fleet", "2xH200-SXM,H100-SXM:2", "--json", "--policy", "energy"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["output_tokens"] == 100
    assert len(found["used"]) == 3
    for wrong, named in (
        (["--fleet", "0xH200-SXM"], "fleet"), (["--fleet", "H200-SXM", "--policy", "enrgy"], "energy"),
        (["--fleet", "H200-SXM", "--load", "0"], "load"), (["--fleet", "H200-SXM", "--belief", "x"], "belief"),
        (["--fleet", "H200-SXM", "--columns", "a,b,c"], "line 2"),
    ):  # fmt: skip
        assert main([*command, *wrong]) == 2
        assert named in capsys.readouterr().err


def test_power_advice_keeps_the_best_and_a_spare() -> None:
    good = ReplicaPower(True, False, 1000, 0.3, 122, 78, 60, 10_000)
    dear = ReplicaPower(True, True, 1000, 0.9, 122, 78, 60, 10_000)
    advice = advise_power([dear, good, good, dear], Forecast(500, 900, 3600))
    assert [each.action for each in advice] == ["drain", "keep", "keep", "drain"]
    assert advice[0].saved_j == pytest.approx(44 * 3600 - 10_000)
    short = advise_power([dear, good, good], Forecast(500, 900, 60))
    assert [each.action for each in short] == ["keep"] * 3  # a start costs more than idling for a minute
    off = ReplicaPower(False, False, 1000, 0.3, 122, 78, 60, 10_000)
    assert [each.action for each in advise_power([off, dear], Forecast(1500, 1500, 600), 0)] == ["start", "keep"]
