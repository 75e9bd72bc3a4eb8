"""Weights for HAProxy: what they should be, the agent that gives them, and Debian's HAProxy that takes them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from replicas import ROOT, Fake, call, fakes, running, wait_for

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.cli import main
from energylens_vllm.routing import Config, Request, Snapshot, StepTable
from energylens_vllm.routing.policy import Snapshots
from energylens_vllm.routing.weights import shares

TABLE = StepTable.compile(EnergyModel("llama-3.1-8b", Deployment(gpu="H200-SXM", max_num_seqs=256)), 800_000)
REQUEST = Request(512, 256.0, ttft_s=1.0, tpot_s=0.05)
PORT, AGENT, PORTS = 8880, 8881, (8882, 8883, 8884)


def of(*running: float, age_s: float = 0.0) -> Snapshots:
    return Snapshots.of([Snapshot(TABLE, n, 0.0, n * 700, 700.0, age_s=age_s) for n in running])


def test_few_requests_go_where_some_run() -> None:
    assert shares(of(0, 8, 0), REQUEST, 4, Config()) == [0.0, 1.0, 0.0]


def test_many_are_shared_and_nobody_gets_more_than_the_targets_bear() -> None:
    found = shares(of(0, 8, 0), REQUEST, 600, Config())
    assert found is not None
    assert sum(found) == pytest.approx(1.0)
    assert max(found) < 0.7
    assert min(found) > 0.1


def test_looking_ahead_changes_nothing() -> None:
    snapshots = of(3, 8)
    before = [snapshots.running.copy(), snapshots.prefill_tokens_per_s.copy(), snapshots.kv_tokens_used.copy()]
    shares(snapshots, REQUEST, 30, Config())
    after = [snapshots.running, snapshots.prefill_tokens_per_s, snapshots.kv_tokens_used]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_nothing_known_gives_no_shares() -> None:
    assert shares(of(0, 8, age_s=60), REQUEST, 4, Config()) is None
    assert shares(Snapshots.of([]), REQUEST, 4, Config()) is None


def asked(name: bytes, port: int = AGENT) -> str:
    """What the agent answers."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(name)
        return connection.makefile().readline().strip()


@contextmanager
def agent(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "energylens_vllm.cli", "agent", f"--listen=127.0.0.1:{AGENT}", *options]
    command += [f"--replica=r{i}=http://127.0.0.1:{port}" for i, port in enumerate(PORTS)]
    command += [f"--metrics=127.0.0.1:{AGENT + 8}"]
    ready = f"http://127.0.0.1:{AGENT + 8}/metrics"
    with running(command, folder / "agent.log", ready, PYTHONUNBUFFERED="1") as process:
        yield process


def weights() -> list[str]:
    return [asked(f"r{i}\n".encode()) for i in range(3)]


def test_the_agent_answers(tmp_path: Path) -> None:
    with fakes(tmp_path, *((port, "") for port in PORTS)) as made, agent(tmp_path, "--farewell=1") as process:
        made[1].be(held=12)
        wait_for(lambda: weights() == ["1%", "100%", "1%"], 15)
        assert asked(b"nobody\n") == ""
        assert asked(b"r1" + b"x" * 10_000 + b"\n") == ""
        made[1].be(held=256)  # full
        made[2].be(held=6)
        wait_for(lambda: weights() == ["1%", "1%", "100%"], 15)
        for fake in made:
            fake.be("mute")
        wait_for(lambda: weights() == ["100%"] * 3, 15)  # HAProxy's own balancing
        for fake in made:
            fake.be("ok", held=12 if fake is made[0] else 0)
        wait_for(lambda: weights() == ["100%", "1%", "1%"], 15)
        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda: weights() == ["100%"] * 3, 5)
        assert process.wait(10) == 0
        log = (tmp_path / "agent.log").read_text()
    assert "is no --replica; accepted: r0, r1, r2" in log
    assert "Traceback" not in log


def test_the_agent_listens_on_loopback_unless_told() -> None:
    from energylens_vllm.cli.agent import LISTEN

    assert LISTEN.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--replica: none given"),
        (["--replica", "a"], "--replica: 'a'"),
        (["--replica", "a=http://x", "--replica", "a=http://y"], "each name once"),
        (["--replica", "a=x:8000"], "url: 'x:8000/metrics'"),
        (["--replica", "a=http://x", "--listen", "9777"], "--listen: '9777'"),
        (["--replica", "a=http://x", "--floor", "101"], "--floor: 101"),
        (["--replica", "a=http://x", "--tpot", "0"], "tpot_s: 0"),
        (["--replica", "a=http://x", "--model", "llama-9"], "llama-9"),
    ],
)
def test_bad_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agent", *options]) == 2
    assert words in capsys.readouterr().err


