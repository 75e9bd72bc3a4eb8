"""What vLLM's configuration says of experts, their exchange and context parallelism reaches the step model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from energylens_vllm.architectures import load_config
from energylens_vllm.energy import Deployment
from energylens_vllm.serving.start import Engine, start_predictor

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def configured(tiny_model: Path) -> Any:
    """A configuration as vLLM makes it; tests set what it would refuse without GPUs or DeepEP."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(tiny_model), load_format="dummy", gpu_memory_utilization=0.08).create_engine_config()


def described(
    configured: Any, monkeypatch: pytest.MonkeyPatch, redundant: int = 0, experts: int = 128, **parallel: Any
) -> Engine:
    from energylens_vllm.hooks.vllm.deployment import describe

    monkeypatch.setattr(type(configured.model_config), "get_num_experts", lambda self: experts)
    for name, value in parallel.items():
        assert hasattr(configured.parallel_config, name)
        monkeypatch.setattr(configured.parallel_config, name, value)
    monkeypatch.setattr(configured.parallel_config.eplb_config, "num_redundant_experts", redundant)
    return describe(configured)


SHARED = {"data_parallel_size": 4, "tensor_parallel_size": 2, "enable_expert_parallel": True}


def test_defaults_are_vllms(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = described(configured, monkeypatch, **SHARED)
    found, own = Deployment(**engine.deployment), Deployment()
    for name in (
        "enable_eplb", "num_redundant_experts", "all2all_backend", "enable_dbo", "dbo_decode_token_threshold",
        "dbo_prefill_token_threshold", "prefill_context_parallel_size", "decode_context_parallel_size",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(own, name), name
    assert engine.flags == frozenset()


def test_experts_that_are_balanced(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = described(configured, monkeypatch, redundant=32, enable_eplb=True, **SHARED)
    found = Deployment(**engine.deployment)
    assert (found.enable_eplb, found.num_redundant_experts, found.mesh.redundant_experts) == (True, 32, 32)
    # Without EPLB vLLM has no copies, whatever its configuration has left over.
    assert described(configured, monkeypatch, redundant=32, enable_eplb=False).deployment["num_redundant_experts"] == 0


def test_exchanges_of_deepep(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = {"all2all_backend": "deepep_high_throughput", "enable_dbo": True, "dbo_decode_token_threshold": 0}
    engine = described(configured, monkeypatch, **SHARED, **exchange)
    found = Deployment(**engine.deployment)
    assert (found.all2all_backend, found.enable_dbo) == ("deepep_high_throughput", True)
    assert found.dbo_decode_token_threshold == 1
    assert found.mesh.all2all
    # One rank alone exchanges nothing, and vLLM does not look at the backend.
    alone = described(configured, monkeypatch, **exchange | {"data_parallel_size": 1})
    assert Deployment(**alone.deployment).all2all_backend == "allgather_reducescatter"


def test_what_is_for_experts_means_nothing_in_a_dense_network(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"all2all_backend": "deepep_high_throughput", "enable_dbo": True, "enable_eplb": True, **SHARED}
    engine = described(configured, monkeypatch, redundant=32, experts=0, **given)
    started = start_predictor(Engine(load_config("llama-3.1-8b"), engine.deployment, "NVIDIA H200", None))
    assert started.state == "ready"
    assert not Deployment(**engine.deployment).enable_eplb


def test_an_exchange_that_is_not_known_is_flagged(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = described(configured, monkeypatch, **SHARED, all2all_backend="nixl_ep", enable_dbo=True)
    assert engine.flags == {"all2all_not_modelled"}
    assert Deployment(**engine.deployment).all2all_backend == "allgather_reducescatter"


def test_contexts_that_are_split(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    split = {"tensor_parallel_size": 4, "decode_context_parallel_size": 2}
    engine = described(configured, monkeypatch, **split, dcp_comm_backend="a2a", dcp_q_replicate=True)
    found = Deployment(**engine.deployment)
    assert (found.decode_context_parallel_size, found.dcp_comm_backend, found.dcp_q_replicate) == (2, "a2a", True)
    left_to_vllm = described(configured, monkeypatch, **split, dcp_comm_backend=None, dcp_q_replicate=None)
    found = Deployment(**left_to_vllm.deployment)
    assert (found.dcp_comm_backend, found.dcp_q_replicate) == ("ag_rs", False)
    # Without split contexts their options mean nothing to vLLM.
    alone = described(configured, monkeypatch, decode_context_parallel_size=1, dcp_comm_backend="a2a")
    assert Deployment(**alone.deployment).dcp_comm_backend == "ag_rs"
    monkeypatch.delattr(configured.parallel_config, "dcp_q_replicate")  # as in 0.25
    assert not Deployment(**described(configured, monkeypatch, **split).deployment).dcp_q_replicate


def test_a_split_that_the_network_does_not_have_is_refused(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = described(configured, monkeypatch, tensor_parallel_size=4, decode_context_parallel_size=2)
    started = start_predictor(Engine(load_config("llama-3.1-8b"), engine.deployment, "NVIDIA H200", None))
    assert (started.predictor, started.state) == (None, "model_unknown")
    assert "rank g (8) differs between GPUs that were to share a context" in started.problem


@pytest.mark.parametrize("parts", [1, 4])
def test_gpus_that_share_out_contexts_hold_more_tokens_together(parts: int) -> None:
    """As vLLM says at its start: "GPU KV cache size: N tokens"."""
    from energylens_vllm.hooks.vllm.live import looker

    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
    scheduler = SimpleNamespace(
        kv_cache_config=SimpleNamespace(num_blocks=100, kv_cache_groups=[group]),
        vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(decode_context_parallel_size=parts)),
        kv_cache_manager=SimpleNamespace(usage=0.25),
        requests={},
    )
    seen = looker(scheduler)()
    assert (seen.kv_tokens, seen.kv_tokens_used) == (1600 * parts, 400 * parts)
