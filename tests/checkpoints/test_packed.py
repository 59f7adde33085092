"""A packed export is the same model in fewer bytes: logits, words, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models
from safetensors import safe_open
from safetensors.flax import save_file

import sparselora_jax as sl
from sparselora_jax.checkpoints.packed import FILE, export_packed
from sparselora_jax.checkpoints.trees import save_safetensors
from sparselora_jax.models.model import Model
from sparselora_jax.sparse import packing, rules

LOGITS = jax.jit(Model.logits, static_argnums=0)
RULES = [('language/.*blocks/.*', '2:4'), ('.*/blocks/.*', '0.6'), ('.*', 'dense')]


@pytest.fixture(scope='module', params=['llama', pytest.param('blip2 t5', marks=pytest.mark.slow)])
def model(request, tmp_path_factory, perturbed):
    """(model, merged params, masks) of a directory with a tokenizer beside the weights."""
    folder = tmp_path_factory.mktemp('model')
    torch_models.build(request.param, perturbed).save_pretrained(folder)
    (folder / 'tokenizer.json').write_text('{"made": "up"}')
    model, params = sl.load_model(folder)
    pruned, masks = sl.prune_tree(params, None, RULES, method=sl.Magnitude())
    return model, pruned, masks


def packed(params, masks):
    flat = rules.flatten(masks)
    formats = [('language/.*', 'packed24'), ('.*', 'bitmask')]
    return sl.pack(params, masks, formats if any('vision' in path for path in flat) else 'packed24')


def test_it_is_the_same_model(model, tmp_path):
    model, params, masks = model
    export_packed(tmp_path / 'out', model, packed(params, masks), texts={'note.json': '{}'})
    read, kernels = sl.load_model(tmp_path / 'out')
    assert read == model
    flat = rules.flatten(kernels)
    assert all(packing.is_packed(flat[path]) for path in rules.flatten(masks))
    jax.tree.map(np.testing.assert_array_equal, sl.unpack(kernels), params)
    batch = torch_models.batch(model)
    np.testing.assert_allclose(LOGITS(read, kernels, batch), LOGITS(model, params, batch), rtol=1e-5, atol=1e-5)
    assert (tmp_path / 'out/tokenizer.json').is_file()
    assert (tmp_path / 'out/note.json').is_file()
    halves = sl.load_model(tmp_path / 'out', dtype=jnp.bfloat16)[1]
    assert halves['language']['embed'].dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize('beams', [1, 3])
def test_it_generates_the_same_words(model, beams):
    model, params, masks = model
    batch = torch_models.batch(model)
    batch.pop('decoder_input_ids', None)
    knobs = {'num_beams': beams, 'max_new_tokens': 6}
    got, want = (sl.generate(model, w, batch, **knobs) for w in (packed(params, masks), params))
    np.testing.assert_array_equal(got, want)


def test_what_does_not_fit_is_refused(model, tmp_path):
    model, params, masks = model
    tree = packed(params, masks)
    folder = tmp_path / 'out'
    folder.mkdir()
    (folder / 'model.safetensors').write_bytes(b'dense')
    with pytest.raises(sl.StorageError, match='holds other weights'):
        export_packed(folder, model, tree)
    (folder / 'model.safetensors').unlink()
    export_packed(folder, model, tree)
    with pytest.raises(sl.StorageError, match='without a mesh'):
        sl.load_model(folder, mesh=jax.make_mesh((1,), ('data',)))
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9])
    with pytest.raises(sl.StorageError, match='not a complete safetensors file'):
        sl.load_model(folder)
    flat = rules.flatten(tree)
    path = next(iter(rules.flatten(masks)))
    flat[path] = packing.pack24(jnp.zeros((1, 8, 4)))
    save_safetensors(folder / FILE, rules.unflatten(flat))
    with pytest.raises(sl.StorageError, match=rf'{path} has shape \(1, 8, 4\)'):
        sl.load_model(folder)


def test_a_flipped_bit_anywhere_in_the_file_is_noticed(model, tmp_path):
    """Each array, and each entry of the header: also where the damaged value is a legal one."""
    model, params, masks = model
    export_packed(tmp_path, model, packed(params, masks))
    file = tmp_path / FILE
    whole = file.read_bytes()
    sl.load_model(tmp_path)
    first = 8 + int.from_bytes(whole[:8], 'little')
    rng = np.random.default_rng(0)
    places = [*rng.integers(8, first, 20), *rng.integers(first, len(whole), 20), first, len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        with pytest.raises((sl.StorageError, sl.PackingError), match=f'^{file}: '):
            sl.load_model(tmp_path)


def test_a_file_without_checksums_is_refused(model, tmp_path):
    model, params, masks = model
    export_packed(tmp_path, model, packed(params, masks))
    tensors = {}
    with safe_open(tmp_path / FILE, 'flax') as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    del metadata['checksums']
    save_file(tensors, tmp_path / FILE, metadata)
    with pytest.raises(sl.StorageError, match='its header has no checksums; export it again'):
        sl.load_model(tmp_path)
