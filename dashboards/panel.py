"""Panels and dashboards -> Grafana's JSON (schema 39: Grafana 11 reads it as it is, 12 and 13 migrate it on import)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from energylens_vllm.dashboards.promql import EXPORTED, VLLM
from energylens_vllm.routing.decisions import DECISIONS

COLUMNS = 24  #: Grafana's grid
TAG = "energylens"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
EMPTY = "No traffic"
#: any engine that has the plugin; its labels are what the variables offer
_ANY = "energylens_predictor_state"


@dataclass(frozen=True, slots=True)
class Query:
    """One query. `legend` is Grafana's, with {{label}}; `axis` is on which side its values are read."""

    expr: str
    legend: str = ""
    unit: str | None = None  #: if not the panel's
    axis: Literal["left", "right"] = "left"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `text` says what it shows; the metrics behind it are added to its description."""

    title: str
    kind: Literal["timeseries", "stat", "bargauge", "table", "heatmap"]
    unit: str  #: Grafana's id of a unit, such as watt, joule, percentunit; short for counts
    text: str
    queries: tuple[Query, ...]
    width: int = COLUMNS // 3
    height: int = 8
    stacked: bool = False
    over_range: bool = False  #: a stat of the whole time range: its query is evaluated once, at the end
    zero_based: bool = True
    axis_to: float | None = None  #: the axis reaches this far even if values do not, as where all are 0

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that it shows, in the order of their use."""
        return metrics_in(" ".join(query.expr for query in self.queries))


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and the panels under it."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard."""

    uid: str
    title: str
    text: str
    rows: tuple[Row, ...]
    numbers: tuple[tuple[str, str, str], ...] = ()  #: to type in: name, label, default
    routers: bool = False  #: whether one chooses routers, too: processes other than the engines

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)


HALF, QUARTER, SIXTH = COLUMNS // 2, COLUMNS // 4, COLUMNS // 6


def graph(
    title: str,
    unit: str,
    text: str,
    *queries: Query,
    width: int = COLUMNS // 3,
    stacked: bool = False,
    zero_based: bool = True,
    axis_to: float | None = None,
) -> Panel:
    """Lines over time."""
    return Panel(
        title, "timeseries", unit, text, queries, width, stacked=stacked, zero_based=zero_based, axis_to=axis_to
    )


def stat(title: str, unit: str, text: str, expr: str, width: int, over_range: bool = False) -> Panel:
    """One number: the latest, or that of the whole time range."""
    return Panel(title, "stat", unit, text, (Query(expr),), width, height=5, over_range=over_range)


def table(title: str, text: str, *queries: Query, width: int = COLUMNS // 3) -> Panel:
    """A line for each engine. A query with a legend is a column of that name; of one without, only labels show."""
    return Panel(title, "table", "short", text, queries, width)


def metrics_in(expr: str) -> tuple[str, ...]:
    """Names of metrics in a query, as the tables have them: without a histogram's _bucket, _sum or _count."""
    found: dict[str, None] = {}
    for word in re.findall(r"(?:energylens_|vllm:)\w+", re.sub(r"\w+:energylens_\w+:\w+", "", expr)):
        name = word
        if name not in EXPORTED and name not in VLLM:
            name = re.sub(r"_(bucket|sum|count)$", "", word)
        found[name] = None
    return tuple(found)


def to_json(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "annotations": {"list": []},
        "description": dashboard.text,
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,  # one crosshair: latency and energy are read at the same moment
        "id": None,
        "links": [
            {
                "asDropdown": False,
                "icon": "external link",
                "includeVars": True,
                "keepTime": True,
                "tags": [TAG],
                "targetBlank": False,
                "title": "Energy",
                "tooltip": "",
                "type": "dashboards",
                "url": "",
            }
        ],
        "panels": _grid(dashboard.rows),
        "refresh": "30s",
        "schemaVersion": 39,
        "tags": [TAG, "vllm"],
        "templating": {"list": _variables(dashboard)},
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": dashboard.title,
        "uid": dashboard.uid,
        "version": 1,
        "weekStart": "",
    }


def _grid(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Panels from left to right, rows from top to bottom."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        grid = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        placed.append(
            {
                "collapsed": False,
                "gridPos": grid,
                "id": len(placed) + 1,
                "panels": [],
                "title": row.title,
                "type": "row",
            }
        )
        y, x, line = y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                y, x, line = y + line, 0, 0
            position = {"h": panel.height, "w": panel.width, "x": x, "y": y}
            placed.append(_panel(panel, len(placed) + 1, position))
            x, line = x + panel.width, max(line, panel.height)
        y += line
    return placed


def _panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    names = ", ".join(f"`{name}`" for name in panel.metrics)
    once = panel.over_range or panel.kind in ("table", "bargauge")
    overrides = [_override(query, letter) for query, letter in _lettered(panel) if query.unit or query.axis == "right"]
    result = {
        "datasource": DATASOURCE,
        "description": f"{panel.text}\n\nMetric: {names}",
        "fieldConfig": {"defaults": _defaults(panel), "overrides": overrides},
        "gridPos": position,
        "id": number,
        "options": _options(panel),
        "targets": [_target(panel, query, letter, once) for query, letter in _lettered(panel)],
        "title": panel.title,
        "type": panel.kind,
    }
    if panel.kind == "table":
        result["transformations"] = _table_transformations(panel)
    return result


def _lettered(panel: Panel) -> list[tuple[Query, str]]:
    return [(query, chr(ord("A") + i)) for i, query in enumerate(panel.queries)]


def _target(panel: Panel, query: Query, letter: str, once: bool) -> dict[str, Any]:
    kinds = {"table": "table", "heatmap": "heatmap"}
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "format": kinds.get(panel.kind, "time_series"),
        "instant": once,
        "legendFormat": query.legend or "__auto",
        "range": not once,
        "refId": letter,
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "noValue": EMPTY,
        "thresholds": {"mode": "absolute", "steps": [{"color": "blue", "value": None}]},
        "unit": panel.unit,
    }
    if panel.zero_based and panel.kind in ("timeseries", "bargauge"):
        defaults["min"] = 0
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 40 if panel.stacked else 8,
            "lineWidth": 1,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"group": "A", "mode": "normal" if panel.stacked else "none"},
        }
        if panel.axis_to is not None:
            defaults["custom"]["axisSoftMax"] = panel.axis_to
    return defaults


