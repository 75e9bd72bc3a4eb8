"""Calibration of simulated GPUs: what is fitted, what is kept, what is said, and what survives an interruption."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel, cli
from energylens_vllm.calibrate import device
from energylens_vllm.calibrate.device import Device, Facts
from energylens_vllm.calibrate.measure import MOST_WINDOWS, POINT_S, WINDOW_S, Window, measure
from energylens_vllm.calibrate.measured import Log, Measured
from energylens_vllm.calibrate.points import Point, expected, operating_clock, points
from energylens_vllm.calibrate.profile_fit import Machine, fit_points, start_profile
from energylens_vllm.calibrate.solve import least_squares
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hardware import GpuProfile, load_profile
from energylens_vllm.meter import MigRefused, NoMeter

sys.path.insert(0, str(Path(__file__).parent))
from simulated_gpu import TOP_CLOCK_HZ, SimulatedGpu

BASE = load_profile("H100-SXM").at_release("0.25.1")
#: Another unit of the same GPU: what it spends and how fast it is, over what the shipped profile says.
UNIT = {
    "power.static_w": 0.9, "power.floor_w": 1.05, "energy.memory_j_per_byte": 0.88, "energy.bfloat16.j_per_flop": 1.15,
    "energy.attention.j_per_flop": 0.8, "linear.bfloat16.memory_efficiency": 1.06,
    "attention.decode.memory_efficiency": 0.94, "attention.prefill.compute_efficiency": 1.08,
    "elementwise.launch_s": 0.8, "experts.bfloat16.memory_efficiency": 0.93, "energy.fp8.j_per_flop": 1.2,
}  # fmt: skip
HEADER = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "570.1"}


def unit(**factors: float) -> GpuProfile:
    changed = UNIT if not factors else {name.replace("__", "."): value for name, value in factors.items()}
    return BASE.with_values({name: BASE[name] * factor for name, factor in changed.items()}, "the truth of a test")


def machine(**changed: Any) -> Machine:
    given = dict(
        name="NVIDIA H100 80GB HBM3", sm_count=132, memory_bytes=85.5e9, bandwidth_bytes_per_s=3.35e12,
        top_clock_hz=TOP_CLOCK_HZ, limit_w=BASE["power.limit_w"],
    )  # fmt: skip
    return Machine(**given | changed)


def measured_by(gpu: SimulatedGpu, folder: Path) -> Log:
    log = Log(folder / "points.jsonl", HEADER, resume=False)
    measure(gpu, points(), log, 1e9, clock=gpu.clock)
    return log


# -- the fit ----------------------------------------------------------------------------------------------------------


def test_known_coefficients_are_recovered(tmp_path: Path) -> None:
    truth = unit()
    log = measured_by(SimulatedGpu(truth, noise=0.004), tmp_path)
    found = fit_points(start_profile(BASE, machine(), True), points(), log.measured, TOP_CLOCK_HZ, "a test")
    assert found.before["power"] > 0.04
    assert found.before["time"] > 0.02
    assert found.after["power"] < 0.006
    assert found.after["time"] < 0.006
    assert set(UNIT) <= set(found.fitted)
    for name in UNIT:
        fitted = found.profile.coefficients[name]
        error = fitted.value / truth[name] - 1
        assert abs(error) < 0.05, name
        assert abs(error) < 4 * fitted.std, name
        assert fitted.source == "a test"


def test_what_was_not_measured_keeps_value_and_source(tmp_path: Path) -> None:
    gpu = SimulatedGpu(unit(), noise=0.004, without=frozenset({"experts", "linear_fp8"}))
    log = measured_by(gpu, tmp_path)
    found = fit_points(start_profile(BASE, machine(), True), points(), log.measured, TOP_CLOCK_HZ, "a test")
    kept = [name for name in BASE.coefficients if name.startswith(("experts.", "linear.fp8.", "host.", "linear.mxfp4"))]
    assert kept
    for name in (*kept, "energy.fp8.j_per_flop"):
        assert found.profile.coefficients[name] == BASE.coefficients[name]


def test_torchs_attention_says_nothing_of_vllms_times(tmp_path: Path) -> None:
    gpu = SimulatedGpu(unit(), noise=0.004, library="torch")
    log = measured_by(gpu, tmp_path)
    found = fit_points(start_profile(BASE, machine(), True), points(), log.measured, TOP_CLOCK_HZ, "a test")
    names = [name for name in BASE.coefficients if name.startswith("attention.") and not name.endswith("tile_rows")]
    for name in names:
        assert found.profile.coefficients[name] == BASE.coefficients[name]
    assert "energy.attention.j_per_flop" in found.fitted


def test_a_lower_power_limit_is_the_drivers(tmp_path: Path) -> None:
    truth = replace(
        unit(),
        coefficients={**unit().coefficients, "power.limit_w": replace(BASE.coefficients["power.limit_w"], value=500)},
    )
    log = measured_by(SimulatedGpu(truth, noise=0.002), tmp_path)
    found = fit_points(
        start_profile(BASE, machine(limit_w=500.0), True), points(), log.measured, TOP_CLOCK_HZ, "a test"
    )
    assert found.profile["power.limit_w"] == 500
    assert found.after["power"] < 0.006
    assert found.after["time"] < 0.006


def test_another_gpu_takes_its_sizes_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    start = start_profile(
        BASE, machine(name="NVIDIA X1", sm_count=66, bandwidth_bytes_per_s=2e12, limit_w=400.0), False
    )
    assert start.profile["compute.bfloat16.peak_flops"] == pytest.approx(BASE["compute.bfloat16.peak_flops"] / 2)
    assert start.profile["memory.bandwidth_bytes_per_s"] == 2e12
    truth = start.profile.with_values(
        {name: start.profile[name] * factor for name, factor in UNIT.items()} | {"power.static_w": 60.0}, "truth"
    )
    gpu = SimulatedGpu(truth, noise=0.004, without=frozenset({"experts", "linear_fp8"}))
    log = measured_by(gpu, tmp_path)
    found = fit_points(start, points(), log.measured, TOP_CLOCK_HZ, "a test")
    profile = found.profile
    assert profile.name == "NVIDIA X1"
    assert profile.calibrated_formats == ("linear.bfloat16",)
    assert found.after["power"] < 0.01
    assert profile["power.static_w"] == pytest.approx(60.0, rel=0.03)
    for name in ("host.step_s", "experts.bfloat16.memory_efficiency", "energy.fp8.j_per_flop"):
        assert "of the H100-SXM, not measured on this GPU" in profile.coefficients[name].source
        assert profile.coefficients[name].std >= 0.3
    dense = EnergyModel("llama-3.1-8b", Deployment(), profile).step([(1, 500)] * 8)
    experts = EnergyModel("qwen3-30b-a3b", Deployment(), profile).step([(1, 500)] * 8)
    assert "uncalibrated_format" in experts.flags - dense.flags


def test_few_points_identify_few_coefficients(tmp_path: Path) -> None:
    log = measured_by(SimulatedGpu(unit()), tmp_path)
    few = {name: log.measured[name] for name in ("one thread that waits", "idle with a CUDA context")}
    found = fit_points(start_profile(BASE, machine(), True), points(), few, TOP_CLOCK_HZ, "a test")
    assert found.fitted == ("power.static_w",)
    assert found.profile["power.static_w"] == pytest.approx(unit()["power.static_w"], rel=0.01)


def test_nothing_measured_is_no_profile() -> None:
    with pytest.raises(EnergyLensError, match="not one point was measured"):
        fit_points(start_profile(BASE, machine(), True), points(), {}, TOP_CLOCK_HZ, "a test")


def test_one_absurd_point_does_not_bend_the_rest(tmp_path: Path) -> None:
    truth, log = unit(), measured_by(SimulatedGpu(unit(), noise=0.002), tmp_path)
    odd = dict(log.measured)
    name = next(point.name for point in points() if point.kind == "linear")
    odd[name] = replace(odd[name], time_s=10 * odd[name].time_s, power_w=2 * odd[name].power_w)
    found = fit_points(start_profile(BASE, machine(), True), points(), odd, TOP_CLOCK_HZ, "a test")
    for coefficient in ("power.static_w", "energy.memory_j_per_byte", "linear.bfloat16.memory_efficiency"):
        assert found.profile[coefficient] == pytest.approx(truth[coefficient], rel=0.04)


def test_points_of_a_real_h100(tmp_path: Path) -> None:
    """Kept from a run on one that idles at 119 W."""
    kept = Path(__file__).parents[2] / "benchmarks" / "results" / "calibrate_h100" / "points.jsonl"
    path = tmp_path / "points.jsonl"
    path.write_bytes(kept.read_bytes())
    log = Log(path, json.loads(kept.open().readline()), resume=True)
    assert len(log.measured) == len(points()) - 1
    found = fit_points(start_profile(BASE, machine(), True), points(), log.measured, TOP_CLOCK_HZ, "a test")
    assert found.after["power"] < 0.05
    assert found.after["time"] < 0.01  # its times are the reference
    assert 117 < found.profile["power.static_w"] < 125
    assert 1.25e-10 < found.profile["energy.memory_j_per_byte"] < 1.5e-10


def test_least_squares() -> None:
    x = np.linspace(0, 1, 30)
    y = 2.0 * np.exp(-1.5 * x)
    y[7] += 5.0
    found = least_squares(lambda p: p[0] * np.exp(-p[1] * x) - y, np.array([1.0, 1.0]), 0.05)
    assert found.x == pytest.approx([2.0, 1.5], abs=0.02)


def test_points_have_names_of_their_own_and_predictions() -> None:
    names = [point.name for point in points()]
    assert len(set(names)) == len(names)
    for point in points():
        clock = operating_clock(point, BASE)
        there = expected(point, BASE, clock)
        assert 0.1 <= clock <= 1
        assert BASE["power.floor_w"] <= there.power_w <= BASE["power.limit_w"] * 1.02
        if point.kind not in ("idle", "spin"):
            assert 1e-6 < there.time_s < 0.01


# -- measuring --------------------------------------------------------------------------------------------------------

FEW = points()[:9]


@pytest.mark.parametrize("at", range(len(FEW)))
def test_goes_on_where_it_was_interrupted(tmp_path: Path, at: int) -> None:
    path = tmp_path / "points.jsonl"
    first = SimulatedGpu(unit(), interrupt_at=at)
    with pytest.raises(KeyboardInterrupt):
        measure(first, FEW, Log(path, HEADER, resume=True), 1e9, clock=first.clock)
    second = SimulatedGpu(unit())
    log = Log(path, HEADER, resume=True)
    assert list(log.measured) == [point.name for point in FEW[:at]]
    measure(second, FEW, log, 1e9, clock=second.clock)
    assert second.loaded == [point.name for point in FEW[at:]]
    assert list(Log(path, HEADER, resume=True).measured) == [point.name for point in FEW]


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path, gpu = tmp_path / "points.jsonl", SimulatedGpu(unit())
    measure(gpu, FEW, Log(path, HEADER, resume=True), 1e9, clock=gpu.clock)
    path.write_bytes(path.read_bytes()[:-20])
    assert list(Log(path, HEADER, resume=True).measured) == [point.name for point in FEW[:-1]]


@pytest.mark.parametrize("header", [{**HEADER, "driver": "580.0"}, {}])
def test_points_of_another_driver_or_gpu_do_not_count(tmp_path: Path, header: dict[str, str]) -> None:
    path, gpu = tmp_path / "points.jsonl", SimulatedGpu(unit())
    measure(gpu, FEW, Log(path, HEADER, resume=True), 1e9, clock=gpu.clock)
    assert not Log(path, header, resume=True).measured


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    path, gpu = tmp_path / "points.jsonl", SimulatedGpu(unit())
    measure(gpu, FEW, Log(path, HEADER, resume=True), 1e9, clock=gpu.clock)
    assert not Log(path, HEADER, resume=False).measured


def test_a_budget_leaves_out_the_end_and_says_so(tmp_path: Path) -> None:
    gpu = SimulatedGpu(unit())
    log = Log(tmp_path / "points.jsonl", HEADER, resume=False)
    outcome = measure(gpu, points(), log, 60.0, clock=gpu.clock)
    assert gpu.now_s <= 60 + POINT_S
    assert 15 < len(log.measured) < len(points())
    assert len(log.measured) + len(outcome.skipped) == len(points())
    assert {one.reason for one in outcome.skipped} == {"the budget of 60 s was spent"}


def test_all_points_fit_into_the_default_budget() -> None:
    assert len(points()) * POINT_S < 200


class Drifting(SimulatedGpu):
    """Its power falls by 3 % with each window, until the third."""

    def load(self, point: Point) -> Any:
        windows = iter([0.0, 100.0, 97.0, 94.1, 94.1])

        class Load:
            library = "vllm"

            def window(self, seconds: float) -> Window:
                return Window(1.0, next(windows), 1e9, 40.0)

            def __enter__(self) -> Load:
                return self

            def __exit__(self, *_: object) -> None:
                pass

        return Load()


def test_windows_are_repeated_until_two_agree(tmp_path: Path) -> None:
    log = Log(tmp_path / "points.jsonl", HEADER, resume=False)
    measure(Drifting(unit()), FEW[:1], log, 1e9)
    (found,) = log.measured.values()
    assert found.windows == MOST_WINDOWS == 4
    assert found.power_w == pytest.approx(94.1)
    assert WINDOW_S >= 1  # ten advances of the counter


# -- the command ------------------------------------------------------------------------------------------------------


def facts(**changed: Any) -> Facts:
    given = dict(
        name="NVIDIA H100 80GB HBM3", uuid="GPU-1", index="0", driver="570.1", memory_bytes=85.5e9,
        bandwidth_bytes_per_s=3.35e12, top_clock_hz=TOP_CLOCK_HZ, limit_w=700.0, processes=0,
    )  # fmt: skip
    return Facts(**given | changed)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimulatedGpu:
    """What the command finds on the machine, and the working folder."""
    from energylens_vllm.cli import calibrate

    simulated = SimulatedGpu(unit(), noise=0.004)
    monkeypatch.setattr(calibrate, "open_device", lambda index: Device(facts(), None))  # type: ignore[arg-type]
    monkeypatch.setattr(calibrate, "Cuda", lambda device, index: simulated)
    monkeypatch.setattr(calibrate, "_version", {"vllm": "0.25.1", "torch": "2.11.0"}.get)
    monkeypatch.chdir(tmp_path)
    return simulated


def found(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    from energylens_vllm.cli import calibrate

    monkeypatch.setattr(calibrate, "open_device", lambda index: Device(facts(**changed), None))  # type: ignore[arg-type]


def test_the_command_writes_a_profile_that_predicts(gpu: SimulatedGpu, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--out", "mine.json"]) == 0
    output, progress = capsys.readouterr()
    assert "wrote mine.json" in output
    assert f"{len(points())}/{len(points())}" in progress
    profile = load_profile("mine.json")
    assert profile.name == "H100-SXM"
    assert profile.calibrated
    assert profile["power.static_w"] == pytest.approx(unit()["power.static_w"], rel=0.02)
    said = profile.calibration
    assert said["driver"] == "570.1"
    assert said["temperature_celsius"] == [45.0, 45.0]
    assert said["fit_error"]["power"] < 0.01 < said["error_before"]["power"]
    assert said["not_measured"] == []
    assert len(said["points"]) == len(points())
    assert said["base"] == "H100-SXM"
    assert all(c.source for c in profile.coefficients.values())
    assert GpuProfile(**{**{f: getattr(profile, f) for f in profile.__dataclass_fields__}}).to_json() == json.loads(
        Path("mine.json").read_text()
    )
    assert not list(Path().glob(".*"))
    fitted, shipped, truth = (
        EnergyModel("llama-3.1-8b", Deployment(), each).step([(1, 1000)] * 32).energy_j
        for each in (profile, BASE, unit())
    )
    assert abs(fitted / truth - 1) < 0.01 < abs(shipped / truth - 1)
    by_path = EnergyModel("llama-3.1-8b", Deployment(gpu="mine.json"))
    assert by_path.step([(1, 1000)] * 32).energy_j == pytest.approx(fitted)


def test_a_second_run_measures_nothing_again(gpu: SimulatedGpu, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--out", "mine.json"]) == 0
    count = len(gpu.loaded)
    assert cli.main(["calibrate", "--out", "mine.json"]) == 0
    assert len(gpu.loaded) == count
    assert f"goes on with {count} points" in capsys.readouterr().err
    assert cli.main(["calibrate", "--out", "mine.json", "--no-resume"]) == 0
    assert len(gpu.loaded) == 2 * count


def test_ctrl_c_says_how_to_go_on(gpu: SimulatedGpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.interrupt_at = 7
    assert cli.main(["calibrate", "--out", "mine.json"]) == 130
    assert "interrupted; 7 points are in mine.points.jsonl" in capsys.readouterr().err
    assert not Path("mine.json").exists()
    gpu.interrupt_at = None
    assert cli.main(["calibrate", "--out", "mine.json"]) == 0
    assert len(gpu.loaded) == len(points())


def test_an_interconnect_measured_before_stays(gpu: SimulatedGpu) -> None:
    node = Collectives.load("H100-SXM").interconnect.to_json()
    Path("mine.json").write_text(json.dumps(replace(BASE, interconnect=node).to_json()))
    assert cli.main(["calibrate", "--out", "mine.json", "--budget", "60s"]) == 0
    assert load_profile("mine.json").interconnect["name"] == "H100-SXM"


def test_what_is_not_measured_is_in_the_profile(gpu: SimulatedGpu, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.without = frozenset({"experts"})
    assert cli.main(["calibrate", "--out", "mine.json"]) == 0
    reasons = {one["reason"] for one in load_profile("mine.json").calibration["not_measured"]}
    assert reasons == {"no experts here"}
    assert "not measured: experts bf16 of 16 tokens: no experts here" in capsys.readouterr().out


def test_several_gpus_each_in_a_process(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command[3:])
        return subprocess.CompletedProcess(command, len(commands) - 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert cli.main(["calibrate", "--gpu-index", "0", "2", "--out", "all.json", "--budget", "2m"]) == 1
    assert commands == [
        ["calibrate", "--gpu-index", index, "--out", f"all.{index}.json", "--budget", "120s"] for index in ("0", "2")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "--budget: 0 s; accepted: 20 s or more"),
        (["--budget", "5 weeks"], "'5 weeks' is not a time"),
        (["--out", "profile.yaml"], "does not end in .json"),
        (["--base", "H200"], "gpu"),
    ],
)
def test_bad_arguments(
    gpu: SimulatedGpu, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["calibrate", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not gpu.loaded


def test_an_unknown_gpu_needs_a_base(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found(monkeypatch, name="NVIDIA X1")
    assert cli.main(["calibrate"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no profile of 'NVIDIA X1' to start from; choose the nearest with --base" in line
    assert cli.main(["calibrate", "--base", "H100-SXM"]) == 0
    assert load_profile("nvidia-x1.json").name == "NVIDIA X1"


def test_a_gpu_at_work_is_refused(
    gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found(monkeypatch, processes=2)
    assert cli.main(["calibrate"]) == 2
    assert "2 other processes compute on GPU 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [(MigRefused("GPU 0 is in MIG mode: ..."), "MIG mode"), (NoMeter("NVML: NVML Shared Library Not Found"), "NVML")],
)
def test_mig_and_machines_without_nvml_are_refused(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Backend:
        def __init__(self, *_: object, **__: object) -> None: ...

        def open(self) -> None:
            raise error

    monkeypatch.setattr(device, "Nvml", Backend)
    assert cli.main(["calibrate"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("counts", ["nothing", "module"])
def test_a_gpu_without_a_counter_of_its_own_is_refused(counts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Backend:
        def __init__(self, *_: object, **__: object) -> None: ...

        def open(self) -> list[object]:
            class Gpu:
                pass

            gpu = Gpu()
            gpu.counts = counts  # type: ignore[attr-defined]
            return [gpu]

    monkeypatch.setattr(device, "Nvml", Backend)
    with pytest.raises(EnergyLensError, match="energy counter"):
        device.open_device(0)


def test_measured_refuses_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    log = Log(path, HEADER, resume=False)
    log.add(Measured("a", 1.0, math.nan, 1e9, 40.0, (), "vllm", 2, 0.0, 0.0))
    log.add(Measured("b", 1.0, 300.0, 1e9, 40.0, ("power_cap",), "vllm", 2, 0.0, 0.0))
    assert list(Log(path, HEADER, resume=True).measured) == ["b"]
