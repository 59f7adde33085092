"""ECoFLaP's scores: gradients by hand, and numpy with the same noise; what they take of memory and of compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.models import llama
from sparselora_jax.models.init import init_params
from sparselora_jax.models.runners import remat_blocks, scan_blocks
from sparselora_jax.pruning import calibrate, ecoflap
from sparselora_jax.sparse import rules, sharding

CFG = llama.LlamaConfig(vocab=11, width=16, depth=3, heads=4, kv_heads=2, mlp_width=24)
PATHS = [f'language/blocks/{name}/kernel' for name in ('attn/q', 'attn/o', 'mlp/up', 'mlp/down')]


def loss(w, batch, run):
    hidden = llama.forward(w['language'], CFG, batch['x'], batch['valid'], run)
    return jnp.mean((hidden - batch['y']) ** 2)


def setup(cfg=CFG, tokens=6):
    params = {'language': init_params(jax.random.key(0), llama.shapes(cfg))}
    batches = [
        {
            'x': jax.random.normal(jax.random.key(i), (4, tokens, cfg.width)),
            'y': jax.random.normal(jax.random.key(10 + i), (4, tokens, cfg.width)),
            'valid': jnp.ones((4, tokens), bool),
        }
        for i in (1, 2, 3)
    ]
    return params, batches


@pytest.mark.slow
def test_first_order_scores_are_those_of_whole_gradients():
    params, batches = setup()
    got = pruning.first_order_scores(loss, params, batches, PATHS)
    gradient = jax.jit(jax.grad(lambda w, b: loss(w, b, scan_blocks)))
    gradients = [rules.flatten(gradient(params, b)) for b in batches]
    flat = rules.flatten(params)
    assert list(got) == PATHS
    for path in PATHS:
        mean = sum(np.abs(np.asarray(g[path], np.float64)) for g in gradients) / len(batches)
        for layer in range(CFG.depth):
            want = (np.abs(np.asarray(flat[path][layer], np.float64)) * mean[layer]).sum()
            assert got[path][layer] == pytest.approx(want, rel=1e-5)


def mlp_loss(w, batch, run):
    """Two towers of one small block each; only what a runner needs."""

    def block(w, x, ctx, cache):
        return x + jnp.tanh(x @ w['in']['kernel']) @ w['out']['kernel'], cache

    x, _ = run('first', block, w['first']['blocks'], batch['x'], {})
    x, _ = run('second', block, w['second']['blocks'], x, {})
    return jnp.mean((x - batch['y']) ** 2)


def numpy_mlp_loss(flat, batch):
    x = np.asarray(batch['x'])
    for tower in ('first', 'second'):
        into, out = (flat[f'{tower}/blocks/{name}/kernel'] for name in ('in', 'out'))
        for layer in range(len(into)):
            x = x + np.tanh(x @ into[layer]) @ out[layer]
    return np.mean((x - np.asarray(batch['y'])) ** 2)


def draw(key, kernel):
    """The noise of a kernel, input by input."""
    keys = [jax.random.fold_in(key, row) for row in range(len(kernel))]
    return np.stack([jax.random.normal(of_row, kernel.shape[1:], kernel.dtype) for of_row in keys])


def test_zeroth_order_scores_are_numpys_with_the_same_noise():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {'first': (2, 5, 7), 'second': (3, 5, 4)}
        flat = {f'{t}/blocks/in/kernel': rng.normal(size=s) for t, s in shapes.items()}
        flat |= {f'{t}/blocks/out/kernel': rng.normal(size=(s[0], s[2], s[1])) for t, s in shapes.items()}
        params = jax.tree.map(jnp.asarray, rules.unflatten(flat))
        batches = [{name: jnp.asarray(rng.normal(size=(6, 5))) for name in 'xy'} for _ in range(2)]
        paths, key, eps = list(flat)[1:], jax.random.key(7), 1e-3
        got = pruning.zeroth_order_scores(mlp_loss, params, batches, paths, key=key, eps=eps)
        for k, path in enumerate(paths):
            for layer in range(len(flat[path])):
                estimates = []
                for b, batch in enumerate(batches):
                    of_batch = key
                    for index in (k, layer, b):
                        of_batch = jax.random.fold_in(of_batch, index)
                    z = draw(of_batch, flat[path][layer])
                    sides = []
                    for sign in (1, -1):
                        moved = {p: leaf.copy() for p, leaf in flat.items()}
                        moved[path][layer] += sign * eps * z
                        sides.append(numpy_mlp_loss(moved, batch))
                    estimates.append(abs(sides[0] - sides[1]) / (2 * eps))
                assert got[path][layer] == pytest.approx(np.mean(estimates), rel=1e-7), (path, layer)


@pytest.mark.slow
def test_the_zeroth_order_estimates_the_gradient_along_the_noise():
    params, batches = setup()
    path, key = PATHS[2], jax.random.key(3)
    got = pruning.zeroth_order_scores(loss, params, batches[:1], [path], key=key, eps=1e-2)[path]
    gradient = rules.flatten(jax.jit(jax.grad(lambda w: loss(w, batches[0], scan_blocks)))(params))[path]
    for layer in range(CFG.depth):
        of_batch = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 0), layer), 0)
        along = abs(np.sum(np.asarray(gradient[layer]) * draw(of_batch, gradient[layer])))
        assert got[layer] == pytest.approx(along, rel=0.02, abs=1e-4)


@pytest.mark.slow
def test_one_compilation_serves_all_kernels_and_layers():
    params, batches = setup()
    step = ecoflap.make_zeroth_order(loss, tuple(PATHS), eps=1e-3)
    scores = {
        float(step(params, batches[0], np.int32(kernel), np.int32(layer), jax.random.key(0)))
        for kernel in range(len(PATHS))
        for layer in range(CFG.depth)
    }
    assert step._cache_size() == 1
    assert len(scores) == len(PATHS) * CFG.depth


@pytest.mark.slow
def test_bf16_weights_are_scored_in_fp32():
    params, batches = setup()
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def low_loss(w, batch, run):
        x, y = (batch[name].astype(jnp.bfloat16) for name in 'xy')
        hidden = llama.forward(w['language'], CFG, x, batch['valid'], run)
        return jnp.mean((hidden - y).astype(jnp.float32) ** 2)

    want = pruning.first_order_scores(loss, params, batches, PATHS)
    got = pruning.first_order_scores(low_loss, low, batches, PATHS)
    for path in PATHS:
        np.testing.assert_allclose(got[path], want[path], rtol=0.1)
    zeroth = pruning.zeroth_order_scores(low_loss, low, batches[:1], PATHS[:1], key=jax.random.key(0), eps=1e-2)
    assert np.isfinite(zeroth[PATHS[0]]).all()


def test_what_cannot_be_scored_is_named():
    params, batches = setup()
    for scores in (
        lambda batches, paths: pruning.first_order_scores(loss, params, batches, paths),
        lambda batches, paths: pruning.zeroth_order_scores(loss, params, batches, paths, key=jax.random.key(0)),
    ):
        with pytest.raises(calibrate.CalibrationError, match='empty'):
            scores([], PATHS)
        with pytest.raises(rules.RuleError, match='language/embed: not inside the blocks'):
            scores(batches, ['language/embed'])


@pytest.mark.compiled
def test_memory_of_the_zeroth_order_is_that_of_the_forward_and_the_first_holds_no_gradients(optimised):
    """XLA's own count of what a program takes beside its arguments, params among them."""
    cfg = llama.LlamaConfig(vocab=11, width=128, depth=8, heads=4, kv_heads=4, mlp_width=512)
    params, batches = setup(cfg, tokens=16)
    batch = batches[0]
    paths = [path for path in rules.kernels(params) if '/blocks/' in path]

    def of_cfg(w, batch, run):
        hidden = llama.forward(w['language'], cfg, batch['x'], batch['valid'], run)
        return jnp.mean((hidden - batch['y']) ** 2)

    def taken(f, *args):
        found = jax.jit(f).lower(*args).compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes

    flat = rules.flatten(params)
    kernel = max(flat[path][0].nbytes for path in paths)
    forward = taken(lambda w, b: of_cfg(w, b, scan_blocks), params, batch)
    step = ecoflap.make_zeroth_order(of_cfg, tuple(paths), eps=1e-3)
    zeroth = taken(step, params, batch, np.int32(0), np.int32(0), jax.random.key(0))
    taps = {path: jnp.zeros(cfg.depth) for path in paths}
    first = taken(ecoflap.make_first_order(of_cfg), params, batch, taps)
    plain = taken(jax.grad(lambda w: of_cfg(w, batch, remat_blocks)), params)
    assert zeroth <= forward + kernel + 2**16
    assert first < plain / 2


@pytest.mark.slow
def test_sharded_params_have_the_same_scores():
    params, batches = setup()
    sharded = sharding.shard(params, sharding.make_mesh(data=1, fsdp=2, tensor=2))
    for score in (
        lambda params: pruning.first_order_scores(loss, params, batches, PATHS),
        lambda params: pruning.zeroth_order_scores(loss, params, batches, PATHS[:1], key=jax.random.key(0), eps=1e-2),
    ):
        want = score(params)
        for path, scores in score(sharded).items():
            np.testing.assert_allclose(scores, want[path], rtol=1e-3, atol=1e-4)
