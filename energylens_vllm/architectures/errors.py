"""The package's own error."""

from energylens_vllm.errors import EnergyLensError


class ArchitectureError(EnergyLensError):
    """A config that cannot be read, or describes a network that is not known. Names the field and the model type."""
