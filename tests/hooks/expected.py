"""What /metrics has to show of steps that were executed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from energylens_vllm import EnergyModel

Steps = Iterable[tuple[list[tuple[int, int, bool]], int]]  #: [(new tokens, computed tokens, decodes), ...], drafts


def expected(executed: Steps, model: EnergyModel) -> dict[str, float]:
    """Exact sums over the steps, each predicted alone: "name value-of-label" -> value."""
    sums: dict[str, list[float]] = {}
    for requests, num_drafts in executed:
        step = model.step([(new, computed) for new, computed, _ in requests], [decodes for *_, decodes in requests])
        tokens = sum(new for new, *_ in requests)
        decode_tokens = sum(new for new, _, decodes in requests if decodes)
        phase = "mixed" if 0 < decode_tokens < tokens else "decode" if decode_tokens else "prefill"
        for name, value in {
            **{f"predicted_energy_joules_total {name}": joules for name, joules in step.phases.items()},
            **{f"predicted_component_energy_joules_total {name}": joules for name, joules in step.components.items()},
            "predicted_waste_joules_total expert_imbalance": step.waste_j,
            "predicted_waste_joules_total expert_padding": step.padding_j,
            "predicted_energy_bound_joules_total lower": step.interval_j[0],
            "predicted_energy_bound_joules_total upper": step.interval_j[1],
            "predicted_step_time_seconds_total": step.time_s,
            "step_energy_joules_count": 1,
            "step_time_ratio_count": 1,
            f"steps_total {phase}": 1,
            "tokens_total prefill": tokens - decode_tokens,
            "tokens_total decode": decode_tokens,
            "draft_tokens_total": num_drafts,
        }.items():
            sums.setdefault(f"energylens_{name}", []).append(value)
    return {name: math.fsum(values) for name, values in sums.items()}
