"""What is made of replicas' /metrics, and of those that cannot be read."""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import Executor, Future
from typing import Any
from urllib.error import URLError

import pytest
from fake_replica import Replica

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.routing import StepTable
from energylens_vllm.routing.fleet import LiveFleet, Targets
from energylens_vllm.routing.report import Tables
from energylens_vllm.routing.scrape import History, Scraper, Source, metrics_url, read


class AtOnce(Executor):
    """Runs what it is given before it returns."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Replicas:
    """Pages by URL, and a fleet that reads them."""

    def __init__(self, *gpus: str, served_model_name: str = "llama-3.1-8b") -> None:
        self.now = 0.0
        self.fleet = LiveFleet(Targets(), lambda: self.now, time.time)
        self.scraper = Scraper(self.fleet, tables=Tables(executor=AtOnce()), fetch=self.fetch)
        self.at: dict[str, Replica | Exception | str] = {}
        for i, gpu in enumerate(gpus):
            args = argparse.Namespace(served_model_name=served_model_name, gpu=gpu, port=i)
            self.at[f"http://r{i}/metrics"] = Replica(args)
            self.scraper.add(f"r{i}", Source(f"http://r{i}/metrics"))

    def fetch(self, url: str, timeout_s: float) -> str:
        found = self.at[url]
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, str) else found.metrics()

    def replica(self, i: int) -> Replica:
        found = self.at[f"http://r{i}/metrics"]
        assert isinstance(found, Replica)
        return found

    def states(self) -> list[str]:
        ranking = self.fleet.rank(None).ranking
        return [verdict.state for verdict in sorted(ranking, key=lambda verdict: verdict.replica)]


def page(**changes: float) -> str:
    replica = Replica(argparse.Namespace(served_model_name="llama-3.1-8b", gpu="H200-SXM", port=0))
    for name, value in changes.items():
        setattr(replica, name, value)
    return replica.metrics()


def test_a_page_is_read() -> None:
    found = read(page(held=5, served=7, prompt_tokens=700))
    assert found is not None
    assert (found.held, found.kv_tokens_used, found.kv_tokens) == (5, 3000, 400_000)
    assert (found.ended, found.ended_prompt_tokens, found.ended_output_tokens) == (7, 700, 112)
    assert abs(found.sampled_s - time.time()) < 60
    assert found.labels["gpu"] == "H200-SXM"
    assert found.model_name == "llama-3.1-8b"


def test_engines_of_one_server_count_as_their_mean() -> None:
    one = page(held=4)
    both = one + page(held=8).replace('engine="0"', 'engine="1"')
    found = read(both)
    assert found is not None
    assert (found.held, found.kv_tokens) == (6, 400_000)


def test_a_page_without_a_snapshot_says_nothing() -> None:
    assert read("") is None
    assert read("# HELP nothing\nvllm:num_requests_running 3\n") is None
    whole = page()
    for line in whole.splitlines():
        if line.startswith(("energylens_held", "energylens_waiting", "energylens_kv", "energylens_snapshot")):
            assert read(whole.replace(line, "")) is None, line


def test_rates_come_from_two_pages() -> None:
    history, replica = History(), Replica(argparse.Namespace(served_model_name="m", gpu="H200-SXM", port=0))
    replica.stopped_s = 1000.0
    first = read(replica.metrics())
    assert first is not None
    assert history.report(first).ended == ()
    for second in range(1, 60):
        replica.stopped_s, replica.served, replica.prompt_tokens = 1000.0 + second, 4 * second, 400 * second
        now = read(replica.metrics())
        assert now is not None
        report = history.report(now)
    assert report.prefill_tokens_per_s == pytest.approx(400, rel=0.01)
    assert report.time_factor == pytest.approx(1.0)
    assert report.ended == ((100, 16),) * 4
    assert history.report(now) is report  # the engine has not been seen since


def test_the_same_table_as_the_deployment_makes() -> None:
    replicas = Replicas("H200-SXM")
    replicas.scraper.once()
    replicas.scraper.once()
    table = replicas.fleet._replicas["r0"].table
    deployment = Deployment(gpu="H200-SXM", max_num_seqs=256, vllm_release="0.32.0")
    expected = StepTable.compile(EnergyModel("llama-3.1-8b", deployment), 400_000)
    assert table is not None
    assert (table.decode_s == expected.decode_s).all()
    assert (table.marginal_j == expected.marginal_j).all()
    assert table.kv_tokens == expected.kv_tokens


def test_replicas_of_one_kind_share_a_table() -> None:
    replicas = Replicas("H200-SXM", "H200-SXM", "L40S")
    replicas.scraper.once()
    tables = [replica.table for replica in replicas.fleet._replicas.values()]
    assert tables[0] is tables[1]
    assert tables[0] is not tables[2]


def test_what_is_known_of_replicas() -> None:
    replicas = Replicas("H200-SXM", "L40S")
    assert replicas.states() == ["unknown", "unknown"]
    replicas.scraper.once()
    assert replicas.states() == ["feasible", "feasible"]
    replicas.now += 10  # nobody has read anything for ten seconds
    assert replicas.states() == ["unknown", "unknown"]
    replicas.scraper.once()
    assert replicas.states() == ["feasible", "feasible"]
    replicas.replica(0).held = 256
    replicas.scraper.once()
    assert replicas.states() == ["infeasible", "feasible"]


def test_an_engine_that_hangs_grows_old_though_its_page_is_there() -> None:
    replicas = Replicas("H200-SXM", "L40S")
    replicas.replica(0).stopped_s = time.time()
    for _ in range(5):
        replicas.scraper.once()
        replicas.now += 1
    assert replicas.states() == ["unknown", "feasible"]


def test_one_that_refuses_is_unknown_at_once_and_one_that_is_slow_later() -> None:
    replicas = Replicas("H200-SXM", "L40S")
    replicas.scraper.once()
    replicas.at["http://r0/metrics"] = URLError(ConnectionRefusedError(111, "refused"))
    replicas.at["http://r1/metrics"] = TimeoutError("timed out")
    replicas.scraper.once()
    assert replicas.states() == ["unknown", "feasible"]
    replicas.now += 4
    assert replicas.states() == ["unknown", "unknown"]
    assert "refused" in replicas.scraper.problem("r0")


@pytest.mark.parametrize(
    "text", ["", "<html>404</html>", "energylens_held_requests{ 3", "energylens_held_requests{} x\n"]
)
def test_nonsense_is_unknown_and_told_once(text: str, caplog: pytest.LogCaptureFixture) -> None:
    replicas = Replicas("H200-SXM")
    replicas.at["http://r0/metrics"] = text
    for _ in range(3):
        replicas.scraper.once()
    assert replicas.states() == ["unknown"]
    assert len([record for record in caplog.records if "r0" in record.message]) == 1


def test_numbers_that_cannot_be_are_not_believed() -> None:
    for wrong in (math.nan, -1.0, math.inf):
        replicas = Replicas("H200-SXM")
        text = replicas.replica(0).metrics()
        line = next(line for line in text.splitlines() if line.startswith("energylens_waiting_tokens"))
        replicas.at["http://r0/metrics"] = text.replace(line, line.rsplit(" ", 1)[0] + f" {wrong}")
        replicas.scraper.once()
        assert replicas.states() == ["unknown"], wrong


def test_a_model_that_is_not_known_is_told() -> None:
    replicas = Replicas("H200-SXM", served_model_name="our-own-7b")
    replicas.scraper.once()
    assert replicas.states() == ["unknown"]
    assert "our-own-7b" in replicas.scraper.problem("r0")
    replicas.scraper.add("r0", Source("http://r0/metrics", "llama-3.1-8b"))
    replicas.scraper.once()
    assert replicas.states() == ["feasible"]
    assert not replicas.scraper.problem("r0")


def test_a_replica_that_restarts_as_another_gets_another_table() -> None:
    replicas = Replicas("H200-SXM")
    replicas.scraper.once()
    before = replicas.fleet._replicas["r0"].table
    replicas.replica(0).args.gpu = "L40S"
    replicas.scraper.once()
    assert replicas.fleet._replicas["r0"].table is not before


def test_what_is_said_beforehand_goes_over_what_the_replica_says() -> None:
    replicas = Replicas("H200-SXM")
    source = Source("http://r0/metrics", deployment={"gpu": "B200-SXM", "max_num_seqs": 8})
    replicas.scraper.add("r0", source)
    replicas.scraper.once()
    table = replicas.fleet._replicas["r0"].table
    assert table is not None
    assert table.max_num_seqs == 8


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"url": "localhost:8000"}, "url: 'localhost:8000'"),
        ({"url": "http://a", "model": "llama-9"}, "unknown value 'llama-9'"),
        ({"url": "http://a", "deployment": {"gpus": 2}}, "deployment: unknown value 'gpus'"),
    ],
)
def test_bad_input(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(EnergyLensError, match=words):
        Source(**wrong)


def test_the_url_of_metrics() -> None:
    assert metrics_url("http://a:8000/v1/") == metrics_url("http://a:8000") == "http://a:8000/metrics"
