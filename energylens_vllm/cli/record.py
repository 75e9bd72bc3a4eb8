"""Record the steps of a vLLM server that runs on this machine, and its GPUs' energy beside them.

    energylens record http://localhost:8000 --for 60s --out steps.npz
    energylens replay --config steps.config.json --gpu H200-SXM steps.npz

The server needs the plugin, and to run as the same user; it need not be told anything beforehand. The recording holds
the sizes of batches and when they ran, no token of anybody, in the format of docs/formats.md; beside it the model's
config is written, and the command that scores it is printed. A recording costs the engine nothing on its scheduler's
path. It ends early on Ctrl-C, with what there is by then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from energylens_vllm.cli.table import quantity, seconds
from energylens_vllm.energy import Deployment
from energylens_vllm.errors import EnergyLensError
from energylens_vllm.serving.processes import descendants, is_alive, listener_of
from energylens_vllm.serving.recording import LONGEST_S, Request, Status, files, forget, write
from energylens_vllm.serving.settings import Settings

LOOK_S = 0.5
#: An engine looks at each of its reports whether somebody asks, by default each 5 s.
ANSWER_S = 30.0


class RecordError(EnergyLensError):
    """Nothing can be recorded, or was."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that left a note: its files' name, its process and what it says of itself."""

    name: str
    pid: int
    about: Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", nargs="?", metavar="URL", help="the server on this machine (default: the only engine there is)"
    )
    parser.add_argument("--pid", type=int, metavar="N", help="the server's process, instead of its URL")
    parser.add_argument(
        "--for", dest="seconds", type=seconds, default=60.0, metavar="TIME", help="how long, such as 2m (default 60s)"
    )
    parser.add_argument("--out", type=Path, default=Path("steps.npz"), metavar="STEPS.npz", help="(default steps.npz)")
    parser.add_argument(
        "--engine", type=int, metavar="N", help="which of a data-parallel server's engines (default: all, a file each)"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="where engines leave notes, if not in the default folder"
    )


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.seconds <= LONGEST_S:
        raise RecordError(f"--for: {args.seconds:g} s; accepted: 1 s to {LONGEST_S:.0f} s")
    if args.out.suffix != ".npz":
        raise RecordError(f"--out: {str(args.out)!r} does not end in .npz")
    folder = args.folder or Path(str(Settings().recording_folder)).expanduser()
    chosen = choose(engines(folder), args.url, args.pid, args.engine)
    try:
        done = record(folder, chosen, args.seconds)
    except OSError as error:
        raise RecordError(f"record: {error.filename or folder}: {error.strerror}") from None
    problems = 0
    for number, (engine, status) in enumerate(done):
        if status.state != "done":
            print(f"energylens: engine {engine.name}: {status.problem}", file=sys.stderr)
            problems += 1
            continue
        out = args.out if len(done) == 1 else args.out.with_suffix(f".{number}.npz")
        print(_keep(folder, engine, status, out))
    return 1 if problems else 0


def engines(folder: Path) -> list[Engine]:
    """The engines that run now; notes of others are removed."""
    found = []
    for path in sorted(folder.glob("*.json")):
        name = path.stem
        with contextlib.suppress(OSError, ValueError, KeyError):
            about = json.loads(path.read_text())
            if is_alive(int(about["pid"])):
                found.append(Engine(name, int(about["pid"]), about))
            else:
                forget(folder, name)
    return found


