"""Communication beside computation: what it saves in time, and what it costs.

A collective that runs while the GPU computes takes SMs away from the computation, and needs the work cut into parts:
part i is sent while part i + 1 is computed. Two ways:

`Overlap`     Megatron's: the kernel that produces what a collective sends (or consumes what it brings) and the
              collective are cut into S stages over the tokens. Per pair, with a stage's compute time c and time of
              communication m,  t = a (c + m) + (S - a) max(c, m),  a = min(S, 2).
`DualBatch`   vLLM's (`enable_dbo`): a step's requests in two halves that take turns; over the layers of a step, with a
              half's compute time c and time of communication m,  t = max(2 c, c + m).

c is on the SMs that are left, k fewer, at the rows of a stage: small parts fill tiles badly, and each reads all weights
again, in time as in joules. m is bound by  bytes sent / (k x one SM's rate on the links). Joules of communication:
the SMs that drive it, for as long as they do, and the same bytes as ever. Static power follows the time. So more SMs
send faster, compute slower and burn more; which number is best, predictions with several of them say.

a stages of both are exposed, not one: a collective is ready when the next stage's GEMM is, finds no SMs or too few
while that runs, and runs beside the one after. So two stages hide nothing. Layers on two H200s show it, with NCCL and
cuBLAS as they come (docs/serving.md).

Not modelled: memory bandwidth that a collective takes from the computation beside it (a tenth of HBM at most on links
of 300 to 900 GB/s), and what synchronising the stages costs the host outside CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from energylens_vllm.einsum.kernel import Kernel
from energylens_vllm.energy.batch import Array, Steps
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.energy.expert_exchange import ExpertExchanges
from energylens_vllm.energy.step import Exchanged, GpuStep, Work, per_token
from energylens_vllm.energy.timing import Timed, roofline
from energylens_vllm.errors import EnergyLensError, is_positive_whole
from energylens_vllm.hardware.profile import GpuProfile

#: Bytes a second that a channel of NCCL, which is one SM, sends at most. Source: NVIDIA/nccl, src/graph/tuning.cc,
#: perChMaxRingLL128Bws: Ampere 20, Hopper 36.7, Blackwell 40 GB/s. Ada, without NVLink: as Ampere.
CHANNEL_BYTES_PER_S = {
    "A100-SXM-80GB": 20e9, "H100-SXM": 36.7e9, "H200-SXM": 36.7e9, "B200-SXM": 40e9, "L40S": 20e9,
}  # fmt: skip
#: What it reaches of that, and the corner between few SMs and all that NCCL takes of itself (`roofline`). Source:
#: all-reduces of 134 MB between two H200s with 1, 4 and 16 CTAs (benchmarks/overlap_gpu.py --replay); other GPUs: taken
#: to be alike.
CHANNEL_SHARE, CHANNEL_CORNER = 0.55, 4.0
#: SMs behind an interconnect's `communication_power_w`: what NCCL takes of itself between two H200s, by the trace in
#: benchmarks/results/overlap_h200.
DRIVING_SMS = 24.0
#: Relative standard deviations of time and energy of overlapped steps. Measured: layers in stages on two H200s,
#: relative to the same without overlap (benchmarks/overlap_gpu.py --replay: 6.7 % of time, 4.6 % of energy; the form of
#: `Overlap` was chosen on them, no constant is fitted to them). Elsewhere: what a like model misses measured energy by
#: (docs/paper.md).
MEASURED_STD, UNMEASURED_STD = 0.07, 0.13
MEASURED_GPU = "H200-SXM"


@dataclass(frozen=True, slots=True)
class Overlap:
    """Every collective of a layer in `stages`, driven by `sms` SMs. Raises EnergyLensError for less than one."""

    stages: int = 4
    sms: int = 16

    def __post_init__(self) -> None:
        _check("stages", self.stages)
        _check("sms", self.sms)


@dataclass(frozen=True, slots=True)
class DualBatch:
    """vLLM's dual-batch overlap: steps of as many tokens or more run as two halves. Defaults: vllm/config/parallel.py
    (`dbo_decode_token_threshold`, `dbo_prefill_token_threshold`) and VLLM_DBO_COMM_SMS. Exchanges are those of the
    deployment's `all2all_backend`; vLLM does it with DeepEP's kernels (`Deployment.enable_dbo` asks for them)."""

    sms: int = 20
    decode_token_threshold: int = 32
    prefill_token_threshold: int = 512

    def __post_init__(self) -> None:
        for name in ("sms", "decode_token_threshold", "prefill_token_threshold"):
            _check(name, getattr(self, name))


def _check(name: str, value: Any) -> None:
    if not is_positive_whole(value):
        raise EnergyLensError(f"overlap: {name} {value!r} is not a positive whole number")


def overlap_std(overlap: Overlap | DualBatch, gpu: str) -> float:
    """Relative standard deviation that `overlap` adds to a step's time and energy on the GPU of a profile."""
    return MEASURED_STD if isinstance(overlap, Overlap) and gpu == MEASURED_GPU else UNMEASURED_STD


