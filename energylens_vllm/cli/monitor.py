"""Watch a running vLLM: starts Prometheus with the energy rules on loopback and says its URL.

    energylens monitor
    energylens monitor 127.0.0.1:8000 127.0.0.1:8001 --storage ~/energy

Needs the program `prometheus` (Debian: apt-get install --no-install-recommends prometheus). It runs until it is
stopped with Ctrl-C. Without --storage, what was scraped is dropped then. For dashboards, import the files that it names
into a Grafana whose data source is that URL; docs/dashboards.md has a docker-compose file with both.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import yaml

from energylens_vllm import dashboards
from energylens_vllm.dashboards import manifests
from energylens_vllm.errors import EnergyLensError

FOLDER = Path(dashboards.__file__).parent
INSTALL = "apt-get install --no-install-recommends prometheus"
START_S = 30.0  #: Prometheus replays its log when it starts on an old --storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "servers",
        nargs="*",
        metavar="HOST:PORT",
        default=[f"127.0.0.1:{manifests.VLLM_PORT}"],
        help=f"vLLM's API servers (default: 127.0.0.1:{manifests.VLLM_PORT})",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=manifests.PROMETHEUS_PORT,
        help="the port on 127.0.0.1 where Prometheus listens (default: %(default)s)",
    )
    parser.add_argument("--storage", type=Path, metavar="DIR", help="keep what is scraped in this folder")


def run(args: argparse.Namespace) -> int:
    program = shutil.which("prometheus")
    if program is None:
        raise EnergyLensError(f"monitor: the program prometheus is not installed; {INSTALL}")
    for server in args.servers:
        _check(server)
    with tempfile.TemporaryDirectory(prefix="energylens-monitor-") as folder:
        config = Path(folder) / "prometheus.yml"
        rules = FOLDER / "prometheus" / manifests.RULES_FILE
        config.write_text(yaml.safe_dump(manifests.prometheus_config(args.servers, str(rules))))
        storage = args.storage.expanduser().resolve() if args.storage else Path(folder) / "data"
        with _prometheus(program, config, storage, args.port) as process:
            url = f"http://127.0.0.1:{args.port}"
            print(f"Prometheus: {url}/graph, alerts: {url}/alerts")
            print(f"Dashboards for Grafana: {FOLDER / 'grafana'}", flush=True)
            return 1 if process.wait() else 0


def _check(server: str) -> None:
    """Raises EnergyLensError if there is no vLLM at `server`, or one without the plugin."""
    parts = urlsplit(f"http://{server}")
    if not parts.hostname or parts.path or parts.query or "@" in server:
        raise EnergyLensError(f"monitor: {server!r} is not an address; accepted: HOST:PORT, such as 127.0.0.1:8000")
    try:
        with urllib.request.urlopen(f"http://{server}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise EnergyLensError(f"monitor: no vLLM answers at http://{server}/metrics: {reason}") from None
    if "\nenergylens_" not in text:
        raise EnergyLensError(
            f"monitor: http://{server}/metrics has no energylens_ metrics; start vLLM with `--plugin energylens`"
        )


@contextlib.contextmanager
def _prometheus(program: str, config: Path, storage: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The running server, which is stopped at the end, also when we are told to end."""
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={storage}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    before = signal.signal(signal.SIGTERM, _interrupt)
    process = subprocess.Popen(command)
    try:
        _await_ready(process, port)
        yield process
    finally:
        process.terminate()
        process.wait()
        signal.signal(signal.SIGTERM, before)


def _await_ready(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5):
                # Somebody else's server may answer at that port, while ours cannot have it.
                time.sleep(0.2)
                if process.poll() is None:
                    return
        except OSError:
            time.sleep(0.1)
    raise EnergyLensError(f"monitor: Prometheus did not start on port {port}; what it said stands above")


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else 0
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; accepted: 1 to 65535")
    return port


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
