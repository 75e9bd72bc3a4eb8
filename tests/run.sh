#!/usr/bin/env bash
# Sets up everything and runs the tests:  bash tests/run.sh [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tools/system.sh"
source "$root/tools/environment.sh"
cd "$root"
exec python -m pytest "$@"
