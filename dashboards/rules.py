"""Recording rules and alerts, with what to do when an alert fires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from energylens_vllm.dashboards.promql import EACH, EACH_ROUTER, ENGINE, ratio
from energylens_vllm.dashboards.series import COMPARED, COMPONENTS, ERROR, MEASURED, OUTPUT, PREDICTED

_ON_ENGINE = f"on ({', '.join(ENGINE)})"

#: Windows last 5 s: over this there are a hundred of them, so one that straddles a burst does not matter.
_COMPARED_OVER = "10m"


@dataclass(frozen=True, slots=True)
class Recording:
    """A recording rule; each series of it is one engine (or one of its shares). Named level:metric:operation."""

    name: str
    expr: str


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert: `value` under `condition` for the time `after`.

    `value` is separate because it must have a result on a healthy system too: an expression that never has any cannot
    fire. `meaning`, `look` and `act` are the runbook.
    """

    name: str
    value: str
    condition: str
    after: str
    severity: Literal["info", "warning"]
    summary: str
    meaning: str
    look: str
    act: str
    about: str = "{{ $labels.model_name }}, {{ $labels.instance }}"

    @property
    def expr(self) -> str:
        return f"({self.value}) {self.condition}"


def _shares(name: str, label: str) -> str:
    return f"{EACH.rate(name, label)} / {_ON_ENGINE} group_left () ({EACH.rate(name)} > 0)"


def _over_measured(numerator: str, **labels: str) -> str:
    """A counter of the compared windows over their measured energy."""
    return ratio(
        EACH.increase(numerator, over=_COMPARED_OVER, **labels),
        EACH.increase(COMPARED, over=_COMPARED_OVER, side="measured"),
    )


RECORDINGS = (
    Recording("engine:energylens_gpu_power_watts:sum", EACH.gauge("energylens_gpu_power_watts")),
    Recording("engine:energylens_predicted_power_watts:rate5m", EACH.rate(PREDICTED)),
    Recording("engine:energylens_output_tokens_per_second:rate5m", EACH.rate(OUTPUT)),
    Recording("engine:energylens_joules_per_output_token:ratio5m", ratio(EACH.rate(MEASURED), EACH.rate(OUTPUT))),
    Recording(
        "engine:energylens_predicted_joules_per_output_token:ratio5m", ratio(EACH.rate(PREDICTED), EACH.rate(OUTPUT))
    ),
    Recording("engine:energylens_wmape:ratio10m", _over_measured(ERROR)),
    Recording("engine:energylens_bias:ratio10m", f"{_over_measured(COMPARED, side='predicted')} - 1"),
    Recording("engine_phase:energylens_predicted_energy_share:ratio5m", _shares(PREDICTED, "phase")),
    Recording("engine_component:energylens_predicted_energy_share:ratio5m", _shares(COMPONENTS, "component")),
    Recording(
        "engine_gpu:energylens_power_capped:ratio5m",
        EACH.rate("energylens_gpu_throttled_seconds_total", "gpu", reason="power_cap"),
    ),
)

_BIAS = "engine:energylens_bias:ratio10m"
_JOULES_PER_TOKEN = "engine:energylens_joules_per_output_token:ratio5m"
_TOKENS_PER_SECOND = "engine:energylens_output_tokens_per_second:rate5m"

