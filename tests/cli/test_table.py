from __future__ import annotations

import math

import pytest

from energylens_vllm.cli.table import percent, quantity, table


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 J"), (0.0123, "12.3 mJ"), (-0.0123, "-12.3 mJ"), (999.4, "999 J"), (999.9, "1 kJ"), (1.5e9, "1.5 GJ"),
     (1.07e15, "1.07 PJ"),
     (2e-9, "2 nJ"), (math.nan, "-")],
)  # fmt: skip
def test_quantity(value: float, text: str) -> None:
    assert quantity(value, "J") == text


def test_percent() -> None:
    assert (percent(0.0314), percent(0.0314, signed=True), percent(math.nan)) == ("3.1%", "+3.1%", "-")


def test_columns_are_aligned() -> None:
    assert table(["name", "J"], [["a", "1"], ["long name", "100"]]) == "name         J\na            1\nlong name  100"
