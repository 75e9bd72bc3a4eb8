"""Prefill and decode apart: the cache that is sent, and what adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.disaggregation import cache_bytes, serve_apart
from energylens_vllm.errors import EnergyLensError

MODEL = EnergyModel("llama-3.1-70b", Deployment(gpu="H100-SXM", tensor_parallel_size=4))


def test_cache_of_a_request() -> None:
    # 80 layers, keys and values of 8 heads of 128, 16 bits; a fourth on each GPU.
    assert cache_bytes(MODEL, 1000) == pytest.approx(1000 * 80 * 2 * 8 * 128 * 2 / 4)
    # Gemma 3: every sixth layer keeps all tokens, the others 1024.
    gemma = EnergyModel("gemma-3-27b", Deployment(gpu="H100-SXM"))
    layer = 2 * 16 * 128 * 2
    assert cache_bytes(gemma, 8192) == pytest.approx(layer * (10 * 8192 + 52 * 1024))
    # Llama 4: three layers of four attend within chunks of 8192.
    scout = EnergyModel("llama-4-scout", Deployment(gpu="H200-SXM", tensor_parallel_size=4))
    layer = 2 * 8 * 128 * 2 / 4
    assert cache_bytes(scout, 16384) == pytest.approx(layer * (12 * 16384 + 36 * 8192))
    # MLA: one latent of 512 and 64 for positions, once.
    deepseek = EnergyModel("deepseek-v3", Deployment(gpu="H200-SXM", tensor_parallel_size=8))
    assert cache_bytes(deepseek, 1) == pytest.approx(61 * (512 + 64) * 2)


def test_parts_sum_and_decodes_are_those_of_the_step_model() -> None:
    found = serve_apart(MODEL, MODEL, 32, 1000, 300)
    assert found.prefill_j + found.decode_j + found.transfer_j == pytest.approx(found.energy_per_output_token_j)
    step = MODEL.step([(1, 1149)] * 32)
    assert found.inter_token_latency_s == pytest.approx(step.time_s)
    assert found.decode_j == pytest.approx(step.energy_j / 32 * 299 / 300)
    assert found.time_to_first_token_s == pytest.approx(MODEL.step([(1000, 0)]).time_s)
    assert found.gpus == 8
    busy = found.prefill_utilisation
    prompts = found.output_tokens_per_s / 300
    expected = MODEL.step([(1000, 0)]).energy_j * prompts + (1 - busy) * MODEL.idle_power_w
    assert found.prefill_j * found.output_tokens_per_s == pytest.approx(expected)


def test_decodes_without_prompts_between_are_faster_than_with_them() -> None:
    together = MODEL.serving(32, 1000, 300, prefix_cache_hit_rate=0.0)
    assert serve_apart(MODEL, MODEL, 32, 1000, 300).inter_token_latency_s < together.inter_token_latency_s


def test_a_prefill_engine_more_idles() -> None:
    one, two = (serve_apart(MODEL, MODEL, 32, 1000, 300, prefill_engines=n) for n in (1, 2))
    assert two.power_w - one.power_w == pytest.approx(MODEL.idle_power_w)
    assert two.prefill_utilisation == pytest.approx(one.prefill_utilisation / 2)


def test_the_transfer_is_longer_over_the_network() -> None:
    near, far = (serve_apart(MODEL, MODEL, 32, 4000, 900, across_nodes=across) for across in (False, True))
    assert near.transfer_s < far.transfer_s
    assert near.transfer_j < far.transfer_j < 0.1 * far.energy_per_output_token_j
    # 327,680 bytes a token, a fourth over each adapter at no more than 50 GB/s.
    assert far.transfer_s > 4000 * 327_680 / 4 / 50e9


def test_refusals() -> None:
    with pytest.raises(EnergyLensError, match=r"prefill_engines: 1 compute .*accepted: \d+ or more"):
        serve_apart(MODEL, MODEL, 128, 8000, 50)
    with pytest.raises(EnergyLensError, match="output_tokens"):
        serve_apart(MODEL, MODEL, 8, 100, 1)
    with pytest.raises(EnergyLensError, match="concurrency"):
        serve_apart(MODEL, MODEL, -1, 100, 10)
    with pytest.raises(EnergyLensError, match="concurrency: 2; accepted: 3 or more"):
        serve_apart(MODEL, MODEL, 2, 100, 10, decode_engines=3)
    for count in (1.5, float("nan"), float("inf")):
        with pytest.raises(EnergyLensError, match=f"decode_engines: {count} is not a positive whole number"):
            serve_apart(MODEL, MODEL, 8, 100, 10, decode_engines=count)  # type: ignore[arg-type]
    other = EnergyModel("qwen2.5-72b", MODEL.deployment)
    with pytest.raises(EnergyLensError, match=r"Qwen2.5-72B cannot read the cache of Llama-3.1-70B"):
        serve_apart(MODEL, other, 8, 100, 10)
    fp8 = EnergyModel("llama-3.1-70b", replace(MODEL.deployment, kv_cache_dtype="fp8"))
    with pytest.raises(EnergyLensError, match="decode: kv_cache_dtype 'fp8'; accepted: 'auto'"):
        serve_apart(MODEL, fp8, 8, 100, 10)
    piped = EnergyModel("llama-3.1-70b", Deployment(gpu="H100-SXM", tensor_parallel_size=2, pipeline_parallel_size=2))
    with pytest.raises(EnergyLensError, match="decode: pipeline_parallel_size"):
        serve_apart(MODEL, piped, 8, 100, 10)
