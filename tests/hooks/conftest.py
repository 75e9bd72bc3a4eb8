"""Modules that the tests here share with scripts that run in other processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
