"""Activations that wait on the host change no number, and leave the memory of the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparselora_jax as sl
from sparselora_jax.models import llama
from sparselora_jax.models.init import init_params
from sparselora_jax.pruning.offload import HOST, OnHost, to_device, to_host

CFG = llama.LlamaConfig(vocab=11, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)
WIDTH = 48  # of activations that no other array has


def forward(params, x):
    def body(x, w):
        x = x + jnp.tanh(x @ w)
        return x, x.sum(axis=-1)

    x, sums = jax.lax.scan(body, x, params['w'])
    return (x + sums.mean(axis=0)[..., None]) @ params['z']


def setup():
    params = {
        'w': jax.random.normal(jax.random.key(0), (3, WIDTH, WIDTH)) / 7,
        'z': jax.random.normal(jax.random.key(1), (WIDTH, 8)),
    }
    # Arrays of NumPy that share no memory with arrays of JAX.
    batches = list(np.random.default_rng(0).normal(size=(6, 5, WIDTH)).astype(np.float32))
    return params, batches


def test_a_list_on_the_host_is_read_on_the_device():
    items = OnHost({'x': jnp.full(3, number)} for number in range(2))
    assert [item['x'].sharding.memory_kind == HOST for item in items] == [False, False]
    items[0] = {'x': jnp.full(3, 7)}
    items.append({'x': jnp.full(3, 8)})
    assert [int(item['x'][0]) for item in items] == [7, 1, 8]


def test_what_is_no_array_of_jax_stays():
    tree = {'numpy': np.ones(2), 'name': 'x', 'number': 3}
    moved = to_host(tree)
    assert all(moved[name] is leaf for name, leaf in tree.items())
    assert to_host(jnp.ones(2)).sharding.memory_kind == HOST
    assert to_device(to_host(jnp.ones(2))).sharding.memory_kind != HOST


def waiting_on_device(live):
    """Number of activations that are in the memory of a device."""
    return sum(array.shape[-2:] == (5, WIDTH) and array.sharding.memory_kind != HOST for array in live)


@pytest.mark.slow
def test_chunks_of_a_program_wait_on_the_host():
    params, batches = setup()
    most = {}

    def prune(offload):
        counts = []

        def progress(path, done, kernels):
            counts.append(waiting_on_device(jax.live_arrays()))

        result = sl.prune(
            forward, params, batches, [('.*', 0.5)], method=sl.Wanda(), offload=offload, progress=progress
        )
        most[offload] = max(counts)
        return result

    one, other = prune(False), prune(True)
    jax.tree.map(np.testing.assert_array_equal, one.masks, other.masks)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    # Without it, each of the chunks has at least its hidden states on the device; with it, at most one chunk has.
    assert most[False] >= len(batches)
    assert most[True] <= 2


def of_blocks(w, batch, run):
    return llama.forward(w['language'], CFG, batch['x'], batch['valid'], run)


@pytest.mark.slow
@pytest.mark.parametrize('sequential', ['kernel', 'layer'])
@pytest.mark.parametrize('reconstruct', [None, sl.Reconstruct(passes=1, batch=1)])
def test_blocks_are_pruned_and_reconstructed_bit_for_bit_as_without(sequential, reconstruct):
    params = {'language': init_params(jax.random.key(0), llama.shapes(CFG))}
    valid = jnp.arange(6)[None] >= jnp.array([0, 3, 1, 2])[:, None]
    batch = {'x': jax.random.normal(jax.random.key(1), (4, 6, 16)), 'valid': valid}
    rules = [('language/blocks/.*', '2:4'), ('.*', 'dense')]
    options = {'method': sl.Wanda(), 'chunk': 2, 'sequential': sequential, 'reconstruct': reconstruct}
    one, other = (sl.prune(of_blocks, params, [batch], rules, offload=offload, **options) for offload in (False, True))
    jax.tree.map(np.testing.assert_array_equal, one.masks, other.masks)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
