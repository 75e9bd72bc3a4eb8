#!/usr/bin/env bash
# Adds Ray Serve in an environment of its own, .venv/ray, which has all of .venv besides. There it is neither seen by
# vLLM nor by tests of anything else. RAY_VERSION chooses a release; a second call does nothing.
#
#     source tools/ray.sh      # after tools/environment.sh; sets RAY_PYTHON
set -euo pipefail
base=$(python -c 'import sys; print(sys.prefix)')
version=${RAY_VERSION:-2.60.0}
export RAY_PYTHON=$base/ray/bin/python

if [ "$(cat "$base/ray/.version" 2>/dev/null)" != "$version" ]; then
    echo "Setting up $base/ray with Ray $version" >&2
    rm -rf "$base/ray"
    python -m venv --without-pip "$base/ray" 2>/dev/null || python -m virtualenv --quiet --no-seed "$base/ray"
    folder=$("$RAY_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    shared=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # With addsitedir the .pth files there count too, among them that of this checkout.
    echo "import site; site.addsitedir('$shared')" >"$folder/base.pth"
    python -m pip --python "$RAY_PYTHON" install -qq --no-compile --disable-pip-version-check "ray[serve]==$version"
    echo "$version" >"$base/ray/.version"
fi
