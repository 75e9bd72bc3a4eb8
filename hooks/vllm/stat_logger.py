"""In an API server or an offline `LLM`: reports out of SchedulerStats and into Prometheus."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import vllm

from energylens_vllm import __version__
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hooks.vllm import ranks, status, tracing, transport
from energylens_vllm.serving import settings

logger = logging.getLogger("energylens_vllm")


def install(loggers: ModuleType) -> None:
    """Add our stat logger to each StatLoggerManager.

    The entry-point group `vllm.stat_logger_plugins` would do it for servers only, and would make vLLM collect
    statistics where the user has switched them off.
    """
    original = loggers.StatLoggerManager.__init__

    class EnergyStatLogger(loggers.AggregateStatLoggerBase):  # type: ignore[name-defined]
        """Exports what the engines report."""

        def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
            from energylens_vllm.serving import otlp  # prometheus_client and more: not in every worker
            from energylens_vllm.serving.exporter import Exporter

            self.exporter = Exporter(vllm_config.model_config.served_model_name, engine_indexes)
            self.exporter.set_build_info(__version__, vllm.__version__)
            otlp.start(self.exporter, tracing.endpoint(vllm_config))

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            if scheduler_stats is None:
                return
            reports = transport.reports_in(scheduler_stats)
            if reports is None:
                self.exporter.refuse(engine_idx, f"SchedulerStats has no field {transport.FIELD!r} for reports")
            elif reports:
                self.exporter.export(engine_idx, reports)
            ranks.heard(engine_idx, reports or (), iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, engine_idxs: Any = None, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, engine_idxs, *args, **kwargs)
        try:
            if _is_enabled(vllm_config):
                self.stat_loggers.append(EnergyStatLogger(vllm_config, self.engine_indexes))
        except Exception as error:
            status.unusable(error)

    loggers.StatLoggerManager.__init__ = __init__


def _is_enabled(vllm_config: Any) -> bool:
    try:
        return settings.load(vllm_config.additional_config).enabled
    except EnergyLensError:
        return True  # the engine says so, in its log and in what it reports
