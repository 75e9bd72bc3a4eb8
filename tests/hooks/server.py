"""A `vllm serve` of the tiny model in a process of its own, what is asked of it and what it shows."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

HERE = Path(__file__).parent
READY_S = 240  #: a server starts in half a minute on a machine that does nothing else
Samples = dict[str, float]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",
}


class Server:
    """Answers at `url`; `log` is the path of what it prints."""

    def __init__(self, url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url, self.log, self.process = url, log, process

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return urlopen(Request(self.url + path, data, {"Content-Type": "application/json"}), timeout=60)

    def call(self, path: str, body: dict[str, Any] | None = None) -> str:
        with self.open(path, body) as response:
            text: str = response.read().decode()
            return text

    def complete(self, num_prompt_tokens: int, max_tokens: int = 8, first: int = 5) -> str:
        """The text of one completion. Prompts with other `first` tokens share no prefix."""
        prompt = [first, *((first + i) % 200 for i in range(1, num_prompt_tokens))]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
        text: str = json.loads(self.call("/v1/completions", body))["choices"][0]["text"]
        return text

    def complete_all(self, lengths: Sequence[int], max_tokens: int = 8) -> list[str]:
        """Several at once."""
        with ThreadPoolExecutor(len(lengths)) as pool:
            return list(pool.map(lambda i: self.complete(lengths[i], max_tokens, 10 + i), range(len(lengths))))

    def metrics(self) -> Samples:
        """Ours on /metrics, "name{labels without model_name}" -> value."""
        found = {}
        for line in self.call("/metrics").splitlines():
            if line.startswith("energylens_") and "_created{" not in line:
                name, value = line.rsplit(" ", 1)
                found[re.sub(r'(,?)model_name="tiny"(,?)', lambda m: m[1] and m[2], name)] = float(value)
        return found

    def metrics_when(self, settled: Callable[[Samples], bool], timeout_s: float = 20.0) -> Samples:
        """What /metrics shows once `settled` is true of it: reports arrive about a second later."""
        end = time.monotonic() + timeout_s
        while not settled(shown := self.metrics()):
            assert time.monotonic() < end, f"not settled: {shown}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.2)
        return shown


@contextmanager
def serving(model: Path, folder: Path, port: int, *arguments: str, **environment: str) -> Iterator[Server]:
    """`vllm serve` with `arguments`, until the end of the block."""
    command = ["vllm", "serve", str(model), "--served-model-name=tiny", "--load-format=dummy", "--enforce-eager"]
    command += ["--gpu-memory-utilization=0.08", "--max-model-len=1024", "--host=127.0.0.1", f"--port={port}"]
    with socket.socket() as ours:  # or another server would answer in its place
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.bind(("127.0.0.1", port))
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            env=os.environ | ENVIRONMENT | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever is left of its process group


def _wait(server: Server) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        try:
            server.call("/health")
            return
        except OSError:  # nobody listens yet
            time.sleep(0.3)
        if server.process.poll() is not None:
            break
    raise AssertionError(f"the server does not answer:\n{server.log.read_text()[-5000:]}")
