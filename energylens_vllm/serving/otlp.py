"""The figures of /metrics by OTLP, too, for who collects with OpenTelemetry.

Each instrument is made of a line of the table of metrics and observes what Prometheus shows of this process, so both
say the same; histograms are recorded as they are observed. Names are Prometheus' own, less `_total`, and units are such
that a collector or a Prometheus that receives OTLP makes the same names of them: the dashboards and rules fit.

Where to: `OTEL_EXPORTER_OTLP_METRICS_ENDPOINT` or `OTEL_EXPORTER_OTLP_ENDPOINT`, else where vLLM sends its traces
(`--otlp-traces-endpoint`). The SDK's other variables hold (protocol, headers, TLS, OTEL_METRIC_EXPORT_INTERVAL, ...).
`OTEL_METRICS_EXPORTER=none` switches it off, as does OTEL_SDK_DISABLED. A thread of the SDK's sends; serving never
waits for it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from multiprocessing.util import Finalize
from typing import Any

from energylens_vllm import __version__
from energylens_vllm.errors import EnergyLensError, unknown
from energylens_vllm.metric import Metric
from energylens_vllm.serving.exporter import Collector, Exporter
from energylens_vllm.serving.metrics import METRICS

logger = logging.getLogger("energylens_vllm")

OWN_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("grpc", "http/protobuf")
#: UCUM, as OpenTelemetry wants it. A ratio has none: with "1", Prometheus would add `_ratio` to a gauge's name.
UNITS = {"joules": "J", "seconds": "s", "watts": "W", "hertz": "Hz", "celsius": "Cel", "": ""}
#: A server that stops sends what is left; a receiver that is gone holds it up no longer than this.
LAST_WORDS_S = 2.0

Record = Callable[[str, float, dict[str, str]], None]  #: records what a histogram has observed: name, value, labels
#: of this process, once it sends; a second exporter shows the same collectors
_record: Record | None = None


def start(exporter: Exporter, traces_endpoint: str | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Send what `exporter` exports, if there is an endpoint. Gives whether it does. Raises nothing: without what it
    needs (the extra `otel`; vLLM has it) or with settings that it does not know, it says so in the log."""
    global _record
    if not _is_wanted(traces_endpoint, environ):
        return False
    try:
        _record = _record or _send(exporter, _sender(traces_endpoint, environ), environ)
    except Exception as error:
        logger.warning("no metrics by OTLP: %s: %s", type(error).__name__, error)
        return False
    exporter.observed.append(_record)
    return True


def _is_wanted(traces_endpoint: str | None, environ: Mapping[str, str]) -> bool:
    if environ.get("OTEL_METRICS_EXPORTER") == "none" or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return bool(traces_endpoint or environ.get(OWN_ENDPOINTS[0]))


def _sender(traces_endpoint: str | None, environ: Mapping[str, str]) -> Any:
    """The SDK's exporter. Raises EnergyLensError for a protocol or an endpoint that it cannot be made for."""
    signals = ("METRICS_PROTOCOL", "PROTOCOL", "TRACES_PROTOCOL")
    protocol = next(filter(None, (environ.get(f"OTEL_EXPORTER_OTLP_{signal}") for signal in signals)), "grpc")
    if protocol not in PROTOCOLS:
        raise unknown("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", protocol, PROTOCOLS)
    own = any(environ.get(name) for name in OWN_ENDPOINTS)  # the SDK reads them itself
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc

        return Grpc() if own else Grpc(endpoint=traces_endpoint, insecure=True)  # as vLLM sends its traces
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http

    if own:
        return Http()
    base, found, rest = str(traces_endpoint).rpartition("/v1/traces")
    if not found or rest:
        raise EnergyLensError(
            f"--otlp-traces-endpoint {traces_endpoint} does not end in /v1/traces; accepted: {OWN_ENDPOINTS[0]}"
        )
    return Http(endpoint=f"{base}/v1/metrics")


def _send(exporter: Exporter, sender: Any, environ: Mapping[str, str]) -> Record:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
    from opentelemetry.sdk.resources import Resource

    views = [
        View(instrument_name=_name(metric), aggregation=ExplicitBucketHistogramAggregation(metric.buckets))
        for metric in METRICS
        if metric.type == "histogram"
    ]
    # Each API server has its own share of the counters, so each is an instance of its own.
    instance = {"service.instance.id": f"{socket.gethostname()}-{os.getpid()}"}
    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create(instance if named else {**instance, "service.name": "vllm"})
    provider = MeterProvider([PeriodicExportingMetricReader(sender)], resource, shutdown_on_exit=False, views=views)
    meter = provider.get_meter("energylens_vllm", __version__)
    record: dict[str, Callable[[float, dict[str, str]], None]] = {}
    for metric in METRICS:
        arguments = {"unit": _unit(metric), "description": metric.help}
        observe = _observer(exporter.collectors[metric.name])
        if metric.type == "counter":
            meter.create_observable_counter(_name(metric), [observe], **arguments)
        elif metric.type == "gauge":
            meter.create_observable_gauge(_name(metric), [observe], **arguments)
        else:
            record[metric.name] = meter.create_histogram(_name(metric), **arguments).record
    # With several API servers each is a process of multiprocessing, which leaves `atexit` out.
    Finalize(None, provider.shutdown, kwargs={"timeout_millis": LAST_WORDS_S * 1e3}, exitpriority=0)
    return lambda name, value, labels: record[name](value, labels)


def _observer(collector: Collector) -> Callable[[object], list[Any]]:
    """What a counter or a gauge of Prometheus shows, each time that it is asked for."""
    from opentelemetry.metrics import Observation

    def observe(_: object) -> list[Any]:
        samples = [sample for family in collector.collect() for sample in family.samples]
        return [Observation(s.value, s.labels) for s in samples if not s.name.endswith("_created")]

    return observe


def _name(metric: Metric) -> str:
    return metric.name.removesuffix("_total")


def _unit(metric: Metric) -> str:
    return UNITS.get(metric.unit, f"{{{metric.unit}}}")
