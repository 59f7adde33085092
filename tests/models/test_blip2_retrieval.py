"""Parity of BLIP-2's retrieval model with torch transformers: contrast and matching, texts of several lengths."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_retrieval
import torch

import sparselora_jax as sl
from sparselora_jax.models.blip2_retrieval import FAMILY
from sparselora_jax.models.model import Generation, Model, from_hf
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError

VOCAB, TOKENS, IMAGES, SIDE = 30, 7, 3, 28


@pytest.fixture(scope='module')
def oracle(from_torch):
    """(torch's model, ours, our params)."""
    module = tiny_retrieval.build(tiny_retrieval.config(VOCAB, architectures=['Blip2ForImageTextRetrieval']))
    model = Model(from_hf(module.config), Generation(eos=(1,), pad=0))
    return module, model, from_torch(module.state_dict(), model.family.keys(model.cfg), model.shapes())


def batch(lengths=(7, 3, 1)):
    """An image for each text; a text has pads behind its tokens."""
    rng = np.random.default_rng(0)
    return {
        'pixel_values': rng.normal(size=(len(lengths), 3, SIDE, SIDE)).astype(np.float32),
        'input_ids': rng.integers(1, VOCAB, (len(lengths), TOKENS)),
        'attention_mask': (np.arange(TOKENS) < np.array(lengths)[:, None]).astype(np.int64),
    }


def theirs(module, given, **options):
    with torch.no_grad():
        return module(**{name: torch.asarray(array) for name, array in given.items()}, **options)


@functools.partial(jax.jit, static_argnums=0)
def embeddings_and_logits(model, params, given):
    """What both comparisons give, in one program."""
    valid = given['attention_mask'] == 1
    features = FAMILY.image_features(params, model.cfg, given['pixel_values'])
    image = FAMILY.image_embeddings(params, model.cfg, features)
    text = FAMILY.text_embeddings(params, model.cfg, given['input_ids'], valid)
    return image, text, FAMILY.match_logits(params, model.cfg, features, given['input_ids'], valid)


@pytest.mark.parametrize('lengths', [(7, 3, 1), pytest.param((7, 7, 7), marks=pytest.mark.slow)])
def test_similarities_and_match_logits_equal_torch(lengths, oracle):
    module, model, params = oracle
    given = batch(lengths)
    image, text, logits = embeddings_and_logits(model, params, given)
    want = theirs(module, given)
    np.testing.assert_allclose(image, want.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(text, want.text_embeds.numpy(), atol=1e-5)
    similarity = np.einsum('iqd,td->itq', image, text).max(axis=2)
    np.testing.assert_allclose(similarity, want.logits_per_image.numpy(), atol=1e-5)
    matched = theirs(module, given, use_image_text_matching_head=True).logits_per_image.numpy()
    np.testing.assert_allclose(logits, matched, atol=1e-4)


@pytest.mark.slow
def test_texts_may_share_an_image_and_the_head_reads_the_hidden_states(oracle):
    _, model, params = oracle
    given = batch()
    _, _, want = embeddings_and_logits(model, params, given)
    features = FAMILY.image_features(params, model.cfg, jnp.asarray(given['pixel_values']))
    tokens, valid = jnp.asarray(given['input_ids']), jnp.asarray(given['attention_mask']) == 1
    # A pad is not read.
    shared = FAMILY.match_logits(params, model.cfg, features[1:2], jnp.where(valid, tokens, 5), valid)
    np.testing.assert_allclose(shared[1], want[1], atol=1e-4)
    hidden = model.hidden(params, given)
    head = params['match_head']
    np.testing.assert_allclose((hidden @ head['kernel'] + head['bias']).mean(axis=1), want, atol=1e-4)


def test_every_parameter_is_accounted_for(oracle):
    module, _, params = oracle
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(p.numel() for p in module.parameters())


def test_what_a_text_may_be(oracle):
    _, model, params = oracle
    given = batch()
    given['input_ids'][1, 2] = VOCAB
    with pytest.raises(BatchError, match=f'row 1 of input_ids has {VOCAB}: expected 0 to {VOCAB - 1}'):
        model.hidden(params, given)
    tokens = jnp.zeros((1, 41), jnp.int32)
    with pytest.raises(BatchError, match='a text of 41 tokens: the Q-Former reads 1 to 40'):
        FAMILY.text_embeddings(params, model.cfg, tokens, tokens == 0)


def test_the_architecture_tells_it_from_a_model_that_answers():
    hf = tiny_retrieval.config(VOCAB, architectures=['Blip2ForImageTextRetrieval'])
    assert from_hf(hf).family is FAMILY
    assert from_hf(hf, 'blip-2/Blip2ForImageTextRetrieval').family is FAMILY
    with pytest.raises(UnsupportedModelError, match=r'of the family blip2_retrieval, not blip2: .* models have none'):
        from_hf(hf, 'blip-2')
    # Damaged files have anything there.
    for architectures in (['Blip2ForConditionalGeneration'], None, [], 3):
        with pytest.raises(UnsupportedModelError, match='blip-2 without image_token_index'):
            from_hf(SimpleNamespace(model_type='blip-2', architectures=architectures, image_token_id=None))


def test_it_generates_no_text(oracle):
    _, model, params = oracle
    given = batch()
    for ask in (
        lambda: model.language,
        lambda: model.prompt(params, given),
        lambda: sl.generate(model, params, given),
    ):
        with pytest.raises(UnsupportedModelError, match='blip2_retrieval models compare images with texts'):
            ask()
    for kind in ('answer', 'caption', 'choice', 'yes_no'):
        with pytest.raises(UnsupportedModelError, match='score them on tasks of retrieval'):
            FAMILY.task_format(model.cfg, kind)


@pytest.mark.slow
def test_a_directory_is_loaded_and_exported_as_it_was(tmp_path):
    """Torch reads the export as it reads the original."""
    module = tiny_retrieval.save(tmp_path / 'model')
    model, params = sl.load_model(tmp_path / 'model', dtype='float32')
    assert model.family is FAMILY
    processor = sl.load_processor(tmp_path / 'model')
    pictures = [np.full((30, 40, 3), level, np.uint8) for level in (9, 200)]
    given = processor.prompt(pictures, ['a cat of the colour teal', 'is it'])
    assert given['input_ids'].shape == (2, 8)
    assert given['attention_mask'].sum(axis=1).tolist() == [8, 4]
    want = theirs(module, given | {'input_ids': given['input_ids'].astype(np.int64)}, use_image_text_matching_head=True)
    features = FAMILY.image_features(params, model.cfg, jnp.asarray(given['pixel_values']))
    valid = jnp.asarray(given['attention_mask']) == 1
    got = FAMILY.match_logits(params, model.cfg, features, jnp.asarray(given['input_ids']), valid)
    np.testing.assert_allclose(got, want.logits_per_image.numpy(), atol=1e-4)
    changed = jax.tree.map(lambda leaf: 2 * leaf, params)
    sl.export_model(tmp_path / 'export', model, changed)
    again = type(module).from_pretrained(tmp_path / 'export').state_dict()
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(again[name].numpy(), 2 * value.numpy(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('method', [sl.Wanda(), sl.SparseGPT()], ids=['wanda', 'sparsegpt'])
def test_it_is_pruned_by_rules_as_other_families_are(method, oracle):
    _, model, params = oracle
    rules = [('vision/blocks/.*', '2:4'), ('qformer/blocks/.*', 0.5), ('.*', 'dense')]
    given = batch((7, 3, 1, 5))
    result = sl.prune(model.hidden, params, [given], rules, method=method, chunk=2)
    sl.check_sparse(result.params, result.masks)
    density = sl.density(result.masks)
    assert density['total'] == pytest.approx(0.5)
    # Pads count for no kernel: the MLP of the text read as many tokens as the texts have.
    tokens = {path.split('/', 3)[-1]: count for path, count in result.tokens.items() if path.startswith('qformer')}
    assert tokens['text_mlp/fc1/kernel'] == 7 + 3 + 1 + 5
    assert tokens['mlp/fc1/kernel'] == 4 * tiny_retrieval.QUERIES
    pruned = model.hidden(result.params, given)
    np.testing.assert_allclose(model.hidden(sl.bind(result.params, result.masks), given), pruned, atol=1e-5)
    assert np.abs(np.asarray(pruned - model.hidden(params, given))).max() > 1e-3
