"""What happens in an engine's process when its scheduler has been made."""

from __future__ import annotations

import logging
import shutil
from multiprocessing.util import Finalize
from typing import Any

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hooks.vllm import log, ranks, status
from energylens_vllm.hooks.vllm.batch import Reader
from energylens_vllm.hooks.vllm.deployment import describe
from energylens_vllm.hooks.vllm.gpus import gpus_of
from energylens_vllm.hooks.vllm.live import looker
from energylens_vllm.serving import expert_counts, settings
from energylens_vllm.serving.listen import attribute, measure, record
from energylens_vllm.serving.metrics import PREDICTOR_STATES
from energylens_vllm.serving.observer import StepObserver
from energylens_vllm.serving.replica import tell_routers
from energylens_vllm.serving.start import Started, failed, start_predictor

logger = logging.getLogger("energylens_vllm")


def start_observer(scheduler: Any, vllm_config: Any) -> StepObserver | None:
    """The observer of this engine, or None if it is switched off or vLLM collects no statistics.

    With `--plugin energylens` an engine that cannot be predicted does not start; else its steps are only counted.
    """
    log.follow_vllm()
    try:
        try:
            chosen, started = settings.load(vllm_config.additional_config), None
        except EnergyLensError as error:
            chosen, started = settings.Settings(), failed(str(error))
        if not chosen.enabled:
            return None
        if not scheduler.log_stats:
            logger.info("energylens does nothing: vLLM collects no statistics (--disable-log-stats)")
            return None
        started = started or _start(vllm_config, chosen)
        if started.predictor is None and status.is_required():
            raise EnergyLensError(started.problem)
        observer = _observe(started, chosen.report_interval_s)
        _listen(observer, vllm_config, chosen)
        if chosen.learn_expert_routing:
            with observer.guard.at("start"):
                _follow_experts(observer, vllm_config)
        if chosen.routing:
            with observer.guard.at("start"):
                tell_routers(observer, chosen, looker(scheduler))
        return observer
    except Exception as error:
        status.unusable(error)
        return None


def check(vllm_config: Any, log_stats: bool) -> None:
    """Find out before the engines start whether they can be predicted.

    Raises RuntimeError if not, or if the settings are wrong, after `--plugin energylens`.
    """
    try:
        chosen = settings.load(vllm_config.additional_config)
        if not chosen.enabled:
            raise EnergyLensError("enabled: false; accepted with --plugin energylens: true")
        if chosen.steer_ranks and ranks.is_lockstep(vllm_config):
            raise EnergyLensError(ranks.LOCKSTEP)
        if not log_stats:
            raise EnergyLensError("--disable-log-stats: what energylens finds out travels with vLLM's statistics")
        started = _start(vllm_config, chosen)
        if started.predictor is None:
            raise EnergyLensError(started.problem)
    except EnergyLensError as error:
        status.unusable(error)


def _start(vllm_config: Any, chosen: settings.Settings) -> Started:
    try:
        engine = describe(vllm_config)
    except Exception as error:  # this release of vLLM may have other names for something
        return failed(f"vLLM's configuration cannot be read: {type(error).__name__}: {error}")
    return start_predictor(engine, chosen.gpu)


def _listen(observer: StepObserver, vllm_config: Any, chosen: settings.Settings) -> None:
    """Measure and attribute, as far as is wanted. Raises if it cannot attribute, but only if the plugin is required."""
    engine = vllm_config.parallel_config.data_parallel_index
    with observer.guard.at("start"):
        if chosen.meter and (found := gpus_of(vllm_config)) is not None:
            measure(observer, *found, chosen, engine)
    with observer.guard.at("start"):
        described = describe(vllm_config)
        record(observer, chosen, {"config": described.config, "deployment": described.deployment}, engine)
    try:
        attribute(observer, chosen, engine)
    except Exception:
        if status.is_required():
            raise
        observer.guard.failed("start")


def _follow_experts(observer: StepObserver, vllm_config: Any) -> None:
    at = expert_counts.folder(vllm_config.instance_id, vllm_config.parallel_config.data_parallel_index)
    # Engines are processes of multiprocessing, which leaves `atexit` out. One that is killed leaves its folder behind.
    Finalize(None, shutil.rmtree, (at,), {"ignore_errors": True}, exitpriority=0)
    expert_counts.follow(observer, at)


def _observe(started: Started, report_interval_s: float) -> StepObserver:
    observer = StepObserver(Reader(started.flags), started.predictor, report_interval_s)
    if started.predictor is None:
        logger.warning("energylens only counts steps, it cannot predict them: %s", started.problem)
    else:
        logger.info("energylens predicts each step for %s (%s)", started.info["gpu"], started.info["source"])
    if started.state == "failed":
        observer.guard.failures["start"] += 1
    for state in PREDICTOR_STATES:
        observer.increments.set("energylens_predictor_state", float(state == started.state), state)
    if started.info:
        observer.increments.set("energylens_profile_info", 1.0, *started.info.values())
    return observer
