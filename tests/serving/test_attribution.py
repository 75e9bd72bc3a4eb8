"""Nobody's joules are lost, nobody pays for what is idle, and each pays for what it causes."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energylens_vllm.energy import Deployment, EnergyModel
from energylens_vllm.serving.attribution import Account, Attribution, whole_units
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.increments import GRID, Increments, Report
from energylens_vllm.serving.listen import attribute
from energylens_vllm.serving.observer import MAX_UNREPORTED, Step, StepObserver
from energylens_vllm.serving.predictor import ModelPredictor, Predictions, Rows
from energylens_vllm.serving.request_log import RequestLog
from energylens_vllm.serving.settings import RULES, Settings
from energylens_vllm.serving.shares import Prices, Spared, shares


def model_of(name: str) -> EnergyModel:
    return EnergyModel(name, Deployment(gpu="H200-SXM"))


DENSE = model_of("llama-3.1-8b")
MODELS = {"dense": DENSE, "experts": model_of("qwen3-30b-a3b"), "windows": model_of("gpt-oss-20b")}
PREDICTORS = {name: ModelPredictor(model) for name, model in MODELS.items()}
PRICES = {name: Prices.of(model) for name, model in MODELS.items()}
SPARED = {name: Spared.of(model, PRICES[name]) for name, model in MODELS.items()}

Request = tuple[str, int, int, bool]  #: id, new tokens, computed tokens, whether it decodes


def batch(requests: Sequence[Request], finished: Sequence[str] = (), cached: dict[str, int] | None = None) -> Batch:
    return Batch(
        request_ids=[request for request, *_ in requests],
        new_tokens=[new for _, new, _, _ in requests],
        computed_tokens=[computed for _, _, computed, _ in requests],
        is_decode=[decode for *_, decode in requests],
        num_tokens=sum(new for _, new, _, _ in requests),
        num_decode_tokens=sum(new for _, new, _, decode in requests if decode),
        cached_tokens=cached or {},
        finished_request_ids=frozenset(finished),
    )


def attribution(name: str = "dense", rule: str = "shapley") -> Attribution:
    return Attribution(PRICES[name], SPARED[name], rule)


def report(
    ledger: Attribution, batches: Sequence[Batch], increments: Increments, name: str = "dense"
) -> Predictions | None:
    predictions = PREDICTORS[name].predict(batches) if batches else None
    ledger([Step(each, 0.0, 1.0) for each in batches], predictions, increments)
    return predictions


def divided(requests: Sequence[Request], name: str = "dense", rule: str = "shapley") -> tuple[np.ndarray, Predictions]:
    """Joules of each request of one step."""
    rows, predictions = Rows.of([batch(requests)]), PREDICTORS[name].predict([batch(requests)])
    return shares(rows, predictions.components, PRICES[name], rule), predictions


def total(accounts: Sequence[Account]) -> Fraction:
    """Exact."""
    return sum((Fraction(a.prefill_j) + Fraction(a.decode_j) for a in accounts), Fraction(0))


def counted(reports: Sequence[Report]) -> dict[str, Fraction]:
    sums: defaultdict[str, Fraction] = defaultdict(Fraction)
    for each in reports:
        for metric, labels, value in each.get("add", []):
            sums[" ".join((metric.removeprefix("energylens_").removesuffix("_joules_total"), *labels))] += Fraction(
                value
            )
    return sums


@st.composite
def histories(draw: st.DrawFn) -> list[list[Batch]]:
    """Reports of steps of requests that come, are chunked, found in a cache, preempted and resumed, drafted for,
    aborted and finished at any time."""
    computed: dict[str, int] = {}
    gone: list[str] = []
    born, reports = 0, []
    for _ in range(draw(st.integers(1, 4))):
        steps = []
        for _ in range(draw(st.integers(0, 4))):
            finished, gone = gone, []
            cached = {}
            for _ in range(draw(st.integers(0, 3))):
                computed[f"r{born}"] = found = draw(st.sampled_from([0, 0, 16, 640]))
                if found:
                    cached[f"r{born}"] = found
                born += 1
            requests = []
            for request in list(computed):
                action = draw(st.sampled_from(["decode", "decode", "prefill", "drafts", "wait", "preempt", "end"]))
                if action == "preempt":
                    computed[request] = 0
                elif action == "end":
                    del computed[request]
                    gone.append(request)
                elif action != "wait":
                    new = {"decode": 1, "drafts": 4, "prefill": draw(st.integers(1, 3000))}[action]
                    requests.append((request, new, computed[request], action != "prefill" and computed[request] > 0))
                    computed[request] += new
            if requests:
                steps.append(batch(requests, finished, {r: c for r, c in cached.items() if r in computed}))
            else:
                gone = [*finished, *gone]
        reports.append(steps)
    return reports


@settings(max_examples=150, deadline=None)
@given(histories(), st.sampled_from(sorted(MODELS)), st.sampled_from(RULES))
def test_accounts_sum_exactly_to_the_energy_of_all_steps(history: list[list[Batch]], name: str, rule: str) -> None:
    ledger, increments = attribution(name, rule), Increments()
    closed: list[Account] = []
    ledger.listeners.append(closed.extend)
    steps_j: list[float] = []
    reports = []
    for batches in history:
        predictions = report(ledger, batches, increments, name)
        if predictions is not None:
            steps_j += predictions.energy_j.tolist()
        reports.append(increments.take())

        accounts = [*closed, *ledger.open_accounts]
        attributed = total(accounts)
        assert abs(attributed - sum(map(Fraction, steps_j), Fraction(0))) <= Fraction(GRID)  # at any time
        counters = counted(reports)
        assert attributed == counters["attributed_energy prefill"] + counters["attributed_energy decode"]
        assert sum(a.prefill_tokens + a.decode_tokens for a in accounts) == sum(
            each.num_tokens for earlier in history[: len(reports)] for each in earlier
        )
    assert all(a.prefill_j >= 0.0 and a.decode_j >= 0.0 and a.complete for a in closed)
    assert len({a.request_id for a in closed}) == len(closed)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.0, 1e3), min_size=1, max_size=9), min_size=1, max_size=6),
    st.floats(-GRID / 2, GRID / 2),
)
def test_whole_units_are_exact(steps: list[list[float]], carried_j: float) -> None:
    joules = np.array([j for step in steps for j in step])
    energy_j = np.array([math.fsum(step) for step in steps])
    units, left = whole_units(joules, energy_j, [carried_j])
    exact = sum(map(Fraction, energy_j.tolist()), Fraction(carried_j))
    assert Fraction(int(units.sum())) * Fraction(GRID) + sum(map(Fraction, left), Fraction(0)) == pytest.approx(
        exact, abs=1e-25
    )
    assert (units >= 0).all()
    assert abs(units * GRID - joules).max() <= 2 * GRID + 1e-13 * joules.sum()


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("rule", RULES)
def test_equal_requests_pay_equally(name: str, rule: str) -> None:
    joules, predictions = divided([(str(i), 1, 500, True) for i in range(7)], name, rule)
    assert joules == pytest.approx([predictions.energy_j[0] / 7] * 7)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_request_alone_pays_for_all(name: str) -> None:
    joules, predictions = divided([("a", 300, 0, False)], name)
    assert joules == pytest.approx(predictions.energy_j)


def test_a_longer_context_costs_its_cache_reads() -> None:
    """Between two decodes that differ in context alone, what differs is what the model says of that difference."""
    joules, predictions = divided([("short", 1, 1000, True), ("long", 1, 31000, True)])
    own = predictions.components["kv_cache"][0] + predictions.components["attention"][0]
    above = predictions.energy_j[0] - predictions.components["static"][0] - predictions.components["host_gap"][0]
    assert joules[1] - joules[0] == pytest.approx(own * 30000 / 32002 * predictions.energy_j[0] / above, rel=1e-2)


def test_a_window_bounds_what_a_context_costs() -> None:
    """In gpt-oss every other layer sees 128 tokens only, so ten times the context costs at most half of that more."""
    joules, predictions = divided([("short", 1, 1000, True), ("long", 1, 10000, True)], "windows")
    fractions = joules / predictions.energy_j[0]
    assert 1.0 < fractions[1] / fractions[0] < 6.0


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_nobody_pays_more_for_weights_than_alone(name: str) -> None:
    """Which per-token shares break: there the prefill pays for nearly all of what the decodes need as well."""
    requests = [("prefill", 400, 0, False), *((str(i), 1, 1000, True) for i in range(20))]
    rows = Rows.of([batch(requests)])
    predictions = PREDICTORS[name].predict([batch(requests)])
    only = {component: np.zeros(1) for component in predictions.components}
    only["weights"] = predictions.components["weights"]
    alone = [float(PREDICTORS[name].predict([batch([r])]).components["weights"][0]) for r in requests]
    shapley = shares(rows, only, PRICES[name], "shapley")
    per_token = shares(rows, only, PRICES[name], "per_token")
    assert (shapley <= np.array(alone) * 1.05).all()  # the clock, and with it energy per byte, differs by some percent
    assert shapley.sum() == pytest.approx(per_token.sum())
    assert per_token[0] > 0.9 * only["weights"][0]
    assert shapley[0] < 0.5 * only["weights"][0]


def test_experts_are_paid_by_who_needs_them() -> None:
    """One token touches 8 of 128 experts, so beside a prefill that touches all a decode pays little of them."""
    requests = [("prefill", 2000, 0, False), ("decode", 1, 1000, True)]
    joules = {name: divided(requests, name)[0] for name in ("dense", "experts")}
    assert joules["experts"][1] / joules["experts"].sum() < joules["dense"][1] / joules["dense"].sum()


def test_the_rules_agree_on_plain_decodes() -> None:
    requests = [(str(i), 1, 100 * i + 1, True) for i in range(32)]
    for name in MODELS:
        assert divided(requests, name, "shapley")[0] == pytest.approx(divided(requests, name, "per_token")[0])


def test_prefill_and_decode_of_a_request_are_apart() -> None:
    ledger, increments = attribution(), Increments()
    report(ledger, [batch([("a", 700, 0, False)]), batch([("a", 1, 700, True)])], increments)
    account = ledger.account("a")
    assert account is not None
    alone = PREDICTORS["dense"].predict([batch([("a", 700, 0, False)]), batch([("a", 1, 700, True)])])
    assert (account.prefill_j, account.decode_j) == pytest.approx(alone.energy_j.tolist(), abs=1e-9)
    assert (account.prefill_tokens, account.decode_tokens) == (700, 1)


def test_what_a_cache_hit_saves_is_what_computing_costs() -> None:
    """Against the model's own prefill of those tokens, in steps that are full."""
    ledger, increments = attribution(), Increments()
    report(ledger, [batch([("a", 16, 8192, False)], cached={"a": 8192})], increments)
    account = ledger.account("a")
    assert account is not None
    full = DENSE.step([(8192, 0)]).energy_j
    assert account.saved_j == pytest.approx(full, rel=0.02)
    assert account.cached_tokens == 8192
    assert counted([increments.take()])["saved_energy"] == pytest.approx(account.saved_j)
    assert float(SPARED["dense"].joules([16])[0]) < full / 400  # a small hit saves its part, not a whole step


