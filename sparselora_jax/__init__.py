"""SparseLoRA in JAX: prune vision-language models and win their quality back without giving the sparsity up.

Three trees, kept apart: `params` (base weights), `masks` (True = kept), `lora` (low-rank factors). `bind` puts them
together for a model to read, `merge` folds them into plain arrays with exact zeros.
"""

from sparselora_jax.linear import linear
from sparselora_jax.rules import RuleError
from sparselora_jax.sparsity import (
    Pattern,
    PatternError,
    check_masks,
    check_sparse,
    density,
    mask_from_scores,
    parse_pattern,
)
from sparselora_jax.weights import Adapted, Lora, LoraSpec, Masked, bind, effective_weight, init_lora, merge

__version__ = '0.1.0'

__all__ = [
    'Adapted',
    'Lora',
    'LoraSpec',
    'Masked',
    'Pattern',
    'PatternError',
    'RuleError',
    'bind',
    'check_masks',
    'check_sparse',
    'density',
    'effective_weight',
    'init_lora',
    'linear',
    'mask_from_scores',
    'merge',
    'parse_pattern',
]
