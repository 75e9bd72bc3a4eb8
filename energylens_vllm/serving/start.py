"""From what vLLM says of an engine to its predictor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.serving.batch import NONE
from energylens_vllm.serving.predictor import Predictor, make_predictor

REFERENCE_GPU = "H200-SXM"  #: predicted for where there is no known GPU; its profile is the best measured one

# NVML's product names. An H100 PCIe or an H200 NVL has other clocks and limits than the SXM parts: not the same GPU.
_PRODUCTS = {
    r"A100-SXM4-80GB": "A100-SXM-80GB",
    r"H100 80GB HBM3": "H100-SXM",
    r"H200$": "H200-SXM",
    r"B200$": "B200-SXM",
    r"L40S$": "L40S",
}


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine as vLLM configures it, in plain values."""

    config: Mapping[str, Any]  #: the Hugging Face config
    deployment: Mapping[str, Any]  #: arguments of `Deployment`, but `gpu`
    device_name: str  #: NVML's product name of its GPU; "" without one
    quantization: str | None  #: as vLLM names it, also where it comes from the config
    flags: frozenset[str] = NONE  #: what no prediction of it will cover


@dataclass(frozen=True, slots=True)
class Started:
    """A predictor, or why there is none."""

    predictor: Predictor | None
    state: str  #: one of `metrics.PREDICTOR_STATES`
    problem: str
    info: Mapping[str, str]  #: labels of energylens_profile_info, in their order; none if it is not known
    flags: frozenset[str]


def failed(problem: str) -> Started:
    """What there is when something is wrong before the engine is known."""
    return Started(None, "failed", problem, {}, NONE)


def gpu_of(device_name: str) -> str | None:
    """The profile's name for NVML's product name, None if there is none."""
    return next((gpu for product, gpu in _PRODUCTS.items() if re.search(product, device_name)), None)


def start_predictor(engine: Engine, gpu: str | None = None) -> Started:
    """The predictor of `engine` for `gpu` (the setting), the GPU it runs on, or the reference GPU."""
    flags = set(engine.flags)
    if gpu is not None:
        source = "setting"
    elif (gpu := gpu_of(engine.device_name)) is not None:
        source = "detected"
    else:
        gpu, source = REFERENCE_GPU, "reference"
        flags.add("reference_gpu")
    info = {
        "gpu": gpu,
        "source": source,
        "dtype": str(engine.deployment["dtype"]),
        "quantization": str(engine.quantization),
        "tensor_parallel_size": str(engine.deployment["tensor_parallel_size"]),
        "pipeline_parallel_size": str(engine.deployment["pipeline_parallel_size"]),
    }
    predictor, state, problem = None, "ready", ""
    try:
        predictor = make_predictor(engine.config, {**engine.deployment, "gpu": gpu})
    except EnergyLensError as error:
        state, problem = "model_unknown", str(error)
    except Exception as error:
        state, problem = "failed", f"{type(error).__name__}: {error}"
    return Started(predictor, state, problem, info, frozenset(flags))
