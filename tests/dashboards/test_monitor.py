"""`energylens monitor` against a server that shows what the plugin exports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_server import free_port

from energylens_vllm.cli import main
from energylens_vllm.serving.exporter import Exporter


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server's address, and what it shows on /metrics, which a test may change."""
    registry = CollectorRegistry()
    Exporter("m", [0], registry).export(0, [{"add": [("energylens_tokens_total", ("decode",), 7.0)]}])
    shown = [generate_latest(registry).decode()]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(shown[0].encode())

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{http.server_port}", shown
    http.shutdown()
    thread.join()
    http.server_close()


def ask(port: int, path: str) -> object:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10) as answer:
        return json.load(answer)["data"]


@pytest.mark.prometheus
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_scrapes_with_the_rules_and_stops_when_told(
    server: tuple[str, list[str]], tmp_path: Path, stop: signal.Signals
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "energylens_vllm.cli", "monitor", server[0], f"--port={port}"]
    command += [f"--storage={tmp_path / 'kept'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"Prometheus: http://127.0.0.1:{port}/graph, alerts: http://127.0.0.1:{port}/alerts\n"  # fmt: skip  # noqa: E501
        folder = Path(process.stdout.readline().partition(": ")[2].strip())
        assert (folder / "energylens-overview.json").is_file()
        for _ in range(200):
            found = ask(port, 'query?query=energylens_tokens_total{phase="decode"}')["result"]
            if found:
                break
            time.sleep(0.1)
        assert found[0]["value"][1] == "7"
        assert found[0]["metric"]["instance"] == server[0]
        groups = {group["name"] for group in ask(port, "rules")["groups"]}
        assert groups == {"energylens-recording", "energylens-alerts"}
    finally:
        process.send_signal(stop)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert (tmp_path / "kept").is_dir()
    with pytest.raises(OSError, match="refused"):
        ask(port, "rules")


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["monitor", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.prometheus
def test_bad_input_is_one_line(server: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no vLLM answers at" in failing(capsys, f"127.0.0.1:{free_port()}")
    assert "'http://a:1' is not an address; accepted: HOST:PORT" in failing(capsys, "http://a:1")
    server[1][0] = "# nothing\nvllm:num_requests_running 1\n"
    assert "has no energylens_ metrics; start vLLM with `--plugin energylens`" in failing(capsys, server[0])


def test_without_prometheus_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "apt-get install --no-install-recommends prometheus" in failing(capsys, "127.0.0.1:1")


@pytest.mark.prometheus
def test_a_port_that_is_taken(server: tuple[str, list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", server[0], "--port", server[0].partition(":")[2]]) == 2
    assert "Prometheus did not start on port" in capfd.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1"])
def test_a_port_that_is_none(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["monitor", f"--port={port}"])
    assert stopped.value.code == 2
    assert "accepted: 1 to 65535" in capsys.readouterr().err
