"""Bubbles: the closed form against batches that go round a pipeline. Stages together: against each stage alone."""

from __future__ import annotations

import numpy as np
import pytest

from energylens_vllm.einsum import block, build_cascade
from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.energy.batch import Array, Steps, steps_from_arrays, steps_from_requests
from energylens_vllm.energy.model import BLOCK_STEPS
from energylens_vllm.energy.overlap import DualBatch, Overlap
from energylens_vllm.energy.pipeline import longest
from energylens_vllm.energy.precision import format_of, widths
from energylens_vllm.energy.step import Evaluated
from energylens_vllm.hardware import load_profile


def go_round(time_s: Array, weights: Array, stages: int, steps: int = 8000) -> float:
    """Mean seconds between ends of steps, each of which starts when the one `stages` before it has left the last."""
    drawn = np.random.default_rng(0).choice(time_s, steps, p=weights)
    left = np.zeros((steps, stages))
    for i in range(steps):
        ready = left[i - stages, -1] if i >= stages else 0.0
        for stage in range(stages):
            ready = max(ready, left[i - 1, stage] if i else 0.0) + drawn[i]
            left[i, stage] = ready
    return float(left[-1, -1] / steps)


@pytest.mark.parametrize(("stages", "off"), [(2, 0.03), (4, 0.06), (8, 0.13)])
@pytest.mark.parametrize(("chance", "long"), [(0.02, 2.0), (0.1, 10.0), (0.3, 3.0)])
def test_batches_in_flight_wait_for_the_longest(stages: int, off: float, chance: float, long: float) -> None:
    times, weights = np.array([long, 1.0]), np.array([chance, 1 - chance])
    found = longest(times, weights, np.zeros(2, dtype=np.int64), 1, stages)[0]
    assert found == pytest.approx(go_round(times, weights, stages), rel=off)
    assert found == pytest.approx(long - (long - 1) * (1 - chance) ** stages)


def test_loads_are_kept_apart() -> None:
    times, weights = np.array([2.0, 1.0, 5.0, 4.0, 3.0]), np.array([0.5, 0.5, 0.2, 0.2, 0.6])
    found = longest(times, weights, np.array([0, 0, 1, 1, 1]), 2, 2)
    assert found == pytest.approx([1.75, 3 * 0.36 + 4 * (0.64 - 0.36) + 5 * (1 - 0.64)])


def test_steps_alike_make_no_bubbles_and_prompts_do() -> None:
    model = EnergyModel("llama-3.1-70b", Deployment(gpu="H100-SXM", tensor_parallel_size=2, pipeline_parallel_size=4))
    few, many = (model.serving(64, prompt, 400, prefix_cache_hit_rate=0.0) for prompt in (16, 6000))
    assert 0 <= few.bubble_share < 0.05
    assert few.bubble_share < many.bubble_share < 1
    alone = EnergyModel("llama-3.1-70b", Deployment(gpu="H100-SXM", tensor_parallel_size=8))
    assert alone.serving(64, 6000, 400, prefix_cache_hit_rate=0.0).bubble_share == 0


def random_steps(model: EnergyModel, count: int) -> Steps:
    """Decodes, prompts, and both; some without the one or the other."""
    rng = np.random.default_rng(0)
    decodes, prompts = rng.integers(0, 700, count), rng.integers(0, 3, count)
    decodes[::7], prompts[::5] = 0, 0
    sizes = decodes + prompts
    is_decode = np.concatenate([np.arange(size) < decoding for size, decoding in zip(sizes, decodes, strict=True)])
    new = np.where(is_decode, 1, rng.integers(2, 3000, len(is_decode)))
    computed = np.where(is_decode, rng.integers(1, 9000, len(is_decode)), rng.integers(0, 2, len(is_decode)) * 512)
    return steps_from_arrays(new, computed, np.concatenate([[0], np.cumsum(sizes)]), model.masks)


def alone(model: EnergyModel, steps: Steps, overlap: Overlap | DualBatch | None) -> list[Evaluated]:
    """A GPU of each stage, which knows the kernels of that stage alone."""
    deployment = model.deployment
    return [
        model._gpu_step(
            overlap,
            [[kernel for kernel in model.kernels if kernel.stage == stage]],
            model.masks,
            model.profile,
            format_of(model.quantization),
            deployment.capture_sizes,
            deployment.power_limit_w,
            model.async_scheduling,
            widths(deployment.dtype, model.quantization, deployment.kv_cache_dtype).kv_cache,
            model._loads,
            model._exchange,
            deployment.mesh,
        ).evaluate(steps)
        for stage in range(deployment.pipeline_parallel_size)
    ]


