"""The report as a person meets it: opened in Chromium, without a network."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path

import pytest

from energylens_vllm.explore import Exploration, Load, Space, explore
from energylens_vllm.explore.explain import Choice, choices
from energylens_vllm.explore.report import MOST_POINTS, report

CHARTS = ("pareto", "components", "loads", "coefficients")


@pytest.fixture(scope="module", params=[None, 12.0], ids=["always full", "at a rate"])
def found(request: pytest.FixtureRequest) -> Exploration:
    load = Load(1000, 300, ttft_s=2.0, tpot_s=0.05, rate_per_s=request.param)
    return explore("llama-3.1-70b", load, Space(gpus=("H100-SXM",), max_gpus=8))


@pytest.fixture(scope="module")
def best(found: Exploration) -> list[Choice]:
    return choices(found, "meta-llama/Llama-3.1-70B", 4)


@pytest.fixture(scope="module")
def page(found: Exploration, best: list[Choice]) -> str:
    return report(found, best)


def opened(page: str, folder: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they wrote to the console."""
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    result = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=20000", "--enable-logging=stderr", "--window-size=1200,900", "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def marks(document: str, chart: str) -> dict[str, int]:
    """How many marks of each kind a chart has."""
    start = document.index(f'<div id="{chart}"')
    drawing = document[start : document.index("</svg>", start)]
    counts: dict[str, int] = {}
    for kind, inside in re.findall(r'class="mark-(\w+) role-mark[^"]*"[^>]*>(.*?)</g>', drawing, flags=re.DOTALL):
        counts[kind] = counts.get(kind, 0) + len(re.findall(r"<(?:path|line|text|rect)\b", inside))
    return counts


@pytest.mark.chromium
def test_chromium_draws_every_chart(page: str, found: Exploration, best: list[Choice], tmp_path: Path) -> None:
    document, console = opened(page, tmp_path)
    assert console == []
    assert f'data-drawn="{len(CHARTS)}"' in document
    seen = {chart: marks(document, chart) for chart in CHARTS}
    assert seen["pareto"]["symbol"] > 100
    assert seen["pareto"]["text"] == len(best)
    assert seen["pareto"]["line"] == 1
    assert seen["pareto"]["rule"] == 1  # the bound on time per output token
    assert seen["components"]["rect"] == sum(len(choice.components_j) for choice in best)
    assert seen["loads"]["line"] == 3 * len(best)
    assert seen["coefficients"]["rect"] == 8 * len(best)
    for choice in best:
        assert choice.command in document


TEXTS = """<script>
  const waiting = setInterval(() => {
    if (!document.body.dataset.drawn) return;
    clearInterval(waiting);
    document.body.dataset.numbers = JSON.stringify([...document.querySelectorAll("#pareto .role-mark.mark-text text")]
      .map(text => text.getBoundingClientRect()).map(box => [box.left, box.right, box.top, box.bottom]));
  }, 50);
</script></body></html>"""


@pytest.mark.chromium
def test_numbers_of_the_best_do_not_cover_each_other(page: str, best: list[Choice], tmp_path: Path) -> None:
    document, _ = opened(page.replace("</body>\n</html>", TEXTS), tmp_path)
    found = re.search(r'data-numbers="([^"]+)"', document)
    assert found
    boxes = json.loads(found[1])
    assert len(boxes) == len(best)
    for (left, right, top, bottom), (other_left, other_right, other_top, other_bottom) in combinations(boxes, 2):
        beside = right <= other_left or other_right <= left
        # A line of text has room above and below its figures, which may overlap.
        assert beside or abs((top + bottom) - (other_top + other_bottom)) / 2 >= 11


HOVER = """<script>
  const waiting = setInterval(() => {
    if (!document.body.dataset.drawn) return;
    clearInterval(waiting);
    const point = document.querySelector("#pareto .mark-symbol path");
    const at = point.getBoundingClientRect();
    for (const kind of ["pointerover", "pointermove", "mouseover", "mousemove"]) {
      point.dispatchEvent(new (kind.startsWith("p") ? PointerEvent : MouseEvent)(kind, {
        bubbles: true, clientX: at.x + at.width / 2, clientY: at.y + at.height / 2}));
    }
  }, 50);
</script></body></html>"""


@pytest.mark.chromium
@pytest.mark.parametrize("found", [None], indirect=True)
def test_hovering_tells_what_a_point_is(page: str, tmp_path: Path) -> None:
    document, console = opened(page.replace("</body>\n</html>", HOVER), tmp_path)
    assert console == []
    tooltip = document[document.index('id="vg-tooltip-element"') :]
    for word in ("deployment", "max-num-seqs", "J/token", "TPOT (ms)", "carries the load", "H100-SXM"):
        assert word in tooltip


@pytest.mark.chromium
@pytest.mark.parametrize("found", [None], indirect=True)
def test_a_chart_that_fails_is_told(page: str, tmp_path: Path) -> None:
    broken = page.replace('"mark": "bar"', '"mark": "no such mark"')
    assert broken != page
    document, console = opened(broken, tmp_path)
    assert console != []
    assert "A chart could not be drawn" in document


def test_it_needs_no_network(page: str) -> None:
    outside_libraries = page[: page.index("<script>")] + page[page.index('<script id="charts"') :]
    assert re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", outside_libraries) == []
    assert set(re.findall(r"https?://[^\s\"']+", outside_libraries)) == {
        "https://vega.github.io/schema/vega-lite/v6.json"  # a name
    }
    assert len(page) < 2_000_000
    assert "University of Washington Interactive Data Lab" in page, "the libraries' licence asks for it"


def test_the_data_are_those_of_the_exploration(page: str, found: Exploration) -> None:
    text = page[page.index('type="application/json">') + len('type="application/json">') :]
    charts = json.loads(text[: text.index("</script>")])["specs"]
    assert tuple(charts) == CHARTS
    shown = charts["pareto"]["datasets"]["deployments"]
    assert 100 < len(shown["rows"]) <= MOST_POINTS + 1
    at = {name: i for i, name in enumerate(shown["fields"])}
    assert sum(row[at["front"]] for row in shown["rows"]) == found.front.sum()
    for row in shown["rows"]:
        assert row[at["carries"]] == "no" or row[at["tpot"]] <= 50.05
