"""Load a GPU profile and refuse one that is incomplete."""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from energylens_vllm.errors import EnergyLensError, unknown

PROFILES = pathlib.Path(__file__).parent / "profiles"


@dataclass(frozen=True, slots=True)
class Coefficient:
    """One number of a profile. `std` is one standard deviation, relative to the value."""

    value: float
    std: float
    unit: str
    source: str


@dataclass(frozen=True)
class GpuProfile:
    """Everything the step model knows of one kind of GPU.

    `coefficients` maps a dotted name ("linear.bfloat16.compute_efficiency") to its `Coefficient`; the names that the
    step model reads are described in docs/profiles.md. `calibrated` says whether energy was fitted on measurements of
    this GPU, or only taken from cited constants; `calibrated_formats` which kernels in which number formats those
    measurements cover ("linear.fp8"), and `vllm_release` which vLLM ran them (its kernels and its host are part of
    every step). `by_release` has the coefficients that measurements with another release gave instead, see
    `at_release`. `std` holds relative standard deviations of predictions, by quantity ("time" or "energy") and what
    they are of: "energy.dense.decode", or a flag that widens the interval, "energy.uncalibrated_format".
    `calibration` is what `energylens calibrate` says of its run: fit errors, clocks, temperatures, driver, what was not
    measured; `interconnect` what it measured between GPUs, in place of the shipped one (empty if it did not).
    """

    name: str
    memory_bytes: float
    sm_count: int
    nvlink: bool
    calibrated: bool
    coefficients: Mapping[str, Coefficient]
    vllm_release: str = "0.25.1"
    by_release: Mapping[str, Mapping[str, Coefficient]] = field(default_factory=dict)
    calibrated_formats: tuple[str, ...] = ()
    std: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    interconnect: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        try:
            return self.coefficients[name].value
        except KeyError:
            raise unknown(f"coefficient of GPU profile {self.name}", name, self.coefficients) from None

    def __contains__(self, name: str) -> bool:
        return name in self.coefficients

    @property
    def async_scheduling(self) -> bool:
        """Whether vLLM scheduled asynchronously in the measurements: by default from release 0.14 on."""
        return parse_release(self.vllm_release) >= (0, 14)

    @property
    def small_expert_tiles(self) -> bool:
        """Whether the default tiles of vLLM's fused experts follow the number of tokens (later than 0.11)."""
        return parse_release(self.vllm_release) >= (0, 12)

    @property
    def contiguous_experts(self) -> bool:
        """Whether vLLM ran 8-bit experts by DeepGEMM's contiguous grouped GEMM, at every batch size: 0.11, where
        `VLLM_USE_DEEP_GEMM_E8M0` is on by default (triton_deep_gemm_moe.py)."""
        return parse_release(self.vllm_release) < (0, 12)

    @property
    def splits_prefills(self) -> bool:
        """Whether vLLM runs prefill context parallelism (v1/worker/gpu/pcp_manager.py: in 0.32, not in 0.25)."""
        return parse_release(self.vllm_release) >= (0, 32)

    @property
    def eager_contexts(self) -> bool:
        """Whether vLLM's attention over split contexts, except latent attention, exchanges outputs also in steps whose
        requests have no context yet, and waits for the GPU before each step: a number that it copies there stops
        asynchronous scheduling. Both were so in 0.25 (flash_attn.py, `get_dcp_local_seq_lens`), and no more in 0.32.
        """
        return parse_release(self.vllm_release) < (0, 32)

    def measured_release(self, release: str) -> str:
        """The release that was measured and is nearest to `release`."""
        return min([self.vllm_release, *self.by_release], key=lambda known: _distance(known, release))

    def at_release(self, release: str) -> GpuProfile:
        """The profile for a release of vLLM: with the coefficients that were measured nearest to it."""
        other = self.by_release.get(self.measured_release(release), {})
        return replace(self, vllm_release=release, coefficients={**self.coefficients, **other}, by_release={})

    def with_values(self, values: Mapping[str, float], source: str) -> GpuProfile:
        """A copy with some values replaced (a fit, an online correction); `source` says by whom.

        Raises EnergyLensError for a name that the profile does not have.
        """
        changed = dict(self.coefficients)
        for name, value in values.items():
            self[name]  # refuses a name that does not exist
            changed[name] = replace(changed[name], value=float(value), source=source)
        return replace(self, coefficients=changed)

    def to_json(self) -> dict[str, Any]:
        """The profile as it is stored in JSON."""
        return {
            "name": self.name,
            "memory_bytes": self.memory_bytes,
            "sm_count": self.sm_count,
            "nvlink": self.nvlink,
            "calibrated": self.calibrated,
            "vllm_release": self.vllm_release,
            "calibrated_formats": list(self.calibrated_formats),
            "std": dict(self.std),
            "coefficients": _to_json(self.coefficients),
            "by_release": {release: _to_json(given) for release, given in self.by_release.items()},
            **({"calibration": dict(self.calibration)} if self.calibration else {}),
            **({"interconnect": dict(self.interconnect)} if self.interconnect else {}),
        }