def test_finished_requests_are_closed_once() -> None:
    settled_s = [0.0]
    ledger = Attribution(PRICES["dense"], SPARED["dense"], settled=lambda: settled_s[0])
    increments, closed = Increments(), []
    ledger.listeners.append(closed.extend)
    report(ledger, [batch([("a", 10, 0, False), ("b", 10, 0, False), ("c", 9, 0, False)])], increments)
    report(ledger, [batch([("b", 1, 10, True)], finished=["a"])], increments)
    assert [a.request_id for a in closed] == ["a"]
    settled_s[0] = 4.0
    ledger.finish(["b", "never seen"], 5.0)
    report(ledger, [], increments)
    assert [a.request_id for a in closed] == ["a"]  # a step that began before may be under way
    settled_s[0] = 5.0
    report(ledger, [], increments)
    assert [a.request_id for a in closed] == ["a", "b"]
    assert ledger.account("a") is None
    assert [a.request_id for a in ledger.open_accounts] == ["c"]
    observed = increments.take()["observe"]
    assert {labels: len(values) for _, labels, values in observed} == {("prefill",): 2, ("decode",): 1}


def test_steps_without_a_prediction_leave_accounts_incomplete() -> None:
    ledger, increments = attribution(), Increments()
    ledger([Step(batch([("a", 10, 0, False), ("b", 3, 0, False)]), 0.0, 1.0)], None, increments)
    report(ledger, [batch([("a", 1, 10, True), ("c", 1, 10, True)])], increments)
    assert {a.request_id: a.complete for a in ledger.open_accounts} == {"a": False, "b": False, "c": True}


