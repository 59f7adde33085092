"""One file a method: a small dataclass of its knobs that maps (kernel, statistic, pattern) to (kernel, mask)."""

from sparselora_jax.prune.magnitude import Magnitude, Random
from sparselora_jax.prune.sparsegpt import SparseGPT
from sparselora_jax.prune.walker import PruneResult, prune, prune_tree
from sparselora_jax.prune.wanda import Wanda

__all__ = ['Magnitude', 'PruneResult', 'Random', 'SparseGPT', 'Wanda', 'prune', 'prune_tree']