class Proxied:
    """The replicas behind HAProxy and the agent."""

    def __init__(self, fakes: list[Fake], admin: Path) -> None:
        self.fakes, self.admin = fakes, admin

    def ask(self, count: int) -> Counter[str]:
        """Which replicas answer."""
        body = {"model": "llama", "prompt": "hello", "max_tokens": 4}
        answers = (call(f"http://127.0.0.1:{PORT}/v1/completions", body) for _ in range(count))
        return Counter(answer["choices"][0]["text"].removeprefix("from ") for answer in answers)

    def weights(self) -> list[int]:
        """As HAProxy has them."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.admin))
            connection.sendall(b"show stat\n")
            rows = [line.split(",") for line in connection.makefile().read().splitlines()]
        head = rows[0]
        at = {name.lstrip("# "): i for i, name in enumerate(head)}
        found = {row[at["svname"]]: int(row[at["weight"]]) for row in rows[1:] if len(row) > 20 and row[1][0] == "r"}
        return [found[f"r{i}"] for i in range(3)]


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[Proxied]:
    example = (ROOT / "examples" / "gateways" / "haproxy.cfg").read_text()
    # The example with our ports and names, and its statistics on a socket so that the test sees them.
    text = example.replace("127.0.0.1:4000", f"127.0.0.1:{PORT}").replace("agent-port 9777", f"agent-port {AGENT}")
    servers = "".join(
        f'    server r{i} 127.0.0.1:{port} agent-send "r{i}\\n"\n' for i, port in enumerate(PORTS)
    )  # fmt: skip
    text = text[: text.index("    server a")] + servers
    admin = tmp_path / "admin"
    text = text.replace("\nglobal\n", f"\nglobal\n    stats socket {admin} level admin\n")
    (tmp_path / "haproxy.cfg").write_text(text)
    with fakes(tmp_path, *((port, "") for port in PORTS)) as made:
        command = ["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")]
        with running(command, tmp_path / "haproxy.log", f"http://127.0.0.1:{PORT}/v1/models"):
            yield Proxied(made, admin)


@pytest.mark.haproxy
def test_haproxy_sends_requests_where_the_agent_says(proxied: Proxied, tmp_path: Path) -> None:
    fakes = proxied.fakes
    assert proxied.weights() == [100, 100, 100]  # no agent yet
    with agent(tmp_path, "--farewell=3"):
        fakes[1].be(held=12)
        wait_for(lambda: proxied.weights() == [1, 100, 1], 20)
        where = proxied.ask(100)
        assert where[str(PORTS[1])] >= 95
        fakes[1].process.kill()  # HAProxy's own checks see that it has gone
        fakes[1].process.wait()
        time.sleep(7)
        assert proxied.ask(20)[str(PORTS[1])] == 0
        for fake in (fakes[0], fakes[2]):
            fake.be("mute")
        wait_for(lambda: proxied.weights()[0] == proxied.weights()[2] == 100, 20)
        where = proxied.ask(60)
        assert where[str(PORTS[0])] == where[str(PORTS[2])] == 30  # round robin, HAProxy's own
        fakes[0].be(held=12)
        fakes[2].be()
        wait_for(lambda: proxied.weights() == [100, proxied.weights()[1], 1], 20)
    assert proxied.weights()[0] == proxied.weights()[2] == 100  # the agent has said farewell


@pytest.mark.haproxy
def test_an_agent_that_is_killed_leaves_all_servers_usable(proxied: Proxied, tmp_path: Path) -> None:
    fakes = proxied.fakes
    with agent(tmp_path) as process:
        fakes[0].be(held=12)
        wait_for(lambda: proxied.weights() == [100, 1, 1], 20)
        process.kill()
        process.wait()
    time.sleep(3)
    assert proxied.weights() == [100, 1, 1]  # HAProxy keeps the last,
    fakes[0].process.kill()
    fakes[0].process.wait()
    time.sleep(7)
    assert proxied.ask(10).total() == 10  # and serves with what is left
