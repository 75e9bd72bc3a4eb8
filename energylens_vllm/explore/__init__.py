"""Explore deployments: enumerate what vLLM would run, predict all of it, keep what a load allows.

See docs/explore.md.
"""

from energylens_vllm.explore.deployments import Deployments
from energylens_vllm.explore.search import Exploration, explore
from energylens_vllm.explore.space import Load, Space

__all__ = ["Deployments", "Exploration", "Load", "Space", "explore"]
