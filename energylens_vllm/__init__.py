"""Predicts, measures and lowers the energy of vLLM serving, from an einsum model of the network.

The names below are imported on first use, so that `import energylens_vllm` costs almost nothing wherever vLLM loads
plugins.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from energylens_vllm.energy import Deployment, EnergyModel
    from energylens_vllm.errors import EnergyLensError

__version__ = "0.1.0"
__all__ = ["Deployment", "EnergyLensError", "EnergyModel", "__version__"]

_HOME = {
    "Deployment": "energylens_vllm.energy",
    "EnergyModel": "energylens_vllm.energy",
    "EnergyLensError": "energylens_vllm.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
