"""What can be deployed: degrees that vLLM accepts for a network, number formats, batch limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from energylens_vllm.einsum import Cascade, Mesh, Widths
from energylens_vllm.einsum.errors import EinsumError
from energylens_vllm.energy import Deployment
from energylens_vllm.energy.deployment import DCP_COMM_BACKENDS
from energylens_vllm.energy.expert_exchange import ALL2ALL_BACKENDS
from energylens_vllm.energy.precision import QUANTIZATIONS, format_of
from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.hardware.interconnect import load_interconnect
from energylens_vllm.hardware.profile import GpuProfile, load_profile

#: Batch limits (`max_num_seqs`) that are tried; between the last that fits and the first that does not, the most that
#: memory holds is one more.
MAX_NUM_SEQS = (
    1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 160, 176, 192, 208, 224, 240,
    256, 288, 320, 352, 384, 416, 448, 480, 512, 576, 640, 704, 768, 832, 896, 960, 1024,
)  # fmt: skip
#: Tokens of a step (`max_num_batched_tokens`) that are tried.
MAX_NUM_BATCHED_TOKENS = (2048, 4096, 8192, 16384)
#: The release of vLLM that is predicted for if none is asked for: the newest that is tested.
VLLM_RELEASE = "0.33.0"
#: Rows and columns of weights that share a scale in checkpoints with block scales.
SCALE_BLOCK = 128
#: Share of requests that may wait in line where no bound on the time to first token is given.
MOST_WAITING = 0.05
#: CUDA graphs are captured up to this size whatever the batch limit; the commands say so.
MAX_CAPTURE_SIZE = 512
CAPTURE_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, MAX_CAPTURE_SIZE + 1, 16))


@dataclass(frozen=True)
class Load:
    """What is asked of a deployment. Lengths are means; latencies are bounds on means. `rate_per_s` are requests a
    second of the whole deployment; None asks for as much as a full batch gives.

    Raises EnergyLensError for what is not positive.
    """

    prompt_tokens: float
    output_tokens: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    rate_per_s: float | None = None
    prefix_cache_hit_rate: float = 0.0
    max_model_len: int | None = None  #: longest request that has to fit; None: twice the mean

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 1):
                raise EnergyLensError(f"{name}: {getattr(self, name)!r}; accepted: 1 or more")
        for name, unit in (("ttft_s", "seconds"), ("tpot_s", "seconds"), ("rate_per_s", "requests a second")):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise EnergyLensError(f"{name}: {value!r} is not a positive number of {unit}")
        if not 0 <= self.prefix_cache_hit_rate < 1:
            raise EnergyLensError(
                f"prefix_cache_hit_rate: {self.prefix_cache_hit_rate!r}; accepted: 0 up to, not including, 1"
            )
        if self.max_model_len is not None and self.max_model_len < self.prompt_tokens + self.output_tokens:
            raise EnergyLensError(
                f"max_model_len: {self.max_model_len} is shorter than prompt and output, "
                f"{self.prompt_tokens + self.output_tokens:.0f} tokens"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest request (`max_model_len`)."""
        return self.max_model_len or math.ceil(2 * (self.prompt_tokens + self.output_tokens) / 16) * 16


@dataclass(frozen=True)
class Space:
    """What is tried. `gpus` are profile names; `max_gpus` bounds the GPUs of a deployment with all its replicas, and
    with `exactly` is their number. Of degrees and formats None means all that vLLM accepts for the network on the GPU.

    Raises EnergyLensError for numbers that are not positive.
    """

    gpus: tuple[str, ...] = ("H200-SXM",)
    max_gpus: int = 8
    exactly: bool = False
    tensor_parallel_size: tuple[int, ...] | None = None
    pipeline_parallel_size: tuple[int, ...] | None = None
    data_parallel_size: tuple[int, ...] | None = None
    enable_expert_parallel: bool | None = None
    quantization: tuple[str | None, ...] | None = None
    kv_cache_dtype: tuple[str, ...] | None = None
    max_num_seqs: tuple[int, ...] = MAX_NUM_SEQS
    max_num_batched_tokens: tuple[int, ...] = MAX_NUM_BATCHED_TOKENS
    gpu_memory_utilization: float = 0.9
    power_limit_w: tuple[float, ...] | None = None
    vllm_release: str = VLLM_RELEASE
    expert_routing: str = "uniform"  #: how tokens choose experts, see `Routing.parse`
    enable_eplb: bool = False  #: also experts placed by their load, with each of these numbers of copies
    num_redundant_experts: tuple[int, ...] = (0,)
    #: where data and expert parallelism go together, how tokens reach other ranks' experts
    all2all_backend: tuple[str, ...] = ("allgather_reducescatter",)
    enable_dbo: bool = False  #: also dual-batch overlap there, with DeepEP's kernels as vLLM has it
    #: parts of contexts over the tensor-parallel GPUs, None: 1 and the most; how their outputs are put together
    decode_context_parallel_size: tuple[int, ...] | None = None
    dcp_comm_backend: tuple[str, ...] = ("ag_rs",)
    prefill_context_parallel_size: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.gpus:
            raise EnergyLensError("gpus: none given")
        for name in ("max_gpus", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
                     "max_num_seqs", "max_num_batched_tokens", "prefill_context_parallel_size",
                     "decode_context_parallel_size"):  # fmt: skip
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and value < 1:
                    raise EnergyLensError(f"{name}: {value!r} is not a positive whole number")
        for copies in self.num_redundant_experts:
            if copies < 0:
                raise EnergyLensError(f"num_redundant_experts: {copies!r} is not a whole number of at least 0")
        if any(self.num_redundant_experts) and not self.enable_eplb:
            raise EnergyLensError(f"num_redundant_experts: {max(self.num_redundant_experts)} needs enable_eplb")
        for backend in self.all2all_backend:
            if backend not in ALL2ALL_BACKENDS:
                raise unknown("all2all_backend", backend, ALL2ALL_BACKENDS)
        for backend in self.dcp_comm_backend:
            if backend not in DCP_COMM_BACKENDS:
                raise unknown("dcp_comm_backend", backend, DCP_COMM_BACKENDS)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise EnergyLensError(f"gpu_memory_utilization: {self.gpu_memory_utilization!r}; accepted: above 0, to 1")


