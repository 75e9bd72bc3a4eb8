"""Recording when asked: what is kept, when it ends, how large it gets, and that it harms nobody."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from energylens_vllm import Deployment, EnergyModel
from energylens_vllm.calibrate.recording import load
from energylens_vllm.calibrate.replay import replay
from energylens_vllm.cli import record as command
from energylens_vllm.cli.record import Engine, RecordError, choose, engines, replay_command
from energylens_vllm.meter import Reading
from energylens_vllm.serving import processes, recording
from energylens_vllm.serving.batch import Batch
from energylens_vllm.serving.increments import Increments
from energylens_vllm.serving.observer import Step, StepObserver
from energylens_vllm.serving.recording import StepRecording, files


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def decode(sequences: int, context: int) -> Batch:
    return Batch(
        [f"r{i}" for i in range(sequences)], [1] * sequences, np.full(sequences, context), [True] * sequences,
        sequences, sequences,
    )  # fmt: skip


class Server:
    """An engine that runs a step each 10 ms and reports each second, on GPUs of so many watts."""

    def __init__(
        self, folder: Path, watts: Sequence[float] = (400.0,), sizes: Sequence[int] | None = (1, 2, 4, 8)
    ) -> None:
        self.clock, self.watts = Clock(), watts
        self.recording = StepRecording(folder, "7-0", {"pid": os.getpid(), "engine": 0}, sizes, self.clock)
        self.paths = files(folder, "7-0")
        self.contexts = 100

    def ask(self, seconds: float, name: str = "a") -> None:
        self.paths["request"].write_text(json.dumps({"id": name, "seconds": seconds}))

    def run(self, seconds: int, sequences: int = 4) -> None:
        for _ in range(seconds):
            begin_s, steps = self.clock.now_s, []
            for _ in range(100 if sequences else 0):
                self.contexts += 1
                steps.append(Step(decode(sequences, self.contexts), self.clock.now_s, self.clock.now_s + 0.01))
                self.clock.now_s += 0.01
            self.clock.now_s = begin_s + 1.0
            readings = [
                Reading(str(i), begin_s + 0.01 * i, begin_s + 0.01 * i + 1.0, watts, "counter")
                for i, watts in enumerate(self.watts)
            ]
            self.recording.read(readings)
            self.recording(steps, None, Increments())

    @property
    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.paths["status"].read_text())
        return found


def test_nothing_is_kept_before_somebody_asks(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.run(5)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"]


def test_what_is_recorded_can_be_replayed(tmp_path: Path) -> None:
    server = Server(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    server.run(2)
    server.ask(25)
    server.run(30)
    assert server.status | {"seconds": 25} == {
        "id": "a", "state": "done", "steps": 2500, "seconds": 25, "readings": 26, "full": False, "problem": "",
    }  # fmt: skip
    found = load(server.paths["npz"])
    assert len(found) == 2500
    assert found.capture_sizes == (1, 2, 4, 8)
    assert found.phases == ("live_0s", "live_10s", "live_20s")
    assert found.requests(0) == [(1, found.computed_tokens[0])] * 4
    assert np.diff(found.computed_tokens[found.offsets[:-1]]).tolist() == [1] * 2499
    scores = replay(found, EnergyModel("llama-3.1-8b", Deployment()))
    assert all(score.measured for score in scores)
    for score in scores:
        assert score.measured_j == pytest.approx(400 * score.measured_s, rel=0.01)


def test_counters_of_several_gpus_are_added(tmp_path: Path) -> None:
    server = Server(tmp_path, watts=(300.0, 500.0))
    server.ask(5)
    server.run(8)
    with np.load(server.paths["npz"]) as arrays:
        counter = arrays["en"]
    assert np.diff(counter[:, 1]) / np.diff(counter[:, 0]) == pytest.approx(800e3)


def test_without_a_meter_there_is_no_counter(tmp_path: Path) -> None:
    server = Server(tmp_path, watts=(), sizes=None)
    server.ask(5)
    server.run(8)
    with np.load(server.paths["npz"]) as arrays:
        assert set(arrays) == {"off", "n", "c", "t0", "t2", "phase", "phases"}


def test_a_request_that_goes_ends_it_with_what_there_is(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.ask(1000)
    server.run(4)
    assert server.status["state"] == "recording"
    server.paths["request"].unlink()
    server.run(1)
    assert server.status["state"] == "done"
    assert len(load(server.paths["npz"])) == 400


def test_it_is_as_large_as_it_may_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_REQUESTS", 1000)
    server = Server(tmp_path)
    server.ask(1000)
    server.run(10)
    assert server.status["full"]
    assert len(load(server.paths["npz"])) == 250
    server.run(5)  # the same request is not begun again
    assert server.status["steps"] == 250


def test_no_steps_is_said(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.ask(3)
    server.run(6, sequences=0)
    assert server.status["state"] == "failed"
    assert "ran no step" in str(server.status["problem"])
    server.ask(3, "b")
    server.run(6)
    assert server.status["state"] == "done"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"id": "a"}', '{"id": "a", "seconds": "long"}', '{"id": 1, "seconds": null}']
)
def test_what_is_no_request_is_none(tmp_path: Path, text: str) -> None:
    server = Server(tmp_path)
    server.paths["request"].write_text(text)
    server.run(3)
    assert not server.paths["status"].exists()


def test_a_failure_is_counted_told_and_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full, as an observer sees it."""
    clock = Clock()
    observer = StepObserver(lambda batch: batch, None, clock=clock)
    kept = StepRecording(tmp_path, "7-0", {}, None, clock)
    observer.listeners.append(kept)
    paths = files(tmp_path, "7-0")
    paths["request"].write_text(json.dumps({"id": "a", "seconds": 1}))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    for _ in range(5):
        observer.scheduled(key := object(), decode(2, 10), clock())
        clock.now_s += 0.5
        observer.ended(key)
        observer.report()
    assert observer.guard.failures == {"listen": 1}
    status = json.loads(paths["status"].read_text())
    assert status["state"] == "failed"
    assert "No space left" in status["problem"]
    assert not paths["npz"].exists()


