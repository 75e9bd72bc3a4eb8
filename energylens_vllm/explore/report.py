"""One HTML file of an exploration: what is best and why, and charts to look further. It needs no network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

import numpy as np

from energylens_vllm import __version__
from energylens_vllm.energy.batch import Array
from energylens_vllm.explore.explain import Choice
from energylens_vllm.explore.search import Exploration
from energylens_vllm.explore.sensitivity import Point, Swing, over_coefficients, over_loads

#: Pixels of the first chart, and of a line of the numbers in it.
PARETO_HEIGHT, NUMBER_HEIGHT = 440, 17
#: Order in which libraries are loaded.
LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")
#: Most points of the first chart; those of the front are always among them.
MOST_POINTS = 1500
#: Colours of the best deployments, told apart also by the colour-blind (Okabe and Ito), and of components.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442")
COMPONENTS = {
    "static": ("static power", "#b6bfcc"),
    "idle": ("idle", "#dfe4ec"),
    "host_gap": ("waiting for the host", "#7f8b9c"),
    "linear": ("linear layers", "#0072b2"),
    "experts": ("experts", "#00557f"),
    "attention": ("attention", "#56b4e9"),
    "weights": ("reading weights", "#e69f00"),
    "kv_cache": ("KV cache", "#f0c75e"),
    "activations": ("moving activations", "#009e73"),
    "communication": ("communication", "#cc79a7"),
}
_CONFIG = {
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": 500,
        "gridColor": "#e8ebf0",
        "labelOverlap": "greedy",
        "labelSeparation": 6,
    },
    "legend": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500, "labelLimit": 320},
    "header": {"labelFontSize": 12, "titleFontSize": 12},
}
_LOG = {"type": "log", "nice": False}
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name; nothing is fetched


def report(found: Exploration, best: Sequence[Choice]) -> str:
    """The report as HTML. Takes about a second, most of it for the sensitivities."""
    swings = over_coefficients(found, best)
    charts = {
        "pareto": _pareto(found, best),
        "components": _components(best),
        "loads": _loads(found, over_loads(found, best), best),
        "coefficients": _coefficients(swings, best),
    }
    here = files("energylens_vllm.explore")
    libraries = "\n".join(here.joinpath("vendor").joinpath(name).read_text(encoding="utf-8") for name in LIBRARIES)
    load = found.load
    wanted = [f"prompts of {load.prompt_tokens:g} and outputs of {load.output_tokens:g} tokens"]
    if load.rate_per_s is not None:
        wanted.append(f"{load.rate_per_s:g} requests a second")
    for what, bound in (("first token", load.ttft_s), ("output token", load.tpot_s)):
        if bound is not None:
            wanted.append(f"at most {bound * 1e3:g} ms to the first token" if what == "first token" else
                          f"at most {bound * 1e3:g} ms per output token")  # fmt: skip
    count = f"exactly {found.space.max_gpus}" if found.space.exactly else f"up to {found.space.max_gpus}"
    page = here.joinpath("report.html").read_text(encoding="utf-8")
    return page % {
        "title": escape(f"Deployments of {found.name} on {count} {' or '.join(dict.fromkeys(found.space.gpus))}"),
        "summary": escape(
            f"{', '.join(wanted).capitalize()}. {len(found.deployments)} deployments of {len(found.engines)} engines "
            f"fit the memory, {int(found.feasible.sum())} carry the load, {int(found.front.sum())} of them are not "
            "beaten in energy, latency and GPUs together."
        ),
        "table": _table(best),
        "best": "".join(
            f"<li>{escape(choice.why)}<pre>{escape(choice.command)}</pre>"
            + (f'<span class="quiet">on each of {choice.replicas} replicas</span>' if choice.replicas > 1 else "")
            + "</li>"
            for choice in best
        ),
        "flags": '<p class="quiet">Intervals hold 90 % of measurements; most of an error is common to all deployments '
        "of a model, so their order is surer than that."
        + (f" What is less sure: {escape(', '.join(sorted(found.flags)))}." if found.flags else "")
        + "</p>",
        "plot_note": "Every point is a deployment; for each batch limit the step budget that takes least is shown. "
        "The line joins what no other beats in energy and latency, numbers are the best deployments above.",
        "order_note": escape(_order_note(swings, best)),
        "version": escape(__version__),
        "licence": here.joinpath("vendor").joinpath("LICENSE").read_text(encoding="utf-8"),
        "libraries": libraries,
        "charts": json.dumps({"specs": charts}, allow_nan=False).replace("<", "\\u003c"),
    }


def _table(best: Sequence[Choice]) -> str:
    heads = ["", "deployment", "replicas", "GPUs", "running", "J/token", "90 % interval", "power", "tokens/s/GPU",
             "TPOT", "TTFT"]  # fmt: skip
    rows = []
    for position, choice in enumerate(best):
        swatch = f'<span class="swatch" style="background:{COLOURS[position % len(COLOURS)]}"></span>'
        cells = [
            f"{swatch}{position + 1}",
            escape(choice.title),
            str(choice.replicas),
            str(choice.gpus),
            f"{choice.running:.3g}",
            f"{choice.token_j:.3g}",
            "{:.3g} .. {:.3g}".format(*choice.interval_j),
            f"{choice.power_w:.0f} W",
            f"{choice.tokens_per_s_per_gpu:.0f}",
            f"{choice.tpot_s * 1e3:.1f} ms",
            f"{choice.ttft_s * 1e3:.0f} ms",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>" + "".join(rows) + "</table>"


# -- charts -----------------------------------------------------------------------------------------------------------


def _spec(tables: dict[str, tuple[Sequence[str], Iterable[Sequence[object]]]], **parts: object) -> dict[str, object]:
    """A chart. `tables` by name: the fields and the rows, which the page makes objects of."""
    datasets = {
        name: {"fields": list(names), "rows": [list(row) for row in rows]} for name, (names, rows) in tables.items()
    }
    return {"$schema": _SCHEMA, "config": _CONFIG, "datasets": datasets, **parts}


def _field(name: str, kind: str, title: str | None = None, **more: object) -> dict[str, object]:
    return {"field": name, "type": kind, "title": title, **more}


def _pareto(found: Exploration, best: Sequence[Choice]) -> dict[str, object]:
    table = found.deployments
    shown = _shown(found, best)
    names = ("engine", "what", "GPUs", "quantization", "limit", "budget", "replicas", "joules", "interval", "watts",
             "rate", "tpot", "ttft", "front", "carries")  # fmt: skip
    rows = []
    for i in shown:
        engine = found.engines[table.engine[i]]
        rows.append([
            int(table.engine[i]), engine.title, int(table.gpus[i]), engine.deployment.quantization or "none",
            int(table.max_num_seqs[i]), int(table.max_num_batched_tokens[i]), int(table.replicas[i]),
            _short(table.token_j[i]), f"{table.low_j[i]:.3g} .. {table.high_j[i]:.3g}", _short(table.power_w[i]),
            _short(table.tokens_per_s[i] / table.gpus[i]), _short(table.tpot_s[i] * 1e3), _short(table.ttft_s[i] * 1e3),
            bool(found.front[i]), "yes" if found.feasible[i] else "no",
        ])  # fmt: skip
    marks = [
        [position + 1, _short(c.tpot_s * 1e3), _short(c.token_j), _short(height)]
        for position, (c, height) in enumerate(zip(best, _heights(best, table.token_j[shown], table.tpot_s[shown]),
                                                   strict=True))
    ]  # fmt: skip
    line = _lower_left(found)
    x = _field("tpot", "quantitative", "time per output token (ms)", scale=_LOG | {"padding": 12})
    y = _field("joules", "quantitative", "energy per output token (J)",
               scale=_LOG | {"padding": 12}, axis={"format": "~g"})  # fmt: skip
    tooltip = [
        _field("what", "nominal", "deployment"), _field("limit", "quantitative", "max-num-seqs"),
        _field("budget", "quantitative", "max-num-batched-tokens"), _field("replicas", "quantitative", "replicas"),
        _field("GPUs", "ordinal", "GPUs"), _field("joules", "quantitative", "J/token"),
        _field("interval", "nominal", "90 % interval"), _field("watts", "quantitative", "power (W)"),
        _field("rate", "quantitative", "tokens/s/GPU"), _field("tpot", "quantitative", "TPOT (ms)"),
        _field("ttft", "quantitative", "TTFT (ms)"), _field("carries", "nominal", "carries the load"),
        _field("front", "nominal", "not beaten"),
    ]  # fmt: skip
    points: dict[str, object] = {
        "data": {"name": "deployments"},
        "params": [
            {
                "name": "near",
                "select": {"type": "point", "on": "pointerover", "fields": ["engine"], "clear": "pointerout"},
            },
            {"name": "gpus", "select": {"type": "point", "fields": ["GPUs"]}, "bind": "legend"},
            {"name": "zoom", "select": "interval", "bind": "scales"},
        ],
        "transform": [{"filter": {"param": "gpus"}}],
        "mark": {"type": "point", "filled": True, "size": 45},
        "encoding": {
            "x": x, "y": y,
            "color": _field("GPUs", "ordinal", "GPUs", scale={"scheme": "viridis"}),
            "shape": _field("quantization", "nominal", "quantization"),
            "opacity": {
                "condition": [{"param": "near", "empty": False, "value": 1},
                              {"test": "datum.carries === 'no'", "value": 0.12}],
                "value": 0.55,
            },
            "strokeWidth": {"value": 0},
            "size": {"condition": {"param": "near", "empty": False, "value": 90}, "value": 40},
            "tooltip": tooltip,
        },
    }  # fmt: skip
    layers: list[dict[str, object]] = []
    if found.load.tpot_s is not None:
        bound = [[_short(found.load.tpot_s * 1e3), "bound"]]
        layers.append({
            "data": {"name": "bounds"},
            "mark": {"type": "rule", "strokeDash": [5, 4], "color": "#a40000"},
            "encoding": {"x": _field("tpot", "quantitative")},
        })  # fmt: skip
    else:
        bound = []
    layers += [
        {
            "data": {"name": "front"},
            "mark": {"type": "line", "interpolate": "step-after", "color": "#1c2430", "strokeWidth": 1.5},
            "encoding": {"x": x, "y": y},
        },
        points,
        {
            "data": {"name": "best"},
            "mark": {"type": "point", "size": 170, "color": "#1c2430", "strokeWidth": 1.8},
            "encoding": {"x": x, "y": y},
        },
        {
            "data": {"name": "best"},
            "mark": {"type": "text", "align": "left", "dx": 12, "fontSize": 13, "fontWeight": 600, "color": "#1c2430"},
            "encoding": {"x": x, "y": y | {"field": "height"}, "text": {"field": "number"}},
        },
    ]
    return _spec(
        {
            "deployments": (names, rows),
            "front": (("tpot", "joules"), line),
            "best": (("number", "tpot", "joules", "height"), marks),
            "bounds": (("tpot", "what"), bound),
        },
        width="container", height=PARETO_HEIGHT, autosize={"type": "fit", "contains": "padding"}, layer=layers,
    )  # fmt: skip


def _heights(best: Sequence[Choice], joules: Array, seconds: Array) -> list[float]:
    """The joules a token at which the best deployments' numbers are written: their own, but above the number of a
    better one of like latency. A latency that bounds them all puts them into one spot. `joules` and `seconds` are
    those of all points of the chart, of shape (N,)."""
    line = NUMBER_HEIGHT / PARETO_HEIGHT * math.log(joules.max() / joules.min())
    like = 0.05 * math.log(seconds.max() / seconds.min())
    heights: list[float] = []
    for choice in best:
        height = math.log(choice.token_j)
        for better, below in zip(best, heights, strict=False):
            if abs(math.log(choice.tpot_s / better.tpot_s)) <= like:
                height = max(height, below + line)
        heights.append(height)
    return [math.exp(height) for height in heights]


def _shown(found: Exploration, best: Sequence[Choice]) -> list[int]:
    """Of each engine, number of replicas and batch limit the budget that takes least; thinned evenly if many."""
    table = found.deployments
    known = np.flatnonzero(np.isfinite(table.token_j))
    order = known[np.lexsort((
        table.token_j[known], table.max_num_seqs[known], table.replicas[known], table.engine[known]
    ))]  # fmt: skip
    keys = np.column_stack([table.engine, table.replicas, table.max_num_seqs])[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = np.any(keys[1:] != keys[:-1], axis=1)
    every = order[first]
    always = {int(i) for i in np.flatnonzero(found.front)} | {choice.index for choice in best}
    step = max(1, -(-len(every) // max(MOST_POINTS - len(always), 1)))
    return sorted(always | {int(i) for i in every[::step]})


def _lower_left(found: Exploration) -> list[list[float]]:
    """What no feasible deployment beats in energy and latency, whatever its GPUs, by latency."""
    table = found.deployments
    line: list[list[float]] = []
    chosen = np.flatnonzero(found.front)
    for i in chosen[np.lexsort((table.token_j[chosen], table.tpot_s[chosen]))]:
        if not line or table.token_j[i] < line[-1][1]:
            line.append([_short(table.tpot_s[i] * 1e3), _short(table.token_j[i])])
    return line


def _components(best: Sequence[Choice]) -> dict[str, object]:
    rows = [
        [_label(position, choice), COMPONENTS[name][0], order, _short(joules), _short(100 * joules / choice.token_j)]
        for position, choice in enumerate(best)
        for order, name in enumerate(COMPONENTS)
        if (joules := choice.components_j.get(name, 0.0)) > 0
    ]
    used = [pair for name, pair in COMPONENTS.items() if any(name in choice.components_j for choice in best)]
    return _spec(
        {"parts": (("deployment", "part", "order", "joules", "share"), rows)},
        data={"name": "parts"},
        width="container", height=34 * len(best) + 40, autosize={"type": "fit", "contains": "padding"},
        mark="bar",
        encoding={
            "y": _field("deployment", "nominal", sort=None, axis={"labelLimit": 300}),
            "x": _field("joules", "quantitative", "energy per output token (J)"),
            "color": _field(
                "part", "nominal", "spent on",
                scale={"domain": [name for name, _ in used], "range": [colour for _, colour in used]},
            ),
            "order": {"field": "order"},
            "tooltip": [
                _field("deployment", "nominal", "deployment"), _field("part", "nominal", "spent on"),
                _field("joules", "quantitative", "J/token"), _field("share", "quantitative", "%"),
            ],
        },
    )  # fmt: skip


def _loads(found: Exploration, points: Sequence[Point], best: Sequence[Choice]) -> dict[str, object]:
    rows = [[_label(p.choice, best[p.choice]), p.what, _short(p.value), _short(p.token_j)] for p in points]
    panels = []
    load = found.load
    for what, here in (
        ("prompt tokens", load.prompt_tokens), ("output tokens", load.output_tokens), ("running requests", None)
    ):  # fmt: skip
        layers: list[dict[str, object]] = [
            {
                "mark": {"type": "line", "point": {"size": 28}},
                "encoding": {
                    "color": _colour(best),
                    "tooltip": [
                        _field("deployment", "nominal", "deployment"), _field("value", "quantitative", what),
                        _field("joules", "quantitative", "J/token"),
                    ],
                },
            }
        ]  # fmt: skip
        if here is not None:
            layers.append({
                "mark": {"type": "rule", "strokeDash": [5, 4], "color": "#566173"},
                "encoding": {"x": {"datum": here}, "y": {"value": 0}, "y2": {"value": 240}},
            })  # fmt: skip
        panels.append({
            "width": 285, "height": 240,
            "transform": [{"filter": f"datum.what === '{what}'"}],
            "encoding": {
                "x": _field("value", "quantitative", what, scale=_LOG, axis={"tickCount": 6, "format": "~s"}),
                "y": _field("joules", "quantitative", "J/token", scale=_LOG | {"padding": 8},
                            axis={"tickCount": 6, "format": "~g"}),
            },
            "layer": layers,
        })  # fmt: skip
    return _spec({"points": (("deployment", "what", "value", "joules"), rows)}, data={"name": "points"}, hconcat=panels)


def _coefficients(swings: Sequence[Swing], best: Sequence[Choice]) -> dict[str, object]:
    rows = [
        [_label(s.choice, best[s.choice]), s.what, _short(min(s.lowered_j, s.raised_j)),
         _short(max(s.lowered_j, s.raised_j)), _short(s.lowered_j), _short(s.raised_j)]
        for s in swings
    ]  # fmt: skip
    widest = sorted({s.what for s in swings}, key=lambda what: -max(
        abs(s.raised_j - s.lowered_j) for s in swings if s.what == what
    ))  # fmt: skip
    return _spec(
        {"swings": (("deployment", "what", "low", "high", "lowered", "raised"), rows)},
        data={"name": "swings"},
        width="container", height=(11 * len(best) + 10) * len(widest) + 90,
        autosize={"type": "fit", "contains": "padding"},
        mark={"type": "bar", "height": 7, "minBandSize": 2},
        encoding={
            "y": _field("what", "nominal", sort=widest, axis={"labelLimit": 260}),
            "yOffset": {"field": "deployment", "sort": None},
            "x": _field("low", "quantitative", "energy per output token (J)", scale={"zero": False}),
            "x2": {"field": "high"},
            "color": _colour(best),
            "tooltip": [
                _field("deployment", "nominal", "deployment"), _field("what", "nominal", "coefficient"),
                _field("lowered", "quantitative", "20 % lower (J/token)"),
                _field("raised", "quantitative", "20 % higher (J/token)"),
            ],
        },
    )  # fmt: skip


def _order_note(swings: Sequence[Swing], best: Sequence[Choice]) -> str:
    """Which coefficients, lowered or raised for all, would put another deployment first."""
    if len(best) < 2:
        return ""
    changes = []
    for what in dict.fromkeys(s.what for s in swings):
        mine = [s for s in swings if s.what == what]
        for direction in ("lowered", "raised"):
            least = min(mine, key=lambda s: getattr(s, f"{direction}_j"))
            if least.choice != 0:
                changes.append(f"{what} {direction} would put number {least.choice + 1} first")
    return f"{'; '.join(changes).capitalize()}." if changes else "Number 1 stays first in each of these cases."


def _colour(best: Sequence[Choice]) -> dict[str, object]:
    labels = [_label(position, choice) for position, choice in enumerate(best)]
    colours = [COLOURS[position % len(COLOURS)] for position in range(len(best))]
    return _field(
        "deployment", "nominal", "deployment", scale={"domain": labels, "range": colours},
        legend={"orient": "top", "columns": 3},
    )  # fmt: skip


def _label(position: int, choice: Choice) -> str:
    replicas = f"{choice.replicas} x " if choice.replicas > 1 else ""
    return f"{position + 1}. {replicas}{choice.title}"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