ALERTS = (
    Alert(
        name="EnergyPredictionDrift",
        value=f"abs({_BIAS})",
        condition="> 0.15",
        after="15m",
        severity="warning",
        summary="Predicted energy is off by {{ $value | humanizePercentage }}",
        meaning="Predicted and measured energy of the same stretches of time have differed by more than 15 % for 15 "
        "minutes. Measured energy is not affected; figures by phase, by component and by request are.",
        look="The dashboard on accuracy. Flags (`Less than sure`) name work that no prediction covers: images, LoRA, "
        "speculative decoding. `Predicted for` says whether profile and deployment are those of the engine. `Measured "
        "over predicted time` away from 100 % says that steps themselves take another time: another kernel backend, or "
        "another process on the GPU.",
        act="Set the right GPU (`ENERGYLENS_GPU`). If the GPU has another power limit or another cooling than the one "
        "the profile was measured on, calibrate. If nothing explains it, replay recorded steps (`energylens replay`).",
    ),
    Alert(
        name="EnergyMeterLost",
        value=f"{EACH.gauge('energylens_nvml_up', how='min')} and {_ON_ENGINE} "
        f"{EACH.gauge('energylens_gpu_power_watts', how='count')}",
        condition="== 0",
        after="5m",
        severity="warning",
        summary="The GPUs of an engine can no longer be read",
        meaning="GPUs that were read before cannot be read now. Energy counters stand still meanwhile, so power and "
        "energy per token read too low. An engine that never had a GPU to read does not raise this.",
        look="`Faults` on the dashboard on accuracy, and the engine's log: each first failure is logged with NVML's "
        "reason. `nvidia-smi` on that host; `dmesg` for Xid errors.",
        act="The meter reconnects by itself with growing pauses, and goes on where it was. If `nvidia-smi` fails too, "
        "drain the replica and restart the driver or the host.",
    ),
    Alert(
        name="EnergyMeterStale",
        value=EACH.increase(MEASURED, "gpu"),
        condition="== 0",
        after="5m",
        severity="warning",
        summary="The measured energy of GPU {{ $labels.gpu }} stands still",
        meaning="A GPU uses energy even when it is idle, and yet its counter on /metrics has not moved for 5 minutes: "
        "the driver gives the same reading again and again, or the engine does not report.",
        look="`Age of the last reading` and `Meter is up` on the dashboard on accuracy. If the age stands still too, "
        "the engine's reports do not arrive: look for `energylens` in its log, and at `Not predicted` for failures.",
        act="If the counter itself is stuck (`Faults`: stuck), only a restart of the driver helps. If the engine "
        "hangs, restart it.",
    ),
    Alert(
        name="EnergyMeterUntrusted",
        value=EACH.gauge("energylens_gpu_reading_trusted", "gpu", how="min"),
        condition="== 0",
        after="10m",
        severity="warning",
        summary="Energy counter and power of GPU {{ $labels.gpu }} disagree",
        meaning="The energy counter and the integrated power of a GPU have differed by more than 10 % for 10 minutes. "
        "Such windows are not compared with the prediction.",
        look="`Faults` (disagreement, stuck, jump) on the dashboard on accuracy; docs/meter.md says what each means.",
        act="Do not bill by this GPU's figures. Compare with `nvidia-smi --query-gpu=power.draw` and with the rack's "
        "meter; update the driver.",
    ),
    Alert(
        name="EnergyPowerCapped",
        value="engine_gpu:energylens_power_capped:ratio5m",
        condition="> 0.9",
        after="30m",
        severity="info",
        summary="GPU {{ $labels.gpu }} runs at its power limit {{ $value | humanizePercentage }} of the time",
        meaning="For 30 minutes the GPU has lowered its clock nearly all the time because its power is at the limit. "
        "For a replica that mostly computes prompts that is normal: prefill runs at the limit on an H100 or H200.",
        look="`Power of each GPU` with its limit, and `By phase` on the overview. With mostly decode it is not normal.",
        act="If latency suffers, raise the limit (`nvidia-smi -pl`) or add a replica. If it does not, leave it: near "
        "the limit a joule goes furthest.",
    ),
    Alert(
        name="EnergyPerTokenRegression",
        value=f"avg_over_time({_JOULES_PER_TOKEN}[1h]) / (avg_over_time({_JOULES_PER_TOKEN}[1h] offset 1d) > 0) "
        f"and {_ON_ENGINE} (avg_over_time({_TOKENS_PER_SECOND}[1h]) >= "
        f"0.7 * avg_over_time({_TOKENS_PER_SECOND}[1h] offset 1d))",
        condition="> 1.2",
        after="30m",
        severity="warning",
        summary="An output token costs {{ $value | humanize }} times what it did yesterday",
        meaning="Over the last hour a token has cost over 20 % more GPU energy than in the same hour yesterday, at a "
        "load that is not lower by more than 30 %. (At a lower load each token costs more, which is no fault.)",
        look="`By component` on the overview against yesterday: more weights means smaller batches, more kv_cache "
        "means longer contexts, more host_gap means a slower host or eager mode. `Tokens`: longer prompts an output.",
        act="Look for what was changed: release, quantization, batch limits, routing. Prompts that no longer hit the "
        "prefix cache are a common cause.",
    ),
    Alert(
        name="EnergyNotPredicted",
        value=EACH.gauge("energylens_predictor_state", how="max", state="ready"),
        condition="== 0",
        after="5m",
        severity="warning",
        summary="An engine's steps are not predicted",
        meaning="The plugin runs but does not know the engine's model, or its predictor failed at the start.",
        look="`State of the predictor` on the dashboard on accuracy; the engine's log says why in one line.",
        act="`energylens doctor MODEL` says whether the model is known and what to do. A model of no known family can "
        "be written as a cascade: docs/einsum.md.",
    ),
    Alert(
        name="EnergyPluginFailures",
        value=EACH.increase("energylens_plugin_failures_total", "place", over="15m"),
        condition="> 0",
        after="1m",
        severity="warning",
        summary="The plugin failed at {{ $labels.place }}; serving goes on",
        meaning="Something failed inside the plugin and was caught. Serving is not affected, figures may lack steps.",
        look="The engine's or the API server's log has the first failure of each place with its traceback.",
        act="Report it with that traceback. `ENERGYLENS_ENABLED=0` switches the plugin off.",
    ),
    Alert(
        name="EnergyLearningBounded",
        value=EACH.gauge("energylens_learning_state", how="max", state="bounded")
        + f" + {_ON_ENGINE} "
        + EACH.gauge("energylens_learning_state", how="max", state="implausible"),
        condition="> 0",
        after="15m",
        severity="warning",
        summary="Measured energy is further from the profile than GPUs of one kind differ",
        meaning="What predictions would have to learn from the meter is beyond the bounds of what it can explain, so "
        "they follow only that far, or not at all.",
        look="`Learnt factors` and `With and without what was learnt` on the dashboard on accuracy; `Predicted for`: "
        "whether profile and deployment are those of the engine. docs/learning.md says what each state means.",
        act="As for EnergyPredictionDrift. If the GPU is what it says and its power limit is its own, calibrate.",
    ),
    Alert(
        name="EnergyRoutingFallback",
        value=ratio(
            EACH_ROUTER.rate("energylens_routing_decisions_total", over="10m", reason="fallback"),
            EACH_ROUTER.rate("energylens_routing_decisions_total", over="10m"),
        ),
        condition="> 0.1",
        after="10m",
        severity="warning",
        summary="{{ $value | humanizePercentage }} of the requests are routed without regard to energy",
        meaning="For 10 minutes more than a tenth of the requests have been placed by the router's own policy. They "
        "are served as without energylens; what routing saves is lost.",
        look="`Left to the host, by cause` on the fleet dashboard. `stale`: `Age of what is known`, and whether the "
        "router reaches the replicas' /metrics. `no_model`: replicas without the setting `routing`, or a model that "
        "is not known. `unsupported`: the router was asked to choose among others than it knows.",
        act="Start each replica with the setting `routing`, and let the router reach it; docs/routing.md has an "
        "example for each router. `error` is a fault of energylens: the router's log has the first, report it.",
        about="{{ $labels.job }}, {{ $labels.instance }}",
    ),
)


def rule_groups() -> dict[str, Any]:
    """The content of a rule file, as Prometheus and the PrometheusRule resource have it."""
    recordings = [{"record": rule.name, "expr": rule.expr} for rule in RECORDINGS]
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.after,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": f"{alert.summary} ({alert.about})",
                "description": alert.meaning,
                "runbook": f"Look: {alert.look} Act: {alert.act}",
            },
        }
        for alert in ALERTS
    ]
    return {
        "groups": [
            {"name": "energylens-recording", "interval": "30s", "rules": recordings},
            {"name": "energylens-alerts", "interval": "30s", "rules": alerts},
        ]
    }


def runbook() -> str:
    """docs/runbook.md."""
    parts = [
        "# Runbook",
        "",
        "What the alerts of `dashboards/prometheus/energylens.rules.yml` mean, where to look, and what to do. None of",
        "them says that serving is in danger: they are about energy and its figures.",
    ]
    for alert in ALERTS:
        parts += [
            "",
            f"## {alert.name}",
            "",
            f"{alert.meaning}",
            "",
            f"- Fires when `{alert.expr}` for {alert.after}; severity {alert.severity}.",
            f"- Look: {alert.look}",
            f"- Act: {alert.act}",
        ]
    return "\n".join(parts) + "\n"
