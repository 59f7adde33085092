"""What a method does wrong is named with its path and layer: no mask, kernel or number is taken on trust."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.pruning import calibrate
from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse.masks import mask_from_scores

KERNEL = jax.random.normal(jax.random.key(0), (8, 4))
ONE = jnp.ones((), jnp.int32)


def method_that(call, **members):
    """A method whose result is `call(pruned, mask, kernel)` of what Wanda returns."""

    def __call__(self, kernel, statistic, pattern, num_zeros=None):  # noqa: N807
        pruned, mask = pruning.Wanda(self.group)(kernel, statistic, pattern, num_zeros)
        return call(pruned, mask, kernel)

    said = {'edits_kept_weights': False, 'outputs_are_independent': True} | members
    kind = type('Own', (pruning.Wanda,), {'__call__': __call__, '__annotations__': {}} | said)
    return dataclass(frozen=True)(kind)()


def prune_one(method, pattern='2:4', kernel=KERNEL, statistic=None):
    *layers, inputs, _outputs = kernel.shape
    path = 'blocks/q/kernel' if layers else 'q/kernel'
    params = {'q': {'kernel': kernel}}
    statistic = jnp.ones((*layers, inputs)) if statistic is None else statistic
    return pruning.prune_tree(
        {'blocks': params} if layers else params,
        {path: calibrate.InputStatistic(statistic, ONE)},
        [('.*', pattern)],
        method=method,
    )


WRONG = {
    'one array': (lambda pruned, mask, kernel: pruned, r'returned a \w*Tracer: expected \(kernel, mask\)'),
    'three': (lambda pruned, mask, kernel: (pruned, mask, 1), r'returned a tuple of 3: expected \(kernel, mask\)'),
    'nothing': (lambda pruned, mask, kernel: None, 'returned a NoneType: expected'),
    'transposed': (lambda pruned, mask, kernel: (pruned.T, mask.T), r'returned float32 \[4, 8\] and bool \[4, 8\]'),
    'swapped': (lambda pruned, mask, kernel: (mask, pruned), r'returned bool \[8, 4\] and float32 \[8, 4\]'),
    'numbers as mask': (
        lambda pruned, mask, kernel: (pruned, mask.astype(jnp.float32)),
        r'and float32 \[8, 4\]: expected \(kernel, mask\): float32 and bool, both of shape \[8, 4\]',
    ),
    'another dtype': (lambda pruned, mask, kernel: (pruned.astype(jnp.float16), mask), 'returned float16'),
    'raises': (lambda pruned, mask, kernel: pruned.no_such_thing, 'pruning method Own fails: AttributeError: '),
    'asks for values': (
        lambda pruned, mask, kernel: (pruned, mask) if pruned[0, 0] > 0 else None,
        'pruning method Own fails: TracerBoolConversionError: ',
    ),
    'all kept': (
        lambda pruned, mask, kernel: (kernel, jnp.ones_like(mask)),
        r'Own returned a mask with \d+ groups that have another number of zeros than',
    ),
    'all pruned': (
        lambda pruned, mask, kernel: (jnp.zeros_like(kernel), jnp.zeros_like(mask)),
        r'Own returned a mask with \d+ groups that have another number of zeros than',
    ),
    'zeros not set': (
        lambda pruned, mask, kernel: (kernel, mask),
        'Own returned 16 weights that are not zero where its mask is False',
    ),
    'NaN': (lambda pruned, mask, kernel: (pruned * jnp.nan, mask), r'pruned weights are not finite \(Own\)'),
}


@pytest.mark.parametrize('pattern', ['2:4', '0.5'])
@pytest.mark.parametrize('name', WRONG)
def test_what_a_method_returns_wrongly_is_named(name, pattern):
    call, message = WRONG[name]
    with pytest.raises(SparseloraError, match=f'^q/kernel: .*{message}'):
        prune_one(method_that(call), pattern)


@pytest.mark.parametrize('name', ['zeros not set', 'NaN', 'all kept'])
def test_a_method_that_edits_is_checked_too(name):
    call, message = WRONG[name]
    with pytest.raises(SparseloraError, match=f'^q/kernel: {message}'):
        prune_one(method_that(call, edits_kept_weights=True))


def test_a_method_that_chooses_no_mask_may_add_zeros_and_lose_none():
    pruned = jnp.where(jnp.tile(jnp.array([True, False, True, False]), 2)[:, None], KERNEL, 0)
    fewer = pruned.at[0].set(0)
    keeps = method_that(lambda _, mask, kernel: (kernel, kernel != 0), chooses_mask=False)
    for kernel in (pruned, fewer):
        np.testing.assert_array_equal(prune_one(keeps, kernel=kernel)[1]['q']['kernel'], kernel != 0)
    with pytest.raises(pruning.MethodError, match=r'Own returned a mask with \d+ groups that have fewer zeros'):
        prune_one(keeps)
    leaves = method_that(lambda _, mask, kernel: (KERNEL, kernel != 0), chooses_mask=False, edits_kept_weights=True)
    with pytest.raises(pruning.MethodError, match='16 weights that are not zero where its mask is False'):
        prune_one(leaves, kernel=pruned)


def test_a_method_may_return_arrays_of_numpy():
    mask = np.tile(np.array([True, False, True, False]), 2)[:, None].repeat(4, 1)
    params, masks = prune_one(method_that(lambda pruned, _, kernel: (jnp.where(mask, kernel, 0), mask)))
    np.testing.assert_array_equal(masks['q']['kernel'], mask)
    assert isinstance(params['q']['kernel'], jax.Array)


@pytest.mark.parametrize('method', [pruning.Wanda(), pruning.SparseGPT(), pruning.DSnoT(), pruning.ADMM()])
@pytest.mark.parametrize('value', [jnp.nan, jnp.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_layer(method, value):
    kernel = jnp.stack([KERNEL, KERNEL.at[3, 2].set(value)])
    stat = calibrate.statistic_shapes(method.statistic, 8)
    statistic = jax.tree.map(lambda leaf: jnp.stack([jnp.eye(8) if leaf.ndim == 2 else jnp.ones(8)] * 2), stat)
    with pytest.raises(calibrate.CalibrationError, match=r'^blocks/q/kernel, layer 1: NaN or infinite weight before'):
        prune_one(method, kernel=kernel, statistic=statistic)


@pytest.mark.parametrize('method', [pruning.Wanda(), pruning.RIA()])
def test_a_statistic_that_is_not_finite_is_named(method):
    with pytest.raises(calibrate.CalibrationError, match=r'^q/kernel: NaN or infinite statistic; calibrate again'):
        prune_one(method, statistic=jnp.ones(8).at[1].set(jnp.nan))


@dataclass(frozen=True)
class IgnoresNumZeros(pruning.Method):
    """Zeros of the pattern, where an allocation asks for others."""

    group: str = 'output'
    statistic: ClassVar[None] = None
    edits_kept_weights: ClassVar[bool] = False
    outputs_are_independent: ClassVar[bool] = False

    def __call__(self, kernel, statistic, pattern, num_zeros=None):
        mask = mask_from_scores(jnp.abs(kernel), pattern, group=self.group)
        return jnp.where(mask, kernel, 0), mask


@pytest.mark.parametrize('group', ['output', 'matrix'])
def test_zeros_that_a_method_ignores_are_an_error(group):
    zeros = {'q/kernel': np.array(12)}
    params = {'q': {'kernel': KERNEL}}
    masks = pruning.prune_tree(params, None, [('.*', 0.5)], method=pruning.Magnitude(group), zeros=zeros)[1]
    assert int((~masks['q']['kernel']).sum()) == 12
    with pytest.raises(pruning.MethodError, match=r'another number of zeros than num_zeros says'):
        pruning.prune_tree(params, None, [('.*', 0.5)], method=IgnoresNumZeros(group), zeros=zeros)
