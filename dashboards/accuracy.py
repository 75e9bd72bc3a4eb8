"""How good the prediction is, what it rests on, what was learnt, and how the meter is."""

from __future__ import annotations

from energylens_vllm.dashboards.panel import HALF, QUARTER, Dashboard, Panel, Query, Row, graph, stat, table
from energylens_vllm.dashboards.promql import CHOSEN, ENGINE, ratio
from energylens_vllm.dashboards.series import (
    COMPARED,
    ENGINE_LEGEND,
    ERROR,
    FIVE_MINUTES,
    GPU_LEGEND,
    PER_ENGINE,
    PER_GPU,
    RANGE,
    quantiles,
    time_per_output_token,
)

rate, increase, gauge = CHOSEN.rate, CHOSEN.increase, CHOSEN.gauge

_WINDOWS = "energylens_compared_windows_total"
_STEPS = "energylens_steps_total"
_MEASURED_TIME = "energylens_measured_step_time_seconds_total"
_PREDICTED_TIME = "energylens_predicted_step_time_seconds_total"


def _over_measured(numerator: str, over: str, **labels: str) -> str:
    """A counter of the compared windows over their measured energy."""
    return ratio(increase(numerator, over=over, **labels), increase(COMPARED, over=over, side="measured"))


def _bias(over: str) -> str:
    return f"{_over_measured(COMPARED, over, side='predicted')} - 1"


_SUMMARY = Row(
    "In this time range",
    (
        stat(
            "Bias",
            "percentunit",
            "Predicted over measured energy of all windows compared in the time range, less one.",
            _bias(RANGE),
            width=QUARTER,
            over_range=True,
        ),
        stat(
            "wMAPE",
            "percentunit",
            "Sum of the windows' absolute errors over their measured energy, in the time range.",
            _over_measured(ERROR, RANGE),
            width=QUARTER,
            over_range=True,
        ),
        stat(
            "Inside the 90 % interval",
            "percentunit",
            "Share of the windows whose measured energy was inside the prediction interval.",
            ratio(increase(_WINDOWS, over=RANGE, interval="inside"), increase(_WINDOWS, over=RANGE)),
            width=QUARTER,
            over_range=True,
        ),
        stat(
            "Measured over predicted time",
            "percentunit",
            "Measured over predicted duration of all steps in the time range.",
            ratio(increase(_MEASURED_TIME, over=RANGE), increase(_PREDICTED_TIME, over=RANGE)),
            width=QUARTER,
            over_range=True,
        ),
    ),
)

_ENERGY = Row(
    "Energy",
    (
        graph(
            "Predicted and measured",
            "watt",
            "Mean power over the windows that were compared; idle time is in both.",
            Query(rate(COMPARED, "side", over="1m"), "{{side}}"),
        ),
        graph(
            "Bias and wMAPE",
            "percentunit",
            "Over the last 5 minutes. Bias that lasts is drift: see the runbook.",
            Query(_bias(FIVE_MINUTES), "bias"),
            Query(_over_measured(ERROR, FIVE_MINUTES), "wMAPE"),
            zero_based=False,
        ),
        graph(
            "Bias since the start",
            "percentunit",
            "Predicted over measured energy of all windows since each engine started, less one.",
            Query(gauge("energylens_bias_ratio", *PER_ENGINE, how="avg"), ENGINE_LEGEND),
            zero_based=False,
        ),
        Panel(
            "Errors of windows over time",
            "heatmap",
            "percentunit",
            "How many windows had which relative error (predicted over measured, less one).",
            (Query(CHOSEN.buckets("energylens_relative_error"), "{{le}}"),),
            width=HALF,
        ),
        graph(
            "Windows",
            "short",
            "Windows in 5 minutes: inside and outside the prediction interval, and those that could not be "
            "compared, by reason.",
            Query(increase(_WINDOWS, "interval", over=FIVE_MINUTES), "{{interval}} the interval"),
            Query(
                increase("energylens_uncompared_windows_total", "reason", over=FIVE_MINUTES), "not compared: {{reason}}"
            ),
            width=HALF,
            axis_to=1,
        ),
    ),
)

