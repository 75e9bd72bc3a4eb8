#!/usr/bin/env bash
# In CI, installs the programs that some tests drive; elsewhere says which tests will be skipped for want of them.
set -euo pipefail
if ! { command -v prometheus && command -v promtool; } >/dev/null; then
    if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing Prometheus" >&2
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            prometheus; } >/dev/null
    else
        echo "Prometheus is not found: the tests that need it will be skipped" >&2
    fi
fi
