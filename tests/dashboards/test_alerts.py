"""Each alert fires when it should and not otherwise, as promtool evaluates the rule file."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from prometheus_server import RULES

from energylens_vllm.dashboards.rules import ALERTS, RECORDINGS

pytestmark = pytest.mark.prometheus

OF_ENGINE = {"job": "vllm", "instance": "a:8000", "model_name": "m", "engine": "0"}
OF_ROUTER = {"job": "router", "instance": "r:4000"}
ENGINE = ",".join(f'{name}="{value}"' for name, value in OF_ENGINE.items())
ROUTER = ",".join(f'{name}="{value}"' for name, value in OF_ROUTER.items())
GPU = f'{ENGINE},gpu="0"'
DAY = 24 * 60


@dataclass(frozen=True)
class Case:
    """Series (promtool's notation, a value a minute), and whether the alert fires after `at` minutes."""

    alert: str
    fires: bool
    why: str
    at: int
    series: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)  #: besides those of what it is about
    about: dict[str, str] = field(default_factory=lambda: OF_ENGINE)


def compared(predicted: int, measured: int) -> dict[str, str]:
    return {
        f'energylens_compared_energy_joules_total{{{ENGINE},side="predicted"}}': f"0+{predicted}x60",
        f'energylens_compared_energy_joules_total{{{ENGINE},side="measured"}}': f"0+{measured}x60",
    }


def nvml(values: str, power: bool = True) -> dict[str, str]:
    series = {f"energylens_nvml_up{{{ENGINE}}}": values}
    return series | ({f"energylens_gpu_power_watts{{{GPU}}}": "300x60"} if power else {})


def energy(values: str) -> dict[str, str]:
    return {f"energylens_gpu_energy_joules_total{{{GPU}}}": values}


def two_days(joules: tuple[int, int], tokens: tuple[int, int]) -> dict[str, str]:
    """Joules and tokens a minute, yesterday and (for its last two hours) today."""

    def counter(yesterday: int, today: int) -> str:
        minutes = DAY - 120
        return f"0+{yesterday}x{minutes} {yesterday * minutes + today}+{today}x300"

    return {
        f"energylens_gpu_energy_joules_total{{{GPU}}}": counter(*joules),
        f"vllm:generation_tokens_total{{{ENGINE}}}": counter(*tokens),
    }


def capped(seconds: int) -> dict[str, str]:
    return {f'energylens_gpu_throttled_seconds_total{{{GPU},reason="power_cap"}}': f"0+{seconds}x60"}


def thermal(seconds: int) -> dict[str, str]:
    return {f'energylens_gpu_throttled_seconds_total{{{GPU},reason="sw_thermal"}}': f"0+{seconds}x60"}


def trusted(values: str) -> dict[str, str]:
    return {f"energylens_gpu_reading_trusted{{{GPU}}}": values}


def ready(values: str) -> dict[str, str]:
    return {
        f'energylens_predictor_state{{{ENGINE},state="ready"}}': values,
        f'energylens_predictor_state{{{ENGINE},state="model_unknown"}}': "0x60",
    }


def failures(values: str) -> dict[str, str]:
    return {f'energylens_plugin_failures_total{{{ENGINE},place="predict"}}': values}


def learning(bounded: str = "0x60", implausible: str = "0x60") -> dict[str, str]:
    states = {"learning": "0x60", "bounded": bounded, "implausible": implausible}
    return {f'energylens_learning_state{{{ENGINE},state="{state}"}}': values for state, values in states.items()}


def placed(by_energy: int, by_host: int) -> dict[str, str]:
    """Requests a minute."""
    counts = {"least_joules": by_energy, "fallback": by_host}
    return {
        f'energylens_routing_decisions_total{{{ROUTER},reason="{reason}"}}': f"0+{count}x60"
        for reason, count in counts.items()
    }


