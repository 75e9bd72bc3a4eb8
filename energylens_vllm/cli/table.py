"""Plain tables for terminals, and quantities written the way people read them."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence

_PREFIXES = (
    (1e15, "P"),
    (1e12, "T"),
    (1e9, "G"),
    (1e6, "M"),
    (1e3, "k"),
    (1.0, ""),
    (1e-3, "m"),
    (1e-6, "µ"),
    (1e-9, "n"),
)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Lines of aligned columns under `headers`: the first `left` columns to the left, the others to the right."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def quantity(value: float, unit: str) -> str:
    """`value` with three significant digits and an SI prefix, such as "12.3 mJ"; "-" for not known (NaN)."""
    if math.isnan(value):
        return "-"
    rounded = float(f"{value:.3g}")  # before the prefix is chosen, so that 999.9 mJ becomes 1 J
    scale, prefix = next((pair for pair in _PREFIXES if abs(rounded) >= pair[0]), (1.0, ""))
    return f"{rounded / scale:.3g} {prefix}{unit}"


def percent(value: float, signed: bool = False) -> str:
    """A fraction as a percentage with one decimal; "-" for not known (NaN)."""
    return "-" if math.isnan(value) else f"{value:{'+' if signed else ''}.1%}"


_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """A time that people write, such as "5m", in seconds; for argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; accepted: such as 90s or 5m")
    return float(found.group(1)) * _SECONDS[found.group(2)]
