"""Servers of several processes over fake executors: /metrics shows the sums of what each engine executed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from expected import expected
from server import Samples, Server, serving

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.serving.increments import GRID
from energylens_vllm.serving.metrics import MAX_SERIES_PER_ENGINE, METRICS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
RELEASE = version("vllm")
FAKE = "--distributed-executor-backend=fake_executor.FakeExecutor"
LENGTHS = (12, 40, 7, 100, 33, 64)


def executed(folder: Path, engine: int) -> list[tuple[list[tuple[int, int, bool]], int]]:
    """The steps of an engine."""
    return [json.loads(line) for line in (folder / f"{engine}.jsonl").read_text().splitlines()]


def of_engine(shown: Samples, engine: int) -> Samples:
    """The samples of an engine under "name values-of-labels"."""
    found = {}
    for key, value in shown.items():
        name, _, labels = key.partition("{")
        pairs = dict(pair.split("=", 1) for pair in labels.rstrip("}").split(","))
        if pairs.pop("engine") == f'"{engine}"':
            found[" ".join((name, *(text.strip('"') for _, text in sorted(pairs.items()))))] = value
    return found


def check_sums(shown: Samples, folder: Path, engine: int, model: EnergyModel) -> None:
    """What an engine shows are the sums of its executed steps' predictions, to a step of the grid."""
    found = of_engine(shown, engine)
    sums = expected(executed(folder, engine), model)
    assert {name: found[name] for name in sums} == pytest.approx(sums, rel=0, abs=GRID)
    assert not [name for name, value in found.items() if value and ("failures" in name or "unpredicted" in name)]
    assert len(found) <= MAX_SERIES_PER_ENGINE


def num_steps(shown: Samples) -> float:
    """Steps of all engines."""
    return sum(value for name, value in shown.items() if name.startswith("energylens_steps_total"))


def check_with_promtool(server: Server) -> None:
    """promtool has nothing to say of the scrape's part that is ours."""
    promtool = shutil.which("promtool")
    assert promtool is not None
    lines = server.call("/metrics").splitlines(keepends=True)
    ours = "".join(line for line in lines if "energylens_" in line and "_created" not in line)
    assert "energylens_steps_total" in ours
    done = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def _path() -> str:
    """For PYTHONPATH, so that a server finds the fake executor."""
    return os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))


@pytest.fixture(scope="module")
def one(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """One API server, and the folder of its engine's steps; settings from three places."""
    folder = tmp_path_factory.mktemp("one")
    arguments = ["--plugin", "energylens", "--energylens.gpu", "L40S"]
    arguments += ["--additional-config", '{"energylens": {"gpu": "B200-SXM", "report_interval_s": 0.5}}']
    environment = {"PYTHONPATH": _path(), "FAKE_LOG": str(folder), "ENERGYLENS_REPORT_INTERVAL_S": "60"}
    with serving(tiny_model, folder, 18110, FAKE, *arguments, **environment) as server:
        yield server, folder


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """Two API servers before two engines."""
    folder = tmp_path_factory.mktemp("two")
    arguments = ["--plugin=energylens", "--data-parallel-size=2", "--api-server-count=2"]
    environment = {"PYTHONPATH": _path(), "FAKE_LOG": str(folder), "ENERGYLENS_GPU": "H200-SXM"}
    with serving(tiny_model, folder, 18112, FAKE, *arguments, **environment) as server:
        yield server, folder


def test_all_series_are_there_before_the_first_request(one: tuple[Server, Path]) -> None:
    server, _ = one
    shown = of_engine(server.metrics_when(lambda found: any("profile_info" in name for name in found)), 0)
    names = {name.split()[0] for name in shown}
    for metric in METRICS:
        # None of what has yet to be told, as of a GPU, of which there is none here.
        assert metric.name in names or metric.type == "histogram" or not metric.series
    told = {name: value for name, value in shown.items() if value}
    assert told.pop("energylens_predictor_state ready") == 1
    assert sorted(name.split()[0] for name in told) == ["energylens_build_info", "energylens_profile_info"]
    assert "energylens_profile_info bfloat16 L40S 1 None setting 1" in told


def test_one_api_server(one: tuple[Server, Path], tiny_model: Path) -> None:
    server, folder = one
    model = EnergyModel(tiny_model, Deployment(gpu="L40S", enforce_eager=True, vllm_release=RELEASE))
    for _ in range(2):  # the engine is idle in between
        server.complete_all(LENGTHS)
        shown = server.metrics_when(lambda found: num_steps(found) == len(executed(folder, 0)))
        check_sums(shown, folder, 0, model)
    assert of_engine(shown, 0)["energylens_cached_tokens_total"] > 0  # the second time, prompts are in the cache
    assert of_engine(shown, 0)["energylens_flagged_steps_total uncalibrated_gpu"] == num_steps(shown)


def test_a_stream_that_is_given_up(one: tuple[Server, Path], tiny_model: Path) -> None:
    server, folder = one
    before = len(executed(folder, 0))
    body = {"model": "tiny", "prompt": [3] * 50, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with server.open("/v1/completions", body) as stream:
        stream.readline()
    server.complete(20)
    shown = server.metrics_when(lambda found: before < num_steps(found) == len(executed(folder, 0)))
    check_sums(
        shown, folder, 0, EnergyModel(tiny_model, Deployment(gpu="L40S", enforce_eager=True, vllm_release=RELEASE))
    )


@pytest.mark.prometheus
def test_promtool_on_one_api_server(one: tuple[Server, Path]) -> None:
    check_with_promtool(one[0])


def test_two_api_servers_and_data_parallel_engines(two: tuple[Server, Path], tiny_model: Path) -> None:
    server, folder = two
    for _ in range(3):
        server.complete_all(LENGTHS)
    shown = server.metrics_when(lambda found: num_steps(found) == sum(len(executed(folder, i)) for i in (0, 1)))
    model = EnergyModel(tiny_model, Deployment(gpu="H200-SXM", enforce_eager=True, vllm_release=RELEASE))
    for engine in (0, 1):
        assert len(executed(folder, engine)) > 8
        check_sums(shown, folder, engine, model)


@pytest.mark.prometheus
def test_promtool_on_two_api_servers(two: tuple[Server, Path]) -> None:
    check_with_promtool(two[0])
