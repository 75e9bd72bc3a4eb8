"""Replicas side by side, and what routing among them does."""

from __future__ import annotations

from energylens_vllm.dashboards.panel import HALF, QUARTER, Dashboard, Panel, Query, Row, graph, stat, table
from energylens_vllm.dashboards.promql import CHOSEN, ENGINE, ROUTERS, ratio
from energylens_vllm.dashboards.series import (
    ENGINE_LEGEND,
    FIVE_MINUTES,
    ITL,
    OUTPUT,
    PER_ENGINE,
    RANGE,
    TTFT,
    joules_per_output_token,
)

rate, gauge = CHOSEN.rate, CHOSEN.gauge

_REPLICA = ("instance", "model_name", "engine")
_DECISIONS = "energylens_routing_decisions_total"
_ADDED = "energylens_routing_added_joules_total"
_SAVED = "energylens_routing_saved_joules_total"

_SIDE_BY_SIDE = Row(
    "Side by side",
    (
        table(
            "Replicas",
            "Each engine now: measured power, energy per output token, output tokens a second, requests that "
            "run and wait, and 95th percentiles of vLLM's latencies.",
            Query(gauge("energylens_gpu_power_watts", *_REPLICA), "power (W)"),
            Query(joules_per_output_token(*_REPLICA), "J per output token"),
            Query(rate(OUTPUT, *_REPLICA), "output tokens/s"),
            Query(gauge("vllm:num_requests_running", *_REPLICA), "running"),
            Query(gauge("vllm:num_requests_waiting", *_REPLICA), "waiting"),
            Query(CHOSEN.quantile(0.95, TTFT, *_REPLICA), "first token 95 % (s)"),
            Query(CHOSEN.quantile(0.95, ITL, *_REPLICA), "per token 95 % (s)"),
            width=24,
        ),
    ),
)

_ENERGY = Row(
    "Energy",
    (
        graph(
            "Energy per output token",
            "joule",
            "Measured GPU energy, idle time included, over the tokens that each replica generated.",
            Query(joules_per_output_token(*PER_ENGINE), ENGINE_LEGEND),
            width=HALF,
        ),
        Panel(
            "Energy per output token, in the time range",
            "bargauge",
            "joule",
            "The same over the whole time range.",
            (Query(joules_per_output_token(*PER_ENGINE, over=RANGE), ENGINE_LEGEND),),
            width=HALF,
        ),
        graph(
            "Power",
            "watt",
            "Measured power of each replica's GPUs.",
            Query(gauge("energylens_gpu_power_watts", *PER_ENGINE), ENGINE_LEGEND),
            width=HALF,
            stacked=True,
        ),
        graph(
            "Energy against latency",
            "joule",
            "Energy per output token of all replicas together (left) beside the 95th percentiles of vLLM's "
            "latencies (right).",
            Query(joules_per_output_token(), "energy per output token"),
            Query(CHOSEN.quantile(0.95, TTFT), "first token, 95 %", unit="s", axis="right"),
            Query(CHOSEN.quantile(0.95, ITL), "per output token, 95 %", unit="s", axis="right"),
            width=HALF,
        ),
    ),
)

_LOAD = Row(
    "Load",
    (
        graph(
            "Output tokens",
            "short",
            "Tokens that each replica generates a second.",
            Query(rate(OUTPUT, *PER_ENGINE), ENGINE_LEGEND),
        ),
        graph(
            "Requests waiting",
            "short",
            "Requests that wait in each replica.",
            Query(gauge("vllm:num_requests_waiting", *PER_ENGINE), ENGINE_LEGEND),
            axis_to=1,
        ),
        graph(
            "Time to first token, 95 %",
            "s",
            "As vLLM measures it.",
            Query(CHOSEN.quantile(0.95, TTFT, *PER_ENGINE), ENGINE_LEGEND),
        ),
    ),
)

