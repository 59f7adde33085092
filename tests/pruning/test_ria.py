"""RIA against loops over the paper's formula; kernels that share an input are scored each for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.models import layers, llama
from sparselora_jax.models.init import init_params
from sparselora_jax.pruning import calibrate
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.masks import check_masks
from sparselora_jax.sparse.patterns import parse_pattern

CFG = llama.LlamaConfig(vocab=11, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)


def numpy_scores(kernel, x):
    scores = np.zeros(kernel.shape)
    norms = np.linalg.norm(x, axis=0)
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            weight = abs(kernel[i, j])
            if weight:
                share = weight / sum(abs(kernel[:, j])) + weight / sum(abs(kernel[i]))
                scores[i, j] = share * norms[i] ** 0.5
    return scores


def numpy_mask(scores, pattern, group):
    """True for all but the lowest scores of each group, ties by position."""
    is_whole = group == 'matrix' and not pattern.structured
    ordered = scores if is_whole else scores.T
    size = scores.size if is_whole else pattern.m or len(scores)
    mask = np.ones(scores.size, bool)
    for start in range(0, scores.size, size):
        lowest = np.argsort(ordered.reshape(-1)[start : start + size], kind='stable')[: pattern.zeros(size)]
        mask[start + lowest] = False
    mask = mask.reshape(ordered.shape)
    return mask if is_whole else mask.T


@pytest.mark.parametrize('pattern', ['2:4', '4:8', '0.5', '0.7'])
@pytest.mark.parametrize('group', ['output', 'matrix'])
def test_equals_numpy(pattern, group):
    pattern = parse_pattern(pattern)
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(32, 12)), rng.normal(size=(200, 32)) * rng.uniform(0.1, 3.0, size=32)
    kernel[3] = 0  # a share of nothing is 0, not NaN
    kernel[:, 5] = 0
    want = numpy_mask(numpy_scores(kernel, x), pattern, group)
    squares = np.sum(x**2, axis=0)
    with jax.enable_x64(True):
        pruned, mask = pruning.RIA(group=group)(jnp.asarray(kernel), jnp.asarray(squares), pattern)
        np.testing.assert_array_equal(mask, want)
        np.testing.assert_array_equal(pruned, np.where(want, kernel, 0))
    _, mask = pruning.RIA(group=group)(jnp.asarray(kernel, jnp.float32), jnp.asarray(squares, jnp.float32), pattern)
    assert np.mean(np.asarray(mask) == want) >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize('pattern', ['2:4', '0.5'])
def test_kernels_of_a_model_that_share_an_input_are_pruned_each_for_itself(pattern):
    params = {'language': init_params(jax.random.key(0), llama.shapes(CFG))}
    batch = {'x': jax.random.normal(jax.random.key(1), (4, 6, 16)), 'valid': jnp.ones((4, 6), bool)}

    def forward(w, batch, run):
        return llama.forward(w['language'], CFG, batch['x'], batch['valid'], run)

    pattern_rules = [('language/blocks/.*', pattern)]
    in_model = pruning.prune(forward, params, [batch], pattern_rules, method=pruning.RIA(), sequential='layer')
    check_masks(in_model.masks, pattern_rules)
    first = jax.tree.map(lambda leaf: leaf[0], params['language']['blocks'])
    x, ctx = llama.embed({}, CFG, batch['x'], layers.causal_view(batch['valid']))
    stats = calibrate.collect(lambda w, x: llama.block(w, CFG, x, ctx, None), first, [x])
    for name in ('q', 'k', 'v'):
        path = f'attn/{name}/kernel'
        kernel = {name: {'kernel': first['attn'][name]['kernel']}}
        _, mask = pruning.prune_tree(kernel, {f'{name}/kernel': stats[path]}, [('.*', pattern)], method=pruning.RIA())
        in_block = rules.flatten(in_model.masks)[f'language/blocks/{path}'][0]
        np.testing.assert_array_equal(in_block, mask[name]['kernel'])
