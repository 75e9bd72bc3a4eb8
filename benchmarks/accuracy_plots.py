"""Draw held-out predictions against measurements, as SVG.

    python benchmarks/accuracy.py DATA OPERATIONS --json ERRORS
    python benchmarks/accuracy_plots.py ERRORS DATA docs/plots       # writes steps.svg and serving.svg there

`steps.svg`: joules a step of each recorded window, predicted by a fit that has not seen the model, over measured ones.
`serving.svg`: errors of joules a token of each serving run on several GPUs, its series held out, over requests at once.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from fit_profiles import RUNS, Run, mlenergy_rows

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
WIDTH, HEIGHT, MARGIN = 460, 400, 58


class Points(NamedTuple):
    name: str
    x: Sequence[float]
    y: Sequence[float]


class Axis(NamedTuple):
    """Logarithmic or linear, of `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def text(x: float, y: float, words: str, anchor: str = "middle", turn: float = 0, size: int = 12) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{turned}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def ticks(x: Axis, y: Axis, at_x: Iterable[float], at_y: Iterable[float], unit: str = "") -> list[str]:
    grid = 'stroke="#ddd"'
    drawn = []
    for value in at_x:
        drawn += [line(x(value), y.start, x(value), y.end, grid), text(x(value), y.start + 16, f"{value:g}")]
    for value in at_y:
        drawn += [line(x.start, y(value), x.end, y(value), grid)]
        drawn += [text(x.start - 6, y(value) + 4, f"{value:g}{unit}", "end")]
    return drawn


def dots(groups: Sequence[Points], x: Axis, y: Axis, key_x: float, key_y: float) -> list[str]:
    drawn = []
    for i, group in enumerate(groups):
        colour = COLOURS[i % len(COLOURS)]
        for a, b in zip(group.x, group.y, strict=True):
            drawn.append(f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.2" fill="{colour}" fill-opacity="0.75"/>')
        at = key_y + 17 * i
        drawn += [f'<circle cx="{key_x:.1f}" cy="{at:.1f}" r="4" fill="{colour}"/>']
        drawn += [text(key_x + 9, at + 4, group.name, "start")]
    return drawn


def document(width: int, height: int, drawn: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *drawn, "</svg>"]) + "\n"


def steps(held: Mapping[str, Any]) -> str:
    """A panel for each GPU: predicted over measured joules a step."""
    drawn: list[str] = []
    key = 190
    for panel, (gpu, names) in enumerate(RUNS.items()):
        groups = []
        for run in (Run(gpu, name) for name in names if name in held[gpu]):
            windows = run.windows
            weights = np.add.reduceat(windows.shares, windows.first.astype(np.int64))
            measured = (windows.energy_j / weights)[run.scored]
            groups.append(Points(run.name, measured, measured * np.exp(held[gpu][run.name]["energy"])))
        left = panel * (WIDTH + key)
        x = Axis(0.5, 800, left + MARGIN, left + WIDTH - 8, True)
        y = Axis(0.5, 800, HEIGHT - MARGIN, 30, True)
        drawn += ticks(x, y, (1, 10, 100), (1, 10, 100))
        drawn.append(line(x(0.5), y(0.5), x(800), y(800), 'stroke="#444"'))
        for share in (0.9, 1.1):
            low, high = 0.5 * max(1, 1 / share), 800 * min(1, 1 / share)
            drawn.append(line(x(low), y(low * share), x(high), y(high * share), 'stroke="#999" stroke-dasharray="4 4"'))
        drawn += dots(groups, x, y, left + WIDTH + 8, 60)
        drawn += [text(left + WIDTH / 2 + 20, 18, f"{gpu}: joules a step, the model held out", size=14)]
        drawn += [text(left + WIDTH / 2 + 20, HEIGHT - 18, "measured J (dashed: 10 % off)")]
        drawn += [text(left + 14, HEIGHT / 2, "predicted J", turn=-90)]
    return document(len(RUNS) * (WIDTH + key), HEIGHT, drawn)


def serving(held: Mapping[str, Any], data: pathlib.Path) -> str:
    """Errors over requests at once."""
    rows = [row for gpu in ("H100-SXM", "B200-SXM") for row in mlenergy_rows(data, gpu)]
    groups = [
        Points(
            series.replace(" lm-arena-chat", ""),
            [row.concurrency for row in rows if row.series == series],
            (100 * np.expm1(np.array(errors["energy"]))).tolist(),
        )
        for series, errors in held.items()
        if " x1 " not in series
    ]
    key = 250
    x = Axis(6, 700, MARGIN, WIDTH + 90, True)
    y = Axis(-35, 35, HEIGHT - MARGIN, 30, False)
    drawn = ticks(x, y, (8, 16, 32, 64, 128, 256, 512), range(-30, 31, 10), " %")
    drawn.append(line(x.start, y(0), x.end, y(0), 'stroke="#444"'))
    drawn += dots(groups, x, y, x.end + 12, 60)
    drawn += [text((x.start + x.end) / 2, 18, "Error of joules a token on several GPUs, the series held out", size=14)]
    drawn += [text((x.start + x.end) / 2, HEIGHT - 18, "requests at once")]
    return document(int(x.end) + key, HEIGHT, drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("errors", type=pathlib.Path, help="file that accuracy.py --json wrote")
    parser.add_argument("data", type=pathlib.Path, help="folder with mlenergy_v3/calibration.csv")
    parser.add_argument("folder", type=pathlib.Path, help="folder for the plots")
    args = parser.parse_args()
    held = json.loads(args.errors.read_text())
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, drawn in (("steps.svg", steps(held)), ("serving.svg", serving(held["serving"], args.data))):
        (args.folder / name).write_text(drawn)
        print(f"wrote {args.folder / name}")


if __name__ == "__main__":
    main()
