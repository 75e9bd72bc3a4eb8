from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from energylens_vllm.calibrate.recording import RecordingError, load


def arrays(**changes: Any) -> dict[str, Any]:
    """400 decode steps of 10 ms, 4 requests each, at a constant 500 W; the second half is another phase."""
    steps = 400
    ends = 100.0 + 0.01 * np.arange(1, steps + 1)
    readings = np.arange(99.0, 106.0, 0.1)
    made = {
        "off": 4 * np.arange(steps + 1),
        "n": np.ones(4 * steps, np.int32),
        "c": np.full(4 * steps, 100, np.int32),
        "t0": ends - 0.015,  # scheduled while the step before it runs
        "t2": ends,
        "phase": np.repeat([0, 1], steps // 2),
        "phases": np.array(["first", "second"]),
        "en": np.stack([readings, 500e3 * (readings - 99.0)], axis=1),
    }
    return {name: value for name, value in (made | changes).items() if value is not None}


def saved(tmp_path: Path, **changes: Any) -> Path:
    np.savez(tmp_path / "steps.npz", **arrays(**changes))
    return tmp_path / "steps.npz"


def test_windows_lie_between_counter_readings_and_count_parts_of_steps(tmp_path: Path) -> None:
    recording = load(saved(tmp_path))
    first, second = recording.windows()
    assert (first.phase, second.phase) == ("first", "second")
    assert recording.requests(7) == [(1, 100)] * 4
    for window in (first, second):
        assert window.duration_s == pytest.approx(1.4, abs=0.11)  # of 2 s, without the first half second
        assert window.energy_j == pytest.approx(500 * window.duration_s)
        assert window.busy_s == pytest.approx(window.duration_s)
        assert window.shares.sum() == pytest.approx(window.duration_s / 0.01)


def test_a_gap_without_work_is_idle(tmp_path: Path) -> None:
    made = arrays()
    late = np.arange(400) >= 150  # in the first phase, after its settling time, the engine waits for 0.7 s
    made["t0"], made["t2"] = made["t0"] + 0.7 * late, made["t2"] + 0.7 * late
    first, second = load(saved(tmp_path, **made)).windows()
    assert first.duration_s - first.busy_s == pytest.approx(
        0.7 - 0.005
    )  # from the end of one step to the schedule of the next
    assert second.duration_s == pytest.approx(second.busy_s)


def test_a_step_whose_output_was_never_taken_has_no_share(tmp_path: Path) -> None:
    made = arrays()
    made["t2"][100] = 0.0
    first, _ = load(saved(tmp_path, **made)).windows()
    assert first.shares[100] == 0.0
    assert first.busy_s == pytest.approx(first.duration_s)  # its time went to the step after it


@pytest.mark.parametrize("missing", ["en", "t2", "t0"])
def test_without_measurements_all_steps_count_in_full(tmp_path: Path, missing: str) -> None:
    windows = load(saved(tmp_path, **{missing: None})).windows()
    assert [window.shares.sum() for window in windows] == [200, 200]
    assert all(np.isnan([window.duration_s, window.busy_s, window.energy_j]).all() for window in windows)


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps({"requests": step}) + "\n" for step in ([[1, 5], [64, 0]], [], [[1, 6]])))
    recording = load(file)
    assert [recording.requests(step) for step in range(3)] == [[(1, 5), (64, 0)], [], [(1, 6)]]
    assert recording.phases == ("all",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": None}, "array 'n' is missing"),
        ({"t2": np.zeros(3)}, "array 't2' has 3 steps, 'off' has 400"),
        ({"c": np.zeros(3)}, "'off' does not divide the 1600 'n' and 3 'c'"),
        ({"phase": np.full(400, 5)}, "'phase' names phase 5, 'phases' has 2"),
        ({"n": np.where(np.arange(1600) == 9, -3, 1)}, "request of step 2 has -3 new tokens; accepted: 1 or more"),
        ({"c": np.where(np.arange(1600) == 9, -3, 1)}, "request of step 2 has -3 computed tokens; accepted: 0 or more"),
        ({"n": np.full(1600, 1.5)}, "'n' is not one row of whole numbers"),
        ({"c": np.full(1600, np.nan)}, "'c' is not one row of whole numbers"),
        ({"off": 4 * np.arange(401) + 4}, "'off' does not divide"),
        ({"t2": np.array(["now"] * 400)}, "'t2' is not one row of seconds"),
        ({"en": np.zeros(7)}, "'en' does not hold rows of time and energy"),
        ({"off": np.zeros(1), "n": np.zeros(0), "c": np.zeros(0), "t0": None, "t2": None, "phase": None}, "no steps"),
    ],
)
def test_bad_npz_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        load(saved(tmp_path, **changes))


@pytest.mark.parametrize(
    "line",
    [
        "[[1, 5]]",
        "{}",
        '{"requests": [[1]]}',
        '{"requests": [[1, 0.5]]}',
        '{"requests": [[1, true]]}',
        '{"requests": [[1, 99999999999999999999]]}',
        "words",
        '{"requests": 3}',
        '{"requests": [[1, 5], [1, ',
        "\x80",
    ],
)
def test_bad_json_lines_are_refused_by_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text(f'{{"requests": [[1, 5]]}}\n{line}\n')
    with pytest.raises(RecordingError, match="line 2: not a step"):
        load(file)


def test_no_such_file() -> None:
    with pytest.raises(RecordingError, match=r"no file 'nowhere\.npz'"):
        load("nowhere.npz")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, save: Any, kept: float) -> None:
    file = tmp_path / "steps.npz"
    save(file, **arrays())
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(RecordingError, match=r"steps\.npz: cut short or damaged"):
        load(file)


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path)
    content = bytearray(file.read_bytes())
    content[5000] ^= 255
    file.write_bytes(content)
    with pytest.raises(RecordingError, match="cut short or damaged"):
        load(file)


def test_a_file_without_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text("")
    with pytest.raises(RecordingError, match="it has no steps"):
        load(tmp_path / "steps.jsonl")
