"""What all subcommands share: registration, help, errors, exit status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import energylens_vllm
from energylens_vllm import cli


def energylens(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys; from energylens_vllm.cli import main; status = main({list(arguments)!r}); {code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_every_module_is_registered_and_every_registration_has_a_module() -> None:
    shared = {"__init__", "__main__", "deployment", "table"}
    modules = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - shared
    assert modules == set(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_complete(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    parser = cli._parser(command)._subparsers._group_actions[0].choices[command]  # type: ignore[union-attr,index]
    assert parser.description
    undocumented = [action.dest for action in parser._actions if not action.help]
    assert undocumented == []
    assert command in capsys.readouterr().out


def test_general_help_names_every_command_and_imports_none() -> None:
    result = energylens("--help")
    assert result.returncode == 0
    assert all(f"    {command} " in result.stdout for command in cli.COMMANDS)
    loaded = subprocess.check_output(
        [sys.executable, "-X", "importtime", "-m", "energylens_vllm.cli", "--help"], stderr=subprocess.STDOUT, text=True
    )
    assert "| numpy" not in loaded.replace("|   ", "| ")
    assert "energylens_vllm.cli.predict" not in loaded


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"energylens-vllm {energylens_vllm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predictt", "llama-3.1-8b"], "invalid choice: 'predictt'"),
        ([], "required: COMMAND"),
        (["predict"], "required: MODEL"),
        (["predict", "llama-3.1-8b", "--tensor-parallel", "2"], "unrecognized arguments: --tensor-parallel 2"),
    ],
)
def test_a_wrong_command_line_is_refused_by_argparse(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpus", "H20-SXM"], "did you mean 'H200-SXM'"),
        (["predict", "llama-3.1-8b", "--decode", "1", "--gpu", "H20-SXM"], "did you mean 'H200-SXM'"),
        (["predict", "llama-3.1-8b", "--decode", "1", "-tp", "0"], "tensor_parallel_size: 0"),
        (["predict", "llama-3.1-8b"], "batch: it is empty"),
        (["replay", "--config", "llama-3.1-8b", "nowhere.npz"], "no file 'nowhere.npz'"),
    ],
)
def test_bad_input_is_one_line_on_stderr(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("energylens: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    pipe = f"{sys.executable} -m energylens_vllm.cli gpus | true"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", pipe], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
