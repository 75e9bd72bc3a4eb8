"""Bad input through the real command: one line on stderr that names it, exit status 2, nothing on stdout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from energylens_vllm.architectures import load_config

ENERGYLENS = Path(sys.executable).with_name("energylens")
RECORDING = Path(__file__).parents[1] / "data" / "h200_vllm" / "llama8b_steps.npz"


def refused(*arguments: str | Path) -> str:
    """The one line with which `energylens` refuses the arguments."""
    result = subprocess.run([ENERGYLENS, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 500, "more than a person reads"
    return result.stderr


def config_file(folder: Path, **changes: object) -> Path:
    """The config of a known model with some fields changed, or left out where the change is None."""
    config = {name: value for name, value in {**load_config("llama-3.1-8b"), **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize(
    "command", [["predict", "{config}", "--decode", "1"], ["replay", "--config", "{config}", RECORDING]]
)
def test_a_config_with_a_missing_field(command: list[str | Path], field: str, tmp_path: Path) -> None:
    config = str(config_file(tmp_path, **{field: None}))
    message = refused(*(config if word == "{config}" else word for word in command))
    assert f"field '{field}' is missing" in message
    assert "'llama'" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -4096}, "'hidden_size': -4096"),
        ({"num_hidden_layers": "32"}, "'num_hidden_layers': '32'"),
        ({"model_type": "lama", "architectures": ["LamaForCausalLM"]}, "lama"),
    ],
)
def test_a_config_with_a_wrong_field(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    assert message in refused("predict", config_file(tmp_path, **changes), "--decode", "1")


def test_a_config_that_was_cut_short(tmp_path: Path) -> None:
    config = config_file(tmp_path)
    config.write_text(config.read_text()[:100])
    assert f"{str(config)!r}: not JSON" in refused("predict", config, "--decode", "1")


def test_no_such_model() -> None:
    assert "did you mean 'llama-3.1-8b'" in refused("predict", "lama-3.1-8b", "--decode", "1")
    assert "no-such/config.json" in refused("predict", "no-such/config.json", "--decode", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode", "-1"], "--decode: -1"),
        (["--decode", "1", "--context", "-7"], "--context: -7"),
        (["--prefill", "512", "-9"], "--prefill: -9"),
        (["--requests", "[[1, 5], [-2, 0]]"], "[-2, 0]"),
        (["--concurrency", "8", "--prompt-tokens", "-5", "--output-tokens", "9"], "prompt_tokens: -5"),
    ],
)
def test_a_negative_token_count(arguments: list[str], message: str) -> None:
    assert message in refused("predict", "llama-3.1-8b", *arguments)


def test_a_negative_token_count_in_a_recording(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text('{"requests": [[1, 5]]}\n{"requests": [[1, 6], [-3, 0]]}\n')
    message = refused("replay", "--config", "llama-3.1-8b", file)
    assert f"{file}: a request of step 1 has -3 new tokens" in message


@pytest.mark.parametrize(
    "command", [["predict", "llama-3.1-8b", "--decode", "1"], ["replay", "--config", "llama-3.1-8b", RECORDING]]
)
def test_a_gpu_name_with_a_typo(command: list[str | Path]) -> None:
    message = refused(*command, "--gpu", "H20-SXM")
    assert "'H20-SXM' (did you mean 'H200-SXM'?)" in message


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_recorded_steps_that_were_cut_short(kept: float, tmp_path: Path) -> None:
    file = tmp_path / "steps.npz"
    whole = RECORDING.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    assert f"{file}: cut short or damaged" in refused("replay", "--config", "llama-3.1-8b", "--gpu", "H200-SXM", file)


def test_a_json_line_that_was_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text('{"requests": [[1, 5]]}\n{"requests": [[1, 6], [1,')
    assert f"{file}, line 2: not a step" in refused("replay", "--config", "llama-3.1-8b", file)


def test_a_cascade_that_was_cut_short(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "einsum" / "cascades" / "llama-3.1-8b.yaml"
    file = tmp_path / "cascade.yaml"
    file.write_text(source.read_text()[:-300])
    refused("predict", file, "--decode", "1")


def test_a_profile_that_lacks_a_coefficient(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    profile = json.loads(subprocess.check_output([ENERGYLENS, "gpus", "H200-SXM", "--json"]))
    del profile["coefficients"]["memory.bandwidth_bytes_per_s"]
    file.write_text(json.dumps(profile))
    assert "memory.bandwidth_bytes_per_s" in refused("predict", "llama-3.1-8b", "--decode", "1", "--gpu", file)


def test_what_is_refused_leaves_files_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "steps.npz"
    shutil.copy(RECORDING, file)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused("replay", "--config", "llama-3.1-8b", "--gpu", "H201-SXM", file)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
