"""What replicas tell survives the way, and nothing else counts as a report."""

from __future__ import annotations

import json
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.architectures import load_config
from energylens_vllm.hardware.profile import PROFILES
from energylens_vllm.routing import StepTable
from energylens_vllm.routing.report import MOST_ENDED, Report, Tables, compile_table, describe

REPORT = Report(1.5, 3, 100, 2000, 500.5, 30.0, 1.2, 0.5, 3.9, 7, ((10, 20), (30, 40)))


def test_the_way() -> None:
    assert Report.from_wire(json.loads(json.dumps(REPORT.to_wire()))) == REPORT
    assert Report.from_wire(REPORT.to_wire() | {"of_a_later_release": 1}) == REPORT
    many = Report(1.5, 3, 100, 2000, 500.5, 30.0, num_ended=900, ended=tuple((i, i) for i in range(900)))
    assert Report.from_wire(many.to_wire()).ended[-1] == (899, 899)  # type: ignore[union-attr]
    assert len(many.to_wire()["ended"]) == MOST_ENDED


@pytest.mark.parametrize(
    "values",
    [
        None, "running", [], {}, REPORT.to_wire() | {"running": None}, REPORT.to_wire() | {"running": "many"},
        REPORT.to_wire() | {"running": -1}, REPORT.to_wire() | {"kv_tokens_used": float("nan")},
        REPORT.to_wire() | {"time_factor": 0}, REPORT.to_wire() | {"chars_per_token": 0},
        REPORT.to_wire() | {"ended": [1]}, REPORT.to_wire() | {"ended": 5},
    ],
)  # fmt: skip
def test_what_is_no_report(values: object) -> None:
    assert Report.from_wire(values) is None


def test_a_model_described_gives_the_same_table(tmp_path: Path) -> None:
    config, deployment = load_config("llama-3.1-8b"), {"gpu": "L40S", "max_num_seqs": 32}
    expected = StepTable.compile(EnergyModel(config, Deployment(gpu="L40S", max_num_seqs=32)), 1e5)
    made = compile_table(json.loads(json.dumps(describe(config, deployment, 1e5))))
    np.testing.assert_array_equal(made.decode_j, expected.decode_j)
    # Of a profile of one's own the router's machine has no file.
    profile = tmp_path / "mine.json"
    profile.write_text((PROFILES / "L40S.json").read_text())
    described = describe(config, deployment | {"gpu": str(profile)}, 1e5)
    profile.unlink()
    np.testing.assert_array_equal(compile_table(described).decode_j, expected.decode_j)


class Later(Executor):
    """Does what it was given when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Any, Any]] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, function, args))
        return future

    def work(self) -> None:
        for future, function, args in self.waiting:
            try:
                future.set_result(function(*args))
            except Exception as error:
                future.set_exception(error)
        self.waiting.clear()


def test_tables_are_made_once_and_beside(table: StepTable) -> None:
    later, made = Later(), []

    def make(described: Any) -> StepTable:
        made.append(described)
        return table

    tables = Tables(make, later, most=2)
    assert tables.get({"a": 1}) is None
    assert tables.get({"a": 1}) is None
    later.work()
    assert tables.get({"a": 1}) is table
    assert made == [{"a": 1}]
    for number in range(5):
        assert tables.get({"b": number}) is None
    assert len(tables._tables) == 2
    assert tables.get("nothing") is None


def test_a_model_that_is_not_known() -> None:
    tables = Tables()
    described = {"config": {"architectures": ["Nothing"]}, "deployment": {}, "kv_tokens": 1.0}
    end = time.monotonic() + 30
    while tables.get(described) is None and tables.problem(described) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert "ArchitectureError" in (tables.problem(described) or "")
    assert tables.get(described) is None
    assert tables.problem(None) == "the replica does not say which model it runs"
