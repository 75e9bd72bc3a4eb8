"""Every exported metric, in one table: the exporter, docs/metrics.md and the dashboards are made from it.

A metric's `labels` are what it has besides `model_name` and `engine`, which all have, as vLLM's own metrics do. Where
the values of a label are known beforehand they stand here, so that each series exists (at 0) from the first scrape on.
`_total` of a counter is part of its name here.
"""

from __future__ import annotations

from energylens_vllm.meter.gpu import THROTTLE_REASONS
from energylens_vllm.meter.track import FAULTS
from energylens_vllm.metric import Metric as Metric

COMMON_LABELS = ("model_name", "engine")
MAX_SERIES_PER_ENGINE = 300

PHASES = ("prefill", "decode")
#: what the joules of a step are spent on; the values sum to the step's energy
COMPONENTS = (
    "static",
    "linear",
    "attention",
    "experts",
    "weights",
    "kv_cache",
    "activations",
    "communication",
    "host_gap",
)
#: what joules of a step of experts go to without effect: waiting for the rank with the hottest, or filling tiles up
WASTES = ("expert_imbalance", "expert_padding")
#: why a step's prediction is less than sure; each widens its interval. Others that the model gives count as "other"
FLAGS = (
    "uncalibrated_gpu",
    "uncalibrated_format",
    "reference_gpu",
    "extrapolated",
    "eager_host",
    "multimodal_not_modelled",
    "lora_not_modelled",
    "draft_model_not_modelled",
    "kv_transfer_not_modelled",
    "data_parallel_assumed_even",
    "all2all_not_modelled",
    "all2all_not_measured",
    "overlap_not_measured",
    "context_parallel",
    "other",
)
#: counters whose ratio says how much faster or slower steps are than predicted
PREDICTED_TIME = "energylens_predicted_step_time_seconds_total"
MEASURED_TIME = "energylens_measured_step_time_seconds_total"
#: where the plugin can fail without harm to serving
PLACES = ("start", "schedule", "update", "read", "predict", "listen", "report", "export")
PREDICTOR_STATES = ("ready", "model_unknown", "failed")
#: of learning from the meter
LEARNING_STATES = ("waiting", "learning", "bounded", "implausible", "off")
LEARNING_OUTCOMES = ("learnt", "outlier", "rejected")


def _decades(low: int, high: int) -> tuple[float, ...]:
    """1, 2, 5 in each power of ten from 10**low, up to 10**high."""
    return (*(float(f"{digit}e{power}") for power in range(low, high) for digit in (1, 2, 5)), float(f"1e{high}"))


_PHASE = (("phase", PHASES),)
_GPU = (("gpu", ()),)

PREDICTION = (
    Metric(
        "energylens_predicted_energy_joules_total",
        "counter",
        "joules",
        "Predicted GPU energy of the engine's steps, over all its GPUs.",
        _PHASE,
    ),
    Metric(
        "energylens_predicted_component_energy_joules_total",
        "counter",
        "joules",
        "The same joules by what they are spent on.",
        (("component", COMPONENTS),),
    ),
    Metric(
        "energylens_predicted_waste_joules_total",
        "counter",
        "joules",
        "Part of the predicted joules: static power while ranks wait for the one with the hottest experts "
        "(expert_imbalance), and arithmetic on rows that only fill experts' tiles up (expert_padding).",
        (("reason", WASTES),),
    ),
    Metric(
        "energylens_expert_selections_total",
        "counter",
        "selections",
        "Selections of an expert by a token that were counted (with the setting `learn_expert_routing`).",
    ),
    Metric(
        "energylens_expert_hottest_ratio",
        "gauge",
        "",
        "How often a layer's most wanted expert was selected, over its mean expert; mean of the layers (with the "
        "setting `learn_expert_routing`, once enough is counted).",
        from_start=False,
    ),
    Metric(
        "energylens_expert_imbalance_ratio",
        "gauge",
        "",
        "Rows of the expert-parallel rank that has most, over those of the mean rank, in large batches; mean of the "
        "layers. 1 is balance (with the setting `learn_expert_routing`, once predictions follow it).",
        from_start=False,
    ),
    Metric(
        "energylens_predicted_energy_bound_joules_total",
        "counter",
        "joules",
        "Lower and upper end of the prediction interval of the steps' energy, summed as if all errors went one way.",
        (("bound", ("lower", "upper")),),
    ),
    Metric(
        "energylens_step_energy_joules",
        "histogram",
        "joules",
        "Predicted energy of one engine step.",
        buckets=_decades(-1, 4)[:-1],
    ),
    Metric(
        PREDICTED_TIME,
        "counter",
        "seconds",
        "Predicted duration of the engine's steps.",
    ),
    Metric(
        MEASURED_TIME,
        "counter",
        "seconds",
        "Measured duration of the steps that were predicted; time without work is not in it.",
    ),
    Metric(
        "energylens_step_time_ratio",
        "histogram",
        "",
        "Measured over predicted duration of one engine step.",
        buckets=(0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4, 2.0, 4.0),
    ),
    Metric(
        "energylens_steps_total",
        "counter",
        "steps",
        "Engine steps that did work: prefill only, decode only, or both in one batch (mixed).",
        (("phase", (*PHASES, "mixed")),),
    ),
    Metric(
        "energylens_tokens_total",
        "counter",
        "tokens",
        "Tokens computed. Draft tokens of speculative decoding are decode work; tokens computed again after a "
        "preemption are prefill work.",
        _PHASE,
    ),
    Metric(
        "energylens_cached_tokens_total",
        "counter",
        "tokens",
        "Prompt tokens found in a prefix cache, which were not computed.",
    ),
    Metric(
        "energylens_draft_tokens_total",
        "counter",
        "tokens",
        "Draft tokens of speculative decoding that were verified (part of the decode tokens).",
    ),
    Metric(
        "energylens_unpredicted_steps_total",
        "counter",
        "steps",
        "Engine steps without a prediction: the model is not known, or predicting failed.",
    ),
    Metric(
        "energylens_dummy_steps_total",
        "counter",
        "steps",
        "Steps without requests that a data-parallel rank ran to stay in step with the others; not predicted.",
    ),
    Metric(
        "energylens_flagged_steps_total",
        "counter",
        "steps",
        "Engine steps whose prediction is less than sure, by reason. A step may have several.",
        (("flag", FLAGS),),
    ),
)

