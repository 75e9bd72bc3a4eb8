"""Check this machine: vLLM and its version, the plugin, its settings, NVML, the GPUs, their profiles, and a model.

    energylens doctor
    energylens doctor Qwen/Qwen3-8B

Exit status 0 if the plugin will work as it is set up here, 1 if something has to be mended first. A warning (no vLLM,
no GPU, a GPU that no profile describes) does not change it. What to do about each stands under the table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from energylens_vllm import __version__
from energylens_vllm.architectures import known_models
from energylens_vllm.cli.table import quantity, table
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hardware import load_profile
from energylens_vllm.meter import MeterError, MigRefused
from energylens_vllm.meter.nvml import Nvml, NvmlGpu
from energylens_vllm.serving import settings
from energylens_vllm.serving.start import REFERENCE_GPU, gpu_of

OLDEST_VLLM, FIRST_UNTRIED_VLLM = (0, 25, 1), (0, 34)  #: as in the extra `vllm`
PLUGIN = "energylens"


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, how it is, and what to do about it, if anything."""

    name: str
    status: Literal["ok", "warning", "failed"]
    detail: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="also check that this model can be predicted: a name (see `energylens models`), or the path of its "
        "config.json or of a cascade in YAML",
    )
    parser.add_argument("--json", action="store_true", help="print the checks as a JSON list")


def run(args: argparse.Namespace) -> int:
    checks = list(look(args.model))
    if args.json:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        print(table(["check", "status", "detail"], [(c.name, c.status, c.detail) for c in checks], left=3))
        advice = [f"{check.name}: {check.advice}" for check in checks if check.advice]
        if advice:
            print("\nWhat to do:\n" + "\n".join(f"- {line}" for line in advice))
    return 1 if any(check.status == "failed" for check in checks) else 0


def look(name: str | None) -> Iterator[Check]:
    """All checks, in the order in which one would mend what fails; `name` is the model's."""
    yield Check("energylens-vllm", "ok", f"{__version__}, Python {platform.python_version()}")
    yield vllm()
    yield plugin()
    yield settings_in_environment()
    with Machine() as machine:
        yield machine.nvml()
        products = []
        for product, check in machine.gpus():
            products.append(product)
            yield check
    yield profile(products)
    yield model(name)


def vllm() -> Check:
    oldest, untried = (".".join(map(str, bound)) for bound in (OLDEST_VLLM, FIRST_UNTRIED_VLLM))
    install = f"pip install 'vllm>={oldest},<{untried}'"
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return Check("vLLM", "warning", "not installed: there is nothing to plug into", f"to serve, {install}; the "
                     "other commands work without. On a machine without a GPU `bash examples/serve.sh` sets up the "
                     "CPU build.")  # fmt: skip
    release = tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
    if OLDEST_VLLM <= release < FIRST_UNTRIED_VLLM:
        return Check("vLLM", "ok", version)
    if release < OLDEST_VLLM:
        return Check("vLLM", "failed", f"{version} is older than {oldest}", install)
    return Check("vLLM", "warning", f"{version} is newer than what was tried", f"if it misbehaves, {install}")


def plugin() -> Check:
    """As vLLM finds it: entry points by name, over all groups filtered by VLLM_PLUGINS."""
    found = [point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == PLUGIN]
    if not found:
        return Check("plugin", "failed", "vLLM cannot find it", "install the package where vLLM is: pip install .")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in [name.strip() for name in chosen.split(",")]:
        add = ",".join(filter(None, [chosen, PLUGIN]))
        return Check("plugin", "failed", f"VLLM_PLUGINS={chosen!r} leaves it out", f"export VLLM_PLUGINS='{add}'")
    try:
        found[0].load()
    except Exception as error:
        problem = f"{found[0].value} does not load: {type(error).__name__}: {error}"
        return Check("plugin", "failed", problem, "install the package again: pip install --force-reinstall .")
    return Check("plugin", "ok", f"vLLM finds it as {found[0].value}")


