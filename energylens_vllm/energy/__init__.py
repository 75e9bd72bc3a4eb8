"""The step model: a network on a deployment -> time and energy of any batch. See docs/architecture.md."""

from energylens_vllm.energy.deployment import Deployment
from energylens_vllm.energy.model import EnergyModel, Predictions, StepPrediction
from energylens_vllm.energy.serving import ServingPrediction

__all__ = ["Deployment", "EnergyModel", "Predictions", "ServingPrediction", "StepPrediction"]
