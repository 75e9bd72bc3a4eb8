"""`energylens doctor` on this machine, and on machines that are only described."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from energylens_vllm.cli import doctor, main

ROOT = Path(__file__).parents[2]


def nvml(*products: str, mig: bool = False, counter: bool = True, c2c: bool = False, lost: int = -1) -> SimpleNamespace:
    """An NVML with these products, of which number `lost` has gone; its constants and errors are those of pynvml."""

    def not_supported(*_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def handle(index: int) -> int:
        if index == lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        if index >= len(products):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    constants = {name: value for name, value in vars(pynvml).items() if name.startswith(("NVML", "nvmlClocks"))}
    return SimpleNamespace(
        **constants,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.65.06",  # older pynvml gives bytes
        nvmlDeviceGetCount=lambda: len(products),
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda index: f"GPU-{index}",
        nvmlDeviceGetName=lambda index: products[index],
        nvmlDeviceGetMigMode=(lambda index: [1, 1]) if mig else not_supported,
        nvmlDeviceGetC2cModeInfoV=(lambda index: SimpleNamespace(isC2cEnabled=1)) if c2c else not_supported,
        nvmlDeviceGetTotalEnergyConsumption=(lambda index: 123) if counter else not_supported,
    )


def no_nvml() -> SimpleNamespace:
    """Where there is no driver."""

    def init() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    return SimpleNamespace(**vars(nvml()) | {"nvmlInit": init})


def checks(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    status = main(["doctor", "--json"])
    return status, {check["name"]: check for check in json.loads(capsys.readouterr().out)}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_PLUGINS", "ENERGYLENS_GPU", "ENERGYLENS_ENABLED", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_the_oldest_and_newest_vllm_are_those_of_the_extra() -> None:
    oldest, untried = (".".join(map(str, bound)) for bound in (doctor.OLDEST_VLLM, doctor.FIRST_UNTRIED_VLLM))
    assert f'vllm = ["vllm>={oldest},<{untried}"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.vllm
def test_vllm_and_the_plugin_are_found_here(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = checks(capsys)
    assert status == 0, found
    assert found["vLLM"]["status"] == "ok"
    assert found["plugin"]["status"] == "ok"
    assert found["settings"] == {"name": "settings", "status": "ok", "detail": "defaults", "advice": ""}


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.25.0", "failed"), ("0.25.1", "ok"), ("0.33.0+cu130", "ok"), ("0.33.1rc2", "ok"), ("0.34.0", "warning")],
)
def test_vllm_versions(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    check = doctor.vllm()
    assert check.status == status
    assert version in check.detail
    assert ("pip install 'vllm>=0.25.1,<0.34'" in check.advice) == (status != "ok")


def test_without_vllm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    check = doctor.vllm()
    assert check.status == "warning"
    assert "pip install 'vllm>=0.25.1,<0.34'" in check.advice


@pytest.mark.parametrize(
    ("variable", "value", "check", "message"),
    [
        ("VLLM_PLUGINS", "lora, other", "plugin", "leaves it out"),
        ("ENERGYLENS_GPU", "H200", "settings", "did you mean 'H200-SXM'"),
        ("ENERGYLENS_GPUS", "H200-SXM", "settings", "did you mean 'ENERGYLENS_GPU'"),
        ("ENERGYLENS_ENABLED", "0", "settings", "enabled is false"),
    ],
)
def test_what_stops_the_plugin_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    variable: str, value: str, check: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    status, found = checks(capsys)
    assert status == 1
    assert found[check]["status"] == "failed"
    assert message in found[check]["detail"]
    assert found[check]["advice"]


def test_plugins_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora, energylens")
    assert doctor.plugin().status == "ok"
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    assert doctor.plugin().advice == "export VLLM_PLUGINS='lora,energylens'"


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (nvml("NVIDIA H200"), {"GPU 0": ("ok", "energy counter"), "profile": ("ok", "H200-SXM (as found)")}),
        (nvml("NVIDIA L40S"), {"GPU 0": ("ok", "energy counter"), "profile": ("ok", "L40S (as found)")}),
        (
            nvml("NVIDIA GeForce RTX 3060"),
            {"GPU 0": ("ok", "RTX 3060"), "profile": ("warning", "H200-SXM, because none describes NVIDIA GeForce")},
        ),
        (nvml("NVIDIA H200", counter=False), {"GPU 0": ("warning", "power readings are integrated")}),
        (nvml("NVIDIA H200", "NVIDIA H200", mig=True), {"GPU 0": ("failed", "MIG"), "GPU 1": ("failed", "MIG")}),
        (nvml("NVIDIA GH200 480GB", c2c=True), {"GPU 0": ("ok", "a superchip")}),
        (nvml("NVIDIA H200", "NVIDIA H200", lost=1), {"GPU 0": ("ok", "counter"), "GPU 1": ("failed", "GPU is lost")}),
        (nvml(), {"NVML": ("warning", "of 0 (all)"), "profile": ("warning", "because no GPU is found")}),
        (no_nvml(), {"NVML": ("warning", "no GPU is found"), "profile": ("warning", "flagged reference_gpu")}),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], machine: Any, found: dict[str, tuple[str, str]]
) -> None:
    monkeypatch.setattr("energylens_vllm.meter.nvml.pynvml", machine)
    status, made = checks(capsys)
    assert {name: made[name]["status"] for name in found} == {name: status for name, (status, _) in found.items()}
    assert all(words in made[name]["detail"] for name, (_, words) in found.items())
    assert all(check["advice"] for check in made.values() if check["status"] == "failed")
    assert status == (1 if any(check["status"] == "failed" for check in made.values()) else 0)


def test_only_gpus_that_cuda_shows_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("energylens_vllm.meter.nvml.pynvml", nvml("NVIDIA H200", "NVIDIA L40S"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    _, found = checks(capsys)
    assert "GPU 0" not in found
    assert found["GPU 1"]["detail"] == "NVIDIA L40S, energy counter"
    assert found["profile"]["detail"].startswith("L40S (as found)")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7")
    _, found = checks(capsys)
    assert "0 GPUs' UUIDs" in found["NVML"]["detail"]


def test_the_setting_says_which_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENERGYLENS_GPU", "H100-SXM")
    assert doctor.profile(["NVIDIA H200"]).detail.startswith("H100-SXM (as set)")


def test_a_model_that_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.model(None).status == "ok"
    assert main(["doctor", "Qwen/Qwen3-8B"]) == 0
    assert "model            ok       Qwen/Qwen3-8B: 8.19 B parameters, not quantized" in capsys.readouterr().out
    assert doctor.model(str(ROOT / "tests" / "einsum" / "cascades" / "llama-3.1-8b.yaml")).status == "ok"


def test_a_model_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "llama-3.2-8b"]) == 1
    out = capsys.readouterr().out
    assert "model            failed" in out
    assert "- model: `energylens models` lists names" in out


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "status", "detail"]
    assert lines[1].startswith("energylens-vllm  ok")
