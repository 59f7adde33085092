"""An export changes the numbers that pruning and restoration changed, and computes them from the source's precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from safetensors.numpy import load_file, save_file

import sparselora_jax as sl
from sparselora_jax.checkpoints import layout, on_disk, trees
from sparselora_jax.checkpoints.export import check_export, export_model
from sparselora_jax.checkpoints.load import load_model, open_model
from sparselora_jax.sparse import rules

PRUNED = [('language/blocks/(attn|mlp)/.*', '2:4'), ('.*', 'dense')]
DTYPES = [torch.float16, torch.float32]


@pytest.fixture(scope='module')
def saved(tmp_path_factory, perturbed):
    """`saved(name, dtype)`: the directory of a model in that dtype; some of its numbers are as small as that has."""

    @functools.cache
    def save(name, dtype):
        folder = tmp_path_factory.mktemp('model')
        torch_models.build(name, perturbed).to(dtype).save_pretrained(folder)
        tensors = load_file(folder / 'model.safetensors')
        tensors = {name: array.copy() for name, array in tensors.items()}
        for array in tensors.values():
            tiny = np.finfo(array.dtype).smallest_subnormal
            array.reshape(-1)[::5] = 3 * tiny
        save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
        return folder

    return save


def numbers(folder, model):
    """{(path, layer): the tensor, in our layout} of every tensor that fills one of our arrays alone."""
    tensors = load_file(folder / 'model.safetensors')
    return {
        (place.path, place.layer): layout.to_params(
            tensors[name], place.layer_shape, kernel=rules.named_kernel(place.path)
        )
        for name, (place,) in layout.places(model.family, model.cfg).items()
    }


def same_bytes(array, other):
    return array.dtype == other.dtype and array.tobytes() == other.tobytes()


def layer_of(tree, path, layer):
    array = rules.flatten(tree)[path]
    return np.asarray(array if layer is None else array[layer])


def write_layers(file, tree):
    """As pruning leaves it."""
    flat = rules.flatten(tree)
    with trees.layer_writer(file, flat) as write_layer:
        for path, stack in flat.items():
            for layer, array in enumerate(stack):
                write_layer(path, layer, array)
    return file


@pytest.mark.parametrize('is_named', [True, False])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', ['llama', pytest.param('instructblip t5', marks=pytest.mark.slow)])
def test_what_nothing_touched_keeps_its_bytes_whatever_the_compute_dtype(name, dtype, is_named, saved, tmp_path):
    source = saved(name, dtype)
    model, params = load_model(source, dtype=jnp.bfloat16)
    some = 'language/blocks/mlp/up/kernel' if name == 'llama' else 'language/encoder/blocks/attn/q/kernel'
    pruned, masks = sl.prune_tree(params, None, [(some, '2:4'), ('.*', 'dense')], method=sl.Magnitude())
    assert set(rules.flatten(masks)) == {some}
    changed = [some] if is_named else None
    export_model(tmp_path, model, pruned, changed=changed)
    check_export(tmp_path, model, pruned, changed=changed)
    before, after = load_file(source / 'model.safetensors'), load_file(tmp_path / 'model.safetensors')
    places = layout.places(model.family, model.cfg)
    touched = {name for name, several in places.items() if any(place.path == some for place in several)}
    assert {name for name in before if not same_bytes(before[name], after[name])} == touched
    assert touched


@pytest.mark.parametrize('dtype', DTYPES)
def test_kept_weights_of_a_model_pruned_from_disk_are_the_sources_own(dtype, saved, tmp_path):
    source = saved('llama', dtype)
    model, params = load_model(source, dtype=jnp.bfloat16)
    _, masks = sl.prune_tree(params, None, PRUNED, method=sl.Magnitude())
    file = write_layers(tmp_path / 'masks', masks)
    pruned = on_disk.pruned_on_disk(on_disk.params_on_disk(*open_model(source), jnp.bfloat16), file)
    export_model(tmp_path / 'new', model, pruned, changed=rules.flatten(masks))
    check_export(tmp_path / 'new', model, pruned, changed=rules.flatten(masks))
    before, after = numbers(source, model), numbers(tmp_path / 'new', model)
    for path, layer in before:
        want = before[path, layer]
        if path in rules.flatten(masks):
            want = np.where(layer_of(masks, path, layer), want, np.zeros((), want.dtype))
        assert same_bytes(after[path, layer], want), path


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_merged_kernel_is_computed_from_the_sources_precision(dtype, saved, tmp_path):
    source = saved('llama', dtype)
    model, params = load_model(source, dtype=jnp.bfloat16)
    pruned, masks = sl.prune_tree(params, None, PRUNED, method=sl.Magnitude())
    edited = {'language': {'blocks': {'mlp': {'up': pruned['language']['blocks']['mlp']['up']}}}}
    edited = jax.tree.map(lambda kernel: kernel * jnp.asarray(1.5, jnp.bfloat16), edited)
    # One kernel of each kind: pruned and adapted, edited and adapted, pruned alone, adapted alone; and one of no stack.
    lora_rules = [
        ('language/blocks/(attn/(q|o)|mlp/up)/kernel', (2, 8)),
        ('language/head/kernel', (2, 4)),
        ('.*', None),
    ]
    shapes = jax.eval_shape(lambda params: sl.init_lora(jax.random.key(0), params, lora_rules), params)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.15, leaf.shape), jnp.float32), shapes)
    flat_masks = rules.flatten(masks)
    del flat_masks['language/blocks/attn/o/kernel']
    masks = rules.unflatten(flat_masks)
    files = [write_layers(tmp_path / name, tree) for name, tree in (('masks', masks), ('kernels', edited))]
    base = rules.unflatten(rules.flatten(params) | rules.flatten(edited))
    merged = sl.merge(base, masks, lora)

    exact = on_disk.merge_from_source(model, merged, lora, *files)
    changed = rules.flatten(masks).keys() | rules.flatten(lora).keys()
    export_model(tmp_path / 'new', model, exact, changed=changed)
    check_export(tmp_path / 'new', model, exact, changed=changed)
    before, after = numbers(source, model), numbers(tmp_path / 'new', model)
    flat_lora = rules.flatten(lora)
    for path, layer in before:
        want = before[path, layer]
        if path in rules.flatten(edited):
            want = layer_of(edited, path, layer)
        if path in flat_lora:
            factors = flat_lora[path]
            a, b = (np.asarray(x if layer is None else x[layer], np.float64) for x in (factors.a, factors.b))
            want = want.astype(np.float64) + factors.scale * a @ b
        if path in flat_masks:
            mask = layer_of(masks, path, layer)
            want = np.where(mask, want, np.zeros((), want.dtype))
            assert not after[path, layer][~mask].any(), path
        if path not in flat_lora and path not in rules.flatten(edited):
            assert same_bytes(after[path, layer], want), path
        rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-21
        np.testing.assert_allclose(after[path, layer], want.astype(np.float64), rtol=rounding, atol=1e-6)


def test_a_merged_kernel_in_the_files_own_dtype_is_the_trained_one(saved, tmp_path):
    model, params = load_model(saved('llama', torch.float32))
    pruned, masks = sl.prune_tree(params, None, PRUNED, method=sl.Magnitude())
    file = write_layers(tmp_path / 'masks', masks)
    merged = sl.merge(pruned, masks)
    exact = on_disk.merge_from_source(model, merged, {}, file, tmp_path / 'missing')
    assert jax.tree.all(jax.tree.map(lambda kernel, own: kernel is own, exact, merged))


def test_paths_that_the_model_lacks_are_named(saved, tmp_path):
    model, params = load_model(saved('llama', torch.float32))
    with pytest.raises(sl.StorageError, match='language/blocks/mlp/upp/kernel: named as changed'):
        export_model(tmp_path / 'new', model, params, changed=['language/blocks/mlp/upp/kernel'])
    assert not (tmp_path / 'new').exists()
