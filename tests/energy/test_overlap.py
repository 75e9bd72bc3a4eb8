"""Overlap of communication and computation: limits that hold whatever the coefficients, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm.architectures import build, load_config
from energylens_vllm.einsum import Mesh
from energylens_vllm.energy import Deployment, DualBatch, EnergyModel, Overlap
from energylens_vllm.energy.batch import steps_from_requests
from energylens_vllm.energy.overlap import Pair, driven_by, on_fewer_sms, pairs
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
    plain = model.step(PREFILL)
    steps = [EnergyModel("llama-3-70b", DENSE, overlap=Overlap(stages, 16)).step(PREFILL) for stages in (1, 2, 4)]
    assert steps[0].time_s > plain.time_s  # one stage hides nothing and has fewer SMs
    assert steps[1].time_s < plain.time_s
    assert steps[2].time_s < steps[1].time_s


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


def test_one_sm_sends_no_faster_than_a_channel() -> None:
    kernel = next(k for k in build(load_config("llama-3-70b")).kernels(mesh=Mesh(tp=8)) if k.collective)
    collectives = EnergyModel("llama-3-70b", DENSE)._collectives
    message = np.array([64e6])
    one, many = (driven_by(collectives, "A100-SXM-80GB", sms, kernel, message) for sms in (1, 64))
    sent = 2 * 7 / 8 * 64e6  # of a ring's all-reduce among 8
    assert one.time_s[0] == pytest.approx(sent / 20e9)
    measured = collectives.time_s("all_reduce", message, 8, "nccl").time_s[0]
    assert many.time_s[0] == pytest.approx(measured)


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
