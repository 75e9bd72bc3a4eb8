"""The plugin's settings: one schema, one precedence.

A setting is taken from the first of these places that names it:

1. `--energylens '{"gpu": "H200-SXM"}'` (or `--energylens.gpu H200-SXM`) of `vllm serve`,
2. `--additional-config '{"energylens": {"gpu": "H200-SXM"}}'`, which is also `LLM(additional_config=...)`,
3. the environment variable `ENERGYLENS_GPU`,
4. the default.

The flag reaches all of vLLM's processes as the environment variable `ENERGYLENS_SETTINGS`. Unknown names are refused.
"""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from energylens_vllm.errors import EnergyLensError, unknown

PREFIX = "ENERGYLENS_"
FLAG_VARIABLE = f"{PREFIX}SETTINGS"  #: carries what --energylens was given, as JSON
REQUIRED_VARIABLE = f"{PREFIX}REQUIRED"  #: "1" after `--plugin energylens`: what stops the plugin stops vLLM
OFFLINE_VARIABLE = f"{PREFIX}OFFLINE"  #: "1" in the engine process of an offline LLM
#: How weights may be shared among requests. Here, because `shares` loads numpy and every process of vLLM loads this.
RULES = ("shapley", "per_token")
_RESERVED = {FLAG_VARIABLE, REQUIRED_VARIABLE, OFFLINE_VARIABLE}


def setting(default: Any, doc: str) -> Any:
    """A field of `Settings` with its documentation."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a user can set. Raises EnergyLensError for a value of the wrong type or out of range."""

    enabled: bool = setting(True, "Whether the plugin does anything at all.")
    gpu: str | None = setting(
        None,
        "The GPU to predict for: a profile's name, as `energylens gpus` lists them, or the path of a profile's JSON. "
        "By default the GPU that vLLM runs on. On a machine without a known GPU it is H200-SXM, and every step is "
        "flagged `reference_gpu`.",
    )
    learn_expert_routing: bool = setting(
        False,
        "Whether workers count how tokens choose experts, for predictions to follow: docs/plugin.md. Off by default: "
        "it adds a copy to each layer of experts.",
    )
    report_interval_s: float = setting(
        5.0,
        "Seconds between a busy engine's reports to the API servers, so how far /metrics may lag behind. An engine "
        "that runs out of work reports at once.",
    )
    meter: bool = setting(True, "Whether to read the energy of the engine's GPUs, where it has any.")
    learning: bool = setting(
        True,
        "Whether predictions follow the meter: a few factors on the profile's coefficients, within bounds "
        "(docs/learning.md). On, because one GPU differs from another of its kind by 10 %. What the profile alone "
        "predicts is exported beside it.",
    )
    learning_folder: str | None = setting(
        "~/.cache/energylens", "Where what was learnt is kept over restarts, a file for each engine; empty: nowhere."
    )
    attribution: bool = setting(
        False, "Whether to say what each request costs: docs/attribution.md. It is off by default for what it costs."
    )
    attribution_rule: str = setting(
        "shapley", "How requests of a step share its reading of weights: `shapley` or `per_token`."
    )
    request_log: str | None = setting(
        None, "With `attribution`, a file that gets a line of JSON for each finished request; rotated at 64 MiB."
    )
    recording_folder: str | None = setting(
        "~/.cache/energylens/engines",
        "Where an engine leaves a note by which `energylens record` finds it, and what that records; empty: nowhere. "
        "It is the user's own folder: nobody else can ask, and only sizes of batches are recorded.",
    )
    routing: bool = setting(
        False, "Whether to tell routers, each second, what the engine holds and what one more request would cost there."
    )
    steer_ranks: bool = setting(
        False,
        "Whether requests go to the data-parallel rank where they add the fewest joules (docs/gateways.md). Not for "
        "models with experts, whose ranks run in lockstep.",
    )
    ttft_target_s: float = setting(
        1.0, "With `routing` or `steer_ranks`, the target for the time to first token, in seconds."
    )
    tpot_target_s: float = setting(
        0.05, "With `routing` or `steer_ranks`, the target for the time per output token, in seconds."
    )
    typical_prompt_tokens: float = setting(
        512.0, "With `routing`, prompt tokens of the request that is priced: the same at all replicas of a fleet."
    )
    typical_output_tokens: float = setting(256.0, "With `routing`, output tokens of the request that is priced.")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_type(item.name, getattr(self, item.name), _TYPES[item.name])
        if not self.report_interval_s > 0:
            raise EnergyLensError(
                f"report_interval_s: {self.report_interval_s!r} is not positive; accepted: seconds > 0"
            )
        for name in ("ttft_target_s", "tpot_target_s", "typical_prompt_tokens", "typical_output_tokens"):
            if not 0 < getattr(self, name) < float("inf"):
                raise EnergyLensError(f"{name}: {getattr(self, name)!r}; accepted: finite numbers > 0")
        if self.attribution_rule not in RULES:
            raise unknown("attribution_rule", self.attribution_rule, RULES)
        if self.request_log is not None and not self.attribution:
            raise EnergyLensError(
                "request_log: it needs attribution, which is false; accepted with attribution: a path"
            )


