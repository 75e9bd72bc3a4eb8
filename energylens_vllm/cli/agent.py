"""Weigh vLLM replicas for HAProxy by the energy that a request adds there: an agent for its agent-check.

    energylens agent --replica a=http://127.0.0.1:8001 --replica b=http://127.0.0.1:8002

    # haproxy.cfg: the server's name is the replica's
    backend vllm
      balance roundrobin
      default-server check weight 100 agent-check agent-addr 127.0.0.1 agent-port 9777 agent-inter 1s
      server a 127.0.0.1:8001 agent-send "a\\n"
      server b 127.0.0.1:8002 agent-send "b\\n"

Replicas tell what they hold on /metrics, with the plugin's setting `routing`. It runs until Ctrl-C or SIGTERM, which it
answers with equal weights for a while; then it ends. docs/gateways.md says more.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.routing.agent import Agent, serve
from energylens_vllm.routing.fleet import Targets
from energylens_vllm.routing.scrape import Source, metrics_url

LISTEN = "127.0.0.1:9777"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replica", action="append", default=[], metavar="NAME=URL", help="a vLLM server; once for each"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="a known name or the path of a config, if they are served under another name"
    )
    parser.add_argument("--ttft", type=float, default=1.0, metavar="S", help="target for the first token (%(default)s)")
    parser.add_argument("--tpot", type=float, default=0.05, metavar="S", help="and for each other (%(default)s)")
    parser.add_argument(
        "--floor", type=int, default=1, metavar="PERCENT", help="the least weight of a replica (default: %(default)s)"
    )
    parser.add_argument(
        "--listen", default=LISTEN, metavar="HOST:PORT", help="where HAProxy asks (default: %(default)s)"
    )
    parser.add_argument("--metrics", metavar="HOST:PORT", help="where to show fallbacks and its reasons to Prometheus")
    parser.add_argument(
        "--farewell", type=float, default=3.0, metavar="S", help="answer 100%% for so long at the end (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if not args.replica:
        raise EnergyLensError("--replica: none given; accepted: NAME=http://HOST:PORT, once for each replica")
    sources: dict[str, Source] = {}
    for given in args.replica:
        name, found, url = given.partition("=")
        if not found or not name or name in sources:
            raise EnergyLensError(f"--replica: {given!r}; accepted: NAME=http://HOST:PORT, each name once")
        sources[name] = Source(metrics_url(url), args.model)
    if not 0 <= args.floor <= 100:
        raise EnergyLensError(f"--floor: {args.floor}; accepted: 0 to 100 percent")
    if not 0 <= args.farewell <= 3600:
        raise EnergyLensError(f"--farewell: {args.farewell}; accepted: 0 to 3600 seconds")
    host, port = _address("--listen", args.listen)
    agent = Agent(sources, Targets(args.ttft, args.tpot), args.floor)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    if args.metrics:
        from prometheus_client import start_http_server

        at = _address("--metrics", args.metrics)
        start_http_server(at[1], at[0])
    try:
        asyncio.run(_serve(agent, host, port, args.farewell))
    except OSError as error:
        raise EnergyLensError(f"--listen: {args.listen}: {error.strerror or error}") from None
    return 0


def _address(option: str, text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise EnergyLensError(f"{option}: {text!r}; accepted: HOST:PORT such as {LISTEN}")
    return host.strip("[]"), int(port)


async def _serve(agent: Agent, host: str, port: int, farewell_s: float) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(f"HAProxy may ask at {host}:{port}", flush=True)
    await serve(agent, host, port, stop, farewell_s)
