"""DAS against loops over pairs of tokens, written from the paper's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.models import llama
from sparselora_jax.models.init import init_params
from sparselora_jax.pruning.allocate import run_allocation, total
from sparselora_jax.pruning.das import DAS, das_zeros, diversities, diversity_scores
from sparselora_jax.sparse.rules import stack_of

CFG = llama.LlamaConfig(vocab=11, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)
RULES = [('language/blocks/.*', 0.5), ('.*', 'dense')]
IMAGE = jnp.array([[True, True, True, False, False, False], [False, True, True, True, False, False]])


def cosine(a, b):
    return float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))


def by_pairs(y, is_image, valid):
    """Diversities of one sample: loops over all pairs."""
    image = [y[t] for t in range(len(y)) if valid[t] and is_image[t]]
    text = [y[t] for t in range(len(y)) if valid[t] and not is_image[t]]
    pairs = [
        [(a, b) for i, a in enumerate(image) for b in image[i + 1 :]],
        [(a, b) for i, a in enumerate(text) for b in text[i + 1 :]],
        [(a, b) for a in image for b in text],
    ]
    return [np.mean([1 - cosine(a, b) for a, b in of_kind]) if of_kind else np.nan for of_kind in pairs]


def test_diversities_are_means_over_all_pairs_of_tokens():
    y = np.asarray(jax.random.normal(jax.random.key(0), (4, 7, 5)))
    is_image = np.array([[1, 1, 0, 0, 1, 0, 0], [0] * 7, [1] * 7, [1, 0, 0, 0, 0, 0, 0]], bool)
    valid = np.array([[1] * 7, [1] * 5 + [0] * 2, [1] * 7, [1, 1, 0, 0, 0, 0, 0]], bool)
    found = diversities(jnp.asarray(y), jnp.asarray(is_image), jnp.asarray(valid))
    want = [by_pairs(*one) for one in zip(y, is_image, valid, strict=True)]
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_outputs_of_zeros_have_no_direction():
    found = diversities(jnp.zeros((1, 3, 2)), jnp.array([[True, True, False]]), jnp.ones((1, 3), bool))
    assert found.tolist() == [[1.0, pytest.approx(np.nan, nan_ok=True), 1.0]]


def forward(w, batch, run):
    return llama.forward(w['language'], CFG, batch['x'], batch['valid'], run)


def setup():
    params = {'language': init_params(jax.random.key(0), llama.shapes(CFG))}
    valid = jnp.arange(6)[None] >= jnp.array([0, 1])[:, None]
    return params, {'x': jax.random.normal(jax.random.key(1), (2, 6, 16)), 'valid': valid}


@pytest.mark.slow
def test_scores_are_those_of_the_first_kernels_outputs_and_do_not_depend_on_chunks():
    params, batch = setup()
    paths = list(pruning.patterns_of(params, RULES))
    scores = diversity_scores(forward, params, [batch], paths, is_image=lambda batch: IMAGE, chunk=2)
    assert {path: of_layers.shape for path, of_layers in scores.items()} == dict.fromkeys(paths, (2,))
    one_by_one = diversity_scores(forward, params, [batch], paths, is_image=lambda batch: IMAGE, chunk=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scores, one_by_one)
    blocks = jax.tree.map(lambda leaf: np.asarray(leaf[0]), params['language']['blocks'])
    x = np.asarray(batch['x'])
    normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CFG.norm_eps) * blocks['norm1']['scale']
    y = normed @ blocks['attn']['q']['kernel']
    of_samples = [by_pairs(*one) for one in zip(y, np.asarray(IMAGE), np.asarray(batch['valid']), strict=True)]
    want = np.nanmean(np.nanmean(of_samples, axis=0))
    assert scores['language/blocks/attn/q/kernel'][0] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_a_model_without_images_has_the_diversity_of_its_text():
    params, batch = setup()
    path = 'language/blocks/attn/q/kernel'
    of_text = diversity_scores(forward, params, [batch], [path])
    none_is_image = diversity_scores(forward, params, [batch], [path], is_image=lambda batch: jnp.zeros_like(IMAGE))
    assert np.array_equal(of_text[path], none_is_image[path])


def test_every_tower_keeps_its_zeros_and_the_more_diverse_block_keeps_more_weights():
    uniform = {
        'language/blocks/q/kernel': np.array([50, 50]),
        'language/blocks/v/kernel': np.array([25, 25]),
        'vision/blocks/q/kernel': np.array([60, 60]),
    }
    sizes = {'language/blocks/q/kernel': 100, 'language/blocks/v/kernel': 50, 'vision/blocks/q/kernel': 100}
    scores = {path: np.array([0.1, 0.4]) for path in uniform}
    zeros = das_zeros(scores, uniform, sizes, margin=0.1)
    for tower in ('language', 'vision'):
        own = [path for path in uniform if stack_of(path) == tower]
        assert total({path: zeros[path] for path in own}) == total({path: uniform[path] for path in own})
    assert all(first > second for first, second in zeros.values())
    assert max(zeros[path].max() / sizes[path] - uniform[path].max() / sizes[path] for path in uniform) <= 0.1 + 1e-9


@pytest.mark.slow
def test_the_allocation_runs_on_a_model():
    params, batch = setup()
    # All inputs have a common part, and the second layer writes nothing but this part: its outputs are all alike.
    batch['x'] += 3
    for tower in ('attn', 'mlp'):
        for weights in params['language']['blocks'][tower].values():
            weights['kernel'] = weights['kernel'].at[1].set(1.0)
    uniform = pruning.uniform_zeros(params, RULES, method=pruning.Wanda())

    shown = []

    def unused(*args):
        raise NotImplementedError

    inputs = pruning.AllocationInputs(
        params=params,
        uniform=uniform,
        sizes=pruning.kernel_sizes(params, uniform),
        forward=forward,
        loss=unused,
        calibration=lambda: [batch],
        score_batches=unused,
        is_image=lambda batch: IMAGE,
        key=jax.random.key(0),
        progress=lambda name, count: lambda done, note: shown.append((done, count)),
    )
    zeros = run_allocation(DAS(), inputs)
    assert shown == [(1, 2), (2, 2)]
    assert total(zeros) == total(uniform)
    assert all(first < second for first, second in zeros.values())


@pytest.mark.parametrize('margin', [0.0, 1.0])
def test_a_margin_that_cannot_work_is_refused(margin):
    with pytest.raises(pruning.AllocationError, match='margin'):
        DAS(margin=margin)
