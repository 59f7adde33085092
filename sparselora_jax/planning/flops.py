"""Count the FLOPs of a program's matmuls from its trace: exact for any model and step, without computing anything.

XLA's own `cost_analysis()` counts the body of a loop once; here the body of a scan counts once per iteration.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn
from jax.interpreters import partial_eval
from ml_collections import ConfigDict

from sparselora_jax.data.text_format import TextFormat
from sparselora_jax.models.model import abstract_model
from sparselora_jax.planning.memory import Recipe
from sparselora_jax.planning.programs import restore_step
from sparselora_jax.planning.tracing import ModelConfig, batch_of, stacks
from sparselora_jax.sparse import rules


def matmul_flops(function: Callable, *args: Any) -> int:
    """Count the FLOPs of all matmuls in `function(*args)`: a product `[m, k] @ [k, n]` has 2mkn.

    Norms, softmax and similar operations are not counted. Nor are products that no result depends on, which every
    compiler removes.

    Args:
      function: can be traced by JAX.
      args: arguments of the function, arrays or their shapes.

    Raises:
      ValueError: a matmul is in a loop whose number of iterations the trace does not know.

    >>> x, w = jnp.ones((2, 3)), jnp.ones((5, 3, 3))
    >>> matmul_flops(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, w)
    180
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # Dead code elimination, as compilers do it.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    """Count the FLOPs of one equation, and of the programs within it."""
    name = equation.primitive.name
    params = equation.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        left = equation.invars[0].aval.shape
        result = equation.outvars[0].aval.shape
        return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
    inside = [_count(jaxpr) for jaxpr in _inside(params)]
    # A while loop without matmuls (a search, a sort) does not matter.
    if name == 'while' and any(inside):
        raise ValueError('a matmul in a while loop: the trace does not know how often it runs')
    if name == 'cond':
        # Only one branch runs: count the most expensive one.
        return max(inside, default=0)
    if name == 'shard_map':
        # The inner program is that of one device; every device along the mapped axes does the same work.
        devices = math.prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes'])
        return devices * sum(inside)
    rounds = params.get('length', 1) if name == 'scan' else 1
    return rounds * sum(inside)


def _inside(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """Yield the programs among an equation's parameters: bodies of loops, branches, jitted functions."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            # A ClosedJaxpr holds its program as `jaxpr`.
            jaxpr = getattr(part, 'jaxpr', part)
            if hasattr(jaxpr, 'eqns'):
                yield jaxpr


def train_step(trees: Recipe) -> int:
    """Count the FLOPs of one restoration step, including the teacher and everything that is recomputed.

    Args:
      trees: trees of the recipe.
    """
    step, arguments = restore_step(trees)
    return matmul_flops(step, *arguments)


def answer(
    cfg: ModelConfig, text: TextFormat | ConfigDict, params: dict, density: Mapping[str, Sequence[float]]
) -> tuple[int, int]:
    """Count the dense and the sparse FLOPs of one forward over a question and its answer.

    The sparse figure is nominal: each pruned kernel counts at its density, as if the device skipped every zero. Real
    devices may not do so.

    Args:
      cfg: our config of the model.
      text: has `prompt_tokens` and `answer_tokens`.
      params: shapes of the params.
      density: share of weights kept in each layer of a kernel, by path; kernels not listed are dense.

    Returns:
      (dense, sparse).
    """
    batch = batch_of(cfg, text, 1)
    dense = matmul_flops(abstract_model(cfg).answer_logits, params, batch)
    kernels = rules.kernels(params)
    skipped = 0.0
    for stack in stacks(cfg, params, batch):
        for name, array in stack.inputs.items():
            path = rules.block_path(stack.tower, name)
            # [..., inputs] @ [inputs, outputs]
            layer = 2 * math.prod(array.shape) * kernels[path].shape[-1]
            skipped += sum(layer * (1 - share) for share in density.get(path, ()))
    return dense, dense - round(skipped)
