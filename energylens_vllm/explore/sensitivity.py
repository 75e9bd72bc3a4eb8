"""How far the energy of deployments moves with the load, and with the coefficients that predict it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from energylens_vllm.explore.explain import Choice
from energylens_vllm.explore.search import Exploration
from energylens_vllm.explore.steady import steady
from energylens_vllm.hardware.profile import GpuProfile

#: What a coefficient stands for -> prefixes and suffixes of the names that scale together.
COEFFICIENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "energy per byte of memory": (("energy.memory_j_per_byte", ""),),
    "energy per operation": (("energy.", ".j_per_flop"),),
    "static power": (("power.static_w", ""), ("power.floor_w", "")),
    "power limit": (("power.limit_w", ""),),
    "memory bandwidth": (("memory.bandwidth_bytes_per_s", ""),),
    "tensor-core rate": (("compute.", ".peak_flops"),),
    "time of the host": (("host.", "_s"),),
}
#: Not the GPU profile's: the energy above static power that links and the SMs driving them take.
COMMUNICATION = "energy of communication"


@dataclass(frozen=True, slots=True)
class Point:
    """Joules an output token of a choice, as one thing varies."""

    choice: int  #: position among the choices
    what: str
    value: float
    token_j: float


@dataclass(frozen=True, slots=True)
class Swing:
    """Joules an output token of a choice with a coefficient lowered and raised."""

    choice: int
    what: str
    lowered_j: float
    raised_j: float


def over_loads(found: Exploration, best: Sequence[Choice]) -> list[Point]:
    """Energy against the prompt's and the output's length, a quarter to four times the load's, and against the running
    requests, up to what memory holds. The batch stays what it is as far as memory holds that of longer requests."""
    load = found.load
    points = []
    for position, choice in enumerate(best):
        engine, running, _ = found.evaluate(choice.index)
        rows = int(found.deployments.max_num_seqs[choice.index])
        most = float(engine.memory.most_running(load.prompt_tokens, load.output_tokens, _budget(found, choice), rows))
        least = engine.deployment.pipeline_parallel_size
        varied = [("running requests", n, load.prompt_tokens, load.output_tokens, n)
                  for n in np.geomspace(least, max(min(most, 1024.0), least), 12).tolist()]  # fmt: skip
        for factor in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0):
            prompt, output = max(load.prompt_tokens * factor, 1.0), max(load.output_tokens * factor, 1.0)
            varied.append(("prompt tokens", prompt, prompt, load.output_tokens, running))
            varied.append(("output tokens", output, load.prompt_tokens, output, running))
        for what, value, prompt, output, wanted in varied:
            joules = _token_j(found, choice, prompt, output, wanted)
            if joules is not None:
                points.append(Point(position, what, value, joules))
    return points


def _budget(found: Exploration, choice: Choice) -> int:
    return int(found.deployments.max_num_batched_tokens[choice.index])


def _token_j(found: Exploration, choice: Choice, prompt: float, output: float, wanted: float) -> float | None:
    """Joules an output token with as many running requests as memory holds of those wanted; None if it is too few."""
    engine, _, budget = found.evaluate(choice.index)
    rows = int(found.deployments.max_num_seqs[choice.index])
    running = min(wanted, float(engine.memory.most_running(prompt, output, budget, rows)))
    if running < engine.deployment.pipeline_parallel_size:
        return None
    at = steady(engine.model, [running], [budget], prompt, output, found.load.prefix_cache_hit_rate)
    return float(at.token_j[0])


def over_coefficients(found: Exploration, best: Sequence[Choice], change: float = 0.2) -> list[Swing]:
    """Energy at the same batch with each group of coefficients of the GPU lowered and raised by `change` of itself."""
    swings = []
    for position, choice in enumerate(best):
        own = found.evaluate(choice.index)[0].model.profile
        for what, names in COEFFICIENTS.items():
            lowered, raised = (_with_profile(found, choice, _scaled(own, names, 1 + sign * change)) for sign in (-1, 1))
            swings.append(Swing(position, what, lowered, raised))
        own_j = _with_profile(found, choice, own)
        sent = choice.components_j.get("communication", 0.0) / choice.token_j * own_j
        swings.append(Swing(position, COMMUNICATION, own_j - change * sent, own_j + change * sent))
    return swings


def _with_profile(found: Exploration, choice: Choice, profile: GpuProfile) -> float:
    """Joules an output token on a GPU with other coefficients."""
    engine, running, budget = found.evaluate(choice.index)
    load = found.load
    at = steady(
        engine.with_profile(profile),
        [running],
        [budget],
        load.prompt_tokens,
        load.output_tokens,
        load.prefix_cache_hit_rate,
    )
    return float(at.token_j[0])


def _scaled(profile: GpuProfile, names: Sequence[tuple[str, str]], factor: float) -> GpuProfile:
    values = {
        name: profile[name] * factor
        for name in profile.coefficients
        if any(name.startswith(prefix) and name.endswith(suffix) for prefix, suffix in names)
    }
    return profile.with_values(values, f"scaled by {factor:g}")
