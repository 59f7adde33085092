"""FLOPs of a program's matmuls, counted from its trace: exact for any model and step, nothing is computed.

XLA's own `cost_analysis()` counts the body of a loop once; here a scan counts as often as it runs.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.interpreters import partial_eval

from sparselora_jax.models.model import abstract_model
from sparselora_jax.planning.memory import Recipe
from sparselora_jax.planning.programs import restore_step
from sparselora_jax.planning.tracing import batch_of, stacks
from sparselora_jax.sparse import rules as rules_lib


def matmul_flops(function: Callable, *args: Any) -> int:
    """FLOPs of all matmuls in `function(*args)`: a product `[m, k] @ [k, n]` is 2mkn. Norms, softmax etc. are left out.

    So are products that no result depends on, which no compiler leaves in.

    Args:
      args: arrays or their shapes.

    Raises:
      ValueError: a matmul in a loop whose number of rounds the trace does not know.

    >>> x, w = jnp.ones((2, 3)), jnp.ones((5, 3, 3))
    >>> matmul_flops(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, w)
    180
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


def _count(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    inside = [_count(jaxpr) for jaxpr in _inside(params)]
    if name == 'while' and any(inside):
        raise ValueError('a matmul in a while loop: the trace does not know how often it runs')
    if name == 'cond':
        return max(inside, default=0)
    if name == 'shard_map':  # what one device does
        return math.prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes']) * sum(inside)
    return params.get('length', 1) * sum(inside) if name == 'scan' else sum(inside)


def _inside(params: dict) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, 'jaxpr', part)
            if hasattr(part, 'eqns'):
                yield part


def train_step(made: Recipe) -> int:
    """FLOPs of one restoration step as a recipe asks for it, the teacher and what is computed twice included."""
    step, arguments = restore_step(made)
    return matmul_flops(step, *arguments)


def answer(cfg: Any, text: Any, params: dict, density: dict[str, list[float]]) -> tuple[int, int]:
    """(dense, sparse) FLOPs of one forward over a question and its answer.

    Sparse is nominal: each pruned kernel counts at its density, as on a device that skips every zero. Whether a device
    does so is another question.

    Args:
      text: has `prompt_tokens` and `answer_tokens`.
      params: shapes.
      density: path of a kernel -> share of weights kept in each layer; kernels that are not named are dense.
    """
    model, batch = abstract_model(cfg), batch_of(cfg, text, 1)
    dense, skipped = matmul_flops(model.answer_logits, params, batch), 0.0
    kernels = rules_lib.kernels(params)
    for stack in stacks(cfg, params, batch):
        for name, read in stack.inputs.items():
            path = f'{stack.tower}/blocks/{name}'
            layer = 2 * math.prod(read.shape) * kernels[path].shape[-1]
            skipped += sum(layer * (1 - kept) for kept in density.get(path, ()))
    return dense, dense - round(skipped)
