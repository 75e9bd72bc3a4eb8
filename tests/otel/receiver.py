"""An OTLP receiver, by gRPC and by HTTP, made of OpenTelemetry's own protocol; and /metrics in the same terms."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, tuple[tuple[str, str], ...]]  #: name without _total, labels in order


@dataclass
class Received:
    """What came, as messages of the protocol. `metrics` and `spans` are of all of it."""

    metric_requests: list[Any] = field(default_factory=list)
    trace_requests: list[Any] = field(default_factory=list)

    @property
    def resources(self) -> list[dict[str, Any]]:
        return [_plain(r.resource.attributes) for request in self.metric_requests for r in request.resource_metrics]

    @property
    def metrics(self) -> dict[str, Any]:
        """name -> the latest message of that metric."""
        return {
            metric.name: metric
            for request in self.metric_requests
            for resource in request.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    @property
    def values(self) -> dict[Series, float]:
        """The latest value of each series of a counter or gauge; of a histogram, its sum as NAME_sum and so on."""
        found: dict[Series, float] = {}
        for name, metric in self.metrics.items():
            for point in (*metric.sum.data_points, *metric.gauge.data_points):
                found[name, _labels(point)] = point.as_double or float(point.as_int)
            for point in metric.histogram.data_points:
                found[f"{name}_sum", _labels(point)] = point.sum
                found[f"{name}_count", _labels(point)] = float(point.count)
                below = 0
                for bound, count in zip([*point.explicit_bounds, float("inf")], point.bucket_counts, strict=True):
                    below += count
                    found[f"{name}_bucket", _labels(point, le=bound)] = float(below)
        return found

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for request in self.trace_requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


def attributes(span: Any) -> dict[str, Any]:
    return _plain(span.attributes)


def _plain(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _labels(point: Any, **more: object) -> tuple[tuple[str, str], ...]:
    return _ordered(_plain(point.attributes) | more)


def _ordered(labels: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, str(value)) for name, value in labels.items()))


def on_metrics(text: str) -> dict[Series, float]:
    """Ours on /metrics. Histograms that nothing was observed in are left out, as OpenTelemetry does."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name.startswith("energylens_") else ():
            labels = {name: float(value) if name == "le" else value for name, value in sample.labels.items()}
            if not sample.name.endswith("_created") and (sample.value or family.type != "histogram"):
                found[sample.name.removesuffix("_total"), _ordered(labels)] = sample.value
    return found


@contextmanager
def grpc_receiver() -> Iterator[tuple[str, Received]]:
    """Its endpoint, and what it gets."""
    received = Received()

    class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            received.metric_requests.append(request)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    class Traces(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            received.trace_requests.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(4))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", received
    finally:
        server.stop(None).wait()


@contextmanager
def http_receiver() -> Iterator[tuple[str, Received]]:
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/metrics":
                received.metric_requests.append(metrics_service_pb2.ExportMetricsServiceRequest.FromString(body))
            self.send_response(200 if self.path == "/v1/metrics" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
