"""The model of a package that knows nothing of this library is pruned as the documentation shows it."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.sparse import rules

PAGE = Path(__file__).parents[2] / 'docs' / 'tutorials' / 'four_libraries.md'

pytest.importorskip('equimo', reason='it is in the extra `test`')


@pytest.fixture(scope='module')
def example():
    """The variables of the example's code after it ran."""
    (code,) = re.findall(r'^```python\n(.*?)^```$', PAGE.read_text(), re.M | re.S)
    assert len([line for line in code.splitlines() if line]) <= 15
    variables = {}
    # The model was not written for strict promotion of dtypes.
    with jax.numpy_dtype_promotion('standard'):
        exec(code, variables)
    return variables


def weights_of(model):
    """The weights of the modules of Equinox that multiply, by path."""

    def is_product(node):
        return isinstance(node, eqx.nn.Linear | eqx.nn.Conv)

    modules, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_product)
    return {
        f'{jax.tree_util.keystr(path, simple=True, separator="/")}/weight': module.weight
        for path, module in modules
        if is_product(module)
    }


@pytest.mark.slow
def test_every_kernel_is_found_and_pruned(example):
    weights = weights_of(example['model'])
    assert len(weights) == 10
    assert example['stats'].keys() == weights.keys()
    assert sl.density(example['masks']) == {
        'total': 0.5,
        **{path: 0.5 for path in weights if path != 'head/weight'},
    }
    sl.check_sparse(example['pruned'], example['masks'])
    outputs = example['forward'](example['pruned'], example['batches'][0])
    assert outputs.shape == (8, 10)
    assert jnp.isfinite(outputs).all()


@pytest.mark.slow
def test_the_statistic_of_the_patch_embedding_is_that_of_patches(example):
    images = np.concatenate(example['batches']).astype(np.float64)
    patches = images.reshape(32, 3, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 192)
    statistic = example['stats']['patch_embed/proj/weight']
    np.testing.assert_allclose(statistic.total, patches.T @ patches, rtol=1e-4, atol=1e-2)
    assert int(statistic.tokens) == 512


@pytest.mark.slow
def test_wanda_s_mask_of_the_patch_embedding_is_that_of_numpy(example):
    model, batches = example['model'], example['batches']
    name = 'patch_embed/proj/weight'
    with jax.numpy_dtype_promotion('standard'):
        stats = sl.collect(example['forward'], model, batches, select=lambda path: path == name)
    _, masks = sl.prune_tree(model, stats, [(name, '2:4'), ('.*', 'dense')], method=sl.Wanda())
    images = np.concatenate(batches).astype(np.float64)
    norms = np.sqrt(np.sum(images.reshape(32, 3, 4, 8, 4, 8) ** 2, axis=(0, 2, 4)))
    scores = np.abs(weights_of(model)[name]) * norms
    groups = scores.reshape(-1, 4)
    kept = groups >= np.sort(groups, axis=-1)[:, 2:3]
    np.testing.assert_array_equal(rules.flatten(masks)[name], kept.reshape(scores.shape))