OF_GPU = {"gpu": "0"}
CASES = [
    Case("EnergyPredictionDrift", True, "20 % too much", 40, compared(12000, 10000)),
    Case("EnergyPredictionDrift", True, "20 % too little", 40, compared(8000, 10000)),
    Case("EnergyPredictionDrift", False, "10 % too much", 40, compared(11000, 10000)),
    Case("EnergyPredictionDrift", False, "not for long enough", 10, compared(12000, 10000)),
    Case("EnergyPredictionDrift", False, "nothing was compared", 40, compared(0, 0)),
    Case("EnergyMeterLost", True, "down after it was up", 20, nvml("1x5 0x50")),
    Case("EnergyMeterLost", False, "there never was a GPU", 20, nvml("0x60", power=False)),
    Case("EnergyMeterLost", False, "up", 20, nvml("1x60")),
    Case("EnergyMeterStale", True, "the counter stands", 30, energy("0+18000x10 180000x50"), OF_GPU),
    Case("EnergyMeterStale", False, "an idle GPU", 30, energy("0+4200x60"), OF_GPU),
    Case("EnergyMeterUntrusted", True, "disagreement", 20, trusted("1x5 0x50"), OF_GPU),
    Case("EnergyMeterUntrusted", False, "disagreement that passed", 20, trusted("1x5 0x5 1x50"), OF_GPU),
    Case("EnergyPowerCapped", True, "57 s of each minute", 50, capped(57), OF_GPU),
    Case("EnergyPowerCapped", False, "half of the time", 50, capped(30), OF_GPU),
    Case("EnergyPowerCapped", False, "too hot, which is another matter", 50, thermal(57), OF_GPU),
    Case("EnergyPerTokenRegression", True, "half as much again", DAY + 60, two_days((18000, 27000), (60000, 60000))),
    Case("EnergyPerTokenRegression", False, "10 % more", DAY + 60, two_days((18000, 19800), (60000, 60000))),
    Case("EnergyPerTokenRegression", False, "half the load", DAY + 60, two_days((18000, 13500), (60000, 30000))),
    Case("EnergyPerTokenRegression", False, "no traffic today", DAY + 60, two_days((18000, 4200), (60000, 0))),
    Case("EnergyNotPredicted", True, "model unknown", 20, ready("0x60")),
    Case("EnergyNotPredicted", False, "ready", 20, ready("1x60")),
    Case("EnergyPluginFailures", True, "one failure", 20, failures("0x10 1x50"), {"place": "predict"}),
    Case("EnergyPluginFailures", False, "none since the start", 40, failures("3x60"), {"place": "predict"}),
    Case("EnergyLearningBounded", True, "beyond the bounds", 40, learning(bounded="0x10 1x50")),
    Case("EnergyLearningBounded", True, "beyond belief", 40, learning(implausible="0x10 1x50")),
    Case("EnergyLearningBounded", False, "for a moment", 40, learning(bounded="0x10 1x5 0x45")),
    Case("EnergyRoutingFallback", True, "a third", 30, placed(200, 100), about=OF_ROUTER),
    Case("EnergyRoutingFallback", True, "all of them", 30, placed(0, 100), about=OF_ROUTER),
    Case("EnergyRoutingFallback", False, "one in a hundred", 30, placed(990, 10), about=OF_ROUTER),
    Case("EnergyRoutingFallback", False, "no requests", 30, placed(0, 0), about=OF_ROUTER),
]


def run(case: Case, rules: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    rule = next(r for r in yaml.safe_load(rules.read_text())["groups"][1]["rules"] if r["alert"] == case.alert)
    labels = {**case.about, **case.labels, **rule["labels"]}
    test = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m" if case.at < DAY else "15m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "alert_rule_test": [
                    {
                        "eval_time": f"{case.at}m",
                        "alertname": case.alert,
                        "exp_alerts": [{"exp_labels": labels, "exp_annotations": {}}] if case.fires else [],
                    }
                ],
            }
        ],
    }
    file = folder / "test.yml"
    file.write_text(yaml.safe_dump(test))
    return subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def bare_rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules without their texts, which hold values that a test of firing is not about."""
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][1]["rules"]:
        del rule["annotations"]
    file = tmp_path_factory.mktemp("rules") / "rules.yml"
    file.write_text(yaml.safe_dump(rules))
    return file


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}: {case.why}")
def test_it_fires_or_not(case: Case, bare_rules: Path, tmp_path: Path) -> None:
    done = run(case, bare_rules, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_firing_and_not_firing() -> None:
    for fires in (True, False):
        assert {case.alert for case in CASES if case.fires == fires} == {alert.name for alert in ALERTS}


@pytest.mark.parametrize(
    ("alert", "summary"),
    [
        ("EnergyPredictionDrift", "Predicted energy is off by 20% (m, a:8000)"),
        ("EnergyRoutingFallback", "33.33% of the requests are routed without regard to energy (router, r:4000)"),
    ],
)
def test_summaries_are_filled_in(alert: str, summary: str, tmp_path: Path) -> None:
    """promtool prints what it got where it expected nothing."""
    case = next(case for case in CASES if case.alert == alert and case.fires)
    done = run(replace(case, fires=False), RULES, tmp_path)
    assert summary in done.stdout + done.stderr


def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", "--lint-fatal", str(RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS) + len(RECORDINGS)} rules found" in done.stdout