def on_fewer_sms(profile: GpuProfile, sms: int) -> GpuProfile:
    """The GPU that is left for computation. Raises EnergyLensError where nothing is left."""
    if sms >= profile.sm_count:
        raise EnergyLensError(f"overlap: sms {sms}; accepted: 1 to {profile.sm_count - 1}, {profile.name} less one")
    left = (profile.sm_count - sms) / profile.sm_count
    peaks = {name: profile[name] * left for name in profile.coefficients if name.endswith(".peak_flops")}
    return replace(profile.with_values(peaks, f"without {sms} SMs"), sm_count=profile.sm_count - sms)


def driven_by(
    collectives: Collectives,
    gpu: str,
    sms: int,
    kernel: Kernel,
    message_bytes: Array,
    exchanges: ExpertExchanges | None = None,
) -> Exchanged:
    """A collective of NCCL's, or one of the `exchanges`, that `sms` SMs drive."""
    shape = kernel.collective
    assert shape is not None
    timed = exchanges.timed(kernel, message_bytes) if exchanges else None
    timed = timed or collectives.time_s(shape.op, message_bytes, shape.size, "nccl")
    rate = CHANNEL_SHARE * CHANNEL_BYTES_PER_S.get(gpu, CHANNEL_BYTES_PER_S["H100-SXM"])
    time_s = roofline(timed.time_s, timed.wire_bytes / (sms * rate), CHANNEL_CORNER).time_s
    node = collectives.interconnect
    driven_j = node["communication_power_w"] * sms / DRIVING_SMS * time_s
    return Exchanged(time_s, driven_j + node["energy_per_link_byte_j"] * timed.wire_bytes)


@dataclass(frozen=True, slots=True)
class Pair:
    """A collective and the kernels that run beside it: those that make what it sends, or take what it brings."""

    compute: tuple[Kernel, ...]
    collective: Kernel


def pairs(kernels: Sequence[Kernel]) -> Iterator[Kernel | Pair]:
    """The kernels in order, those of a layer that overlap put together.

    A collective goes with the GEMM before it, and with the elementwise kernels between; one that gathers (for experts
    of all ranks), with the GEMM behind it. Those outside layers (embedding, head, pipeline) run alone.
    """
    left = list(kernels)
    while left:
        kernel = left.pop(0)
        if kernel.family in ("linear", "experts"):
            behind = 0
            while behind < len(left) and left[behind].family == "elementwise":
                behind += 1
            if behind < len(left) and _repeats(left[behind], kernel) and not _gathers(left[behind]):
                compute = (kernel, *left[:behind])
                collective = left[behind]
                del left[: behind + 1]
                yield Pair(compute, collective)
                continue
        elif _gathers(kernel) and left and left[0].family in ("linear", "experts") and _repeats(kernel, left[0]):
            yield Pair((left.pop(0),), kernel)
            continue
        yield kernel


def _gathers(kernel: Kernel) -> bool:
    return kernel.collective is not None and kernel.collective.op == "all_gather"


def _repeats(collective: Kernel, kernel: Kernel) -> bool:
    """Whether it is a collective of the same layers."""
    return collective.family == "collective" and collective.count == kernel.count and kernel.count > 1


