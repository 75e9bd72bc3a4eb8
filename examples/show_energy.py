"""Send a few requests to a vLLM server and print its energy metrics.

python examples/show_energy.py [URL] [PID of a server that may still be starting]
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import Request, urlopen

PROMPTS = ["How many joules does a token cost? " * copies for copies in (1, 4, 16, 32)]


def call(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=120) as response:
        return response.read().decode()


def wait_until_ready(url: str, pid: int) -> None:
    while True:
        try:
            call(f"{url}/health")
            return
        except OSError:  # nobody listens yet
            time.sleep(0.5)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            sys.exit("the server ended before it answered; its messages are above")


def main(url: str = "http://127.0.0.1:8000", pid: str | None = None) -> None:
    if pid is not None:
        wait_until_ready(url, int(pid))
    model = json.loads(call(f"{url}/v1/models"))["data"][0]["id"]

    def complete(prompt: str) -> dict[str, int]:
        body = {"model": model, "prompt": prompt, "max_tokens": 64, "ignore_eos": True}
        usage: dict[str, int] = json.loads(call(f"{url}/v1/completions", body))["usage"]
        return usage

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        usages = list(pool.map(complete, PROMPTS))
    prompt_tokens, output_tokens = (sum(u[f"{kind}_tokens"] for u in usages) for kind in ("prompt", "completion"))
    print(
        f"{len(usages)} requests, {prompt_tokens} prompt tokens, {output_tokens} output tokens; from {url}/metrics:\n"
    )

    time.sleep(1)  # the last step's figures are on their way
    lines = [line for line in call(f"{url}/metrics").splitlines() if line.startswith("energylens_")]
    if not lines:
        sys.exit("no energylens_ metrics: the plugin is not running; `energylens doctor` says why")
    print("\n".join(line for line in lines if "_bucket{" not in line))


if __name__ == "__main__":
    main(*sys.argv[1:])
