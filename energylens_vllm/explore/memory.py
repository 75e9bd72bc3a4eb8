"""What fits into the GPUs' memory, by the rules that vLLM goes by when it starts.

vLLM takes `gpu_memory_utilization` of the memory that CUDA reports, takes off the weights, what a profiling run
of `max_num_batched_tokens` tokens and `max_num_seqs` sampled rows needs at its peak, what is held outside of PyTorch,
and from release 0.21 on CUDA graphs; the rest becomes KV-cache blocks. It refuses to start if they do not hold one
request of `max_model_len`. Source: vLLM 0.32, vllm/v1/worker/gpu_worker.py `determine_available_memory`,
v1/worker/utils.py `request_memory`, v1/core/kv_cache_utils.py `get_kv_cache_configs`.

Weights, the cache of a token and the buffers of DeepEP and EPLB are exact. The peak is that of the forward pass, taken
to be the inputs and outputs of the largest kernel, or of the sampler behind it. The rest are constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from energylens_vllm.einsum import Kernel, Mask, Mesh
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.batch import Array
from energylens_vllm.energy.cache import cached_bytes
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.energy.precision import widths
from energylens_vllm.hardware.profile import GpuProfile, parse_release

#: Memory that CUDA reports, as vLLM's start-up log shows it (GiB). It is 0.5 to 1 % less than the driver's figure; of
#: GPUs that are not listed it is taken to be 1 % less than the profile's.
CUDA_GIB = {"A100-SXM-80GB": 79.15, "H100-SXM": 79.19, "H200-SXM": 139.81, "B200-SXM": 178.35, "L40S": 44.42}
#: Tokens of a KV-cache block, vLLM's default.
BLOCK_TOKENS = 16
#: Bytes an element of (sampled row, vocabulary) at the sampler's peak: logits in 16 bits and in float32, probabilities,
#: and the noise to draw with. Source: vLLM 0.25, v1/sample/ops/topk_topp_sampler.py `forward_native`, which the
#: profiling run calls. Later releases profile without most of it (v1/worker/gpu/model_runner.py `_dummy_sampler_run`,
#: which says so), but sample as before: then there is more room for the cache than is reckoned with, not more to use.
MASKED_BYTES = 2.0 + 4.0 + 4.0 + 4.0
#: Bytes an element of (SM, vocabulary) that its kernel for top-k and top-p keeps (topk_topp_triton.py).
MASK_BUFFER_BYTES = 4.0
#: Before release 0.17 top-k and top-p sorted the vocabulary: logits in both precisions, sorted values and int64
#: indices, and inside torch.sort reverse indices and CUB's second copies of keys and values (ATen SortStable.cu).
#: Start-up logs of five models have 38.2 to 38.6 (benchmarks/memory.py says whose).
SORTED_BYTES = 2.0 + 4.0 + (4.0 + 8.0) + 8.0 + (4.0 + 8.0)
#: Bytes outside of PyTorch's weights and activations: attention workspaces and buffers of a batch; CUDA graphs of all
#: sizes. From vLLM's start-up logs, to a few hundred MB.
WORKSPACE_BYTES, GRAPH_BYTES = 0.5e9, 0.8e9
#: Bytes of each group of GPUs that communicate: NCCL's buffers, and those of the custom all-reduce. Start-up logs of 2
#: and 4 GPUs have 0.4 to 1.2 GiB a group.
COMMUNICATOR_BYTES = 1.0e9
#: DeepEP's buffer for NVLink, and for GPUs of several nodes as much again for RDMA (VLLM_DEEPEP_BUFFER_SIZE_MB).
DEEPEP_BYTES = 1024 * 2.0**20
#: Standard deviations of the cache's fill that are kept free, so that requests are hardly ever preempted.
HEADROOM_STD = 3.0


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of one mask: bytes that they cache of a token, and of how many tokens at most (infinite for full
    attention; the block in which a window or chunk begins may hold more)."""

    token_bytes: float
    most: float
    sliding: bool = False

    @classmethod
    def of(cls, mask: Mask, token_bytes: float) -> Layers:
        if mask.window is not None:
            return cls(token_bytes, mask.window - 1, sliding=True)
        return cls(token_bytes, math.inf if mask.chunk is None else mask.chunk)


