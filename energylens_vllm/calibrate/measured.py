"""Points that were measured, kept in a file as they come, so that a run that was interrupted can go on.

One JSON object a line. The first says what was measured with what; points follow, each once. A line that was cut off
is dropped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from energylens_vllm.errors import EnergyLensError
from energylens_vllm.files import whole


@dataclass(frozen=True, slots=True)
class Measured:
    """A point as it was measured. Means over the windows that agreed.

    `time_s` is of one launch (0 for idle states), `clock_hz` of the SMs. `library`: whose kernel ran, "vllm" or
    "torch". `time_spread` and `power_spread`: largest over smallest of the windows, less one.
    """

    point: str
    time_s: float
    power_w: float
    clock_hz: float
    temperature_celsius: float
    throttled: tuple[str, ...]
    library: str
    windows: int
    time_spread: float
    power_spread: float


@dataclass(frozen=True, slots=True)
class Skipped:
    """A point that could not be measured, and why."""

    point: str
    reason: str


class Log:
    """The file of one calibration. `header` has to be that of an earlier run for its points to count."""

    def __init__(self, path: Path, header: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.measured: dict[str, Measured] = {}
        self.resumed = resume and self._read(header)
        if not self.resumed:
            self.measured = {}
        lines = [dict(header), *(asdict(found) for found in self.measured.values())]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))

    def add(self, found: Measured) -> None:
        """Keep it, and have it on the disk before returning."""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.measured[found.point] = found

    def _read(self, header: Mapping[str, Any]) -> bool:
        """Take the points of an earlier run; whether there was one like this."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise EnergyLensError(f"calibrate: {self.path} cannot be read: {error}") from None
        rows = [row for row in map(_parsed, lines) if row is not None]
        if not rows or rows[0] != json.loads(json.dumps(dict(header))):
            return False
        for row in rows[1:]:
            try:
                found = Measured(**{**row, "throttled": tuple(row["throttled"])})
            except (TypeError, KeyError):
                continue
            if math.isfinite(found.time_s) and math.isfinite(found.power_w) and found.power_w > 0:
                self.measured[found.point] = found
        return True


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole and have it on the disk. Raises EnergyLensError where that fails."""
    try:
        with whole(path) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EnergyLensError(f"calibrate: {path} cannot be written: {error.strerror or error}") from None
