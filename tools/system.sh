#!/usr/bin/env bash
# In CI, installs the programs that some tests drive; elsewhere says which tests will be skipped for want of them.
set -euo pipefail
missing=()
if ! { command -v prometheus && command -v promtool; } >/dev/null; then missing+=(prometheus); fi
for program in chromium docker-compose haproxy; do
    if ! command -v "$program" >/dev/null; then missing+=("$program"); fi
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing ${missing[*]}" >&2
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "${missing[@]}"; } >/dev/null
    else
        echo "Not found: ${missing[*]}; the tests that need them will be skipped" >&2
    fi
fi