METER = (
    Metric(
        "energylens_nvml_up",
        "gauge",
        "",
        "1 if all GPUs of the engine on this host can be read now; 0 if not, or if there is no NVIDIA GPU.",
    ),
    Metric(
        "energylens_gpu_energy_joules_total",
        "counter",
        "joules",
        "Measured energy of a GPU. Time in which neither its counter nor its power could be read is not in it.",
        _GPU,
    ),
    Metric(
        "energylens_gpu_module_energy_joules_total",
        "counter",
        "joules",
        "On a superchip, measured energy of the module that the GPU is on, CPU included.",
        _GPU,
    ),
    Metric("energylens_gpu_power_watts", "gauge", "watts", "Mean power of a GPU over its last reading (1 s).", _GPU),
    Metric("energylens_gpu_power_limit_watts", "gauge", "watts", "The power limit in force.", _GPU),
    Metric("energylens_gpu_sm_clock_hertz", "gauge", "hertz", "Clock of the SMs.", _GPU),
    Metric("energylens_gpu_memory_clock_hertz", "gauge", "hertz", "Clock of the memory.", _GPU),
    Metric("energylens_gpu_temperature_celsius", "gauge", "celsius", "Temperature of the GPU.", _GPU),
    Metric(
        "energylens_gpu_throttled_seconds_total",
        "counter",
        "seconds",
        "Time in which a GPU ran below its top clock, by reason; sampled each 0.2 s. Reasons may hold at once.",
        (("gpu", ()), ("reason", THROTTLE_REASONS)),
    ),
    Metric(
        "energylens_gpu_reading_age_seconds", "gauge", "seconds", "Time since the last reading of a GPU ended.", _GPU
    ),
    Metric(
        "energylens_gpu_reading_trusted",
        "gauge",
        "",
        "1 if a GPU's energy counter and its integrated power agree within 10 % over 10 s; else 0.",
        _GPU,
    ),
    Metric(
        "energylens_meter_faults_total",
        "counter",
        "faults",
        "What went wrong in reading the GPUs, by kind; docs/meter.md says what each means.",
        (("kind", FAULTS),),
    ),
)

PAIRING = (
    Metric(
        "energylens_compared_energy_joules_total",
        "counter",
        "joules",
        "Energy over the windows in which prediction and measurement were compared, idle time included.",
        (("side", ("predicted", "measured")),),
    ),
    Metric(
        "energylens_absolute_error_joules_total",
        "counter",
        "joules",
        "Absolute difference of predicted and measured energy, summed over those windows.",
    ),
    Metric(
        "energylens_relative_error",
        "histogram",
        "",
        "Predicted over measured energy of one window (5 s), less one.",
        buckets=(-0.2, -0.1, -0.05, -0.03, -0.02, -0.01, 0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2),
    ),
    Metric(
        "energylens_bias_ratio",
        "gauge",
        "",
        "Predicted over measured energy of all windows since the engine started, less one.",
    ),
    Metric(
        "energylens_compared_windows_total",
        "counter",
        "windows",
        "Windows that were compared, by whether the measured energy was inside the prediction interval.",
        (("interval", ("inside", "outside")),),
    ),
    Metric(
        "energylens_uncompared_windows_total",
        "counter",
        "windows",
        "Windows that could not be compared: the meter is not to be trusted, or a step had no prediction.",
        (("reason", ("meter", "prediction")),),
    ),
)

