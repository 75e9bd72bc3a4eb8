"""Our log lines go where vLLM's go."""

from __future__ import annotations

import logging


def follow_vllm() -> None:
    """Give our loggers vLLM's handlers and level, unless the user has configured them or vLLM has none."""
    ours, theirs = logging.getLogger("energylens_vllm"), logging.getLogger("vllm")
    if theirs.handlers and not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate
