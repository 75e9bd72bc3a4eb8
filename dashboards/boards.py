"""What the four dashboards show. Together they show every metric that the plugin exports."""

from __future__ import annotations

from energylens_vllm.dashboards.panel import Dashboard, Panel, Query, Row
from energylens_vllm.dashboards.promql import CHOSEN, ENGINE, ratio

JOULES_PER_KWH = "3.6e6"
RANGE = "$__range"

_MEASURED = "energylens_gpu_energy_joules_total"
_PREDICTED = "energylens_predicted_energy_joules_total"
_COMPONENTS = "energylens_predicted_component_energy_joules_total"
_BOUNDS = "energylens_predicted_energy_bound_joules_total"
_COMPARED = "energylens_compared_energy_joules_total"
_ERROR = "energylens_absolute_error_joules_total"
_WINDOWS = "energylens_compared_windows_total"
_TOKENS = "energylens_tokens_total"
_OUTPUT = "vllm:generation_tokens_total"
_TTFT = "vllm:time_to_first_token_seconds"
_ITL = "vllm:inter_token_latency_seconds"
_GPU = "{{instance}} GPU {{gpu}}"
_ENGINE = "{{instance}} engine {{engine}}"

rate, increase, gauge = CHOSEN.rate, CHOSEN.increase, CHOSEN.gauge


def _latency(name: str, *by: str, legend: str = "") -> tuple[Query, ...]:
    """Median and 95th percentile of one of vLLM's latencies."""
    return tuple(
        Query(CHOSEN.quantile(q, name, *by), f"{legend}{label}") for q, label in ((0.5, "median"), (0.95, "95 %"))
    )


def _kwh(over: str = RANGE) -> str:
    return f"{increase(_MEASURED, over=over)} / {JOULES_PER_KWH}"


_SUMMARY = Row(
    "Now and in this time range",
    (
        Panel(
            "Power now",
            "stat",
            "watt",
            "Measured power of all GPUs, idle ones included.",
            (Query(gauge("energylens_gpu_power_watts")),),
            width=4,
            height=5,
        ),
        Panel(
            "Energy per output token now",
            "stat",
            "joule",
            "Measured GPU energy, idle time included, over the tokens that vLLM generated.",
            (Query(ratio(rate(_MEASURED), rate(_OUTPUT))),),
            width=4,
            height=5,
        ),
        Panel(
            "Energy per request",
            "stat",
            "joule",
            "Measured GPU energy over requests finished, in the whole time range.",
            (Query(ratio(increase(_MEASURED, over=RANGE), increase("vllm:request_success_total", over=RANGE))),),
            width=4,
            height=5,
            over_range=True,
        ),
        Panel(
            "Energy",
            "stat",
            "kwatth",
            "Measured GPU energy in the whole time range.",
            (Query(_kwh()),),
            width=4,
            height=5,
            over_range=True,
        ),
        Panel(
            "Emissions",
            "stat",
            "massg",
            "Grams of CO2 equivalent of the measured GPU energy in the time range, at the carbon intensity and the PUE "
            "typed in above. GPUs only: the hosts are not measured.",
            (Query(f"{_kwh()} * $pue * $carbon"),),
            width=4,
            height=5,
            over_range=True,
        ),
        Panel(
            "Cost",
            "stat",
            "short",
            "Cost of the measured GPU energy in the time range, at the price and the PUE typed in above, in the "
            "price's currency.",
            (Query(f"{_kwh()} * $pue * $price"),),
            width=4,
            height=5,
            over_range=True,
        ),
    ),
)

