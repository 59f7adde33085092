"""One file a method: a small dataclass of its knobs that maps (kernel, statistic, pattern) to (kernel, mask).

`uniform_zeros`, `allocate` and what makes its scores say how many zeros each layer gets.
"""

from sparselora_jax.pruning.allocate import allocate, check_bound, kernel_sizes, uniform_zeros
from sparselora_jax.pruning.dsnot import DSnoT
from sparselora_jax.pruning.ecoflap import first_order_scores, zeroth_order_scores
from sparselora_jax.pruning.global_magnitude import global_magnitude_zeros
from sparselora_jax.pruning.gptq import GPTQ
from sparselora_jax.pruning.magnitude import Magnitude, Random
from sparselora_jax.pruning.owl import outlier_shares, owl_zeros
from sparselora_jax.pruning.pruner import PruneResult, prune, prune_tree
from sparselora_jax.pruning.sparsegpt import SparseGPT
from sparselora_jax.pruning.targets import patterns_of
from sparselora_jax.pruning.wanda import Wanda

__all__ = [
    'GPTQ',
    'DSnoT',
    'Magnitude',
    'PruneResult',
    'Random',
    'SparseGPT',
    'Wanda',
    'allocate',
    'check_bound',
    'first_order_scores',
    'global_magnitude_zeros',
    'kernel_sizes',
    'outlier_shares',
    'owl_zeros',
    'patterns_of',
    'prune',
    'prune_tree',
    'uniform_zeros',
    'zeroth_order_scores',
]
