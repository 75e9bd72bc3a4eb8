"""The example for llm-d's router: its parts fit together, it reads what is exported, and by its rules picks well.

The router itself (Go) is not run here: the rules are those of its documentation.
"""

from __future__ import annotations

import argparse
from typing import Any

import promql_parser
import pytest
import yaml
from fake_replica import Replica
from prometheus_client.parser import text_string_to_metric_families
from replicas import ROOT

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.metrics import BY_NAME
from energylens_vllm.serving.replica import Live
from energylens_vllm.serving.replica import Replica as Told
from energylens_vllm.serving.settings import Settings

CONFIG = yaml.safe_load((ROOT / "examples" / "gateways" / "llm-d.yaml").read_text())
PLUGINS = {plugin.get("name", plugin["type"]): plugin for plugin in CONFIG["plugins"]}
EXTRACTOR = PLUGINS["core-metrics-extractor"]["parameters"]
(ENGINE,) = EXTRACTOR["engineConfigs"]
CUSTOM = {each["attributeKey"]: each["metricSpec"] for each in ENGINE["customMetrics"]}
FILTERS = [plugin for plugin in PLUGINS.values() if plugin["type"] == "endpoint-attribute-filter"]
(SCORER,) = (plugin for plugin in PLUGINS.values() if plugin["type"] == "endpoint-attribute-scorer")
(PROFILE,) = CONFIG["schedulingProfiles"]

#: parameters of each plugin that has some here
ACCEPTED = {
    "core-metrics-extractor": {"engineLabelKey", "defaultEngine", "engineConfigs"},
    "endpoint-attribute-filter": {"attribute", "producer", "onMissing", "fallbackOnEmpty", "algorithm"},
    "endpoint-attribute-scorer": {"attributeKey", "algorithm"},
}
#: the built-in engine "vllm", which ours replaces
BUILT_IN = {
    "queuedRequestsSpec": "vllm:num_requests_waiting",
    "runningRequestsSpec": "vllm:num_requests_running",
    "kvUsageSpec": "vllm:kv_cache_usage_perc",
    "loraSpec": "vllm:lora_requests_info",
    "cacheInfoSpec": "vllm:cache_config_info",
}


def test_parts_fit_together() -> None:
    assert CONFIG["kind"] == "EndpointPickerConfig"
    assert len(PLUGINS) == len(CONFIG["plugins"])
    used = [each["pluginRef"] for each in PROFILE["plugins"]]
    for source in CONFIG["dataLayer"]["sources"]:
        used += [source["pluginRef"], *(each["pluginRef"] for each in source["extractors"])]
    assert {*used, "single-profile-handler"} == PLUGINS.keys()
    for plugin in PLUGINS.values():
        assert {*plugin.get("parameters", {})} <= ACCEPTED.get(plugin["type"], set())


def test_attributes_that_are_used_are_extracted_and_exported() -> None:
    used = {each["parameters"]["attribute"] for each in FILTERS} | {SCORER["parameters"]["attributeKey"]}
    assert used == CUSTOM.keys()
    for spec in CUSTOM.values():
        selector = promql_parser.parse(spec)
        metric = BY_NAME[selector.name]
        labels = dict(metric.labels)
        for matcher in selector.matchers.matchers:
            assert matcher.value in labels[matcher.name]
    assert {name: ENGINE[name] for name in BUILT_IN} == BUILT_IN


def test_what_the_algorithms_accept() -> None:
    for each in FILTERS:
        algorithm = each["parameters"]["algorithm"]
        assert algorithm["type"] == "threshold"
        assert algorithm["threshold"]["operator"] in (
            "LessThan",
            "LessThanOrEqual",
            "GreaterThan",
            "GreaterThanOrEqual",
        )
        assert each["parameters"]["fallbackOnEmpty"] is True
        assert each["parameters"]["onMissing"] == "Pass"
    algorithm = SCORER["parameters"]["algorithm"]
    assert algorithm["type"] == "linear_lower_is_better"
    assert algorithm["normalization"] == {"adaptiveRange": {}}


