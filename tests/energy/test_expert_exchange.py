"""DeepEP's exchanges in a deployment's steps, dual-batch overlap by its own arguments, and what is not modelled."""

from __future__ import annotations

from typing import Any

import pytest

from energylens_vllm.energy import Deployment, DualBatch, EnergyModel
from energylens_vllm.energy.batch import steps_from_requests
from energylens_vllm.energy.collectives import Collectives
from energylens_vllm.errors import EnergyLensError

MOE_LAYERS, HIDDEN, SELECTED, EXPERTS = 58, 7168, 8, 256  # DeepSeek-V3, whose checkpoint is in blocks of fp8
TOKENS = 128


def model(gpu: str = "H200-SXM", name: str = "deepseek-v3", dp: int = 8, tp: int = 1, **given: Any) -> EnergyModel:
    deployment = Deployment(
        gpu=gpu, data_parallel_size=dp, tensor_parallel_size=tp, enable_expert_parallel=True, **given
    )
    return EnergyModel(name, deployment)


def communication_s(predicting: EnergyModel, tokens: int = TOKENS) -> float:
    return float(predicting.predict(steps_from_requests([(1, 1000)] * tokens, predicting.masks)).communication_s[0])


@pytest.mark.parametrize("kind", ["low_latency", "high_throughput"])
def test_a_step_takes_a_dispatch_and_a_combine_a_layer(kind: str) -> None:
    prices = Collectives.load("H200-SXM")
    alone = sum(
        float(prices.expert_exchange_s(f"{kind}_{part}", TOKENS, HIDDEN, SELECTED, EXPERTS, 8).time_s)
        for part in ("dispatch", "combine")
    )
    found = model(all2all_backend=f"deepep_{kind}")
    assert communication_s(found) == pytest.approx(MOE_LAYERS * alone, rel=1e-6)
    assert "all2all_not_measured" in found.flags
    assert "all2all_not_measured" not in model().flags


def test_low_latency_suits_few_tokens_and_high_throughput_many() -> None:
    low, high = (model(all2all_backend=f"deepep_{kind}") for kind in ("low_latency", "high_throughput"))
    assert communication_s(low, 16) < communication_s(high, 16)
    assert communication_s(low, 1024) > communication_s(high, 1024)
    assert communication_s(high, 1024) < communication_s(model(), 1024)  # gathering all tokens everywhere


def test_tokens_of_a_model_in_16_bits_take_twice_the_bytes() -> None:
    eight = Collectives.load("H200-SXM").expert_exchange_s("high_throughput_dispatch", 4096, 2048, 8, 128, 8)
    sixteen = Collectives.load("H200-SXM").expert_exchange_s("high_throughput_dispatch", 4096, 2048, 8, 128, 8, 2.0)
    fixed_s = float(
        Collectives.load("H200-SXM").expert_exchange_s("high_throughput_dispatch", 0, 2048, 8, 128, 8).time_s
    )
    assert float(sixteen.time_s) - fixed_s == pytest.approx(2 * (float(eight.time_s) - fixed_s))
    assert float(sixteen.wire_bytes) == 2 * float(eight.wire_bytes)
    plain, blocks = (
        model(name="qwen3-30b-a3b", all2all_backend="deepep_high_throughput", quantization=method)
        for method in (None, "fp8_block")
    )
    assert communication_s(plain, 4096) > 1.2 * communication_s(blocks, 4096)


def test_tensor_parallel_ranks_send_their_part() -> None:
    prices = Collectives.load("H200-SXM")
    one, two = (model(dp=8 // tp, tp=tp, all2all_backend="deepep_low_latency") for tp in (1, 2))
    halves = sum(
        float(prices.expert_exchange_s(f"low_latency_{part}", TOKENS / 2, HIDDEN, SELECTED, EXPERTS, 8).time_s)
        for part in ("dispatch", "combine")
    )
    exchanged = [kernel for kernel in two.kernels if kernel.collective and kernel.collective.op == "all_to_all"]
    assert len(exchanged) == 2
    message = exchanged[0].activation_bytes.tokens * TOKENS
    assert sum(
        float(two._exchanges.timed(kernel, kernel.activation_bytes.tokens * TOKENS).time_s)  # type: ignore[union-attr]
        for kernel in exchanged
    ) == pytest.approx(halves)
    assert message > 0
    assert communication_s(one) > MOE_LAYERS * halves


def test_pipeline_stages_exchange_their_own_layers() -> None:
    whole, staged = (model(all2all_backend="deepep_low_latency", pipeline_parallel_size=pp) for pp in (1, 2))
    assert 0.4 < communication_s(staged) / communication_s(whole) < 0.6


def test_without_data_parallelism_there_is_nothing_to_exchange() -> None:
    plain, backend = (model(dp=1, tp=8, **given) for given in ({}, {"all2all_backend": "deepep_low_latency"}))
    assert backend.step([(1, 100)] * 64) == plain.step([(1, 100)] * 64)
    model(gpu="A100-SXM-80GB", name="qwen3-30b-a3b", dp=1, tp=8, all2all_backend="deepep_low_latency")


def test_dual_batch_overlap_by_vllms_arguments() -> None:
    given = {"all2all_backend": "deepep_high_throughput"}
    asked = model(enable_dbo=True, dbo_decode_token_threshold=64, **given)
    passed = EnergyModel("deepseek-v3", model(**given).deployment, overlap=DualBatch(decode_token_threshold=64))
    few, many = [(1, 1000)] * 8 * 63, [(1, 1000)] * 8 * 1024
    assert asked.step(many).energy_j == passed.step(many).energy_j
    assert asked.step(few).time_s == model(**given).step(few).time_s  # below the threshold
    assert asked.step(many).time_s != model(**given).step(many).time_s
    assert {"overlap_not_measured", "all2all_not_measured"} <= asked.flags


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"all2all_backend": "deepep_lowlatency"}, "did you mean 'deepep_low_latency'"),
        ({"enable_dbo": True}, "enable_dbo: needs an all2all_backend of DeepEP"),
        ({"enable_dbo": True, "all2all_backend": "deepep_low_latency", "dbo_decode_token_threshold": 0},
         "decode_token_threshold 0"),
        ({"gpu": "A100-SXM-80GB", "name": "qwen3-30b-a3b", "all2all_backend": "deepep_low_latency"},
         "was not measured on A100-SXM-80GB"),
    ],
)  # fmt: skip
def test_what_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(EnergyLensError, match=problem):
        model(**given)
