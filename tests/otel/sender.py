"""Exports a report in a process of its own and prints what /metrics would show:  sender.py TRACES_ENDPOINT|-"""

from __future__ import annotations

import sys

from prometheus_client import REGISTRY, generate_latest

from energylens_vllm.serving import otlp
from energylens_vllm.serving.exporter import Exporter

endpoint = None if sys.argv[1] == "-" else sys.argv[1]
exporter = Exporter("m", [0, 1])
started = otlp.start(exporter, endpoint)
assert otlp.start(Exporter("m", [0]), endpoint) == started  # a second one in the process sends nothing twice
exporter.set_build_info("0.1.0", "0.32.0")
exporter.export(
    1,
    [
        {
            "add": [("energylens_predicted_energy_joules_total", ("decode",), 2.5)] * 2,
            "set": [("energylens_gpu_power_watts", ("0",), 310.0)],
            "observe": [("energylens_step_energy_joules", (), [0.4, 0.4, 3.0, 1e9])],
        },
        {"add": [("energylens_nonsense_total", (), 1.0)]},  # counted as a failure of the plugin
    ],
)
print("sends" if started else "does not send")
print(generate_latest(REGISTRY).decode())
