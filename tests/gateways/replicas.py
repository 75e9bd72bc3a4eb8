"""Processes for gateways' tests: faked replicas, and how to wait for and talk to them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def call(url: str, body: object = None, headers: dict[str, str] | None = None, timeout_s: float = 30.0) -> Any:
    """The JSON that a server answers. Raises OSError if it does not, or with a status of 400 or more."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json", **(headers or {})}), timeout=timeout_s) as got:
        return json.loads(got.read())


def wait_for(true: Callable[[], Any], timeout_s: float = 60.0, what: str = "") -> Any:
    """What `true` gives once that is true; an OSError counts as not yet."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with suppress(OSError):
            if found := true():
                return found
        time.sleep(0.1)
    raise AssertionError(f"not in {timeout_s} s: {what or true}")


@contextmanager
def running(
    command: Sequence[str | Path], log: Path, ready: str, timeout_s: float = 120.0, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process until the end of the block; `ready` is a URL that answers once it is up."""
    with socket.socket() as ours:  # or another server would answer in its place
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.bind(("127.0.0.1", urlsplit(ready).port or 80))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:

        def up() -> bool:
            assert process.poll() is None, log.read_text()[-3000:]
            with urlopen(ready, timeout=5):
                return True

        wait_for(up, timeout_s, f"{ready}: {log}")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


class Fake:
    """A faked replica."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port, self.url, self.process = port, f"http://127.0.0.1:{port}", process

    def be(self, mode: str = "ok", held: int = 0) -> None:
        """Behave so from now on, and say that so many requests are there besides."""
        call(f"{self.url}/fake", {"mode": mode, "held": held})

    @property
    def served(self) -> int:
        """Completions so far."""
        return int(call(f"{self.url}/fake")["served"])


@contextmanager
def fakes(folder: Path, *ports_and_arguments: tuple[int, str]) -> Iterator[list[Fake]]:
    """Faked replicas at these ports, with these arguments."""
    with ExitStack() as stack:
        made = []
        for port, arguments in ports_and_arguments:
            command = [sys.executable, HERE / "fake_replica.py", str(port), *arguments.split()]
            log = folder / f"fake-{port}.log"
            process = stack.enter_context(running(command, log, f"http://127.0.0.1:{port}/health"))
            made.append(Fake(port, process))
        yield made


def package(folder: Path) -> str:
    """A folder for PYTHONPATH that has this package, for interpreters that it is not installed in."""
    made = folder / "package" / "energylens_vllm"
    if not made.exists():
        made.mkdir(parents=True)
        for source in [*(ROOT / "energylens_vllm").iterdir(), ROOT / "hooks", ROOT / "dashboards"]:
            if source.name != "__pycache__":
                (made / source.name).symlink_to(source)
    return str(made.parent)
