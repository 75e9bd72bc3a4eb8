"""Queries, written with the plugin's table of metrics at hand.

A name or a label that is not in the table is an error when the files are made, not an empty panel on somebody's wall.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.routing import decisions
from energylens_vllm.serving import metrics

#: what Prometheus adds when it scrapes
SCRAPED = ("job", "instance")
#: what tells one engine from another
ENGINE = (*SCRAPED, *metrics.COMMON_LABELS)
#: All that we export. Routers are processes other than the engines, and what they export is of no single engine.
EXPORTED = metrics.BY_NAME | decisions.BY_NAME

_LATENCY, _COUNTER, _GAUGE = "histogram", "counter", "gauge"
#: vLLM's own metrics that are shown beside ours: name -> (type, further labels)
VLLM: dict[str, tuple[str, tuple[str, ...]]] = {
    "vllm:time_to_first_token_seconds": (_LATENCY, ()),
    "vllm:inter_token_latency_seconds": (_LATENCY, ()),
    "vllm:e2e_request_latency_seconds": (_LATENCY, ()),
    "vllm:generation_tokens_total": (_COUNTER, ()),
    "vllm:prompt_tokens_total": (_COUNTER, ()),
    "vllm:request_success_total": (_COUNTER, ("finished_reason",)),
    "vllm:num_requests_running": (_GAUGE, ()),
    "vllm:num_requests_waiting": (_GAUGE, ()),
}


class QueryError(EnergyLensError):
    """A query that uses a metric or a label that is not exported."""


def metric_labels(name: str, kind: str) -> tuple[str, ...]:
    """All labels of a metric after scraping. Raises QueryError if there is none of that name and type."""
    found: str
    if name in EXPORTED:
        found, labels = EXPORTED[name].type, EXPORTED[name].label_names
    elif name in VLLM:
        found, labels = VLLM[name]
    else:
        raise QueryError(f"query: metric {name!r} is not exported; accepted: those of docs/metrics.md and {list(VLLM)}")
    if found != kind:
        raise QueryError(f"query: {name} is a {found}, it is used as a {kind}")
    return (*(SCRAPED if name in decisions.BY_NAME else ENGINE), *labels)


@dataclass(frozen=True, slots=True)
class Scope:
    """Which series queries see, over which time, and what results are grouped by in any case."""

    matchers: str
    window: str
    by: tuple[str, ...] = ()

    def rate(self, name: str, *by: str, over: str | None = None, **labels: str) -> str:
        """A counter's increase a second, summed."""
        return self._sum(f"rate({self._series(name, _COUNTER, by, labels)}[{over or self.window}])", by)

    def increase(self, name: str, *by: str, over: str | None = None, **labels: str) -> str:
        """A counter's increase, summed."""
        return self._sum(f"increase({self._series(name, _COUNTER, by, labels)}[{over or self.window}])", by)

    def gauge(
        self, name: str, *by: str, how: Literal["sum", "max", "min", "avg", "count"] = "sum", **labels: str
    ) -> str:
        """A gauge, aggregated."""
        return self._sum(self._series(name, _GAUGE, by, labels), by, how)

    def buckets(self, name: str, *by: str, over: str | None = None) -> str:
        """Observations of a histogram by upper bound."""
        self._series(name, _LATENCY, by, {})
        return self._sum(f"increase({name}_bucket{self._braces({})}[{over or self.window}])", (*by, "le"))

    def quantile(self, q: float, name: str, *by: str, over: str | None = None) -> str:
        """A quantile of what a histogram has observed."""
        self._series(name, _LATENCY, by, {})
        rates = self._sum(f"rate({name}_bucket{self._braces({})}[{over or self.window}])", (*by, "le"))
        return f"histogram_quantile({q}, {rates})"

    def mean(self, name: str, *by: str, over: str | None = None) -> str:
        """The mean of what a histogram has observed."""
        self._series(name, _LATENCY, by, {})
        parts = [
            self._sum(f"rate({name}_{part}{self._braces({})}[{over or self.window}])", by) for part in ("sum", "count")
        ]
        return ratio(*parts)

    def _series(self, name: str, kind: str, by: tuple[str, ...], labels: dict[str, str]) -> str:
        known = metric_labels(name, kind)
        if unknown := [label for label in (*by, *labels) if label not in known]:
            raise QueryError(f"query: {name} has no label {unknown[0]!r}; accepted: {', '.join(known)}")
        for label, value in labels.items():
            values = dict(EXPORTED[name].labels).get(label) if name in EXPORTED else None
            if values and value not in values:
                raise QueryError(f"query: {label} of {name} is never {value!r}; accepted: {', '.join(values)}")
        return name + self._braces(labels)

    def _braces(self, labels: dict[str, str]) -> str:
        matchers = [self.matchers] if self.matchers else []
        matchers += [f'{label}="{value}"' for label, value in labels.items()]
        return "{" + ", ".join(matchers) + "}" if matchers else ""

    def _sum(self, expression: str, by: tuple[str, ...], how: str = "sum") -> str:
        group = (*self.by, *by)
        return f"{how} by ({', '.join(group)}) ({expression})" if group else f"{how}({expression})"


def ratio(numerator: str, denominator: str) -> str:
    """A quotient that is absent, not NaN, where there is nothing to divide by."""
    return f"{numerator} / ({denominator} > 0)"


#: what a dashboard shows: the chosen engines together, unless grouped
CHOSEN = Scope('job=~"$job", model_name=~"$model_name", instance=~"$instance", engine=~"$engine"', "$__rate_interval")
#: and the chosen routers
ROUTERS = Scope('job=~"$router"', "$__rate_interval")
#: what rules are about: each engine by itself
EACH = Scope("", "5m", ENGINE)
#: and each router
EACH_ROUTER = Scope("", "5m", SCRAPED)
