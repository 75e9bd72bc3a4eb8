"""`energylens doctor` on this machine, and on machines that are only described."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from energylens_vllm.cli import doctor, main

ROOT = Path(__file__).parents[2]


class NotSupported(Exception):
    pass


def nvml(*products: str, mig: bool = False, counter: bool = True) -> SimpleNamespace:
    """An NVML with these products; its names are those of pynvml."""

    def energy(handle: int) -> int:
        if not counter:
            raise NotSupported
        return 123

    def mig_mode(handle: int) -> list[int]:
        if not mig:
            raise NotSupported
        return [1, 1]

    return SimpleNamespace(
        NVML_DEVICE_MIG_ENABLE=1,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.65.06",  # older pynvml gives bytes
        nvmlDeviceGetCount=lambda: len(products),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: products[handle],
        nvmlDeviceGetMigMode=mig_mode,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )


def checks(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    status = main(["doctor", "--json"])
    return status, {check["name"]: check for check in json.loads(capsys.readouterr().out)}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_PLUGINS", "ENERGYLENS_GPU", "ENERGYLENS_ENABLED"):
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
    assert found["settings"] == {"name": "settings", "status": "ok", "detail": "defaults"}


@pytest.mark.parametrize(
    ("version", "status"),
    [("0.25.0", "failed"), ("0.25.1", "ok"), ("0.33.0+cu130", "ok"), ("0.33.1rc2", "ok"), ("0.34.0", "warning")],
)
def test_vllm_versions(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    (check,) = doctor.vllm()
    assert check.status == status
    assert version in check.detail


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


def test_plugins_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora, energylens")
    (check,) = doctor.plugin()
    assert check.status == "ok"


@pytest.mark.parametrize(
    ("machine", "statuses", "words"),
    [
        (nvml("NVIDIA H200"), ["ok", "ok"], "profile H200-SXM (calibrated)"),
        (nvml("NVIDIA L40S"), ["ok", "ok"], "profile L40S (energy from cited constants"),
        (nvml("NVIDIA GeForce RTX 3060"), ["ok", "warning"], "no profile"),
        (nvml("NVIDIA H200", counter=False), ["ok", "warning"], "power readings are integrated"),
        (nvml("NVIDIA H200", mig=True), ["ok", "failed"], "MIG"),
        (nvml(), ["warning"], "0 GPUs"),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, machine: Any, statuses: list[str], words: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", machine)
    found = doctor.gpus()
    assert [check.status for check in found] == statuses
    assert words in found[-1].detail


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "status", "detail"]
    assert lines[1].startswith("energylens-vllm  ok")
