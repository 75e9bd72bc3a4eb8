"""What several GPUs and experts cost beyond arithmetic."""

from __future__ import annotations

from energylens_vllm.dashboards.panel import HALF, QUARTER, Dashboard, Query, Row, graph, stat
from energylens_vllm.dashboards.promql import CHOSEN, ratio
from energylens_vllm.dashboards.series import (
    COMPONENTS,
    ENGINE_LEGEND,
    GPU_LEGEND,
    MEASURED,
    PER_ENGINE,
    PER_GPU,
    PREDICTED,
    TOKENS,
    time_per_output_token,
)

rate, gauge = CHOSEN.rate, CHOSEN.gauge

_WASTE = "energylens_predicted_waste_joules_total"


def _share(*components: str) -> str:
    parts = " + ".join(rate(COMPONENTS, component=component) for component in components)
    return ratio(f"({parts})" if len(components) > 1 else parts, rate(PREDICTED))


def _shares(*components: str) -> tuple[Query, ...]:
    return tuple(Query(_share(name), name.replace("_", " ")) for name in components)


def _imbalance(values: str) -> str:
    """The largest over the mean, less one: 0 if all are alike."""
    return f"max({values}) / (avg({values}) > 0) - 1"


_SUMMARY = Row(
    "Shares of the predicted energy",
    (
        stat(
            "Communication",
            "percentunit",
            "Share of communication between GPUs.",
            _share("communication"),
            width=QUARTER,
        ),
        stat(
            "Waiting for the host",
            "percentunit",
            "Share of static power while the GPU waits for the host.",
            _share("host_gap"),
            width=QUARTER,
        ),
        stat(
            "Static",
            "percentunit",
            "Share of static power while a step runs. Ranks that wait for the hottest one add to it.",
            _share("static"),
            width=QUARTER,
        ),
        stat(
            "Experts and weights",
            "percentunit",
            "Share of the experts' arithmetic and of reading weights.",
            _share("experts", "weights"),
            width=QUARTER,
        ),
    ),
)

_OVER_TIME = Row(
    "Over time",
    (
        graph(
            "Waste",
            "percentunit",
            "Shares of the predicted energy that compute nothing: communication, waiting for the host, static.",
            *_shares("communication", "host_gap", "static"),
            width=HALF,
        ),
        graph(
            "Useful work",
            "percentunit",
            "Shares of the predicted energy that go into arithmetic and into moving bytes.",
            *_shares("linear", "attention", "experts", "weights", "kv_cache", "activations"),
            width=HALF,
        ),
        graph(
            "Imbalance",
            "percentunit",
            "Largest over mean, less one: of the tokens that engines compute (data parallelism), and of the "
            "energy of GPUs. 0 if all are alike.",
            Query(_imbalance(rate(TOKENS, *PER_ENGINE)), "tokens of engines"),
            Query(_imbalance(rate(MEASURED, *PER_ENGINE, "gpu")), "energy of GPUs"),
            zero_based=False,
        ),
        graph(
            "Steps",
            "short",
            "Steps a second by what they do, and those without requests that a data-parallel rank ran to stay "
            "in step with the others.",
            Query(rate("energylens_steps_total", "phase"), "{{phase}}"),
            Query(rate("energylens_dummy_steps_total"), "without requests"),
        ),
        graph(
            "Busy",
            "percentunit",
            "Share of time in which an engine's steps run, by measured duration.",
            Query(rate("energylens_measured_step_time_seconds_total", *PER_ENGINE), ENGINE_LEGEND),
        ),
    ),
)

_EXPERTS = Row(
    "Experts",
    (
        graph(
            "Wasted on experts",
            "watt",
            "Predicted power without effect: static power while ranks wait for the one with the hottest experts, and "
            "arithmetic on rows that only fill experts' tiles up. It is part of what is shown above.",
            Query(rate(_WASTE, "reason"), "{{reason}}"),
            stacked=True,
        ),
        graph(
            "Share wasted on experts",
            "percentunit",
            "The same over all predicted power.",
            Query(f"{rate(_WASTE, 'reason')} / on () group_left () ({rate(PREDICTED)} > 0)", "{{reason}}"),
        ),
        graph(
            "Waiting",
            "percentunit",
            "Shares of the predicted energy in which GPUs wait: for the host between steps, for each other's data, "
            "and for the rank with the hottest experts.",
            *_shares("host_gap", "communication"),
            Query(ratio(rate(_WASTE, reason="expert_imbalance"), rate(PREDICTED)), "expert imbalance"),
        ),
        graph(
            "How unevenly experts are chosen",
            "short",
            "The most wanted expert over the mean one, and rows of the expert-parallel rank that has most over those "
            "of the mean rank: 1 is balance. As counted, if the plugin's setting `learn_expert_routing` is on.",
            Query(gauge("energylens_expert_hottest_ratio", *PER_ENGINE, how="max"), f"hottest expert: {ENGINE_LEGEND}"),
            Query(gauge("energylens_expert_imbalance_ratio", *PER_ENGINE, how="max"), f"fullest rank: {ENGINE_LEGEND}"),
            width=HALF,
        ),
        graph(
            "Selections counted",
            "cps",
            "Selections of experts by tokens that were counted, a second, over all layers.",
            Query(rate("energylens_expert_selections_total", *PER_ENGINE), ENGINE_LEGEND),
            width=HALF,
        ),
    ),
)

_GPUS = Row(
    "GPUs",
    (
        graph(
            "Power of each GPU",
            "watt",
            "Measured power and the limit in force; on a superchip also the power of the module that the "
            "GPU is on, CPU included.",
            Query(gauge("energylens_gpu_power_watts", *PER_GPU, how="max"), GPU_LEGEND),
            Query(gauge("energylens_gpu_power_limit_watts", *PER_GPU, how="max"), f"limit: {GPU_LEGEND}"),
            Query(rate("energylens_gpu_module_energy_joules_total", *PER_GPU), f"module: {GPU_LEGEND}"),
        ),
        graph(
            "Below the top clock",
            "percentunit",
            "Share of time in which GPUs ran below their top clock, by reason; reasons may hold at once.",
            Query(rate("energylens_gpu_throttled_seconds_total", *PER_GPU, "reason"), f"{{{{reason}}}}: {GPU_LEGEND}"),
        ),
        graph(
            "Clocks",
            "hertz",
            "Clocks of SMs and of memory.",
            Query(gauge("energylens_gpu_sm_clock_hertz", *PER_GPU, how="max"), f"SM: {GPU_LEGEND}"),
            Query(gauge("energylens_gpu_memory_clock_hertz", *PER_GPU, how="max"), f"memory: {GPU_LEGEND}"),
        ),
        graph(
            "Temperature",
            "celsius",
            "Temperature of each GPU.",
            Query(gauge("energylens_gpu_temperature_celsius", *PER_GPU, how="max"), GPU_LEGEND),
            width=HALF,
        ),
        time_per_output_token(HALF),
    ),
)

PARALLELISM = Dashboard(
    "energylens-parallelism",
    "Energy of vLLM: experts and parallelism",
    "What several GPUs and experts cost beyond arithmetic: communication, waiting, uneven load.",
    (_SUMMARY, _OVER_TIME, _EXPERTS, _GPUS),
)
