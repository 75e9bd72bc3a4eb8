"""A real vLLM that traces: its metrics arrive by OTLP, and each request's span says what the request cost."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("opentelemetry.proto")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "hooks"))

from receiver import Received, Series, attributes, grpc_receiver, on_metrics
from server import Server, serving

from energylens_vllm.serving.metrics import METRICS
from energylens_vllm.serving.trace import ATTRIBUTES

pytestmark = [pytest.mark.vllm, pytest.mark.nightly]

TRACE = "0af7651916cd43dd8448eb211c80319c"
#: requests by what they say of their trace -> traceparent; and tokens of their prompts, by which they are told apart
PARENTS = {
    "without": None,
    "sampled": f"00-{TRACE}-b7ad6b7169203331-01",
    "unsampled": f"00-{TRACE}-b7ad6b7169203332-00",
}
PROMPTS = {"without": 40, "sampled": 50, "unsampled": 60}
FINISHED = 'energylens_request_energy_joules_count{engine="0",phase="decode"}'


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def complete(server: Server, tokens: int, traceparent: str | None = None) -> dict[str, object]:
    prompt = [5, *(i % 200 for i in range(1, tokens))]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
    headers = {"Content-Type": "application/json"} | ({"traceparent": traceparent} if traceparent else {})
    with urlopen(Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers), timeout=60) as response:
        answer: dict[str, object] = json.load(response)
        return answer


def wait(until: Callable[[], bool], what: Callable[[], object], timeout_s: float = 30.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < end_s, what()
        time.sleep(0.2)


def requests(received: Received) -> list[Any]:
    return [span for span in received.spans if span.name == "llm_request"]


def counters(series: dict[Series, float]) -> dict[Series, float]:
    """Without gauges, which tell of the moment at which they were read."""
    gauges = {metric.name for metric in METRICS if metric.type == "gauge"}
    return {key: value for key, value in series.items() if key[0] not in gauges}


def test_metrics_and_spans_arrive_and_without_a_receiver_serving_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    quick = {"OTEL_METRIC_EXPORT_INTERVAL": "500", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with ExitStack() as until_gone:
        endpoint, received = until_gone.enter_context(grpc_receiver())
        arguments = ("--plugin=energylens", '--energylens={"attribution": true}', f"--otlp-traces-endpoint={endpoint}")
        with serving(tiny_model, tmp_path, free_port(), *arguments, **quick) as server:
            for name, parent in PARENTS.items():
                assert "energylens" not in json.dumps(complete(server, PROMPTS[name], parent))
            samples = server.metrics_when(lambda samples: samples[FINISHED] == 3)
            check_metrics(server, received)
            check_spans(received, sum(v for name, v in samples.items() if "_attributed_energy_joules_total" in name))
            until_gone.close()
            for _ in range(3):
                complete(server, 30)
            samples = server.metrics_when(lambda samples: samples[FINISHED] == 6)
            assert not any(value for name, value in samples.items() if "_plugin_failures_total" in name)


def check_metrics(server: Server, received: Received) -> None:
    """All that is shown arrives."""
    shown = counters(on_metrics(server.call("/metrics")))
    assert len(shown) > 80
    wait(lambda: shown.items() <= received.values.items(), lambda: shown.items() - received.values.items())


def check_spans(received: Received, charged_j: float) -> None:
    """Those of the requests that are sampled say what they cost."""
    wait(lambda: len(requests(received)) >= 2, lambda: received.spans)
    spans = {attributes(span)["gen_ai.usage.prompt_tokens"]: span for span in requests(received)}
    assert set(spans) == {PROMPTS["without"], PROMPTS["sampled"]}  # vLLM itself makes none of the third
    assert spans[PROMPTS["sampled"]].trace_id.hex() == TRACE
    total_j = 0.0
    for span in spans.values():
        told = attributes(span)
        assert {*ATTRIBUTES} <= told.keys()
        assert told["energylens.energy_j"] == told["energylens.prefill_energy_j"] + told["energylens.decode_energy_j"]
        assert told["energylens.prefill_energy_j"] > 0 < told["energylens.decode_energy_j"]
        assert told["energylens.complete"] is True
        assert told["gen_ai.usage.completion_tokens"] == 8
        total_j += told["energylens.energy_j"]
    assert 0.5 * charged_j < total_j < charged_j  # the third request is charged, too
