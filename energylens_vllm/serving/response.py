"""Which requests want to be told their energy.

One asks with `"vllm_xargs": {"energylens": 1}` in its body, or `SamplingParams(extra_args={"energylens": 1})`. Nobody
else is told: routers that split prefill from decode forward the field in which it travels.
"""

from __future__ import annotations

from collections.abc import Mapping

KEY = "energylens"  #: in extra_args of a request, and in kv_transfer_params of its output


def asks(extra_args: Mapping[str, object] | None) -> bool:
    """Whether a request with these extra arguments asks for its energy."""
    return bool(extra_args and extra_args.get(KEY))
