"""The wheel, the sdist and an editable install all give the same package, with hooks/ inside and nothing beside it."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP_LEVEL = ("hooks", "dashboards", "tests", "benchmarks", "tools")

PROBE = f"""
import importlib.metadata, importlib.util, json
import energylens_vllm, energylens_vllm.dashboards, energylens_vllm.hooks.vllm
from importlib.resources import files
distribution = importlib.metadata.distribution("energylens-vllm")
print(json.dumps({{
    "package": energylens_vllm.__file__,
    "hooks": energylens_vllm.hooks.vllm.__file__,
    "top_level": [name for name in {TOP_LEVEL} if importlib.util.find_spec(name)],
    "typed": files("energylens_vllm").joinpath("py.typed").is_file(),
    "profiles": [path.name for path in files("energylens_vllm.hardware").joinpath("profiles").iterdir()],
    "catalog": [path.name for path in files("energylens_vllm.architectures").joinpath("catalog").iterdir()],
    "entry_points": {{f"{{point.group}} {{point.name}}": point.value for point in distribution.entry_points}},
}}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks or would track: what a user clones."""
    folder = tmp_path_factory.mktemp("source") / "energylens-vllm"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=source)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment without this project, but with the dependencies of the one that runs the tests."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not followed
    return tmp_path / "venv"


@pytest.mark.parametrize("form", ["wheel", "sdist", "editable"])
def test_every_form_installs_the_same_package(
    form: str, source: Path, dist: Path, environment: Path, tmp_path: Path
) -> None:
    what = {"wheel": [next(dist.glob("*.whl"))], "sdist": [next(dist.glob("*.tar.gz"))], "editable": ["-e", source]}
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, *what[form], cwd=tmp_path)
    home = source if form == "editable" else environment

    found = json.loads(run(python, "-c", PROBE, cwd=tmp_path))

    assert Path(found["package"]).is_relative_to(home)
    assert Path(found["hooks"]).is_relative_to(home)
    assert found["top_level"] == []
    assert found["typed"]
    assert "H200-SXM.json" in found["profiles"]
    assert found["catalog"]
    assert found["entry_points"]["vllm.general_plugins energylens"] == "energylens_vllm.hooks.vllm:register"
    assert "predict" in run(environment / "bin" / "energylens", "--help", cwd=tmp_path)
    predict = ["predict", "llama-3.1-8b", "--gpu", "H200-SXM", "--decode", "8", "--json"]
    step = run(environment / "bin" / "energylens", *predict, cwd=tmp_path)
    assert json.loads(step)["energy_j"] > 0


def test_the_wheel_holds_every_module_and_nothing_else_at_the_top(dist: Path, source: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"energylens_vllm"}
    modules = {str(path.relative_to(source)) for path in source.glob("energylens_vllm/**/*.py")} | {
        f"energylens_vllm/{path.relative_to(source)}"
        for folder in ("hooks", "dashboards")
        for path in source.glob(f"{folder}/**/*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules


def test_vllm_is_an_extra() -> None:
    requirements = importlib.metadata.requires("energylens-vllm") or []
    assert {line.split(";")[0].strip() for line in requirements if "extra ==" not in line} == {
        "numpy>=1.26", "PyYAML>=6.0", "prometheus_client>=0.20", "nvidia-ml-py>=12.560",
    }  # fmt: skip
    assert any(line.startswith("vllm") and 'extra == "vllm"' in line for line in requirements)
