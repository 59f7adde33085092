"""A model's forward traced on shapes: what runs through each stack of blocks, with nothing computed or allocated."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparselora_jax.models.model import abstract_model
from sparselora_jax.sparse import rules as rules_lib


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or of their shapes; two numbers of four bits are one, as devices hold them."""

    def of(leaf):
        dtype = jnp.dtype(leaf.dtype)
        return math.prod(leaf.shape) * dtype.itemsize // (2 if dtype in (jnp.int4, jnp.uint4) else 1)

    return sum(map(of, jax.tree.leaves(tree)))


class Stack(NamedTuple):
    """A tower's blocks as one batch runs through them, by shapes."""

    tower: str
    block: Callable  # of `models.runners`
    depth: int
    weights: dict  # of one block
    x: Any  # hidden states between blocks
    ctx: dict
    inputs: dict[str, Any]  # what each kernel of a block reads
    leaders: dict[str, str]  # each kernel's first that reads the same array
    outputs: int  # bytes that the linears of one block put out
    widest: int  # bytes of the largest array within a block

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states between two blocks."""
        return nbytes(self.x)


class _Seen:
    """A kernel that notes what it is multiplied with."""

    def __init__(self, kernel: Any, note: Callable[[Any], None]):
        self.kernel, self.note = kernel, note

    def observe(self, x: Any) -> Any:
        self.note(x)
        return self.kernel


def batch_of(cfg: Any, text: Any, size: int) -> dict:
    """The shapes of a training batch.

    Args:
      text: has `prompt_tokens` and `answer_tokens`; as the processors lay them out, the prompt and then the answer.
    """
    return cfg.family.batch_like(cfg, size, prompt_tokens=text.prompt_tokens, answer_tokens=text.answer_tokens)


def stacks(cfg: Any, params: dict, batch: dict) -> list[Stack]:
    """The model's runs of blocks in order, as a batch goes through them; traced, nothing is computed."""
    model, found = abstract_model(cfg), []

    def run(tower, block, weights, x, ctx, cache=None):
        seen: dict[str, Any] = {}

        def watched(w, x, ctx):
            flat = rules_lib.flatten(w)
            for name in rules_lib.kernels(w):
                flat[name] = _Seen(flat[name], lambda x, name=name: seen.setdefault(name, x))
            return block(rules_lib.unflatten(flat), x, ctx, None)[0]

        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), weights)
        x_shape, ctx_shape = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, ctx))
        program = jax.make_jaxpr(watched)(one, x_shape, ctx_shape)
        inside = [nbytes(out.aval) for equation in program.eqns for out in equation.outvars]
        first: dict[int, str] = {}
        leaders = {name: first.setdefault(id(read), name) for name, read in seen.items()}
        inputs = {name: jax.ShapeDtypeStruct(read.shape, read.dtype) for name, read in seen.items()}
        kernels = rules_lib.kernels(one)
        outputs = sum(nbytes(read) // read.shape[-1] * kernels[name].shape[-1] for name, read in inputs.items())
        depth = jax.tree.leaves(weights)[0].shape[0]
        found.append(Stack(tower, block, depth, one, x_shape, ctx_shape, inputs, leaders, outputs, max(inside)))
        return x, cache

    jax.eval_shape(lambda params, batch: model.hidden(params, batch, run), params, batch)
    return found