def engines(cascade: Cascade, quantization: str | None, space: Space) -> Iterator[Deployment]:
    """Every way of running one engine of the network on up to `space.max_gpus` GPUs; `quantization` is what the
    checkpoint is stored in.

    Pipeline stages and, for dense networks, data-parallel ranks share nothing that replicas would not share, so data
    parallelism inside an engine is tried for networks with experts only.
    Raises EnergyLensError for a degree that was asked for and that the network cannot be split by.
    """
    experts = any(cascade.expert_rank(block) for block in cascade.blocks)
    for gpu in dict.fromkeys(space.gpus):
        profile = load_profile(gpu)
        for mesh in _degrees(cascade, experts, space):
            for method in _quantizations(quantization, profile, space):
                if not _blocks_fit(cascade, method, mesh):
                    continue
                for cache, limit, placed, sent, combined in itertools.product(
                    _cache_types(profile, space),
                    space.power_limit_w or (None,),
                    _placements(cascade, mesh.ep, space) if mesh.ep > 1 else ({},),
                    _exchanges(profile, mesh, space) if mesh.ep > 1 and mesh.dp > 1 and mesh.pcp == 1 else ({},),
                    dict.fromkeys(space.dcp_comm_backend) if mesh.dcp > 1 else ("ag_rs",),
                ):
                    yield Deployment(
                        gpu=gpu,
                        tensor_parallel_size=mesh.tp,
                        pipeline_parallel_size=mesh.pp,
                        data_parallel_size=mesh.dp,
                        prefill_context_parallel_size=mesh.pcp,
                        decode_context_parallel_size=mesh.dcp,
                        dcp_comm_backend=combined,
                        enable_expert_parallel=mesh.ep > 1,
                        quantization=method,
                        kv_cache_dtype=cache,
                        cudagraph_capture_sizes=CAPTURE_SIZES,
                        power_limit_w=limit,
                        vllm_release=space.vllm_release,
                        expert_routing=space.expert_routing,
                        **placed,
                        **sent,
                    )


def _placements(cascade: Cascade, ranks: int, space: Space) -> Iterator[dict[str, Any]]:
    """Experts in order and, if asked for, placed by their load, with copies that fill all ranks alike as in vLLM."""
    yield {}
    if not space.enable_eplb:
        return
    names = {cascade.expert_rank(block) for block in cascade.blocks} - {None}
    sizes = {cascade.ranks[name].size for name in names if name is not None}
    for copies in dict.fromkeys(space.num_redundant_experts):
        if all(size is not None and (size + copies) % ranks == 0 for size in sizes):
            yield {"enable_eplb": True, "num_redundant_experts": copies}


def _exchanges(profile: GpuProfile, mesh: Mesh, space: Space) -> Iterator[dict[str, Any]]:
    """How tokens reach other ranks' experts, as far as it was measured on the GPU. vLLM has dual-batch overlap with
    whole contexts only."""
    measured = bool(load_interconnect(profile.name, profile.nvlink).expert_exchange)
    deepep = [backend for backend in ALL2ALL_BACKENDS if ALL2ALL_BACKENDS[backend]]
    for backend in dict.fromkeys(space.all2all_backend):
        if measured or backend not in deepep:
            yield {"all2all_backend": backend}
    if space.enable_dbo and measured and mesh.dcp == 1:
        for backend in [each for each in space.all2all_backend if each in deepep] or deepep:
            yield {"all2all_backend": backend, "enable_dbo": True}


