"""Trace a model's forward on shapes, to see what runs through each stack of blocks; nothing is computed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from sparselora_jax.models.model import abstract_model
from sparselora_jax.pruning.tracing.products import Product
from sparselora_jax.pruning.tracing.program import trace
from sparselora_jax.sparse import rules

# An array, or a shape in its place.
Shape = jax.ShapeDtypeStruct | Array


@runtime_checkable
class ModelConfig(Protocol):
    """Config of a model of any family; it also has `vision` and `qformer` if the model has such towers."""

    language: Any


def nbytes(tree: PyTree) -> int:
    """Return the bytes of a tree of arrays or of their shapes.

    Args:
      tree: leaves have a shape and a dtype. Two four-bit numbers share a byte, as on a device; an odd number of them is
        rounded down.

    >>> nbytes({'a': jax.ShapeDtypeStruct((2, 3), jnp.float32), 'b': jax.ShapeDtypeStruct((4,), jnp.int4)})
    26
    """

    def of_leaf(leaf: Any) -> int:
        dtype = jnp.dtype(leaf.dtype)
        # NumPy's itemsize of a four-bit type is a whole byte.
        numbers_per_item = 2 if dtype in (jnp.int4, jnp.uint4) else 1
        return math.prod(leaf.shape) * dtype.itemsize // numbers_per_item

    return sum(of_leaf(leaf) for leaf in jax.tree.leaves(tree))


class Stack(NamedTuple):
    """Shapes of one batch in a stack of blocks.

    Attributes:
      tower: path of the stack: `vision`, `language`, `language/encoder`.
      block: see `models.runners`.
      depth: number of blocks.
      weights: shapes of one block's weights.
      x: shape of the hidden states between two blocks.
      ctx: shapes of what a block only reads.
      inputs: input of each kernel of a block, by the kernel's name in the block.
      leaders: for each kernel of a block, the first kernel that reads the same array (q for k and v).
      outputs: bytes of the outputs of all linears of one block.
      widest: bytes of the largest array within a block.
    """

    tower: str
    block: Callable
    depth: int
    weights: dict
    x: jax.ShapeDtypeStruct
    ctx: dict
    inputs: dict[str, jax.ShapeDtypeStruct]
    leaders: dict[str, str]
    outputs: int
    widest: int

    @property
    def hidden(self) -> int:
        """Return the bytes of the hidden states between two blocks."""
        return nbytes(self.x)


def batch_of(cfg: Any, text: Any, size: int) -> dict:
    """Return the shapes of a training batch.

    Args:
      cfg: our config of the model.
      size: number of rows.
      text: has `prompt_tokens` and `answer_tokens`; the answer follows the prompt, as in the processors.
    """
    return cfg.family.batch_like(cfg, size, prompt_tokens=text.prompt_tokens, answer_tokens=text.answer_tokens)


def stacks(cfg: ModelConfig, params: dict, batch: dict) -> list[Stack]:
    """Trace a batch through the model, and return the stacks of blocks in the order in which it passes them.

    Args:
      cfg: our config of the model.
      params: shapes of the params.
      batch: shapes of a batch; see `batch_of`.
    """
    traced: list[Stack] = []

    # A runner (`models.runners`) that traces one block of each stack and returns the hidden states unchanged, since no
    # block changes their shape.
    def run(tower, block, weights, x, ctx, cache=None):
        traced.append(_trace_stack(tower, block, weights, x, ctx))
        return x, cache

    model = abstract_model(cfg)
    jax.eval_shape(lambda params, batch: model.hidden(params, batch, run), params, batch)
    return traced


def _trace_stack(tower: str, block: Callable, stacked: dict, x: Array, ctx: dict) -> Stack:
    """Trace one block of a stack.

    Args:
      tower: path of the stack.
      block: see `models.runners`.
      stacked: weights `[layers, ...]`.
      x: hidden states between blocks.
      ctx: what a block only reads.
    """
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)
    # The arguments are tracers of the whole model's trace; a trace of one block starts from their shapes.
    x_shape, ctx_shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, ctx))
    kernels = rules.kernels(weights)
    program = trace(lambda w, inputs: block(w, *inputs, None)[0], weights, (x_shape, ctx_shapes), kernels.__contains__)
    read: dict[str, Product] = {}

    def run(weights, inputs):
        # If a kernel is used twice (a tied one), its first input counts.
        program.run(weights, inputs, lambda product, sums: read.setdefault(product.path, product))

    jax.eval_shape(run, weights, (x_shape, ctx_shapes))
    sizes = [nbytes(output.aval) for equation in program.jaxpr.eqns for output in equation.outvars]
    # Kernels that read the same array share a statistic.
    first: dict[tuple, str] = {}
    leaders = {name: first.setdefault(product.share_key(), name) for name, product in read.items()}
    inputs = {name: jax.ShapeDtypeStruct(product.x.shape, product.x.dtype) for name, product in read.items()}
    # [..., inputs] @ [inputs, outputs], in the dtype of the input.
    outputs = sum(nbytes(array) // array.shape[-1] * kernels[name].shape[-1] for name, array in inputs.items())
    return Stack(
        tower=tower,
        block=block,
        depth=jax.tree.leaves(stacked)[0].shape[0],
        weights=weights,
        x=x_shape,
        ctx=ctx_shapes,
        inputs=inputs,
        leaders=leaders,
        outputs=outputs,
        widest=max(sizes),
    )
