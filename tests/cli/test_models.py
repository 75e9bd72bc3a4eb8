"""`energylens models`."""

from __future__ import annotations

import json

import pytest

from energylens_vllm import cli
from energylens_vllm.architectures import known_models


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["models", *arguments]) == 0
    return capsys.readouterr().out


def test_every_model_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    header, *lines = run(capsys).splitlines()
    assert header.split() == ["model", "attention", "weights", "parameters", "active"]
    assert [line.split()[0] for line in lines] == known_models()
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("llama-3.1-8b", ["32/8 heads, full", "16 bits", "8.03B", "8.03B"]),
        ("mistral-7b-v0.1", ["32/8 heads, window 4096", "16 bits", "7.24B", "7.24B"]),
        ("gpt-oss-20b", ["64/8 heads, 12 window 128, 12 full", "mxfp4", "20.9B", "4.19B"]),
        ("deepseek-v3", ["128 heads on latents, full", "fp8_per_block", "671B", "37.6B"]),
        ("llama-4-scout", ["40/8 heads, 36 chunk 8192, 12 full", "16 bits", "108B", "17.2B"]),
        ("kimi-k2", ["64 heads on latents, full", "fp8_per_block", "1026B", "32.9B"]),
    ],
)
def test_cells(capsys: pytest.CaptureFixture[str], name: str, cells: list[str]) -> None:
    line = next(line for line in run(capsys).splitlines() if line.startswith(f"{name} "))
    position = 0
    for cell in cells:
        position = line.index(cell, position) + len(cell)


def test_ids(capsys: pytest.CaptureFixture[str]) -> None:
    line = next(line for line in run(capsys, "--ids").splitlines() if line.startswith("llama-3.1-8b "))
    assert "meta-llama/Llama-3.1-8B, meta-llama/Llama-3.1-8B-Instruct" in line


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    models = {model["name"]: model for model in json.loads(run(capsys, "--json"))}
    assert list(models) == known_models()
    assert models["mixtral-8x7b"] == {
        "name": "mixtral-8x7b",
        "hub_ids": ["mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"],
        "parameters": 46_702_792_704,
        "active_parameters": 12_879_925_248,
        "attention": "32/8 heads, full",
        "quantization": None,
    }
