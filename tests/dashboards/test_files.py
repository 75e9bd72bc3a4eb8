"""The files are what the code makes, Grafana's types take them, and their queries use what the plugin exports."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard as GrafanaDashboard

from energylens_vllm.dashboards.boards import DASHBOARDS
from energylens_vllm.dashboards.generate import main
from energylens_vllm.dashboards.panel import COLUMNS, EMPTY
from energylens_vllm.dashboards.promql import CHOSEN, EACH, ENGINE, EXPORTED, SCRAPED, VLLM, QueryError
from energylens_vllm.dashboards.rules import ALERTS, RECORDINGS
from energylens_vllm.routing import decisions

ROOT = Path(__file__).parents[2]
BOARDS = sorted((ROOT / "dashboards" / "grafana").glob("*.json"))
RULES = yaml.safe_load((ROOT / "dashboards" / "prometheus" / "energylens.rules.yml").read_text())
RECORDED = {rule.name for rule in RECORDINGS}


def board(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def panels(path: Path) -> list[dict[str, Any]]:
    return [panel for panel in board(path)["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    """All that are in the files."""
    for path in BOARDS:
        yield from (target["expr"] for panel in panels(path) for target in panel["targets"])
    yield from (rule["expr"] for group in RULES["groups"] for rule in group["rules"])


def selectors(expr: Any) -> Iterator[tuple[str, set[str], set[str]]]:
    """Each metric in a parsed query, the labels it is chosen by, and those that results around it are grouped by."""

    def walk(node: Any, grouped: set[str]) -> Iterator[tuple[str, set[str], set[str]]]:
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name, {matcher.name for matcher in node.matchers.matchers}, grouped
        elif isinstance(node, promql_parser.MatrixSelector):
            yield from walk(node.vector_selector, grouped)
        elif isinstance(node, promql_parser.AggregateExpr):
            inner = set(node.modifier.labels) if node.modifier else set()
            yield from walk(node.expr, inner)
        elif isinstance(node, promql_parser.BinaryExpr):
            yield from walk(node.lhs, grouped)
            yield from walk(node.rhs, grouped)
        elif isinstance(node, promql_parser.Call):
            for argument in node.args:
                yield from walk(argument, grouped)
        elif isinstance(node, promql_parser.ParenExpr | promql_parser.UnaryExpr | promql_parser.SubqueryExpr):
            yield from walk(node.expr, grouped)
        else:
            assert isinstance(node, promql_parser.NumberLiteral | promql_parser.StringLiteral), type(node)

    yield from walk(expr, set())


def parsed(expr: str) -> Any:
    """A query with Grafana's variables replaced by something of their kind."""
    expr = expr.replace("[$__rate_interval]", "[1m]").replace("[$__range]", "[1h]")
    return promql_parser.parse(re.sub(r"(?<!\")\$(carbon|pue|price)", "1", expr))


def family(sample: str) -> tuple[str, set[str]]:
    """The metric that a sample belongs to, and all labels that it has."""
    for name in (sample, re.sub(r"_(bucket|sum|count)$", "", sample)):
        if name in EXPORTED:
            labels, histogram = EXPORTED[name].label_names, EXPORTED[name].type == "histogram"
        elif name in VLLM:
            labels, histogram = VLLM[name][1], VLLM[name][0] == "histogram"
        else:
            continue
        assert histogram == (name != sample), f"{sample} is not what {name} is exported as"
        scraped = SCRAPED if name in decisions.BY_NAME else ENGINE
        return name, {*labels, *scraped, *(["le"] if sample.endswith("_bucket") else [])}
    raise AssertionError(f"{sample} is not exported")


def test_files_are_current() -> None:
    assert main(["--check", "--root", str(ROOT)]) == 0


def test_a_stale_file_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--check", "--root", str(tmp_path)]) == 0
    (tmp_path / "dashboards" / "grafana" / "energylens-fleet.json").write_text("{}")
    capsys.readouterr()
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().out.split()[1:] == ["is", "out", "of", "date"]


def test_nothing_else_lies_in_the_folder() -> None:
    assert {path.stem for path in BOARDS} == {dashboard.uid for dashboard in DASHBOARDS}


def test_queries_use_what_is_exported_and_its_labels() -> None:
    seen: set[str] = set()
    for expr in expressions():
        found = list(selectors(parsed(expr)))
        assert found, expr
        for sample, chosen, grouped in found:
            if sample in RECORDED:
                continue
            name, labels = family(sample)
            seen.add(name)
            assert chosen | grouped <= labels, f"{sample} has no {sorted((chosen | grouped) - labels)}: {expr}"
    assert seen == EXPORTED.keys() | VLLM.keys()


