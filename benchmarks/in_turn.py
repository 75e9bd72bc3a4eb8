"""Processes that each need the whole GPU, one after the other; the next imports vLLM while this one starts its engine.

Whatever a process prints goes to a log; its own lines, which begin with "[ 12.3 s]", also to the screen.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO


def wait_for_turn(architecture: str) -> None:
    """In such a process: do what needs no GPU, the imports and vLLM's look at the model's class, and wait."""
    from vllm import LLM
    from vllm.model_executor.models.registry import ModelRegistry

    assert LLM is not None
    ModelRegistry.models[architecture].inspect_model_cls()  # in a process of its own; vLLM keeps the answer in a file
    if not sys.stdin.readline():
        raise SystemExit("nobody is there to say whose turn it is")


def run_in_turn(commands: Mapping[str, Sequence[str]], log: pathlib.Path, timeout_s: float) -> dict[str, bool]:
    """Run each command, and say which ended well. `timeout_s` is for each, from the beginning of its turn."""
    passed: dict[str, bool] = {}
    names = list(commands)
    with open(log, "a") as sink, tempfile.TemporaryDirectory() as folder:
        # Another working folder than a checkout, where the package would be found without its hooks.
        following = _Turn(names[0], commands[names[0]], folder, sink)
        try:
            for name, next_name in zip(names, [*names[1:], None], strict=True):
                turn, following = following, None
                print(f"== {name}", flush=True)
                turn.begin()
                if next_name is not None:
                    following = _Turn(next_name, commands[next_name], folder, sink)
                passed[name] = turn.wait(timeout_s)
        finally:
            if following is not None:
                following.kill()
    return passed


class _Turn:
    """One process and the thread that reads what it prints."""

    def __init__(self, name: str, command: Sequence[str], folder: str, log: IO[str]) -> None:
        self._name = name
        self._last: list[str] = []
        self._process = subprocess.Popen(
            list(command), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True, env={"VLLM_LOGGING_LEVEL": "INFO"} | os.environ,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    def begin(self) -> None:
        """It is this process's turn, whether it is ready or not yet."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed already; `wait` says so
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended well within this time; it is killed if it has not ended."""
        try:
            code: int | str = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = f"a timeout after {timeout_s:.0f} s"
        self.kill()  # also what it has started itself
        self._reader.join(5.0)
        if code:
            print(f"{self._name} ended with {code}; its last lines:\n{''.join(self._last)}", flush=True)
        return not code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self, log: IO[str]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            log.write(f"{self._name} {line}")
            log.flush()
            self._last = [*self._last[-29:], line]
            if line.startswith("[") and " s] " in line[:14]:
                print(f"{self._name:10s} {line}", end="", flush=True)
