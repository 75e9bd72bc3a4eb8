"""Overlap of communication and computation: limits that hold whatever the coefficients, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from energylens_vllm.architectures import build, load_config
from energylens_vllm.einsum import Mesh
from energylens_vllm.energy import Deployment, DualBatch, EnergyModel, Overlap
from energylens_vllm.energy.batch import steps_from_requests
from energylens_vllm.energy.expert_exchange import ExpertExchanges
from energylens_vllm.energy.overlap import Pair, StagedStep, driven_by, on_fewer_sms, overlap_std, pairs
from energylens_vllm.energy.step import GpuStep
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.explore.pareto import pareto_front

DENSE = Deployment(gpu="A100-SXM-80GB", tensor_parallel_size=8)
PREFILL = [(8192, 0), (8192, 0)]
DECODE = [(1, 1000)] * 64


def paired(model: str, mesh: Mesh) -> list[tuple[list[str], str]]:
    found = pairs(build(load_config(model)).kernels(mesh=mesh))
    return [([k.name for k in item.compute], item.collective.name) for item in found if isinstance(item, Pair)]


def test_pairs_are_what_makes_and_takes_a_layers_messages() -> None:
    assert paired("llama-3-70b", Mesh(tp=8)) == [
        (["layer.o"], "layer.o.all_reduce"),
        (["layer.down"], "layer.down.all_reduce"),
    ]
    assert paired("qwen3-30b-a3b", Mesh(dp=4, ep=4)) == [
        (["layer.w13"], "layer.post_norm.all_gather"),
        (["layer.w2", "layer.sum"], "layer.sum.reduce_scatter"),
    ]


def test_no_kernel_is_lost_or_doubled() -> None:
    kernels = build(load_config("qwen3-30b-a3b")).kernels(mesh=Mesh(tp=2, dp=2, ep=4))
    seen = []
    for item in pairs(kernels):
        seen += [*item.compute, item.collective] if isinstance(item, Pair) else [item]
    assert sorted(k.name for k in seen) == sorted(k.name for k in kernels)


def test_without_collectives_overlap_changes_nothing() -> None:
    alone = Deployment(gpu="A100-SXM-80GB")
    plain = EnergyModel("llama-3.1-8b", alone).step(PREFILL)
    step = EnergyModel("llama-3.1-8b", alone, overlap=Overlap(4, 16)).step(PREFILL)
    assert (step.time_s, step.energy_j) == (plain.time_s, plain.energy_j)


@pytest.mark.parametrize("overlap", [Overlap(4, 16), Overlap(1, 8), DualBatch()])
@pytest.mark.parametrize("requests", [PREFILL, DECODE])
def test_components_and_phases_sum(overlap: Overlap | DualBatch, requests: list[tuple[int, int]]) -> None:
    step = EnergyModel("llama-3-70b", DENSE, overlap=overlap).step(requests)
    assert sum(step.components.values()) == pytest.approx(step.energy_j, rel=1e-12)
    assert sum(step.phases.values()) == pytest.approx(step.energy_j, rel=1e-12)
    assert "overlap_not_measured" in step.flags


def test_stages_hide_communication_but_not_more_than_all_of_it() -> None:
    model = EnergyModel("llama-3-70b", DENSE)
    steps = steps_from_requests(PREFILL, model.masks)
    plain = model.predict(steps)
    one, two, four, eight = (
        float(EnergyModel("llama-3-70b", DENSE, overlap=Overlap(stages, 16)).predict(steps).time_s[0])
        for stages in (1, 2, 4, 8)
    )
    assert two > one > plain.time_s[0]  # they hide nothing and have fewer SMs
    assert four < one
    assert plain.time_s[0] - plain.communication_s[0] < eight < min(four, plain.time_s[0])


@pytest.mark.parametrize("sms", [1, 24])  # communication takes longer, or computation
@pytest.mark.parametrize("stages", [1, 2, 3, 8])
def test_all_but_two_stages_take_the_longer_of_computation_and_communication(stages: int, sms: int) -> None:
    model = EnergyModel("llama-3-70b", Deployment(gpu="H200-SXM", tensor_parallel_size=2))
    gemm, reduce = (k for k in model.kernels if k.name in ("layer.down", "layer.down.all_reduce"))
    unlimited_w = 1e6  # so that the clock stays at the top
    exchanges = ExpertExchanges(model._collectives, (), "allgather_reducescatter", 1, fp8=False)
    beside = GpuStep([[gemm]], (), on_fewer_sms(model.profile, sms), None, (), unlimited_w)
    c = float(beside.evaluate(steps_from_requests([(8192 // stages, 0)], ())).gpu_s.item()) / gemm.count
    message = np.array([8192 // stages * 8192 * 2.0])
    m = float(driven_by(model._collectives, "H200-SXM", sms, reduce, message).time_s[0])
    assert (c > m) is (sms == 24)
    staged = StagedStep(
        Overlap(stages, sms), model._collectives, exchanges, [[gemm, reduce]], (), model.profile, None, (), unlimited_w
    ).evaluate(steps_from_requests([(8192 // stages * stages, 0)], ()))
    exposed = min(stages, 2)
    expected_s = exposed * (c + m) + (stages - exposed) * max(c, m)
    assert staged.gpu_s.item() / gemm.count == pytest.approx(expected_s, rel=1e-9)


def test_each_stage_reads_the_weights_of_its_pairs_again() -> None:
    """Decodes leave the clock at the top, so joules compare: o and down are read four times, qkv and gate_up once."""
    plain = EnergyModel("llama-3-70b", DENSE).step(DECODE).components
    staged = EnergyModel("llama-3-70b", DENSE, overlap=Overlap(4, 16)).step(DECODE).components
    kernels = build(load_config("llama-3-70b")).kernels(mesh=Mesh(tp=8))
    weights = {k.name: k.count * k.weight_bytes for k in kernels if k.weight_bytes}
    total = sum(bytes_ for name, bytes_ in weights.items() if "embed" not in name)
    again = 3 * (weights["layer.o"] + weights["layer.down"])
    assert staged["weights"] / plain["weights"] == pytest.approx((total + again) / total, rel=0.01)
    assert staged["linear"] == pytest.approx(plain["linear"], rel=1e-6)


def test_few_sms_send_slowly_and_many_compute_slowly() -> None:
    counts = (1, 2, 4, 8, 16, 32, 64)
    found = [EnergyModel("llama-3-70b", DENSE, overlap=Overlap(4, sms)).step(PREFILL) for sms in counts]
    times, joules = np.array([s.time_s for s in found]), np.array([s.energy_j for s in found])
    assert 0 < times.argmin() < len(counts) - 1
    front = pareto_front(joules, times, np.zeros(len(counts)))
    assert 1 <= front.sum() < len(counts)
    assert front[times.argmin()]
    assert front[joules.argmin()]


def test_few_sms_send_as_fast_as_measured_and_many_as_fast_as_nccl() -> None:
    """134 MB between two H200s (benchmarks/results/overlap_h200)."""
    kernel = next(k for k in build(load_config("llama-3-70b")).kernels(mesh=Mesh(tp=2)) if k.collective)
    collectives = EnergyModel("llama-3-70b", Deployment(gpu="H200-SXM", tensor_parallel_size=2))._collectives
    message = np.array([8192 * 8192 * 2.0])

    def time_s(sms: int) -> float:
        return float(driven_by(collectives, "H200-SXM", sms, kernel, message).time_s[0])

    for sms, measured_s in ((1, 6.661e-3), (4, 1.695e-3), (16, 0.531e-3)):
        assert time_s(sms) == pytest.approx(measured_s, rel=0.03)
    assert time_s(131) == pytest.approx(collectives.time_s("all_reduce", message, 2, "nccl").time_s[0], rel=1e-3)


def test_what_was_measured_is_surer() -> None:
    assert overlap_std(Overlap(), "H200-SXM") < overlap_std(Overlap(), "A100-SXM-80GB")
    assert overlap_std(DualBatch(), "H200-SXM") == overlap_std(Overlap(), "A100-SXM-80GB")
    widths = []
    for overlap in (Overlap(), DualBatch()):
        step = EnergyModel("llama-3-70b", replace(DENSE, gpu="H200-SXM"), overlap=overlap).step(PREFILL)
        widths.append(step.interval_j[1] / step.energy_j)
    assert widths[0] < widths[1]


def test_dual_batch_takes_steps_above_its_thresholds_only() -> None:
    deployment = Deployment(gpu="H100-SXM", data_parallel_size=8, enable_expert_parallel=True)
    plain = EnergyModel("qwen3-30b-a3b", deployment)
    dual = EnergyModel("qwen3-30b-a3b", deployment, overlap=DualBatch())
    few, prompts = [(1, 1000)] * 8 * 31, [(4096, 0)] * 8
    assert dual.step(few).energy_j == plain.step(few).energy_j
    # Two halves hide the exchanges of long prompts, and never more than those.
    rank = plain.predict(steps_from_requests(prompts[:1], plain.masks))
    shortest = rank.time_s[0] - rank.communication_s[0]
    assert shortest < dual.step(prompts).time_s < rank.time_s[0]


def test_refusals() -> None:
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(EnergyLensError, match="overlap: stages"):
            Overlap(stages=wrong)  # type: ignore[arg-type]
    with pytest.raises(EnergyLensError, match="overlap: sms"):
        DualBatch(sms=0)
    with pytest.raises(EnergyLensError, match="accepted: 1 to 107"):
        on_fewer_sms(EnergyModel("llama-3-70b", DENSE).profile, 108)
