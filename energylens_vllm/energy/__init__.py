"""The step model: a network on a deployment -> time and energy of any batch. See docs/architecture.md."""

from energylens_vllm.energy.deployment import Deployment
from energylens_vllm.energy.model import EnergyModel, Predictions, StepPrediction
from energylens_vllm.energy.overlap import DualBatch, Overlap
from energylens_vllm.energy.queueing import OpenServing
from energylens_vllm.energy.serving import ServingPrediction
from energylens_vllm.energy.speculative import Speculation

__all__ = [
    "Deployment",
    "DualBatch",
    "EnergyModel",
    "OpenServing",
    "Overlap",
    "Predictions",
    "ServingPrediction",
    "Speculation",
    "StepPrediction",
]
