"""One schema, one precedence, and mistakes that are named."""

from __future__ import annotations

import json

import pytest

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.serving.settings import FLAG_VARIABLE, Settings, load


def test_defaults_where_nothing_is_said() -> None:
    assert load(environ={}) == Settings(enabled=True, gpu=None, report_interval_s=5.0)


def test_the_flag_beats_the_additional_config_beats_the_environment() -> None:
    environ = {"ENERGYLENS_GPU": "L40S", "ENERGYLENS_REPORT_INTERVAL_S": "7", "ENERGYLENS_ENABLED": "off"}
    additional = {"energylens": {"gpu": "H100-SXM", "report_interval_s": 5}, "other": {"gpu": "theirs"}}
    assert load(environ=environ) == Settings(enabled=False, gpu="L40S", report_interval_s=7.0)
    assert load(additional, environ) == Settings(enabled=False, gpu="H100-SXM", report_interval_s=5)
    environ[FLAG_VARIABLE] = json.dumps({"gpu": "B200-SXM"})
    assert load(additional, environ) == Settings(enabled=False, gpu="B200-SXM", report_interval_s=5)


@pytest.mark.parametrize(
    ("additional", "environ", "named"),
    [
        (
            {"energylens": {"gpuu": "x"}},
            {},
            "--additional-config energylens: setting: unknown value 'gpuu' (did you mean",
        ),
        ({"energylens": 3}, {}, "3 is not a JSON object"),
        ({}, {FLAG_VARIABLE: '{"enable": true}'}, "did you mean 'enabled'?"),
        ({}, {FLAG_VARIABLE: "{gpu}"}, "is not JSON"),
        ({}, {"ENERGYLENS_GPUS": "x"}, "'ENERGYLENS_GPUS' (did you mean 'ENERGYLENS_GPU'?)"),
        ({}, {"ENERGYLENS_ENABLED": "maybe"}, "ENERGYLENS_ENABLED: 'maybe' is not a boolean"),
        ({}, {"ENERGYLENS_REPORT_INTERVAL_S": "soon"}, "'soon' is not a number"),
        ({"energylens": {"enabled": 1}}, {}, "enabled: 1 is not of type bool"),
        (
            {"energylens": {"attribution_rule": "shaply"}},
            {},
            "attribution_rule: unknown value 'shaply' (did you mean 'shapley'?)",
        ),
        ({"energylens": {"request_log": "a.jsonl"}}, {}, "request_log: it needs attribution"),
        ({}, {"ENERGYLENS_METER": "perhaps"}, "ENERGYLENS_METER: 'perhaps' is not a boolean"),
        ({"energylens": {"report_interval_s": True}}, {}, "report_interval_s: True is not of type float"),
        ({"energylens": {"gpu": 200}}, {}, "gpu: 200 is not of type str or null"),
        ({"energylens": {"report_interval_s": 0}}, {}, "report_interval_s: 0 is not positive"),
        ({"energylens": {"report_interval_s": float("nan")}}, {}, "is not positive"),
    ],
)
def test_a_mistake_is_refused_by_name(additional: object, environ: dict[str, str], named: str) -> None:
    with pytest.raises(EnergyLensError) as refusal:
        load(additional, environ)
    assert named in str(refusal.value)


def test_other_additional_configs_are_left_alone() -> None:
    class Opaque:  # vLLM also accepts objects there
        pass

    assert load(Opaque(), {}) == Settings()
