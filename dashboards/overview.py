"""The overview: power, energy per token and per request, by phase and by what it is spent on, beside latency."""

from __future__ import annotations

from energylens_vllm.dashboards.panel import HALF, SIXTH, Dashboard, Query, Row, graph, stat
from energylens_vllm.dashboards.promql import CHOSEN, ratio
from energylens_vllm.dashboards.series import (
    COMPONENTS,
    MEASURED,
    OUTPUT,
    PREDICTED,
    RANGE,
    TOKENS,
    TTFT,
    joules_per_output_token,
    quantiles,
    time_per_output_token,
)

rate, increase, gauge = CHOSEN.rate, CHOSEN.increase, CHOSEN.gauge

_KWH = f"{increase(MEASURED, over=RANGE)} / 3.6e6"
_PER_TOKEN = ratio(rate(PREDICTED, "phase"), rate(TOKENS, "phase"))
_IDLE_TIME_SHARED_OUT = f"scalar({ratio(rate(MEASURED), rate(PREDICTED))})"

_SUMMARY = Row(
    "Now and in this time range",
    (
        stat(
            "Power now",
            "watt",
            "Measured power of all GPUs, idle ones included.",
            gauge("energylens_gpu_power_watts"),
            width=SIXTH,
        ),
        stat(
            "Energy per output token now",
            "joule",
            "Measured GPU energy, idle time included, over the tokens that vLLM generated.",
            joules_per_output_token(),
            width=SIXTH,
        ),
        stat(
            "Energy per request",
            "joule",
            "Measured GPU energy over requests finished, in the whole time range.",
            ratio(increase(MEASURED, over=RANGE), increase("vllm:request_success_total", over=RANGE)),
            width=SIXTH,
            over_range=True,
        ),
        stat(
            "Energy",
            "kwatth",
            "Measured GPU energy in the whole time range.",
            _KWH,
            width=SIXTH,
            over_range=True,
        ),
        stat(
            "Emissions",
            "massg",
            "Grams of CO2 equivalent of the measured GPU energy in the time range, at the carbon intensity and the PUE "
            "typed in above. GPUs only: the hosts are not measured.",
            f"{_KWH} * $pue * $carbon",
            width=SIXTH,
            over_range=True,
        ),
        stat(
            "Cost",
            "short",
            "Cost of the measured GPU energy in the time range, at the price and the PUE typed in above, in the "
            "price's currency.",
            f"{_KWH} * $pue * $price",
            width=SIXTH,
            over_range=True,
        ),
    ),
)

_ENERGY_AND_LATENCY = Row(
    "Energy and latency on one time axis",
    (
        graph(
            "Power",
            "watt",
            "Measured power of all GPUs and predicted power of the steps, with both ends of its 90 % interval. "
            "A prediction covers steps only: with an idle engine it falls to 0 and the measured power to idle.",
            Query(rate(MEASURED), "measured"),
            Query(rate(PREDICTED), "predicted"),
            Query(rate("energylens_predicted_energy_bound_joules_total", "bound"), "{{bound}} bound"),
            width=HALF,
        ),
        graph(
            "Energy per output token",
            "joule",
            "GPU energy over the tokens that vLLM generated; the prediction leaves idle time out.",
            Query(joules_per_output_token(), "measured"),
            Query(joules_per_output_token(energy=PREDICTED), "predicted"),
            width=HALF,
        ),
        graph("Time to first token", "s", "As vLLM measures it.", *quantiles(TTFT), width=HALF),
        time_per_output_token(HALF),
    ),
)

_SPENT_ON = Row(
    "What the energy is spent on",
    (
        graph(
            "By phase",
            "watt",
            "Predicted power of prefill and of decode. A GPU's counter cannot tell them apart.",
            Query(rate(PREDICTED, "phase"), "{{phase}}"),
            stacked=True,
        ),
        graph(
            "By component",
            "watt",
            "Predicted power by what it is spent on: static, arithmetic of linear layers, attention and "
            "experts, bytes of weights, KV cache and activations, communication, and waiting for the host.",
            Query(rate(COMPONENTS, "component"), "{{component}}"),
            stacked=True,
        ),
        graph(
            "Per token computed, by phase",
            "joule",
            "Predicted energy of each phase over its tokens; and measured energy, apportioned to the phases by "
            "their predicted shares, so that idle time is in it.",
            Query(_PER_TOKEN, "{{phase}}, predicted"),
            Query(f"{_PER_TOKEN} * {_IDLE_TIME_SHARED_OUT}", "{{phase}}, measured, apportioned"),
        ),
    ),
)

_REQUESTS_AND_TOKENS = Row(
    "Requests and tokens",
    (
        graph(
            "Energy of a request",
            "joule",
            "Predicted energy of finished requests by phase, if the plugin's setting `attribution` is on.",
            *quantiles("energylens_request_energy_joules", "phase", legend="{{phase}}, "),
        ),
        graph(
            "Charged to requests, and saved",
            "watt",
            "Predicted power that was charged to requests, by phase, and what prompt tokens found in a prefix "
            "cache would have cost, if the plugin's setting `attribution` is on.",
            Query(rate("energylens_attributed_energy_joules_total", "phase"), "{{phase}}"),
            Query(rate("energylens_saved_energy_joules_total"), "saved by the prefix cache"),
        ),
        graph(
            "Energy of a step",
            "joule",
            "Predicted energy of one engine step.",
            *quantiles("energylens_step_energy_joules"),
            Query(CHOSEN.mean("energylens_step_energy_joules"), "mean"),
        ),
        graph(
            "Tokens",
            "short",
            "Tokens a second: computed by the engine in each phase, found in a prefix cache, drafted by "
            "speculative decoding, and prompt and output tokens as vLLM counts them.",
            Query(rate(TOKENS, "phase"), "{{phase}}"),
            Query(rate("energylens_cached_tokens_total"), "found in a prefix cache"),
            Query(rate("energylens_draft_tokens_total"), "drafts verified"),
            Query(rate(OUTPUT), "vLLM: output"),
            Query(rate("vllm:prompt_tokens_total"), "vLLM: prompt"),
        ),
        graph(
            "Requests in vLLM",
            "short",
            "Requests that run and that wait.",
            Query(gauge("vllm:num_requests_running"), "running"),
            Query(gauge("vllm:num_requests_waiting"), "waiting"),
            axis_to=1,
        ),
        graph(
            "Time of a request",
            "s",
            "From arrival to the last token, as vLLM measures it.",
            *quantiles("vllm:e2e_request_latency_seconds"),
        ),
    ),
)

OVERVIEW = Dashboard(
    "energylens-overview",
    "Energy of vLLM: overview",
    "Power, energy per token and per request, by phase and by what it is spent on, beside vLLM's latency.",
    (_SUMMARY, _ENERGY_AND_LATENCY, _SPENT_ON, _REQUESTS_AND_TOKENS),
    numbers=(("carbon", "gCO2e per kWh", "400"), ("price", "Price per kWh", "0.15"), ("pue", "PUE", "1.2")),
)
