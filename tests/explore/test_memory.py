"""What fits: vLLM's rule, checked on numbers that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.explore.memory import GRAPH_BYTES, WORKSPACE_BYTES, Memory, cuda_bytes
from energylens_vllm.hardware.profile import load_profile


def memory(model: str, utilization: float = 0.9, **deployment: object) -> Memory:
    return Memory.of(EnergyModel(model, Deployment(**deployment)), utilization)  # type: ignore[arg-type]


def test_weights_and_cache_of_a_dense_model() -> None:
    found = memory("llama-3.1-8b", gpu="H100-SXM")
    (stage,) = found.stages
    assert found.weights == pytest.approx(8.03e9 * 2, rel=0.001)
    assert stage.request_bytes(16) == 16 * 2 * 32 * 8 * 128 * 2  # K and V, layers, KV heads, head dimension, bytes
    assert stage.request_bytes(17) == stage.request_bytes(32), "whole blocks"
    left = found.cache_bytes(stage, 8192, 256)
    largest = (2 * 14336 + 14336) * 2 * 8192  # inputs and output of the activation function, 16 bits each
    assert left == pytest.approx(
        0.9 * cuda_bytes(load_profile("H100-SXM")) - found.weights - largest - WORKSPACE_BYTES - GRAPH_BYTES, rel=1e-6
    )


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
