"""SparseLoRA in JAX: prune vision-language models and win their quality back without giving the sparsity up.

Three trees, kept apart: `params` (base weights), `masks` (True = kept), `lora` (low-rank factors). `bind` puts them
together for a model to read, `merge` folds them into plain arrays with exact zeros.
"""

from sparselora_jax.calibrate import CalibrationError, collect, hessian, squares
from sparselora_jax.linear import linear
from sparselora_jax.pruning import Magnitude, PruneResult, Random, SparseGPT, Wanda, prune, prune_tree
from sparselora_jax.restore import Frozen, make_train_step, paper_optimizer
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
from sparselora_jax.storage import StorageError, load_safetensors, save_safetensors
from sparselora_jax.train import State, init_state
from sparselora_jax.weights import Adapted, Lora, LoraSpec, Masked, bind, effective_weight, init_lora, merge

__version__ = '0.1.0'

__all__ = [
    'Adapted',
    'CalibrationError',
    'Frozen',
    'Lora',
    'LoraSpec',
    'Magnitude',
    'Masked',
    'Pattern',
    'PatternError',
    'PruneResult',
    'Random',
    'RuleError',
    'SparseGPT',
    'State',
    'StorageError',
    'Wanda',
    'bind',
    'check_masks',
    'check_sparse',
    'collect',
    'density',
    'effective_weight',
    'hessian',
    'init_lora',
    'init_state',
    'linear',
    'load_safetensors',
    'make_train_step',
    'mask_from_scores',
    'merge',
    'paper_optimizer',
    'parse_pattern',
    'prune',
    'prune_tree',
    'save_safetensors',
    'squares',
]
