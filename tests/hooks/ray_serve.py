"""A cluster of `ray_cluster.py` in processes of its own, what is asked of it, and what is done to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from ray_python import ray_python

HERE = Path(__file__).parent
READY_S = 240


@dataclass
class Answer:
    """One request's answer, as far as it came."""

    wanted: int
    gpu: str = ""
    pids: list[int] = field(default_factory=list)  #: of its parts
    error: str = ""

    @property
    def complete(self) -> bool:
        return not self.error and len(self.pids) == self.wanted


class Cluster:
    """The applications of a running cluster."""

    def __init__(self, folder: Path, port: int, metrics_port: int, process: subprocess.Popen[str]) -> None:
        self.folder, self.port, self.metrics_port, self.process = folder, port, metrics_port, process

    def ask(self, app: str, prompt: str = "some words", max_tokens: int = 4, stream: bool = True) -> Answer:
        """One completion."""
        answer = Answer(max_tokens)
        body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "stream": stream}).encode()
        url = f"http://127.0.0.1:{self.port}/{app}/completions"
        try:
            with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=120) as response:
                for line in response:
                    part = json.loads(line)
                    answer.gpu = part["gpu"]
                    answer.pids.append(part["pid"])
        except (OSError, URLError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        return answer

    @contextmanager
    def load(self, app: str, every_s: float, max_tokens: int, stream: bool = True) -> Iterator[list[Answer]]:
        """Requests at a steady rate during the block; their answers, all of them, are there after it."""
        answers: list[Answer] = []
        threads: list[threading.Thread] = []
        stop = threading.Event()

        def arrive() -> None:
            while not stop.wait(every_s):
                thread = threading.Thread(target=lambda: answers.append(self.ask(app, "words", max_tokens, stream)))
                thread.start()
                threads.append(thread)

        arriving = threading.Thread(target=arrive)
        arriving.start()
        try:
            yield answers
        finally:
            stop.set()
            arriving.join()
            for thread in threads:
                thread.join()

    def replicas(self, app: str) -> dict[int, str]:
        """Process and GPU of an application's living replicas."""
        found = {}
        for path in self.folder.glob("replica-*"):
            name, gpu = path.read_text().split()
            pid = int(path.name.removeprefix("replica-"))
            if name == app and Path(f"/proc/{pid}").exists():
                found[pid] = gpu
        return found

    def wait_for(self, app: str, replicas: int) -> None:
        """Until Serve has replaced what has died."""
        end = time.monotonic() + READY_S
        while len(self.replicas(app)) < replicas:
            assert time.monotonic() < end, self.replicas(app)
            time.sleep(0.2)

    def stale(self, pid: int) -> None:
        """Have a replica say the same for ever."""
        (self.folder / f"stale-{pid}").touch()

    def scale(self, app: str, replicas: int) -> None:
        """Have an application's deployments have so many replicas, and wait until they have."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"scale": [app, replicas]}) + "\n")
        self.process.stdin.flush()
        assert _wait_for(self.process, "SCALED")

    def settle(self, app: str, gpu: str | None, timeout_s: float = 60) -> None:
        """Ask until answers come from `gpu` three times in a row: reports and step tables take their time."""
        end, in_row = time.monotonic() + timeout_s, 0
        while in_row < 3:
            answer = self.ask(app, max_tokens=1)
            in_row = in_row + 1 if answer.complete and answer.gpu == gpu else 0
            assert time.monotonic() < end, f"{app}: not on {gpu} but {answer}"
            time.sleep(0.1)

    def counted(self, name: str) -> Counter[str]:
        """Ray's counters of decisions: label values -> value, summed over processes."""
        found: Counter[str] = Counter()
        with urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as response:
            for line in response.read().decode().splitlines():
                if line.startswith(f"ray_{name}{{"):
                    label = re.search(r'(?:reason|cause|side)="(\w+)"', line)
                    found[label[1] if label else ""] += float(line.rsplit(" ", 1)[1])  # type: ignore[assignment]
        return found


@contextmanager
def cluster(
    folder: Path, port: int, apps: dict[str, dict[str, Any]], step_s: float = 0.02, python: str | None = None
) -> Iterator[Cluster]:
    """A cluster with `apps` (see `ray_cluster.py`) until the end of the block."""
    setup = {"folder": str(folder), "port": port, "metrics_port": port + 1, "step_s": step_s, "apps": apps}
    log = (folder / "cluster.log").open("w")
    process = subprocess.Popen(
        [python or ray_python() or "python", HERE / "ray_cluster.py", json.dumps(setup)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )
    try:
        assert _wait_for(process, "READY"), (folder / "cluster.log").read_text()[-4000:]
        yield Cluster(folder, port, port + 1, process)
    finally:
        assert process.stdin is not None
        for path in folder.glob("replica-*"):  # those that were stopped cannot end
            try:
                os.kill(int(path.name.removeprefix("replica-")), signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


#: Serve's log goes to files; nothing is told to Ray's makers; workers are not starved by whatever else runs (15).
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0", "RAY_worker_niceness": "5"}


def _wait_for(process: subprocess.Popen[str], word: str) -> bool:
    """Read what it prints up to a line that is `word`; False if it ends before."""
    assert process.stdout is not None
    timer = threading.Timer(READY_S, process.kill)
    timer.start()
    try:
        return any(line.strip() == word for line in process.stdout)
    finally:
        timer.cancel()
