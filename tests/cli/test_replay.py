"""`energylens replay` over recordings whose truth is known because the model made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.cli import main

MODEL = "llama-3.1-8b"
BATCHES = {"decode": [(1, 500)] * 32, "prefill": [(4096, 0)]}


def record(file: Path, slower: float = 1.0, hungrier: float = 1.0) -> None:
    """3 s of each batch on a GPU that is `slower` and takes `hungrier` times the energy that the model says."""
    model = EnergyModel(MODEL, Deployment())
    ends, batches, phase, energies = [0.0], [], [], [0.0]
    for index, batch in enumerate(BATCHES.values()):
        step = model.step(batch)
        for _ in range(int(3 / step.time_s)):
            ends.append(ends[-1] + slower * step.time_s)
            energies.append(energies[-1] + hungrier * step.energy_j)
            batches.append(batch)
            phase.append(index)
    readings = np.arange(0.0, ends[-1], 0.1)
    requests = np.array([request for batch in batches for request in batch])
    np.savez(
        file,
        off=np.cumsum([0, *(len(batch) for batch in batches)]),
        n=requests[:, 0],
        c=requests[:, 1],
        t0=np.array(ends[:-1]),
        t2=np.array(ends[1:]),
        phase=phase,
        phases=list(BATCHES),
        en=np.stack([readings, 1e3 * np.interp(readings, ends, energies)], axis=1),
    )


def replay(capsys: pytest.CaptureFixture[str], file: Path, *arguments: str) -> dict[str, object]:
    assert main(["replay", "--config", MODEL, "--gpu", "H200-SXM", str(file), "--json", *arguments]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(("slower", "hungrier"), [(1.0, 1.0), (1.25, 0.8)])
def test_errors_are_those_of_the_recording(
    slower: float, hungrier: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "steps.npz", slower, hungrier)
    result = replay(capsys, tmp_path / "steps.npz")
    assert result["time_error"] == pytest.approx(1 / slower - 1, abs=1e-6)
    assert result["energy_error"] == pytest.approx(1 / hungrier - 1, abs=1e-6)
    assert result["energy_mape"] == pytest.approx(abs(1 / hungrier - 1), abs=1e-6)
    phases: list[dict[str, Any]] = result["phases"]  # type: ignore[assignment]
    assert [phase["phase"] for phase in phases] == list(BATCHES)
    assert [phase["energy_error"] for phase in phases] == pytest.approx([1 / hungrier - 1] * 2, abs=1e-6)
    assert result["energy_interval_coverage"] == (1.0 if hungrier == 1.0 else pytest.approx(0.5, abs=0.5))


def test_steps_without_measurements_are_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"requests": batch}) for batch in BATCHES.values()]
    (tmp_path / "steps.jsonl").write_text("\n".join(lines))
    steps = [EnergyModel(MODEL, Deployment()).step(batch) for batch in BATCHES.values()]
    result = replay(capsys, tmp_path / "steps.jsonl")
    assert result["predicted_j"] == pytest.approx(sum(step.energy_j for step in steps))
    assert result["predicted_s"] == pytest.approx(sum(step.time_s for step in steps))
    assert "energy_mape" not in result
    assert result["phases"][0]["energy_error"] is None  # type: ignore[index]
    assert main(["replay", "--config", MODEL, str(tmp_path / "steps.jsonl")]) == 0
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "deployment"), [([64], {"cudagraph_capture_sizes": [64]}), ([], {"enforce_eager": True})]
)
def test_cuda_graph_sizes_are_the_recordings(
    sizes: list[int], deployment: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "steps.npz"
    np.savez(file, off=[0, 32], n=np.ones(32, int), c=np.full(32, 500), capture_sizes=np.array(sizes, int))
    expected, default = (EnergyModel(MODEL, Deployment(**d)).step([(1, 500)] * 32) for d in (deployment, {}))
    assert replay(capsys, file)["predicted_s"] == pytest.approx(expected.time_s)
    assert expected.time_s != default.time_s
    assert replay(capsys, file, "--cudagraph-capture-sizes", "32")["predicted_s"] == pytest.approx(default.time_s)


def test_the_table_has_a_line_for_each_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "steps.npz")
    assert main(["replay", "--config", MODEL, str(tmp_path / "steps.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["phase", *BATCHES]
    assert "energy: MAPE 0.0% over phases" in "\n".join(lines)