LEARNING = (
    Metric(
        "energylens_learning_state",
        "gauge",
        "",
        "1 for the state that learning from the meter is in, 0 for the others: docs/learning.md says what each means.",
        (("state", LEARNING_STATES),),
    ),
    Metric(
        "energylens_learning_factor",
        "gauge",
        "",
        "What was learnt of a coefficient of the profile: factor on it, 1 as the profile says.",
        (("coefficient", ()),),
    ),
    Metric(
        "energylens_learning_factor_std",
        "gauge",
        "",
        "One standard deviation of that factor, as far as it is known by now.",
        (("coefficient", ()),),
    ),
    Metric(
        "energylens_learning_windows_total",
        "counter",
        "windows",
        "Compared windows by what learning made of them: learnt from, with less weight (outlier), or rejected.",
        (("outcome", LEARNING_OUTCOMES),),
    ),
    Metric(
        "energylens_uncorrected_energy_joules_total",
        "counter",
        "joules",
        "What the profile alone predicts, without what was learnt, over the windows of "
        "energylens_compared_energy_joules_total.",
    ),
    Metric(
        "energylens_uncorrected_absolute_error_joules_total",
        "counter",
        "joules",
        "Absolute difference of that and measured energy, summed over those windows.",
    ),
)

ATTRIBUTION = (
    Metric(
        "energylens_request_energy_joules",
        "histogram",
        "joules",
        "Predicted energy of one finished or aborted request (with the setting `attribution`).",
        _PHASE,
        buckets=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0),
    ),
    Metric(
        "energylens_attributed_energy_joules_total",
        "counter",
        "joules",
        "Predicted energy that was charged to requests, finished or not; exactly the sum of their accounts.",
        _PHASE,
    ),
    Metric(
        "energylens_saved_energy_joules_total",
        "counter",
        "joules",
        "What prompt tokens found in a prefix cache would have cost (with the setting `attribution`).",
    ),
)

ROUTING = (
    Metric(
        "energylens_marginal_energy_joules",
        "gauge",
        "joules",
        "Predicted energy that one more request of typical size adds here, for each of its output tokens (with the "
        "setting `routing`).",
        from_start=False,
    ),
    Metric(
        "energylens_slo_headroom_ratio",
        "gauge",
        "",
        "Part of a latency target that one more request would leave free here; negative if it would miss it. Predicted "
        "(with the setting `routing`).",
        (("target", ("ttft", "tpot")),),
        from_start=False,
    ),
    Metric(
        "energylens_held_requests",
        "gauge",
        "requests",
        "Requests that the engine holds, running or waiting (with the setting `routing`).",
        from_start=False,
    ),
    Metric(
        "energylens_waiting_tokens",
        "gauge",
        "tokens",
        "Prompt tokens that the engine has yet to compute, of all its requests (with the setting `routing`).",
        from_start=False,
    ),
    Metric(
        "energylens_kv_used_tokens",
        "gauge",
        "tokens",
        "Tokens in the KV cache that requests use (with the setting `routing`).",
        from_start=False,
    ),
    Metric(
        "energylens_kv_capacity_tokens",
        "gauge",
        "tokens",
        "Tokens that the KV cache has room for (with the setting `routing`).",
        from_start=False,
    ),
    Metric(
        "energylens_snapshot_timestamp_seconds",
        "gauge",
        "seconds",
        "When the engine was last seen to live, by its host's clock: what routers read of one that hangs grows old "
        "(with the setting `routing`).",
        from_start=False,
    ),
    Metric(
        "energylens_replica_info",
        "gauge",
        "",
        "1; with energylens_profile_info, what a router needs to predict this engine (with the setting `routing`).",
        (
            ("data_parallel_size", ()),
            ("prefill_context_parallel_size", ()),
            ("decode_context_parallel_size", ()),
            ("enable_expert_parallel", ()),
            ("kv_cache_dtype", ()),
            ("max_num_seqs", ()),
            ("max_num_batched_tokens", ()),
            ("enforce_eager", ()),
            ("vllm_release", ()),
        ),
    ),
)

PLUGIN = (
    Metric(
        "energylens_build_info",
        "gauge",
        "",
        "1; the releases that run.",
        (("version", ()), ("vllm_version", ())),
    ),
    Metric(
        "energylens_profile_info",
        "gauge",
        "",
        "1; what is predicted for: the GPU profile, where its name came from (setting, detected or reference) and the "
        "deployment of this engine.",
        (
            ("gpu", ()),
            ("source", ()),
            ("dtype", ()),
            ("quantization", ()),
            ("tensor_parallel_size", ()),
            ("pipeline_parallel_size", ()),
        ),
    ),
    Metric(
        "energylens_predictor_state",
        "gauge",
        "",
        "1 for the state that the engine's predictor is in, 0 for the others.",
        (("state", PREDICTOR_STATES),),
    ),
    Metric(
        "energylens_plugin_failures_total",
        "counter",
        "failures",
        "Failures inside the plugin, by place. Serving goes on; the first of each place is logged.",
        (("place", PLACES),),
    ),
)

#: Add a group here and it is exported, documented and counted against MAX_SERIES_PER_ENGINE.
METRICS: tuple[Metric, ...] = (*PREDICTION, *METER, *PAIRING, *LEARNING, *ATTRIBUTION, *ROUTING, *PLUGIN)
BY_NAME = {metric.name: metric for metric in METRICS}
