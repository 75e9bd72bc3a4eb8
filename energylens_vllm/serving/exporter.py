"""Reports of engines -> Prometheus metrics of this process, in single- and multi-process mode.

In multi-process mode (more than one API server) each process writes its values to a file in PROMETHEUS_MULTIPROC_DIR:
counters and histograms are summed over processes when scraped, and a gauge shows what was set last by any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.serving.guard import FAILURES, Guard
from energylens_vllm.serving.increments import Report
from energylens_vllm.serving.metrics import BY_NAME, COMMON_LABELS, MAX_SERIES_PER_ENGINE, METRICS, Metric

Collector = Counter | Gauge | Histogram

#: what this process has registered; a second exporter in it goes on with the same metrics
_registered: dict[tuple[CollectorRegistry, str], Collector] = {}


class Exporter:
    """Exports the metrics of the engines of one model."""

    def __init__(self, model_name: str, engines: Iterable[int], registry: CollectorRegistry = REGISTRY) -> None:
        self._model_name = model_name
        self._registry = registry
        self.collectors = {metric.name: _collector(metric, registry) for metric in METRICS}
        #: get each observation of a histogram: its name, the value and all labels
        self.observed: list[Callable[[str, float, dict[str, str]], None]] = []
        self._children: dict[tuple[int, str, tuple[str, ...]], Collector] = {}
        self._series: dict[int, int] = {}
        self._guard = Guard()
        for engine in engines:
            for metric in METRICS:
                for labels in metric.known_label_values():
                    self._child(engine, metric.name, labels)

    def set_build_info(self, version: str, vllm_version: str) -> None:
        """Say which releases run, for each engine."""
        for engine in list(self._series):
            self._gauge(engine, "energylens_build_info", (version, vllm_version)).set(1)

    def export(self, engine: int, reports: Sequence[Report]) -> None:
        """Add the reports of an engine. What cannot be exported is counted and left out; nothing is raised."""
        with self._guard.at("export"):
            self._register_again()
        for report in reports:
            for name, labels, value in report.get("add", ()):
                with self._guard.at("export"):
                    self._counter(engine, name, tuple(labels)).inc(value)
            for name, labels, value in report.get("set", ()):
                with self._guard.at("export"):
                    self._gauge(engine, name, tuple(labels)).set(value)
            for name, labels, values in report.get("observe", ()):
                with self._guard.at("export"):
                    histogram = self._histogram(engine, name, tuple(labels))
                    for value in values:
                        histogram.observe(value)
                    for tell in self.observed:
                        all_labels = self._labels(engine, name, tuple(labels))
                        for value in values:
                            tell(name, value, all_labels)
        self._count_failures(engine)

    def refuse(self, engine: int, problem: str) -> None:
        """Count that something came from an engine which cannot be a report."""
        with self._guard.at("export"):
            raise EnergyLensError(problem)
        self._count_failures(engine)

    def _count_failures(self, engine: int) -> None:
        for place, failures in self._guard.take():
            self._counter(engine, FAILURES, (place,)).inc(failures)

    def _register_again(self) -> None:
        """If somebody has emptied the registry, have it show our metrics again, whose values go on."""
        try:
            self._registry.register(self.collectors[FAILURES])
        except ValueError:  # it is there, as it should be
            return
        for name, collector in self.collectors.items():
            if name != FAILURES:
                self._registry.register(collector)
        raise EnergyLensError("the metrics had been removed from the registry; they are there again")

    def _counter(self, engine: int, name: str, labels: tuple[str, ...]) -> Counter:
        child = self._child(engine, name, labels)
        assert isinstance(child, Counter), name
        return child

    def _gauge(self, engine: int, name: str, labels: tuple[str, ...]) -> Gauge:
        child = self._child(engine, name, labels)
        assert isinstance(child, Gauge), name
        return child

    def _histogram(self, engine: int, name: str, labels: tuple[str, ...]) -> Histogram:
        child = self._child(engine, name, labels)
        assert isinstance(child, Histogram), name
        return child

    def _labels(self, engine: int, name: str, labels: tuple[str, ...]) -> dict[str, str]:
        names = (*COMMON_LABELS, *BY_NAME[name].label_names)
        return dict(zip(names, (self._model_name, str(engine), *labels), strict=True))

    def _child(self, engine: int, name: str, labels: tuple[str, ...]) -> Collector:
        child = self._children.get((engine, name, labels))
        if child is None:
            size = 1 if (metric := BY_NAME[name]).type != "histogram" else len(metric.buckets) + 3
            series = self._series.get(engine, 0) + size
            if series > MAX_SERIES_PER_ENGINE:
                raise EnergyLensError(f"{name}{labels}: engine {engine} would have {series} series")
            self._series[engine] = series
            child = self.collectors[name].labels(self._model_name, str(engine), *labels)
            self._children[engine, name, labels] = child
        return child


def _collector(metric: Metric, registry: CollectorRegistry) -> Collector:
    try:
        collector = _new_collector(metric, registry)
    except ValueError:  # its name is taken: by an earlier exporter of this process, or by someone else
        if (registry, metric.name) not in _registered:
            raise
        return _registered[registry, metric.name]
    _registered[registry, metric.name] = collector
    return collector


def _new_collector(metric: Metric, registry: CollectorRegistry) -> Collector:
    labels = (*COMMON_LABELS, *metric.label_names)
    if metric.type == "counter":
        return Counter(metric.name, metric.help, labels, registry=registry)
    if metric.type == "gauge":
        return Gauge(metric.name, metric.help, labels, registry=registry, multiprocess_mode="mostrecent")
    return Histogram(metric.name, metric.help, labels, registry=registry, buckets=metric.buckets)
