"""What routers are told by real servers over fake executors: from the start, under load, and while idle."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from server import Samples, Server, serving

pytestmark = [pytest.mark.vllm, pytest.mark.nightly, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
FAKE = "--distributed-executor-backend=fake_executor.FakeExecutor"
SNAPSHOT = 'energylens_snapshot_timestamp_seconds{engine="0"}'


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Steps take 20 ms; the cache has room for 64k tokens."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))
    arguments = ["--plugin=energylens", "--energylens.routing", "true", FAKE]
    folder = tmp_path_factory.mktemp("live")
    with serving(tiny_model, folder, 8889, *arguments, PYTHONPATH=path, FAKE_STEP_S="0.02") as server:
        yield server


def gauges(shown: Samples) -> Samples:
    """By short names."""
    return {
        re.sub(r'engine="0",?', "", name.removeprefix("energylens_")).replace("{}", ""): value
        for name, value in shown.items()
    }


def test_an_idle_engine_is_seen_to_live(server: Server) -> None:
    shown = gauges(server.metrics_when(lambda found: SNAPSHOT in found))
    assert shown["held_requests"] == shown["waiting_tokens"] == shown["kv_used_tokens"] == 0
    assert shown["kv_capacity_tokens"] == 4096 * 16
    assert shown["marginal_energy_joules"] > 0
    assert 0 < shown['slo_headroom_ratio{target="tpot"}'] < 1
    assert any(name.startswith("replica_info{") and 'max_num_seqs="' in name for name in shown)
    assert abs(shown["snapshot_timestamp_seconds"] - time.time()) < 30
    server.metrics_when(lambda found: found[SNAPSHOT] > shown["snapshot_timestamp_seconds"] + 2)


def test_a_busy_engine_tells_what_it_holds(server: Server) -> None:
    idle = gauges(server.metrics())
    threads = [Thread(target=server.complete, args=(100, 400, 10 + i)) for i in range(6)]
    for thread in threads:
        thread.start()
    try:
        shown = gauges(server.metrics_when(lambda found: found['energylens_held_requests{engine="0"}'] == 6))
        assert 6 * 100 <= shown["kv_used_tokens"] <= 6 * 512
        assert shown["marginal_energy_joules"] < idle["marginal_energy_joules"]
        assert shown['slo_headroom_ratio{target="tpot"}'] < idle['slo_headroom_ratio{target="tpot"}']
    finally:
        for thread in threads:
            thread.join()
    server.metrics_when(lambda found: found['energylens_held_requests{engine="0"}'] == 0)
    assert not [name for name, value in server.metrics().items() if value and "failures" in name]
