"""The four dashboards. Together they show every metric that the plugin and routers export."""

from __future__ import annotations

from energylens_vllm.dashboards.accuracy import ACCURACY
from energylens_vllm.dashboards.fleet import FLEET
from energylens_vllm.dashboards.overview import OVERVIEW
from energylens_vllm.dashboards.parallelism import PARALLELISM

DASHBOARDS = (OVERVIEW, ACCURACY, PARALLELISM, FLEET)
