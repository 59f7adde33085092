"""Runners differ in cost, never in result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.models import layers, llama, runners
from sparselora_jax.models.init import init_params

CFG = llama.LlamaConfig(vocab=11, width=32, depth=8, heads=4, kv_heads=2, mlp_width=64)
PARAMS = init_params(jax.random.key(0), llama.shapes(CFG))
X, VALID = jax.random.normal(jax.random.key(1), (2, 64, 32)), jnp.ones((2, 64), bool)


def compiled(run):
    return jax.jit(jax.grad(lambda w: jnp.sum(llama.forward(w, CFG, X, VALID, run) ** 2))).lower(PARAMS).compile()


def test_remat_has_the_gradients_of_scan_and_needs_less_memory():
    scan, remat = compiled(runners.scan_blocks), compiled(runners.remat_blocks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), scan(PARAMS), remat(PARAMS))
    memory = [f.memory_analysis().temp_size_in_bytes for f in (scan, remat)]
    assert memory[1] < 0.6 * memory[0]


def test_unrolled_blocks_have_the_output_of_scan():
    x, ctx = llama.embed({}, CFG, X, layers.causal_view(VALID))

    def block(w, x, ctx, cache):
        return llama.block(w, CFG, x, ctx, cache)

    scanned, _ = runners.scan_blocks('language', block, PARAMS['blocks'], x, ctx)
    unrolled, caches = runners.unrolled_blocks('language', block, runners.unstack(PARAMS['blocks']), x, ctx)
    np.testing.assert_allclose(unrolled, scanned, atol=1e-5)
    assert caches == (None,) * CFG.depth


@pytest.mark.slow
def test_packed_kernels_are_copied_out_of_their_stack_on_cpus_alone():
    _, masks = sl.prune_tree(PARAMS, None, [('.*', '2:4')], method=sl.Magnitude())
    traced = jax.jit(lambda w: llama.forward(w, CFG, X, VALID)).trace(sl.pack(PARAMS, masks))
    lowered = {on: traced.lower(lowering_platforms=(on,)).as_text() for on in ('cpu', 'tpu', 'cuda')}
    branches = {on: text.count('stablehlo.case') for on, text in lowered.items()}  # others choose a platform
    assert branches['tpu'] == branches['cuda'] == branches['cpu'] - len(jax.tree.leaves(masks))
