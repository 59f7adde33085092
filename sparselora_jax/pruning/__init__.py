"""One file a method: a small dataclass of its knobs that maps (kernel, statistic, pattern) to (kernel, mask)."""

from sparselora_jax.pruning.dsnot import DSnoT
from sparselora_jax.pruning.magnitude import Magnitude, Random
from sparselora_jax.pruning.sparsegpt import SparseGPT
from sparselora_jax.pruning.walker import PruneResult, patterns_of, prune, prune_tree
from sparselora_jax.pruning.wanda import Wanda

__all__ = ['DSnoT', 'Magnitude', 'PruneResult', 'Random', 'SparseGPT', 'Wanda', 'patterns_of', 'prune', 'prune_tree']
