"""A base made a layer at a time, of pruned kernels in files, is the one made at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.checkpoints import on_disk, trees
from sparselora_jax.restoration import restore
from sparselora_jax.sparse import packing, rules

SLOW = [pytest.param(base, marks=pytest.mark.slow) for base in ('int4', 'packed24', 'bitmask')]


def write(file, tree):
    """As pruning leaves it: layer by layer."""
    flat = rules.flatten(tree)
    with trees.layer_writer(file, flat) as write_layer:
        for path, leaf in flat.items():
            for layer, array in enumerate(leaf):
                write_layer(path, layer, array)
    return file


@pytest.fixture
def pruned(tmp_path):
    """(params, masks, the same from files): kernel `a` was changed, and then once more; `b` was not; `c` is dense."""
    shapes = {'a': (3, 16, 8), 'b': (2, 24, 4), 'c': (2, 8, 8)}
    dense = {name: {'kernel': jax.random.normal(jax.random.key(len(name)), shape)} for name, shape in shapes.items()}
    first, last = ({'a': {'kernel': factor * dense['a']['kernel']}} for factor in (2, 3))
    # Layers of `b` keep different numbers of weights, and one keeps a weight that is zero.
    dense['b']['kernel'] = dense['b']['kernel'].at[0, 5, 1].set(0.0)
    masks = {name: sl.mask_from_scores(jnp.abs(dense[name]['kernel']), '2:4') for name in ('a', 'b')}
    masks['b'] = masks['b'].at[1, :4].set(False).at[0, 4:8, 1].set(jnp.array([True, True, False, False]))
    masks = {name: {'kernel': mask} for name, mask in masks.items()}
    files = [write(tmp_path / name, tree) for name, tree in (('m', masks), ('k', first), ('r', last))]
    found = on_disk.pruned_on_disk(dense, *files, tmp_path / 'missing')
    return rules.with_leaves(dense, rules.flatten(last)), masks, found


@pytest.mark.slow
@pytest.mark.parametrize('base', ['nf4', [('a/.*', 'packed24_int4'), ('b/.*', 'bitmask')], *SLOW])
def test_by_layer_is_at_once(pruned, base):
    params, masks, found = pruned
    got, want = sl.Frozen(*on_disk.reduce_on_disk(found, base)), sl.reduce_base(sl.Frozen(params, masks), base)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    # Kernels with three axes are stacks, which only their place within `blocks` says; each has its own depth here.
    lora = {
        name: sl.init_lora(jax.random.key(0), {'blocks': params[name]}, [('.*', (2, 4))])['blocks'] for name in 'ab'
    }
    sl.check_sparse(restore.merge_trained(jax.device_put(got), lora, 'lora'), masks)


def test_a_mask_that_does_not_fit_is_named_by_path_layer_and_group(pruned, tmp_path):
    params, masks, _ = pruned
    masks['a']['kernel'] = masks['a']['kernel'].at[2, 4:8, 7].set(True)
    found = on_disk.pruned_on_disk(params, write(tmp_path / 'wrong', masks))
    with pytest.raises(
        packing.PackingError, match='layer 2 of a/kernel: inputs 4 to 7 of output 7: 4 weights are kept'
    ):
        on_disk.reduce_on_disk(found, 'packed24')