def choose(found: Sequence[Engine], url: str | None, pid: int | None, number: int | None) -> list[Engine]:
    """The engines of the server that is meant. Raises RecordError if that is not clear."""
    if not found:
        raise RecordError(
            "record: no engine with the plugin runs on this machine as this user (see `energylens doctor`, and the "
            "setting recording_folder)"
        )
    if url is not None:
        parts = urlsplit(url if "//" in url else f"//{url}")
        if parts.port is None or parts.hostname not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
            raise RecordError(f"record: {url!r} is not a server on this machine; accepted: http://localhost:PORT")
        pid = listener_of(parts.port)
        if pid is None:
            raise RecordError(f"record: no process of this user listens on port {parts.port}")
    chosen = list(found)
    if pid is not None:
        family = {pid, *descendants(pid)}
        chosen = [engine for engine in found if engine.pid in family]
        if not chosen:
            raise RecordError(f"record: no engine with the plugin belongs to process {pid}")
    elif len({engine.about.get("parent") for engine in found}) > 1:
        pids = ", ".join(str(engine.pid) for engine in found)
        raise RecordError(f"record: there are engines of several servers (processes {pids}); name a URL or --pid")
    if number is not None:
        chosen = [engine for engine in chosen if engine.about.get("engine") == number]
        if not chosen:
            raise RecordError(f"--engine: {number} is none of the server's engines")
    return chosen


def record(
    folder: Path,
    chosen: Sequence[Engine],
    duration_s: float,
    wait: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[tuple[Engine, Status]]:
    """Ask the engines, wait until each has ended, and say how. KeyboardInterrupt ends the recordings."""
    asked = Request(uuid.uuid4().hex, duration_s)
    paths = {engine.name: files(folder, engine.name) for engine in chosen}
    for each in paths.values():
        write(each["request"], json.dumps(asdict(asked)))
    started_s, stopped = clock(), False
    ended: dict[str, Status] = {}
    try:
        while len(ended) < len(chosen):
            try:
                wait(LOOK_S)
            except KeyboardInterrupt:
                if stopped:
                    raise
                stopped, started_s = True, clock() - duration_s  # the answer comes within one more report
                for each in paths.values():
                    each["request"].unlink(missing_ok=True)
            for engine in chosen:
                if engine.name not in ended:
                    status = _status(paths[engine.name]["status"], asked.id)
                    if status is not None and status.state != "recording":
                        ended[engine.name] = status
                    elif not is_alive(engine.pid):
                        ended[engine.name] = Status(asked.id, "failed", problem="its process has ended")
                    elif clock() - started_s > duration_s + ANSWER_S:
                        ended[engine.name] = Status(asked.id, "failed", problem="it does not answer")
                    elif status is not None:
                        _tell(status, duration_s)
    finally:
        for each in paths.values():
            each["request"].unlink(missing_ok=True)
        if sys.stderr.isatty():
            print(file=sys.stderr)
    return [(engine, ended[engine.name]) for engine in chosen]


def _status(path: Path, asked: str) -> Status | None:
    try:
        status = Status(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return status if status.id == asked else None


def _tell(status: Status, duration_s: float) -> None:
    if sys.stderr.isatty():
        line = f"{status.seconds:.0f} of {duration_s:.0f} s, {status.steps} steps"
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _keep(folder: Path, engine: Engine, status: Status, out: Path) -> str:
    """Move the recording to where it is wanted, write the config beside, and say what to do with it."""
    config = out.with_suffix(".config.json")
    shutil.move(files(folder, engine.name)["npz"], out)
    config.write_text(json.dumps(engine.about["config"]))
    metered = "" if status.readings else "; no GPU was metered, so replay predicts and does not score"
    full = "; it is as large as it may get, and ended early" if status.full else ""
    return (
        f"wrote {out}: {status.steps} steps in {quantity(status.seconds, 's')}{metered}{full}\n"
        f"    {shlex.join(replay_command(engine.about, config, out))}"
    )


def replay_command(about: Mapping[str, Any], config: Path, out: Path) -> list[str]:
    """The command that scores a recording of the engine that says `about` of itself."""
    command = ["energylens", "replay", "--config", str(config)]
    given = {**about.get("deployment", {}), "gpu": about.get("gpu"), "data_parallel_size": 1}
    # What was recorded is one engine's own; the sizes of its graphs are in the recording.
    for field in fields(Deployment):
        value = given.get(field.name)
        if value is None or value == field.default or field.name == "cudagraph_capture_sizes":
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.name == "async_scheduling":
            command.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, bool):
            command.append(flag)
        else:
            command += [flag, str(value)]
    return [*command, str(out)]
