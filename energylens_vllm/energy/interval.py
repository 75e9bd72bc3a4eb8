"""How sure a prediction is: 90 % intervals from what profiles missed on models that they were not fitted on.

The relative standard deviation of a step is that of its phases on held-out models, mixed by their tokens, and in
quadrature with it what is known to be less sure here: a GPU whose energy was not measured, a number format or kernel
that no measurement covers, communication. Each of those is also a flag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from energylens_vllm.einsum.kernel import Kernel
from energylens_vllm.energy.batch import Array, Steps
from energylens_vllm.energy.deployment import Deployment
from energylens_vllm.energy.precision import format_of, kernel_format
from energylens_vllm.hardware.profile import GpuProfile

#: Half-width of a 90 % interval of a normal distribution, in standard deviations.
HALF_WIDTH_90 = 1.645
#: One relative standard deviation of a collective's time and energy where links are involved (docs/collectives.md).
COMMUNICATION_STD = 0.2
#: What comes on top where contexts are split over GPUs. On two H200s with vLLM 0.25.1 what that changes was predicted
#: 7 % off in time and 5 % in energy (benchmarks/context_parallel.py); other GPUs and releases were not recorded.
DECODE_CONTEXT_STD = 0.1
#: Where tokens are split: no step was recorded; judgement, meant to be too wide.
PREFILL_CONTEXT_STD = 0.2
#: Of a reason to be less sure that a profile, made before there was such a flag, does not know.
OTHER_STD = 0.1


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """Relative standard deviations of one deployment: (time, energy) for each phase, and what comes on top."""

    decode: tuple[float, float]
    prefill: tuple[float, float]
    extra: tuple[float, float]
    flags: frozenset[str]

    @classmethod
    def of(
        cls, profile: GpuProfile, kernels: Sequence[Kernel], quantization: str | None, deployment: Deployment
    ) -> Uncertainty:
        """Of kernels on a GPU."""
        kind = "experts" if any(kernel.experts for kernel in kernels) else "dense"
        flags = set()
        if not profile.calibrated:
            flags.add("uncalibrated_gpu")
        form = format_of(quantization)
        used = {f"{kernel.family}.{kernel_format(form, kernel)}" for kernel in kernels if kernel.gemm is not None}
        if not used <= set(profile.calibrated_formats):
            flags.add("uncalibrated_format")
        if any(k.attention is not None and k.attention.head_dim != k.attention.value_dim for k in kernels):
            flags.add("extrapolated")  # latent attention: no profile was fitted on steps that ran it
        if deployment.enforce_eager:
            flags.add("eager_host")  # Python launches every kernel, on another machine than where it was measured
        if deployment.data_parallel_size > 1 and kind == "experts":
            flags.add("data_parallel_assumed_even")
        extra = [
            float(np.sqrt(sum(profile.std.get(f"{quantity}.{flag}", OTHER_STD) ** 2 for flag in flags)))
            for quantity in ("time", "energy")
        ]
        return cls(
            (profile.std[f"time.{kind}.decode"], profile.std[f"energy.{kind}.decode"]),
            (profile.std[f"time.{kind}.prefill"], profile.std[f"energy.{kind}.prefill"]),
            (extra[0], extra[1]),
            frozenset(flags),
        )

    def wider(self, flag: str, std: float) -> Uncertainty:
        """Less sure for a reason: `std` more on time and energy, in quadrature."""
        time, energy = self.extra
        return replace(self, extra=(math.hypot(time, std), math.hypot(energy, std)), flags=self.flags | {flag})

    def relative(self, steps: Steps, communication_share: Array) -> tuple[Array, Array]:
        """Half-widths of the 90 % intervals of each step's time and energy, relative to them.

        `communication_share` is the part of a step's time that collectives take.
        """
        share = np.divide(steps.decode_tokens, steps.tokens, out=np.ones_like(steps.tokens), where=steps.tokens > 0)
        widths = []
        for decode, prefill, extra in zip(self.decode, self.prefill, self.extra, strict=True):
            mixed = share * decode + (1 - share) * prefill
            communication = COMMUNICATION_STD * communication_share
            widths.append(HALF_WIDTH_90 * np.sqrt(mixed**2 + extra**2 + communication**2))
        return widths[0], widths[1]
