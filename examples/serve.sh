#!/usr/bin/env bash
# Serves a model with vLLM and energylens, sends a few requests and shows the energy they took.
#
#     bash examples/serve.sh [--once] [MODEL [vllm serve arguments ...]]
#
# Without MODEL: a tiny model with random weights, so nothing is downloaded. Without an NVIDIA GPU: the CPU build of
# vLLM, and the joules that the same batches would take on the GPU named in $ENERGYLENS_GPU (H200-SXM if unset).
# It serves at port $PORT (8000 if unset) until interrupted; with --once it stops after the requests. What the server
# prints goes to build/serve.log.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in -h | --help) sed -n '2,/^set/ { /^#/ s/^# \{0,1\}//p }' "${BASH_SOURCE[0]}"; exit ;; esac
source "$root/tools/environment.sh"

once=
if [ "${1:-}" = --once ]; then once=1; shift; fi
port=${PORT:-8000}
if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    echo "Port $port is taken; choose another: PORT=$((port + 1)) bash examples/serve.sh" >&2
    exit 1
fi
log=$root/build/serve.log
mkdir -p "$root/build"
export VLLM_NO_USAGE_STATS=1

if [ "$#" = 0 ]; then
    model=$root/build/tiny-model
    python "$root/examples/tiny_model.py" "$model"
    export HF_HUB_OFFLINE=1
    set -- "$model" --load-format dummy --enforce-eager --served-model-name tiny
fi
if ! nvidia-smi >/dev/null 2>&1; then
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
    set -- "$@" --gpu-memory-utilization 0.08
fi

echo "+ vllm serve $* --plugin energylens --host 127.0.0.1 --port $port >$log" >&2
vllm serve "$@" --plugin energylens --host 127.0.0.1 --port "$port" >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT

if ! python "$root/examples/show_energy.py" "http://127.0.0.1:$port" "$server"; then
    echo "The end of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
fi

if [ -z "$once" ]; then
    echo "
Serving at http://127.0.0.1:$port until Ctrl-C; metrics at http://127.0.0.1:$port/metrics" >&2
    wait "$server"
fi
