"""Requests from a trace file, with prefix blocks where it names them."""

from __future__ import annotations

import csv
import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path

from energylens_vllm.errors import EnergyLensError

#: Tokens of a prefix block in Mooncake's traces.
PREFIX_BLOCK_TOKENS = 512
#: Azure's LLM inference traces; other CSV files name their columns.
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: seconds since the first, tokens, and the ids of its prompt's prefix blocks."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()


def read_arrivals(path: str | os.PathLike[str], columns: tuple[str, str, str] = COLUMNS) -> list[Arrival]:
    """Requests in order of arrival. A `.jsonl` file is read as Mooncake's (timestamp in ms, input_length,
    output_length, hash_ids), any other as CSV whose `columns` are time (ISO, or seconds), prompt and output tokens.

    Requests without output are left out. Raises EnergyLensError naming the file and the line.
    """
    file = Path(path)
    rows: list[Arrival] = []
    line = 1
    mooncake = file.suffix == ".jsonl"
    try:
        with file.open(newline="") as text:
            if mooncake:
                for line, entry in enumerate(text, 1):  # noqa: B007
                    given = json.loads(entry)
                    prefix = tuple(given.get("hash_ids", ()))
                    rows.append(Arrival(given["timestamp"] / 1e3, int(given["input_length"]),
                                        int(given["output_length"]), prefix))  # fmt: skip
            else:
                time, prompt, output = columns
                for line, row in enumerate(csv.DictReader(text), 2):  # noqa: B007
                    rows.append(Arrival(_seconds(row[time]), int(row[prompt]), int(row[output])))
    except OSError as error:
        raise EnergyLensError(f"trace: {file}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        accepted = "timestamp, input_length, output_length" if mooncake else f"columns {', '.join(columns)}"
        raise EnergyLensError(f"trace: {file} line {line}: {error!r}; accepted: {accepted}") from None
    rows = sorted((row for row in rows if row.prompt_tokens > 0 and row.output_tokens > 0), key=lambda row: row.at_s)
    if not rows:
        raise EnergyLensError(f"trace: {file} has no requests")
    start_s = rows[0].at_s
    return [Arrival(row.at_s - start_s, row.prompt_tokens, row.output_tokens, row.prefix) for row in rows]


def at_load(arrivals: list[Arrival], factor: float) -> list[Arrival]:
    """The same requests `factor` times as fast. Raises EnergyLensError for a factor that is not positive."""
    if not factor > 0:
        raise EnergyLensError(f"load: {factor!r}; accepted: more than 0")
    return [Arrival(each.at_s / factor, each.prompt_tokens, each.output_tokens, each.prefix) for each in arrivals]


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.datetime.fromisoformat(text.strip()[:26]).replace(tzinfo=datetime.timezone.utc).timestamp()