def _override(query: Query, letter: str) -> dict[str, Any]:
    properties: list[dict[str, Any]] = []
    if query.unit:
        properties.append({"id": "unit", "value": query.unit})
    if query.axis == "right":
        properties.append({"id": "custom.axisPlacement", "value": "right"})
    return {"matcher": {"id": "byFrameRefID", "options": letter}, "properties": properties}


def _options(panel: Panel) -> dict[str, Any]:
    latest = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    if panel.kind == "stat":
        return {"colorMode": "value", "graphMode": "none" if panel.over_range else "area", "reduceOptions": latest}
    if panel.kind == "bargauge":
        return {"displayMode": "basic", "orientation": "horizontal", "reduceOptions": latest}
    if panel.kind == "timeseries":
        return {
            "legend": {"calcs": ["mean"], "displayMode": "table", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Blues", "steps": 32, "reverse": False, "exponent": 0.5},
            "yAxis": {"axisPlacement": "left", "unit": panel.unit},
        }
    return {"showHeader": True}


def _table_transformations(panel: Panel) -> list[dict[str, Any]]:
    """One line an engine, one column a query, named by its legend; one without is left out: only its labels matter."""
    values = {f"Value #{letter}": query.legend for query, letter in _lettered(panel)}
    if len(panel.queries) == 1:
        values = {"Value": panel.queries[0].legend}
    hidden = {"Time": True} | {column: True for column, legend in values.items() if not legend}
    renamed = {column: legend for column, legend in values.items() if legend}
    return [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": hidden, "indexByName": {}, "renameByName": renamed}},
    ]


def _variables(dashboard: Dashboard) -> list[dict[str, Any]]:
    source = {
        "current": {},
        "hide": 0,
        "label": "Data source",
        "name": "datasource",
        "options": [],
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "type": "datasource",
    }
    engines, chosen = [], ""
    for name in ("job", "model_name", "instance", "engine"):
        engines.append(_choice(name, f"{_ANY}{{{chosen}}}" if chosen else _ANY, name))
        chosen = ", ".join(filter(None, [chosen, f'{name}=~"${name}"']))
    routers = [_choice("router", DECISIONS, "job")] if dashboard.routers else []
    return [source, *engines, *routers, *(_number(*number) for number in dashboard.numbers)]


def _choice(name: str, series: str, label: str) -> dict[str, Any]:
    """A variable: any of the values that a label has."""
    query = f"label_values({series}, {label})"
    return {
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "datasource": DATASOURCE,
        "definition": query,
        "hide": 0,
        "includeAll": True,
        "label": name,
        "multi": True,
        "name": name,
        "options": [],
        "query": {"qryType": 1, "query": query, "refId": "variable"},
        "refresh": 2,
        "regex": "",
        "sort": 1,
        "type": "query",
    }


def _number(name: str, label: str, default: str) -> dict[str, Any]:
    return {
        "current": {"text": default, "value": default},
        "hide": 0,
        "label": label,
        "name": name,
        "options": [{"selected": True, "text": default, "value": default}],
        "query": default,
        "type": "textbox",
    }
