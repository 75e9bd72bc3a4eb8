"""Which GPU serves chat with least energy: explore from Python instead of the command line.

    python examples/explore.py [MODEL]

Prints, for each kind of GPU, the deployment that takes least energy a token at 50 ms a token, and how far that changes
when 5 requests a second arrive instead of as many as can.
"""

from __future__ import annotations

import sys

from energylens_vllm.explore import Load, Space, explore

MODEL = sys.argv[1] if len(sys.argv) > 1 else "llama-3.1-8b"

for gpu in ("A100-SXM-80GB", "H100-SXM", "H200-SXM"):
    space = Space(gpus=(gpu,), max_gpus=4, quantization=(None,), kv_cache_dtype=("auto",))
    for rate in (None, 5.0):
        found = explore(MODEL, Load(prompt_tokens=700, output_tokens=250, tpot_s=0.05, rate_per_s=rate), space)
        best = found.best(1)[0]
        table = found.deployments
        load = "always full" if rate is None else f"{rate:g} requests a second"
        print(
            f"{load:21} {found.engines[table.engine[best]].title:25} "
            f"{table.running[best]:4.0f} running  {table.token_j[best]:.3f} J/token  {table.tpot_s[best] * 1e3:.0f} ms"
        )