_LEARNING = Row(
    "What predictions learn from the meter",
    (
        graph(
            "With and without what was learnt: wMAPE",
            "percentunit",
            "Absolute errors of the windows over their measured energy in 5 minutes: of the predictions, and of what "
            "the profile alone would have predicted.",
            Query(_over_measured(ERROR, FIVE_MINUTES), "with"),
            Query(_over_measured("energylens_uncorrected_absolute_error_joules_total", FIVE_MINUTES), "without"),
        ),
        graph(
            "With and without what was learnt: bias",
            "percentunit",
            "Predicted over measured energy in 5 minutes, less one: as predicted, and by the profile alone.",
            Query(_bias(FIVE_MINUTES), "with"),
            Query(f"{_over_measured('energylens_uncorrected_energy_joules_total', FIVE_MINUTES)} - 1", "without"),
            zero_based=False,
        ),
        graph(
            "Windows learnt from",
            "short",
            "Compared windows in 5 minutes by what learning made of them.",
            Query(increase("energylens_learning_windows_total", "outcome", over=FIVE_MINUTES), "{{outcome}}"),
            axis_to=1,
        ),
        graph(
            "Learnt factors",
            "percentunit",
            "What each engine has learnt of its profile's coefficients: 100 % is as the profile says. "
            "docs/learning.md says what each stands for.",
            Query(
                gauge("energylens_learning_factor", *PER_ENGINE, "coefficient", how="avg"),
                f"{{{{coefficient}}}}: {ENGINE_LEGEND}",
            ),
            zero_based=False,
        ),
        graph(
            "How sure they are",
            "percentunit",
            "One standard deviation of each factor.",
            Query(
                gauge("energylens_learning_factor_std", *PER_ENGINE, "coefficient", how="avg"),
                f"{{{{coefficient}}}}: {ENGINE_LEGEND}",
            ),
        ),
        graph(
            "State of learning",
            "short",
            "How many engines are in each state; none is in any without a meter.",
            Query(gauge("energylens_learning_state", "state"), "{{state}}"),
            axis_to=1,
        ),
    ),
)

_TIME = Row(
    "Time",
    (
        graph(
            "Time of a step",
            "s",
            "Mean duration of the steps that were predicted.",
            Query(ratio(rate(_MEASURED_TIME), rate(_STEPS)), "measured"),
            Query(ratio(rate(_PREDICTED_TIME), rate(_STEPS)), "predicted"),
        ),
        graph(
            "Measured over predicted time of a step",
            "percentunit",
            "Over single steps.",
            *quantiles("energylens_step_time_ratio", of=(0.05, 0.5, 0.95)),
        ),
        time_per_output_token(),
    ),
)

_RESTS_ON = Row(
    "What the prediction rests on",
    (
        table(
            "Predicted for",
            "GPU profile, where its name came from, and the deployment of each engine.",
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
            width=16,
        ),
        table(
            "Releases",
            "Releases of the plugin and of vLLM.",
            Query(gauge("energylens_build_info", "instance", "version", "vllm_version", how="max")),
        ),
        graph(
            "Less than sure",
            "percentunit",
            "Share of steps whose prediction has a flag, by reason. docs/accuracy.md says what each means.",
            Query(
                f"{rate('energylens_flagged_steps_total', 'flag')} / on () group_left () ({rate(_STEPS)} > 0)",
                "{{flag}}",
            ),
            axis_to=1,
        ),
        graph(
            "Not predicted",
            "short",
            "Steps a second without a prediction, and failures inside the plugin by place (in 5 minutes).",
            Query(rate("energylens_unpredicted_steps_total"), "steps not predicted"),
            Query(increase("energylens_plugin_failures_total", "place", over=FIVE_MINUTES), "failures: {{place}}"),
            axis_to=1,
        ),
        graph(
            "State of the predictor",
            "short",
            "How many engines are in each state.",
            Query(gauge("energylens_predictor_state", "state"), "{{state}}"),
            axis_to=1,
        ),
    ),
)

_METER = Row(
    "The meter",
    (
        graph(
            "Meter is up",
            "short",
            "1 if all GPUs of the engine can be read; and for each GPU 1 if its counter and its power agree.",
            Query(gauge("energylens_nvml_up", *PER_ENGINE, how="min"), f"up: {ENGINE_LEGEND}"),
            Query(gauge("energylens_gpu_reading_trusted", *PER_GPU, how="min"), f"trusted: {GPU_LEGEND}"),
            axis_to=1,
        ),
        graph(
            "Age of the last reading",
            "s",
            "Time since a GPU was read.",
            Query(gauge("energylens_gpu_reading_age_seconds", *PER_GPU, how="max"), GPU_LEGEND),
        ),
        graph(
            "Faults",
            "short",
            "What went wrong in reading GPUs, in 5 minutes; docs/meter.md says what each means.",
            Query(increase("energylens_meter_faults_total", "kind", over=FIVE_MINUTES), "{{kind}}"),
            axis_to=1,
        ),
    ),
)

ACCURACY = Dashboard(
    "energylens-accuracy",
    "Energy of vLLM: accuracy of the prediction",
    "Predicted against measured energy over the same stretches of time, and what the prediction rests on.",
    (_SUMMARY, _ENERGY, _LEARNING, _TIME, _RESTS_ON, _METER),
)
