"""`energylens compare`: what fusing saves, worked out by hand, and input that makes no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.cli import main
from energylens_vllm.einsum import dump_cascade, fuse

MLP = ["--fuse", "layer.mlp=gate_up+act+down"]


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["compare", "llama-3.1-8b", *arguments, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_fusing_saves_what_the_kernels_handed_to_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, *MLP, "--prefill", "4096")
    kernels = found["kernels"]
    assert isinstance(kernels, list)
    assert [each["kernel"] for each in kernels] == ["layer.gate_up", "layer.act", "layer.down", "layer.mlp"]
    moved = sum(each["bytes_before"] - each["bytes_after"] for each in kernels)
    # Gate and up (2 x 14336) and the activation (14336): each written once and read once, of 16 bits, in 32 layers.
    assert moved == 32 * 4096 * (2 * 14336 + 14336) * 2 * 2
    weights = 32 * 3 * 4096 * 14336 * 2
    assert kernels[3]["bytes_after"] == weights + 32 * 4096 * (4096 + 4096) * 2


def test_the_step_is_what_the_models_predict(capsys: pytest.CaptureFixture[str]) -> None:
    deployment = Deployment(gpu="H100-SXM", tensor_parallel_size=2, quantization="fp8")
    first = EnergyModel("llama-3.1-8b", deployment)
    second = EnergyModel(fuse(first.cascade, {"layer.mlp": ["gate_up", "act", "down"]}), deployment)
    batch = [(1, 1000)] * 64
    found = compared(capsys, *MLP, "--decode", "64", "--gpu", "H100-SXM", "-tp", "2", "-q", "fp8")
    assert found["saved_j"] == pytest.approx(first.step(batch).energy_j - second.step(batch).energy_j)
    assert found["saved_s"] == pytest.approx(first.step(batch).time_s - second.step(batch).time_s)


def test_a_fused_network_takes_less(capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(capsys, "--fuse", "layer.mlp=gate_up+act", "--decode", "256")["saved_j"] > 0  # type: ignore[operator]
    assert compared(capsys, "--unfuse", "--decode", "256")["saved_j"] < 0  # type: ignore[operator]


@pytest.mark.parametrize("batch", [["--prefill", "4096"], ["--decode", "256"]])
def test_fused_gemms_of_unlike_shapes_take_no_longer(batch: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Gate and up are 4,096 deep, down 14,336: together the work of the two, without what they handed on."""
    found = compared(capsys, *MLP, *batch)
    assert found["saved_s"] > 0  # type: ignore[operator]
    assert found["saved_j"] > 0  # type: ignore[operator]


def test_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = EnergyModel("llama-3.1-8b").cascade
    for name, cascade in (("a", plain), ("b", fuse(plain, {"layer.mlp": ["gate_up", "act"]}))):
        (tmp_path / f"{name}.yaml").write_text(dump_cascade(cascade))
    assert main(["compare", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--prefill", "512"]) == 0
    text = capsys.readouterr().out
    assert "layer.mlp" in text
    assert "together" in text
    assert main(["compare", str(tmp_path / "a.yaml"), str(tmp_path / "a.yaml"), "--prefill", "512"]) == 0
    assert capsys.readouterr().out == "no kernel differs\n"


def test_a_quantized_checkpoint_stays_quantized(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "qwen3-8b-fp8", *MLP, "--decode", "1", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    weights = 36 * 2 * 4096 * 12288
    assert kernels[0]["bytes_before"] == pytest.approx(weights, rel=0.01), "one byte an element"


def test_a_cascade_is_taken_in_the_format_of_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fused.yaml"
    file.write_text(dump_cascade(fuse(EnergyModel("qwen3-8b-fp8").cascade, {"layer.mlp": ["gate_up", "act", "down"]})))
    printed = []
    for other in ([str(file)], MLP):
        assert main(["compare", "qwen3-8b-fp8", *other, "--decode", "8", "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]


def test_checkpoints_in_two_formats_are_not_called_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "qwen3-8b-fp8", "qwen3-8b", "--decode", "8"]) == 2
    said = capsys.readouterr().err
    assert "qwen3-8b-fp8 is stored in fp8_per_block, qwen3-8b in bfloat16" in said
    assert main(["compare", "qwen3-8b-fp8", "qwen3-8b", "--decode", "8", "-q", "fp8"]) == 0
    assert capsys.readouterr().out == "no kernel differs\n"


def test_requests_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    by_flags = compared(capsys, *MLP, "--decode", "2", "--context", "100", "--prefill", "512")
    assert compared(capsys, *MLP, "--requests", "[[1, 100], [1, 100], [512, 0]]") == by_flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of OTHER, --fuse and --unfuse"),
        ([*MLP, "--unfuse"], "give one of OTHER"),
        (["--fuse", "layer.mlp"], "--fuse: 'layer.mlp'; accepted: BLOCK.NAME=A+B"),
        (["--fuse", "layer.mlp=gate_up+"], "--fuse: 'layer.mlp=gate_up+'"),
        (["--fuse", "layer.mlp=gate+act"], "unknown value 'gate'"),
        (["--fuse", "layer.mlp=gate_up+down"], "are not neighbours"),
        (["--fuse", "layr.mlp=gate_up+act"], "did you mean 'layer'"),
        (["no-such.yaml"], "no-such.yaml"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "llama-3.1-8b", *arguments, "--decode", "1"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_an_empty_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "llama-3.1-8b", *MLP]) == 2
    assert "batch: it is empty" in capsys.readouterr().err
