"""LiteLLM's model groups without LiteLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from replicas import ROOT, fakes, wait_for

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.hooks.litellm.groups import FORGET_S, Groups, source_of, targets_of
from energylens_vllm.routing.fleet import Targets

PORTS = (8874, 8875)
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}


def deployment(port: int, **energylens: Any) -> dict[str, Any]:
    return {
        "model_name": "llama",
        "litellm_params": {"model": "hosted_vllm/llama-3.1-8b", "api_base": f"http://127.0.0.1:{port}/v1"},
        "model_info": {"id": str(port), "energylens": energylens},
    }


class Counted:
    """Counts what is decided."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}

    def __call__(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        key = " ".join((name.removeprefix("energylens_routing_"), *labels))
        self.of[key] = self.of.get(key, 0.0) + value


def test_the_best_deployment_and_what_becomes_of_it(tmp_path: Path) -> None:
    counted, now = Counted(), 0.0
    groups = Groups(counted, lambda: now)
    both = [deployment(port) for port in PORTS]
    with fakes(tmp_path, *((port, "") for port in PORTS)) as (left, right):
        right.be(held=12)
        assert groups.choose("llama", both, BODY, "0") is None  # nothing is known yet
        wait_for(lambda: groups.choose("llama", both, BODY, "1"), 10)
        assert groups.choose("llama", both, BODY, "2") is both[1]
        assert groups.choose("llama", both, BODY, "2", tried=[str(PORTS[1])]) is both[0]  # it has failed there
        assert groups.choose("llama", both[:1], BODY, "3") is both[0]  # LiteLLM holds the other for ill
        assert counted.of["decisions_total host"] >= 1
        groups.end("llama", "2")
        groups.end("llama", "2")
        groups.end("no such group", "2")
        assert groups.choose("llama", both, {"messages": 7}, "4") is both[1]  # a body in no format that is known
        left.process.kill()
        right.process.kill()
        left.process.wait()
        wait_for(lambda: groups.choose("llama", both, BODY, "5") is None, 10)
        assert counted.of["fallbacks_total stale"] >= 1
        now = FORGET_S + 1
        groups.choose("llama", both[:1], BODY, "6")
        assert len(groups._groups["llama"].gateway.fleet) == 1


def test_a_group_of_nobody() -> None:
    assert Groups(Counted()).choose("llama", [], BODY, "1") is None


def test_the_examples_deployments() -> None:
    config = yaml.safe_load((ROOT / "examples" / "gateways" / "litellm.yaml").read_text())
    sources = [source_of({"model_info": {}, **each}) for each in config["model_list"]]
    assert [source.url for source in sources] == [f"http://127.0.0.1:{port}/metrics" for port in (8001, 8002)]
    assert targets_of(config["model_list"][0]) == Targets(1.0, 0.05)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gpu": "H200-SXM"}, "model_info.energylens: unknown value 'gpu'"),
        ({"ttft_s": -1}, "ttft_s: -1"),
        ({"tpot_s": "fast"}, "tpot_s: 'fast'"),
        ({"deployment": {"gpuu": "L40S"}}, "did you mean 'gpu'"),
        ({"model": "llama-9"}, "llama-9"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(EnergyLensError, match=words):
        Groups(Counted()).choose("llama", [deployment(1, **given)], BODY, "1")
