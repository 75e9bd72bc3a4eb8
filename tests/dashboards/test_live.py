"""Every panel's queries and every rule have plausible results on what the plugin exports, in a real Prometheus."""

from __future__ import annotations

import re

import pytest
from prometheus_server import Prometheus, filled_in, finite
from simulated import NOW_S, REPLICAS, ROUTER, Simulated

from energylens_vllm.dashboards.boards import DASHBOARDS
from energylens_vllm.dashboards.panel import Panel, Query, metrics_in
from energylens_vllm.dashboards.promql import EXPORTED
from energylens_vllm.dashboards.rules import ALERTS, RECORDINGS, Alert, Recording
from energylens_vllm.serving.metrics import COMPONENTS

pytestmark = pytest.mark.prometheus

#: What values of a unit can be, of two replicas with an H200 each (700 W) that are busy nearly all the time.
PLAUSIBLE = {
    "watt": (0.0, 1600.0),
    "joule": (0.0, 5e4),
    "s": (0.0, 50.0),
    "percentunit": (-1.0, 4.0),
    "hertz": (1e8, 4e9),
    "celsius": (20.0, 90.0),
    "kwatth": (0.01, 0.2),
    "massg": (5.0, 100.0),
    "short": (0.0, 2e5),
    "cps": (0.0, 1e8),
}
#: An H200 is no superchip, so this series is not there.
ABSENT = {"energylens_gpu_module_energy_joules_total"}

QUERIES = [
    pytest.param(panel, query, id=f"{board.uid}: {panel.title} {i}")
    for board in DASHBOARDS
    for panel in board.panels
    for i, query in enumerate(panel.queries)
    if not ABSENT & {*metrics_in(query.expr)}
]


@pytest.mark.parametrize(("panel", "query"), QUERIES)
def test_a_query_has_plausible_results(prometheus: Prometheus, panel: Panel, query: Query) -> None:
    once = panel.over_range or panel.kind in ("table", "bargauge")
    expr = filled_in(query.expr)
    points = prometheus.at(expr) if once else prometheus.over(expr)
    values = finite(points)
    assert values, expr
    low, high = PLAUSIBLE["short" if panel.kind == "heatmap" else query.unit or panel.unit]
    assert low <= min(values)
    assert max(values) <= high
    for label in re.findall(r"{{(\w+)}}", query.legend):
        assert all(series.get(label) for series, _ in points), f"series without {label!r}"


@pytest.mark.parametrize(("panel", "query"), QUERIES)
def test_without_traffic_there_is_nothing_not_an_error(prometheus: Prometheus, panel: Panel, query: Query) -> None:
    assert prometheus.at(filled_in(query.expr, job="nobody")) == []


def test_what_is_shown_is_what_the_plugin_exports(simulated: Simulated) -> None:
    exported = {family for family, series in simulated.samples.items() if series and family.startswith("energylens_")}
    assert exported == {name.removesuffix("_total") for name in EXPORTED.keys() - ABSENT}


def panel_of(title: str, board: str = "energylens-overview") -> Panel:
    return next(panel for b in DASHBOARDS if b.uid == board for panel in b.panels if panel.title == title)


def single(prometheus: Prometheus, panel: Panel, query: int = 0, **chosen: str) -> float:
    ((_, (value,)),) = prometheus.at(filled_in(panel.queries[query].expr, **chosen))
    return value


@pytest.mark.parametrize("name", REPLICAS)
def test_joules_per_token_are_those_of_the_recording(prometheus: Prometheus, simulated: Simulated, name: str) -> None:
    model_name, instance = REPLICAS[name]
    truth = simulated.truths[instance]
    gauge = panel_of("Energy per output token, in the time range", "energylens-fleet")
    assert single(prometheus, gauge, model_name=model_name) == pytest.approx(truth.joules_per_token, rel=0.05)
    kwh = single(prometheus, panel_of("Energy"), model_name=model_name)
    assert kwh * 3.6e6 == pytest.approx(truth.measured_j, rel=0.05)