class StagedStep(GpuStep):
    """A GPU that overlaps pairs in stages. `arguments`: GpuStep's."""

    def __init__(self, overlap: Overlap, collectives: Collectives, exchanges: ExpertExchanges, *arguments: Any) -> None:
        super().__init__(*arguments)
        stages, masks, profile, *rest = arguments
        self.overlap, self.collectives, self.expert_exchanges = overlap, collectives, exchanges
        self.beside = GpuStep(stages, masks, on_fewer_sms(profile, overlap.sms), *rest)

    def _add_kernels(self, work: Work, kernels: Sequence[Kernel], rows: Array) -> None:
        for item in pairs(kernels):
            if isinstance(item, Pair):
                self._add_pair(work, item, rows)
            else:
                self._add_kernel(work, item, rows)

    def _add_pair(self, work: Work, pair: Pair, rows: Array) -> None:
        stages = self.overlap.stages
        part = Work(rows)
        for kernel in pair.compute:
            self.beside._add_kernel(part, kernel, rows / stages)
        message = per_token(pair.collective.activation_bytes, rows / stages)
        gpu, sms = self.profile.name, self.overlap.sms
        sent = driven_by(self.collectives, gpu, sms, pair.collective, message, self.expert_exchanges)
        exposed = min(stages, 2)
        longer = np.maximum(part.time_s, sent.time_s)
        time_s = exposed * (part.time_s + sent.time_s) + (stages - exposed) * longer
        # What follows the clock: exposed parts, and the others while computation is the longer of the two.
        clocked_s = part.clocked_s * np.where(part.time_s >= sent.time_s, stages, exposed)
        work.run(Timed(time_s, clocked_s))
        work.communication_s = work.communication_s + (time_s - stages * part.time_s)
        work.waiting_s = work.waiting_s + stages * part.waiting_s
        work.padding_j = work.padding_j + stages * part.padding_j
        for into, joules in ((work.memory_j, part.memory_j), (work.core_j, part.core_j)):
            for name, value in joules.items():
                work.spend(into, name, stages * value)
        work.spend(work.memory_j, "communication", stages * sent.energy_j)


class DualBatchStep(GpuStep):
    """A GPU that runs steps as two halves in turns. `arguments`: GpuStep's."""

    def __init__(
        self, overlap: DualBatch, collectives: Collectives, exchanges: ExpertExchanges, *arguments: Any
    ) -> None:
        super().__init__(*arguments)
        stages, masks, profile, *rest = arguments
        self.overlap, self.collectives, self.expert_exchanges = overlap, collectives, exchanges
        left = on_fewer_sms(profile, overlap.sms)
        computing = [[kernel for kernel in kernels if kernel.family != "collective"] for kernels in stages]
        sending = [[kernel for kernel in kernels if kernel.family == "collective"] for kernels in stages]
        self.compute = GpuStep(computing, masks, left, *rest)
        self.exchanges = GpuStep(sending, masks, profile, *rest)
        self.exchanges.collective = self._driven

    def _driven(self, kernel: Kernel, message_bytes: Array) -> Exchanged:
        gpu, sms = self.profile.name, self.overlap.sms
        return driven_by(self.collectives, gpu, sms, kernel, message_bytes, self.expert_exchanges)

    def _work(self, steps: Steps) -> tuple[Work, Array]:
        whole, prefill_j = super()._work(steps)
        half = steps.share(2)
        (computed, half_prefill_j), (sent, _) = self.compute._work(half), self.exchanges._work(half)
        decodes = steps.decode_tokens == steps.tokens
        limit = np.where(decodes, self.overlap.decode_token_threshold, self.overlap.prefill_token_threshold)
        in_turns = steps.tokens >= limit
        time_s = np.maximum(2 * computed.time_s, computed.time_s + sent.time_s)
        clocked_s = computed.clocked_s * np.where(computed.time_s >= sent.time_s, 2, 1)
        merged = Work(steps.tokens)
        merged.time_s = np.where(in_turns, time_s, whole.time_s)
        merged.clocked_s = np.where(in_turns, clocked_s, whole.clocked_s)
        merged.communication_s = np.where(in_turns, time_s - 2 * computed.time_s, whole.communication_s)
        merged.waiting_s = np.where(in_turns, 2 * computed.waiting_s, whole.waiting_s)
        merged.padding_j = np.where(in_turns, 2 * computed.padding_j, whole.padding_j)
        for part, into in (("memory_j", merged.memory_j), ("core_j", merged.core_j)):
            for name, joules in getattr(whole, part).items():
                halves = 2 * (getattr(computed, part).get(name, 0.0) + getattr(sent, part).get(name, 0.0))
                merged.spend(into, name, np.where(in_turns, halves, joules))
        return merged, np.where(in_turns, 2 * half_prefill_j, prefill_j)