# -- the command ------------------------------------------------------------------------------------------------------


def engine(pid: int, parent: int = 1, number: int = 0) -> Engine:
    return Engine(f"{pid}-{number}", pid, {"pid": pid, "parent": parent, "engine": number})


def test_notes_of_engines_that_have_ended_are_removed(tmp_path: Path) -> None:
    (tmp_path / "1-0.json").write_text(json.dumps({"pid": os.getpid()}))
    (tmp_path / "2-0.json").write_text(json.dumps({"pid": 2**22 + 1}))
    (tmp_path / "2-0.npz").write_text("")
    (tmp_path / "3-0.json").write_text("{")
    assert [found.name for found in engines(tmp_path)] == ["1-0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1-0.json", "3-0.json"]


def test_the_engine_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, other = engine(10), engine(11, number=1), engine(20, parent=2)
    monkeypatch.setattr(command, "descendants", lambda pid: {5: {10, 11}, 6: {20}}.get(pid, set()))
    monkeypatch.setattr(command, "listener_of", {8000: 5, 8001: 6}.get)
    assert choose([one, two], None, None, None) == [one, two]
    assert choose([one, two], None, None, 1) == [two]
    assert choose([one, two, other], None, 5, None) == [one, two]
    assert choose([one, two, other], None, 20, None) == [other]
    assert choose([one, two, other], "http://localhost:8001", None, None) == [other]
    assert choose([one, two, other], "localhost:8000/v1", None, 0) == [one]


@pytest.mark.parametrize(
    ("found", "url", "pid", "number", "message"),
    [
        ([], None, None, None, "no engine with the plugin runs"),
        ([engine(10), engine(20, parent=2)], None, None, None, "engines of several servers"),
        ([engine(10)], "http://gpu7:8000", None, None, "not a server on this machine"),
        ([engine(10)], "http://localhost", None, None, "not a server on this machine"),
        ([engine(10)], None, 99, None, "no engine with the plugin belongs to process 99"),
        ([engine(10)], None, None, 3, "--engine: 3"),
    ],
)
def test_no_engine_is_meant(
    found: list[Engine], url: str | None, pid: int | None, number: int | None, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        choose(found, url, pid, number)


def waiting(clock: Clock, then: Callable[[], None] = lambda: None) -> Callable[[float], None]:
    def wait(seconds: float) -> None:
        clock.now_s += seconds
        then()

    return wait


def test_an_engine_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    clock = Clock()
    ((_, status),) = command.record(tmp_path, [engine(os.getpid())], 10.0, waiting(clock), clock)
    assert (status.state, status.problem) == ("failed", "it does not answer")
    assert 40 <= clock.now_s - 100 <= 42
    assert not list(tmp_path.iterdir())


def test_an_engine_that_ends_is_noticed(tmp_path: Path) -> None:
    clock = Clock()
    ((_, status),) = command.record(tmp_path, [engine(2**22 + 1)], 10.0, waiting(clock), clock)
    assert status.problem == "its process has ended"


def test_the_command_that_scores_names_what_is_not_default() -> None:
    about = {
        "gpu": "H100-SXM",
        "deployment": {
            "tensor_parallel_size": 2, "data_parallel_size": 4, "enable_expert_parallel": True, "quantization": "fp8",
            "enforce_eager": False, "async_scheduling": False, "cudagraph_capture_sizes": [1, 2], "vllm_release": None,
        },
    }  # fmt: skip
    assert replay_command(about, Path("c.json"), Path("s.npz")) == [
        "energylens", "replay", "--config", "c.json", "--gpu", "H100-SXM", "--tensor-parallel-size", "2",
        "--enable-expert-parallel", "--quantization", "fp8", "--no-async-scheduling", "s.npz",
    ]  # fmt: skip


def test_processes_of_this_one() -> None:
    assert processes.is_alive(os.getpid())
    assert not processes.is_alive(2**22 + 1)
    assert os.getpid() in processes.descendants(os.getppid())
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert processes.listener_of(listening.getsockname()[1]) == os.getpid()
    assert processes.listener_of(1) is None