def test_every_metric_is_on_a_dashboard_and_in_the_docs() -> None:
    shown = {name for dashboard in DASHBOARDS for panel in dashboard.panels for name in panel.metrics}
    assert shown == EXPORTED.keys() | VLLM.keys()
    documented = re.findall(r"^\| `((?:energylens_|vllm:)\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    assert sorted(documented) == sorted(shown)


def test_the_page_of_metrics_says_what_each_is_and_where_it_is_shown() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    for metric in EXPORTED.values():
        (row,) = re.findall(rf"^\| `{metric.name}` \| (.+) \|$", page, re.M)
        kind, unit, labels, meaning, shown = row.split(" | ")
        assert (kind, unit, meaning) == (metric.type, metric.unit or "-", metric.help)
        assert tuple(re.findall(r"`(\w+)`", labels)) == metric.label_names
        titles = {panel.title for board in DASHBOARDS for panel in board.panels if metric.name in panel.metrics}
        assert {re.sub(r" \(\w+\)$", "", place) for place in shown.split("; ") if "`" not in place} == titles


def test_rules_use_only_rules_that_are_recorded() -> None:
    used = {name for group in RULES["groups"] for rule in group["rules"] for name in re.findall(r"engine\w*:\w+:\w+", rule["expr"])}  # fmt: skip  # noqa: E501
    assert used <= RECORDED
    assert len(RECORDED) == len(RECORDINGS)


def test_a_metric_or_label_that_is_not_exported_is_an_error() -> None:
    with pytest.raises(QueryError, match="energylens_gpu_power_milliwatts' is not exported"):
        CHOSEN.gauge("energylens_gpu_power_watts".replace("watts", "milliwatts"))
    with pytest.raises(QueryError, match="has no label 'stage'"):
        CHOSEN.rate("energylens_predicted_energy_joules_total", "stage")
    with pytest.raises(QueryError, match="is never 'encode'"):
        EACH.rate("energylens_predicted_energy_joules_total", phase="encode")
    with pytest.raises(QueryError, match="is a gauge, it is used as a counter"):
        EACH.rate("energylens_gpu_power_watts")


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_grafanas_own_types_know_every_key(path: Path) -> None:
    register_default_plugins()
    text = json.dumps(GrafanaDashboard.from_json(board(path)), cls=JSONEncoder)
    lost = list(differences(board(path), json.loads(text)))
    assert not lost


def differences(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """What of ours did not survive. Values that are Grafana's defaults may be left out by its types."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            if key in theirs:
                yield from differences(value, theirs[key], f"{where}.{key}")
            elif value not in (None, "", [], {}, False, 0):
                yield f"{where}.{key}: {value!r} was lost"
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(one, other, f"{where}[{i}]")
    elif ours != theirs:
        yield f"{where}: {ours!r} became {theirs!r}"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_an_unknown_key_would_be_noticed(path: Path) -> None:
    register_default_plugins()
    planted = board(path)
    first = next(panel for panel in planted["panels"] if panel["type"] == "timeseries")
    first["fieldConfig"]["defaults"]["custom"]["lineWidht"] = 2
    first["targets"][0]["exprr"] = "up"
    text = json.dumps(GrafanaDashboard.from_json(planted), cls=JSONEncoder)
    assert len(list(differences(planted, json.loads(text)))) == 2


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_are_told_apart_and_do_not_overlap(path: Path) -> None:
    everything = board(path)["panels"]
    ids = [panel["id"] for panel in everything]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in everything]
    assert len(titles) == len(set(titles))
    cells: set[tuple[int, int]] = set()
    for panel in everything:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= COLUMNS
        covered = {*itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))}
        assert not covered & cells, panel["title"]
        cells |= covered


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows(path: Path) -> None:
    for panel in panels(path):
        text, _, metrics = panel["description"].partition("\n\nMetric: ")
        assert text.endswith(".")
        assert re.findall(r"`([^`]+)`", metrics)
        assert panel["fieldConfig"]["defaults"]["noValue"] == EMPTY
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            for name, chosen, _ in selectors(parsed(target["expr"])):
                assert chosen >= ({"job"} if name in decisions.BY_NAME else {*ENGINE}), name


def test_dashboards_have_variables_and_lead_to_each_other() -> None:
    uids = [board(path)["uid"] for path in BOARDS]
    assert len(set(uids)) == 4
    for path in BOARDS:
        names = [variable["name"] for variable in board(path)["templating"]["list"]]
        assert names[:5] == ["datasource", "job", "model_name", "instance", "engine"]
        assert ("router" in names) == ("$router" in path.read_text())
        (link,) = board(path)["links"]
        assert link["type"] == "dashboards"
        assert {*link["tags"]} <= {*board(path)["tags"]}
        assert link["includeVars"]
        assert link["keepTime"]
        latency = {name for panel in panels(path) for name in re.findall(r"vllm:\w+_seconds", panel["description"])}
        assert latency


def test_alerts_have_a_runbook() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text()
    rules = {rule["alert"]: rule for rule in RULES["groups"][1]["rules"]}
    assert rules.keys() == {alert.name for alert in ALERTS}
    for name, rule in rules.items():
        assert f"\n## {name}\n" in page
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert re.search(r"Look: .+ Act: .+", rule["annotations"]["runbook"])


@pytest.mark.vllm
def test_vllms_metrics_are_vllms() -> None:
    from importlib.util import find_spec

    package = find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    for name in VLLM:
        assert f'name="{name.removesuffix("_total")}"' in source