_TYPES: dict[str, Any] = typing.get_type_hints(Settings)


def from_mapping(values: object, where: str) -> dict[str, Any]:
    """`values` as a dict of known settings; `where` says in an error where they come from.

    Raises EnergyLensError if it is not a mapping or has a name that is no setting.
    """
    if not isinstance(values, Mapping):
        raise EnergyLensError(f"{where}: {values!r} is not a JSON object of settings")
    for name in values:
        if name not in _TYPES:
            raise unknown(f"{where}: setting", name, _TYPES)
    return dict(values)


def from_json(text: str, where: str) -> dict[str, Any]:
    """Settings from JSON text, with the errors of `from_mapping`."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise EnergyLensError(f"{where}: {text!r} is not JSON ({error})") from error
    return from_mapping(values, where)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Settings from variables such as ENERGYLENS_GPU.

    Raises EnergyLensError for a variable with the prefix that is no setting, or a value that cannot be read.
    """
    variables = {f"{PREFIX}{name.upper()}": name for name in _TYPES}
    found = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable in _RESERVED:
            continue
        if variable not in variables:
            raise unknown("environment variable", variable, variables)
        found[variables[variable]] = _parse(variable, text, _TYPES[variables[variable]])
    return found


def load(additional_config: object = None, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings in force, given vLLM's `additional_config`.

    Raises EnergyLensError naming the place, the setting, its value and what is accepted.
    """
    environ = os.environ if environ is None else environ
    values = from_environment(environ)
    if isinstance(additional_config, Mapping) and "energylens" in additional_config:
        values |= from_mapping(additional_config["energylens"], "--additional-config energylens")
    if FLAG_VARIABLE in environ:
        values |= from_json(environ[FLAG_VARIABLE], "--energylens")
    return Settings(**values)


def _parse(variable: str, text: str, kind: Any) -> Any:
    if bool in _alternatives(kind):
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise EnergyLensError(f"{variable}: {text!r} is not a boolean; accepted: 1, 0, true, false")
    if float in _alternatives(kind):
        try:
            return float(text)
        except ValueError:
            raise EnergyLensError(f"{variable}: {text!r} is not a number") from None
    return text


def _check_type(name: str, value: object, kind: Any) -> None:
    accepted = _alternatives(kind)
    if isinstance(value, bool) and bool not in accepted:
        matches = False
    else:
        matches = isinstance(value, accepted) or (float in accepted and isinstance(value, int))
    if not matches:
        raise EnergyLensError(f"{name}: {value!r} is not of type {type_name(kind)}")


def _alternatives(kind: Any) -> tuple[type, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def type_name(kind: Any) -> str:
    """A setting's type as people write it, such as "str or null"."""
    return " or ".join("null" if part is type(None) else part.__name__ for part in _alternatives(kind))


def table() -> list[tuple[str, str, str, str]]:
    """(name, type, default as JSON, documentation) of each setting."""
    rows = []
    for item in fields(Settings):
        assert item.default is not MISSING
        rows.append((item.name, type_name(_TYPES[item.name]), json.dumps(item.default), str(item.metadata["doc"])))
    return rows
