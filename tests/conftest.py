"""What tests need from outside, and whose fault it is when it is not there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "hooks"))
from ray_python import ray_python  # noqa: E402

#: marker -> whether this machine has what it needs
AVAILABLE: dict[str, Callable[[], bool]] = {
    "vllm": lambda: importlib.util.find_spec("vllm") is not None,
    "releases": lambda: importlib.util.find_spec("vllm") is not None,
    "prometheus": lambda: shutil.which("prometheus") is not None and shutil.which("promtool") is not None,
    "chromium": lambda: shutil.which("chromium") is not None,
    "ray": lambda: ray_python() is not None,
    "litellm": lambda: Path(os.environ.get("LITELLM_VENV", ROOT / ".venv-litellm"), "bin", "litellm").exists(),
    "haproxy": lambda: shutil.which("haproxy") is not None,
    "compose": lambda: shutil.which("docker-compose") is not None,
}


def pytest_configure() -> None:
    """A script in the background runs with interrupts ignored, and so would the servers that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A person without, say, Prometheus still runs the rest; in CI nothing may be left out, so there it fails."""
    if os.environ.get("CI"):
        return
    missing = {marker for marker, available in AVAILABLE.items() if not available()}
    for item in items:
        for marker in missing.intersection(mark.name for mark in item.iter_markers()):
            item.add_marker(pytest.mark.skip(reason=f"this machine has no {marker}"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of two layers that vLLM serves on a CPU with `--load-format dummy`."""
    folder = tmp_path_factory.mktemp("tiny-model")
    subprocess.run([sys.executable, ROOT / "examples" / "tiny_model.py", folder], check=True)
    return folder
