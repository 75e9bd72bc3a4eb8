"""The table of metrics keeps Prometheus' conventions, and the pages made from the code are current."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from energylens_vllm.serving.metrics import BY_NAME, COMMON_LABELS, MAX_SERIES_PER_ENGINE, METRICS, Metric
from energylens_vllm.serving.reference import main

ROOT = Path(__file__).parents[2]
BASE_UNITS = {"joules", "seconds", "watts", "tokens", "bytes", "hertz", "celsius"}


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"energylens_[a-z0-9]+(_[a-z0-9]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.type == "counter")
    stem = metric.name.removesuffix("_total")
    if metric.unit in BASE_UNITS:
        assert stem.endswith(f"_{metric.unit}")
    assert not re.search(r"_(ms|us|mj|kj|kwh|milli\w+|micro\w+|kilo\w+)\b", stem)
    assert metric.help.endswith(".")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert bool(metric.buckets) == (metric.type == "histogram")
    assert not {*metric.label_names} & {*COMMON_LABELS, "le", "quantile", "job", "instance", "request_id"}


def test_series_that_exist_from_the_start_leave_room() -> None:
    assert sum(metric.series for metric in METRICS) <= MAX_SERIES_PER_ENGINE - 50


def test_pages_are_current() -> None:
    assert main(["--check", "--docs", str(ROOT / "docs")]) == 0


def test_a_stale_page_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--docs", str(tmp_path)]) == 0
    assert main(["--check", "--docs", str(tmp_path)]) == 0
    (tmp_path / "settings.md").write_text("old")
    assert main(["--check", "--docs", str(tmp_path)]) == 1
    assert "settings.md is out of date" in capsys.readouterr().out
