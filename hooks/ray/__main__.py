"""`python -m energylens_vllm.hooks.ray --model MODEL`: a Ray cluster on this machine, replicas, and an OpenAI API."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

PROGRAM = "python -m energylens_vllm.hooks.ray"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Serve a model on Ray with energy-aware routing, on this machine or (RAY_ADDRESS=auto) in a "
        "running cluster.",
    )
    parser.add_argument("--model", required=True, help="a Hugging Face name or a folder")
    parser.add_argument("--served-model-name", help="what requests call it (default: the model)")
    parser.add_argument(
        "--deployment", action="append", type=_object, metavar="JSON",
        help="fields of Ray's LLMConfig for one deployment, such as "
        '\'{"accelerator_type": "H100", "engine_kwargs": {"tensor_parallel_size": 2}, '
        '"deployment_config": {"num_replicas": 2}}\'; repeat it for deployments that differ',
    )  # fmt: skip
    parser.add_argument("--replicas", type=int, default=2, help="of each deployment that does not say (default 2)")
    parser.add_argument("--ttft-s", type=float, default=1.0, help="target of the time to the first token (default 1)")
    parser.add_argument("--tpot-s", type=float, default=0.05, help="target of the time per token after (default 0.05)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    parser.add_argument("--metrics-port", type=int, help="port of Ray's metrics, ours among them (default: any)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted. The exit status: 2 for bad input."""
    options = parser().parse_args(arguments)
    if importlib.util.find_spec("ray") is None:
        print(f"{PROGRAM}: Ray is not installed; pip install 'energylens-vllm[ray]'", file=sys.stderr)
        return 2
    import ray
    from ray import serve

    from energylens_vllm.errors import EnergyLensError
    from energylens_vllm.hooks.ray.app import build_app

    configs = [_config(options, deployment) for deployment in options.deployment or [{}]]
    # Before the application is built, for which Ray would start a cluster of its own choice. Ray's internal ports
    # listen on all addresses, whatever is asked for.
    if (address := os.environ.get("RAY_ADDRESS")) is None:
        ray.init(
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            num_cpus=_cpus(configs),
            _metrics_export_port=options.metrics_port,
        )
    else:
        ray.init(address=address)
    try:
        app = build_app({"llm_configs": configs, "ttft_s": options.ttft_s, "tpot_s": options.tpot_s})
        serve.start(http_options={"host": options.host, "port": options.port})
        serve.run(app, blocking=False)
        print(f"Serving at http://{options.host}:{options.port} until Ctrl-C", flush=True)
        _wait()
    except (EnergyLensError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def _config(options: argparse.Namespace, deployment: dict[str, Any]) -> dict[str, Any]:
    """The LLMConfig of one deployment, with what the other options say where it says nothing."""
    config = {"deployment_config": {}, **deployment}
    config["model_loading_config"] = {
        "model_id": options.served_model_name or options.model,
        "model_source": options.model,
    } | config.get("model_loading_config", {})
    if "autoscaling_config" not in config["deployment_config"]:
        config["deployment_config"] = {"num_replicas": options.replicas} | config["deployment_config"]
    if "accelerator_type" not in config and "accelerator_config" not in config and not _has_gpu():
        config["accelerator_config"] = {"kind": "cpu"}
        config.setdefault("placement_group_config", {"bundles": [{"CPU": 1}]})
    return config


def _has_gpu() -> bool:
    from energylens_vllm.hooks.vllm.deployment import _device_name

    return bool(_device_name())


def _cpus(configs: Sequence[dict[str, Any]]) -> int:
    """CPUs that Ray may count on: on a small machine, too, all replicas shall find a place."""
    replicas = sum(int(each["deployment_config"].get("num_replicas", 1)) for each in configs)
    return max(os.cpu_count() or 1, replicas + 2 * len(configs) + 2)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _wait() -> None:
    import signal
    import threading

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()


if __name__ == "__main__":
    sys.exit(main())
