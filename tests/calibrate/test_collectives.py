"""Collectives: really run by two gloo ranks on this machine's CPUs, and fitted where the truth is known.

Gloo shares the code that repeats operations, agrees on how often, and reads counters; NCCL, CUDA graphs and GPUs' own
counters it cannot try.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel, cli
from energylens_vllm.calibrate import collectives
from energylens_vllm.calibrate.collectives import OPERATIONS, SIZES, Readings, Row, measure_collectives, together
from energylens_vllm.calibrate.collectives_fit import fit_collectives
from energylens_vllm.calibrate.device import CalibrationError
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hardware import load_profile

BASE = Collectives.load("H100-SXM").interconnect
IDLE_W, HOST_S = 130.0, 30e-6


def test_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from counters import of_rank

    rows = measure_collectives(2, "gloo", of_rank, sizes=(4096, 1 << 20), window_s=1.5)
    assert [(row.op, row.bytes) for row in rows] == [(op, size) for op in OPERATIONS for size in (4096, 1 << 20)]
    for row in rows:
        assert row.gpus == 2
        assert 0 < row.host_s < 1
        assert row.bound_by_host  # gloo's launches return when they are done
        assert 1e-6 < row.time_s < 1
        assert row.idle_power_w == pytest.approx([200, 300], rel=0.1)
    metered = [row for row in rows if row.power_w is not None]  # windows may be too short on a busy machine
    assert metered
    for row in metered:
        assert row.power_w == pytest.approx([200, 300], rel=0.25)
        assert row.energy_j == pytest.approx(sum(row.power_w) * row.time_s)


def test_a_rank_that_fails_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from counters import that_fails

    with pytest.raises(CalibrationError, match=r"a rank of the collectives failed: .*has no counter"):
        measure_collectives(2, "gloo", that_fails, sizes=(4096,), window_s=0.1)


def test_one_gpu_is_too_few() -> None:
    with pytest.raises(CalibrationError, match="2 or more"):
        measure_collectives(1)


def test_the_slowest_rank_counts_and_everybodys_power() -> None:
    def rank(time_s: float, power_w: float | None) -> tuple[float, list[dict[str, object]]]:
        row = {"op": "all_gather", "bytes": 64, "gpus": 2, "time_s": time_s, "power_w": power_w, "host_s": time_s / 2}
        return 100.0, [row]

    (row,) = together([rank(1.0, 200.0), rank(1.5, 300.0)])
    assert row == Row("all_gather", 64, 2, 1.5, 750.0, [200.0, 300.0], [100.0, 100.0], 0.75)
    (row,) = together([rank(1.0, 200.0), rank(1.5, None)])
    assert row.energy_j is None
    assert row.power_w is None


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("rises_s", "watts"), [(0.0, 400.0), (0.2, 400.0)])
def test_power_is_between_advances_after_settling(rises_s: float, watts: float) -> None:
    clock = Clock()

    class Counter:
        def counter_j(self) -> float:
            clock.now_s += 0.004
            tick_s = int(clock.now_s * 10) / 10
            return 100.0 * min(tick_s, rises_s) + watts * max(tick_s - rises_s, 0.0)

    readings = Readings(Counter(), clock)
    while clock.now_s < 1.3:
        readings.look()
    assert readings.power_w() == pytest.approx(watts, rel=0.01)


def test_a_counter_that_stands_still_is_no_power() -> None:
    clock = Clock()

    class Counter:
        def counter_j(self) -> float:
            clock.now_s += 0.01
            return 5.0

    readings = Readings(Counter(), clock)
    for _ in range(100):
        readings.look()
    assert readings.power_w() is None
    assert Readings(None).power_w() is None


# -- the fit ----------------------------------------------------------------------------------------------------------


def rows_of(slower: float, watts: float, byte_j: float, noise: float = 0.01, metered: bool = True) -> list[Row]:
    """What two GPUs would measure whose collectives take `slower` times as long as the shipped ones."""
    random, known = np.random.default_rng(3), Collectives(BASE)
    rows = []
    for op in OPERATIONS:
        for size in SIZES:
            timed = known.time_s(op, float(size), 2, "nccl")
            time_s = float(timed.time_s) * slower * (1 + noise * float(random.standard_normal()))
            spent_s = max(time_s, HOST_S)  # the links rest while the host launches
            power_w = IDLE_W + (watts * time_s + byte_j * float(timed.wire_bytes)) / spent_s
            both = [power_w * (1 + noise * float(random.standard_normal())) for _ in range(2)]
            idle = [IDLE_W, IDLE_W]
            powers = (sum(both) * spent_s, both, idle) if metered else (None, None, None)
            rows.append(Row(op, size, 2, spent_s, *powers, HOST_S))
    return rows


def test_times_and_joules_are_recovered() -> None:
    found = fit_collectives(BASE, rows_of(1.25, 95.0, 1.5e-10), "a test")
    for op in OPERATIONS:
        after, before = found.errors[op]
        assert before > 0.05
        assert after < 0.03
        fit = found.interconnect.fits[f"nccl.{op}"]
        assert fit.source.startswith("a test; started from AIConfigurator")
        assert fit.std < 0.05
    assert found.interconnect["communication_power_w"] == pytest.approx(95, rel=0.05)
    assert found.interconnect["energy_per_link_byte_j"] == pytest.approx(1.5e-10, rel=0.15)
    assert found.interconnect.fits["one_shot"] == BASE.fits["one_shot"]  # vLLM's own kernels were not measured


def test_no_coefficient_is_negative() -> None:
    found = fit_collectives(BASE, rows_of(1.0, 100.0, -5e-11, noise=0.0), "a test").interconnect
    assert found["communication_power_w"] > 0
    assert found.coefficients["energy_per_link_byte_j"] == BASE.coefficients["energy_per_link_byte_j"]


def test_without_counters_only_times_are_fitted() -> None:
    found = fit_collectives(BASE, rows_of(1.25, 95.0, 1.5e-10, metered=False), "a test")
    assert found.interconnect.coefficients == BASE.coefficients
    assert "power" not in found.errors


def test_the_command_puts_them_into_a_profile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from energylens_vllm.calibrate.device import Device, Facts
    from energylens_vllm.cli import calibrate

    facts = Facts("NVIDIA H100 80GB HBM3", "GPU-1", "0", "570.1", 85.5e9, 3.35e12, 1980e6, 700.0, 0)
    monkeypatch.setattr(calibrate, "open_device", lambda index: Device(facts, None))  # type: ignore[arg-type]
    monkeypatch.setattr(calibrate, "measure_collectives", lambda gpus: rows_of(1.5, 95.0, 9e-10))
    out = tmp_path / "mine.json"
    assert cli.main(["calibrate", "--collectives", "--gpus", "2", "--out", str(out)]) == 0
    assert "all_reduce" in capsys.readouterr().out
    assert len(json.loads(out.with_suffix(".collectives.json").read_text())) == len(OPERATIONS) * len(SIZES)
    deployment = Deployment(gpu=str(out), tensor_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True)
    slow = EnergyModel("qwen3-30b-a3b", deployment).step([(8192, 0)] * 2)
    shipped = replace(load_profile(out), interconnect={})
    fast = EnergyModel("qwen3-30b-a3b", replace(deployment, gpu="H100-SXM"), shipped).step([(8192, 0)] * 2)
    assert slow.time_s > fast.time_s
    assert slow.components["communication"] > fast.components["communication"]


@pytest.mark.parametrize("change", [lambda raw: raw.pop("fits"), lambda raw: raw.update(gpus_per_node="eight")])
def test_a_broken_interconnect_names_itself(change: Callable[[dict[str, object]], object]) -> None:
    raw = BASE.to_json()
    change(raw)
    with pytest.raises(EnergyLensError, match="profile H100-SXM: interconnect"):
        Collectives.of(replace(load_profile("H100-SXM"), interconnect=raw))


def test_sizes_span_what_models_send() -> None:
    assert collectives.SIZES[0] <= 8192
    assert collectives.SIZES[-1] >= 1 << 28
