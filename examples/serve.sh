#!/usr/bin/env bash
# Serves a model with vLLM and energylens, sends a few requests and shows the energy metrics.
#
#     bash examples/serve.sh [--once] [MODEL [vllm serve arguments ...]]
#
# Without MODEL: a tiny model with random weights, so nothing is downloaded. Without an NVIDIA GPU: the CPU build of
# vLLM, and the joules that the same batches would take on the GPU named in $ENERGYLENS_GPU (H200-SXM if unset).
# It serves at port $PORT (8000 if unset) until interrupted; with --once it stops after the requests.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tools/environment.sh"

once=
if [ "${1:-}" = --once ]; then once=1; shift; fi
port=${PORT:-8000}
url=http://127.0.0.1:$port
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING} VLLM_NO_USAGE_STATS=1

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

echo "+ vllm serve $* --plugin energylens" >&2
vllm serve "$@" --plugin energylens --host 127.0.0.1 --port "$port" &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT

python "$root/examples/show_energy.py" "$url" "$server"

if [ -z "$once" ]; then
    echo "
Serving at $url; metrics at $url/metrics. Stop with Ctrl-C." >&2
    wait "$server"
fi
