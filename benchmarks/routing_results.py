"""Joules a token and attainment of routing policies: traces, loads, fleets, seeds, and a belief that is wrong by 20 %.

    python benchmarks/routing_results.py TRACES [--seeds 3] [--only azure] [--fleet mixed] [--json FILE]
    python benchmarks/routing_results.py --plot FILE ... [--svg docs/routing.svg]

TRACES is a folder with `azure23_conv.csv` (Azure LLM inference trace 2023, conversation) and `mooncake_conv.jsonl`.
Every figure is a mean over seeds, which draw the noise of each replica. `energy*` is the energy policy with each second
replica believed 20 % faster and cheaper than it is and the others 20 % slower and dearer. Prints Markdown; with --plot
it reads what was saved with --json and draws it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from energylens_vllm.cli.simulate import believed, fleet_tables
from energylens_vllm.routing.policies import POLICIES
from energylens_vllm.routing.simulate import simulate
from energylens_vllm.routing.trace import at_load, read_arrivals

FLEETS = {"equal": "8xH200-SXM", "mixed": "3xH200-SXM,2xH100-SXM,2xA100-SXM-80GB,1xL40S"}
NAMES = (*POLICIES, "energy*")
LOADS = (0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Trace:
    """The first `requests` of a file, and the target to the first token that its prompts allow."""

    file: str
    requests: int
    ttft_s: float


#: Parameters of the policy were chosen on other traces, and on requests 14,000 to 17,000 of Azure's (docs/routing.md).
TRACES = {"azure": Trace("azure23_conv.csv", 3000, 1.0), "mooncake": Trace("mooncake_conv.jsonl", 1500, 5.0)}
TPOT_S = 0.05


@dataclass(frozen=True)
class Cell:
    """A policy's means over seeds; `joules` an output token, `attainment` in percent."""

    trace: str
    fleet: str
    load: float
    policy: str
    joules: float
    attainment: float


def measure(
    folder: Path, traces: Sequence[str], fleets: Sequence[str], loads: Sequence[float], seeds: int
) -> list[Cell]:
    """All cells; each row of the table is printed when it is there."""
    cells: list[Cell] = []
    print("| trace | fleet | load | " + " | ".join(NAMES) + " |\n" + "| --- " * (len(NAMES) + 3) + "|")
    for trace in traces:
        given = TRACES[trace]
        requests = read_arrivals(folder / given.file)[: given.requests]
        for fleet in fleets:
            tables = fleet_tables("llama-3.1-8b", FLEETS[fleet], 256)
            wrong = believed(tables, "0.8,1.2")
            for load in loads:
                arrivals = at_load(requests, load)
                row = []
                for name in NAMES:
                    belief = wrong if name[-1] == "*" else tables
                    runs = [
                        simulate(name.rstrip("*"), tables, arrivals, given.ttft_s, TPOT_S, belief, seed)
                        for seed in range(seeds)
                    ]
                    joules = fmean(run.energy_per_output_token_j for run in runs)
                    row.append(Cell(trace, fleet, load, name, joules, 100 * fmean(run.attainment for run in runs)))
                shown = [f"{cell.joules:.3f} ({cell.attainment:.1f})" for cell in row]
                print(f"| {trace} | {fleet} | {load:g} | " + " | ".join(shown) + " |", flush=True)
                cells += row
    return cells


# -- plot ---------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 150, 46, 48, 52
COLOURS = {
    "least-request": "#4477aa", "prefix-aware": "#66ccee", "pack": "#ccbb44", "llm-d": "#aa3377", "energy": "#228833",
    "energy*": "#228833",
}  # fmt: skip


def plot(cells: Sequence[Cell]) -> str:
    """Attainment and joules relative to least-request over load, a column for each trace and fleet, as SVG."""
    columns = list(dict.fromkeys((cell.trace, cell.fleet) for cell in cells))
    loads = sorted({cell.load for cell in cells})
    width, height = LEFT + len(columns) * (WIDTH + GAP), TOP + 2 * (HEIGHT + GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" fill="#333"><rect width="{width}" height="{height}" fill="#fff"/>'
    ]
    for i, (name, colour) in enumerate(COLOURS.items()):
        dash = ' stroke-dasharray="4 3"' if name[-1] == "*" else ""
        x = LEFT + 120 * i
        parts.append(f'<path d="M{x} 14h22" stroke="{colour}" stroke-width="2"{dash}/><text x="{x + 27}" y="18">{name}')
        parts.append("</text>")
    for column, (trace, fleet) in enumerate(columns):
        here = {(cell.policy, cell.load): cell for cell in cells if (cell.trace, cell.fleet) == (trace, fleet)}
        x0 = LEFT + column * (WIDTH + GAP)
        relative = {key: 100 * cell.joules / here["least-request", cell.load].joules for key, cell in here.items()}
        for row, (title, values, ticks) in enumerate((
            ("attainment, %", {key: cell.attainment for key, cell in here.items()}, (0, 25, 50, 75, 100)),
            ("J/token, % of least-request", relative, (40, 60, 80, 100, 120)),
        )):  # fmt: skip
            parts += _panel(x0, TOP + row * (HEIGHT + GAP), f"{trace}, {fleet}: {title}", loads, values, ticks)
    return "\n".join((*parts, "</svg>\n"))


def _panel(
    x0: float, y0: float, title: str, loads: Sequence[float], values: dict[tuple[str, float], float],
    ticks: Sequence[int],
) -> list[str]:  # fmt: skip
    def x(load: float) -> float:
        return x0 + WIDTH * loads.index(load) / max(len(loads) - 1, 1)

    def y(value: float) -> float:
        inside = min(max(value, ticks[0]), ticks[-1])
        return y0 + HEIGHT * (1 - (inside - ticks[0]) / (ticks[-1] - ticks[0]))

    parts = [f'<text x="{x0}" y="{y0 - 8}" font-weight="bold">{title}</text>']
    for tick in ticks:
        parts.append(f'<path d="M{x0} {y(tick):.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    parts += [f'<text x="{x(load):.1f}" y="{y0 + HEIGHT + 15}" text-anchor="middle">{load:g}x</text>' for load in loads]
    for name, colour in COLOURS.items():
        points = " ".join(f"{x(load):.1f},{y(values[name, load]):.1f}" for load in loads)
        dash = ' stroke-dasharray="4 3"' if name[-1] == "*" else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="?", type=Path, help="the folder of the traces")
    parser.add_argument("--only", choices=list(TRACES), action="append")
    parser.add_argument("--fleet", choices=list(FLEETS), action="append")
    parser.add_argument("--loads", default=",".join(f"{load:g}" for load in LOADS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="save the figures there")
    parser.add_argument("--plot", type=Path, nargs="+", help="draw saved figures")
    parser.add_argument("--svg", type=Path, default=Path("docs/routing.svg"))
    args = parser.parse_args()
    if args.plot:
        cells = [Cell(**each) for file in args.plot for each in json.loads(file.read_text())]
        args.svg.write_text(plot(cells))
        return 0
    if args.traces is None:
        parser.error("the folder of the traces is missing")
    loads = [float(each) for each in args.loads.split(",")]
    found = measure(args.traces, args.only or list(TRACES), args.fleet or list(FLEETS), loads, args.seeds)
    if args.json:
        args.json.write_text(json.dumps([asdict(cell) for cell in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
