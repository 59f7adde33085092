"""Guard an optimizer against bad steps: skip them, or let the run stop.

A step is bad if its loss or its gradient is not finite, or if its loss spikes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

POLICIES = ('stop', 'skip')
PATIENCE = 10  # maximum number of consecutive bad steps to skip; with more, the cause is not temporary
_SETTLED = 10  # good steps before a loss can count as a spike: the first losses fall fast
_MEMORY = 50  # good steps over which the mean loss is taken


class GuardState(NamedTuple):
    """State of `skip_bad_steps`.

    Attributes:
      inner: state of the guarded optimizer after the good steps only.
      typical: running mean of the losses of good steps.
      good: number of good steps.
      skipped: number of bad steps since the last good one.
    """

    inner: PyTree
    typical: Float[Array, '']
    good: Int[Array, '']
    skipped: Int[Array, '']


def skip_bad_steps(
    inner: optax.GradientTransformation, *, spike: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that bad steps change neither weights nor moments.

    Good steps are those of `inner`, bit for bit.

    Args:
      inner: the optimizer.
      spike: a loss above `spike` times the running mean of good losses is bad, once ten good steps are done. None: only
        a loss or a gradient that is not finite is bad.

    Returns:
      An optimizer whose `update` needs the loss as `value`.
    """
    return optax.GradientTransformationExtraArgs(_init_of(inner), _update_of(inner, spike))


def _init_of(inner: optax.GradientTransformation) -> Callable[[PyTree], GuardState]:
    """Return the function that creates the state before the first step."""

    def init(params):
        # Each counter is a separate array: a step donates the state, and no buffer can be donated twice.
        return GuardState(
            inner=inner.init(params),
            typical=jnp.zeros((), jnp.float32),
            good=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
        )

    return init


def _update_of(inner: optax.GradientTransformation, spike: float | None) -> Callable[..., tuple[PyTree, GuardState]]:
    """Return the function that computes an update, or zeros at a bad step."""

    def update(updates, state, params=None, *, value, **extra):
        del extra
        is_good = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(updates))
        if spike is not None:
            is_good &= (state.good < _SETTLED) | (value <= spike * state.typical)
        # `where` rather than `lax.cond`: both sides are computed, so the step stays one fused program. So a good step
        # is bit-identical to one without a guard.
        stepped, after = inner.update(updates, state.inner, params)
        good = jnp.where(is_good, state.good + 1, state.good)
        # The first losses weigh 1, 1/2, 1/3, ...: the plain mean, until the memory is full.
        share = 1 / jnp.clip(good, 1, _MEMORY).astype(jnp.float32)
        typical = jnp.where(is_good, state.typical + share * (value - state.typical), state.typical)
        skipped_now = jnp.where(is_good, 0, state.skipped + 1)
        after = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), after, state.inner)
        # Not `0 * leaf`: a NaN times zero is NaN.
        stepped = jax.tree.map(lambda leaf: jnp.where(is_good, leaf, jnp.zeros_like(leaf)), stepped)
        return stepped, GuardState(after, typical, good, skipped_now)

    return update


def skipped(optimizer: PyTree) -> Int[Array, ''] | None:
    """Return the number of bad steps since the last good one, or None for an optimizer without a guard.

    Args:
      optimizer: state of an optimizer.
    """
    return optimizer.skipped if isinstance(optimizer, GuardState) else None
