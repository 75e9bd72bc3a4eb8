"""Which replicas to stop and start: apart from routing, because it takes minutes and a load forecast.

Idle replicas burn static power: 122 W on an H200 with a CUDA context, whether vLLM sleeps or not; only when the process
ends does it fall, to 78 W. So advice is about processes, and the price of being wrong is their start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from energylens_vllm.errors import EnergyLensError


@dataclass(frozen=True, slots=True)
class ReplicaPower:
    """What power advice looks at. Powers over all GPUs of the replica."""

    powered: bool
    busy: bool  #: runs or holds requests
    tokens_per_s: float  #: output tokens that it serves within the latency targets
    energy_per_token_j: float  #: at that rate: the better replicas are kept
    idle_w: float
    off_w: float
    start_s: float
    start_j: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Load over the next `horizon_s` seconds, and the most of it that may come at once."""

    tokens_per_s: float
    peak_tokens_per_s: float
    horizon_s: float


@dataclass(frozen=True, slots=True)
class PowerAdvice:
    """`action` is "keep", "start", "stop" or "drain" (stop, once its requests have ended). `saved_j` is over the
    horizon, start included; negative for what a start costs."""

    replica: int
    action: str
    saved_j: float
    reason: str


def advise_power(replicas: Sequence[ReplicaPower], forecast: Forecast, spare: int = 1) -> list[PowerAdvice]:
    """Keep the most efficient replicas that serve the peak, and `spare` more; stop the rest where that pays for the
    next start within the horizon. One entry a replica, in their order.

    Raises EnergyLensError for a forecast that is not finite or negative.
    """
    values = (forecast.tokens_per_s, forecast.peak_tokens_per_s, forecast.horizon_s)
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise EnergyLensError(f"forecast: {forecast!r}; accepted: finite numbers, zero or more")
    needed = max(forecast.tokens_per_s, forecast.peak_tokens_per_s)
    # Those that run come first among equals: a start is never free.
    order = sorted(range(len(replicas)), key=lambda i: (replicas[i].energy_per_token_j, not replicas[i].powered, i))
    wanted: set[int] = set()
    capacity, extra = 0.0, spare
    for i in order:
        if capacity < needed:
            wanted.add(i)
            capacity += replicas[i].tokens_per_s
        elif extra > 0:
            wanted.add(i)
            extra -= 1
    advice = []
    for i, replica in enumerate(replicas):
        saved_j = (replica.idle_w - replica.off_w) * forecast.horizon_s - replica.start_j
        if i in wanted and not replica.powered:
            cost_j = -(replica.start_j + (replica.idle_w - replica.off_w) * forecast.horizon_s)
            advice.append(PowerAdvice(i, "start", cost_j, f"the peak of {needed:.0f} tokens/s and a spare need it"))
        elif i in wanted or not replica.powered:
            reason = "needed for the peak, or spare" if i in wanted else "off, and not needed"
            advice.append(PowerAdvice(i, "keep", 0.0, reason))
        elif saved_j <= 0:
            advice.append(PowerAdvice(i, "keep", 0.0, "its next start costs more than idling over the horizon"))
        else:
            action = "drain" if replica.busy else "stop"
            advice.append(PowerAdvice(i, action, saved_j, f"others serve {capacity:.0f} tokens/s"))
    return advice
