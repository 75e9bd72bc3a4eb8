"""What is tried, what is kept, and that the best is the best."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from energylens_vllm import EnergyLensError, EnergyModel
from energylens_vllm.architectures import build, load_config
from energylens_vllm.explore import Exploration, Load, Space, explore
from energylens_vllm.explore.explain import choices, command, measured_releases, row
from energylens_vllm.explore.space import VLLM_RELEASE, engines

LOAD = Load(1000, 300, ttft_s=1.0, tpot_s=0.05)
H100 = Space(gpus=("H100-SXM",))


@pytest.fixture(scope="module")
def found() -> Exploration:
    return explore("llama-3.1-70b", LOAD, H100)


def degrees(model: str, space: Space) -> set[tuple[int, int, int, bool]]:
    cascade = EnergyModel(model).cascade
    return {
        (d.tensor_parallel_size, d.pipeline_parallel_size, d.data_parallel_size, d.enable_expert_parallel)
        for d in engines(cascade, None, space)
    }


def test_degrees_are_those_that_divide_the_heads() -> None:
    dense = degrees("llama-3.1-70b", Space(max_gpus=8))
    assert {tp for tp, *_ in dense} == {1, 2, 4, 8}
    assert {pp for _, pp, *_ in dense} == set(range(1, 9))
    assert {(dp, ep) for *_, dp, ep in dense} == {(1, False)}, "replicas do what data parallelism would"
    assert all(tp * pp * dp <= 8 for tp, pp, dp, _ in dense)


def test_experts_are_spread_in_every_way() -> None:
    experts = degrees("qwen3-30b-a3b", Space(max_gpus=4))
    assert {(1, 1, 4, True), (1, 1, 4, False), (2, 1, 2, True), (4, 1, 1, True), (4, 1, 1, False)} <= experts
    assert (1, 1, 1, True) not in experts


def test_block_scales_limit_how_experts_are_split() -> None:
    """vLLM refuses Qwen3-235B-A22B-FP8 under TP 8 without expert parallelism: 1,536 / 8 is no multiple of 128."""
    cascade = EnergyModel("qwen3-235b-a22b-fp8").cascade
    found = {
        (d.tensor_parallel_size, d.enable_expert_parallel)
        for d in engines(cascade, "fp8_per_block", Space(max_gpus=8, data_parallel_size=(1,)))
    }
    assert {(4, False), (4, True), (8, True)} <= found
    assert (8, False) not in found
    assert (8, False) in {(tp, ep) for tp, _, dp, ep in degrees("qwen3-235b-a22b", Space(max_gpus=8)) if dp == 1}


def test_formats_are_those_that_the_gpu_computes_in(found: Exploration) -> None:
    cascade = EnergyModel("llama-3.1-8b").cascade
    hopper, ampere = (
        {(d.quantization, d.kv_cache_dtype) for d in engines(cascade, None, Space(gpus=(gpu,), max_gpus=1))}
        for gpu in ("H100-SXM", "A100-SXM-80GB")
    )
    assert hopper == {(None, "auto"), (None, "fp8"), ("fp8", "auto"), ("fp8", "fp8")}
    assert ampere == {(None, "auto")}
    stored = {d.quantization for d in engines(cascade, "fp8_per_block", Space(max_gpus=1))}
    assert stored == {"fp8_per_block"}, "a quantized checkpoint is served as it is"


def test_what_is_kept_fits_and_carries_the_load(found: Exploration) -> None:
    table = found.deployments
    assert len(table) > 2000
    for index in np.flatnonzero(found.feasible)[::97]:
        engine, running, budget = found.evaluate(int(index))
        assert running <= engine.memory.most_running(1000, 300, budget, int(table.max_num_seqs[index]))
        assert table.tpot_s[index] <= 0.05
        assert table.ttft_s[index] <= 1.0
    assert 0 < found.front.sum() < found.feasible.sum() < len(table)


def test_every_row_is_what_serving_predicts(found: Exploration) -> None:
    table = found.deployments
    for index in range(0, len(table), 401):
        model = found.engines[table.engine[index]].model
        budget = int(table.max_num_batched_tokens[index])
        deployment = type(model.deployment)(
            **{**{n: getattr(model.deployment, n) for n in model.deployment.accepted()},
               "max_num_batched_tokens": budget}
        )  # fmt: skip
        one = EnergyModel(model.cascade, deployment).serving(int(table.max_num_seqs[index]), 1000, 300,
                                                             prefix_cache_hit_rate=0.0)  # fmt: skip
        assert table.token_j[index] == pytest.approx(one.energy_per_output_token_j)
        assert table.power_w[index] == pytest.approx(one.power_w)
        assert table.tpot_s[index] == pytest.approx(one.inter_token_latency_s)


def test_the_best_is_the_least(found: Exploration) -> None:
    table = found.deployments
    best = found.best(5)
    assert table.token_j[best[0]] == table.token_j[found.feasible].min()
    assert len({int(table.engine[i]) for i in best}) == 5
    assert list(table.token_j[best]) == sorted(table.token_j[best])
    assert found.front[best[0]]


def test_no_cheaper_batch_limit_of_the_same_engine_was_missed(found: Exploration) -> None:
    """All 1 .. 1024 limits of the best engine: the grid costs no more than 3 %."""
    from energylens_vllm.explore.steady import steady

    index = found.best(1)[0]
    engine, _, budget = found.evaluate(index)
    every = np.arange(1, 1025)
    at = steady(engine.model, every, budget, 1000, 300)
    kept = (at.tpot_s <= 0.05) & (every <= engine.memory.most_running(1000, 300, budget, every))
    assert found.deployments.token_j[index] <= 1.03 * at.token_j[kept].min()


def test_a_rate_needs_replicas_and_costs_idle_time() -> None:
    space = Space(gpus=("H100-SXM",), quantization=(None,), kv_cache_dtype=("auto",))
    slow, fast = (explore("llama-3.1-8b", Load(1000, 300, tpot_s=0.05, rate_per_s=r), space) for r in (1.0, 60.0))
    few, many = slow.best(1)[0], fast.best(1)[0]
    assert slow.deployments.gpus[few] == 1
    assert fast.deployments.gpus[many] > 1
    assert slow.deployments.token_j[few] > 1.5 * fast.deployments.token_j[many]
    assert slow.deployments.tokens_per_s[few] == pytest.approx(300)
    assert slow.deployments.power_w[few] == pytest.approx(300 * slow.deployments.token_j[few])
    kept_up = np.isfinite(fast.deployments.token_j)
    assert not kept_up.all(), "some cannot keep up"
    assert not fast.feasible[~kept_up].any()


@pytest.mark.parametrize(("model", "tp", "dp", "rate"), [("llama-3.1-8b", 1, 1, 2.0), ("llama-3.1-8b", 1, 1, 15.0),
                                                         ("llama-3.1-70b", 4, 1, 4.0), ("llama-3.1-8b", 1, 2, 4.0),
                                                         ("qwen3-30b-a3b", 1, 4, 8.0)])  # fmt: skip
def test_at_a_rate_it_is_what_open_serving_predicts(model: str, tp: int, dp: int, rate: float) -> None:
    """`open_serving` draws requests one by one; both know the same queue."""
    space = Space(gpus=("H100-SXM",), max_gpus=tp * dp, exactly=True, tensor_parallel_size=(tp,),
                  data_parallel_size=(dp,), enable_expert_parallel=dp > 1, quantization=(None,),
                  kv_cache_dtype=("auto",), max_num_seqs=(128,), max_num_batched_tokens=(8192,))  # fmt: skip
    found = explore(model, Load(1000, 300, rate_per_s=rate), space)
    assert len(found.deployments) == 1
    deployment = replace(found.engines[0].deployment, max_num_seqs=128, max_num_batched_tokens=8192)
    expected = EnergyModel(model, deployment).open_serving(rate, 1000, 300, prefix_cache_hit_rate=0.0)
    table = found.deployments
    assert table.token_j[0] == pytest.approx(expected.energy_per_output_token_j, rel=0.02)
    assert dp * table.running[0] == pytest.approx(expected.running, rel=0.03)
    assert table.tpot_s[0] == pytest.approx(expected.mean_tpot_s, rel=0.03)
    assert table.ttft_s[0] == pytest.approx(expected.mean_ttft_s, rel=0.25)
    assert 1 - table.idle_share[0] == pytest.approx(expected.utilisation, abs=0.02)


def test_what_else_is_tried_changes_nothing() -> None:
    space = Space(gpus=("H100-SXM",), max_gpus=2, quantization=(None,), kv_cache_dtype=("auto",))
    load = Load(1000, 300, rate_per_s=3.0)
    every, one = explore("llama-3.1-8b", load, space), explore("llama-3.1-8b", load, replace(space, max_num_seqs=(64,)))
    alike = np.flatnonzero(every.deployments.max_num_seqs == 64)
    assert len(alike) == len(one.deployments)
    assert one.deployments.token_j == pytest.approx(every.deployments.token_j[alike], rel=1e-3)
    assert one.deployments.ttft_s == pytest.approx(every.deployments.ttft_s[alike], rel=1e-3)
    assert one.deployments.low_j == pytest.approx(every.deployments.low_j[alike], rel=1e-3)


def test_hardly_any_requests_draw_idle_power() -> None:
    found = explore("llama-3.1-8b", Load(500, 100, rate_per_s=1e-4), Space(gpus=("H100-SXM",), max_gpus=1))
    index = found.best(1)[0]
    idle_w = found.engines[found.deployments.engine[index]].model.idle_power_w
    assert found.deployments.power_w[index] == pytest.approx(idle_w, rel=0.01)
    assert found.deployments.idle_share[index] == pytest.approx(1, abs=0.01)


def test_near_saturation_the_power_is_that_of_a_full_batch() -> None:
    space = Space(gpus=("H100-SXM",), max_gpus=1, quantization=(None,), kv_cache_dtype=("auto",), max_num_seqs=(64,),
                  max_num_batched_tokens=(8192,))  # fmt: skip
    full = explore("llama-3.1-8b", Load(500, 100), space)
    most = float(full.deployments.tokens_per_s[0]) / 100
    busy = explore("llama-3.1-8b", Load(500, 100, ttft_s=3600.0, rate_per_s=0.999 * most), space)
    index = int(np.flatnonzero(busy.deployments.max_num_seqs == 64)[0])
    assert busy.deployments.power_w[index] == pytest.approx(full.deployments.power_w[0], rel=0.01)
    assert busy.deployments.waiting_share[index] > 0.9
    with pytest.raises(EnergyLensError, match="more than 5% of them wait in line in each deployment"):
        explore("llama-3.1-8b", Load(500, 100, rate_per_s=0.999 * most), space)


def test_without_a_bound_hardly_any_request_waits() -> None:
    space = Space(gpus=("H100-SXM",), max_gpus=2)
    found = explore("llama-3.1-8b", Load(500, 100, rate_per_s=40.0), space)
    assert found.deployments.waiting_share[found.feasible].max() <= 0.05
    patient = explore("llama-3.1-8b", Load(500, 100, ttft_s=60.0, rate_per_s=40.0), space)
    assert patient.deployments.waiting_share[patient.feasible].max() > 0.05
    assert patient.deployments.ttft_s[patient.feasible].max() <= 60.0


def test_exactly_so_many_gpus() -> None:
    found = explore("llama-3.1-8b", Load(500, 100), Space(gpus=("H100-SXM",), max_gpus=6, exactly=True))
    assert set(found.deployments.gpus.tolist()) == {6}
    assert {1, 2, 3, 6} <= set(found.deployments.replicas.tolist())


def test_several_kinds_of_gpu_compete() -> None:
    found = explore("llama-3.1-8b", Load(500, 100), Space(gpus=("H100-SXM", "A100-SXM-80GB"), max_gpus=1))
    assert {engine.deployment.gpu for engine in found.engines} == {"H100-SXM", "A100-SXM-80GB"}


EXPERTS = Space(gpus=("H200-SXM",), max_gpus=4, data_parallel_size=(1, 4), quantization=(None,),
                kv_cache_dtype=("auto",))  # fmt: skip


def commands(found: Exploration, **asked: object) -> list[str]:
    """Commands of all deployments that are so."""
    ways = [engine.deployment for engine in found.engines]
    return [
        command(found, index, "m")
        for index, engine in enumerate(found.deployments.engine)
        if all(getattr(ways[engine], name) == value for name, value in asked.items())
    ]


def test_dual_batch_overlap_where_vllm_has_it() -> None:
    found = explore("qwen3-30b-a3b", Load(1000, 300), replace(EXPERTS, enable_dbo=True))
    dual = [engine.deployment for engine in found.engines if engine.deployment.enable_dbo]
    assert {each.all2all_backend for each in dual} == {"deepep_low_latency", "deepep_high_throughput"}
    assert all(each.data_parallel_size > 1 and each.enable_expert_parallel for each in dual)
    plain = {engine.title for engine in found.engines if not engine.deployment.enable_dbo}
    titles = {engine.title for engine in found.engines if engine.deployment.enable_dbo}
    assert {title.partition(", deepep")[0] for title in titles} <= plain
    assert {"overlap_not_measured", "all2all_not_measured"} <= found.flags
    assert all(
        f"--all2all-backend {backend} --enable-dbo" in text
        for backend in ("deepep_low_latency", "deepep_high_throughput")
        for text in commands(found, enable_dbo=True, all2all_backend=backend)
    )
    assert not any("--enable-dbo" in text for text in commands(found, enable_dbo=False))


def test_exchanges_are_tried_where_they_were_measured() -> None:
    both = ("allgather_reducescatter", "deepep_low_latency")
    space = replace(EXPERTS, gpus=("H200-SXM", "A100-SXM-80GB"), all2all_backend=both)
    found = explore("qwen3-30b-a3b", Load(1000, 300), space)
    by_gpu = {
        gpu: {e.deployment.all2all_backend for e in found.engines if e.deployment.gpu == gpu} for gpu in space.gpus
    }
    assert by_gpu == {"H200-SXM": set(both), "A100-SXM-80GB": {"allgather_reducescatter"}}
    tried = {e.title: e for e in found.engines}
    one, other = (tried[f"4 x H200-SXM, DP4, EP{name}"] for name in ("", ", deepep_low_latency"))
    requests = [(1, 1000)] * 256
    assert one.model.step(requests).components["communication"] != pytest.approx(
        other.model.step(requests).components["communication"], rel=0.01
    )


LATENT = Space(gpus=("H200-SXM",), max_gpus=4, data_parallel_size=(1,), pipeline_parallel_size=(1,),
               quantization=(None,), kv_cache_dtype=("auto",))  # fmt: skip


def test_contexts_are_split_where_it_pays() -> None:
    """Of latent attention every GPU keeps the whole cache, unless contexts are split."""
    space = replace(LATENT, tensor_parallel_size=(4,), max_gpus=4, exactly=True, enable_expert_parallel=False)
    short, long = (explore("deepseek-v2-lite", Load(prompt, 200, tpot_s=0.05), space) for prompt in (200, 30_000))
    for found in (short, long):
        assert {engine.title for engine in found.engines} == {"4 x H200-SXM, TP4", "4 x H200-SXM, TP4 DCP4"}
    best = [found.engines[found.deployments.engine[found.best(1)[0]]] for found in (short, long)]
    assert [engine.deployment.decode_context_parallel_size for engine in best] == [1, 4]
    assert all("--decode-context-parallel-size 4" in text for text in commands(long, decode_context_parallel_size=4))
    assert not any("context" in text for text in commands(long, decode_context_parallel_size=1))
    shown = [row(long, index) for index in long.best(2)]
    assert [each["decode_context_parallel_size"] for each in shown] == [4, 1]


def test_ways_of_splitting_contexts_and_tokens_that_are_asked_for() -> None:
    space = replace(LATENT, tensor_parallel_size=(1, 2, 4), decode_context_parallel_size=(2,),
                    dcp_comm_backend=("ag_rs", "a2a"), enable_expert_parallel=False)  # fmt: skip
    found = explore("deepseek-v2-lite", Load(1000, 200), space)
    assert {engine.title for engine in found.engines} == {
        f"{gpus} x H200-SXM, TP{gpus} DCP2{name}" for gpus in (2, 4) for name in ("", ", a2a")
    }
    assert all("--dcp-comm-backend a2a" in text for text in commands(found, dcp_comm_backend="a2a"))
    space = replace(LATENT, prefill_context_parallel_size=(1, 2), decode_context_parallel_size=(1,), max_gpus=2)
    found = explore("deepseek-v2-lite", Load(1000, 200), space)
    assert {engine.title for engine in found.engines} == {
        "1 x H200-SXM",
        *(f"2 x H200-SXM, {way}{ep}" for way in ("TP2", "PCP2") for ep in ("", ", EP")),
    }
    assert all("--prefill-context-parallel-size 2" in t for t in commands(found, prefill_context_parallel_size=2))
    assert "context_parallel" in found.flags


def test_networks_whose_gpus_hold_other_kv_heads_are_tried_as_before() -> None:
    tried = explore("llama-3.1-8b", Load(1000, 200), Space(gpus=("H200-SXM",), max_gpus=8)).engines
    assert {engine.deployment.decode_context_parallel_size for engine in tried} == {1}
    few = replace(LATENT, max_gpus=8, tensor_parallel_size=(4, 8), enable_expert_parallel=False)
    tried = explore("qwen3-30b-a3b", Load(1000, 200), few).engines
    assert {engine.title for engine in tried} == {
        "4 x H200-SXM, TP4", "8 x H200-SXM, TP8", "8 x H200-SXM, TP8 DCP2",
    }  # fmt: skip


def test_contexts_that_are_split_are_tried_without_dual_batch_overlap() -> None:
    space = replace(LATENT, tensor_parallel_size=(2,), data_parallel_size=(2,), enable_dbo=True)
    tried = [engine.deployment for engine in explore("deepseek-v2-lite", Load(1000, 200), space).engines]
    assert {(each.decode_context_parallel_size, each.enable_dbo) for each in tried} == {
        (1, False), (1, True), (2, False),
    }  # fmt: skip


def test_experts_that_are_balanced_pay_where_routing_is_uneven() -> None:
    space = replace(EXPERTS, tensor_parallel_size=(4,), data_parallel_size=(1,), expert_routing="zipf:1.0",
                    enable_eplb=True, num_redundant_experts=(0, 16, 17))  # fmt: skip
    found = explore("qwen3-30b-a3b", Load(1000, 300), space)
    titles = {engine.title: position for position, engine in enumerate(found.engines)}
    assert set(titles) == {
        "4 x H200-SXM, TP4",
        *(f"4 x H200-SXM, TP4, EP{name}" for name in ("", ", EPLB", ", EPLB +16")),
    }
    table = found.deployments
    at = {
        title: table.token_j[(table.engine == position) & (table.max_num_seqs == 512)].min()
        for title, position in titles.items()
    }
    assert at["4 x H200-SXM, TP4, EP, EPLB"] < at["4 x H200-SXM, TP4, EP"]
    weights = {title: found.engines[position].memory.weights for title, position in titles.items()}
    assert weights["4 x H200-SXM, TP4, EP, EPLB +16"] > 1.1 * weights["4 x H200-SXM, TP4, EP, EPLB"]
    assert any(
        """--enable-eplb --eplb-config '{"num_redundant_experts": 16}'""" in text
        for text in commands(found, num_redundant_experts=16)
    )
    assert all("--enable-eplb" in text for text in commands(found, enable_eplb=True))


def test_the_newest_release_is_predicted_unless_another_is_asked_for() -> None:
    small = replace(EXPERTS, gpus=("H100-SXM",), max_gpus=1)
    newest, old = (explore("qwen3-30b-a3b", Load(1000, 300), space) for space in (
        small, replace(small, vllm_release="0.11.1")))  # fmt: skip
    assert {engine.deployment.vllm_release for engine in newest.engines} == {VLLM_RELEASE}
    assert newest.engines[0].model.profile.async_scheduling
    assert not old.engines[0].model.profile.async_scheduling
    assert measured_releases(old) == {"H100-SXM": "0.11.1"}
    assert measured_releases(newest) == {"H100-SXM": "0.25.1"}
    assert newest.deployments.token_j.min() != old.deployments.token_j.min()


def test_a_context_for_which_no_memory_is_left() -> None:
    space = Space(gpus=("H100-SXM",), max_gpus=2, quantization=(None,), kv_cache_dtype=("auto",))
    with pytest.raises(EnergyLensError, match="holds no request of 131072 tokens"):
        explore("llama-3.1-70b", Load(1000, 300, max_model_len=131_072), space)


def test_the_longest_request_is_no_longer_than_the_context() -> None:
    space = Space(gpus=("H200-SXM",), max_gpus=1, max_num_seqs=(8,), quantization=(None,))
    found = explore("llama-3-8b", Load(4000, 500), space)
    assert found.load.longest == 8192, "twice the mean lengths are 9,008"
    assert "--max-model-len 8192 " in commands(found)[0]
    assert explore("llama-3-8b", Load(400, 50), space).load.longest == 912


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    explore("llama-3.1-8b", Load(500, 100), Space(gpus=("H100-SXM",), max_gpus=2), lambda *at: told.append(at))
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == len(told) - 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_gpus": 0}, "max_gpus: 0"),
        ({"tensor_parallel_size": (0,)}, "tensor_parallel_size: 0"),
        ({"tensor_parallel_size": (3,)}, "rank h (64) is not divisible by tp = 3"),
        ({"pipeline_parallel_size": (81,), "max_gpus": 81}, "81 stages for the 80 layers"),
        ({"pipeline_parallel_size": (6,), "max_gpus": 1}, "no degrees of parallelism that were asked for"),
        ({"tensor_parallel_size": (8, 4), "pipeline_parallel_size": (4,)}, "they take 16 GPUs at least"),
        ({"gpus": ("H101-SXM",)}, "did you mean 'H100-SXM'"),
        ({"gpus": ()}, "gpus: none given"),
        ({"quantization": ("fp9",)}, "quantization: unknown value 'fp9'"),
        ({"quantization": ("fp8", "awq")}, "vLLM does not make 'awq' of Llama-3.1-70B, which is stored in bfloat16"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization: 1.2"),
        ({"num_redundant_experts": (-1,)}, "num_redundant_experts: -1"),
        ({"num_redundant_experts": (8,)}, "num_redundant_experts: 8 needs enable_eplb"),
        ({"enable_eplb": True}, "enable_eplb: no deployment of Llama-3.1-70B on up to 8 x H100-SXM takes 0 redundant"),
        ({"enable_dbo": True}, "enable_dbo: no deployment of Llama-3.1-70B on up to 8 x H100-SXM uses dual-batch"),
        ({"all2all_backend": ("deepep_low_latency",)}, "all2all_backend: no deployment of Llama-3.1-70B on up to 8 x"),
        ({"all2all_backend": ("deepep_lowlatency",)}, "did you mean 'deepep_low_latency'"),
        ({"decode_context_parallel_size": (0,)}, "decode_context_parallel_size: 0"),
        ({"decode_context_parallel_size": (2, 4)},
         "decode_context_parallel_size: 2 or 4 does not split Llama-3.1-70B: layer.qkv: "),
        ({"prefill_context_parallel_size": (2,)}, "prefill_context_parallel_size: 2 does not split Llama-3.1-70B"),
        ({"dcp_comm_backend": ("a2b",)}, "did you mean 'a2a'"),
        ({"dcp_comm_backend": ("a2a",)}, "dcp_comm_backend: no deployment of Llama-3.1-70B on up to 8 x H100-SXM"),
        ({"vllm_release": "newest"}, "vllm_release: 'newest' is not a release"),
        ({"max_gpus": 1, "quantization": (None,)}, "does not fit 1 x H100-SXM: a GPU would hold 141.1 GB"),
        ({"max_gpus": 7, "exactly": True, "pipeline_parallel_size": (1,), "quantization": (None,)},
         "uses exactly 7 GPUs; an engine takes 2, 4 of them"),
    ],
)  # fmt: skip
def test_spaces_that_hold_nothing(given: dict[str, object], message: str) -> None:
    with pytest.raises(EnergyLensError) as error:
        explore("llama-3.1-70b", LOAD, Space(**{"gpus": ("H100-SXM",), **given}))  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": ("A100-SXM-80GB",), "all2all_backend": ("deepep_low_latency",)}, "GPUs on which DeepEP was measured"),
        ({"enable_eplb": True, "num_redundant_experts": (3, 5)}, "takes 3 or 5 redundant experts"),
        ({"data_parallel_size": (1,), "enable_dbo": True}, "enable_dbo: no deployment of Qwen3-30B-A3B"),
        ({"quantization": ("fp8",)}, "stored in fp8_per_block; accepted: none, fp8_per_block, or a checkpoint"),
    ],
)
def test_what_no_deployment_has_is_not_left_out_in_silence(given: dict[str, object], message: str) -> None:
    with pytest.raises(EnergyLensError) as error:
        explore("qwen3-30b-a3b-fp8", LOAD, Space(**{"gpus": ("H200-SXM",), "max_gpus": 4, **given}))  # type: ignore[arg-type]
    assert message in str(error.value)


def test_a_cascade_may_be_of_a_checkpoint_in_any_format() -> None:
    """It says how a network computes, not how its weights are stored."""
    network = build(load_config("llama-3.1-8b"))
    space = Space(gpus=("H200-SXM",), max_gpus=1, quantization=("awq",))
    assert {engine.deployment.quantization for engine in explore(network, LOAD, space).engines} == {"awq"}
    with pytest.raises(EnergyLensError, match="vLLM does not make 'awq' of"):
        explore("llama-3.1-8b", LOAD, space)


def test_a_rate_at_which_who_is_fast_lets_requests_wait() -> None:
    space = Space(gpus=("H100-SXM",), max_gpus=1, max_num_seqs=(8, 256), quantization=(None,))
    slow = explore("llama-3.1-8b", Load(1000, 300, ttft_s=60.0, rate_per_s=3.0), space).deployments
    waits = slow.waiting_share > 0.05
    assert waits.any()
    assert not waits.all()
    between_s = (slow.tpot_s[waits].min() + slow.tpot_s[~waits].min()) / 2
    with pytest.raises(EnergyLensError, match=r"rate and tpot: deployments of Llama-3.1-8B that keep the tpot"):
        explore("llama-3.1-8b", Load(1000, 300, tpot_s=between_s, rate_per_s=3.0), space)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate_per_s": -1.0}, "rate_per_s: -1.0"),
        ({"prompt_tokens": 0}, "prompt_tokens: 0"),
        ({"tpot_s": 0.0}, "tpot_s: 0.0"),
        ({"prefix_cache_hit_rate": 1.0}, "prefix_cache_hit_rate: 1.0"),
        ({"max_model_len": 100}, "max_model_len: 100 is shorter"),
        ({"tpot_s": 0.0001}, "tpot: no deployment of Llama-3.1-70B keeps it within 0.1 ms; the nearest"),
        ({"ttft_s": 0.0001}, "ttft: no deployment of Llama-3.1-70B keeps it within 0.1 ms; the nearest"),
        ({"rate_per_s": 10_000.0}, "rate: no deployment of Llama-3.1-70B on up to 8 GPUs keeps up with 10000"),
        ({"max_model_len": 100_000_000}, "max_model_len: 100000000; accepted: up to 131072, the model's context"),
        ({"prompt_tokens": 131_000}, "prompt_tokens and output_tokens: 131300 together; accepted: up to 131072"),
    ],
)
def test_loads_that_nothing_carries(given: dict[str, float], message: str) -> None:
    with pytest.raises(EnergyLensError) as error:
        explore("llama-3.1-70b", Load(**{"prompt_tokens": 1000, "output_tokens": 300, **given}), H100)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_a_power_limit_is_for_the_driver_to_set() -> None:
    found = explore("llama-3.1-8b", LOAD, Space(gpus=("H100-SXM",), max_gpus=1, power_limit_w=(500.0,)))
    for choice in choices(found, "m", 2):
        assert choice.deployment.power_limit_w == 500
        assert choice.why.endswith("Its GPUs are limited to 500 W, which vLLM does not set: nvidia-smi -pl 500.")
    unlimited = explore("llama-3.1-8b", LOAD, Space(gpus=("H100-SXM",), max_gpus=1))
    assert "nvidia-smi" not in choices(unlimited, "m", 1)[0].why


@pytest.mark.parametrize("rate", [None, 5.0])
def test_places_are_those_of_a_data_parallel_rank(rate: float | None) -> None:
    space = Space(gpus=("H100-SXM",), max_gpus=2, exactly=True, data_parallel_size=(2,), enable_expert_parallel=True)
    (choice,) = choices(explore("qwen3-30b-a3b", replace(LOAD, rate_per_s=rate), space), "m", 1)
    assert choice.deployment.data_parallel_size == 2
    assert " in each of 2 data-parallel ranks" in choice.why.split(". ")[0]


def test_large_differences_are_joules() -> None:
    space = Space(
        gpus=("H200-SXM",), exactly=True, tensor_parallel_size=(8,), pipeline_parallel_size=(1,),
        data_parallel_size=(1,), kv_cache_dtype=("auto",), enable_expert_parallel=False,
    )  # fmt: skip
    best, second = choices(explore("deepseek-v3", Load(30_000, 1000, tpot_s=0.1), space), "m", 2)
    for choice in (best, second):
        assert re.search(r": \+[1-9](\.\d+)? J a token for the KV cache\.$", choice.why)
