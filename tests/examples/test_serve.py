"""The README's first command, as a newcomer types it, against a real vLLM."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
COMMAND = "bash examples/serve.sh"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What the process prints up to and including a line with `words`, or all of it if there is none."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            break
    return "".join(lines)


def sums(text: str) -> dict[str, float]:
    """The sum over labels of each energylens_ sample in a scrape."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("energylens_"):
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_the_command_is_the_readmes_first() -> None:
    first = re.search(r"```bash\n(.*?)\n```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert first is not None
    assert first[1] == COMMAND


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not Path(sys.prefix, ".energylens").exists(), reason="not in an environment of tools/environment.sh"
)
def test_it_shows_joules_serves_metrics_and_stops_on_interrupt() -> None:
    port = free_port()
    environment = os.environ | {"VENV": sys.prefix, "PORT": str(port)}
    process = subprocess.Popen(
        COMMAND.split(), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        shown = read_until(process, "Serving at")
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
            metrics = sums(response.read().decode())
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        rest, _ = process.communicate(timeout=60)

    total = re.search(r"^total +(\d+) +([\d.]+ [mk]?J)$", shown, flags=re.MULTILINE)
    assert total is not None, shown + rest
    assert float(total[2].split()[0]) > 0
    assert metrics["energylens_predicted_energy_joules_total"] > 0
    assert metrics["energylens_predicted_component_energy_joules_total"] == pytest.approx(
        metrics["energylens_predicted_energy_joules_total"]
    )
    assert metrics["energylens_tokens_total"] == int(total[1])
    assert metrics["energylens_unpredicted_steps_total"] == 0
    assert metrics["energylens_plugin_failures_total"] == 0
    with pytest.raises(OSError, match="refused"):
        urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