@pytest.mark.parametrize(
    ("name", "settings", "overlap"),
    [
        ("llama-3.1-70b", {"tensor_parallel_size": 2, "pipeline_parallel_size": 4}, None),
        ("llama-3.1-70b", {"tensor_parallel_size": 4, "pipeline_parallel_size": 3, "enforce_eager": True}, None),
        ("llama-3.1-70b", {"tensor_parallel_size": 4, "pipeline_parallel_size": 3}, Overlap()),
        ("qwen3-30b-a3b", {"tensor_parallel_size": 2, "pipeline_parallel_size": 5, "async_scheduling": False}, None),
        ("deepseek-v3", {"tensor_parallel_size": 8, "pipeline_parallel_size": 3, "kv_cache_dtype": "fp8"}, None),
        (
            "deepseek-v3",
            {
                "tensor_parallel_size": 2,
                "data_parallel_size": 8,
                "pipeline_parallel_size": 2,
                "enable_expert_parallel": True,
                "all2all_backend": "deepep_high_throughput",
            },
            DualBatch(),
        ),
    ],
)
def test_stages_together_are_as_each_alone(
    name: str, settings: dict[str, object], overlap: Overlap | DualBatch | None
) -> None:
    """Their kernels are evaluated once for all stages, whose layers may differ in number and in kind."""
    model = EnergyModel(name, Deployment(gpu="H200-SXM", **settings), overlap=overlap)  # type: ignore[arg-type]
    steps = random_steps(model, 300)
    found, stages = model.predict(steps), alone(model, steps, overlap)
    gpu_s = np.max([stage.gpu_s[0] for stage in stages], axis=0)
    busy_s = np.maximum(gpu_s, np.max([stage.host_s[0] for stage in stages], axis=0))
    expected = {kind: np.zeros(len(steps)) for kind in found.components}
    prefill_j, gpus = np.zeros(len(steps)), model.deployment.tensor_parallel_size
    for stage in stages:
        for kind, joules in stage.components.items():
            expected[kind] += gpus * joules[0]
            prefill_j += gpus * stage.prefill_share[0] * joules[0]
        expected["static"] += gpus * stage.static_w[0] * gpu_s
        expected["host_gap"] += gpus * stage.static_w[0] * (busy_s + stage.serial_s - gpu_s)
    energy_j = np.sum(list(expected.values()), axis=0)
    busy_j = energy_j - expected["static"] - expected["host_gap"]
    share = np.divide(prefill_j, busy_j, out=np.ones_like(busy_j), where=steps.decode_tokens > 0)
    assert found.time_s == pytest.approx(busy_s + stages[0].serial_s, rel=1e-12)
    assert found.energy_j == pytest.approx(energy_j, rel=1e-12)
    for joules, other_j in (
        (found.phases["prefill"], share * energy_j),
        *((found.components[kind], other_j) for kind, other_j in expected.items()),
    ):
        assert np.max(np.abs(joules - other_j) / energy_j) < 1e-12
    for value, worst, of_stage in (
        (found.clock, np.min, [stage.clock for stage in stages]),
        (found.communication_s, np.max, [stage.communication_s for stage in stages]),
        (found.waiting_s, np.max, [stage.waiting_s for stage in stages]),
    ):
        assert value == pytest.approx(worst(of_stage, axis=0)[0], rel=1e-12)


@pytest.mark.parametrize("pipeline", [1, 4])
def test_many_steps_are_as_few(pipeline: int) -> None:
    """They are evaluated in blocks."""
    deployment = Deployment(gpu="H100-SXM", tensor_parallel_size=2, pipeline_parallel_size=pipeline)
    model = EnergyModel("llama-3.1-70b", deployment)
    few, again = random_steps(model, 99), np.arange(BLOCK_STEPS + 50) % 99
    expected, found = model.predict(few), model.predict(few[again])
    for name in ("time_s", "gpu_s", "host_s", "energy_j", "low_s", "high_s", "low_j", "high_j", "clock", "waste_j"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name)[again], rel=1e-12), name
    for parts, few_parts in ((found.components, expected.components), (found.phases, expected.phases)):
        assert parts.keys() == few_parts.keys()
        for name, joules in parts.items():
            assert joules == pytest.approx(few_parts[name][again], rel=1e-12, abs=1e-12), name
    assert found.flags == expected.flags


def test_workers_of_every_stage_are_processes_of_their_own() -> None:
    """With one GPU a stage the last sends nothing; the engine works beside its worker all the same."""
    requests = [(1, 500)] * 64
    profile = load_profile("H200-SXM")
    alike = profile.with_values({"host.pipeline_s": 0.0}, "workers that exchange nothing")
    hosts = []
    for given, tensor, pipeline in ((alike, 1, 2), (alike, 2, 1), (alike, 1, 1), (profile, 1, 2)):
        deployment = Deployment(gpu="H200-SXM", tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        model = EnergyModel("llama-3.1-8b", deployment, given)
        hosts.append(model.predict(steps_from_requests(requests, model.masks)).host_s[0])
    assert hosts[0] == hosts[1] < hosts[2]
    assert hosts[3] > hosts[0]


def test_stages_alike_exchange_as_unlike_ones_do() -> None:
    """Workers send each other what they have and the sampled tokens, whether or not a network begins and ends."""
    profile = load_profile("H200-SXM").with_values({"host.engine_share": 0.0}, "workers that set the pace")
    silent = profile.with_values({"host.pipeline_s": 0.0}, "workers that exchange nothing")
    layers = build_cascade(
        "layers",
        ranks={"t": "tokens", "d": 64, "f": 256},
        tensors={"quantized": "W", "input": "X"},
        blocks=[block("layer", {"linear": "Y[t,f] = X[t,d] * W[d,f]"}, count=4)],
    )
    for network in (layers, "llama-3.1-8b"):
        for stages, exchanged_s in ((1, 0.0), (2, profile["host.pipeline_s"])):
            models = [EnergyModel(network, Deployment(pipeline_parallel_size=stages), of) for of in (profile, silent)]
            steps = steps_from_requests([(1, 500)] * 64, models[0].masks)
            host_s, without_s = (float(model.predict(steps).host_s[0]) for model in models)
            assert host_s - without_s == pytest.approx(exchanged_s)
