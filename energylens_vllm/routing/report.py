"""What a replica tells a router of itself: once which model it runs on what, and each second how it is doing.

Both travel as plain values (JSON). The model goes as its configuration, some kilobytes, and becomes a step table at the
router, which keeps tables by content.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

from energylens_vllm.routing.table import StepTable

#: The keys of a replica's model and report, in whatever its host carries for it.
MODEL, REPORT = "energylens_model", "energylens"
#: Answers that a report names at most: a sample where more have ended in a second.
MOST_ENDED = 64


@dataclass(frozen=True, slots=True)
class Report:
    """A replica's state at one time. None is unknown."""

    sampled_s: float  #: when, by the replica's wall clock
    running: float  #: requests that have not ended, waiting ones too
    waiting_tokens: float  #: prompt tokens not yet computed
    kv_tokens_used: float
    mean_context: float  #: of all requests, tokens
    prefill_tokens_per_s: float
    time_factor: float = 1.0  #: measured over predicted time of steps lately
    silent_s: float = 0.0  #: how long the engine has said nothing though it has work
    chars_per_token: float | None = None  #: of prompts seen lately
    num_ended: int = 0  #: requests that have ended so far
    ended: tuple[tuple[int, int], ...] = ()  #: prompt and output tokens of the latest of them, newest last

    def to_wire(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"ended": [list(pair) for pair in self.ended[-MOST_ENDED:]]}

    @classmethod
    def from_wire(cls, values: object) -> Report | None:
        """From plain values; None if they are no report, so that its sender is unknown rather than idle."""
        if not isinstance(values, Mapping):
            return None
        known = {field.name for field in fields(cls)}
        try:
            given = {name: value for name, value in values.items() if name in known}
            ended = tuple((int(prompt), int(output)) for prompt, output in given.pop("ended", ()))
            report = cls(**given, ended=ended)
            numbers = [getattr(report, name) for name in known - {"chars_per_token", "ended"}]
            if report.chars_per_token is not None:
                numbers.append(report.chars_per_token - 1e-3)
            valid = all(math.isfinite(number) and number >= 0 for number in numbers) and report.time_factor > 0
        except (TypeError, ValueError):
            return None
        return report if valid else None


def describe(config: Mapping[str, Any], deployment: Mapping[str, Any], kv_tokens: float) -> dict[str, Any]:
    """A replica's model in plain values: a Hugging Face config, arguments of `Deployment`, and what its cache holds.

    A profile that `deployment` names by path is put in: the router's machine need not have the file.
    """
    from energylens_vllm.hardware.profile import known_gpus

    described: dict[str, Any] = {"config": dict(config), "deployment": dict(deployment), "kv_tokens": float(kv_tokens)}
    gpu = deployment.get("gpu")
    if isinstance(gpu, str) and gpu not in known_gpus():
        with open(gpu) as profile:
            described["profile"] = json.load(profile)
    plain: dict[str, Any] = json.loads(json.dumps(described, default=str))
    return plain


def compile_table(described: Mapping[str, Any]) -> StepTable:
    """The step table of one data-parallel rank of what `describe` gave. Raises EnergyLensError if it is not known."""
    import tempfile
    from pathlib import Path

    from energylens_vllm.energy import Deployment, EnergyModel

    deployment = dict(described["deployment"])
    with tempfile.TemporaryDirectory() as folder:
        if "profile" in described:
            path = Path(folder) / "profile.json"
            path.write_text(json.dumps(described["profile"]))
            deployment["gpu"] = str(path)
        model = EnergyModel(described["config"], Deployment(**deployment))
        return StepTable.compile(model, float(described["kv_tokens"]))


class Tables:
    """Step tables by content, made in a thread of their own: a table takes a tenth of a second or more."""

    def __init__(
        self,
        compile: Callable[[Mapping[str, Any]], StepTable] = compile_table,
        executor: Executor | None = None,
        most: int = 64,
    ) -> None:
        self._compile, self._most = compile, most
        self._executor = executor or ThreadPoolExecutor(1, "energylens-tables")
        self._tables: OrderedDict[str, Future[StepTable]] = OrderedDict()

    def get(self, described: object) -> StepTable | None:
        """The table, or None as long as it is being made, and where none can be made."""
        if not isinstance(described, Mapping):
            return None
        key = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
        future = self._tables.get(key)
        if future is None:
            future = self._tables[key] = self._executor.submit(self._compile, described)
            while len(self._tables) > self._most:
                self._tables.popitem(last=False)
        if not future.done() or future.exception() is not None:
            return None
        return future.result()

    def problem(self, described: object) -> str | None:
        """Why there is no table for it, if that is final."""
        if not isinstance(described, Mapping):
            return "the replica does not say which model it runs"
        key = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
        future = self._tables.get(key)
        error = future.exception() if future is not None and future.done() else None
        return None if error is None else f"{type(error).__name__}: {error}"
