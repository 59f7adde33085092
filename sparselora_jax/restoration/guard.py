"""What to do about a step whose loss or gradient is not finite, or whose loss spikes: leave it out, or stop."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

POLICIES = ('stop', 'skip')
PATIENCE = 10  # bad steps in a row that are left out; with more of them something is wrong that does not pass
_SETTLED = 10  # good steps before a loss can be called a spike
_MEMORY = 50  # good steps that the mean loss remembers


class GuardState(NamedTuple):
    """Of `skip_bad_steps`.

    Attributes:
      inner: of the optimizer that is guarded, after good steps only.
      typical: running mean of the loss of good steps.
      good: how many there were.
      skipped: bad ones since the last of them.
    """

    inner: Any
    typical: Float[Array, '']
    good: Int[Array, '']
    skipped: Int[Array, '']


def skip_bad_steps(
    inner: optax.GradientTransformation, *, spike: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that leaves weights and moments as they were at bad steps; good ones are the same, bit for bit.

    Bad is a loss or a gradient that is not finite, or, once ten good steps are done, a loss above `spike` times the
    running mean of good ones. `update` must be given the loss, as `value`.
    """

    def init(params):
        counters = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two buffers: a donated one cannot be both
        return GuardState(inner.init(params), jnp.zeros((), jnp.float32), *counters)

    def update(updates, state, params=None, *, value, **extra):
        del extra
        good = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(updates))
        if spike is not None:
            good &= (state.good < _SETTLED) | (value <= spike * state.typical)
        stepped, after = inner.update(updates, state.inner, params)
        count = jnp.where(good, state.good + 1, state.good)
        share = 1 / jnp.clip(count, 1, _MEMORY).astype(jnp.float32)
        typical = jnp.where(good, state.typical + share * (value - state.typical), state.typical)
        skipped = jnp.where(good, 0, state.skipped + 1)
        after = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state.inner)
        stepped = jax.tree.map(lambda leaf: jnp.where(good, leaf, jnp.zeros_like(leaf)), stepped)
        return stepped, GuardState(after, typical, count, skipped)

    return optax.GradientTransformationExtraArgs(init, update)


def skipped(optimizer: Any) -> Int[Array, ''] | None:
    """Bad steps since the last good one, by the state of an optimizer; None: it has no guard."""
    return optimizer.skipped if isinstance(optimizer, GuardState) else None