def _degrees(cascade: Cascade, experts: bool, space: Space) -> Iterator[Mesh]:
    every = range(1, space.max_gpus + 1)
    found, refused = False, None
    for tp in space.tensor_parallel_size or every:
        if not _splits(cascade, tp, space):
            continue
        for dp, pcp, dcp in itertools.product(
            space.data_parallel_size or (every if experts else (1,)),
            space.prefill_context_parallel_size,
            space.decode_context_parallel_size or _context_parts(cascade, tp),
        ):
            ranks = tp * pcp * dp
            if ranks > space.max_gpus:
                continue
            for ep in _expert_ranks(ranks if experts else 1, space.enable_expert_parallel):
                mesh = Mesh(tp=tp, dp=dp, ep=ep, pcp=pcp, dcp=dcp)
                if (problem := _lowers(cascade, mesh)) is not None:
                    refused = problem
                    continue
                for pp in _stages(cascade, space):
                    if ranks * pp <= space.max_gpus:
                        found = True
                        yield replace(mesh, pp=pp)
    for field in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if not found and refused is not None and (asked := getattr(space, field)) not in (None, (1,)):
            degrees = " or ".join(map(str, asked))
            raise EnergyLensError(f"{field}: {degrees} does not split {cascade.name}: {refused}") from refused


def _context_parts(cascade: Cascade, tp: int) -> Sequence[int]:
    """Whole contexts, and split over as many GPUs as can: where splitting them takes less energy, more parts take
    less, or hardly more."""
    for parts in range(tp, 1, -1):
        if tp % parts == 0 and _lowers(cascade, Mesh(tp=tp, dcp=parts)) is None:
            return 1, parts
    return (1,)


def _expert_ranks(ranks: int, wanted: bool | None) -> Sequence[int]:
    """Degrees of expert parallelism over `ranks` GPUs."""
    return (1,) if ranks == 1 or wanted is False else (ranks,) if wanted else (1, ranks)


def _stages(cascade: Cascade, space: Space) -> Iterator[int]:
    """Numbers of pipeline stages that have a layer each. Raises what says why not where one was asked for."""
    layers = sum(block.count or 0 for block in cascade.blocks)
    for stages in space.pipeline_parallel_size or range(1, space.max_gpus + 1):
        if stages <= max(layers, 1):
            yield stages
        elif space.pipeline_parallel_size is not None:
            raise EnergyLensError(f"pipeline_parallel_size: {stages} stages for the {layers} layers of {cascade.name}")


def _splits(cascade: Cascade, tp: int, space: Space) -> bool:
    """Whether the network can be split so. Raises what says why not where the degree was asked for."""
    problem = _lowers(cascade, Mesh(tp=tp))
    if problem is not None and space.tensor_parallel_size is not None:
        raise EnergyLensError(f"tensor_parallel_size: {tp} does not split {cascade.name}: {problem}") from problem
    return problem is None


def _lowers(cascade: Cascade, mesh: Mesh) -> EinsumError | None:
    """What is wrong with splitting the network so, if anything."""
    try:
        cascade.kernels(Widths(), mesh)
    except EinsumError as error:
        return error
    return None


def _blocks_fit(cascade: Cascade, quantization: str | None, mesh: Mesh) -> bool:
    """Whether block scales can be split with the weights: vLLM refuses parts that are no multiple of a block.

    Source: vLLM, model_executor/layers/quantization/utils/fp8_utils.py, `validate_fp8_block_shape` and
    `validate_fp8_block_shape_moe`.
    """
    form = format_of(quantization) if quantization in QUANTIZATIONS else None
    if form is None or form.kernel != "fp8_block":
        return True
    whole = {kernel.name: kernel.gemm.k for kernel in cascade.kernels(Widths(), Mesh()) if kernel.gemm is not None}
    return all(
        kernel.gemm.k % SCALE_BLOCK == 0 or kernel.gemm.k == whole.get(kernel.name)
        for kernel in cascade.kernels(Widths(), mesh)
        if kernel.quantized and kernel.gemm is not None
    )


def computes_fp8(profile: GpuProfile) -> bool:
    """Whether the GPU's tensor cores multiply 8-bit floats faster than 16-bit ones (Ada, Hopper and later)."""
    return profile["compute.fp8.peak_flops"] > profile["compute.bfloat16.peak_flops"]


def _quantizations(stored: str | None, profile: GpuProfile, space: Space) -> Sequence[str | None]:
    if space.quantization is not None:
        return tuple(dict.fromkeys(stored if method is None else method for method in space.quantization))
    if stored is not None:
        return (stored,)
    return (None, "fp8") if computes_fp8(profile) else (None,)


def _cache_types(profile: GpuProfile, space: Space) -> Sequence[str]:
    if space.kv_cache_dtype is not None:
        return space.kv_cache_dtype
    return ("auto", "fp8") if computes_fp8(profile) else ("auto",)
