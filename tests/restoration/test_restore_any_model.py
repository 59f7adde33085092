"""LoRA under the masks restores models of other libraries, whatever their trees and the axes of their kernels.

The oracle of the merge is `(W + s*A*B) * M`, an einsum in NumPy over axes that are written down here by hand.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparselora_jax as sl
from sparselora_jax.restoration import restore
from sparselora_jax.sparse import rules

WIDTH = 16
HEADS = 2
HEAD_DIM = WIDTH // HEADS
HIDDEN = 32
LAYERS = 2
RANK = 4
X = jax.random.normal(jax.random.key(0), (4, 5, WIDTH))
# The oracle's subscripts of a kernel and of its factors. A and B are matrices, which it splits into these axes.
HEADS_OUT = 'ir,rhd->ihd'
HEADS_IN = 'hdr,ro->hdo'


# Each model is (forward, params, {path: subscripts}).
class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=HEADS, in_features=WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


def nnx_model():
    graph, state = nnx.split(nnx.List([NnxBlock(nnx.Rngs(layer)) for layer in range(LAYERS)]))

    def forward(state, x):
        for block in nnx.merge(graph, state):
            x = block(x)
        return x

    subscripts = {}
    for layer in range(LAYERS):
        subscripts |= {f'{layer}/attention/{name}/kernel': HEADS_OUT for name in ('query', 'key', 'value')}
        subscripts |= {f'{layer}/attention/out/kernel': HEADS_IN}
        subscripts |= {f'{layer}/{name}/kernel': 'ir,ro->io' for name in ('up', 'down')}
    return forward, state, subscripts


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.tanh(nn.DenseGeneral((HEADS, HEAD_DIM), name='split')(x))
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name='join')(heads)
        return nn.Dense(WIDTH, name='out')(x)


def linen_model():
    model = LinenModel()
    subscripts = {'split/kernel': HEADS_OUT, 'join/kernel': HEADS_IN, 'out/kernel': 'ir,ro->io'}
    params = model.init(jax.random.key(1), X)['params']
    return lambda params, x: model.apply({'params': params}, x), params, subscripts


class EquinoxModel(eqx.Module):
    layers: list
    activation: object

    def __call__(self, x):
        for layer in self.layers:
            x = x + jax.vmap(jax.vmap(layer))(self.activation(x))
        return x


def equinox_model():
    layers = [eqx.nn.Linear(WIDTH, WIDTH, key=jax.random.key(layer)) for layer in range(LAYERS)]
    # The activation is a leaf too, which no compiled function takes.
    params, functions = eqx.partition(EquinoxModel(layers, jax.nn.gelu), eqx.is_array)
    names = {f'layers/{layer}/weight': 'ir,ro->oi' for layer in range(LAYERS)}
    return lambda params, x: eqx.combine(params, functions)(x), params, names


def list_model():
    """A matrix, and a stack whose layers are its last axis and whose outputs come before its inputs."""
    keys = jax.random.split(jax.random.key(2))
    first = jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5
    stack = jax.random.normal(keys[1], (HIDDEN, WIDTH, LAYERS)) / WIDTH**0.5

    def forward(params, x):
        def layer(x, kernel):
            return x + jnp.tanh(x @ kernel.T) @ jnp.ones((HIDDEN, WIDTH)) / HIDDEN, None

        return jax.lax.scan(layer, x @ params[0], jnp.moveaxis(params[1], -1, 0))[0]

    return forward, [first, stack], {'0': 'ir,ro->io', '1': 'lir,lro->oil'}


MODELS = {'list': list_model, 'linen': linen_model, 'nnx': nnx_model, 'equinox': equinox_model}
QUICK = 'equinox'


def merged_by_einsum(kernel, mask, factors, subscripts):
    """`(W + s*A*B) * M` in NumPy, in double precision."""
    letters, result = subscripts.split('->')
    of_a, of_b = letters.split(',')
    sizes = dict(zip(result, kernel.shape, strict=True)) | {'r': RANK}
    a = np.asarray(factors.a, np.float64).reshape([sizes[letter] for letter in of_a])
    b = np.asarray(factors.b, np.float64).reshape([sizes[letter] for letter in of_b])
    return (np.asarray(kernel) + factors.scale * np.einsum(subscripts, a, b)) * np.asarray(mask)


def pruned_model(name):
    forward, params, subscripts = MODELS[name]()
    result = sl.prune(forward, params, [X], [('.*', '2:4')], method=sl.Wanda())
    lora = sl.init_lora(jax.random.key(3), params, [('.*', sl.LoraSpec(RANK, 8))], axes=result.axes)
    return forward, params, result, lora, subscripts


def distil(forward):
    """A loss of somebody else's: the squared distance from the outputs of the dense model."""

    def loss(lora, frozen, x):
        student = forward(sl.merge(frozen.params, frozen.masks, lora), x)
        return jnp.mean((student - forward(frozen.params, x)) ** 2), {}

    return loss


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.slow]) for name in MODELS]
)
def test_lora_under_the_masks_restores_any_model(name):
    forward, params, result, lora, subscripts = pruned_model(name)
    before = jax.tree.map(np.array, (params, result.masks))
    assert set(rules.flatten(lora)) == set(subscripts)
    sl.check_masks(result.masks, [('.*', '2:4')], axes=result.axes)
    tx = optax.adam(1e-2)
    step = sl.make_step(distil(forward), tx)
    state = sl.init_state(lora, tx)
    losses = []
    for _ in range(20):
        state, metrics = step(state, sl.Frozen(params, result.masks), X)
        losses.append(float(metrics['loss']))
    assert losses[-1] < 0.7 * losses[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, before, (params, result.masks)))
    merged = sl.merge(params, result.masks, state.trained)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    sl.check_sparse(merged, result.masks)
    dense = rules.paths_of(params)
    masks = rules.flatten(result.masks)
    for path, leaf in rules.paths_of(merged).items():
        if path not in subscripts:  # biases and norms
            assert leaf is dense[path], path
            continue
        factors = rules.flatten(state.trained)[path]
        want = merged_by_einsum(dense[path], masks[path], factors, subscripts[path])
        np.testing.assert_allclose(leaf, want, atol=1e-5)
        assert jnp.count_nonzero(leaf) == jnp.count_nonzero(masks[path]), path


