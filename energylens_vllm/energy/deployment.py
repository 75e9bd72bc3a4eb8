"""A deployment: the arguments of `vllm serve` that change what a step costs, under vLLM's own names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from energylens_vllm.einsum.kernel import Mesh
from energylens_vllm.energy.expert_exchange import ALL2ALL_BACKENDS
from energylens_vllm.energy.precision import KV_CACHE_DTYPES, QUANTIZATIONS
from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.hardware.profile import load_profile, parse_release

DTYPES = ("bfloat16", "float16", "float32", "auto")
#: How partial outputs of attention are put together: gathering their log-sum-exps, or exchanging all at once.
DCP_COMM_BACKENDS = ("ag_rs", "a2a")


def default_capture_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """CUDA-graph sizes that vLLM captures by default: 1, 2, 4, by 8 to 256, by 16 to min(2 * max_num_seqs, 512).

    Source: vllm/config/vllm.py, `_set_cudagraph_sizes` (0.25 to 0.33).
    """
    limit = min(2 * max_num_seqs, 512)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, limit + 1, 16)]
    return tuple(size for size in sizes if size <= limit)


@dataclass(frozen=True)
class Deployment:
    """Where and how a model is served. Field names and defaults are vLLM's wherever vLLM has one.

    `gpu` is a profile's name ("H200-SXM") or the path of a profile's JSON. `power_limit_w` None means the profile's;
    less, down to what the GPU draws without work, is for `nvidia-smi -pl` to set.
    `vllm_release` ("0.25.1") None means the one that the profile was measured with, and `async_scheduling` None what is
    that release's default. `expert_routing`: how tokens spread over experts, see `Routing.parse`;
    `enable_eplb`, with `num_redundant_experts` copies (of vLLM's `--eplb-config`), places experts by their load.
    `all2all_backend` and `enable_dbo` (dual-batch overlap) matter where data-parallel ranks share experts.
    `decode_context_parallel_size` of the tensor-parallel GPUs share out each request's KV cache;
    `prefill_context_parallel_size` multiplies GPUs, which split the tokens of each step.
    Raises EnergyLensError naming the field, the value and what is accepted.
    """

    gpu: str = "H200-SXM"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    dtype: str = "bfloat16"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 1024
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    vllm_release: str | None = None
    expert_routing: str = "uniform"
    enable_eplb: bool = False
    num_redundant_experts: int = 0
    all2all_backend: str = "allgather_reducescatter"
    enable_dbo: bool = False
    dbo_decode_token_threshold: int = 32
    dbo_prefill_token_threshold: int = 512
    prefill_context_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    dcp_comm_backend: str = "ag_rs"
    dcp_q_replicate: bool = False
    cudagraph_capture_sizes: Sequence[int] | None = None
    power_limit_w: float | None = None

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_batched_tokens",
                     "max_num_seqs", "prefill_context_parallel_size", "decode_context_parallel_size"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise EnergyLensError(f"{name}: {value!r} is not a positive integer")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise unknown("quantization", self.quantization, QUANTIZATIONS)
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise unknown("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        self._check_power_limit()
        if self.vllm_release is not None:
            parse_release(self.vllm_release)  # refuses what is none
        copies = self.num_redundant_experts
        if not isinstance(copies, int) or isinstance(copies, bool) or copies < 0:
            raise EnergyLensError(f"num_redundant_experts: {copies!r} is not a whole number of at least 0")
        if copies and not self.enable_eplb:
            raise EnergyLensError(f"num_redundant_experts: {copies} needs enable_eplb")
        if self.enable_eplb and not self.enable_expert_parallel:
            raise EnergyLensError("enable_eplb: needs enable_expert_parallel")
        if self.all2all_backend not in ALL2ALL_BACKENDS:
            raise unknown("all2all_backend", self.all2all_backend, ALL2ALL_BACKENDS)
        if self.enable_dbo and not ALL2ALL_BACKENDS[self.all2all_backend]:  # vllm/config/vllm.py
            raise EnergyLensError(
                "enable_dbo: needs an all2all_backend of DeepEP; accepted: deepep_high_throughput, deepep_low_latency"
            )
        self._check_context_parallelism()
        sizes = self.cudagraph_capture_sizes
        if sizes is not None:
            if any(not isinstance(size, int) or size < 1 for size in sizes):
                raise EnergyLensError(f"cudagraph_capture_sizes: {sizes!r} is not a list of positive integers")
            object.__setattr__(self, "cudagraph_capture_sizes", tuple(sorted(sizes)))

    def _check_power_limit(self) -> None:
        """Refuse what no driver sets: more than the GPU's own limit, or less than it draws without work."""
        if self.power_limit_w is None:
            return
        profile = load_profile(self.gpu)
        least_w, most_w = math.ceil(profile["power.static_w"]), profile["power.limit_w"]
        if not least_w <= self.power_limit_w <= most_w:
            raise EnergyLensError(
                f"power_limit_w: {self.power_limit_w!r} W is not what {profile.name} can be limited to; accepted: "
                f"{least_w} (what it draws without work) to {most_w:g}"
            )

    def _check_context_parallelism(self) -> None:
        """Refuse what vLLM refuses whatever the model (vllm/config/parallel.py and vllm.py), and what is not modelled:
        both kinds together, which vLLM has for sparse latent attention only, and DeepEP with prefill's."""
        tensor, decode = self.tensor_parallel_size, self.decode_context_parallel_size
        prefill = self.prefill_context_parallel_size
        if tensor % decode:
            raise EnergyLensError(
                f"decode_context_parallel_size: {decode} does not divide tensor_parallel_size {tensor}, whose GPUs "
                "share the context"
            )
        if self.dcp_comm_backend not in DCP_COMM_BACKENDS:
            raise unknown("dcp_comm_backend", self.dcp_comm_backend, DCP_COMM_BACKENDS)
        for name, default in (("dcp_comm_backend", "ag_rs"), ("dcp_q_replicate", False)):
            if decode == 1 and (value := getattr(self, name)) != default:
                raise EnergyLensError(f"{name}: {value!r} needs a decode_context_parallel_size above 1")
        if prefill > 1 and decode > 1:
            raise EnergyLensError(
                f"decode_context_parallel_size: {decode} is not modelled together with prefill_context_parallel_size "
                f"{prefill}; accepted: one of them"
            )
        if self.enable_dbo and max(prefill, decode) > 1:
            raise EnergyLensError("enable_dbo: vLLM has it without context parallelism only")
        if prefill > 1 and ALL2ALL_BACKENDS[self.all2all_backend]:
            raise EnergyLensError(
                f"all2all_backend: {self.all2all_backend!r} is not modelled with prefill_context_parallel_size "
                f"{prefill}; accepted: allgather_reducescatter"
            )

    def check_experts(self, network: str) -> None:
        """Raise EnergyLensError for what changes nothing in a network without experts, of that name."""
        for name in ("expert_routing", "enable_eplb", "all2all_backend", "enable_dbo"):
            value, default = getattr(self, name), getattr(Deployment, name)
            if value != default:
                raise EnergyLensError(
                    f"{name}: {value!r} is for networks with experts, and {network} has none; accepted: {default!r}"
                )

    @property
    def num_gpus(self) -> int:
        """GPUs of the whole deployment."""
        return self.gpus_per_stage * self.pipeline_parallel_size * self.data_parallel_size

    @property
    def gpus_per_stage(self) -> int:
        """GPUs of a pipeline stage of one engine."""
        return self.tensor_parallel_size * self.prefill_context_parallel_size

    @property
    def mesh(self) -> Mesh:
        """Parallel degrees; expert parallelism spans tensor, prefill context and data parallel ranks, as in vLLM."""
        dp = self.data_parallel_size
        ep = self.gpus_per_stage * dp if self.enable_expert_parallel else 1
        return Mesh(
            tp=self.tensor_parallel_size,
            pp=self.pipeline_parallel_size,
            dp=dp,
            ep=ep,
            all2all=bool(ALL2ALL_BACKENDS[self.all2all_backend]),
            redundant_experts=self.num_redundant_experts,
            pcp=self.prefill_context_parallel_size,
            dcp=self.decode_context_parallel_size,
            dcp_a2a=self.dcp_comm_backend == "a2a",
            dcp_q_replicate=self.dcp_q_replicate,
        )

    @property
    def capture_sizes(self) -> tuple[int, ...]:
        """Token counts that a step is padded to; empty when eager."""
        if self.enforce_eager:
            return ()
        if self.cudagraph_capture_sizes is not None:
            return tuple(self.cudagraph_capture_sizes)
        return default_capture_sizes(self.max_num_seqs)

    @classmethod
    def accepted(cls) -> list[str]:
        """Names of all fields."""
        return [item.name for item in fields(cls)]
