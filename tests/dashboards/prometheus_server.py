"""Prometheus on loopback, over blocks that are made beforehand."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from simulated import DAY_S, NOW_S

from energylens_vllm.dashboards.boards import DASHBOARDS

ROOT = Path(__file__).parents[2]
RULES = ROOT / "dashboards" / "prometheus" / "energylens.rules.yml"
#: how long the recordings are, and a little less, so that each query sees only times that were scraped
PLAYED_S = 210
STEP_S = 10

Series = dict[str, str]
Points = list[tuple[Series, list[float]]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def ask(self, path: str, **parameters: object) -> object:
        """The `data` of an API call. Raises AssertionError with Prometheus' own text."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def at(self, expr: str, time_s: float = NOW_S) -> Points:
        """Each series' value at one time."""
        data = self.ask("query", query=expr, time=time_s)
        if data["resultType"] == "scalar":
            return [({}, [float(data["result"][1])])]
        return [(series["metric"], [float(series["value"][1])]) for series in data["result"]]

    def over(self, expr: str, seconds: float = PLAYED_S - 60) -> Points:
        """Each series' values up to the end of the recording."""
        data = self.ask("query_range", query=expr, start=NOW_S - seconds, end=NOW_S, step=STEP_S)
        return [(series["metric"], [float(value) for _, value in series["values"]]) for series in data["result"]]


def finite(points: Points) -> list[float]:
    """All values that are numbers."""
    return [value for _, values in points for value in values if math.isfinite(value)]


def create_blocks(open_metrics: str, data: Path) -> None:
    text = data.with_suffix(".om")
    text.write_text(open_metrics)
    _run("promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(data))


def backfill_rules(server: Prometheus, data: Path) -> None:
    """Evaluate the recording rules on both days."""
    for end_s in (NOW_S - DAY_S, NOW_S):
        _run(
            "promtool", "tsdb", "create-blocks-from", "rules", f"--start={end_s - PLAYED_S}", f"--end={end_s}",
            "--eval-interval=30s", f"--url={server.url}", f"--output-dir={data}", str(RULES),
        )  # fmt: skip


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def serving(data: Path) -> Iterator[Prometheus]:
    """Prometheus over `data`, scraping nothing."""
    config, port = data.with_suffix(".yml"), free_port()
    config.write_text("{}\n")
    command = [
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}", "--log.level=error",
        "--storage.tsdb.retention.time=100y", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        for _ in range(200):
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            try:
                urllib.request.urlopen(f"{server.url}/-/ready", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        else:
            raise AssertionError("Prometheus does not answer")
        yield server
    finally:
        process.terminate()
        process.wait(timeout=20)


def filled_in(expr: str, job: str = ".*", model_name: str = ".*") -> str:
    """With variables as Grafana would put them in."""
    values = {"job": job, "model_name": model_name, "instance": ".*", "engine": ".*"}
    values |= {"router": job, "__rate_interval": "1m", "__range": f"{PLAYED_S}s"}
    values |= {name: default for board in DASHBOARDS for name, _, default in board.numbers}
    filled = re.sub(r"\$(\w+)", lambda found: values[found[1]], expr)
    assert "$" not in filled
    return filled
