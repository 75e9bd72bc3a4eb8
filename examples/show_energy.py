"""Send a few requests to a vLLM server and show from its metrics what energy they took.

python examples/show_energy.py [URL] [PID of a server that may still be starting]
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

from energylens_vllm.cli.table import percent, quantity, table

PROMPTS = [f"Question {number}: how many joules does a token cost? " * 4**number for number in range(4)]
OUTPUT_TOKENS = 64
LAG_S = 10.0  #: engines report once a second

#: (metric, its labels without model and engine) -> value, summed over engines
Metrics = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def call(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=300) as response:
        return str(response.read().decode())


def wait_until_ready(url: str, pid: int) -> None:
    while True:
        try:
            call(f"{url}/health")
            return
        except OSError:  # nobody listens yet
            time.sleep(0.5)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            sys.exit("the server ended before it answered")


def scrape(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(call(f"{url}/metrics")):
        for sample in family.samples:
            labels = frozenset((k, v) for k, v in sample.labels.items() if k not in ("model_name", "engine"))
            if sample.name.startswith("energylens_"):
                values[sample.name, labels] = values.get((sample.name, labels), 0.0) + sample.value
    return values


def split(metrics: Metrics, name: str, label: str) -> dict[str, float]:
    """The non-zero values of a metric by one of its labels."""
    return {dict(labels)[label]: value for (metric, labels), value in metrics.items() if metric == name and value}


def send(url: str, model: str) -> tuple[int, int]:
    """Send all prompts at once; the prompt tokens and output tokens that the server counted."""

    def complete(prompt: str) -> dict[str, int]:
        body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        usage: dict[str, int] = json.loads(call(f"{url}/v1/completions", body))["usage"]
        return usage

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        usages = list(pool.map(complete, PROMPTS))
    return sum(usage["prompt_tokens"] for usage in usages), sum(usage["completion_tokens"] for usage in usages)


def reported(url: str, before: Metrics, expected_tokens: int) -> Metrics:
    """What the metrics have gained since `before`, once they hold `expected_tokens`; engines report each second."""
    give_up = time.monotonic() + LAG_S
    while True:
        now = scrape(url)
        gained = {key: value - before.get(key, 0.0) for key, value in now.items()}
        tokens = sum(split(gained, "energylens_tokens_total", "phase").values())
        cached = sum(value for (name, _), value in gained.items() if name == "energylens_cached_tokens_total")
        if tokens + cached >= expected_tokens or time.monotonic() > give_up:
            return gained
        time.sleep(0.2)


def show(gained: Metrics, profile: Mapping[str, str]) -> str:
    """The energy by phase, what it is spent on, how sure it is, and how the predicted time compares."""

    def value(name: str) -> float:
        return sum(gain for (metric, _), gain in gained.items() if metric == name)

    steps = value("energylens_steps_total")
    tokens = split(gained, "energylens_tokens_total", "phase")
    joules = split(gained, "energylens_predicted_energy_joules_total", "phase")
    total_j = sum(joules.values())
    rows = [
        [phase, f"{count:.0f}", quantity(joules.get(phase, 0.0), "J"), quantity(joules.get(phase, 0.0) / count, "J")]
        for phase, count in tokens.items()
    ]
    rows.append(["total", f"{sum(tokens.values()):.0f}", quantity(total_j, "J"), ""])
    bounds = split(gained, "energylens_predicted_energy_bound_joules_total", "bound")
    components = split(gained, "energylens_predicted_component_energy_joules_total", "component")
    spent = ", ".join(
        f"{name.replace('_', ' ')} {percent(part / total_j)}"
        for name, part in sorted(components.items(), key=lambda item: -item[1])
        if part >= 0.0005 * total_j
    )
    flags = split(gained, "energylens_flagged_steps_total", "flag")
    predicted_s = value("energylens_predicted_step_time_seconds_total") / steps
    measured_s = value("energylens_measured_step_time_seconds_total") / steps
    lines = [
        f"Predicted for {profile['gpu']} ({profile['source']}), {steps:.0f} engine steps:",
        "",
        table(["", "tokens", "energy", "per token"], rows),
        "",
        f"90 % interval  {quantity(bounds.get('lower', 0.0), 'J')} .. {quantity(bounds.get('upper', 0.0), 'J')}",
        f"spent on       {spent}",
        f"a step takes   {quantity(predicted_s, 's')} predicted, {quantity(measured_s, 's')} measured here",
        *(f"flagged        {name}: {count:.0f} of {steps:.0f} steps" for name, count in flags.items()),
    ]
    return "\n".join(lines)


def main(url: str = "http://127.0.0.1:8000", pid: str | None = None) -> None:
    if pid is not None:
        wait_until_ready(url, int(pid))
    model = json.loads(call(f"{url}/v1/models"))["data"][0]["id"]
    before = scrape(url)
    if not before:
        sys.exit("no energylens_ metrics: the plugin is not running; `energylens doctor` says why")
    prompt_tokens, output_tokens = send(url, model)
    # The last token of an output is never computed on.
    gained = reported(url, before, prompt_tokens + output_tokens - len(PROMPTS))
    print(f"{len(PROMPTS)} requests to {model}: {prompt_tokens} prompt tokens, {output_tokens} output tokens\n")

    if not split(gained, "energylens_predicted_energy_joules_total", "phase"):
        sys.exit("no step was predicted: the server's messages say why")
    profile = next(dict(labels) for name, labels in scrape(url) if name == "energylens_profile_info")
    print(show(gained, profile))
    print(f"\nFrom {url}/metrics:\n")
    lines = call(f"{url}/metrics").splitlines()
    print("\n".join(line for line in lines if line.startswith("energylens_predicted_energy_joules_total")))


if __name__ == "__main__":
    main(*sys.argv[1:])
