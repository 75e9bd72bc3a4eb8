"""Energy-aware routing: `rank` replicas for a request, `advise_power`, and a simulator of policies on traces."""

from energylens_vllm.routing.policy import Config, Ranking, Request, Snapshot, Snapshots, Verdict, rank
from energylens_vllm.routing.power import Forecast, PowerAdvice, ReplicaPower, advise_power
from energylens_vllm.routing.table import StepTable

__all__ = [
    "Config",
    "Forecast",
    "PowerAdvice",
    "Ranking",
    "ReplicaPower",
    "Request",
    "Snapshot",
    "Snapshots",
    "StepTable",
    "Verdict",
    "advise_power",
    "rank",
]
