"""benchmarks/overlap_gpu.py, as far as it can be tried without GPUs, and what it compares."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from energylens_vllm.energy.overlap import CHANNEL_BYTES_PER_S, CHANNEL_CORNER, CHANNEL_SHARE, MEASURED_STD
from energylens_vllm.errors import EnergyLensError

ROOT = Path(__file__).parents[2]
FAKE_NVML = Path(__file__).with_name("fake_nvml.py")
NCCL = "ncclDevKernel_AllReduce"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("overlap_recorded")


def point(
    what: str, k: int = 4096, rows: int = 8192, stages: int = 1, ctas: int = 0, spared: int = 0
) -> dict[str, Any]:
    return dict(what=what, k=k, rows=rows, stages=stages, ctas=ctas, spared=spared, graph=False, host_s=0.0)


def result_of(recorded: ModuleType, factors: list[tuple[dict[str, Any], float, float]]) -> dict[str, Any]:
    """Points that took so many times the seconds and joules that are predicted."""
    model = recorded.Model("H200-SXM", 2, 24)
    points = []
    for given, slower, hungrier in factors:
        said = model.layer(given)
        time_s, power_w = said.time_s * slower, said.energy_j * hungrier / (said.time_s * slower)
        gpus = [dict(power_w=0.6 * power_w), dict(power_w=0.4 * power_w)]
        points.append(given | dict(time_s=time_s, rank_s=[0.9 * time_s, time_s], gpus=gpus))
    traces = [dict(ctas=16, kernels=[dict(name=NCCL, grid=[16])]), dict(ctas=0, kernels=[dict(name=NCCL, grid=[24])])]
    for what, ctas in (("idle", 0), ("all_reduce", 1), ("all_reduce", 4), ("all_reduce", 16)):  # what rates come from
        gpus = [dict(power_w=100.0 + ctas)] * 2
        points.append(point(what, 0, ctas=ctas) | dict(rank_s=[1e-2 / max(ctas, 1)], time_s=1e-2, gpus=gpus))
    return dict(device=[dict(name="NVIDIA H200")], gpus=2, columns=8192, points=points, traces=traces)


def test_a_gpu_without_a_profile_is_refused(recorded: ModuleType) -> None:
    result = result_of(recorded, [(point("gemm"), 1.0, 1.0)]) | dict(device=[dict(name="Toaster")])
    with pytest.raises(EnergyLensError, match="'Toaster'"):
        recorded.compare(result)


def test_what_is_compared_is_predicted_over_measured(recorded: ModuleType, tmp_path: Path) -> None:
    pair = point("pair", stages=4, ctas=16, spared=16)
    result = result_of(recorded, [
        (point("gemm"), 1.25, 1.0),
        (point("pair"), 1.25, 0.8),
        (pair, 1.25, 0.8),
        (pair | dict(stages=2), 1.0, 1.0),
    ])  # fmt: skip
    gemm, plain, four, two, *_ = recorded.compare(result)
    assert gemm.ratio("time_s") == pytest.approx(0.8)
    assert (gemm.ratio("energy_j"), gemm.plain) == (pytest.approx(1.0), None)
    assert plain.ratio("energy_j") == pytest.approx(1.25)
    # The same error with and without overlap is none of overlap's.
    assert recorded.overlap_ratio(four, "time_s") == pytest.approx(1.0)
    assert recorded.overlap_ratio(two, "time_s") == pytest.approx(1.25)
    assert recorded.overlap_ratio(two, "energy_j") == pytest.approx(0.8)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    summary = {line.split("  ")[0]: line.split() for line in recorded.report(path).splitlines()}
    assert summary["overlapped"][1:4] == ["2", "10.0%", "15.8%"]  # 0.8 and 1: log(0.8) over the root of 2
    assert summary["overlapped, against not"][3:] == ["2", "12.5%", "15.8%", "10.0%", "15.8%"]


def test_host_bound_and_unspared_points_are_shown_and_not_counted(recorded: ModuleType, tmp_path: Path) -> None:
    pair = point("pair", stages=4, ctas=16, spared=16)
    result = result_of(recorded, [(point("pair"), 1.0, 1.0), (pair, 1.0, 1.0)])
    wrong = result_of(recorded, [(pair | dict(spared=0), 2.0, 2.0), (pair, 3.0, 3.0)])["points"]
    wrong[1]["host_s"] = wrong[1]["time_s"]
    result["points"] += wrong
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    lines = recorded.report(path).splitlines()
    assert len([line for line in lines if line.endswith("all SMs")]) == 1
    assert len([line for line in lines if line.endswith("host")]) == 1
    assert next(line for line in lines if line.startswith("overlapped ")).split() == ["overlapped", "1"] + ["0.0%"] * 4


def test_the_best_number_of_sms_is_by_each_side(recorded: ModuleType) -> None:
    pair = point("pair", stages=4)
    given = [pair | dict(ctas=ctas, spared=ctas or 24) for ctas in (1, 16, 0)]
    factors = [(each, 0.01 if each["ctas"] == 1 else 1.0, 1.0) for each in given]
    rows = recorded.compare(result_of(recorded, [(point("pair"), 1.0, 1.0), *factors]))
    ((name, measured, predicted),) = recorded.best_sms([row for row in rows if row.overlapped], "time_s")
    assert (name, measured) == ("layer.o, 8192 rows, 4 stages", 1)
    assert predicted == min(given, key=lambda each: recorded.Model("H200-SXM", 2, 24).layer(each).time_s)["ctas"] != 1


def test_all_reduces_alone_say_how_fast_an_sm_sends(recorded: ModuleType) -> None:
    """Of a result made with 10 GB/s an SM, which 16 of them do not add up to."""
    message, whole_s = 8192 * 8192 * 2.0, recorded.Model("H200-SXM", 2, 24).layer(point("all_reduce", 0)).time_s
    rows = []
    for ctas in (1, 4, 16):
        few_s = message / (ctas * 10e9)
        time_s = few_s if ctas < 16 else (few_s**3 + whole_s**3) ** (1 / 3)
        rows.append(point("all_reduce", 0, ctas=ctas) | dict(rank_s=[time_s], gpus=[None]))
    result = dict(device=[dict(name="NVIDIA H200")], gpus=2, columns=8192, points=rows)
    assert recorded.channel_fit(result) == pytest.approx((10e9, 3.0))


def test_power_of_all_reduces_is_a_line_in_what_they_send(recorded: ModuleType) -> None:
    """Each number of CTAs draws as many watts more, and sends 13.4 GB/s for each."""
    result = result_of(recorded, [])
    assert recorded.power_fit(result) == pytest.approx((0.0, 1 / (8192 * 8192 * 2 / 1e-2), 0.0), abs=1e-9)
    for each in result["points"]:
        if each["what"] == "all_reduce":
            each["gpus"] = [dict(power_w=window["power_w"] + 30.0) for window in each["gpus"]]
    assert recorded.power_fit(result)[0] == pytest.approx(30.0)


def test_what_was_measured_is_inside_what_the_model_allows_for(recorded: ModuleType) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "overlap_h200" / "overlap.json").read_text())
    assert recorded.channel_fit(result) == pytest.approx(
        (CHANNEL_SHARE * CHANNEL_BYTES_PER_S["H200-SXM"], CHANNEL_CORNER), rel=0.02
    )
    rows = [row for row in recorded.compare(result) if row.overlapped and row.spared and not row.host_bound]
    assert len(rows) == 18
    for quantity in ("time_s", "energy_j"):
        assert recorded.spread(recorded.overlap_ratio(row, quantity) for row in rows)[1] < MEASURED_STD


@pytest.mark.vllm
@pytest.mark.nightly
def test_all_of_it_on_cpus_but_for_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "pynvml.py").write_text(FAKE_NVML.read_text())
    path = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "overlap_gpu.py"), str(path), "--tiny"]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    result = json.loads(path.read_text())
    assert (result["error"], result["nvls"], len(result["device"])) == (None, "0", 2)
    assert [each["what"] for each in result["points"]] == ["idle", "gemm", "gemm", "all_reduce", "pair", "pair"]
    for each in result["points"]:
        windows = each["gpus"]
        if each["window_s"] < 0.5:
            assert windows == [None, None]
        else:
            assert [window["power_w"] for window in windows] == pytest.approx([150.0] * 2, rel=0.1)
        if each["what"] != "idle":
            assert 0 < min(each["rank_s"]) <= max(each["rank_s"]) < 1
