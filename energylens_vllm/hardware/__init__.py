"""GPU and interconnect profiles: JSON beside the code, every coefficient with value, uncertainty, unit and source."""

from energylens_vllm.hardware.profile import Coefficient, GpuProfile, known_gpus, load_profile

__all__ = ["Coefficient", "GpuProfile", "known_gpus", "load_profile"]
