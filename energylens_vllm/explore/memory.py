"""What fits into the GPUs' memory, by the rules that vLLM goes by when it starts.

vLLM takes `gpu_memory_utilization` of the memory that CUDA reports, takes off the weights, what a profiling run
of `max_num_batched_tokens` tokens and `max_num_seqs` sampled rows needs at its peak, what is held outside of PyTorch,
and CUDA graphs; the rest becomes KV-cache blocks. It refuses to start if they do not hold one request of
`max_model_len`. Source: vLLM 0.32, vllm/v1/worker/gpu_worker.py `determine_available_memory`, v1/worker/utils.py
`request_memory`, v1/core/kv_cache_utils.py `check_enough_kv_cache_memory`.

Weights and the cache of a token are exact. The peak is estimated: the inputs and outputs of the largest kernel, and
logits. What lies outside of PyTorch is a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from energylens_vllm.einsum import AttentionShape, Kernel, Mesh
from energylens_vllm.energy import EnergyModel
from energylens_vllm.energy.batch import Array
from energylens_vllm.energy.precision import widths
from energylens_vllm.hardware.profile import GpuProfile

#: Memory that CUDA reports, as vLLM's start-up log shows it (GiB). It is 0.5 to 1 % less than the driver's figure; of
#: GPUs that are not listed it is taken to be 1 % less than the profile's.
CUDA_GIB = {"A100-SXM-80GB": 79.15, "H100-SXM": 79.19, "H200-SXM": 139.81, "B200-SXM": 178.35, "L40S": 44.42}
#: Tokens of a KV-cache block, vLLM's default.
BLOCK_TOKENS = 16
#: Bytes an element of (sampled row, vocabulary) at the sampler's peak: logits in 16 bits and in float32, their masked
#: copy, probabilities, and the noise to draw with (vLLM's v1/sample, called by the profiling run).
LOGIT_BYTES = 18.0
#: Bytes outside of PyTorch's weights and activations: attention workspaces; with several GPUs NCCL's and the custom
#: all-reduce's buffers; CUDA graphs of all sizes. From vLLM's start-up logs, to a few hundred MB.
WORKSPACE_BYTES, COMMUNICATOR_BYTES, GRAPH_BYTES = 0.5e9, 1.0e9, 0.8e9
#: Standard deviations of the cache's fill that are kept free, so that requests are hardly ever preempted.
HEADROOM_STD = 3.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One GPU of a pipeline stage: bytes of its weights, of a profiling run's token and sampled row, and of the cache
    of a token by how many tokens a layer keeps at most (infinite for full attention). Where contexts are split, the
    GPU keeps its part of each block, which is of as many more tokens."""

    weights: float
    per_token: float
    per_row: float
    cache: tuple[tuple[float, float], ...]  #: (most tokens kept, bytes a token)
    block_tokens: int = BLOCK_TOKENS

    def request_bytes(self, length: npt.ArrayLike) -> Array:
        """Cache that requests of `length` tokens hold, in whole blocks."""
        tokens = np.ceil(np.asarray(length, np.float64) / self.block_tokens) * self.block_tokens
        return np.asarray(sum(size * np.minimum(tokens, most) for most, size in self.cache) + 0.0 * tokens)


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one engine's GPUs."""

    total: float  #: bytes of a GPU that vLLM may use
    fixed: float  #: bytes that neither weights, activations nor cache take
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, model: EnergyModel, utilization: float) -> Memory:
        """Of the engine that `model` describes."""
        deployment = model.deployment
        element = widths(deployment.dtype, model.quantization, deployment.kv_cache_dtype)
        mesh = deployment.mesh
        kernels = model.cascade.kernels(element, mesh)
        by_stage: dict[int, list[Kernel]] = {}
        for kernel in kernels:
            by_stage.setdefault(kernel.stage, []).append(kernel)
        weights = model.cascade.weight_bytes(element, mesh)
        return cls(
            total=utilization * cuda_bytes(model.profile),
            fixed=WORKSPACE_BYTES
            + (COMMUNICATOR_BYTES if deployment.num_gpus > 1 else 0.0)
            + (0.0 if deployment.enforce_eager else GRAPH_BYTES),
            stages=tuple(_stage(by_stage[i], size, mesh) for i, size in enumerate(weights)),
        )

    @property
    def weights(self) -> float:
        """Bytes of weights on the GPU that holds most."""
        return max(stage.weights for stage in self.stages)

    def cache_bytes(self, stage: Stage, budget: npt.ArrayLike, rows: npt.ArrayLike) -> Array:
        """Bytes that are left for the KV cache on a GPU of the stage; negative where the model does not fit."""
        peak = np.maximum(
            stage.per_token * np.asarray(budget, np.float64), stage.per_row * np.asarray(rows, np.float64)
        )
        return np.asarray(self.total - self.fixed - stage.weights - peak)

    def fits(self, max_model_len: float, budget: npt.ArrayLike, rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether vLLM starts: one request of the longest length fits."""
        left = [self.cache_bytes(stage, budget, rows) >= stage.request_bytes(max_model_len) for stage in self.stages]
        return np.asarray(np.all(left, axis=0))

    def most_running(self, prompt: float, output: float, budget: npt.ArrayLike, rows: npt.ArrayLike) -> Array:
        """Requests of one data-parallel rank whose cache fits together: each is met at any age between its prompt and
        its end, so n of them hold n times the mean, give or take sqrt(n) standard deviations."""
        lengths = prompt + output * (np.arange(16) + 0.5) / 16
        most = []
        for stage in self.stages:
            held = stage.request_bytes(lengths)
            mean, spread = float(held.mean()), HEADROOM_STD * float(held.std())
            left = np.maximum(self.cache_bytes(stage, budget, rows), 0.0)
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


def _stage(kernels: list[Kernel], weights: float, mesh: Mesh) -> Stage:
    cache: dict[float, float] = {}
    for kernel in kernels:
        if kernel.attention is not None and kernel.phase != "prefill":  # latent attention has a kernel for each phase
            most = _kept(kernel.attention)
            cache[most] = cache.get(most, 0.0) + kernel.count * kernel.kv_read_bytes.keys
    local = [kernel for kernel in kernels if kernel.collective is None]
    head = [k.gemm.n * mesh.tp for k in local if k.gemm is not None and k.gemm.rows == "sampled"]
    return Stage(
        weights=weights,
        per_token=max(kernel.activation_bytes.tokens for kernel in local),
        per_row=LOGIT_BYTES * max(head, default=0),
        cache=tuple(sorted(cache.items())),
        block_tokens=BLOCK_TOKENS * mesh.dcp,
    )


def _kept(shape: AttentionShape) -> float:
    """Tokens of a request whose cache a layer keeps: the window, in whole blocks and one more; chunks likewise."""
    span = shape.mask.window or shape.mask.chunk
    return math.inf if span is None else math.ceil(span / BLOCK_TOKENS) * BLOCK_TOKENS + BLOCK_TOKENS
