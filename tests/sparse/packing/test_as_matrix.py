"""Kernels of any tree and with any axes come back exactly from what they are packed into."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparselora_jax as sl
from sparselora_jax.sparse import packing, rules

AXES = {
    'heads': sl.KernelAxes(layers=(), inputs=(0,), outputs=(1, 2)),
    'joined': sl.KernelAxes(layers=(), inputs=(0, 1), outputs=(2,)),
    'transposed': sl.KernelAxes(layers=(), inputs=(1,), outputs=(0,)),
    'stacked': sl.KernelAxes(layers=(2,), inputs=(1,), outputs=(0,)),
    'experts': sl.KernelAxes(layers=(0, 1), inputs=(2,), outputs=(3,)),
}
ALL_AXES = AXES | {'matrix': sl.KernelAxes.of_stack(2)}
# The shape of the matrix form, and the layout of a kernel, written down by hand.
LAYOUTS = {
    'heads': ((8, 6), lambda matrix: matrix.reshape(8, 2, 3)),
    'joined': ((8, 6), lambda matrix: matrix.reshape(2, 4, 6)),
    'transposed': ((16, 6), lambda matrix: matrix.T),
    'stacked': ((3, 8, 5), lambda matrix: matrix.transpose(2, 1, 0)),
    'experts': ((2, 3, 8, 4), lambda matrix: matrix),
    'matrix': ((8, 6), lambda matrix: matrix),
}


def kernels_and_masks(dtype=jnp.float32):
    """Kernels, and masks that keep two of each four inputs."""
    kernels = {}
    masks = {}
    for index, (name, (shape, layout)) in enumerate(LAYOUTS.items()):
        matrix = jax.random.normal(jax.random.key(index), shape)
        kernels[name] = layout(matrix.astype(dtype))
        masks[name] = layout(sl.mask_from_scores(jnp.abs(matrix), '2:4'))
    return kernels, masks


class Module(eqx.Module):
    heads: jax.Array
    joined: jax.Array
    transposed: jax.Array
    stacked: jax.Array
    experts: jax.Array
    matrix: jax.Array


TREES = {
    'dict': lambda kernels: kernels,
    'nnx': lambda kernels: nnx.State({name: nnx.Param(kernel) for name, kernel in kernels.items()}),
    'equinox': lambda kernels: Module(**kernels),
}


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.mark.parametrize(
    ('tree', 'names', 'dtype', 'form'),
    [
        ('dict', ('transposed',), jnp.float32, 'packed24'),
        pytest.param('dict', LAYOUTS, jnp.float32, 'packed24', marks=pytest.mark.slow),
        pytest.param('nnx', LAYOUTS, jnp.bfloat16, 'packed24', marks=pytest.mark.slow),
        pytest.param('equinox', LAYOUTS, jnp.float32, 'bitmask', marks=pytest.mark.slow),
    ],
)
def test_pack_unpack_and_merge_are_exact(tree, names, dtype, form):
    kernels, masks = ({name: of_all[name] for name in names} for of_all in kernels_and_masks(dtype))
    axes = {name: ALL_AXES[name] for name in names}
    params = TREES[tree](kernels)
    pruned = sl.merge(params, masks)
    packed = sl.pack(pruned, masks, form, axes=axes)
    leaves = rules.paths_of(packed)
    assert {name: leaf.shape for name, leaf in leaves.items()} == {name: leaf.shape for name, leaf in kernels.items()}
    assert all(packing.is_reduced(leaf) for leaf in leaves.values())
    assert sum(leaf.nbytes for leaf in leaves.values()) < 0.8 * sum(leaf.nbytes for leaf in kernels.values())
    equal(sl.unpack(packed), pruned)
    lora = sl.init_lora(jax.random.key(9), params, [('.*', (2, 4))], axes=axes)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)
    merged = sl.merge(packed, None, lora)
    equal(merged, sl.merge(pruned, masks, lora))
    sl.check_sparse(merged, masks)


def test_checks_follow_the_roles_of_axes():
    _, masks = kernels_and_masks()
    rule_list = [('.*', '2:4')]
    sl.check_masks(masks, rule_list, axes=AXES)
    wrong = masks | {'stacked': masks['stacked'].at[0, 0, 2].set(~masks['stacked'][0, 0, 2])}
    with pytest.raises(sl.PatternError, match=r'stacked, layer \[2\]: 1 groups break pattern 2:4'):
        sl.check_masks(wrong, rule_list, axes=AXES)
    with pytest.raises(
        sl.PatternError, match='transposed: pattern 2:4 does not fit: 4 does not divide the input axis of 6'
    ):
        sl.check_masks({'transposed': masks['transposed']}, rule_list)
    halves = {'joined': masks['joined'], 'stacked': masks['stacked']}
    sl.check_masks(halves, [('.*', 0.5)], axes=AXES, zeros={'stacked': np.full(3, 20)})
    assert sl.density(masks) == dict.fromkeys((*masks, 'total'), 0.5)


def test_axes_that_do_not_fit_are_refused():
    kernels, masks = kernels_and_masks()
    for axes, words in (
        ({'other': AXES['heads']}, 'other: its axes are given, but the tree has no such path, e.g. '),
        ({'matrix': AXES['heads']}, r'matrix \[8, 6\]: KernelAxes.* does not give each of its 2 axes one role'),
    ):
        for call in (
            sl.pack,
            lambda params, _, axes: sl.init_lora(jax.random.key(0), params, [('.*', (2, 4))], axes=axes),
        ):
            with pytest.raises(sl.RuleError, match=words):
                call(kernels, masks, axes=axes)


def test_what_linear_cannot_read_and_files_do_not_hold_is_refused(tmp_path):
    kernels, masks = kernels_and_masks()
    lora = sl.init_lora(jax.random.key(0), kernels, [('heads', (2, 4)), ('.*', None)], axes=AXES)
    with pytest.raises(sl.RuleError, match=r'heads \[8, 2, 3\]: linear reads \[inputs, outputs\] only; use sl.merge'):
        sl.bind(kernels, masks, lora)
    packed = sl.pack(kernels, masks, axes=AXES)
    with pytest.raises(sl.RuleError, match='linear reads'):
        sl.bind(packed)
    with pytest.raises(TypeError, match='ReducedMatrix'):
        sl.linear(jnp.ones((1, 8)), packed['heads'])
    with pytest.raises(sl.StorageError, match=r'heads is packed with several axes, for memory only; save sl.unpack'):
        sl.save_safetensors(tmp_path / 'w.safetensors', packed)
    with pytest.raises(sl.RuleError, match=r'heads: LoRA factors .* for a kernel of shape \(8, 2, 3\)'):
        sl.merge(kernels, None, {'heads': sl.Lora(jnp.ones((8, 2)), jnp.ones((2, 6)), 1.0)})
    with pytest.raises(sl.RuleError, match=r'heads: LoRA factors'):  # packed with other roles
        sl.merge(packed, None, {'heads': sl.Lora(jnp.ones((16, 2)), jnp.ones((2, 3)), 1.0, AXES['joined'])})
