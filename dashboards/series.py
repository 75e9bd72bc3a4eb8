"""Series and quotients that more than one dashboard or rule is about."""

from __future__ import annotations

from energylens_vllm.dashboards.panel import Panel, Query, graph
from energylens_vllm.dashboards.promql import CHOSEN, ratio

MEASURED = "energylens_gpu_energy_joules_total"
PREDICTED = "energylens_predicted_energy_joules_total"
COMPONENTS = "energylens_predicted_component_energy_joules_total"
COMPARED = "energylens_compared_energy_joules_total"
ERROR = "energylens_absolute_error_joules_total"
TOKENS = "energylens_tokens_total"
OUTPUT = "vllm:generation_tokens_total"
TTFT = "vllm:time_to_first_token_seconds"
ITL = "vllm:inter_token_latency_seconds"

RANGE = "$__range"  #: the whole time range that is shown
#: Windows last 5 s and are reported one by one, and faults are rare: counted over more than a scrape or two.
FIVE_MINUTES = "5m"

ENGINE_LEGEND = "{{instance}} engine {{engine}}"
GPU_LEGEND = "{{instance}} GPU {{gpu}}"
PER_ENGINE = ("instance", "engine")
PER_GPU = ("instance", "gpu")


def quantiles(name: str, *by: str, legend: str = "", of: tuple[float, ...] = (0.5, 0.95)) -> tuple[Query, ...]:
    """Quantiles of what a histogram has observed, named after them."""
    return tuple(
        Query(CHOSEN.quantile(q, name, *by), legend + ("median" if q == 0.5 else f"{100 * q:.0f} %")) for q in of
    )


def joules_per_output_token(*by: str, energy: str = MEASURED, over: str | None = None) -> str:
    """Energy over the tokens that vLLM generated; over the whole time `over`, if it is given."""
    grown = CHOSEN.rate if over is None else CHOSEN.increase
    return ratio(grown(energy, *by, over=over), grown(OUTPUT, *by, over=over))


def time_per_output_token(width: int = 8) -> Panel:
    """vLLM's own, to be read beside energy."""
    text = "Time between two tokens of a request, as vLLM measures it."
    return graph("Time per output token", "s", text, *quantiles(ITL), width=width)
