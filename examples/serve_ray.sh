#!/usr/bin/env bash
# Serves a model on Ray with two replicas, and requests sent to where they add the fewest joules.
#
#     bash examples/serve_ray.sh [MODEL [arguments of python -m energylens_vllm.hooks.ray ...]]
#
# Without MODEL: a tiny model with random weights on two replicas that are taken for an H200 and an L40S, by vLLM's CPU
# build where there is no NVIDIA GPU. It sends a few requests, shows what was decided, and serves at port $PORT (8000 if
# unset) until interrupted; with --once first it stops after the requests. What it prints goes to build/serve_ray.log.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in -h | --help) sed -n '2,/^set/ { /^#/ s/^# \{0,1\}//p }' "${BASH_SOURCE[0]}"; exit ;; esac
source "$root/tools/environment.sh"
source "$root/tools/ray.sh"

once=
if [ "${1:-}" = --once ]; then once=1; shift; fi
port=${PORT:-8000}
log=$root/build/serve_ray.log
mkdir -p "$root/build"
export VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
model=${1:-}
if [ -z "$model" ]; then
    model=$root/build/tiny-model
    python "$root/examples/tiny_model.py" "$model"
    export HF_HUB_OFFLINE=1
    engine='"engine_kwargs": {"load_format": "dummy", "enforce_eager": true, "gpu_memory_utilization": 0.08}'
    set -- "$model" --served-model-name tiny --replicas 1
    for gpu in H200-SXM L40S; do
        set -- "$@" --deployment "{$engine, \"runtime_env\": {\"env_vars\": {\"ENERGYLENS_GPU\": \"$gpu\"}}}"
    done
fi

echo "+ python -m energylens_vllm.hooks.ray --model $* --port $port >$log" >&2
"$RAY_PYTHON" -m energylens_vllm.hooks.ray --model "$@" --port "$port" --metrics-port "$((port + 1))" >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
until grep -q '^Serving at' "$log"; do
    kill -0 "$server" 2>/dev/null || { tail -n 20 "$log" >&2; exit 1; }
    sleep 0.5
done

python - "$port" <<'PYTHON'
import json
import sys
import time
from urllib.request import Request, urlopen

port = int(sys.argv[1])


def get(path, body=None, port=port):
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    return urlopen(request, timeout=300).read().decode()


model = json.loads(get("/v1/models"))["data"][0]["id"]
time.sleep(3)  # until both replicas have reported
for number in range(8):
    get("/v1/completions", {"model": model, "prompt": f"Why is the number {number} so popular?", "max_tokens": 16})
print(f"8 requests to {model}; decided, as Ray's metrics say (http://127.0.0.1:{port + 1}/metrics):\n")
time.sleep(8)  # Ray's processes report each few seconds
for line in get("/metrics", port=port + 1).splitlines():
    if line.startswith("ray_energylens_routing_"):
        name, rest = line.split("{", 1)
        labels, value = rest.rsplit("} ", 1)
        ours = [each for each in labels.split(",") if each.startswith(("reason=", "cause=", "side="))]
        print(f"{name}{{{','.join(ours)}}} {float(value):.4g}")
PYTHON

if [ -z "$once" ]; then
    echo "
Serving at http://127.0.0.1:$port until Ctrl-C" >&2
    wait "$server"
fi
