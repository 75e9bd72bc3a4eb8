"""A real Prometheus that holds what two replicas have exported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # simulated.py and prometheus_server.py, beside this file

from prometheus_server import Prometheus, backfill_rules, create_blocks, serving
from simulated import Simulated, simulate


@pytest.fixture(scope="session")
def simulated() -> Simulated:
    return simulate()


@pytest.fixture(scope="session")
def prometheus(simulated: Simulated, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With the scraped series, and with the recording rules evaluated over them."""
    folder = tmp_path_factory.mktemp("prometheus")
    create_blocks(simulated.open_metrics(), folder / "data")
    with serving(folder / "data") as scraped:
        backfill_rules(scraped, folder / "rules")
    for block in (folder / "rules").iterdir():
        block.rename(folder / "data" / block.name)
    with serving(folder / "data") as server:
        yield server
