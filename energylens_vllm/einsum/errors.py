"""The one exception of this package."""

from __future__ import annotations

from energylens_vllm.errors import EnergyLensError


class EinsumError(EnergyLensError):
    """A cascade that cannot be: the message names the einsum, the rank and both sizes."""
