"""`energylens predict` says what `EnergyModel.step` says."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.cli import _parser, main


def predict(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["predict", "llama-3.1-8b", *arguments, "--json"]) == 0
    step: dict[str, object] = json.loads(capsys.readouterr().out)
    return step


@pytest.mark.parametrize(
    ("arguments", "batch"),
    [
        (["--decode", "64", "--context", "1000"], [(1, 1000)] * 64),
        (["--prefill", "8192"], [(8192, 0)]),
        (["--decode", "2", "--context", "0", "--prefill", "100", "200"], [(1, 0), (1, 0), (100, 0), (200, 0)]),
        (["--requests", "[[1, 100], [512, 2048]]"], [(1, 100), (512, 2048)]),
    ],
)
def test_the_batch_is_the_one_described(
    arguments: list[str], batch: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = EnergyModel("llama-3.1-8b", Deployment()).step(batch)
    step = predict(capsys, *arguments)
    assert (step["time_s"], step["energy_j"], step["power_w"]) == (expected.time_s, expected.energy_j, expected.power_w)
    assert step["components_j"] == pytest.approx(expected.components)
    assert step["phases_j"] == pytest.approx(expected.phases)
    assert step["interval_j"] == pytest.approx(expected.interval_j)
    assert step["flags"] == sorted(expected.flags)


def test_every_field_of_a_deployment_has_a_flag_and_its_default() -> None:
    args = _parser("predict").parse_args(["predict", "llama-3.1-8b"])
    assert {field.name: getattr(args, field.name) for field in fields(Deployment)} == {
        field.name: field.default for field in fields(Deployment)
    }


def test_deployment_flags_reach_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    deployment = Deployment(gpu="H100-SXM", tensor_parallel_size=2, quantization="fp8", enforce_eager=True)
    expected = EnergyModel("llama-3.1-8b", deployment).step([(1, 1000)] * 8)
    flags = ["--gpu", "H100-SXM", "-tp", "2", "--quantization", "fp8", "--enforce-eager"]
    assert predict(capsys, "--decode", "8", *flags)["energy_j"] == expected.energy_j


def test_the_table_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", "llama-3.1-8b", "--decode", "64", "--prefill", "512"])
    text = capsys.readouterr().out
    shares = [float(line.split()[-1].rstrip("%")) for line in text.splitlines() if line.endswith("%")]
    assert sum(shares) == pytest.approx(200, abs=0.6)  # once by component, once by phase


def test_a_load_is_what_the_model_serves(capsys: pytest.CaptureFixture[str]) -> None:
    expected = EnergyModel("llama-3.1-8b", Deployment()).serving(64, 512, 256, prefix_cache_hit_rate=0.0)
    flags = ["--concurrency", "64", "--prompt-tokens", "512", "--output-tokens", "256"]
    load = predict(capsys, *flags, "--prefix-cache-hit-rate", "0")
    assert load == asdict(expected) | {"interval_j": list(expected.interval_j), "flags": sorted(expected.flags)}
    assert main(["predict", "llama-3.1-8b", *flags]) == 0
    assert "flags: prefix_hits_assumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "batch: it is empty"),
        (["--decode", "-1"], "--decode: -1 is too few; accepted: 0 or more"),
        (["--decode", "1", "--context", "-5"], "--context: -5 is too few; accepted: 0 or more"),
        (["--requests", "[[1, 2]]", "--decode", "1"], "--requests: give either it or"),
        (["--requests", "[[1, 2"], "is not JSON"),
        (["--requests", "[[1, 2, 3]]"], "accepted: [[new, computed], ...]"),
        (["--requests", "[[0, 2]]"], "[0, 2]; accepted: 1 or more new"),
        (["--requests", "[[1, -2]]"], "[1, -2]; accepted: 1 or more new, 0 or more computed"),
        (["--requests", "[]"], "--requests: it is empty"),
        (["--prefill", "5", "0"], "--prefill: 0 is too few; accepted: 1 or more"),
        (["--concurrency", "8"], "--prompt-tokens: it is missing"),
        (["--concurrency", "8", "--decode", "2"], "not both"),
        (["--concurrency", "-8", "--prompt-tokens", "9", "--output-tokens", "9"], "concurrency: -8.0"),
    ],
)
def test_bad_batches_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "llama-3.1-8b", *arguments]) == 2
    assert message in capsys.readouterr().err
