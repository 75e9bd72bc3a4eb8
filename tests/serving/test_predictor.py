"""The step model behind the plugin: all steps of a report at once are what each would be alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.architectures import load_config
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hardware import load_profile
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.metrics import COMPONENTS, FLAGS, PHASES
from energylens_vllm.serving.predictor import Rows, make_predictor
from energylens_vllm.serving.start import Engine, gpu_of, start_predictor

DEPLOYMENT: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "enable_expert_parallel": False,
    "dtype": "bfloat16",
}
Requests = Sequence[tuple[int, int, bool]]  # new tokens, computed tokens, decodes

DECODE: Requests = [(1, 100 + 31 * i, True) for i in range(40)]
STEPS: list[Requests] = [
    DECODE,
    [(500, 0, False)],
    [(300, 200, False), (1, 900, True), (1, 8, True)],
    [(1, 511, False)],  # the last token of a prompt
    [(4, 1000, True), (1, 70, True)],  # drafts
    DECODE[:1],
]


def batch(requests: Requests, packed: bool = False) -> Batch:
    new, computed, decode = (list(column) for column in zip(*requests, strict=True))
    return Batch(
        request_ids=[str(i) for i in range(len(new))],
        new_tokens=new,
        computed_tokens=np.array(computed) if packed else computed,
        is_decode=decode,
        num_tokens=sum(new),
        num_decode_tokens=sum(count for count, decodes in zip(new, decode, strict=True) if decodes),
    )


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b", "gemma-2-9b", "gpt-oss-20b"])
@pytest.mark.parametrize("packed", [False, True])
def test_steps_together_are_as_each_alone(name: str, packed: bool) -> None:
    model = EnergyModel(name, Deployment(gpu="H200-SXM"))
    predictions = make_predictor(load_config(name), DEPLOYMENT | {"gpu": "H200-SXM"}).predict(
        [batch(requests, packed) for requests in STEPS]
    )
    for i, requests in enumerate(STEPS):
        alone = model.step([(new, computed) for new, computed, _ in requests], [decodes for *_, decodes in requests])
        assert predictions.energy_j[i] == pytest.approx(alone.energy_j, rel=1e-12)
        assert predictions.time_s[i] == pytest.approx(alone.time_s, rel=1e-12)
        for component in COMPONENTS:
            expected = alone.components.get(component, 0.0)
            assert predictions.components[component][i] == pytest.approx(expected, rel=1e-12, abs=1e-18)
        for phase in PHASES:
            assert predictions.phases[phase][i] == pytest.approx(alone.phases[phase], rel=1e-9, abs=1e-12)
        assert predictions.low_j[i] < alone.energy_j < predictions.high_j[i]
    assert set(predictions.components) == set(COMPONENTS)
    together = np.sum([predictions.components[name] for name in COMPONENTS], axis=0)
    assert together == pytest.approx(predictions.energy_j, rel=1e-12)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-2-9b", "llama-4-scout"])
def test_decode_steps_among_themselves_and_among_others(name: str) -> None:
    predictor = make_predictor(load_config(name), DEPLOYMENT)
    decodes = [[(1, 1000 * i + 37 * j, True) for j in range(1, 30 + i)] for i in range(12)]
    among_themselves = predictor.predict([batch(requests) for requests in decodes])
    among_others = predictor.predict([batch(requests) for requests in [*decodes, [(500, 0, False)]]])
    assert among_themselves.energy_j == pytest.approx(among_others.energy_j[:-1], rel=1e-12)
    assert among_themselves.phases["decode"] == pytest.approx(among_others.phases["decode"][:-1], rel=1e-12)
    assert not among_themselves.phases["prefill"].any()


def test_a_data_parallel_engine_predicts_its_own_requests_on_its_own_gpus() -> None:
    dense = [make_predictor(load_config("llama-3.1-8b"), DEPLOYMENT | {"data_parallel_size": n}) for n in (1, 4)]
    one, four = (predictor.predict([batch(DECODE)]) for predictor in dense)
    assert four.energy_j == pytest.approx(one.energy_j)
    assert "data_parallel_assumed_even" not in four.flags


def test_data_parallel_ranks_that_share_experts_are_taken_to_be_alike() -> None:
    config = load_config("qwen3-30b-a3b")
    options = {"data_parallel_size": 4, "enable_expert_parallel": True}
    predictions = make_predictor(config, DEPLOYMENT | options).predict([batch(DECODE)])
    whole = EnergyModel(config, Deployment(**(DEPLOYMENT | options)))
    deployment = whole.step([(new, computed) for new, computed, _ in DECODE] * 4)
    assert "data_parallel_assumed_even" in predictions.flags
    assert 4 * predictions.energy_j[0] == pytest.approx(deployment.energy_j, rel=1e-9)
    assert predictions.time_s[0] == pytest.approx(deployment.time_s, rel=1e-9)


def test_flags_of_the_model_have_names_of_their_own() -> None:
    for gpu in ("H200-SXM", "L40S"):
        for name, quantization in (("deepseek-v3", None), ("llama-3.1-8b", "awq"), ("gpt-oss-20b", None)):
            options = {"gpu": gpu, "quantization": quantization, "data_parallel_size": 2}
            flags = make_predictor(load_config(name), DEPLOYMENT | options).predict([batch(DECODE)]).flags
            assert flags <= set(FLAGS)


def test_lists_of_other_lengths_are_refused() -> None:
    wrong = batch(DECODE)
    wrong.computed_tokens = [1, 2]
    with pytest.raises(EnergyLensError, match="batches: 41 requests but 3 counts of computed tokens"):
        Rows.of([wrong, batch(DECODE[:1])])


def engine(config: dict[str, Any], **deployment: Any) -> Engine:
    return Engine(config, DEPLOYMENT | deployment, device_name="NVIDIA H200", quantization=None)


def test_what_is_predicted_for() -> None:
    started = start_predictor(engine(load_config("llama-3.1-8b")))
    assert (started.state, started.problem, started.flags) == ("ready", "", frozenset())
    assert (started.info["gpu"], started.info["source"]) == ("H200-SXM", "detected")
    assert start_predictor(engine(load_config("llama-3.1-8b")), "L40S").info["source"] == "setting"


@pytest.mark.parametrize(
    ("config", "deployment", "gpu", "problem"),
    [
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, {}, None, "mamba"),
        ({"model_type": "llama"}, {}, None, "is missing"),
        (None, {"kv_cache_dtype": "nvfp4"}, None, "nvfp4"),
        (None, {"tensor_parallel_size": 7}, None, "7"),
        (None, {}, "H2000-SXM", "did you mean 'H200-SXM'?"),
        (None, {}, "/nowhere/profile.json", "/nowhere/profile.json"),
    ],
)
def test_a_model_that_cannot_be_predicted(
    config: dict[str, Any] | None, deployment: dict[str, Any], gpu: str | None, problem: str
) -> None:
    started = start_predictor(engine(config or load_config("llama-3.1-8b"), **deployment), gpu)
    assert started.predictor is None
    assert started.state == "model_unknown"
    assert problem in started.problem


def test_a_profile_that_lacks_what_the_model_needs(tmp_path: Path) -> None:
    profile = load_profile("H200-SXM").to_json()
    del profile["coefficients"]["attention.prefill.launch_s"]
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    started = start_predictor(engine(load_config("llama-3.1-8b")), str(tmp_path / "profile.json"))
    assert started.state == "model_unknown"
    assert "'attention.prefill.launch_s'" in started.problem


@pytest.mark.parametrize(
    ("product", "gpu"),
    [
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM-80GB"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA B200", "B200-SXM"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("", None),
    ],
)
def test_products(product: str, gpu: str | None) -> None:
    assert gpu_of(product) == gpu
