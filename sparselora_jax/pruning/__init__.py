"""Pruning methods and allocations, one file each, and the functions that apply them to a model.

A method is a small dataclass of its options that maps (kernel, statistic, pattern) to (kernel, mask). `Method` and
`Allocation` are the interfaces. `METHODS` and `ALLOCATIONS`, filled at the end of this file, hold the names that a
recipe may use.
"""

from sparselora_jax.pruning.admm import ADMM
from sparselora_jax.pruning.allocate import allocate, check_bound, kernel_sizes, uniform_zeros
from sparselora_jax.pruning.allocation import ALLOCATIONS, Allocation, AllocationError, AllocationInputs, Uniform
from sparselora_jax.pruning.das import DAS, das_zeros, diversity_scores
from sparselora_jax.pruning.dsnot import DSnoT
from sparselora_jax.pruning.ecoflap import (
    EcoflapFirst,
    EcoflapZeroth,
    first_order_scores,
    zeroth_order_scores,
)
from sparselora_jax.pruning.global_magnitude import GlobalMagnitude, global_magnitude_zeros
from sparselora_jax.pruning.gptq import GPTQ
from sparselora_jax.pruning.kernels import prune_tree
from sparselora_jax.pruning.magnitude import Magnitude, Random
from sparselora_jax.pruning.method import METHODS, Method, MethodError
from sparselora_jax.pruning.owl import OWL, outlier_shares, owl_zeros
from sparselora_jax.pruning.pruner import SEQUENTIAL, PruneResult, prune
from sparselora_jax.pruning.reconstruct import Reconstruct, ReconstructError
from sparselora_jax.pruning.ria import RIA
from sparselora_jax.pruning.sparsegpt import SparseGPT
from sparselora_jax.pruning.targets import methods_of, patterns_of
from sparselora_jax.pruning.wanda import Wanda

__all__ = [
    'ADMM',
    'ALLOCATIONS',
    'DAS',
    'GPTQ',
    'METHODS',
    'OWL',
    'RIA',
    'SEQUENTIAL',
    'Allocation',
    'AllocationError',
    'AllocationInputs',
    'DSnoT',
    'EcoflapFirst',
    'EcoflapZeroth',
    'GlobalMagnitude',
    'Magnitude',
    'Method',
    'MethodError',
    'PruneResult',
    'Random',
    'Reconstruct',
    'ReconstructError',
    'SparseGPT',
    'Uniform',
    'Wanda',
    'allocate',
    'check_bound',
    'das_zeros',
    'diversity_scores',
    'first_order_scores',
    'global_magnitude_zeros',
    'kernel_sizes',
    'methods_of',
    'outlier_shares',
    'owl_zeros',
    'patterns_of',
    'prune',
    'prune_tree',
    'uniform_zeros',
    'zeroth_order_scores',
]

# GPTQ is not registered: it rounds kernels that are already pruned, and chooses no mask.
METHODS.register('random', Random)
METHODS.register('magnitude', Magnitude)
METHODS.register('wanda', Wanda)
METHODS.register('sparsegpt', SparseGPT)
METHODS.register('dsnot', DSnoT)
METHODS.register('ria', RIA)
METHODS.register('admm', ADMM)

# The first is the default of every recipe.
ALLOCATIONS.register('uniform', Uniform)
ALLOCATIONS.register('global_magnitude', GlobalMagnitude)
ALLOCATIONS.register('owl', OWL)
ALLOCATIONS.register('das', DAS)
ALLOCATIONS.register('ecoflap_first', EcoflapFirst)
ALLOCATIONS.register('ecoflap_zeroth', EcoflapZeroth)
