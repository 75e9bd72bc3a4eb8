#!/usr/bin/env bash
# mypy --strict over the package as it is installed: hooks/ and dashboards/ have to be where imports look for them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tree=$root/build/types/energylens_vllm
rm -rf "$tree"
mkdir -p "$tree"
ln -s "$root"/energylens_vllm/* "$root"/hooks "$root"/dashboards "$tree"
cd "$root/build/types"
exec mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" --package energylens_vllm "$@"