def test_cost_and_emissions_follow_from_the_energy(prometheus: Prometheus) -> None:
    kwh = single(prometheus, panel_of("Energy"))
    assert single(prometheus, panel_of("Emissions")) == pytest.approx(kwh * 1.2 * 400)
    assert single(prometheus, panel_of("Cost")) == pytest.approx(kwh * 1.2 * 0.15)


def test_phases_and_components_sum_to_the_predicted_power(prometheus: Prometheus) -> None:
    def total(title: str, query: int) -> float:
        return sum(finite(prometheus.at(filled_in(panel_of(title).queries[query].expr), NOW_S - 60)))

    predicted = total("Power", 1)
    assert 200 < predicted < 1500
    assert total("By phase", 0) == pytest.approx(predicted, rel=1e-6)
    assert total("By component", 0) == pytest.approx(predicted, rel=1e-6)


def test_the_prediction_is_as_good_as_on_the_recording(prometheus: Prometheus) -> None:
    """docs/accuracy.md has 3 % or so for these two; a swapped side or a wrong unit is far outside."""
    assert abs(single(prometheus, panel_of("Bias", "energylens-accuracy"))) < 0.06
    assert 0.0 < single(prometheus, panel_of("wMAPE", "energylens-accuracy")) < 0.10
    assert 0.7 < single(prometheus, panel_of("Inside the 90 % interval", "energylens-accuracy")) <= 1.0
    assert 0.9 < single(prometheus, panel_of("Measured over predicted time", "energylens-accuracy")) < 1.1


def test_routing_saves_what_its_two_sides_differ_by(prometheus: Prometheus) -> None:
    saved = single(prometheus, panel_of("Saved by routing, as estimated", "energylens-fleet"))
    added = prometheus.at(filled_in("sum by (side) (increase(energylens_routing_added_joules_total[$__range]))"))
    sides = {series["side"]: value for series, (value,) in added}
    assert 0 < saved == pytest.approx(sides["least_request"] - sides["chosen"], rel=0.02)
    share = single(prometheus, panel_of("Saved, as a share", "energylens-fleet"))
    assert share == pytest.approx(1 - sides["chosen"] / sides["least_request"])
    assert single(prometheus, panel_of("Left to the host", "energylens-fleet")) == pytest.approx(1 / 50, rel=0.2)


def test_the_heatmap_has_both_signs(prometheus: Prometheus) -> None:
    heatmap = panel_of("Errors of windows over time", "energylens-accuracy")
    counts = {series["le"]: values[0] for series, values in prometheus.at(filled_in(heatmap.queries[0].expr))}
    assert {"-0.05", "0.0", "0.05", "+Inf"} <= counts.keys()
    bounds = sorted(counts, key=float)
    assert [counts[le] for le in bounds] == sorted(counts.values())


@pytest.mark.parametrize("rule", RECORDINGS, ids=lambda rule: rule.name)
def test_a_recording_rule_has_a_series_for_each_engine_on_both_days(prometheus: Prometheus, rule: Recording) -> None:
    for offset in ("", " offset 1d"):
        points = prometheus.at(f"last_over_time({rule.name}[1m]{offset})")
        assert {series["instance"] for series, _ in points} == {instance for _, instance in REPLICAS.values()}
        assert len(finite(points)) == len(points)
    if "share" in rule.name:
        sums = prometheus.at(f"sum by (instance) (last_over_time({rule.name}[1m]))")
        assert finite(sums) == pytest.approx([1.0, 1.0])
    if "component" in rule.name:
        assert {series["component"] for series, _ in points} == {*COMPONENTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_watches_every_engine_and_is_quiet(prometheus: Prometheus, alert: Alert) -> None:
    watched = {series["instance"] for series, _ in prometheus.at(alert.value)}
    of_router = "energylens_routing_" in alert.value
    assert watched == ({ROUTER} if of_router else {instance for _, instance in REPLICAS.values()})
    assert prometheus.at(alert.expr) == []
