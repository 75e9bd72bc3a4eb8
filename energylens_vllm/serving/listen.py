"""What an engine's observer is given to do beside predicting: measure, compare, learn, attribute."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from energylens_vllm.meter import Backend, Meter
from energylens_vllm.serving.attribution import Attribution
from energylens_vllm.serving.learning import Learner, unlearnt_idle_std
from energylens_vllm.serving.learning_listener import Learning, show
from energylens_vllm.serving.learnt_file import LearntFile
from energylens_vllm.serving.measurement import Measurement
from energylens_vllm.serving.observer import StepObserver
from energylens_vllm.serving.pairing import Pairing
from energylens_vllm.serving.predictor import ModelPredictor
from energylens_vllm.serving.recording import StepRecording, forget
from energylens_vllm.serving.request_log import RequestLog
from energylens_vllm.serving.settings import Settings
from energylens_vllm.serving.shares import Prices, Spared

logger = logging.getLogger(__name__)

#: Power limits that differ by less are the same one.
LIMIT_TOLERANCE = 0.005
#: A request that asks waits until the steps since the last report are charged, on the engine's thread: some 0.15 ms a
#: step, so they must not be many.
MOST_UNCHARGED_S = 1.0


def measure(
    observer: StepObserver, backend: Backend, metered: int, settings: Settings | None = None, engine: int = 0
) -> Meter:
    """Read the engine's `metered` GPUs on this host from now on, compare with what is predicted, and learn from that if
    the settings say so. `engine` is its index."""
    settings = settings or Settings()
    meter, pairing, learning = Meter(backend, observer.clock), None, None
    if (predictor := _predictor(observer)) is not None:
        model, deployment = predictor.model, predictor.model.deployment
        if settings.learning:
            learning = _learn(predictor, settings, engine)
        pairing = Pairing(
            deployment.num_gpus // deployment.data_parallel_size,
            model.idle_power_w / deployment.num_gpus,
            lambda: observer.settled_s,
            metered=metered,
            learner=predictor.learner,
            idle_std=unlearnt_idle_std(model),
        )
    observer.listeners.append(Measurement(meter, pairing, lambda limit_w: _follow_limit(predictor, limit_w)))
    if learning is not None:
        observer.listeners.append(learning)
    else:
        show(observer.increments, "off")
    meter.start()
    return meter


def _follow_limit(predictor: ModelPredictor | None, limit_w: float) -> None:
    """Predict for the power limit that is in force, which may be set lower than the profile's (`nvidia-smi -pl`)."""
    if predictor is None:
        return
    model = predictor.model
    ratio = limit_w / (model.deployment.power_limit_w or model.profile["power.limit_w"])
    if abs(ratio - model.factors.limit) > LIMIT_TOLERANCE:
        predictor.model = model.with_factors(replace(model.factors, limit=ratio))
        logger.info("energylens predicts for a power limit of %.0f W", limit_w)


def _learn(predictor: ModelPredictor, settings: Settings, engine: int) -> Learning:
    """Have the predictor corrected by what is learnt from now on, and by what was learnt before."""
    predictor.learner, file = Learner(predictor.model), None
    if settings.learning_folder:
        file = LearntFile(Path(settings.learning_folder).expanduser(), predictor.model, engine)
        file.load(predictor.learner)
    return Learning(predictor.learner, file)


def attribute(observer: StepObserver, settings: Settings, engine: int = 0) -> None:
    """Keep an account for each request, if the settings say so and steps are predicted. `engine` is its index."""
    predictor = _predictor(observer)
    if not settings.attribution or predictor is None:
        return
    model = predictor.model
    prices = Prices.of(model)
    attribution = Attribution(prices, Spared.of(model, prices), settings.attribution_rule, lambda: observer.settled_s)
    if settings.request_log is not None:
        path = Path(settings.request_log)
        attribution.listeners.append(RequestLog(path.with_suffix(f".{engine}{path.suffix}") if engine else path))
    observer.report_interval_s = min(observer.report_interval_s, MOST_UNCHARGED_S)
    observer.attribution = attribution
    observer.listeners.append(attribution)


def record(observer: StepObserver, settings: Settings, about: Mapping[str, Any], engine: int = 0) -> None:
    """Be ready to record for whoever asks (`energylens record`), if the settings say where. `about` is told of the
    engine, beside its process, index and GPU."""
    if not settings.recording_folder:
        return
    folder, name = Path(settings.recording_folder).expanduser(), f"{os.getpid()}-{engine}"
    note: dict[str, Any] = {**about, "pid": os.getpid(), "parent": os.getppid(), "engine": engine}
    sizes: Sequence[int] | None = None
    if (predictor := _predictor(observer)) is not None:
        deployment = predictor.model.deployment
        note["gpu"], sizes = deployment.gpu, deployment.capture_sizes
    recording = StepRecording(folder, name, note, sizes, observer.clock)
    Finalize(None, forget, (folder, name), exitpriority=0)  # engines are processes of multiprocessing: no `atexit`
    for listener in observer.listeners:
        if isinstance(listener, Measurement):
            listener.watchers.append(recording.read)
    observer.listeners.append(recording)


def _predictor(observer: StepObserver) -> ModelPredictor | None:
    return observer.predictor if isinstance(observer.predictor, ModelPredictor) else None