@pytest.mark.slow
@pytest.mark.parametrize('name', ['list', 'nnx'])
@pytest.mark.parametrize('base', ['packed24', 'int4'])
def test_a_base_in_fewer_bytes_is_trained_under_its_masks(name, base):
    forward, params, result, lora, _ = pruned_model(name)
    frozen = sl.reduce_base(sl.Frozen(result.params, result.masks), base, axes=result.axes)
    plain = sl.Frozen(sl.unpack(frozen.params, jnp.float32), result.masks)

    def loss(lora, frozen, x):  # values of four bits have scales in bf16, so fp32 is asked for
        student = forward(sl.merge(frozen.params, frozen.masks, lora, dtype=jnp.float32), x)
        return jnp.mean((student - 1.0) ** 2), {}

    tx = optax.sgd(0.1)
    step = sl.make_step(loss, tx)
    (got, metrics), (want, expected) = (step(sl.init_state(lora, tx), trees, X) for trees in (frozen, plain))
    np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got.trained, want.trained)
    restored = restore.merge_trained(frozen, got.trained, 'lora', dtype=jnp.float32)
    sl.check_sparse(restored, result.masks)
    assert jax.tree.structure(restored) == jax.tree.structure(params)


def language_model():
    """A forward of tokens over a list: an embedding, which is no kernel, and matrices that it multiplies itself."""
    keys = jax.random.split(jax.random.key(4), 3)
    params = [
        jax.random.normal(keys[0], (13, WIDTH)),
        jax.random.normal(keys[1], (WIDTH, HEADS, HEAD_DIM)) / WIDTH**0.5,
        jax.random.normal(keys[2], (13, HEADS, HEAD_DIM)),
    ]

    def forward(params, batch):
        heads = jnp.tanh(jnp.einsum('btd,dhk->bthk', params[0][batch['tokens']], params[1]))
        return jnp.einsum('bthk,vhk->btv', heads, params[2])

    tokens = jax.random.randint(jax.random.key(5), (4, 6), 0, 13)
    return forward, params, {'tokens': tokens, 'targets': tokens, 'answer': jnp.ones((4, 6), bool)}


AXES = {
    '1': sl.KernelAxes(layers=(), inputs=(0,), outputs=(1, 2)),
    '2': sl.KernelAxes(layers=(), inputs=(1, 2), outputs=(0,)),
}


@pytest.mark.slow
@pytest.mark.parametrize('trained', ['lora', pytest.param('weights', marks=pytest.mark.slow)])
def test_the_step_of_the_paper_trains_a_forward_that_reads_plain_arrays(trained):
    forward, params, batch = language_model()
    masks = {'1': jnp.broadcast_to((jnp.arange(WIDTH) % 2 == 0)[:, None, None], params[1].shape)}
    tx = optax.adam(1e-2)
    step = sl.make_train_step(forward, tx, kd=0.5, trained=trained, combine='merge')
    first = {
        'lora': sl.init_lora(jax.random.key(6), params, [('.*', (RANK, 8))], axes=AXES),
        'weights': restore.pruned_kernels(params, masks),
    }
    frozen = sl.Frozen(params, masks)
    state = sl.init_state(first[trained], tx)
    seen = []
    for _ in range(20):
        state, metrics = step(state, frozen, batch)
        seen.append(metrics)
    assert float(seen[-1]['loss']) < float(seen[0]['loss'])
    # The teacher is the dense model: its distance from the student at the start is that of pruning alone.
    pruned = forward(sl.merge(params, masks), batch)
    logits = forward(params, batch)
    teacher = jax.nn.log_softmax(logits / 2.0)
    kl = jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(pruned / 2.0)), -1).mean()
    np.testing.assert_allclose(seen[0]['kl'], kl, rtol=1e-4)
    restored = restore.merge_trained(frozen, state.trained, trained)
    sl.check_sparse(restored, masks)
    assert restored[0] is params[0]


def test_options_of_linear_are_refused_where_a_step_merges():
    for option in ({'gradient': 'straight_through'}, {'parts': 2}):
        with pytest.raises(restore.RestoreError, match="options of linear, which combine='merge' does not use"):
            sl.make_train_step(lambda w, batch: w, optax.sgd(0.1), combine='merge', **option)
    with pytest.raises(restore.RestoreError, match="combine 'add': expected one of bind, merge"):
        sl.make_train_step(lambda w, batch: w, optax.sgd(0.1), combine='add')