OVERVIEW = Dashboard(
    "energylens-overview",
    "Energy of vLLM: overview",
    "Power, energy per token and per request, by phase and by what it is spent on, beside vLLM's latency.",
    (
        _SUMMARY,
        Row(
            "Energy and latency on one time axis",
            (
                Panel(
                    "Power",
                    "timeseries",
                    "watt",
                    "Measured power of all GPUs and predicted power of the steps, with both ends of its 90 % interval. "
                    "A prediction covers steps only: with an idle engine it falls to 0 and the measured power to idle.",
                    (
                        Query(rate(_MEASURED), "measured"),
                        Query(rate(_PREDICTED), "predicted"),
                        Query(rate(_BOUNDS, "bound"), "{{bound}} bound"),
                    ),
                    width=12,
                ),
                Panel(
                    "Energy per output token",
                    "timeseries",
                    "joule",
                    "GPU energy over the tokens that vLLM generated; the prediction leaves idle time out.",
                    (
                        Query(ratio(rate(_MEASURED), rate(_OUTPUT)), "measured"),
                        Query(ratio(rate(_PREDICTED), rate(_OUTPUT)), "predicted"),
                    ),
                    width=12,
                ),
                Panel("Time to first token", "timeseries", "s", "As vLLM measures it.", _latency(_TTFT), width=12),
                Panel(
                    "Time per output token",
                    "timeseries",
                    "s",
                    "Time between two tokens of a request, as vLLM measures it.",
                    _latency(_ITL),
                    width=12,
                ),
            ),
        ),
        Row(
            "What the energy is spent on",
            (
                Panel(
                    "By phase",
                    "timeseries",
                    "watt",
                    "Predicted power of prefill and of decode. A GPU's counter cannot tell them apart.",
                    (Query(rate(_PREDICTED, "phase"), "{{phase}}"),),
                    stacked=True,
                ),
                Panel(
                    "By component",
                    "timeseries",
                    "watt",
                    "Predicted power by what it is spent on: static, arithmetic of linear layers, attention and "
                    "experts, bytes of weights, KV cache and activations, communication, and waiting for the host.",
                    (Query(rate(_COMPONENTS, "component"), "{{component}}"),),
                    stacked=True,
                ),
                Panel(
                    "Per token computed, by phase",
                    "timeseries",
                    "joule",
                    "Predicted energy of each phase over its tokens; and measured energy, apportioned to the phases by "
                    "their predicted shares, so that idle time is in it.",
                    (
                        Query(f"{rate(_PREDICTED, 'phase')} / ({rate(_TOKENS, 'phase')} > 0)", "{{phase}}, predicted"),
                        Query(
                            f"{rate(_PREDICTED, 'phase')} / ({rate(_TOKENS, 'phase')} > 0) * scalar("
                            f"{ratio(rate(_MEASURED), rate(_PREDICTED))})",
                            "{{phase}}, measured, apportioned",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Requests and tokens",
            (
                Panel(
                    "Energy of a request",
                    "timeseries",
                    "joule",
                    "Predicted energy of finished requests by phase, if the plugin's setting `attribution` is on.",
                    (
                        Query(CHOSEN.quantile(0.5, "energylens_request_energy_joules", "phase"), "{{phase}}, median"),
                        Query(CHOSEN.quantile(0.95, "energylens_request_energy_joules", "phase"), "{{phase}}, 95 %"),
                    ),
                ),
                Panel(
                    "Charged to requests, and saved",
                    "timeseries",
                    "watt",
                    "Predicted power that was charged to requests, by phase, and what prompt tokens found in a prefix "
                    "cache would have cost, if the plugin's setting `attribution` is on.",
                    (
                        Query(rate("energylens_attributed_energy_joules_total", "phase"), "{{phase}}"),
                        Query(rate("energylens_saved_energy_joules_total"), "saved by the prefix cache"),
                    ),
                ),
                Panel(
                    "Energy of a step",
                    "timeseries",
                    "joule",
                    "Predicted energy of one engine step.",
                    (
                        Query(CHOSEN.quantile(0.5, "energylens_step_energy_joules"), "median"),
                        Query(CHOSEN.quantile(0.95, "energylens_step_energy_joules"), "95 %"),
                        Query(CHOSEN.mean("energylens_step_energy_joules"), "mean"),
                    ),
                ),
                Panel(
                    "Tokens",
                    "timeseries",
                    "short",
                    "Tokens a second: computed by the engine in each phase, found in a prefix cache, drafted by "
                    "speculative decoding, and prompt and output tokens as vLLM counts them.",
                    (
                        Query(rate(_TOKENS, "phase"), "{{phase}}"),
                        Query(rate("energylens_cached_tokens_total"), "found in a prefix cache"),
                        Query(rate("energylens_draft_tokens_total"), "drafts verified"),
                        Query(rate(_OUTPUT), "vLLM: output"),
                        Query(rate("vllm:prompt_tokens_total"), "vLLM: prompt"),
                    ),
                ),
                Panel(
                    "Requests in vLLM",
                    "timeseries",
                    "short",
                    "Requests that run and that wait.",
                    (
                        Query(gauge("vllm:num_requests_running"), "running"),
                        Query(gauge("vllm:num_requests_waiting"), "waiting"),
                    ),
                    axis_to=1,
                ),
                Panel(
                    "Time of a request",
                    "timeseries",
                    "s",
                    "From arrival to the last token, as vLLM measures it.",
                    _latency("vllm:e2e_request_latency_seconds"),
                ),
            ),
        ),
    ),
    variables=(("carbon", "gCO2e per kWh", "400"), ("price", "Price per kWh", "0.15"), ("pue", "PUE", "1.2")),
)


def _side(side: str, over: str | None = None) -> str:
    return increase(_COMPARED, over=over, side=side)


#: windows last 5 s and are reported one by one, so errors are taken over more than a scrape or two
_OVER = "5m"

ACCURACY = Dashboard(
    "energylens-accuracy",
    "Energy of vLLM: accuracy of the prediction",
    "Predicted against measured energy over the same stretches of time, and what the prediction rests on.",
    (
        Row(
            "In this time range",
            (
                Panel(
                    "Bias",
                    "stat",
                    "percentunit",
                    "Predicted over measured energy of all windows compared in the time range, less one.",
                    (Query(f"{ratio(_side('predicted', RANGE), _side('measured', RANGE))} - 1"),),
                    width=6,
                    height=5,
                    over_range=True,
                ),
                Panel(
                    "wMAPE",
                    "stat",
                    "percentunit",
                    "Sum of the windows' absolute errors over their measured energy, in the time range.",
                    (Query(ratio(increase(_ERROR, over=RANGE), _side("measured", RANGE))),),
                    width=6,
                    height=5,
                    over_range=True,
                ),
                Panel(
                    "Inside the 90 % interval",
                    "stat",
                    "percentunit",
                    "Share of the windows whose measured energy was inside the prediction interval.",
                    (Query(ratio(increase(_WINDOWS, over=RANGE, interval="inside"), increase(_WINDOWS, over=RANGE))),),
                    width=6,
                    height=5,
                    over_range=True,
                ),
                Panel(
                    "Measured over predicted time",
                    "stat",
                    "percentunit",
                    "Measured over predicted duration of all steps in the time range.",
                    (
                        Query(
                            ratio(
                                increase("energylens_measured_step_time_seconds_total", over=RANGE),
                                increase("energylens_predicted_step_time_seconds_total", over=RANGE),
                            )
                        ),
                    ),
                    width=6,
                    height=5,
                    over_range=True,
                ),
            ),
        ),
        Row(
            "Energy",
            (
                Panel(
                    "Predicted and measured",
                    "timeseries",
                    "watt",
                    "Mean power over the windows that were compared; idle time is in both.",
                    (Query(rate(_COMPARED, "side", over="1m"), "{{side}}"),),
                ),
                Panel(
                    "Bias and wMAPE",
                    "timeseries",
                    "percentunit",
                    "Over the last 5 minutes. Bias that lasts is drift: see the runbook.",
                    (
                        Query(f"{ratio(_side('predicted', _OVER), _side('measured', _OVER))} - 1", "bias"),
                        Query(ratio(increase(_ERROR, over=_OVER), _side("measured", _OVER)), "wMAPE"),
                    ),
                    zero_based=False,
                ),
                Panel(
                    "Bias since the start",
                    "timeseries",
                    "percentunit",
                    "Predicted over measured energy of all windows since each engine started, less one.",
                    (Query(gauge("energylens_bias_ratio", "instance", "engine", how="avg"), _ENGINE),),
                    zero_based=False,
                ),
                Panel(
                    "Errors of windows over time",
                    "heatmap",
                    "percentunit",
                    "How many windows had which relative error (predicted over measured, less one).",
                    (Query(CHOSEN.buckets("energylens_relative_error"), "{{le}}"),),
                    width=12,
                ),
                Panel(
                    "Windows",
                    "timeseries",
                    "short",
                    "Windows in 5 minutes: inside and outside the prediction interval, and those that could not be "
                    "compared, by reason.",
                    (
                        Query(increase(_WINDOWS, "interval", over=_OVER), "{{interval}} the interval"),
                        Query(
                            increase("energylens_uncompared_windows_total", "reason", over=_OVER),
                            "not compared: {{reason}}",
                        ),
                    ),
                    width=12,
                    axis_to=1,
                ),
            ),
        ),
        Row(
            "Time",
            (
                Panel(
                    "Time of a step",
                    "timeseries",
                    "s",
                    "Mean duration of the steps that were predicted.",
                    (
                        Query(
                            ratio(rate("energylens_measured_step_time_seconds_total"), rate("energylens_steps_total")),
                            "measured",
                        ),
                        Query(
                            ratio(rate("energylens_predicted_step_time_seconds_total"), rate("energylens_steps_total")),
                            "predicted",
                        ),
                    ),
                ),
                Panel(
                    "Measured over predicted time of a step",
                    "timeseries",
                    "percentunit",
                    "Over single steps.",
                    tuple(
                        Query(CHOSEN.quantile(q, "energylens_step_time_ratio"), label)
                        for q, label in ((0.05, "5 %"), (0.5, "median"), (0.95, "95 %"))
                    ),
                ),
                Panel(
                    "Time per output token",
                    "timeseries",
                    "s",
                    "Time between two tokens of a request, as vLLM measures it.",
                    _latency(_ITL),
                ),
            ),
        ),
        Row(
            "What the prediction rests on",
            (
                Panel(
                    "Predicted for",
                    "table",
                    "short",
                    "GPU profile, where its name came from, and the deployment of each engine.",
                    (
                        Query(
                            gauge(
                                "energylens_profile_info",
                                *ENGINE,
                                "gpu",
                                "source",
                                "dtype",
                                "quantization",
                                "tensor_parallel_size",
                                "pipeline_parallel_size",
                                how="max",
                            )
                        ),
                    ),
                    width=16,
                ),
                Panel(
                    "Releases",
                    "table",
                    "short",
                    "Releases of the plugin and of vLLM.",
                    (Query(gauge("energylens_build_info", "instance", "version", "vllm_version", how="max")),),
                ),
                Panel(
                    "Less than sure",
                    "timeseries",
                    "percentunit",
                    "Share of steps whose prediction has a flag, by reason. docs/accuracy.md says what each means.",
                    (
                        Query(
                            f"{rate('energylens_flagged_steps_total', 'flag')} / on () group_left () "
                            f"({rate('energylens_steps_total')} > 0)",
                            "{{flag}}",
                        ),
                    ),
                    axis_to=1,
                ),
                Panel(
                    "Not predicted",
                    "timeseries",
                    "short",
                    "Steps a second without a prediction, and failures inside the plugin by place (in 5 minutes).",
                    (
                        Query(rate("energylens_unpredicted_steps_total"), "steps not predicted"),
                        Query(increase("energylens_plugin_failures_total", "place", over=_OVER), "failures: {{place}}"),
                    ),
                    axis_to=1,
                ),
                Panel(
                    "State of the predictor",
                    "timeseries",
                    "short",
                    "How many engines are in each state.",
                    (Query(gauge("energylens_predictor_state", "state"), "{{state}}"),),
                    axis_to=1,
                ),
            ),
        ),
        Row(
            "The meter",
            (
                Panel(
                    "Meter is up",
                    "timeseries",
                    "short",
                    "1 if all GPUs of the engine can be read; and for each GPU 1 if its counter and its power agree.",
                    (
                        Query(gauge("energylens_nvml_up", "instance", "engine", how="min"), f"up: {_ENGINE}"),
                        Query(
                            gauge("energylens_gpu_reading_trusted", "instance", "gpu", how="min"), f"trusted: {_GPU}"
                        ),
                    ),
                    axis_to=1,
                ),
                Panel(
                    "Age of the last reading",
                    "timeseries",
                    "s",
                    "Time since a GPU was read.",
                    (Query(gauge("energylens_gpu_reading_age_seconds", "instance", "gpu", how="max"), _GPU),),
                ),
                Panel(
                    "Faults",
                    "timeseries",
                    "short",
                    "What went wrong in reading GPUs, in 5 minutes; docs/meter.md says what each means.",
                    (Query(increase("energylens_meter_faults_total", "kind", over=_OVER), "{{kind}}"),),
                    axis_to=1,
                ),
            ),
        ),
    ),
)


def _share(*components: str) -> str:
    parts = " + ".join(rate(_COMPONENTS, component=component) for component in components)
    return ratio(f"({parts})" if len(components) > 1 else parts, rate(_PREDICTED))


def _imbalance(values: str) -> str:
    """The largest over the mean, less one: 0 if all are alike."""
    return f"max({values}) / (avg({values}) > 0) - 1"


PARALLELISM = Dashboard(
    "energylens-parallelism",
    "Energy of vLLM: experts and parallelism",
    "What several GPUs and experts cost beyond arithmetic: communication, waiting, uneven load.",
    (
        Row(
            "Shares of the predicted energy",
            (
                Panel(
                    "Communication",
                    "stat",
                    "percentunit",
                    "Share of communication between GPUs.",
                    (Query(_share("communication")),),
                    width=6,
                    height=5,
                ),
                Panel(
                    "Waiting for the host",
                    "stat",
                    "percentunit",
                    "Share of static power while the GPU waits for the host.",
                    (Query(_share("host_gap")),),
                    width=6,
                    height=5,
                ),
                Panel(
                    "Static",
                    "stat",
                    "percentunit",
                    "Share of static power while a step runs. Ranks that wait for the hottest one add to it.",
                    (Query(_share("static")),),
                    width=6,
                    height=5,
                ),
                Panel(
                    "Experts and weights",
                    "stat",
                    "percentunit",
                    "Share of the experts' arithmetic and of reading weights.",
                    (Query(_share("experts", "weights")),),
                    width=6,
                    height=5,
                ),
            ),
        ),
        Row(
            "Over time",
            (
                Panel(
                    "Waste",
                    "timeseries",
                    "percentunit",
                    "Shares of the predicted energy that compute nothing: communication, waiting for the host, static.",
                    tuple(
                        Query(_share(name), name.replace("_", " ")) for name in ("communication", "host_gap", "static")
                    ),
                    width=12,
                ),
                Panel(
                    "Useful work",
                    "timeseries",
                    "percentunit",
                    "Shares of the predicted energy that go into arithmetic and into moving bytes.",
                    tuple(
                        Query(_share(name), name.replace("_", " "))
                        for name in ("linear", "attention", "experts", "weights", "kv_cache", "activations")
                    ),
                    width=12,
                ),
                Panel(
                    "Imbalance",
                    "timeseries",
                    "percentunit",
                    "Largest over mean, less one: of the tokens that engines compute (data parallelism), and of the "
                    "energy of GPUs. 0 if all are alike.",
                    (
                        Query(_imbalance(rate(_TOKENS, "instance", "engine")), "tokens of engines"),
                        Query(_imbalance(rate(_MEASURED, "instance", "engine", "gpu")), "energy of GPUs"),
                    ),
                    zero_based=False,
                ),
                Panel(
                    "Steps",
                    "timeseries",
                    "short",
                    "Steps a second by what they do, and those without requests that a data-parallel rank ran to stay "
                    "in step with the others.",
                    (
                        Query(rate("energylens_steps_total", "phase"), "{{phase}}"),
                        Query(rate("energylens_dummy_steps_total"), "without requests"),
                    ),
                ),
                Panel(
                    "Busy",
                    "timeseries",
                    "percentunit",
                    "Share of time in which an engine's steps run, by measured duration.",
                    (Query(rate("energylens_measured_step_time_seconds_total", "instance", "engine"), _ENGINE),),
                ),
            ),
        ),
        Row(
            "GPUs",
            (
                Panel(
                    "Power of each GPU",
                    "timeseries",
                    "watt",
                    "Measured power and the limit in force; on a superchip also the power of the module that the "
                    "GPU is on, CPU included.",
                    (
                        Query(gauge("energylens_gpu_power_watts", "instance", "gpu", how="max"), _GPU),
                        Query(
                            gauge("energylens_gpu_power_limit_watts", "instance", "gpu", how="max"), f"limit: {_GPU}"
                        ),
                        Query(rate("energylens_gpu_module_energy_joules_total", "instance", "gpu"), f"module: {_GPU}"),
                    ),
                ),
                Panel(
                    "Below the top clock",
                    "timeseries",
                    "percentunit",
                    "Share of time in which GPUs ran below their top clock, by reason; reasons may hold at once.",
                    (
                        Query(
                            rate("energylens_gpu_throttled_seconds_total", "instance", "gpu", "reason"),
                            f"{{{{reason}}}}: {_GPU}",
                        ),
                    ),
                ),
                Panel(
                    "Clocks",
                    "timeseries",
                    "hertz",
                    "Clocks of SMs and of memory.",
                    (
                        Query(gauge("energylens_gpu_sm_clock_hertz", "instance", "gpu", how="max"), f"SM: {_GPU}"),
                        Query(
                            gauge("energylens_gpu_memory_clock_hertz", "instance", "gpu", how="max"), f"memory: {_GPU}"
                        ),
                    ),
                ),
                Panel(
                    "Temperature",
                    "timeseries",
                    "celsius",
                    "Temperature of each GPU.",
                    (Query(gauge("energylens_gpu_temperature_celsius", "instance", "gpu", how="max"), _GPU),),
                    width=12,
                ),
                Panel(
                    "Time per output token",
                    "timeseries",
                    "s",
                    "Time between two tokens of a request, as vLLM measures it.",
                    _latency(_ITL),
                    width=12,
                ),
            ),
        ),
    ),
)

_REPLICA = ("instance", "model_name", "engine")

FLEET = Dashboard(
    "energylens-fleet",
    "Energy of vLLM: fleet",
    "Replicas side by side: their energy, their load and their latency.",
    (
        Row(
            "Side by side",
            (
                Panel(
                    "Replicas",
                    "table",
                    "short",
                    "Each engine now: measured power, energy per output token, output tokens a second, requests that "
                    "run and wait, and 95th percentiles of vLLM's latencies.",
                    (
                        Query(gauge("energylens_gpu_power_watts", *_REPLICA), "power (W)"),
                        Query(f"{rate(_MEASURED, *_REPLICA)} / ({rate(_OUTPUT, *_REPLICA)} > 0)", "J per output token"),
                        Query(rate(_OUTPUT, *_REPLICA), "output tokens/s"),
                        Query(gauge("vllm:num_requests_running", *_REPLICA), "running"),
                        Query(gauge("vllm:num_requests_waiting", *_REPLICA), "waiting"),
                        Query(CHOSEN.quantile(0.95, _TTFT, *_REPLICA), "first token 95 % (s)"),
                        Query(CHOSEN.quantile(0.95, _ITL, *_REPLICA), "per token 95 % (s)"),
                    ),
                    width=24,
                ),
            ),
        ),
        Row(
            "Energy",
            (
                Panel(
                    "Energy per output token",
                    "timeseries",
                    "joule",
                    "Measured GPU energy, idle time included, over the tokens that each replica generated.",
                    (
                        Query(
                            f"{rate(_MEASURED, 'instance', 'engine')} / ({rate(_OUTPUT, 'instance', 'engine')} > 0)",
                            _ENGINE,
                        ),
                    ),
                    width=12,
                ),
                Panel(
                    "Energy per output token, in the time range",
                    "bargauge",
                    "joule",
                    "The same over the whole time range.",
                    (
                        Query(
                            f"{increase(_MEASURED, 'instance', 'engine', over=RANGE)} / "
                            f"({increase(_OUTPUT, 'instance', 'engine', over=RANGE)} > 0)",
                            _ENGINE,
                        ),
                    ),
                    width=12,
                ),
                Panel(
                    "Power",
                    "timeseries",
                    "watt",
                    "Measured power of each replica's GPUs.",
                    (Query(gauge("energylens_gpu_power_watts", "instance", "engine"), _ENGINE),),
                    width=12,
                    stacked=True,
                ),
                Panel(
                    "Energy against latency",
                    "timeseries",
                    "joule",
                    "Energy per output token of all replicas together (left) beside the 95th percentiles of vLLM's "
                    "latencies (right).",
                    (
                        Query(ratio(rate(_MEASURED), rate(_OUTPUT)), "energy per output token"),
                        Query(CHOSEN.quantile(0.95, _TTFT), "first token, 95 %", unit="s", axis="right"),
                        Query(CHOSEN.quantile(0.95, _ITL), "per output token, 95 %", unit="s", axis="right"),
                    ),
                    width=12,
                ),
            ),
        ),
        Row(
            "Load",
            (
                Panel(
                    "Output tokens",
                    "timeseries",
                    "short",
                    "Tokens that each replica generates a second.",
                    (Query(rate(_OUTPUT, "instance", "engine"), _ENGINE),),
                ),
                Panel(
                    "Requests waiting",
                    "timeseries",
                    "short",
                    "Requests that wait in each replica.",
                    (Query(gauge("vllm:num_requests_waiting", "instance", "engine"), _ENGINE),),
                    axis_to=1,
                ),
                Panel(
                    "Time to first token, 95 %",
                    "timeseries",
                    "s",
                    "As vLLM measures it.",
                    (Query(CHOSEN.quantile(0.95, _TTFT, "instance", "engine"), _ENGINE),),
                ),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, ACCURACY, PARALLELISM, FLEET)
