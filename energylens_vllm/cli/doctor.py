"""Check this machine: vLLM and its version, the plugin, the settings, NVML, the GPUs and their profiles.

Exit status 0 if the plugin will work as it is set up here, 1 if something has to be mended first. A warning (no GPU, a
GPU that no profile describes) does not change the exit status: predictions are then for another GPU, and say so.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from energylens_vllm import __version__
from energylens_vllm.cli.table import table
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hardware import load_profile
from energylens_vllm.serving import settings
from energylens_vllm.serving.start import REFERENCE_GPU, gpu_of

OLDEST_VLLM, FIRST_UNTRIED_VLLM = (0, 25, 1), (0, 34)  #: as in the extra `vllm`
PLUGIN = "energylens"


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it is, and what to know or do about it."""

    name: str
    status: Literal["ok", "warning", "failed"]
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the checks as a JSON list")


def run(args: argparse.Namespace) -> int:
    checks = [check for look in LOOKS for check in look()]
    if args.json:
        print(json.dumps([{"name": c.name, "status": c.status, "detail": c.detail} for c in checks]))
    else:
        print(table(["check", "status", "detail"], [(c.name, c.status, c.detail) for c in checks], left=3))
    return 1 if any(check.status == "failed" for check in checks) else 0


def versions() -> list[Check]:
    return [Check("energylens-vllm", "ok", f"{__version__}, Python {platform.python_version()}")]


def vllm() -> list[Check]:
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [Check("vLLM", "warning", "not installed: there is nothing to plug into, the other commands work")]
    release = tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
    if OLDEST_VLLM <= release < FIRST_UNTRIED_VLLM:
        return [Check("vLLM", "ok", version)]
    oldest, untried = (".".join(map(str, bound)) for bound in (OLDEST_VLLM, FIRST_UNTRIED_VLLM))
    status: Literal["failed", "warning"] = "failed" if release < OLDEST_VLLM else "warning"
    return [Check("vLLM", status, f"{version}; tested with {oldest} to before {untried}")]


def plugin() -> list[Check]:
    """As vLLM finds it: entry points by name, over all groups filtered by VLLM_PLUGINS."""
    found = [point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == PLUGIN]
    if not found:
        return [Check("plugin", "failed", "vLLM cannot find it: install the package (pip install energylens-vllm)")]
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in [name.strip() for name in chosen.split(",")]:
        return [Check("plugin", "failed", f"VLLM_PLUGINS={chosen!r} leaves it out; add {PLUGIN}")]
    try:
        found[0].load()
    except Exception as error:
        return [Check("plugin", "failed", f"{found[0].value} does not load: {type(error).__name__}: {error}")]
    return [Check("plugin", "ok", f"vLLM finds it as {found[0].value}")]


def settings_in_environment() -> list[Check]:
    try:
        chosen = settings.load()
        if chosen.gpu is not None:
            load_profile(chosen.gpu)
    except EnergyLensError as error:
        return [Check("settings", "failed", str(error))]
    if not chosen.enabled:
        return [Check("settings", "failed", "enabled is false: the plugin will do nothing")]
    default = settings.Settings()
    changed = {name: getattr(chosen, name) for name, *_ in settings.table()}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    return [Check("settings", "ok", ", ".join(f"{name}={value!r}" for name, value in changed.items()) or "defaults")]


def gpus() -> list[Check]:
    """NVML, then each GPU: its profile, its energy counter, MIG."""
    reference = f"predictions will be for {REFERENCE_GPU} and flagged reference_gpu"
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # no driver, no library, no permission: NVML has an exception for each
        return [Check("NVML", "warning", f"{error}: no GPU is measured; without the setting gpu, {reference}")]
    try:
        driver, count = _text(nvml.nvmlSystemGetDriverVersion()), nvml.nvmlDeviceGetCount()
        found = Check("NVML", "ok" if count else "warning", f"driver {driver}, {count} GPU{'s' * (count != 1)}")
        return [found, *(_gpu(nvml, index, reference) for index in range(count))]
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, reference: str) -> Check:
    name = f"GPU {index}"
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        product = _text(nvml.nvmlDeviceGetName(handle))
        if _attempt(lambda: nvml.nvmlDeviceGetMigMode(handle)[0]) == nvml.NVML_DEVICE_MIG_ENABLE:
            return Check(name, "failed", f"{product} in MIG mode: its energy cannot be told apart by instance")
        profile = gpu_of(product)
        counter = _attempt(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) is not None
    except Exception as error:
        return Check(name, "failed", f"NVML: {error}")
    measured = "energy counter" if counter else "no energy counter: power readings are integrated"
    if profile is None:
        return Check(
            name, "warning", f"{product}, {measured}; no profile: {reference}, unless the setting gpu says which"
        )
    energy = "calibrated" if load_profile(profile).calibrated else "energy from cited constants, not calibrated"
    return Check(name, "ok" if counter else "warning", f"{product}, {measured}, profile {profile} ({energy})")


def _attempt(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None where the GPU does not support it."""
    try:
        return read()
    except Exception:  # NVMLError_NotSupported on some products, older drivers raise others
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


LOOKS: tuple[Callable[[], list[Check]], ...] = (versions, vllm, plugin, settings_in_environment, gpus)
