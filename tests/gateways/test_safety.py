"""A day of requests in bounded memory; without energy data the host decides; prompts are in no log."""

from __future__ import annotations

import gc
import logging
import random
import re
import tracemalloc
from pathlib import Path

import pytest
from replicas import ROOT

from energylens_vllm.routing import StepTable, fleet, prefixes
from energylens_vllm.routing.fleet import MOST_UNDER_WAY, LiveFleet
from energylens_vllm.routing.gateway import Gateway
from energylens_vllm.routing.report import Report

REPLICAS = [f"replica-{i}" for i in range(8)]
SECRET = "nobody-but-the-model-shall-see-this"


class Day:
    """A gateway before eight replicas that report each second of 50 requests. One request in a hundred never ends."""

    def __init__(self, table: StepTable) -> None:
        self.counted: dict[tuple[str, ...], float] = {}
        self.gateway, self.now = Gateway(count=self.count), 0.0
        self.gateway.fleet = LiveFleet(None, lambda: self.now, lambda: self.now)
        for key in REPLICAS:
            self.gateway.fleet.update(key, [key])
            self.gateway.fleet.know(key, table)
        self.draw, self.number, self.held = random.Random(0), 0, dict.fromkeys(REPLICAS, 0)
        self.under_way: list[tuple[str, str]] = []
        self.ended = 0
        self.report()

    def count(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        key = (name, *labels)
        self.counted[key] = self.counted.get(key, 0.0) + value

    def report(self) -> None:
        for key in REPLICAS:
            n = self.held[key]
            self.gateway.fleet.hear(
                key,
                Report(self.now, n, 0.0, 700.0 * n, 700.0, 50.0, num_ended=self.ended, ended=((500, 150 + n),)),
            )

    def ask(self, requests: int) -> None:
        draw = self.draw
        for _ in range(requests):
            self.number += 1
            self.now += 0.02
            name, words = f"request-{self.number}", draw.randrange(1, 600)
            body = {
                "messages": [{"role": "user", "content": f"{draw.random()} {'word ' * words}"}],
                "max_tokens": draw.choice([None, 16, 512]),
            }
            chosen = self.gateway.choose(REPLICAS, body, name)
            if chosen is not None:
                self.held[chosen] += 1
                self.under_way.append((name, chosen))
            while len(self.under_way) > 60:
                name, where = self.under_way.pop(draw.randrange(60))
                self.held[where] -= 1
                self.ended += 1
                if draw.random() > 0.01:
                    self.gateway.end(name)
            if self.number % 50 == 0:
                self.report()


@pytest.fixture(scope="module")
def day(table: StepTable) -> Day:
    day = Day(table)
    day.ask(6_000)  # until what is kept of prompts is full
    return day


def grown(day: Day, requests: int) -> int:
    """Bytes that this process holds more after so many requests."""
    tracemalloc.start()
    try:
        day.ask(500)
        before, _ = tracemalloc.get_traced_memory()
        day.ask(requests)
        after, _ = tracemalloc.get_traced_memory()
        return after - before
    finally:
        tracemalloc.stop()


def test_memory_stays(table: StepTable, monkeypatch: pytest.MonkeyPatch) -> None:
    # With limits that are reached soon, all of it can be traced: then nothing is added, not even a name a request.
    monkeypatch.setattr(prefixes, "MOST_BLOCKS", 16)
    monkeypatch.setattr(fleet, "MOST_UNDER_WAY", 100)
    day = Day(table)
    tracemalloc.start()
    try:
        day.ask(1_500)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        day.ask(2_500)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert abs(after - before) < 50_000  # 20 bytes a request


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_memory_stays_over_a_day_of_a_million_requests(day: Day) -> None:
    day.ask(100_000)
    first = grown(day, 50_000)
    day.ask(700_000)
    last = grown(day, 50_000)
    print(f"grown in 50,000 requests: {first} bytes at first, {last} after {day.number}")
    # All that is kept is replaced while it is traced, so both show what is kept in all; it does not become more.
    assert last < first + 2_000_000
    assert last < 60_000_000
    assert day.number > 900_000


def test_what_is_kept_has_limits(day: Day) -> None:
    kept = day.gateway.fleet
    assert len(kept._placed) <= MOST_UNDER_WAY
    assert len(kept._prefixes._seen) <= len(REPLICAS)
    assert max(map(len, kept._prefixes._seen.values())) <= 16_384
    assert len(day.counted) <= 20


def test_requests_were_routed(day: Day) -> None:
    decided = sum(n for (name, *_), n in day.counted.items() if name == "energylens_routing_decisions_total")
    assert decided == day.number
    by_joules = [day.counted["energylens_routing_decisions_total", reason] for reason in ("least_joules", "hysteresis")]
    assert sum(by_joules) > 0.5 * day.number


def test_without_energy_data_the_host_decides(table: StepTable) -> None:
    gateway = Day(table).gateway
    assert gateway.choose(REPLICAS, {"prompt": "x"}, "1") in REPLICAS
    for key in REPLICAS:
        gateway.fleet.silence(key)
    assert [gateway.choose(REPLICAS, {"prompt": "x"}, str(i)) for i in range(20)] == [None] * 20
    assert gateway.choose(["stranger"], {"prompt": "x"}, "21") is None


def test_prompts_are_in_no_log(
    table: StepTable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = Day(table).gateway
    bodies: list[object] = [
        {"messages": [{"role": "user", "content": SECRET * 100}]},
        {"messages": [{"role": "user", "content": {"text": SECRET}}], "max_tokens": SECRET},
        {"messages": SECRET},
        {"prompt": [SECRET, SECRET]},
        {"prompt": {"text": SECRET}},
        SECRET,
        None,
    ]
    for body in bodies:
        gateway.choose(REPLICAS, body, "1")

    def fails(prompt: object) -> None:
        raise RuntimeError(f"cannot rank {prompt} {SECRET}")

    monkeypatch.setattr(gateway.fleet, "rank", fails)
    for body in bodies:
        assert gateway.choose(REPLICAS, body, "2") is None
    assert "routing failed" in caplog.text
    assert SECRET not in caplog.text
    assert SECRET not in repr(vars(gateway.fleet))


LOGGERS = re.compile(r"logger\.\w+\((.*)\)")


@pytest.mark.parametrize(
    "path",
    [
        *(ROOT / "energylens_vllm" / "routing").glob("*.py"),
        *(ROOT / "hooks" / "litellm").glob("*.py"),
        *(ROOT / "hooks" / "ray").glob("*.py"),
        ROOT / "hooks" / "vllm" / "ranks.py",
    ],
    ids=lambda path: path.name,
)
def test_no_log_call_takes_a_body(path: Path) -> None:
    for call in LOGGERS.findall(path.read_text()):
        assert not re.search(r"\b(body|messages|prompt|content|request_kwargs|kwargs|exc_info)\b", call), call
