"""`energylens predict` with a rate or a trace says what `open_serving` and the simulation say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.cli import main
from energylens_vllm.energy.arrivals import read_trace, simulate

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:17:0{i}.5000000,{400 + 100 * i},{5 + i}\n" for i in range(9)
)


def test_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--rate", "5", "--prompt-tokens", "512", "--output-tokens", "256"]
    assert main(["predict", "llama-3.1-8b", *flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = EnergyModel("llama-3.1-8b", Deployment()).open_serving(5, 512, 256)
    assert printed["power_w"] == expected.power_w
    assert printed["ttft_s"]["99"] == expected.ttft_s[99]
    assert main(["predict", "llama-3.1-8b", *flags]) == 0
    text = capsys.readouterr().out
    assert "time to first token" in text
    assert "flags: prefix_hits_assumed" in text


def test_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    assert main(["predict", "llama-3.1-8b", "--trace", str(file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["power_w"] == simulate(EnergyModel("llama-3.1-8b", Deployment()), read_trace(file)).power_w


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--rate", "5"], "--prompt-tokens: it is missing"),
        (["--rate", "-5", "--prompt-tokens", "9", "--output-tokens", "9"], "rate_per_s: -5.0"),
        (["--rate", "1e6", "--prompt-tokens", "9", "--output-tokens", "9"], "accepted: less than"),
        (["--rate", "5", "--concurrency", "3"], "give one of"),
        (["--rate", "5", "--decode", "3"], "not both"),
        (["--trace", "none.csv"], "trace: none.csv: No such file"),
        (["--trace", "none.csv", "--prompt-tokens", "5"], "it has lengths of its own"),
        (["--trace", "none.csv", "--prefix-cache-hit-rate", "2"], "--prefix-cache-hit-rate: 2.0"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "llama-3.1-8b", *flags]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
