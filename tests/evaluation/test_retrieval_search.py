"""A search among images and texts, against a loop over torch's model that does as LAVIS does; resuming; programs."""

import jax
import jax.numpy as jnp
import miniature_benchmarks as miniature
import numpy as np
import pytest
import tiny_retrieval
import torch

import sparselora_jax as sl
from sparselora_jax.data.benchmarks.load import load
from sparselora_jax.evaluation import retrieval
from sparselora_jax.evaluation.saved_arrays import SavedArrays
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.files import StorageError

NAME = 'flickr30k_test_retrieval'
IMAGES, BATCH, CANDIDATES = 5, 2, 2


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
    """(torch's model, (ours, params, processor), images with captions)."""
    folder = tmp_path_factory.mktemp('retrieval')
    module = tiny_retrieval.save(folder / 'model')
    model, params = sl.load_model(folder / 'model', dtype='float32')
    miniature.karpathy(folder / 'dataset_flickr30k.json', folder, 'flickr30k', ('test',) * IMAGES)
    tiny_retrieval.write_captions(folder / 'dataset_flickr30k.json')
    return module, (model, params, sl.load_processor(folder / 'model')), load(NAME, folder)


def search(setting, file, **options):
    _, (model, params, processor), items = setting
    asked = model.family.task_format(model.cfg, 'retrieval')
    options = {'batch': BATCH, 'candidates': CANDIDATES, 'owner': 'me'} | options
    return retrieval.search(model, params, processor, items, asked, answers_file=file, **options)


def oracle(setting):
    """Scores by torch's model, one pair at a time; of no candidates -100, as in LAVIS."""
    module, (model, _, processor), items = setting
    asked = model.family.task_format(model.cfg, 'retrieval')
    texts = [text for item in items for text in item.references]
    inputs = processor.read_texts([asked.question(text) for text in texts], asked.text.prompt_tokens)
    tokens, mask = (torch.asarray(inputs[name].astype(np.int64)) for name in ('input_ids', 'attention_mask'))
    pixels = torch.asarray(processor.read_images([item.image.read() for item in items])['pixel_values'])
    matched = torch.zeros(len(items), len(texts))
    with torch.no_grad():
        similarity = module(pixels, tokens, mask).logits_per_image
        for image in range(len(items)):
            for text in range(len(texts)):
                logits = module(
                    pixels[image : image + 1],
                    tokens[text : text + 1],
                    mask[text : text + 1],
                    use_image_text_matching_head=True,
                ).logits_per_image
                matched[image, text] = logits[0, 1]

    def ranked(similarity, matched):
        scores = torch.full(similarity.shape, -100.0)
        for row, values in enumerate(similarity):
            places = values.topk(CANDIDATES).indices
            scores[row, places] = values[places] + matched[row, places]
        return scores.numpy()

    return ranked(similarity, matched), ranked(similarity.t(), matched.t())


@pytest.mark.slow
def test_scores_are_those_of_lavis(setting, tmp_path):
    got = search(setting, tmp_path / 'answers.jsonl')
    for ours, theirs in zip((got.of_images, got.of_texts), oracle(setting), strict=True):
        np.testing.assert_array_equal(np.isfinite(ours), theirs > -100)
        np.testing.assert_allclose(ours[np.isfinite(ours)], theirs[theirs > -100], atol=1e-4)
    assert got.image_of_text.tolist() == [image for image in range(IMAGES) for _ in range(5)]


@pytest.mark.slow
def test_a_search_continues_after_any_step(setting, tmp_path, monkeypatch):
    """After images, texts or pairs, and after half a line; the scores are the same to the last bit."""
    whole = tmp_path / 'whole.jsonl'
    want = search(setting, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    steps = 3 + 13 + IMAGES  # of 5 images and 25 texts in batches of 2, then pairs image by image
    assert len(lines) == steps
    for done in (1, 5, steps - 2, steps):
        stopped = tmp_path / f'{done}.jsonl'
        stopped.write_bytes(b''.join(lines[:done]) + b'["AAAA')
        got = search(setting, stopped)
        np.testing.assert_array_equal(got.of_images, want.of_images)
        np.testing.assert_array_equal(got.of_texts, want.of_texts)
        assert stopped.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(retrieval, '_match', None)  # nothing is computed again
    search(setting, whole)
    with pytest.raises(StorageError, match=r'whole.jsonl, line 1: damaged, or of another run'):
        search(setting, whole, owner='another')
    whole.write_bytes(b''.join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(StorageError, match=r'whole.jsonl, line 1: damaged'):
        search(setting, whole)


@pytest.mark.slow
def test_each_program_is_compiled_once(setting, tmp_path):
    programs = (
        retrieval._features,
        retrieval._image_embeddings,
        retrieval._text_embeddings,
        retrieval._similarities,
        retrieval._match,
    )
    for program in programs:
        program.clear_cache()
    search(setting, tmp_path / 'answers.jsonl')
    assert [program._cache_size() for program in programs] == [1] * len(programs)
    # The numbers of candidates and of pairs change no shape.
    search(setting, tmp_path / 'more.jsonl', candidates=4)
    assert [program._cache_size() for program in programs] == [1] * len(programs)


@pytest.mark.slow
def test_weights_in_bfloat16_give_nearly_the_same(setting, tmp_path):
    module, (model, params, processor), items = setting
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    everything = {'candidates': 99}
    want = search(setting, tmp_path / 'whole.jsonl', **everything)
    got = search((module, (model, rounded, processor), items), tmp_path / 'rounded.jsonl', **everything)
    # Eight bits: the logits of "match" are of the order of 1.
    np.testing.assert_allclose(got.of_images, want.of_images, atol=0.1)


def test_the_best_are_marked_in_each_row():
    similarity = np.random.default_rng(0).normal(size=(7, 20)).astype(np.float32)
    marked = retrieval.best(similarity, 3)
    assert marked.sum(axis=1).tolist() == [3] * 7
    assert (np.where(marked, similarity, np.inf).min(axis=1) > np.where(marked, -np.inf, similarity).max(axis=1)).all()
    assert retrieval.best(similarity, 20).all()


def test_images_without_captions_are_named(tmp_path):
    miniature.karpathy(tmp_path / 'dataset_flickr30k.json', tmp_path, 'flickr30k', ('test', 'test'))
    items = load(NAME, tmp_path)
    ends = items.references.ends.copy()
    ends[0] = 0
    items.references.ends[:] = ends
    with pytest.raises(DataError, match=f'{NAME}: image .* has no caption'):
        retrieval.texts_of(items)


def test_saved_arrays_are_returned_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((2, 3), (0,), (4,))]
    saved = SavedArrays(tmp_path / 'a.jsonl', 'me')
    assert not saved.is_next_saved
    for array in arrays:
        np.testing.assert_array_equal(saved.step(lambda array=array: array), array)
    again = SavedArrays(tmp_path / 'a.jsonl', 'me')
    assert again.count_saved(2) == 2
    assert again.count_saved(9) == 3
    for array in arrays:
        np.testing.assert_array_equal(again.step(lambda: pytest.fail('it is saved')), array)
    assert not again.is_next_saved
    for content in (b'[1, 2]\n', b'{}\n', b'\xff\n', b'[' * 100_000 + b'\n', b'["AAAA", [1], 3]\n'):
        (tmp_path / 'b.jsonl').write_bytes(content)
        with pytest.raises(StorageError, match=r'b.jsonl, line 1: damaged'):
            SavedArrays(tmp_path / 'b.jsonl', 'me')
