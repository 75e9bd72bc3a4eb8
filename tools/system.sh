#!/usr/bin/env bash
# Installs the programs that some tests drive, where Debian's apt-get may be used; elsewhere those tests are skipped.
set -euo pipefail
declare -A package=([prometheus]=prometheus [amtool]=prometheus-alertmanager [chromium]=chromium)
wanted=()
for program in "${!package[@]}"; do
    command -v "$program" >/dev/null || wanted+=("${package[$program]}")
done
if [ "${#wanted[@]}" -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing ${wanted[*]}" >&2
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "${wanted[@]}" fonts-dejavu; } >/dev/null ||
            echo "apt-get failed: the tests that need ${wanted[*]} will be skipped" >&2
    else
        echo "Not found: ${wanted[*]}; the tests that need them will be skipped" >&2
    fi
fi
