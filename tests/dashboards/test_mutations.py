"""Renaming a metric, a label, a label's value or a unit in the plugin breaks this suite.

Each change is made in a copy of the package, wherever the plugin says the old name, and what `test_files_are_current`
asks is asked of that copy. So it fails for what it is there for, and not only in principle.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = [sys.executable, "-m", "energylens_vllm.dashboards.generate", "--check"]

#: what -> old text, new text, what is said of it
MUTATIONS = {
    "a metric": (
        "energylens_predicted_energy_joules_total",
        "energylens_expected_energy_joules_total",
        "'energylens_predicted_energy_joules_total' is not exported",
    ),
    "a unit": (
        "energylens_gpu_power_watts",
        "energylens_gpu_power_kilowatts",
        "'energylens_gpu_power_watts' is not exported",
    ),
    "a unit of a counter": (
        "energylens_gpu_energy_joules_total",
        "energylens_gpu_energy_millijoules_total",
        "'energylens_gpu_energy_joules_total' is not exported",
    ),
    "a label": ('("component", COMPONENTS)', '("part", COMPONENTS)', "has no label 'component'"),
    "a label of gauges": ('_GPU = (("gpu", ()),)', '_GPU = (("device", ()),)', "has no label 'gpu'"),
    "a label's value": ('"host_gap"', '"host_wait"', "is never 'host_gap'"),
    "a type": (
        '"energylens_bias_ratio",\n        "gauge"',
        '"energylens_bias_ratio",\n        "counter"',
        "energylens_bias_ratio is a counter, it is used as a gauge",
    ),
    "a router's metric": (
        "energylens_routing_saved_joules_total",
        "energylens_routing_spared_joules_total",
        "'energylens_routing_saved_joules_total' is not exported",
    ),
    "a router's label": ('("reason", REASONS)', '("why", REASONS)', "has no label 'reason'"),
    "a metric that no panel shows": (
        "METER = (",
        'METER = (\n    Metric("energylens_new_total", "counter", "", "New."),',
        "no panel shows energylens_new_total",
    ),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed, with the files and checks beside it."""
    tree = tmp_path_factory.mktemp("mutated")
    ignored = shutil.ignore_patterns("__pycache__", "vendor", "test_mutations.py")
    shutil.copytree(ROOT / "energylens_vllm", tree / "energylens_vllm", ignore=ignored)
    shutil.copytree(ROOT / "dashboards", tree / "dashboards", ignore=ignored)
    (tree / "energylens_vllm" / "dashboards").symlink_to(tree / "dashboards")
    (tree / "docs").mkdir()
    for page in ("metrics.md", "dashboards.md", "runbook.md"):
        shutil.copy(ROOT / "docs" / page, tree / "docs")
    return tree


def check(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command or CHECK, cwd=tree, env=environment, capture_output=True, text=True)


def test_unchanged_it_passes_and_it_is_the_copy_that_is_checked(tree: Path) -> None:
    done = check(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    where = "from energylens_vllm.dashboards import panel; from energylens_vllm.serving import metrics"
    found = check(tree, sys.executable, "-c", f"{where}; print(panel.__file__, metrics.__file__)").stdout.split()
    assert len(found) == 2
    assert all(Path(file).is_relative_to(tree) for file in found)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_change_is_noticed(tree: Path, what: str) -> None:
    old, new, complaint = MUTATIONS[what]
    changed = {}
    package = tree / "energylens_vllm"
    for path in (*sorted((package / "serving").glob("*.py")), package / "routing" / "decisions.py"):
        text = path.read_text()
        if old in text:
            changed[path] = text
            path.write_text(text.replace(old, new))
    assert changed
    try:
        done = check(tree)
    finally:
        for path, text in changed.items():
            path.write_text(text)
    assert done.returncode == 1
    assert complaint in done.stderr