def test_accounts_of_steps_that_were_lost_are_incomplete_and_closed() -> None:
    """Where reports are held up for long the oldest steps are dropped, with what they say of who finished."""
    now_s = [0.0]
    observer = StepObserver(lambda work: work, PREDICTORS["dense"], clock=lambda: now_s[0])
    ledger = Attribution(PRICES["dense"], SPARED["dense"], settled=lambda: observer.settled_s)
    closed: list[Account] = []
    ledger.listeners.append(closed.extend)
    observer.attribution = ledger
    observer.listeners.append(ledger)

    def step(requests: Sequence[Request], finished: Sequence[str] = ()) -> None:
        work = batch(requests, finished)
        observer.scheduled(work, work, now_s[0])
        ledger.finish(finished, now_s[0])
        now_s[0] += 0.01
        observer.ended(work)

    step([("a", 10, 0, False), ("b", 10, 0, False)])
    observer.report()
    step([("b", 1, 10, True), ("c", 5, 0, False)], ["a"])  # lost, and with it that a has finished
    for i in range(MAX_UNREPORTED):
        step([("b", 1, 11 + i, True), ("c", 1, 5 + i, True)])
    observer.report()
    now_s[0] += 1.0
    observer.report()
    assert [(account.request_id, account.complete) for account in closed] == [("a", False)]
    assert {a.request_id: a.complete for a in ledger.open_accounts} == {"b": False, "c": False}
    step([("d", 10, 0, False)], ["b", "c"])
    observer.report()
    assert {account.request_id for account in closed} == {"a", "b", "c"}
    assert len(closed) == 3
    assert [(a.request_id, a.complete) for a in ledger.open_accounts] == [("d", True)]