def known_gpus() -> list[str]:
    """Names of the shipped profiles, as `Deployment.gpu` takes them."""
    return sorted(path.stem for path in PROFILES.glob("*.json"))


def load_profile(gpu: str | os.PathLike[str]) -> GpuProfile:
    """A shipped profile by name, or one from a JSON file (as `energylens calibrate` writes) by path.

    Raises EnergyLensError naming the GPU or the file's field that is wrong.
    """
    text = os.fspath(gpu)
    if text.endswith(".json"):
        path = pathlib.Path(text)
        if not path.is_file():
            raise EnergyLensError(f"gpu: no profile file {text!r}; accepted: {', '.join(known_gpus())} or a .json path")
        return _read(path)
    if text not in known_gpus():
        raise unknown("gpu", text, known_gpus(), "Or give the path of a profile that `energylens calibrate` wrote.")
    return _shipped(text)


def parse_release(text: str) -> tuple[int, int]:
    """Major and minor number of a release of vLLM: of "0.25.1" as of "0.25rc1". Raises EnergyLensError for text without
    them."""
    found = re.match(r"(\d+)\.(\d+)", text)
    if found is None:
        raise EnergyLensError(f"vllm_release: {text!r} is not a release such as '0.25.1'")
    return int(found[1]), int(found[2])


def _distance(one: str, other: str) -> int:
    (major, minor), (other_major, other_minor) = parse_release(one), parse_release(other)
    return abs((major - other_major) * 1000 + minor - other_minor)


@cache
def _shipped(name: str) -> GpuProfile:
    return _read(PROFILES / f"{name}.json")


def _to_json(coefficients: Mapping[str, Coefficient]) -> dict[str, Any]:
    return {
        name: {"value": c.value, "std": c.std, "unit": c.unit, "source": c.source}
        for name, c in sorted(coefficients.items())
    }


def _from_json(raw: Mapping[str, Any]) -> dict[str, Coefficient]:
    return {
        str(name): Coefficient(float(c["value"]), float(c["std"]), str(c["unit"]), str(c["source"]))
        for name, c in raw.items()
    }


def _read(path: pathlib.Path) -> GpuProfile:
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise EnergyLensError(f"profile {path}: not JSON: {error}") from error
    try:
        return GpuProfile(
            name=str(raw["name"]),
            memory_bytes=float(raw["memory_bytes"]),
            sm_count=int(raw["sm_count"]),
            nvlink=bool(raw["nvlink"]),
            calibrated=bool(raw["calibrated"]),
            vllm_release=str(raw["vllm_release"]),
            calibrated_formats=tuple(str(name) for name in raw["calibrated_formats"]),
            std={str(name): float(value) for name, value in raw["std"].items()},
            coefficients=_from_json(raw["coefficients"]),
            by_release={str(release): _from_json(given) for release, given in raw["by_release"].items()},
            calibration=dict(raw.get("calibration", {})),
            interconnect=dict(raw.get("interconnect", {})),
        )
    except KeyError as error:
        raise EnergyLensError(f"profile {path}: field {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise EnergyLensError(f"profile {path}: {error}") from error
