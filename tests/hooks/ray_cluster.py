"""A Ray Serve cluster of replicas that only pretend to compute, for `ray_serve.Cluster`: run with Ray's Python.

    python ray_cluster.py '{"folder": ..., "port": ..., "apps": {NAME: {"policy": ..., "gpus": [...]}, ...}}'

Each application answers at /NAME. Its replicas declare the GPUs of the list, one each ("H200-SXM/2" is two of them).
`policy` is "default" (Serve's own router and handle), "router" (our router, Serve's handle), "energy" (our router and
handle, one deployment) or "fleet" (the same, a deployment for each GPU). Commands come as lines of JSON:
{"scale": [NAME, REPLICAS]}. What a replica shall do is said by files in `folder`: `stale-PID` (the same report for
ever). Without "reports" they say nothing of energy.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve

from energylens_vllm.architectures import load_config
from energylens_vllm.hooks.ray.config import router_config
from energylens_vllm.hooks.ray.ingress import FleetHandle
from energylens_vllm.routing.report import MODEL, REPORT, Report, describe

KV_TOKENS = 200_000
MODEL_NAME = "llama-3.1-8b"


class Pretender:
    """A replica: each token takes `step_s`. Tokens of a prompt are its words."""

    def __init__(self, folder: str, gpus: list[str], step_s: float, reports: bool) -> None:
        self.folder, self.step_s, self.pid, self.reports = Path(folder), step_s, os.getpid(), reports
        self.gpu = gpus[_take_place(self.folder, serve.get_replica_context().deployment) % len(gpus)]
        self.running = self.ended = self.tokens = 0
        self.stale: dict[str, Any] | None = None
        (self.folder / f"replica-{self.pid}").write_text(f"{serve.get_replica_context().app_name} {self.gpu}")

    async def record_replica_metadata(self) -> dict[str, Any]:
        if not self.reports:
            return {}
        return {MODEL: describe(load_config(MODEL_NAME), deployment(self.gpu), KV_TOKENS)}

    async def record_routing_stats(self) -> dict[str, Any]:
        if not self.reports:
            return {"now": time.time()}
        if self.stale is None or not (self.folder / f"stale-{self.pid}").exists():
            self.stale = Report(time.time(), self.running, 0, self.tokens, 100.0, 0.0, num_ended=self.ended).to_wire()
        return {REPORT: self.stale}

    async def completions(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """In parts as they come, or (without "stream") as a whole, as Ray's LLM servers do."""
        self.running += 1
        self.tokens += 100
        part = json.dumps({"pid": self.pid, "gpu": self.gpu}) + "\n"
        try:
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(self.step_s)
                if body["stream"]:
                    yield part
            if not body["stream"]:
                yield part * body["max_tokens"]
        finally:
            self.running -= 1
            self.tokens -= 100
            self.ended += 1


def deployment(gpu: str) -> dict[str, Any]:
    """Arguments of `Deployment` for GPUs as they are declared."""
    name, _, number = gpu.partition("/")
    return {"gpu": name, "tensor_parallel_size": int(number or 1), "max_num_seqs": 64}


def _take_place(folder: Path, name: str) -> int:
    """0, 1, 2, ... for the replicas of a deployment; one that replaces another has its place."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for place in range(1000):
            taken = folder / f"place-{name}-{place}"
            if not taken.exists() or not Path(f"/proc/{taken.read_text()}").exists():
                taken.write_text(str(os.getpid()))
                return place
    raise AssertionError("too many replicas")


api = FastAPI()


@serve.deployment(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Ingress:
    def __init__(self, policy: str, handles: list[Any]) -> None:
        handle = handles[0] if policy in ("default", "router") else FleetHandle(handles)
        self.handle = handle.options(stream=True)

    @api.post("/completions")
    async def completions(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self.handle.completions.remote(await request.json()))


def application(setup: dict[str, Any], name: str, replicas: int | None = None) -> serve.Application:
    app = setup["apps"][name]
    groups = [[gpu] for gpu in app["gpus"]] if app["policy"] == "fleet" else [app["gpus"]]
    routing = {} if app["policy"] == "default" else {"request_router_config": router_config(**app.get("targets", {}))}
    handles = [
        serve.deployment(Pretender)
        .options(
            name=f"{name}-{number}",
            num_replicas=replicas or app.get("replicas", len(gpus)),
            max_ongoing_requests=app.get("max_ongoing_requests", 64),
            ray_actor_options={"num_cpus": 0},
            health_check_period_s=1,
            health_check_timeout_s=2,
            graceful_shutdown_timeout_s=1,
            **routing,
        )
        .bind(setup["folder"], gpus, setup["step_s"], app.get("reports", True))
        for number, gpus in enumerate(groups)
    ]
    return Ingress.bind(app["policy"], handles)


def main() -> None:
    setup = json.loads(sys.argv[1])
    ray.init(
        _node_ip_address="127.0.0.1", include_dashboard=False, num_cpus=4, object_store_memory=80 * 2**20,
        _metrics_export_port=setup["metrics_port"],
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": setup["port"]})
    for name in setup["apps"]:
        serve.run(application(setup, name), name=name, route_prefix=f"/{name}", blocking=False)
    print("READY", flush=True)
    for line in sys.stdin:
        name, replicas = json.loads(line)["scale"]
        serve.run(application(setup, name, replicas), name=name, route_prefix=f"/{name}", blocking=False)
        print("SCALED", flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
