"""Models of other libraries are calibrated and pruned as they are, with the masks of the same weights in our layout.

The oracle is the same transformer block written with `sl.linear` and matrices.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparselora_jax as sl
from sparselora_jax.sparse import rules

WIDTH = 16
HEADS = 4
HEAD_DIM = WIDTH // HEADS
HIDDEN = 32
LAYERS = 3
X = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
RULES = [('.*', '2:4')]
NAMES = ('q', 'k', 'v', 'o', 'up', 'down')


def matrices(key, layers=LAYERS):
    """The weights of a transformer, `[layers, inputs, outputs]` each."""
    shapes = {'up': (WIDTH, HIDDEN), 'down': (HIDDEN, WIDTH)}
    weights = {}
    for index, name in enumerate(NAMES):
        shape = shapes.get(name, (WIDTH, WIDTH))
        weights[name] = jax.random.normal(jax.random.fold_in(key, index), (layers, *shape)) / shape[0] ** 0.5
    return weights


W = matrices(jax.random.key(0))


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)


def attention(q, k, v):
    """Return the attention of arrays `[batch, tokens, heads, head_dim]`."""
    scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) / HEAD_DIM**0.5
    return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores), v)


def block_of_ours(w, x):
    h = norm(x)
    q, k, v = (sl.linear(h, w[name]['kernel']).reshape(*h.shape[:2], HEADS, HEAD_DIM) for name in 'qkv')
    x = x + sl.linear(attention(q, k, v).reshape(x.shape), w['o']['kernel'])
    return x + sl.linear(jax.nn.gelu(sl.linear(norm(x), w['up']['kernel'])), w['down']['kernel'])


def ours(params, x):
    return jax.lax.scan(lambda x, w: (block_of_ours(w, x), None), x, params['blocks'])[0]


OURS = {'blocks': {name: {'kernel': W[name]} for name in NAMES}}


# Flax Linen: attention of Flax, whose kernels are [inputs, heads, head_dim], and a scan of rematerialised blocks.
class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(HEADS, qkv_features=WIDTH, use_bias=False, name='attention')
        x = x + attention(norm(x), norm(x))
        hidden = nn.gelu(nn.Dense(HIDDEN, use_bias=False, name='up')(norm(x)))
        return x + nn.Dense(WIDTH, use_bias=False, name='down')(hidden), None


LINEN = nn.scan(
    nn.remat(LinenBlock), variable_axes={'params': 0}, split_rngs={'params': True}, length=LAYERS, in_axes=nn.broadcast
)()
OF_LINEN = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}


def linen():
    params = {'up': {'kernel': W['up']}, 'down': {'kernel': W['down']}, 'attention': {}}
    for theirs, name in OF_LINEN.items():
        heads = (LAYERS, HEADS, HEAD_DIM, WIDTH) if name == 'o' else (LAYERS, WIDTH, HEADS, HEAD_DIM)
        params['attention'][theirs] = {'kernel': W[name].reshape(heads)}
    names = {f'params/attention/{theirs}/kernel': name for theirs, name in OF_LINEN.items()}
    names |= {f'params/{name}/kernel': name for name in ('up', 'down')}
    return lambda params, x: LINEN.apply(params, x, None)[0], {'params': params}, names


# Flax NNX: blocks in a list, the state as params.
class NnxBlock(nnx.Module):
    def __init__(self, layer):
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
        self.qkv = nnx.Einsum('btd,cdhk->cbthk', (3, WIDTH, HEADS, HEAD_DIM), rngs=nnx.Rngs(0))
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), WIDTH, axis=(-2, -1), use_bias=False, rngs=nnx.Rngs(0))
        self.up.kernel.set_value(W['up'][layer])
        self.down.kernel.set_value(W['down'][layer])
        self.qkv.kernel.set_value(jnp.stack([W[name][layer].reshape(WIDTH, HEADS, HEAD_DIM) for name in 'qkv']))
        self.out.kernel.set_value(W['o'][layer].reshape(HEADS, HEAD_DIM, WIDTH))

    def __call__(self, x):
        x = x + self.out(attention(*self.qkv(norm(x))))
        return x + self.down(jax.nn.gelu(self.up(norm(x))))


class NnxModel(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([NnxBlock(layer) for layer in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def nnx_model():
    graph, state = nnx.split(NnxModel())
    names = {}
    for layer in range(LAYERS):
        names |= {f'layers/{layer}/{theirs}/kernel': name for theirs, name in (('up', 'up'), ('down', 'down'))}
        names |= {f'layers/{layer}/qkv/kernel': 'qkv', f'layers/{layer}/out/kernel': 'o'}
    return lambda state, x: nnx.merge(graph, state)(x), state, names


# Equinox: weights are [outputs, inputs], called `weight`, in a module that holds functions too.
class EquinoxBlock(eqx.Module):
    layers: dict
    activation: object

    def __call__(self, x):
        def apply(name, x):
            return jax.vmap(jax.vmap(self.layers[name]))(x)

        heads = [apply(name, norm(x)).reshape(*x.shape[:2], HEADS, HEAD_DIM) for name in 'qkv']
        x = x + apply('o', attention(*heads).reshape(x.shape))
        return x + apply('down', self.activation(apply('up', norm(x))))


def equinox_model():
    blocks = []
    names = {}
    for layer in range(LAYERS):
        layers = {}
        for name in NAMES:
            inputs, outputs = W[name].shape[1:]
            linear = eqx.nn.Linear(inputs, outputs, use_bias=False, key=jax.random.key(0))
            layers[name] = eqx.tree_at(lambda module: module.weight, linear, W[name][layer].T)
            names[f'{layer}/layers/{name}/weight'] = name
        blocks.append(EquinoxBlock(layers, jax.nn.gelu))

    def forward(blocks, x):
        for block in blocks:
            x = block(x)
        return x

    return forward, blocks, names


# Plain JAX: one matrix of q, k and v, layers stacked on the last axis, a scan over the moved axis.
def plain():
    qkv = jnp.concatenate([W[name] for name in 'qkv'], axis=-1)
    params = {name: jnp.moveaxis(array, 0, -1) for name, array in {**W, 'qkv': qkv}.items() if name not in 'qkv'}
    params['qkv'] = jnp.moveaxis(qkv, 0, -1)

    def block(x, w):
        q, k, v = (norm(x) @ part for part in jnp.split(w['qkv'], 3, axis=-1))
        heads = [array.reshape(*x.shape[:2], HEADS, HEAD_DIM) for array in (q, k, v)]
        x = x + attention(*heads).reshape(x.shape) @ w['o']
        return x + jax.nn.gelu(norm(x) @ w['up']) @ w['down'], None

    def forward(params, x):
        return jax.lax.scan(block, x, jax.tree.map(lambda array: jnp.moveaxis(array, -1, 0), params))[0]

    return forward, params, {name: name for name in params}


MODELS = {'linen': linen, 'nnx': nnx_model, 'equinox': equinox_model, 'plain': plain}


@pytest.mark.parametrize(
    'method', [sl.Wanda(), pytest.param(sl.SparseGPT(block=8), marks=pytest.mark.slow)], ids=['wanda', 'sparsegpt']
)
@pytest.mark.parametrize('library', MODELS)
def test_masks_equal_those_of_our_layout(library, method):
    forward, params, names = MODELS[library]()
    np.testing.assert_allclose(forward(params, X), ours(OURS, X), atol=2e-5)
    stats = sl.collect(ours, OURS, [X], stat=method.statistic)
    _, want = sl.prune_tree(OURS, stats, RULES, method=method)
    theirs = sl.collect(forward, params, [X], stat=method.statistic)
    assert set(theirs) == set(names)
    pruned, masks = sl.prune_tree(params, theirs, RULES, method=method)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    flat = rules.flatten(masks)
    equal = []
    for path, name in names.items():
        axes = theirs[path].axes
        mask = np.asarray(axes.to_matrix(flat[path]))
        expected = np.concatenate([want['blocks'][part]['kernel'] for part in (name if name == 'qkv' else [name])], -1)
        layer = next((int(part) for part in path.split('/') if part.isdigit()), None)
        equal.append(mask == (expected if layer is None else expected[layer]))
    # Products in another order round differently, so a score may tie on one side only.
    assert np.mean(np.concatenate([part.reshape(-1) for part in equal])) >= 0.999
    sl.check_sparse(pruned, masks)
    assert sl.density(masks)['total'] == 0.5


@pytest.mark.parametrize('library', MODELS)
def test_a_pruned_model_runs_and_merges(library):
    forward, params, _ = MODELS[library]()
    pruned, masks = sl.prune_tree(params, sl.collect(forward, params, [X]), [('.*', 0.5)], method=sl.Wanda())
    merged = sl.merge(params, masks)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b) if eqx.is_array(a) else True, merged, pruned))
    assert np.isfinite(forward(pruned, X)).all()


def test_keys_may_be_paths_themselves():
    # Haiku's params: two levels of dicts.
    params = {'block/~/up': {'w': W['up'][0]}, 'block/~/down': {'w': W['down'][0]}}
    nested = {'block': {'~': {'up': {'w': W['up'][0]}, 'down': {'w': W['down'][0]}}}}

    def forward(params, x):
        up, down = params['block/~/up'], params['block/~/down']
        return jax.nn.gelu(x @ up['w']) @ down['w']

    pruned, masks = sl.prune_tree(params, sl.collect(forward, params, [X]), RULES, method=sl.Wanda())
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    assert jax.tree.structure(masks) == jax.tree.structure(nested)
    merged = sl.merge(params, masks)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, merged, pruned))
    sl.check_sparse(pruned, masks)
