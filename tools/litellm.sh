#!/usr/bin/env bash
# Makes an environment with LiteLLM's proxy, which some nightly tests drive:  bash tools/litellm.sh
#
# In .venv-litellm or $LITELLM_VENV, apart from .venv: its requirements and vLLM's exclude each other. A minute, 600 MB.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${LITELLM_VENV:-$root/.venv-litellm}
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install -qq --no-compile --requirement "$root/tools/litellm-requirements.txt"
