"""LiteLLM's own proxy with the example's configuration, before faked replicas."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from replicas import ROOT, Fake, call, fakes, running, wait_for

pytestmark = [pytest.mark.litellm, pytest.mark.nightly, pytest.mark.timeout(300)]
PROGRAM = Path(os.environ.get("LITELLM_VENV", ROOT / ".venv-litellm"), "bin", "litellm")
PORT, PORTS = 8870, (8871, 8872, 8873)
KEY = "sk-only-for-tests-0123456789abcdef0123456789abcdef"
SECRET = "the-prompt-is-nobody-elses-business"


class Proxy:
    """The proxy before the fakes."""

    def __init__(self, fakes: list[Fake], log: Path) -> None:
        self.fakes, self.log = fakes, log

    def ask(self, number: int = 0, **more: object) -> int:
        """Send a chat; the port of the replica that answered."""
        body = {"model": "llama", "messages": [{"role": "user", "content": f"{SECRET} {number}"}], "max_tokens": 16}
        answer = call(f"http://127.0.0.1:{PORT}/v1/chat/completions", body | more, {"Authorization": f"Bearer {KEY}"})
        return int(answer["choices"][0]["message"]["content"].removeprefix("from "))

    def counts(self) -> dict[str, float]:
        """Our series on the proxy's /metrics."""
        request = Request(f"http://127.0.0.1:{PORT}/metrics/", headers={"Authorization": f"Bearer {KEY}"})
        with urlopen(request, timeout=30) as page:
            lines = page.read().decode().splitlines()
        ours = [line for line in lines if line.startswith("energylens_routing_") and "_created" not in line]
        pairs = (line.rsplit(" ", 1) for line in ours)
        return {name.removeprefix("energylens_routing_"): float(value) for name, value in pairs}

    def settle(self) -> None:
        """Wait until the replicas' state has been read again."""
        time.sleep(2.5)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, package_path: str) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("litellm")
    config = yaml.safe_load((ROOT / "examples" / "gateways" / "litellm.yaml").read_text())
    first = config["model_list"][0]
    given = first["litellm_params"]
    config["model_list"] = [
        first | {"litellm_params": given | {"api_base": f"http://127.0.0.1:{port}/v1"}} for port in PORTS
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [PROGRAM, "--config", folder / "config.yaml", "--host", "127.0.0.1", "--port", str(PORT)]
    environment = {"PYTHONPATH": package_path, "LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    several = ((PORTS[0], "--gpu H200-SXM"), (PORTS[1], "--gpu H200-SXM"), (PORTS[2], "--gpu L40S"))
    with fakes(folder, *((port, f"{arguments} --delay 0.05") for port, arguments in several)) as made:
        ready = f"http://127.0.0.1:{PORT}/health/liveliness"
        with running(command, folder / "proxy.log", ready, HF_HUB_OFFLINE="1", **environment):
            proxy = Proxy(made, folder / "proxy.log")
            assert proxy.ask() in PORTS  # nothing is known yet: LiteLLM decides
            assert proxy.counts()['fallbacks_total{cause="no_model"}'] == 1
            wait_for(lambda: proxy.ask() and proxy.counts()['decisions_total{reason="least_joules"}'] > 0)
            yield proxy


@pytest.fixture(autouse=True)
def well(proxy: Proxy) -> None:
    """All replicas well and idle."""
    for fake in proxy.fakes:
        fake.be("ok")
    proxy.settle()


def test_requests_gather_where_some_run(proxy: Proxy) -> None:
    proxy.fakes[1].be(held=12)
    proxy.settle()
    assert {proxy.ask(i) for i in range(10)} == {PORTS[1]}


def test_a_full_replica_is_left_alone(proxy: Proxy) -> None:
    proxy.fakes[0].be(held=256)
    proxy.fakes[1].be(held=8)
    proxy.settle()
    assert {proxy.ask(i) for i in range(10)} == {PORTS[1]}


def test_streams_and_completions_too(proxy: Proxy) -> None:
    proxy.fakes[0].be(held=12)
    proxy.settle()
    before = [fake.served for fake in proxy.fakes]
    for body in ({"stream": True, "messages": [{"role": "user", "content": SECRET}]}, {"prompt": SECRET}):
        path = "chat/completions" if "messages" in body else "completions"
        request = Request(
            f"http://127.0.0.1:{PORT}/v1/{path}",
            json.dumps({"model": "llama"} | body).encode(),
            {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        with urlopen(request, timeout=30) as answer:
            assert answer.read()
    assert [fake.served - n for fake, n in zip(proxy.fakes, before, strict=True)] == [2, 0, 0]


def test_own_requests_count_before_the_replicas_tell(proxy: Proxy) -> None:
    """Sixty at once: all but few go to one replica, which no report could have told yet."""
    with ThreadPoolExecutor(60) as pool:
        where = Counter(pool.map(proxy.ask, range(60)))
    assert where.most_common(1)[0][1] >= 50


def test_a_failed_request_is_tried_elsewhere(proxy: Proxy) -> None:
    proxy.fakes[1].be("failing", held=12)
    proxy.settle()
    assert proxy.ask() in (PORTS[0], PORTS[2])


def test_what_is_stale_or_silent_is_not_preferred(proxy: Proxy) -> None:
    proxy.fakes[1].be("stale", held=12)
    proxy.fakes[0].be("mute")
    time.sleep(5)
    assert {proxy.ask(i) for i in range(6)} == {PORTS[2]}


def test_without_energy_data_litellm_decides(proxy: Proxy) -> None:
    for fake in proxy.fakes:
        fake.be("mute")
    time.sleep(5)
    before = proxy.counts()
    where = Counter(proxy.ask(i) for i in range(60))
    after = proxy.counts()
    # LiteLLM's default (simple-shuffle) draws at random: all three, none more than it is likely to.
    assert len(where) == 3
    assert max(where.values()) < 38
    assert after['fallbacks_total{cause="stale"}'] - before['fallbacks_total{cause="stale"}'] == 60
    assert after["saved_joules_total"] == before["saved_joules_total"]


def test_joules_saved_are_counted(proxy: Proxy) -> None:
    proxy.fakes[0].be(held=12)
    proxy.settle()
    before = proxy.counts()
    for i in range(5):
        proxy.ask(i)
    after = proxy.counts()
    assert after["saved_joules_total"] > before["saved_joules_total"]
    for side in ("chosen", "least_request"):
        name = f'added_joules_total{{side="{side}"}}'
        assert after[name] > before[name]


def test_prompts_are_in_no_log(proxy: Proxy) -> None:
    with pytest.raises(HTTPError):
        proxy.ask(0, model="no-such-model")
    log = proxy.log.read_text()
    assert "no-such-model" in log  # LiteLLM logs what fails,
    assert "routing: replica" in log  # we what we do not know,
    assert SECRET not in log  # nobody what was asked
