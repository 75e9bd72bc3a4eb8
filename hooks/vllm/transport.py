"""Reports ride to the API servers in vLLM's own SchedulerStats.

One field is added to that dataclass before the first encoder or decoder of it is built. vLLM's messages are maps by
field name, so a process without the plugin (its data-parallel coordinator) ignores it. If vLLM gets a way of its own
for such data, this module is what changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from energylens_vllm.serving.increments import Report

FIELD = "energylens"


@dataclass
class _Carrier:
    energylens: Any = None


def install(stats: ModuleType) -> None:
    """Add the field to `SchedulerStats`."""
    cls = stats.SchedulerStats
    if FIELD in cls.__dataclass_fields__:
        return
    cls.__dataclass_fields__[FIELD] = fields(_Carrier)[0]
    cls.__annotations__[FIELD] = Any
    setattr(cls, FIELD, None)


def attach(outputs: Mapping[int, Any], take: Callable[[], Sequence[Report]]) -> None:
    """Put what `take()` gives into the stats among an engine step's outputs; do not take it if nobody would see it.

    Offline, vLLM 0.25 reads the stats only of steps that have outputs.
    """
    for output in outputs.values():
        if output.scheduler_stats is not None and output.outputs:
            setattr(output.scheduler_stats, FIELD, take())
            return


def reports_in(scheduler_stats: Any) -> Sequence[Report] | None:
    """The reports that came with `scheduler_stats`; None if it has no place for any."""
    try:
        return getattr(scheduler_stats, FIELD) or ()
    except AttributeError:
        return None