@settings(max_examples=60, deadline=None)
@given(histories(), st.data())
def test_whoever_finishes_is_closed_whatever_is_lost(history: list[list[Batch]], data: st.DataObject) -> None:
    """Each batch may be lost; then accounts still sum to what was predicted, and nobody who has finished stays open."""
    ledger, increments, closed, predicted_j, time_s = attribution(), Increments(), [], [], 0.0
    ledger.listeners.append(closed.extend)
    finished: set[str] = set()
    for batches in history:
        kept = []
        for each in batches:
            time_s += 1.0
            finished.update(each.finished_request_ids)
            ledger.finish(each.finished_request_ids, time_s)
            if data.draw(st.booleans()):
                kept.append(each)
            else:
                ledger.lost()
        found = report(ledger, kept, increments)
        predicted_j += [] if found is None else found.energy_j.tolist()
    report(ledger, [], increments)
    assert not finished & {account.request_id for account in ledger.open_accounts}
    ids = [account.request_id for account in closed]
    assert len(ids) == len(set(ids))
    accounts = [*closed, *ledger.open_accounts]
    assert abs(total(accounts) - sum(map(Fraction, predicted_j), Fraction(0))) < Fraction(GRID)


def test_many_requests_reuse_the_same_memory() -> None:
    ledger, increments = attribution(), Increments()
    for i in range(500):
        report(ledger, [batch([(str(i), 5, 0, False)], finished=[str(i - 1)] if i else [])], increments)
    assert len(ledger._units) == 64
    assert len(ledger._slots) == 1


def test_the_log_has_a_line_a_request_and_rotates(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "requests.jsonl"
    log = RequestLog(path, max_bytes=4000, backups=2)
    accounts = [Account(f"r{i}", 0.5, 0.25, 10, 3, 0, 0.0, True) for i in range(60)]
    for account in accounts:
        log([account])
    log.close()
    files = sorted(tmp_path.rglob("requests.jsonl*"))
    assert [file.name for file in files] == ["requests.jsonl", "requests.jsonl.1", "requests.jsonl.2"]
    assert all(file.stat().st_size <= 4000 for file in files)
    lines = [json.loads(line) for file in reversed(files) for line in file.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == [f"r{i}" for i in range(60 - len(lines), 60)]
    assert lines[-1] | {"time": 0} == {
        "time": 0,
        "request_id": "r59",
        "joules": 0.75,
        "prefill_joules": 0.5,
        "decode_joules": 0.25,
        "saved_joules": 0.0,
        "prefill_tokens": 10,
        "decode_tokens": 3,
        "cached_tokens": 0,
        "complete": True,
    }


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.jsonl")
    log._handler.stream.close()
    log._handler.stream = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        log([Account("r", 0.5, 0.25, 10, 3, 0, 0.0, True)])
    with pytest.raises(OSError):  # noqa: PT011
        RequestLog(Path("/proc/none/requests.jsonl"))


def test_an_engine_with_accounts_reports_each_second(tmp_path: Path) -> None:
    observer = StepObserver(lambda work: work, PREDICTORS["dense"], report_interval_s=5.0)
    attribute(observer, Settings(), 0)
    assert (observer.attribution, observer.report_interval_s) == (None, 5.0)
    attribute(observer, Settings(attribution=True, request_log=str(tmp_path / "log.jsonl")), 2)
    assert observer.listeners == [observer.attribution]
    assert observer.report_interval_s == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["log.2.jsonl"]  # a data-parallel engine has its own


def test_without_a_prediction_there_are_no_accounts() -> None:
    observer = StepObserver(lambda work: work, None)
    attribute(observer, Settings(attribution=True), 0)
    assert observer.attribution is None
    assert not observer.listeners
