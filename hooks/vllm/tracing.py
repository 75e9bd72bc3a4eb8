"""In an API server or an offline `LLM`: a request's joules on the span that vLLM makes of it.

Only where vLLM traces (`--otlp-traces-endpoint`) and requests have accounts (setting `attribution`).
"""

from __future__ import annotations

import functools
import logging
from contextvars import ContextVar
from typing import Any

from energylens_vllm.serving import trace

logger = logging.getLogger("energylens_vllm")

_attributes: ContextVar[dict[str, Any] | None] = ContextVar("energylens_attributes", default=None)


def install(processor: Any) -> None:
    """Have `OutputProcessor.do_tracing` add our attributes to those that it gives to `instrument_manual`."""
    do_tracing, instrument_manual = processor.OutputProcessor.do_tracing, processor.instrument_manual

    @functools.wraps(do_tracing)
    def traced(self: Any, engine_core_output: Any, *args: Any, **kwargs: Any) -> Any:
        attributes = None
        try:
            engine_core_output.trace_headers, attributes = trace.split(engine_core_output.trace_headers)
        except Exception as error:
            _complain(error)
        token = _attributes.set(attributes)
        try:
            return do_tracing(self, engine_core_output, *args, **kwargs)
        finally:
            _attributes.reset(token)

    @functools.wraps(instrument_manual)
    def with_attributes(*args: Any, **kwargs: Any) -> Any:
        if (ours := _attributes.get()) and "attributes" in kwargs:
            kwargs["attributes"] = {**(kwargs["attributes"] or {}), **ours}
        return instrument_manual(*args, **kwargs)

    processor.OutputProcessor.do_tracing, processor.instrument_manual = traced, with_attributes


def endpoint(vllm_config: Any) -> str | None:
    """Where vLLM sends its traces; None if it does not trace."""
    found: str | None = getattr(getattr(vllm_config, "observability_config", None), "otlp_traces_endpoint", None)
    return found


@functools.cache
def _complain(error: Exception) -> None:
    logger.warning("energylens cannot read what a request cost, so its span does not say: %r", error)
