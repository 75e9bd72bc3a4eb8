"""Where Ray is: in an environment of its own, which `tools/ray.sh` makes beside the other."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def ray_python() -> str | None:
    """The Python that has Ray; None if there is none."""
    chosen = os.environ.get("RAY_PYTHON")
    if chosen is not None:
        return chosen
    if importlib.util.find_spec("ray") is not None:
        return sys.executable
    beside = Path(sys.prefix) / "ray" / "bin" / "python"
    return str(beside) if beside.exists() else None