_ROUTING = Row(
    "Routing by energy",
    (
        stat(
            "Saved by routing, as estimated",
            "joule",
            "Energy that routing has saved in the time range, against a router that takes the replica with the fewest "
            "requests. An estimate of the step model for the fleet as it was, not measured: docs/routing.md.",
            ROUTERS.increase(_SAVED, over=RANGE),
            width=QUARTER,
            over_range=True,
        ),
        stat(
            "Saved, as a share",
            "percentunit",
            "The estimated joules that requests added where they went, less those where least-request would have put "
            "them, over the latter; in the time range. Negative if routing has cost more, as to hold latency targets.",
            "1 - "
            + ratio(
                ROUTERS.increase(_ADDED, over=RANGE, side="chosen"),
                ROUTERS.increase(_ADDED, over=RANGE, side="least_request"),
            ),
            width=QUARTER,
            over_range=True,
        ),
        stat(
            "Requests placed",
            "short",
            "Requests that routers have placed in the time range.",
            ROUTERS.increase(_DECISIONS, over=RANGE),
            width=QUARTER,
            over_range=True,
        ),
        stat(
            "Left to the host",
            "percentunit",
            "Share of them that the host's own policy has placed.",
            ratio(
                ROUTERS.increase(_DECISIONS, over=RANGE, reason="fallback"), ROUTERS.increase(_DECISIONS, over=RANGE)
            ),
            width=QUARTER,
            over_range=True,
        ),
        graph(
            "Decisions",
            "short",
            "Requests placed a second, by reason; docs/routing.md says what each means.",
            Query(ROUTERS.rate(_DECISIONS, "reason"), "{{reason}}"),
            stacked=True,
        ),
        graph(
            "Left to the host, by cause",
            "short",
            "Requests in 5 minutes that the host's own policy has placed.",
            Query(ROUTERS.increase("energylens_routing_fallbacks_total", "cause", over=FIVE_MINUTES), "{{cause}}"),
            axis_to=1,
        ),
        graph(
            "Joules that requests add",
            "watt",
            "Estimated marginal energy a second of the requests placed, at the replica that was chosen and at the one "
            "that least-request would have chosen; and the saved energy a second.",
            Query(ROUTERS.rate(_ADDED, "side"), "{{side}}"),
            Query(ROUTERS.rate(_SAVED), "saved"),
        ),
    ),
)

_TOLD = Row(
    "What replicas tell routers, if the plugin's setting routing is on",
    (
        graph(
            "One more request",
            "joule",
            "Predicted energy that one more request of typical size would add at each replica, for each of its output "
            "tokens.",
            Query(gauge("energylens_marginal_energy_joules", *PER_ENGINE, how="max"), ENGINE_LEGEND),
        ),
        graph(
            "Room within the latency targets",
            "percentunit",
            "Part of a target that one more request would leave free at each replica; negative if it would miss it. "
            "Predicted.",
            Query(
                gauge("energylens_slo_headroom_ratio", *PER_ENGINE, "target", how="min"),
                f"{{{{target}}}}: {ENGINE_LEGEND}",
            ),
            zero_based=False,
        ),
        graph(
            "Age of what is known",
            "s",
            "Time since each replica was last seen to live, by its host's clock. Routers do without one whose is old.",
            Query(f"time() - {gauge('energylens_snapshot_timestamp_seconds', *PER_ENGINE, how='max')}", ENGINE_LEGEND),
        ),
        graph(
            "Requests held, tokens to compute",
            "short",
            "Requests that each replica holds (left), and prompt tokens that it has yet to compute (right).",
            Query(gauge("energylens_held_requests", *PER_ENGINE), f"requests: {ENGINE_LEGEND}"),
            Query(gauge("energylens_waiting_tokens", *PER_ENGINE), f"tokens: {ENGINE_LEGEND}", axis="right"),
            width=HALF,
            axis_to=1,
        ),
        graph(
            "KV cache in use",
            "percentunit",
            "Share of the KV cache's tokens that requests use.",
            Query(
                ratio(
                    gauge("energylens_kv_used_tokens", *PER_ENGINE), gauge("energylens_kv_capacity_tokens", *PER_ENGINE)
                ),
                ENGINE_LEGEND,
            ),
            width=HALF,
        ),
        table(
            "Replicas as routers know them",
            "What each replica says of its deployment, for routers to predict its steps.",
            Query(
                gauge(
                    "energylens_replica_info",
                    *ENGINE,
                    "data_parallel_size",
                    "prefill_context_parallel_size",
                    "decode_context_parallel_size",
                    "enable_expert_parallel",
                    "kv_cache_dtype",
                    "max_num_seqs",
                    "max_num_batched_tokens",
                    "enforce_eager",
                    "vllm_release",
                    how="max",
                )
            ),
            width=24,
        ),
    ),
)

FLEET = Dashboard(
    "energylens-fleet",
    "Energy of vLLM: fleet and routing",
    "Replicas side by side: their energy, their load and their latency, and what routing among them saves.",
    (_SIDE_BY_SIDE, _ENERGY, _LOAD, _ROUTING, _TOLD),
    routers=True,
)
