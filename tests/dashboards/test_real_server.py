"""`energylens monitor` beside a real vLLM on a CPU: panels show what it exports, and no alert is about to fire."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_server import Prometheus, filled_in, finite, free_port

from energylens_vllm.dashboards.boards import DASHBOARDS
from energylens_vllm.dashboards.panel import Panel
from energylens_vllm.dashboards.rules import ALERTS

pytestmark = [pytest.mark.nightly, pytest.mark.vllm, pytest.mark.prometheus]

#: There are no GPUs, so nothing is measured, compared or learnt; the model has no experts, and nobody routes to it.
ABSENT = (
    "energylens_gpu_", "energylens_compared_", "energylens_absolute_error_", "energylens_relative_error",
    "energylens_learning_factor", "energylens_expert_", "energylens_routing_",
)  # fmt: skip
SETTINGS = '{"attribution": true, "routing": true, "report_interval_s": 1.0}'


@contextmanager
def monitored(address: str) -> Iterator[Prometheus]:
    port = free_port()
    command = [sys.executable, "-m", "energylens_vllm.cli", "monitor", address, f"--port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "Prometheus" in process.stdout.readline()
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(20)


def is_absent(panel: Panel) -> bool:
    return any(name.startswith(ABSENT) for name in panel.metrics)


def test_panels_show_a_real_server(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "hooks"))
    from server import serving

    port = free_port()
    arguments = ("--plugin=energylens", f"--energylens={SETTINGS}")
    with serving(tiny_model, tmp_path, port, *arguments) as vllm, monitored(f"127.0.0.1:{port}") as server:
        for _ in range(6):
            vllm.complete_all([50, 100, 150], max_tokens=40)
            time.sleep(4.0)
        now_s = time.time()
        shown = [panel for board in DASHBOARDS for panel in board.panels if not is_absent(panel)]
        assert len(shown) > 35
        for panel in shown:
            for query in panel.queries:
                points = server.at(filled_in(query.expr), now_s)
                assert points, f"{panel.title}: {query.expr}"
                assert finite(points), f"{panel.title}: {query.expr}"
        for alert in ALERTS:
            assert server.at(alert.expr, now_s) == [], alert.name
