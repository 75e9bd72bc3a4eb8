"""`energylens record` on a real server, and `energylens replay` of what it recorded."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from energylens_vllm.calibrate.recording import load

sys.path.insert(0, str(Path(__file__).parent))
from server import Server, serving

pytestmark = [pytest.mark.vllm, pytest.mark.nightly]
PORT = 8814


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("record")
    settings = json.dumps({"report_interval_s": 0.5, "recording_folder": str(folder / "engines"), "gpu": "H100-SXM"})
    with serving(tiny_model, folder, PORT, "--energylens", settings) as started:
        yield started


def record(server: Server, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "energylens_vllm.cli", "record", server.url, "--folder"]
    command += [str(server.log.parent / "engines"), "--out", str(folder / "steps.npz"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def work(server: Server, until: threading.Event) -> None:
    while not until.is_set():
        server.complete_all([40, 9, 70], max_tokens=20)


def test_record_and_replay(server: Server, tmp_path: Path) -> None:
    done = threading.Event()
    worker = threading.Thread(target=work, args=(server, done))
    worker.start()
    try:
        process = record(server, tmp_path, "--for", "4s")
        output, errors = process.communicate(timeout=60)
    finally:
        done.set()
        worker.join()
    assert process.returncode == 0, errors
    recording = load(tmp_path / "steps.npz")
    assert len(recording) > 20
    assert 2 < recording.end_s[-1] - recording.start_s[0] < 8
    assert set(recording.new_tokens[recording.computed_tokens > 0]) >= {1}
    assert recording.new_tokens.max() >= 40 - 16  # a prompt, less what a block of the prefix cache may hold
    assert recording.capture_sizes == ()  # the server runs eager
    command = shlex.split(output.splitlines()[1])
    assert command[:2] == ["energylens", "replay"]
    assert command[command.index("--gpu") + 1] == "H100-SXM"
    scored = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(scored.stdout)
    tokens = sum(phase["tokens"] for phase in found["phases"])
    assert tokens == recording.new_tokens.sum()
    assert found["predicted_j"] > 0


def test_interrupted_it_keeps_what_there_is(server: Server, tmp_path: Path) -> None:
    done = threading.Event()
    worker = threading.Thread(target=work, args=(server, done))
    worker.start()
    try:
        process = record(server, tmp_path, "--for", "10m")
        status = next((server.log.parent / "engines").glob("*.json")).with_suffix(".status")
        end = time.monotonic() + 60
        while not (status.exists() and json.loads(status.read_text())["state"] == "recording"):
            assert time.monotonic() < end
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        done.set()
        worker.join()
    assert process.returncode == 0, errors
    with np.load(tmp_path / "steps.npz") as arrays:
        assert len(arrays["off"]) > 2
    assert not list((server.log.parent / "engines").glob("*.request"))


def test_nothing_to_record(server: Server, tmp_path: Path) -> None:
    process = record(server, tmp_path, "--for", "1s")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ran no step" in errors
    assert "energylens_plugin_failures_total" not in {name for name, value in server.metrics().items() if value}
