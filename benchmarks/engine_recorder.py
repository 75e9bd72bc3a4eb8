"""A plugin of vLLM for benchmarks: has the engine process write down what energylens' pairing is shown.

`install(folder)` makes it findable for vLLM in a folder for PYTHONPATH; with ENGINE_RECORDER=FOLDER in its environment
an engine writes to FOLDER, in chunks of 10 s, `steps-*.npz` (arrays as in docs/formats.md; `decode` says which requests
decode), `readings.jsonl` and `windows.jsonl`. `load` reads them back. With ENGINE_RECORDER_FAKE_GPUS=N an engine
without GPUs is taken to have N, which NVML's stand-in knows: for a trial.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from dataclasses import asdict
from typing import Any

import numpy as np

FOLDER, FAKE_GPUS = "ENGINE_RECORDER", "ENGINE_RECORDER_FAKE_GPUS"
CHUNK_S = 10.0


def install(folder: pathlib.Path) -> None:
    """Lay this module out in `folder` with an entry point, as an installation would."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder)
    info = folder / "engine_recorder-0.dist-info"
    info.mkdir(exist_ok=True)
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: engine-recorder\nVersion: 0\n")
    info.joinpath("entry_points.txt").write_text("[vllm.general_plugins]\nengine_recorder = engine_recorder:register\n")


def register() -> None:
    """Called by vLLM in each of its processes."""
    if (folder := os.environ.get(FOLDER)) is None:
        return
    from energylens_vllm.serving import pairing

    class Recorded(pairing.Pairing):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.recorder = Recorder(pathlib.Path(folder))
            self.listeners.append(self.recorder.window)

        def add(self, readings: Any) -> None:
            readings = list(readings)
            self.recorder.readings(readings)
            super().add(readings)

        def __call__(self, steps: Any, predictions: Any, increments: Any) -> None:
            self.recorder.steps(steps)
            super().__call__(steps, predictions, increments)

    from energylens_vllm.serving import listen

    listen.Pairing = Recorded
    if gpus := int(os.environ.get(FAKE_GPUS, "0")):
        from energylens_vllm.hooks.vllm import start
        from energylens_vllm.meter.nvml import Nvml

        start.gpus_of = lambda _: (Nvml(None, 0, gpus), gpus)


class Recorder:
    """Writes to a folder, on the thread that reports."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._chunks, self._from_s = folder, 0, 0.0
        self._steps: list[Any] = []

    def steps(self, steps: Any) -> None:
        """Keep them, and write those kept if they are of 10 s, or nothing runs."""
        if self._steps and (not steps or steps[-1].end_s - self._from_s >= CHUNK_S):
            self._write()
        if steps and not self._steps:
            self._from_s = steps[0].start_s
        self._steps.extend(steps)

    def _write(self) -> None:
        batches = [step.batch for step in self._steps]
        np.savez_compressed(
            self._folder / f"steps-{self._chunks:05}.npz",
            off=np.cumsum([0] + [len(batch.request_ids) for batch in batches]),
            n=np.concatenate([np.asarray(batch.new_tokens, dtype=np.int32) for batch in batches]),
            c=np.concatenate([np.asarray(batch.computed_tokens, dtype=np.int32) for batch in batches]),
            decode=np.concatenate([np.asarray(batch.is_decode, dtype=bool) for batch in batches]),
            t0=np.array([step.start_s for step in self._steps]), t2=np.array([step.end_s for step in self._steps]),
        )  # fmt: skip
        self._chunks += 1
        self._steps.clear()

    def readings(self, readings: Any) -> None:
        with open(self._folder / "readings.jsonl", "a") as file:
            for reading in readings:
                row = asdict(reading)
                row["state"]["throttled"] = sorted(row["state"]["throttled"])
                file.write(json.dumps(row) + "\n")

    def window(self, window: Any) -> None:
        row = asdict(window)
        if window.evidence is not None:
            row["evidence"] |= dict(slopes_j=window.evidence.slopes_j.tolist(), shares=window.evidence.shares.tolist())
        with open(self._folder / "windows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


def load(folder: pathlib.Path) -> tuple[list[Any], list[Any], list[dict[str, Any]]]:
    """(steps, readings, windows as written) of an engine."""
    from energylens_vllm.meter import Reading, State
    from energylens_vllm.serving.batch import Batch
    from energylens_vllm.serving.observer import Step

    steps = []
    for path in sorted(folder.glob("steps-*.npz")):
        with np.load(path) as arrays:
            off, new, computed, decode = (arrays[name] for name in ("off", "n", "c", "decode"))
            for i, (start_s, end_s) in enumerate(zip(arrays["t0"].tolist(), arrays["t2"].tolist(), strict=True)):
                here = slice(off[i], off[i + 1])
                tokens, decodes = new[here].tolist(), decode[here].tolist()
                num_decodes = sum(n for n, is_decode in zip(tokens, decodes, strict=True) if is_decode)
                ids = [str(k) for k in range(len(tokens))]
                batch = Batch(ids, tokens, computed[here].tolist(), decodes, sum(tokens), num_decodes)
                steps.append(Step(batch, start_s, end_s))
    rows = [json.loads(line) for line in (folder / "readings.jsonl").read_text().splitlines()]
    for row in rows:
        row["state"] = State(**{**row["state"], "throttled": frozenset(row["state"]["throttled"])})
    windows = [json.loads(line) for line in (folder / "windows.jsonl").read_text().splitlines()]
    return steps, [Reading(**row) for row in rows], windows
