from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "explore.py"


def test_more_requests_share_the_energy() -> None:
    printed = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120, check=True).stdout
    energies = [float(value) for value in re.findall(r"([\d.]+) J/token", printed)]
    assert len(energies) == 6
    assert all(full < few for full, few in zip(energies[::2], energies[1::2], strict=True))
