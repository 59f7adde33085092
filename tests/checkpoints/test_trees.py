"""Any tree comes back bit for bit; a file that is not whole is named."""

import jax
import jax.numpy as jnp
import pytest
from safetensors.flax import save_file
from small_disk import files_of_at_most

import sparselora_jax as sl
from sparselora_jax.checkpoints import trees
from sparselora_jax.runtime import files
from sparselora_jax.sparse import packing


def test_each_tree_comes_back_bit_for_bit(tmp_path):
    stack = jax.random.normal(jax.random.key(0), (2, 8, 4), jnp.bfloat16)
    params = {'blocks': {'a': {'kernel': stack}}, 'n': jnp.ones(3)}
    _, masks = sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())
    lora = sl.init_lora(jax.random.key(1), params, [('.*', sl.LoraSpec(2, 3))])
    for name, tree in {'params': params, 'masks': masks, 'lora': lora}.items():
        path = tmp_path / 'new' / f'{name}.safetensors'
        sl.save_safetensors(path, tree, metadata={'made': 'here'})
        back, metadata = sl.load_safetensors(path)
        assert metadata == {'made': 'here'}
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and jnp.array_equal(x, y), back, tree))
    assert [path.suffix for path in (tmp_path / 'new').iterdir()] == ['.safetensors'] * 3


def test_missing_and_truncated_files_are_named(tmp_path):
    path = tmp_path / 'w.safetensors'
    with pytest.raises(sl.StorageError, match=r'w.safetensors: no such file'):
        sl.load_safetensors(path)
    sl.save_safetensors(path, {'a': jnp.ones(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(sl.StorageError, match=r'w.safetensors: not a complete'):
        sl.load_safetensors(path)


def test_a_packed_kernel_comes_back_with_its_factors(tmp_path):
    kernel = jnp.where(jnp.arange(8)[:, None] % 4 < 2, jax.random.normal(jax.random.key(0), (8, 3)), 0)
    factors = sl.Lora(jnp.ones((8, 2)), jnp.ones((2, 3)), 0.5)
    tree = {'q': {'kernel': sl.Adapted(packing.pack24(kernel), None, factors)}, 'k': {'kernel': factors}}
    sl.save_safetensors(tmp_path / 'w.safetensors', tree)
    back, _ = sl.load_safetensors(tmp_path / 'w.safetensors')
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, back, tree))


def test_factors_of_another_shape_are_refused(tmp_path):
    factors = sl.Lora(jnp.ones((8, 2)), jnp.ones((2, 5)), 0.5)
    tree = {'q': {'kernel': sl.Adapted(packing.pack24(jnp.zeros((8, 3))), None, factors)}}
    sl.save_safetensors(tmp_path / 'w.safetensors', tree)
    with pytest.raises(sl.StorageError, match=r'q/kernel: factors \(8, 2\) x \(2, 5\) beside a kernel \(8, 3\)'):
        sl.load_safetensors(tmp_path / 'w.safetensors')


def test_factors_keep_the_roles_of_axes_in_a_file(tmp_path):
    file = tmp_path / 'w.safetensors'
    axes = {'q': sl.KernelAxes(layers=(2,), inputs=(0,), outputs=(1, 3))}
    params = {'q': jnp.ones((8, 2, 3, 5)), 'o': {'kernel': jnp.ones((4, 6))}}
    lora = sl.init_lora(jax.random.key(0), params, [('.*', (2, 4))], axes=axes)
    sl.save_safetensors(file, lora)
    back, metadata = sl.load_safetensors(file)
    assert metadata == {}
    assert jax.tree.structure(back) == jax.tree.structure(lora)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, back, lora))
    # Other roles than those of a kernel are damage, which a file of another program may have.
    arrays = {'q/a': lora['q'].a, 'q/b': lora['q'].b}
    for wrong in ('[[2], [0], [1, 1]]', '[[], [0], [1]]', '[[2], [0]]', '"0"', '[[2.0], [0], [1, 3]]'):
        save_file(arrays, file, metadata={'lora_scales': '{"q": 2.0}', 'lora_axes': f'{{"q": {wrong}}}'})
        with pytest.raises(sl.StorageError, match=r'q: .* are no roles of its axes; the file is damaged'):
            sl.load_safetensors(file)


def test_what_no_file_holds_is_named(tmp_path):
    for leaf in (
        sl.Masked(jnp.ones((4, 4)), jnp.ones((4, 4), bool)),
        packing.quantised.quantise(jnp.ones((4, 4)), 'nf4'),
    ):
        with pytest.raises(sl.StorageError, match=rf'q/kernel is a {type(leaf).__name__}, which safetensors'):
            sl.save_safetensors(tmp_path / 'w.safetensors', {'q': {'kernel': leaf}})


def test_a_tree_without_paths_of_strings_is_refused_with_a_way_out(tmp_path):
    path = tmp_path / 'w.safetensors'
    for tree in ([jnp.ones(4)], {'blocks': {0: jnp.ones(4)}}):
        with pytest.raises(sl.StorageError, match=r'w.safetensors: .* nested dicts with string keys.*serialiser'):
            sl.save_safetensors(path, tree)
    assert not path.exists()


def test_where_there_is_no_room_the_old_file_stays(tmp_path):
    tree, text, layers = (tmp_path / name for name in ('w.safetensors', 'text.json', 'masks.safetensors'))
    like = {'a': jnp.zeros((2, 1000))}
    sl.save_safetensors(tree, {'a': jnp.ones(3)})
    files.write_text(text, 'old')
    with files_of_at_most(2000):
        with pytest.raises(sl.StorageError, match=r'w.safetensors cannot be written .*; make room, then'):
            sl.save_safetensors(tree, {'a': jnp.ones(1000)})
        with pytest.raises(sl.StorageError, match=r'text.json cannot be written'):
            files.write_text(text, 'x' * 3000)
        refused = pytest.raises(sl.StorageError, match=r'masks.safetensors cannot be written')
        with refused, trees.layer_writer(layers, like) as write:
            write('a', 1, jnp.ones(1000))
    assert sl.load_safetensors(tree)[0]['a'].shape == (3,)
    assert text.read_text() == 'old'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['text.json', 'w.safetensors']


def test_equal_trees_give_equal_files(tmp_path):
    metadata = {f'note {index}': 'ü' * index for index in range(6)}
    for name in 'abcd':
        trees.save_safetensors(tmp_path / name, {'w': jnp.ones((3, 2))}, metadata=metadata)
    assert len({(tmp_path / name).read_bytes() for name in 'abcd'}) == 1
    assert trees.load_safetensors(tmp_path / 'a')[1] == metadata
