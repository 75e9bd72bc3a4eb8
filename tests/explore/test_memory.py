"""What fits: vLLM's rule, checked on numbers that can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.einsum import Mask
from energylens_vllm.explore.memory import (
    COMMUNICATOR_BYTES,
    GRAPH_BYTES,
    WORKSPACE_BYTES,
    Layers,
    Memory,
    Stage,
    cuda_bytes,
)
from energylens_vllm.hardware.profile import load_profile


def memory(model: str, utilization: float = 0.9, **deployment: object) -> Memory:
    return Memory.of(EnergyModel(model, Deployment(**deployment)), utilization)  # type: ignore[arg-type]


def test_weights_and_cache_of_a_dense_model() -> None:
    found = memory("llama-3.1-8b", gpu="H100-SXM", vllm_release="0.25.1")
    (stage,) = found.stages
    assert found.weights == pytest.approx(8.03e9 * 2, rel=0.001)
    assert stage.request_bytes(16) == 16 * 2 * 32 * 8 * 128 * 2  # K and V, layers, KV heads, head dimension, bytes
    assert stage.request_bytes(17) == stage.request_bytes(32), "whole blocks"
    left = found.cache_bytes(stage, 8192, 256)
    largest = (2 * 14336 + 14336) * 2 * 8192  # inputs and output of the activation function, 16 bits each
    sampler = 132 * 128256 * 4  # a row of the vocabulary for each SM, in float32
    outside = WORKSPACE_BYTES + GRAPH_BYTES
    assert left == pytest.approx(
        0.9 * cuda_bytes(load_profile("H100-SXM")) - found.weights - largest - sampler - outside, rel=1e-6
    )


@pytest.mark.parametrize(("release", "logit_bytes"), [("0.11.1", 38), ("0.16.0", 38), ("0.17.0", 14), ("0.25.1", 14)])
def test_the_sampler_of_a_release(release: str, logit_bytes: int) -> None:
    """With 1,024 rows it needs more than a forward pass; its hidden states of all 8,192 tokens wait meanwhile."""
    found = memory("qwen3-0.6b", gpu="H100-SXM", vllm_release=release)
    (stage,) = found.stages
    one, more = (float(found.cache_bytes(stage, 8192, rows)) for rows in (1024, 1025))
    assert one - more == 151936 * logit_bytes
    empty = float(found.cache_bytes(stage, 0, 0))
    assert empty - one == 1024 * 151936 * logit_bytes + 8192 * 1024 * 2


def test_cuda_graphs_are_taken_off_since_vllm_measures_them() -> None:
    fixed = {release: memory("llama-3.1-8b", vllm_release=release).fixed for release in ("0.20.2", "0.21.0")}
    assert fixed["0.21.0"] - fixed["0.20.2"] == GRAPH_BYTES
    assert memory("llama-3.1-8b", vllm_release="0.21.0", enforce_eager=True).fixed == fixed["0.20.2"]
    candidate = memory("llama-3.1-8b", vllm_release="0.21rc1")
    assert candidate.fixed == fixed["0.21.0"], "what comes before a release has its rules"


@pytest.mark.parametrize(
    ("model", "groups", "deployment"),
    [
        ("llama-3.1-8b", 0, {}),
        ("llama-3.1-8b", 1, {"tensor_parallel_size": 2}),
        ("llama-3.1-8b", 2, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("llama-3.1-8b", 0, {"data_parallel_size": 2}),  # engines that know nothing of each other
        ("qwen3-30b-a3b", 0, {}),
        ("qwen3-30b-a3b", 2, {"tensor_parallel_size": 2}),  # and the experts'
        ("qwen3-30b-a3b", 3, {"tensor_parallel_size": 2, "data_parallel_size": 2}),
        ("deepseek-v3", 3, {"tensor_parallel_size": 8, "decode_context_parallel_size": 2}),
    ],
)
def test_each_group_of_gpus_has_a_communicator(model: str, groups: int, deployment: dict[str, object]) -> None:
    found = memory(model, enforce_eager=True, **deployment)
    assert found.fixed == WORKSPACE_BYTES + groups * COMMUNICATOR_BYTES


def test_balanced_experts_move_through_a_buffer() -> None:
    experts = {"tensor_parallel_size": 8, "enable_expert_parallel": True}
    plain = memory("qwen3-235b-a22b", **experts)
    balanced = memory("qwen3-235b-a22b", enable_eplb=True, **experts)
    layer = 128 / 8 * 3 * 4096 * 1536 * 2  # experts of a GPU; gate, up and down; 16 bits
    assert balanced.fixed - plain.fixed == layer + COMMUNICATOR_BYTES


def test_buffers_of_deepep() -> None:
    def with_backend(backend: str, ranks: int = 8) -> Memory:
        return memory("deepseek-v3", data_parallel_size=ranks, enable_expert_parallel=True, all2all_backend=backend)

    plain, fast, slow = map(with_backend, ("allgather_reducescatter", "deepep_low_latency", "deepep_high_throughput"))
    assert slow.fixed - plain.fixed == fast.fixed - plain.fixed == 2**30
    assert with_backend("deepep_high_throughput", 16).fixed - plain.fixed == 2 * 2**30, "and for RDMA"
    assert slow.fixed_per_token == plain.fixed_per_token == 0
    # Room to send and to receive, each twice: 256 experts, 7,168 elements in 16 bits, two more for each 128 of them.
    assert fast.fixed_per_token == 4 * 256 * (7168 * 2 + 7168 / 128 * 4)
    (stage,) = fast.stages
    assert fast.cache_bytes(stage, 8192, 8) < 0 < fast.cache_bytes(stage, 256, 8)


def test_a_start_up_log_of_vllm() -> None:
    """Llama-2-7B on an H100, vllm 0.8: "model weights take 12.55GiB", "reserved for KV Cache is 56.18GiB"."""
    found = memory("llama-2-7b", gpu="H100-SXM")
    assert found.weights / 2**30 == pytest.approx(12.55, abs=0.01)
    left = float(found.cache_bytes(found.stages[0], 8192, 256))
    assert left / 2**30 == pytest.approx(56.18, rel=0.03)


def test_requests_that_fit_fill_the_cache() -> None:
    found = memory("llama-3.1-8b", gpu="H100-SXM")
    (stage,) = found.stages
    most = float(found.most_running(1000, 200, 8192, 256))
    mean = 1100 * stage.request_bytes(16) / 16
    left = float(found.cache_bytes(stage, 8192, 256))
    assert 0.97 * left < most * mean < left, "but for three standard deviations"


def test_sharding_divides_weights_and_cache() -> None:
    one, two = (memory("llama-3.1-70b", tensor_parallel_size=n) for n in (4, 8))
    assert one.weights == pytest.approx(2 * two.weights, rel=0.01)
    assert one.stages[0].request_bytes(1600) == 2 * two.stages[0].request_bytes(1600)
    stages = memory("llama-3.1-70b", tensor_parallel_size=4, pipeline_parallel_size=2).stages
    assert sum(stage.weights for stage in stages) == pytest.approx(one.weights, rel=0.01)
    fp8 = memory("llama-3.1-70b", tensor_parallel_size=4, quantization="fp8", kv_cache_dtype="fp8")
    assert fp8.weights == pytest.approx(one.weights / 2, rel=0.05)
    assert fp8.stages[0].request_bytes(1600) == one.stages[0].request_bytes(1600) / 2


def test_split_contexts_divide_the_cache_and_tokens_that_are_split_do_not() -> None:
    """16 tokens of each GPU make a block; of 17 tokens that two share the second block is begun after 32."""
    one, two = (memory("deepseek-v3", tensor_parallel_size=8, decode_context_parallel_size=n) for n in (1, 2))
    assert two.weights == one.weights
    assert two.stages[0].request_bytes(32_000) == one.stages[0].request_bytes(32_000) / 2
    assert two.stages[0].request_bytes(17) == two.stages[0].request_bytes(32) == one.stages[0].request_bytes(16)
    most = [float(each.most_running(30_000, 1000, 8192, 256)) for each in (one, two)]
    assert most[1] == pytest.approx(2 * most[0], rel=0.05)
    tokens = memory("deepseek-v3", tensor_parallel_size=8, prefill_context_parallel_size=2, vllm_release="0.32.0")
    assert tokens.stages[0].request_bytes(32_000) == one.stages[0].request_bytes(32_000)
    assert tokens.weights < 0.6 * one.weights, "experts are shared out over twice as many GPUs"
    assert tokens.weights > 0.5 * one.weights, "and the rest is not"


def test_sliding_windows_keep_no_more_than_the_window() -> None:
    (stage,) = memory("gemma-2-9b").stages
    per_token = 2 * 42 * 8 * 256 * 2
    assert stage.request_bytes(4096) == 4096 * per_token
    grown = float(stage.request_bytes(8192) - stage.request_bytes(4112))
    assert grown == (8192 - 4112) * per_token / 2, "every other layer has a window of 4,096"


def test_a_start_wants_room_for_what_is_in_flight() -> None:
    """A window of 128 tokens, whose blocks are freed once a step is done; with asynchronous scheduling two are under
    way. Every other layer of gpt-oss-20b has one."""
    found = memory("gpt-oss-20b", gpu="H100-SXM", vllm_release="0.32.0")
    (stage,) = found.stages
    layer = 12 * 2 * 8 * 64 * 2  # of a token: half of the layers, K and V, 8 heads of 64 elements in 16 bits
    whole, window = 131072 // 16, -(-(127 + 2 * 8192) // 16) + 1
    assert found.batches == 2
    assert stage.longest_bytes(131072, 2 * 8192) == 16 * layer * (whole + window)
    assert stage.longest_bytes(2608, 2 * 8192) == 16 * layer * (163 + 164), "no more than the longest request"
    assert stage.request_bytes(2608) == 16 * layer * (163 + 9), "between steps the window alone"
    needed = float(stage.longest_bytes(131072, 2 * 8192) + found.total - found.cache_bytes(stage, 8192, 8))
    for spare, starts in ((1e6, True), (-1e6, False)):
        utilization = 0.9 * (needed + spare) / found.total
        tight = memory("gpt-oss-20b", utilization, gpu="H100-SXM", vllm_release="0.32.0")
        assert bool(tight.fits(131072, 8192, 8)) is starts


def test_steps_in_flight_take_room_once_however_many_run() -> None:
    found = memory("gpt-oss-20b", gpu="H100-SXM", vllm_release="0.32.0")
    (stage,) = found.stages
    layer = 12 * 2 * 8 * 64 * 2
    assert stage.in_flight_bytes(2608, 16384) == layer * 16384
    assert stage.in_flight_bytes(100, 16384) == 0, "no window is left behind"
    most = float(found.most_running(2500, 108, 8192, 1024))
    left = float(found.cache_bytes(stage, 8192, 1024)) - layer * 16384
    mean = float(stage.request_bytes(2500 + 108 * (np.arange(16) + 0.5) / 16).mean())
    assert 0.99 * left < most * mean < left


@pytest.mark.vllm
@pytest.mark.parametrize("max_model_len", [1000, 2608, 131072])
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (128, None), (4096, None), (None, 8192)])
def test_what_a_start_wants_is_what_vllm_reckons(max_model_len: int, window: int | None, chunk: int | None) -> None:
    interface = pytest.importorskip("vllm.v1.kv_cache_interface")
    import torch

    common = {"block_size": 16, "num_kv_heads": 8, "head_size": 64, "dtype": torch.bfloat16}
    if window is not None:
        spec = interface.SlidingWindowSpec(sliding_window=window, **common)
    elif chunk is not None:
        spec = interface.ChunkedLocalAttentionSpec(attention_chunk_size=chunk, **common)
    else:
        spec = interface.FullAttentionSpec(**common)
    config = SimpleNamespace(
        max_in_flight_tokens=16384,
        model_config=SimpleNamespace(max_model_len=max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16384),
    )
    token_bytes = 2 * 8 * 64 * 2
    layers = Layers.of(Mask(window=window, chunk=chunk), token_bytes)
    stage = Stage(0.0, 0.0, 0.0, 0.0, 0.0, (layers,))
    assert stage.longest_bytes(max_model_len, 16384) == spec.max_memory_usage_bytes(config)


def test_latents_are_cached_once() -> None:
    (stage,) = memory("deepseek-v2-lite", gpu="H100-SXM").stages
    assert stage.request_bytes(16) == 16 * 27 * (512 + 64) * 2


def test_a_model_that_vllm_would_not_start() -> None:
    tight = memory("llama-3.1-70b", gpu="H100-SXM", tensor_parallel_size=2)
    assert tight.weights < 0.9 * cuda_bytes(load_profile("H100-SXM"))
    assert tight.fits(2000, 2048, 8)
    assert not tight.fits(200_000, 2048, 8)
    assert not memory("llama-3.1-70b", gpu="H100-SXM").fits(100, 2048, 8)
    assert np.all(memory("llama-3.1-8b", gpu="H100-SXM").fits(1000, [2048, 8192], 8))
