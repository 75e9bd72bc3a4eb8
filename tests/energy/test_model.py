"""The energy model as a user meets it: what holds of every prediction, and what a physicist would expect."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm import Deployment, EnergyLensError, EnergyModel
from energylens_vllm.einsum import dump_cascade
from energylens_vllm.energy.batch import steps_from_arrays
from energylens_vllm.energy.step import COMPONENTS
from energylens_vllm.hardware import known_gpus, load_profile
from energylens_vllm.serving.metrics import COMPONENTS as EXPORTED

DENSE = EnergyModel("llama-3.1-8b")
EXPERTS = EnergyModel("qwen3-30b-a3b")
SHARDED = EnergyModel("qwen3-30b-a3b", Deployment(tensor_parallel_size=2, enable_expert_parallel=True))
PIPELINED = EnergyModel("llama-3.1-8b", Deployment(tensor_parallel_size=2, pipeline_parallel_size=2))
LATENT = EnergyModel("deepseek-v2-lite", Deployment(gpu="H100-SXM"))
MODELS = [DENSE, EXPERTS, SHARDED, PIPELINED, LATENT]

batches = st.lists(
    st.one_of(
        st.tuples(st.just(1), st.integers(1, 30_000)),  # decodes
        st.tuples(st.integers(2, 4096), st.sampled_from([0, 0, 512, 4096])),  # prefills, some of them further chunks
    ),
    min_size=1,
    max_size=40,
)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.cascade.name)
@settings(max_examples=25, deadline=None)
@given(batch=batches)
def test_the_parts_sum_to_the_whole(model: EnergyModel, batch: list[tuple[int, int]]) -> None:
    step = model.step(batch)
    assert set(step.components) == set(COMPONENTS)
    assert math.fsum(step.components.values()) == pytest.approx(step.energy_j, rel=1e-9)
    assert math.fsum(step.phases.values()) == pytest.approx(step.energy_j, rel=1e-9)
    assert min(*step.components.values(), *step.phases.values()) >= 0
    assert step.interval_s[0] < step.time_s < step.interval_s[1]
    assert step.interval_j[0] < step.energy_j < step.interval_j[1]
    limit_w = model.profile["power.limit_w"] * model.deployment.num_gpus
    # Joules of latent attention were measured on no GPU: there the slowest clock may not be slow enough.
    assert step.power_w > 0
    assert step.power_w <= limit_w * 1.001 or "extrapolated" in step.flags


def test_the_plugin_exports_every_component() -> None:
    assert EXPORTED == COMPONENTS


@settings(max_examples=25, deadline=None)
@given(st.lists(batches, min_size=1, max_size=5))
def test_many_steps_are_each_step_alone(steps: list[list[tuple[int, int]]]) -> None:
    flat = np.array([request for step in steps for request in step])
    offsets = np.cumsum([0, *map(len, steps)])
    together = EXPERTS.predict(steps_from_arrays(flat[:, 0], flat[:, 1], offsets, EXPERTS.masks))
    for i, batch in enumerate(steps):
        alone = EXPERTS.step(batch)
        assert together.time_s[i] == pytest.approx(alone.time_s, rel=1e-9)
        assert together.energy_j[i] == pytest.approx(alone.energy_j, rel=1e-9)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.cascade.name)
def test_more_work_takes_more(model: EnergyModel) -> None:
    for batches_ in (
        [[(1, context)] * 16 for context in (10, 1000, 8000, 30_000)],
        [[(1, 500)] * count for count in (1, 16, 64, 256, 512)],
        [[(tokens, 0)] for tokens in (64, 512, 2048, 8192)],
    ):
        steps = [model.step(batch) for batch in batches_]
        assert [s.energy_j for s in steps] == sorted(s.energy_j for s in steps)
        assert [s.time_s for s in steps] == sorted(s.time_s for s in steps)


def test_a_batch_is_cheaper_than_its_requests_alone() -> None:
    assert DENSE.step([(1, 100)] * 64).energy_j < 0.1 * 64 * DENSE.step([(1, 100)]).energy_j


def test_phases_follow_the_requests() -> None:
    assert DENSE.step([(1, 100)] * 8).phases["prefill"] == 0
    assert DENSE.step([(512, 0)]).phases["decode"] == 0
    mixed = DENSE.step([(1, 100)] * 8 + [(512, 0)])
    assert 0 < mixed.phases["decode"] < mixed.phases["prefill"]


def test_decode_can_be_said_of_requests_with_drafts() -> None:
    drafted = DENSE.step([(4, 1000)] * 8, decode=[True] * 8)
    assert drafted.phases["prefill"] == 0
    assert drafted.energy_j < 4 * DENSE.step([(1, 1000)] * 8).energy_j


def test_batches_are_padded_to_cuda_graph_sizes() -> None:
    head = DENSE.step([(1, 10)] * 17).components["linear"] / 17  # the head sees requests, not padding: a small part
    padded = [DENSE.step([(1, 10)] * count).components["linear"] for count in (17, 24)]
    assert padded[1] - padded[0] < head
    eager = EnergyModel("llama-3.1-8b", Deployment(enforce_eager=True))
    exact = [eager.step([(1, 10)] * count).components["linear"] for count in (17, 24)]
    assert exact[1] / exact[0] == pytest.approx(24 / 17)


def test_the_host_bounds_steps_without_graphs() -> None:
    """48 layers of experts are launched kernel by kernel beyond the largest graph: the recorded runs took 75-100 ms."""
    step = EXPERTS.step([(600, 0)] + [(1, 500)] * 20)
    assert 0.06 < step.time_s < 0.11
    assert step.components["host_gap"] > 0
    assert EXPERTS.step([(1, 500)] * 20).components["host_gap"] == 0


def test_a_power_limit_slows_and_saves() -> None:
    limited = EnergyModel("llama-3.1-8b", Deployment(power_limit_w=450.0)).step([(8192, 0)])
    free = DENSE.step([(8192, 0)])
    assert limited.power_w <= 450.0
    assert limited.time_s > 1.2 * free.time_s
    assert limited.energy_j < free.energy_j


def test_fewer_bytes_take_fewer_joules() -> None:
    def decode(**given: str) -> tuple[float, float]:
        step = EnergyModel("llama-3.1-8b", Deployment(**given)).step([(1, 4000)] * 16)  # type: ignore[arg-type]
        return step.components["weights"], step.components["kv_cache"]

    plain, fp8, int4 = decode(), decode(quantization="fp8"), decode(quantization="awq")
    assert int4[0] < fp8[0] < plain[0]
    assert fp8[0] > 0.45 * plain[0]  # embedding and head stay as they are
    assert decode(kv_cache_dtype="fp8")[1] == pytest.approx(plain[1] / 2)


def test_tensor_parallel_halves_the_work_of_a_gpu_and_adds_communication() -> None:
    one, two = (EnergyModel("llama-3.1-8b", Deployment(tensor_parallel_size=n)).step([(1, 1000)] * 32) for n in (1, 2))
    assert one.components["communication"] == 0 < two.components["communication"]
    assert two.components["weights"] == pytest.approx(one.components["weights"], rel=0.01)  # summed over GPUs
    assert one.time_s / 2 < two.time_s < one.time_s
    assert two.energy_j > one.energy_j


def test_data_parallel_ranks_share_the_requests() -> None:
    batch = [(1, 1000)] * 32
    replicas = EnergyModel("llama-3.1-8b", Deployment(data_parallel_size=2)).step(batch)
    alone = DENSE.step(batch[:16])
    assert replicas.time_s == pytest.approx(alone.time_s)
    assert replicas.energy_j == pytest.approx(2 * alone.energy_j)


def test_every_flag_widens_the_interval() -> None:
    def width(**given: object) -> tuple[float, frozenset[str]]:
        step = EnergyModel("llama-3.1-8b", Deployment(**given)).step([(1, 1000)] * 8)  # type: ignore[arg-type]
        return step.interval_j[1] / step.energy_j, step.flags

    plain, none = width()
    assert none == frozenset()
    for changes, flag in (
        ({"gpu": "L40S"}, "uncalibrated_gpu"),
        ({"quantization": "awq"}, "uncalibrated_format"),
    ):
        wide, flags = width(**changes)
        assert flag in flags
        assert wide > plain


@pytest.mark.parametrize("gpu", known_gpus())
def test_every_profile_predicts_and_says_where_each_number_is_from(gpu: str) -> None:
    profile = load_profile(gpu)
    for name, coefficient in profile.coefficients.items():
        assert coefficient.source, name
        assert coefficient.unit, name
        assert math.isfinite(coefficient.value), name
        assert 0 <= coefficient.std <= 2, name
    step = EnergyModel("llama-3.1-8b", Deployment(gpu=gpu)).step([(1, 500)] * 16)
    bytes_read = 16e9
    assert bytes_read / profile["memory.bandwidth_bytes_per_s"] < step.time_s < 0.05
    assert profile["power.static_w"] < step.power_w < profile["power.limit_w"]


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_cascade(DENSE.cascade))
    for network in (path, str(path), DENSE.cascade):
        assert EnergyModel(network).step([(1, 100)]).energy_j == DENSE.step([(1, 100)]).energy_j


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ("llama-3.1-9b", {}, "llama-3.1-8b"),
        ("llama-3.1-8b", {"gpu": "H200-SMX"}, r"gpu: unknown value 'H200-SMX' \(did you mean 'H200-SXM'\?\)"),
        ("llama-3.1-8b", {"quantization": "fp9"}, "quantization: unknown value 'fp9'"),
        ("llama-3.1-8b", {"tensor_parallel_size": 3}, "32.*3"),
        ("llama-3.1-8b", {"tensor_parallel_size": 0}, "tensor_parallel_size: 0 is not a positive integer"),
        ("llama-3.1-8b", {"power_limit_w": -5.0}, "power_limit_w: -5.0"),
        ("llama-3.1-8b", {"gpu": "H100-SXM", "power_limit_w": 50.0}, "50.0 W is not what .*132 .* to 700"),
        ("llama-3.1-8b", {"gpu": "H100-SXM", "power_limit_w": 5000.0}, "5000.0 W is not what H100-SXM can be limited"),
        ("llama-3.1-8b", {"power_limit_w": float("nan")}, "power_limit_w: nan W"),
        ("llama-3.1-8b", {"cudagraph_capture_sizes": [0]}, "cudagraph_capture_sizes"),
    ],
)
def test_what_cannot_be_is_refused(config: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(EnergyLensError, match=message):
        EnergyModel(config, Deployment(**given))  # type: ignore[arg-type]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(EnergyLensError, match="requests: the batch is empty"):
        DENSE.step([])
