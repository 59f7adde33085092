"""Contracts of bind and merge, and the gradients of the combined matmul against plain autodiff and finite algebra."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

import sparselora_jax as sl
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.linear import multiply


def make(dtype=jnp.float32, layers=2, inputs=16, outputs=12, rank=3):
    keys = jax.random.split(jax.random.key(0), 4)
    kernel = jax.random.normal(keys[0], (layers, inputs, outputs), dtype)
    params = {'blocks': {'q': {'kernel': kernel, 'bias': jnp.zeros((layers, outputs), dtype)}}}
    masks = {'blocks': {'q': {'kernel': sl.mask_from_scores(jnp.abs(kernel).astype(jnp.float32), '2:4')}}}
    lora = sl.init_lora(keys[1], params, [('.*', sl.LoraSpec(rank, 6))])
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(keys[2], x.shape), lora)
    return params, masks, lora


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_merged_weights_equal_the_ones_trained_with_and_keep_every_zero(dtype):
    params, masks, lora = make(dtype)
    merged = sl.merge(params, masks, lora)
    sl.check_sparse(merged, masks)
    kept = masks['blocks']['q']['kernel']
    assert jnp.count_nonzero(merged['blocks']['q']['kernel']) == jnp.count_nonzero(kept)
    bound = sl.bind(params, masks, lora)['blocks']['q']['kernel']
    identity = jnp.eye(16, dtype=dtype)
    for layer in range(2):
        read = sl.linear(identity, jax.tree.map(lambda leaf, layer=layer: leaf[layer], bound))
        assert jnp.array_equal(read, merged['blocks']['q']['kernel'][layer])


def test_plain_lora_merges_dense():
    params, masks, lora = make()
    mask, factors = masks['blocks']['q']['kernel'], lora['blocks']['q']['kernel']
    pruned = sl.effective_weight(params['blocks']['q']['kernel'], mask)
    assert jnp.count_nonzero(pruned + factors.scale * factors.a @ factors.b) > jnp.count_nonzero(mask)


def losses(params, masks, gradient):
    x = jax.random.normal(jax.random.key(5), (4, 5, 16))
    target = jax.random.normal(jax.random.key(6), (2, 4, 5, 12))

    def through_linear(lora, x):
        weights = sl.bind(params, masks, lora, gradient=gradient)['blocks']['q']
        _, y = jax.lax.scan(lambda _, w: (None, sl.linear(x, w['kernel'], w['bias'])), None, weights)
        return jnp.sum((y - target) ** 2)

    def through_merge(lora, x):
        kernel = sl.merge(params, masks, lora)['blocks']['q']['kernel']
        return jnp.sum((jnp.einsum('bti,lio->lbto', x, kernel) - target) ** 2)

    return through_linear, through_merge, x


@pytest.mark.parametrize('masked', [True, False])
def test_exact_gradient_equals_autodiff_of_the_merged_weight(masked):
    params, masks, lora = make()
    ours, oracle, x = losses(params, masks if masked else None, 'exact')
    got, want = (jax.grad(f, argnums=(0, 1))(lora, x) for f in (ours, oracle))
    jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-3) or pytest.fail(f'{a} != {b}'), got, want)


def test_straight_through_is_masked_forward_with_the_backward_of_a_full_mask():
    params, masks, lora = make()
    kernel, mask = (tree['blocks']['q']['kernel'][0] for tree in (params, masks))
    factors = jax.tree.map(lambda leaf: leaf[0], lora['blocks']['q']['kernel'])
    x, g = jax.random.normal(jax.random.key(1), (7, 16)), jax.random.normal(jax.random.key(2), (7, 12))
    y, vjp = jax.vjp(lambda x, f: sl.linear(x, sl.Adapted(kernel, mask, f, 'straight_through')), x, factors)
    dx, grads = vjp(g)
    effective = sl.effective_weight(kernel, mask, factors)
    assert jnp.allclose(y, x @ effective, atol=1e-4)
    assert jnp.allclose(dx, g @ effective.T, atol=1e-4)
    assert jnp.allclose(grads.a, factors.scale * x.T @ g @ factors.b.T, atol=1e-3)
    assert jnp.allclose(grads.b, factors.scale * factors.a.T @ x.T @ g, atol=1e-3)


@pytest.mark.slow
def test_backward_does_not_hold_the_combined_weights_of_all_layers():
    """The compiler's own count: temporary memory grows with layers by less than a kernel a layer."""

    def temporary(layers):
        params, masks, lora = make(layers=layers, inputs=256, outputs=256)

        def loss(lora, params, masks, x):
            weights = sl.bind(params, masks, lora)['blocks']['q']
            y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(sl.linear(x, w['kernel'], w['bias'])), None), x, weights)
            return jnp.sum(y)

        compiled = jax.jit(jax.grad(loss)).lower(lora, params, masks, jnp.ones((2, 256))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    kernel_bytes = 256 * 256 * 4
    assert temporary(34) - temporary(2) < 32 * kernel_bytes / 4


def test_rules_select_what_is_adapted():
    params = {'a': {'kernel': jnp.ones((4, 4))}, 'b': {'kernel': jnp.ones((4, 4)), 'bias': jnp.ones(4)}}
    lora = sl.init_lora(jax.random.key(0), params, [('a/.*', (2, 4)), ('.*', None)])
    assert list(rules.flatten(lora)) == ['a/kernel']
    assert lora['a']['kernel'].scale == 2.0
    assert not lora['a']['kernel'].b.any()


def test_any_tree_whose_model_calls_linear_is_bound():
    keys = jax.random.split(jax.random.key(0))
    params = [jax.random.normal(key, (8, 8)) for key in keys]
    masks = {str(layer): sl.mask_from_scores(jnp.abs(kernel), '2:4') for layer, kernel in enumerate(params)}
    axes = {'0': sl.KernelAxes.of_stack(2)}
    lora = sl.init_lora(keys[0], params, [('.*', (2, 4))], axes=axes)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, lora)

    def forward(kernels):
        return sl.linear(jnp.tanh(sl.linear(jnp.eye(8), kernels[0])), kernels[1])

    assert list(lora) == ['0']  # the other leaf is no kernel
    bound = sl.bind(params, masks, lora)
    assert [type(kernel) for kernel in bound] == [sl.Adapted, sl.Masked]
    assert jnp.allclose(forward(bound), forward(sl.merge(params, masks, lora)), atol=1e-5)