def settings_in_environment() -> Check:
    try:
        chosen = settings.load()
        if chosen.gpu is not None:
            load_profile(chosen.gpu)
    except EnergyLensError as error:
        return Check("settings", "failed", str(error), "correct or unset that variable; docs/settings.md has them all")
    if not chosen.enabled:
        return Check("settings", "failed", "enabled is false: the plugin will do nothing", "unset ENERGYLENS_ENABLED")
    default = settings.Settings()
    changed = {name: getattr(chosen, name) for name, *_ in settings.table()}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    return Check("settings", "ok", ", ".join(f"{name}={value!r}" for name, value in changed.items()) or "defaults")


class Machine:
    """NVML while it is in use: the GPUs that CUDA_VISIBLE_DEVICES shows, as the plugin's meter sees them."""

    def __init__(self) -> None:
        self._backend = Nvml(os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._problem, self._found = "", list[tuple[str, NvmlGpu | MeterError]]()
        try:
            self._found = self._backend.look()
        except MeterError as error:
            self._problem = str(error)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self._backend.close()

    def nvml(self) -> Check:
        if self._problem:
            advice = (
                "if there is an NVIDIA GPU, install its driver, or let its container see it (--gpus all)"
            )
            return Check("NVML", "warning", f"{self._problem}: no GPU is found", advice)
        number = len(self._found)
        return Check("NVML", "ok", f"driver {self._backend.driver()}, {number} GPU{'s' * (number != 1)}")

    def gpus(self) -> Iterator[tuple[str, Check]]:
        """Each one's product name, and whether its energy can be measured."""
        for index, (product, found) in enumerate(self._found):
            if isinstance(found, MigRefused):
                yield product, Check(f"GPU {index}", "failed", f"{product}: {found}", "use a GPU without MIG, or set "
                                     "ENERGYLENS_METER=0: predictions do without")  # fmt: skip
            elif isinstance(found, MeterError):
                yield product, Check(f"GPU {index}", "failed", str(found), "nvidia-smi says more of what is wrong")
            else:
                yield product, Check(f"GPU {found.label}", *_COUNTS[found.counts](product))


#: what a GPU's counter counts -> (status, detail) for a product
_COUNTS: dict[str, Callable[[str], tuple[Literal["ok", "warning", "failed"], str]]] = {
    "gpu": lambda product: ("ok", f"{product}, energy counter"),
    "module": lambda product: ("ok", f"{product}, a superchip: power of the GPU alone is integrated"),
    "nothing": lambda product: ("warning", f"{product}, no energy counter: power readings are integrated"),
}


def profile(products: list[str]) -> Check:
    """What the plugin predicts for here, by the setting, by the first of the GPUs, or for want of either."""
    choose = "set ENERGYLENS_GPU to the GPU that you mean (see `energylens gpus`)"
    try:
        chosen = settings.load().gpu
    except EnergyLensError:
        chosen = None  # reported with the settings
    detected = gpu_of(products[0]) if products else None
    name = chosen or detected or REFERENCE_GPU
    try:
        energy = "" if load_profile(name).calibrated else ", energy from cited constants: intervals are wide"
    except EnergyLensError as error:
        return Check("profile", "failed", str(error), choose)
    if chosen or detected:
        return Check("profile", "ok", f"{name} ({'as set' if chosen else 'as found'}){energy}")
    why = f"none describes {products[0]}" if products and products[0] else "no GPU is found"
    return Check("profile", "warning", f"{name}, because {why}; its steps are flagged reference_gpu", choose)


def model(name: str | None) -> Check:
    """Whether the model can be predicted; without a name, how many are known."""
    if name is None:
        return Check("model", "ok", f"{len(known_models())} known by name; `energylens doctor MODEL` checks one")
    try:
        built = EnergyModel(name, Deployment())
    except EnergyLensError as error:
        return Check("model", "failed", str(error), "`energylens models` lists names; of another model of a known "
                     "family give the path of its config.json; docs/einsum.md says how to write any other")  # fmt: skip
    parameters = quantity(built.cascade.parameters(), "").replace("G", "B").strip()
    return Check("model", "ok", f"{name}: {parameters} parameters, {built.quantization or 'not quantized'}")
