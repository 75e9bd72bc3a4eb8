"""Whether the plugin works in this process, and what happens if not."""

from __future__ import annotations

import logging
import os

from energylens_vllm.serving.settings import REQUIRED_VARIABLE

logger = logging.getLogger("energylens_vllm")

#: why the plugin cannot work in this process, or None
problem: str | None = None


def unusable(error: Exception) -> None:
    """The plugin cannot work here: stop vLLM if it was asked for by name, else say so and let vLLM be.

    Raises RuntimeError after `--plugin energylens`.
    """
    global problem
    problem = str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
    if is_required():
        raise RuntimeError(f"the energylens plugin cannot start: {problem}") from error
    logger.warning("energylens is installed but cannot start, vLLM runs without it: %s", problem)


def is_required() -> bool:
    """Whether `--plugin energylens` was given."""
    return os.environ.get(REQUIRED_VARIABLE) == "1"
