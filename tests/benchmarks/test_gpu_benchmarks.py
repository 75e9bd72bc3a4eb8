"""The scripts that run on a GPU machine, as far as they can be tried without one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FAKE_NVML = Path(__file__).with_name("fake_nvml.py")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a test import them and NVML's stand-in. They set vLLM's environment, which is taken back."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("pynvml", FAKE_NVML)
    assert spec is not None
    assert spec.loader is not None
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with mock.patch.dict(os.environ):
        yield


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.usefixtures("benchmarks")
def test_the_meter_says_when_the_counter_changed() -> None:
    meter = load("in_process").Meter()
    meter.start()
    time.sleep(2.0)
    meter.stop()
    assert not meter.is_alive()
    window = meter.window(0.0, float("inf"))
    assert window["power_w"] == pytest.approx(150.0, rel=0.02)
    assert window["sampled_power_w"] == pytest.approx(150.0)
    assert window["duration_s"] > 1.0
    assert meter.window(0.0, 0.1) is None


@pytest.mark.usefixtures("benchmarks")
def test_a_step_counts_by_its_part_inside_the_window_and_gaps_by_idle_power() -> None:
    predicted = load("serve_gpu").Predicted()
    # Steps at 0-1 s, 1-3 s and 6-7 s; the window is 0.5-6.5 s, so half, all and half of them.
    predicted.add([0.0, 1.0, 6.0], [1.0, 3.0, 7.0], [0.9, 2.2, 1.0], [100.0, 300.0, 80.0], [90.0] * 3, [400.0] * 3)
    found = predicted.over(0.5, 6.5, idle_power_w=10.0)
    assert found["busy_s"] == pytest.approx(3.0)
    assert found["predicted_energy_j"] == pytest.approx(50.0 + 300.0 + 40.0 + 3.0 * 10.0)
    assert found["predicted_power_w"] == pytest.approx(420.0 / 6.0)
    assert found["predicted_busy_s"] == pytest.approx(0.45 + 2.2 + 0.5)
    assert found["predicted_low_j"] == pytest.approx(2 * 90.0 + 30.0)
    assert found["window_steps"] == pytest.approx(2.0)


@pytest.mark.usefixtures("benchmarks")
def test_one_case_that_fails_or_hangs_leaves_the_others_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", f"import sys, time; sys.stdin.readline(); {code}"]

    commands = {
        "fails": python("print('why'); sys.exit(3)"),
        "hangs": python("time.sleep(60)"),
        "works": python("print('[   1.0 s] done'); print('noise')"),
    }
    passed = load("in_turn").run_in_turn(commands, tmp_path / "log.txt", timeout_s=5.0)
    assert passed == {"fails": False, "hangs": False, "works": True}
    screen = capfd.readouterr().out
    assert "fails ended with 3; its last lines:\nwhy" in screen
    assert "hangs ended with a timeout after 5 s" in screen
    assert "[   1.0 s] done" in screen
    assert "noise" not in screen
    assert "noise" in (tmp_path / "log.txt").read_text()


@pytest.mark.vllm
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_all_of_it_on_vllms_cpu_build(tmp_path: Path) -> None:
    """From a laid-out copy of this checkout, as on the GPU machine, but for the shapes, the loads and NVML."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "pynvml.py").write_text(FAKE_NVML.read_text())
    out = tmp_path / "out"
    script = f"""
        export PYTHONPATH={tmp_path}/fake TMPDIR={tmp_path} VLLM_CPU_KVCACHE_SPACE=1
        source {ROOT}/benchmarks/gpu_setup.sh {tmp_path}/site
        python3 {ROOT}/benchmarks/serve_gpu.py {out} --tiny && python3 {ROOT}/benchmarks/record_steps.py {out} tiny &&
        python3 {ROOT}/benchmarks/serve_gpu.py {out} --replay > {tmp_path}/replayed.md
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, env=environment)
    for case in ("llama8b", "qwen30b"):
        result = json.loads((out / f"{case}.json").read_text())
        assert result["exported"]["steps"] == result["exported"]["recorded_steps"] > 20
        assert result["exported"]["joules"] == pytest.approx(result["exported"]["summed_joules"], rel=1e-9)
        assert not result["exported"]["failures"]
        assert len(result["loads"]) == 4
        for load_ in result["loads"]:
            assert load_["power_w"] == pytest.approx(150.0, rel=0.1)
            assert load_["predicted_energy_j"] > 0
        assert len(result["throughput"]["ratios"]) == 2
        assert not result["throughput"]["failures"]
    live, replayed = (out / "table.md").read_text(), (tmp_path / "replayed.md").read_text()
    assert live.count("\n") == replayed.count("\n") > 12
    with np.load(out / "tiny.npz") as arrays:
        assert {"prefill_l512", "decode_b4_c32", "mix_r4"} <= set(arrays["phases"].tolist())
        assert (arrays["t2"] > arrays["t0"]).all()


@pytest.mark.vllm
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_learning_with_a_real_server_on_vllms_cpu_build(tmp_path: Path) -> None:
    """All of learn_gpu.py but for the shapes, the load and NVML; all that it checks holds, but that no GPU is predicted
    well that is not there."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "pynvml.py").write_text(FAKE_NVML.read_text())
    out = tmp_path / "out"
    script = f"""
        export PYTHONPATH={tmp_path}/fake TMPDIR={tmp_path}
        source {ROOT}/benchmarks/gpu_setup.sh {tmp_path}/site
        python3 {ROOT}/benchmarks/learn_gpu.py {out} --tiny --tp 1
        python3 {ROOT}/benchmarks/learn_gpu.py {out} --replay > {tmp_path}/replayed.md
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", script], check=True, cwd=tmp_path, env=environment)
    result = json.loads((out / "result.json").read_text())
    assert [check["what"] for check in result["checks"] if not check["holds"]] == []
    assert len(result["checks"]) > 15
    live, replayed = (out / "table.md").read_text(), (tmp_path / "replayed.md").read_text()
    assert "| all +20 % |" in replayed
    assert live.splitlines()[:6] == replayed.splitlines()[:6]
