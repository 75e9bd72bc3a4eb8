"""What an engine's observer is given to do beside predicting: measure, compare, attribute."""

from __future__ import annotations

from pathlib import Path

from energylens_vllm.energy import EnergyModel
from energylens_vllm.meter import Backend, Meter
from energylens_vllm.serving.attribution import Attribution
from energylens_vllm.serving.measurement import Measurement
from energylens_vllm.serving.observer import StepObserver
from energylens_vllm.serving.pairing import Pairing
from energylens_vllm.serving.predictor import ModelPredictor
from energylens_vllm.serving.request_log import RequestLog
from energylens_vllm.serving.settings import Settings
from energylens_vllm.serving.shares import Prices, Spared

#: A request that asks waits until the steps since the last report are charged, on the engine's thread: some 0.15 ms a
#: step, so they must not be many.
MOST_UNCHARGED_S = 1.0


def measure(observer: StepObserver, backend: Backend, metered: int) -> Meter:
    """Read the engine's `metered` GPUs on this host from now on, and compare with what is predicted."""
    meter, pairing, model = Meter(backend, observer.clock), None, _model(observer)
    if model is not None:
        deployment = model.deployment
        pairing = Pairing(
            deployment.num_gpus // deployment.data_parallel_size,
            model.idle_power_w / deployment.num_gpus,
            lambda: observer.settled_s,
            metered=metered,
        )
    observer.listeners.append(Measurement(meter, pairing))
    meter.start()
    return meter


def attribute(observer: StepObserver, settings: Settings, engine: int = 0) -> None:
    """Keep an account for each request, if the settings say so and steps are predicted. `engine` is its index."""
    model = _model(observer)
    if not settings.attribution or model is None:
        return
    prices = Prices.of(model)
    attribution = Attribution(prices, Spared.of(model, prices), settings.attribution_rule, lambda: observer.settled_s)
    if settings.request_log is not None:
        path = Path(settings.request_log)
        attribution.listeners.append(RequestLog(path.with_suffix(f".{engine}{path.suffix}") if engine else path))
    observer.report_interval_s = min(observer.report_interval_s, MOST_UNCHARGED_S)
    observer.attribution = attribution
    observer.listeners.append(attribution)


def _model(observer: StepObserver) -> EnergyModel | None:
    return observer.predictor.model if isinstance(observer.predictor, ModelPredictor) else None