@dataclass(frozen=True, slots=True)
class Stage:
    """One GPU of a pipeline stage: bytes of its weights and of the sampler's buffer; of a profiling run's token in the
    forward pass, and held while it samples; of a sampled row; and its cache. Where contexts are split, the GPU keeps
    its part of each block, which is of as many more tokens."""

    weights: float
    sampler: float
    per_token: float
    hidden_per_token: float
    per_row: float
    cache: tuple[Layers, ...]
    block_tokens: int = BLOCK_TOKENS

    def request_bytes(self, length: npt.ArrayLike) -> Array:
        """Cache that requests of `length` tokens hold between steps, in whole blocks."""
        blocks = self._blocks(length)
        kept = [
            layers.token_bytes * np.minimum(blocks, self._blocks(layers.most) + math.isfinite(layers.most))
            for layers in self.cache
        ]
        return np.asarray(self.block_tokens * sum(kept, 0.0 * blocks))

    def longest_bytes(self, max_model_len: float, in_flight: npt.ArrayLike) -> Array:
        """Cache that vLLM wants room for when it starts: of one request of `max_model_len`, whose layers with a window
        or chunk keep as well what is `in_flight`, for blocks are freed once a step is done. Source:
        v1/kv_cache_interface.py `max_memory_usage_bytes`."""
        kept = [
            layers.token_bytes
            * (
                self._blocks(np.minimum(layers.most + np.asarray(in_flight, np.float64), max_model_len))
                + layers.sliding
            )
            for layers in self.cache
        ]
        return np.asarray(self.block_tokens * sum(kept, np.zeros_like(in_flight, np.float64)))

    def in_flight_bytes(self, length: float, in_flight: npt.ArrayLike) -> Array:
        """Cache of tokens `in_flight` that layers keep beyond their windows, for requests of up to `length`."""
        beyond = sum(layers.token_bytes for layers in self.cache if layers.most < length)
        return np.asarray(beyond * np.asarray(in_flight, np.float64))

    def _blocks(self, tokens: npt.ArrayLike) -> Array:
        return np.asarray(np.ceil(np.asarray(tokens, np.float64) / self.block_tokens))


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one engine's GPUs."""

    total: float  #: bytes of a GPU that vLLM may use
    fixed: float  #: bytes that neither weights, activations nor cache take
    fixed_per_token: float  #: and those of each token that a step may have
    batches: int  #: steps that are in flight at a time
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, model: EnergyModel, utilization: float) -> Memory:
        """Of the engine that `model` describes."""
        deployment, since = model.deployment, parse_release(model.profile.vllm_release)
        element = widths(deployment.dtype, model.quantization, deployment.kv_cache_dtype)
        mesh = deployment.mesh
        by_stage: dict[int, list[Kernel]] = {}
        for kernel in model.kernels:
            by_stage.setdefault(kernel.stage, []).append(kernel)
        weights = model.cascade.weight_bytes(element, mesh)
        sampler = (MASKED_BYTES, MASK_BUFFER_BYTES * model.profile.sm_count) if since >= (0, 17) else (SORTED_BYTES, 0)
        graphs = since >= (0, 21) and not deployment.enforce_eager
        exchanged, exchanged_per_token = _exchange_bytes(model)
        return cls(
            total=utilization * cuda_bytes(model.profile),
            fixed=WORKSPACE_BYTES
            + COMMUNICATOR_BYTES * _communicators(deployment, model.kernels)
            + (GRAPH_BYTES if graphs else 0.0)
            + exchanged
            + (_largest_experts(model.kernels) if deployment.enable_eplb else 0.0),
            fixed_per_token=exchanged_per_token,
            batches=mesh.pp + 1 if model.async_scheduling else mesh.pp,
            stages=tuple(_stage(by_stage[i], size, mesh, *sampler) for i, size in enumerate(weights)),
        )

    @property
    def weights(self) -> float:
        """Bytes of weights on the GPU that holds most."""
        return max(stage.weights for stage in self.stages)

    def cache_bytes(self, stage: Stage, budget: npt.ArrayLike, rows: npt.ArrayLike) -> Array:
        """Bytes that are left for the KV cache on a GPU of the stage; negative where the model does not fit."""
        tokens, rows = np.asarray(budget, np.float64), np.asarray(rows, np.float64)
        sampling = stage.hidden_per_token * tokens + stage.per_row * rows
        peak = np.maximum(stage.per_token * tokens, sampling)
        return np.asarray(
            self.total - self.fixed - self.fixed_per_token * tokens - stage.weights - stage.sampler - peak
        )

    def fits(self, max_model_len: float, budget: npt.ArrayLike, rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether vLLM starts: one request of the longest length fits."""
        in_flight = self.batches * np.asarray(budget, np.float64)
        left = [
            self.cache_bytes(stage, budget, rows) >= stage.longest_bytes(max_model_len, in_flight)
            for stage in self.stages
        ]
        return np.asarray(np.all(left, axis=0))

    def most_running(self, prompt: float, output: float, budget: npt.ArrayLike, rows: npt.ArrayLike) -> Array:
        """Requests of one data-parallel rank whose cache fits together: each is met at any age between its prompt and
        its end, so n of them hold n times the mean, give or take sqrt(n) standard deviations; and steps in flight hold
        what windows leave behind."""
        lengths = prompt + output * (np.arange(16) + 0.5) / 16
        in_flight = self.batches * np.asarray(budget, np.float64)
        most = []
        for stage in self.stages:
            held = stage.request_bytes(lengths)
            mean, spread = float(held.mean()), HEADROOM_STD * float(held.std())
            left = self.cache_bytes(stage, budget, rows) - stage.in_flight_bytes(prompt, in_flight)
            left = np.maximum(left, 0.0)
            if mean <= 0:  # a stage without attention
                most.append(np.full_like(left, np.inf))
            else:  # n mean + sqrt(n) spread = left
                root = (np.sqrt(spread**2 + 4 * mean * left) - spread) / (2 * mean)
                most.append(root * root)
        return np.asarray(np.min(most, axis=0))


def cuda_bytes(profile: GpuProfile) -> float:
    """Memory of a GPU as vLLM sees it."""
    gib = CUDA_GIB.get(profile.name)
    return 0.99 * profile.memory_bytes if gib is None else gib * 2.0**30


def _stage(kernels: list[Kernel], weights: float, mesh: Mesh, row_bytes: float, buffer_bytes: float) -> Stage:
    """`row_bytes` of each row's element of the vocabulary, `buffer_bytes` of the vocabulary's."""
    local = [kernel for kernel in kernels if kernel.collective is None]
    heads = [kernel.gemm for kernel in local if kernel.gemm is not None and kernel.gemm.rows == "sampled"]
    vocabulary = mesh.tp * max((head.n for head in heads), default=0)
    return Stage(
        weights=weights,
        sampler=buffer_bytes * vocabulary,
        per_token=max(kernel.activation_bytes.tokens for kernel in local),
        hidden_per_token=2.0 * max((head.k for head in heads), default=0),
        per_row=row_bytes * vocabulary,
        cache=tuple(Layers.of(mask, size) for mask, size in cached_bytes(kernels).items()),
        block_tokens=BLOCK_TOKENS * mesh.dcp,
    )


def _communicators(deployment: Deployment, kernels: Sequence[Kernel]) -> int:
    """Groups of several GPUs that a GPU is in, each with a communicator of its own; data-parallel ranks without experts
    know nothing of each other. Source: vllm/distributed/parallel_state.py `initialize_model_parallel`."""
    sizes = [
        deployment.tensor_parallel_size, deployment.pipeline_parallel_size, deployment.decode_context_parallel_size,
        deployment.prefill_context_parallel_size,
    ]  # fmt: skip
    if any(kernel.experts is not None for kernel in kernels):
        together = deployment.gpus_per_stage * deployment.data_parallel_size
        sizes += [deployment.data_parallel_size, together] + [together] * deployment.enable_eplb
    return sum(size > 1 for size in sizes)


def _exchange_bytes(model: EnergyModel) -> tuple[float, float]:
    """DeepEP's buffers, and what they take for each token of `max_num_batched_tokens`.

    Low latency has room for every token at every expert, twice over for sends and for receives, in the format of the
    larger message: 16 bits and two more for each of 128 elements' least and greatest. Sources:
    vllm/distributed/device_communicators/all2all.py; DeepEP, csrc/config.hpp `LowLatencyLayout`.
    """
    deployment = model.deployment
    shapes = [(kernel.experts, kernel.gemm) for kernel in model.kernels if kernel.experts and kernel.gemm]
    if not shapes or not deployment.enable_expert_parallel or deployment.data_parallel_size == 1:
        return 0.0, 0.0
    if deployment.all2all_backend == "deepep_low_latency":
        experts, gemm = shapes[0]
        return DEEPEP_BYTES, 4.0 * experts.total * gemm.k * (2.0 + 4.0 / 128)
    if deployment.all2all_backend == "deepep_high_throughput":
        together = deployment.gpus_per_stage * deployment.data_parallel_size
        crosses = together > Collectives.of(model.profile).interconnect.gpus_per_node
        return DEEPEP_BYTES * (2 if crosses else 1), 0.0
    return 0.0, 0.0


def _largest_experts(kernels: Sequence[Kernel]) -> float:
    """Bytes of a layer's experts on a GPU, for which EPLB has a buffer to move them through. Source:
    vllm/distributed/eplb/eplb_state.py, `expert_buffer`."""
    layers: dict[str, float] = {}
    for kernel in kernels:
        if kernel.experts is not None:
            layer = f"{kernel.stage} {kernel.name.partition('.')[0]}"
            layers[layer] = layers.get(layer, 0.0) + kernel.weight_bytes
    return max(layers.values(), default=0.0)