@pytest.mark.parametrize('tree', ['masks', 'lora'])
def test_tree_that_does_not_fit_is_refused_by_path(tree):
    params, masks, lora = make()
    cut = {'blocks': {'q': {'kernel': masks['blocks']['q']['kernel'][:, :4]}}}
    moved = {'blocks': {'k': lora['blocks']['q']}}
    trees = {'masks': None, 'lora': None} | {tree: {'masks': cut, 'lora': moved}[tree]}
    with pytest.raises(ValueError, match=r'blocks/.*/kernel'):
        sl.merge(params, trees['masks'], trees['lora'])


def test_unknown_kind_of_kernel_is_refused():
    with pytest.raises(TypeError, match='str'):
        sl.linear(jnp.ones((1, 2)), 'kernel')


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagonal:
    """A kind of kernel of somebody else's."""

    scale: jax.Array


@multiply.register(Diagonal)
def _(kernel, x):
    return x * kernel.scale


def test_a_kind_of_kernel_of_ones_own_is_registered():
    got = sl.linear(jnp.ones((1, 3)), Diagonal(jnp.arange(3.0)), jnp.ones(3))
    assert got.tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.int32])
def test_a_mask_of_numbers_is_refused(dtype):
    params, masks, _ = make()
    numbers = jax.tree.map(lambda mask: mask.astype(dtype), masks)
    for combine in (sl.bind, sl.merge):
        with pytest.raises(rules.RuleError, match=f'blocks/q/kernel: the mask is an array of {jnp.dtype(dtype)}'):
            combine(params, numbers)
    with pytest.raises(sl.PatternError, match=f'blocks/q/kernel: the mask is {jnp.dtype(dtype)}'):
        sl.check_sparse(params, numbers)


def test_factors_of_two_ranks_are_refused():
    params, _, lora = make()
    factors = lora['blocks']['q']['kernel']
    lora['blocks']['q']['kernel'] = sl.Lora(factors.a[..., :2], factors.b, factors.scale)
    with pytest.raises(rules.RuleError, match='blocks/q/kernel: LoRA factors'):
        sl.bind(params, None, lora)
