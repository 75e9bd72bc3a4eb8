"""Decisions in Ray's own metrics: processes of a cluster have no /metrics, each node's agent has one for them all."""

from __future__ import annotations

from ray.util import metrics

from energylens_vllm.routing.decisions import METRICS, Count


def ray_count() -> Count:
    """Counts in Ray counters, which the agent exports as `ray_energylens_routing_..._total`."""
    # Ray appends _total by itself.
    counters = {
        metric.name: metrics.Counter(
            metric.name.removesuffix("_total"), description=metric.help, tag_keys=metric.label_names
        )
        for metric in METRICS
    }
    names = {metric.name: metric.label_names for metric in METRICS}

    def count(name: str, value: float, labels: tuple[str, ...]) -> None:
        if value > 0:  # Ray refuses to add nothing
            counters[name].inc(value, dict(zip(names[name], labels, strict=True)))

    return count
