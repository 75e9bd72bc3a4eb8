"""docs/metrics.md: what is exported and where it is shown; docs/dashboards.md: how to run that, and what shows what."""

from __future__ import annotations

from energylens_vllm.dashboards.boards import DASHBOARDS
from energylens_vllm.dashboards.manifests import GRAFANA_PORT, PROMETHEUS_PORT
from energylens_vllm.dashboards.panel import metrics_in
from energylens_vllm.dashboards.promql import VLLM, QueryError
from energylens_vllm.dashboards.rules import ALERTS, RECORDINGS
from energylens_vllm.metric import Metric
from energylens_vllm.routing import decisions
from energylens_vllm.serving.metrics import COMMON_LABELS, MAX_SERIES_PER_ENGINE, METRICS

_NOTE = "<!-- Written by `python -m energylens_vllm.dashboards.generate`; edit the code it is made from. -->"
_INTRODUCTION = f"""# Dashboards, rules and alerts
{_NOTE}

Everything in `dashboards/` is made by `python -m energylens_vllm.dashboards.generate` from the table of metrics that
the plugin and routers export ([metrics.md](metrics.md)): a query for a metric or a label that is not in it is an error
there.

## Running it

| how | what it starts |
| --- | --- |
| `energylens monitor` | Debian's Prometheus with the rules, on loopback, beside a vLLM that runs on this machine |
| `docker-compose -f dashboards/compose/docker-compose.yml up` | Prometheus (:{PROMETHEUS_PORT}) and Grafana \
(:{GRAFANA_PORT}) on 127.0.0.1 in the host's network, with data source and dashboards |
| `kubectl apply -f dashboards/kubernetes` | a vLLM with the plugin, a PodMonitor, a PrometheusRule (both for the \
Prometheus operator) and ConfigMaps for Grafana's sidecar |

To use a Grafana of your own, import the files in `dashboards/grafana/` (Grafana 11 to 13) and choose the data source.
The init container in `kubernetes/vllm.yml` installs the plugin from the cluster's package index: put the wheel there,
or replace the argument by a URL. Alerts are explained in [runbook.md](runbook.md).

## Reading them

- **Measured** figures come from the GPUs' energy counters and contain idle time. **Predicted** figures are of steps
  only. Over the windows on the accuracy dashboard both cover the same time.
- GPUs cannot tell prefill from decode. Figures by phase and by component are predicted; the measured energy per token
  of a phase is apportioned by the predicted shares.
- Emissions and cost take the carbon intensity, the price and the PUE from the boxes at the top. They are of GPUs only.
- A panel without data says "No traffic". A ratio is left out, not 0, where there is nothing to divide by.
- A counter moves when the engine reports: each 2 s while it is busy (setting `report_interval_s`).

## Previews

Drawn by `tools/previews/render.sh` with Grafana's own components over two recorded runs of an H200. They are no
screenshots of Grafana, whose frame, tables and heatmaps look otherwise. vLLM's latencies in them are step durations of
the recordings; experts are chosen evenly; and the router's requests are made up, their ranking is not.

| | |
| --- | --- |
| ![Overview](previews/overview.png) | ![Accuracy](previews/accuracy.png) |
| ![Experts and parallelism](previews/parallelism.png) | ![Fleet](previews/fleet.png) |
"""


def metrics_page() -> str:
    """docs/metrics.md. Raises QueryError for a metric that no panel shows."""
    common = " and ".join(f"`{label}`" for label in COMMON_LABELS)
    head = ["| metric | type | unit | further labels | meaning | shown in |", "| --- | --- | --- | --- | --- | --- |"]
    return "\n".join(
        [
            "# Metrics",
            _NOTE,
            "",
            "The last column names panels, with their dashboard, and rules: [dashboards.md](dashboards.md).",
            "",
            "## The vLLM plugin's",
            "",
            f"All have the labels {common}, with the values that vLLM's own metrics have. An engine has at most",
            f"{MAX_SERIES_PER_ENGINE} series. Times are in seconds, energies in joules over all GPUs of the engine.",
            "",
            *head,
            *(_metric_row(metric) for metric in METRICS),
            "",
            "## Routers'",
            "",
            "Exported by the process that routes: a LiteLLM proxy, `energylens agent`, a Ray Serve router.",
            "",
            *head,
            *(_metric_row(metric) for metric in decisions.METRICS),
            "",
            "## vLLM's own that are shown beside them",
            "",
            "| metric | type | shown in |",
            "| --- | --- | --- |",
            *(f"| `{name}` | {kind} | {_shown_in(name)} |" for name, (kind, _) in VLLM.items()),
            "",
        ]
    )


def _metric_row(metric: Metric) -> str:
    labels = "; ".join(f"`{name}`" + (f": {', '.join(values)}" if values else "") for name, values in metric.labels)
    cells = (metric.type, metric.unit or "-", labels or "-", metric.help, _shown_in(metric.name))
    return f"| `{metric.name}` | {' | '.join(cells)} |"


def _shown_in(metric: str) -> str:
    panels = [
        f"{panel.title} ({board.uid.removeprefix('energylens-')})"
        for board in DASHBOARDS
        for panel in board.panels
        if metric in panel.metrics
    ]
    if not panels:
        raise QueryError(f"dashboards: no panel shows {metric}; accepted: each metric on one or more")
    rules = [f"`{rule.name}`" for rule in (*RECORDINGS, *ALERTS) if metric in metrics_in(rule.expr)]
    return "; ".join([*panels, *rules])


def dashboards_page() -> str:
    """docs/dashboards.md."""
    parts = [_INTRODUCTION]
    parts += ["## Panels", "", "| dashboard | panel | shows |", "| --- | --- | --- |"]
    parts += [f"| {board.title} | {panel.title} | {panel.text} |" for board in DASHBOARDS for panel in board.panels]
    parts += ["", "## Recording rules", "", "| rule | expression |", "| --- | --- |"]
    parts += [f"| `{rule.name}` | `{rule.expr}` |" for rule in RECORDINGS]
    parts += ["", "## Alerts", "", "| alert | fires when | for | severity |", "| --- | --- | --- | --- |"]
    parts += [f"| [{a.name}](runbook.md#{a.name.lower()}) | `{a.expr}` | {a.after} | {a.severity} |" for a in ALERTS]
    return "\n".join(parts) + "\n"