def page(live: Live | None, gpu: str = "H200-SXM") -> str:
    """What a replica that holds this shows; None shows nothing of ours."""
    if live is None:
        return "vllm:num_requests_waiting 0\n"
    increments = Increments()
    model = EnergyModel("llama-3.1-8b", Deployment(gpu=gpu, max_num_seqs=256))
    Told(model, lambda: live, Settings(routing=True))((), None, increments)
    lines = []
    for name, values, value in increments.take()["set"]:
        labels = zip(("model_name", "engine", *BY_NAME[name].label_names), ("m", "0", *values), strict=True)
        shown = ",".join(f'{label}="{text}"' for label, text in labels)
        lines.append(f"{name}{{{shown}}} {value}")
    return "\n".join(lines) + "\n"


def attribute(text: str, spec: str) -> float | None:
    """The scalar that a metricSpec takes from a page."""
    selector = promql_parser.parse(spec)
    wanted = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == selector.name and wanted.items() <= sample.labels.items():
                return float(sample.value)
    return None


def picked(pages: list[str]) -> set[int]:
    """The endpoints that the filters leave and the energy scorer likes best."""
    found = [{key: attribute(text, spec) for key, spec in CUSTOM.items()} for text in pages]
    left = [*range(len(pages))]
    for each in FILTERS:
        least = each["parameters"]["algorithm"]["threshold"]["value"]
        values = {i: found[i][each["parameters"]["attribute"]] for i in left}
        left = [i for i, value in values.items() if value is None or value >= least] or left
    joules: dict[int, Any] = {i: found[i][SCORER["parameters"]["attributeKey"]] for i in left}
    known = [value for value in joules.values() if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scores = {
        i: 0.0 if value is None else 1.0 if high == low else (high - value) / (high - low)
        for i, value in joules.items()
    }
    return {i for i, score in scores.items() if score == max(scores.values())}


IDLE, SOME, FULL = (Live(n, 0, 700.0 * n, 800_000.0) for n in (0, 12, 256))


@pytest.mark.parametrize(
    ("replicas", "best"),
    [
        ((IDLE, SOME, IDLE), {1}),
        ((IDLE, SOME, FULL), {1}),  # the full one costs least, but has no room
        ((None, IDLE), {1}),  # one that tells nothing is not preferred
        ((None, None), {0, 1}),  # the router's other scorers decide
        ((Live(12, 400_000, 8400.0, 800_000.0), IDLE), {1}),  # a queue of prompts
    ],
)
def test_what_is_picked(replicas: tuple[Live | None, ...], best: set[int]) -> None:
    assert picked([page(live) for live in replicas]) == best


def test_the_cheaper_gpu_is_picked_of_two_that_are_as_busy() -> None:
    pages = [page(SOME, gpu) for gpu in ("A100-SXM-80GB", "H200-SXM", "L40S")]
    joules = [attribute(text, CUSTOM["energylens.marginal_joules"]) for text in pages]
    (best,) = picked(pages)
    rooms = [attribute(text, CUSTOM["energylens.headroom_tpot"]) for text in pages]
    assert all(value is not None for value in (*joules, *rooms))
    assert joules[best] == min(
        value for value, room in zip(joules, rooms, strict=True) if value and room and room >= 0.4
    )


def test_the_fakes_of_other_tests_show_what_the_plugin_does() -> None:
    replica = Replica(argparse.Namespace(served_model_name="m", gpu="H200-SXM", port=0))
    shown = {sample.name for family in text_string_to_metric_families(replica.metrics()) for sample in family.samples}
    ours = {name for name in shown if name.startswith("energylens_")}
    assert ours <= BY_NAME.keys()
    info = next(line for line in replica.metrics().splitlines() if line.startswith("energylens_replica_info"))
    assert all(f'{label}="' in info for label in BY_NAME["energylens_replica_info"].label_names)
