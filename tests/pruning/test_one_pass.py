"""One pass gives the kernels of the definition: each is pruned on the inputs that the pruned kernels before it make."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_any_model import MODELS, X, plain

import sparselora_jax as sl
from sparselora_jax.pruning.calibrate import CalibrationError
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.rules import paths_of, with_leaves

PATTERN = [('.*', 0.5)]


def prune_group_by_group(forward, params, batches, order, method):
    """The definition: collect on the whole forward, prune the next group of kernels, and begin again."""
    masks = {}
    for group in order:
        stats = sl.collect(forward, params, batches, stat=method.statistic, select=group.__contains__)
        rules = [('|'.join(group), 0.5), ('.*', 'dense')]
        pruned, of_group = sl.prune_tree(params, stats, rules, method=method)
        params = with_leaves(params, {path: paths_of(pruned)[path] for path in group})
        masks |= paths_of(of_group)
    return params, masks


def half_of_wanda(kernel, rows):
    """The mask of Wanda at a sparsity of 0.5, from the rows that the kernel reads."""
    scores = np.abs(np.asarray(kernel, np.float64)) * np.linalg.norm(np.asarray(rows, np.float64), axis=0)[:, None]
    return np.argsort(np.argsort(scores, axis=0), axis=0) >= len(kernel) // 2


def two_layers(seed=0):
    """(forward, params, the groups of kernels in order): gate and up share an input, and `w` is read transposed."""
    shapes = {'gate': (16, 24), 'up': (16, 24), 'down': (24, 16), 'w': (8, 16)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def forward(params, x):
        x = x + (jax.nn.silu(x @ params['gate']) * (x @ params['up'])) @ params['down']
        return jnp.tanh(x) @ params['w'].T

    return forward, params, [('gate', 'up'), ('down',), ('w',)]


@pytest.mark.parametrize('method', [sl.Wanda(), pytest.param(sl.SparseGPT(block=8), marks=pytest.mark.slow)])
def test_kernels_are_those_of_pruning_group_by_group(method):
    forward, params, order = two_layers()
    batches = [jax.random.normal(jax.random.key(i), (4, 5, 16)) for i in range(3)]
    want, masks = prune_group_by_group(forward, params, batches, order, method)
    got = sl.prune(forward, params, batches, PATTERN, method=method)
    assert got.masks.keys() == masks.keys()
    for path, mask in masks.items():
        np.testing.assert_array_equal(got.masks[path], mask)
        np.testing.assert_allclose(got.params[path], want[path], rtol=1e-4, atol=1e-5)
    assert got.tokens == dict.fromkeys(params, 3 * 4 * 5)


@pytest.mark.slow
@pytest.mark.parametrize('library', MODELS)
def test_models_of_any_library_have_the_masks_of_the_same_weights_in_plain_jax(library):
    forward, params, _ = MODELS[library]()
    want = sl.prune(plain()[0], plain()[1], [X], PATTERN, method=sl.Wanda())
    got = sl.prune(forward, params, [X], PATTERN, method=sl.Wanda())
    sl.check_sparse(got.params, got.masks)
    error = [
        float(jnp.linalg.norm(f(p, X) - forward(params, X)))
        for f, p in ((forward, got.params), (plain()[0], want.params))
    ]
    np.testing.assert_allclose(*error, rtol=1e-3)


def test_a_scan_is_walked_layer_by_layer_like_a_loop_in_python():
    layers = jax.random.normal(jax.random.key(0), (3, 16, 16)) / 4

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params['w'])[0]

    def unrolled(params, x):
        for layer in range(3):
            x = x + jnp.tanh(x @ params['w'][layer])
        return x

    batches = [jax.random.normal(jax.random.key(i), (6, 16)) for i in range(2)]
    params = {'w': layers}
    one, other = (
        sl.prune(f, params, batches, [('.*', '2:4')], method=sl.SparseGPT(block=8)) for f in (scanned, unrolled)
    )
    jax.tree.map(np.testing.assert_array_equal, one.masks, other.masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one.params, other.params)


@pytest.mark.parametrize('reverse', [False, True])
def test_a_scan_has_its_outputs_and_its_order(reverse):
    """The stacked outputs of a loop, and a loop from the last layer to the first, feed the kernel behind it."""
    params = {
        'w': jax.random.normal(jax.random.key(0), (3, 16, 16)) / 4,
        'z': jax.random.normal(jax.random.key(1), (48, 8)),
    }

    def scanned(params, x):
        def body(x, w):
            x = x + jnp.tanh(x @ w)
            return x, x

        _, every = jax.lax.scan(body, x, params['w'], reverse=reverse)
        return every.transpose(1, 0, 2).reshape(len(x), -1) @ params['z']

    def unrolled(params, x):
        every = [None] * 3
        for layer in reversed(range(3)) if reverse else range(3):
            x = x + jnp.tanh(x @ params['w'][layer])
            every[layer] = x
        return jnp.concatenate(every, axis=-1) @ params['z']

    batches = [jax.random.normal(jax.random.key(i), (6, 16)) for i in range(2)]
    one, other = (sl.prune(f, params, batches, PATTERN, method=sl.Wanda()) for f in (scanned, unrolled))
    jax.tree.map(np.testing.assert_array_equal, one.masks, other.masks)


def test_a_kernel_that_a_loop_reads_again_and_again_is_pruned_before_the_loop():
    params = {'w': jax.random.normal(jax.random.key(0), (16, 16)) / 4}

    def forward(params, x):
        return jax.lax.fori_loop(0, 3, lambda _, x: x + jnp.tanh(x @ params['w']), x)

    batches = [jax.random.normal(jax.random.key(1), (6, 16))]
    got = sl.prune(forward, params, batches, PATTERN, method=sl.Wanda())
    _, want = sl.prune_tree(params, sl.collect(forward, params, batches), PATTERN, method=sl.Wanda())
    np.testing.assert_array_equal(got.masks['w'], want['w'])
    assert got.tokens == {'w': 18}


@pytest.mark.slow
def test_experts_are_pruned_one_by_one():
    params = {
        'w': jax.random.normal(jax.random.key(0), (4, 8, 16)),
        'o': jax.random.normal(jax.random.key(1), (4, 16, 8)),
    }

    def forward(params, x):  # [experts, tokens, inputs]
        x = jax.nn.relu(jnp.einsum('eti,eio->eto', x, params['w']))
        return jnp.einsum('eti,eio->eto', x, params['o'])

    batches = [jax.random.normal(jax.random.key(2), (4, 10, 8))]
    want, masks = prune_group_by_group(forward, params, batches, [('w',), ('o',)], sl.SparseGPT(block=8))
    got = sl.prune(forward, params, batches, PATTERN, method=sl.SparseGPT(block=8))
    jax.tree.map(np.testing.assert_array_equal, got.masks, masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got.params, want)


def test_batches_of_other_sizes_are_chunks_too():
    forward, params, _ = two_layers()
    x = jax.random.normal(jax.random.key(0), (7, 5, 16))
    whole = sl.prune(forward, params, [x], PATTERN, method=sl.Wanda())
    parts = sl.prune(forward, params, [x[:3], x[3:6], x[6:]], PATTERN, method=sl.Wanda())
    jax.tree.map(np.testing.assert_array_equal, whole.masks, parts.masks)


@pytest.mark.slow
def test_blocks_of_equal_structure_are_compiled_once():
    compiled = []

    def count(event, seconds, **_):
        if event == '/jax/core/compile/backend_compile_duration':
            compiled.append(event)

    def forward(params, x):
        for name in sorted(params):
            x = x + jnp.tanh(x @ params[name])
        return x

    def number(layers):
        params = {f'w{i}': jax.random.normal(jax.random.key(i), (16, 16)) / 4 for i in range(layers)}
        before = len(compiled)
        sl.prune(forward, params, [jnp.ones((4, 16))], PATTERN, method=sl.Wanda())
        return len(compiled) - before

    jax.monitoring.register_event_duration_secs_listener(count)
    few = number(3)
    jax.clear_caches()
    assert number(3) == number(9) or few >= number(9)


def stacked():
    """(forward, params): three layers in a scan, two experts that one product reads, and a kernel alone."""
    params = {
        'w': jax.random.normal(jax.random.key(0), (3, 16, 16)) / 4,
        'experts': jax.random.normal(jax.random.key(1), (2, 16, 16)) / 4,
        'z': jax.random.normal(jax.random.key(2), (16, 8)),
    }

    def forward(params, x):
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params['w'])
        x = x + jnp.einsum('bi,eio->beo', x, params['experts']).sum(axis=1)
        return x @ params['z']

    return forward, params


@pytest.mark.slow
def test_layers_may_be_taken_as_soon_as_they_are_pruned():
    forward, params = stacked()
    batches = [jax.random.normal(jax.random.key(i), (6, 16)) for i in range(2)]
    want = sl.prune(forward, params, batches, PATTERN, method=sl.Wanda())
    taken = {}

    def keep(path, layer, kernel, mask):
        taken[path, layer] = kernel, mask

    got = sl.prune(forward, params, batches, PATTERN, method=sl.Wanda(), keep=keep)
    assert got.masks == {}
    assert all(got.params[name] is leaf for name, leaf in params.items())
    assert got.tokens == want.tokens
    assert taken.keys() == {('w', 0), ('w', 1), ('w', 2), ('experts', 0), ('z', 0)}
    for (path, layer), (kernel, mask) in taken.items():
        place = layer if path == 'w' else ...
        np.testing.assert_array_equal(kernel, want.params[path][place])
        np.testing.assert_array_equal(mask, want.masks[path][place])


@pytest.mark.slow
def test_layers_of_arrays_of_numpy_may_be_overwritten_as_they_are_pruned():
    forward, params = stacked()
    batches = [jax.random.normal(jax.random.key(0), (6, 16))]
    want = sl.prune(forward, params, batches, PATTERN, method=sl.Wanda())
    stack = np.array(params['w'])

    def keep(path, layer, kernel, mask):
        if path == 'w':
            stack[layer] = kernel

    sl.prune(forward, params | {'w': stack}, batches, PATTERN, method=sl.Wanda(), keep=keep)
    np.testing.assert_array_equal(stack, want.params['w'])


@pytest.mark.slow
@pytest.mark.parametrize('method', [sl.Wanda(), sl.SparseGPT(block=8)])
def test_a_program_on_a_mesh_differs_in_near_ties_at_most(method):
    forward, params = stacked()
    batches = [jax.random.normal(jax.random.key(i), (8, 16)) for i in range(2)]
    mesh = sharding.make_mesh(data=2, fsdp=2)
    split = [sharding.shard_batch({'x': batch}, mesh)['x'] for batch in batches]
    one, other = (sl.prune(forward, params, rows, PATTERN, method=method) for rows in (batches, split))
    masks = [np.concatenate([np.ravel(mask) for mask in jax.tree.leaves(result.masks)]) for result in (one, other)]
    assert np.mean(masks[0] != masks[1]) <= 1e-3


def test_what_a_program_cannot_do_is_said():
    forward, params, _ = two_layers()
    for options, said in (
        ({'sequential': 'layer'}, "sequential='layer' needs a forward with blocks"),
        ({'reconstruct': sl.Reconstruct()}, 'reconstruct needs a forward with blocks'),
        ({'sequential': 'block'}, "sequential 'block': expected one of kernel, layer"),
    ):
        with pytest.raises(CalibrationError, match=said):
            sl.prune(forward, params, [jnp.ones((4, 16))], PATTERN, method=sl.Wanda(), **options)


def test_nan_names_the_kernel_and_its_layer():
    def forward(params, x):
        return jax.lax.scan(lambda x, w: (x @ w[0] + w[1], None), x, (params['w'], params['bias']))[0]

    params = {'w': jnp.ones((3, 16, 16)), 'bias': jnp.zeros((3, 16)).at[1, 0].set(jnp.nan)}
    rules = [('w', 0.5), ('.*', 'dense')]
    with pytest.raises(CalibrationError, match='w, layer 2: activations are not finite'):
        sl.prune(forward, params, [jnp.ones((4, 16))], rules, method=sl.Wanda())


def test_pads_weigh_nothing_wherever_rows_are_tokens():
    forward, params, _ = two_layers()
    x = jax.random.normal(jax.random.key(0), (3, 5, 16))
    batch = {'x': x, 'mask': jnp.arange(5) < jnp.array([[5], [3], [4]])}
    other = batch | {'x': jnp.where(batch['mask'][..., None], x, 100.0)}
    results = [
        sl.prune(lambda p, b: forward(p, b['x']), params, [b], PATTERN, method=sl.Wanda(), weights='mask')
        for b in (batch, other)
    ]
    jax.tree.map(np.testing.assert_array_equal, *[result.masks for result in results])
    assert results[0].tokens == dict.fromkeys(params, 12)


def test_tokens_that_are_pooled_count_every_row(caplog):
    params = {'a': jax.random.normal(jax.random.key(0), (16, 16)), 'b': jax.random.normal(jax.random.key(1), (16, 8))}

    def forward(params, batch):
        return jnp.mean(jnp.tanh(batch['x'] @ params['a']), axis=1) @ params['b']

    batch = {'x': jnp.ones((3, 5, 16)), 'mask': jnp.ones((3, 5), bool)}
    result = sl.prune(forward, params, [batch], PATTERN, method=sl.Magnitude(), weights='mask')
    assert result.tokens == {'a': 15, 'b': 3}
    assert [line for line in caplog.messages if line.startswith('weights of tokens do not fit the rows of b')]


def test_a_layer_that_is_sliced_out_again_later_is_the_pruned_one():
    params = {'w': jax.random.normal(jax.random.key(0), (2, 16, 16)) / 4, 'z': jnp.eye(16)}

    def forward(params, x):
        for layer in (0, 1, 0):  # the first layer is used twice
            x = x + jnp.tanh(x @ params['w'][layer])
        return x @ params['z']

    batch = jax.random.normal(jax.random.key(1), (40, 16))
    rules = [('w', '2:4'), ('z', 0.5)]
    got = sl.prune(forward, params, [batch], rules, method=sl.Wanda())
    # The last kernel is calibrated on the outputs of pruned layers alone.
    stats = sl.collect(forward, got.params | {'z': params['z']}, [batch], select='z'.__eq__)
    _, want = sl.prune_tree(params, stats, [('z', 0.5), ('.*', 'dense')], method=sl.Wanda())
    np.testing.assert_array_equal(got.masks['z'], want['z'])


def test_a_stack_that_is_read_as_a_whole_and_by_layer_is_named():
    params = {'w': jnp.ones((2, 16, 16))}

    def forward(params, x):
        return jnp.einsum('lti,lio->lto', x, params['w'])[0] @ params['w'][0]

    with pytest.raises(CalibrationError, match=r'w: .*make it dense'):
        sl.prune(forward, params, [jnp.ones((2, 4, 16))], PATTERN, method=sl.Wanda())


def test_numbers_in_a_batch_are_those_of_each_batch():
    params = {'w': jax.random.normal(jax.random.key(0), (16, 8))}
    batches = [(jax.random.normal(jax.random.key(i), (4, 16)), 10.0 ** (3 * i)) for i in range(2)]
    got = sl.prune(lambda p, batch: jnp.tanh(batch[0] * batch[1]) @ p['w'], params, batches, PATTERN, method=sl.Wanda())
    inputs = np.concatenate([np.tanh(np.asarray(x, np.float64) * scale) for x, scale in batches])
    np.testing.assert_array_equal(got.masks['w'], half_of_wanda(params['w'], inputs))


def stacks_of_stacks(w, x):
    def run_group(x, group):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, group)[0], None

    return jax.lax.scan(run_group, x, w)[0]


def stacks_of_parts(w, x):
    def run_group(x, group):
        for layer in range(3):
            x = jnp.tanh(jnp.concatenate([x @ group[layer, :, :3], x @ group[layer, :, 3:]], axis=-1))
        return x, None

    return jax.lax.scan(run_group, x, w)[0]


@pytest.mark.parametrize('form', [stacks_of_stacks, stacks_of_parts])
@pytest.mark.parametrize('order', [(0, 1, 2, 3), (2, 1, 3, 0)])
def test_layers_of_layers_are_put_back_into_the_leaf(form, order):
    w = jax.random.normal(jax.random.key(0), (2, 3, 8, 8)) / 2
    x = np.asarray(jax.random.normal(jax.random.key(1), (9, 8)))
    leaf = w.transpose(order)
    inverse = np.argsort(order)
    got = sl.prune(lambda p, x: form(p['w'].transpose(inverse), x), {'w': leaf}, [x], PATTERN, method=sl.Wanda())
    np.testing.assert_array_equal(got.params['w'], jnp.where(got.masks['w'], leaf, 0.0))
    masks = np.asarray(got.masks['w']).transpose(inverse).reshape(6, 8, 8)
    for kernel, mask in zip(w.reshape(6, 8, 8), masks, strict=True):
        np.testing.assert_array_equal(mask, half_of_wanda(kernel, x))
        x = np.tanh(x @ np.where(mask, kernel, 0.0))


def in_a_row(block, w, x):
    for layer in range(len(w)):
        x = block(x, w[layer])
    return x


def in_a_scan(block, w, x):
    return jax.lax.scan(lambda x, w: (block(x, w), None), x, w)[0]


@pytest.mark.parametrize('form', [in_a_row, in_a_scan])
def test_one_column_of_a_fused_kernel_is_a_part_of_it(form):
    params = {'w': jax.random.normal(jax.random.key(0), (2, 8, 9))}
    x = np.asarray(jax.random.normal(jax.random.key(1), (9, 8)))

    def block(x, w):
        return jnp.tanh((x @ w[:, :8]) * (x @ w[:, 8:]))

    got = sl.prune(lambda p, x: form(block, p['w'], x), params, [x], PATTERN, method=sl.Wanda())
    for kernel, mask in zip(params['w'], got.masks['w'], strict=True):
        np.testing.assert_array_equal(mask, half_of_wanda(kernel, x))
        product = x @ np.where(mask, kernel, 0.0)
        x = np.tanh(product[:, :8] * product[:, 8:])


def test_parts_that_are_sliced_out_of_a_layer_at_once_are_one_kernel():
    params = {'w': jax.random.normal(jax.random.key(0), (2, 8, 16))}

    def forward(params, x):
        for layer in range(2):
            x = jnp.tanh((x @ params['w'][layer, :, :8]) * (x @ params['w'][layer, :, 8:]))
        return x

    x = np.asarray(jax.random.normal(jax.random.key(1), (9, 8)))
    got = sl.prune(forward, params, [x], PATTERN, method=sl.Wanda())
    for kernel, mask in zip(params['w'], got.masks['w'], strict=True):
        np.testing.assert_array_equal(mask, half_of_wanda(kernel, x))
        gate, up = np.split(x @ np.where(mask, kernel, 0.0), 2, axis=1)
        x = np.tanh(gate * up)


def test_a_layer_that_is_read_again_in_another_layout_is_the_pruned_one():
    params = {'w': jax.random.normal(jax.random.key(0), (2, 8, 8)), 'z': jax.random.normal(jax.random.key(1), (8, 8))}

    def forward(params, x):
        x = jnp.tanh(x @ params['w'][0])
        x = jnp.tanh(jnp.einsum('ti,oi->to', x, params['w'].transpose(0, 2, 1)[0]))
        return x @ params['z'] + x @ params['w'][1]

    x = np.asarray(jax.random.normal(jax.random.key(2), (9, 8)))
    got = sl.prune(forward, params, [x], PATTERN, method=sl.Wanda())
    for _ in range(2):
        x = np.tanh(x @ np.asarray(got.params['w'][0]))
    np.testing.assert_array_equal(got.masks['z'], half_of_wanda(params['z'], x))


def test_batches_of_several_sizes_may_run_a_loop_for_different_rounds():
    params = {'w': jax.random.normal(jax.random.key(0), (8, 8))}
    x = [np.asarray(scale * jax.random.normal(jax.random.key(i), (5, 8))) for i, scale in ((1, 1.0), (2, 10.0))]
    batches = [{'x': x[0], 'rounds': jnp.zeros(1)}, {'x': x[1], 'rounds': jnp.zeros(3)}]

    def forward(params, batch):
        rounds = batch['rounds'].shape[0]
        return jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ params['w']), batch['x'])

    got = sl.prune(forward, params, batches, PATTERN, method=sl.Wanda())
    rows = [x[0], x[1], np.tanh(x[1] @ params['w']), np.tanh(np.tanh(x[1] @ params['w']) @ params['w'])]
    assert got.tokens == {'w': 4 * 5}
    np.testing.assert_array_equal(got.masks['w'], half_of_wanda(params['w'], np.concatenate(rows)))


def test_batches_that_read_kernels_in_another_order_are_refused():
    params = {'a': jnp.ones((8, 8)), 'b': jnp.ones((8, 8))}

    def forward(params, x):
        for name in sorted(params, reverse=len(x) > 5):
            x = jnp.tanh(x @ params[name])
        return x

    with pytest.raises(CalibrationError, match='another program for batches of another size'):
        sl.prune(forward, params, [jnp.ones((5, 8)), jnp.ones((6, 8))], PATTERN, method=sl.Wanda())


def test_parts_that_differ_in_a_function_of_python_are_not_one_program():
    params = {name: jax.random.normal(jax.random.key(i), (8, 8)) for i, name in enumerate('abc')}
    functions = [np.tanh, np.cos, np.sin]

    def forward(params, x):
        for name, function in zip('abc', functions, strict=True):
            x = jax.pure_callback(lambda x, function=function: function(np.asarray(x)), x, x) @ params[name]
        return x

    x = np.asarray(jax.random.normal(jax.random.key(3), (9, 8)))
    got = sl.prune(forward, params, [x], PATTERN, method=sl.Wanda())
    for name, function in zip('abc', functions, strict=True):
        x = function(x)
        np.testing.assert_array_equal(got.masks[name], half_of_wanda(params[name], x))
        x = x @ np.asarray(got.params[name])


def test_an_expert_that_is_not_finite_is_named():
    params = {'w': jnp.ones((3, 8, 8))}
    batch = jnp.ones((3, 4, 8)).at[1, 2, 3].set(jnp.nan)
    with pytest.raises(CalibrationError, match=r'^w, layer 1: activations are not finite'):
        sl.prune(lambda p, x: jnp.einsum('eti,eio->eto', x, p['w']), params, [batch], PATTERN, method=sl.Wanda())


def test_weights_that_fit_no_kernel_are_refused():
    params = {'w': jnp.ones((8, 8))}
    with pytest.raises(CalibrationError, match=r'^weights of tokens \[7\] fit the rows of no kernel: w \[5\]'):
        sl.prune(
            lambda p, x: x @ p['w'],
            params,
            [jnp.ones((5, 8))],
            PATTERN,
            method=sl.Wanda(),
            weights=lambda batch: jnp.ones(7),
        )


def at_an_index(params, batch):
    return jnp.tanh(batch['x'] @ params['w'][batch['i']]) @ params['z']


def transposed_behind_a_layer(params, batch):
    x = batch['x'] @ jnp.swapaxes(params['w'], 1, 2)[batch['i'] + 0].T
    return jnp.tanh(x) @ params['z']


def in_a_branch(params, batch):
    w = jax.lax.cond(batch['i'] > 0, lambda w: 2.0 * w, lambda w: 2.0 * w, params['w'] / 2.0)
    return jnp.tanh(batch['x'] @ w[batch['i']]) @ params['z']


@pytest.mark.parametrize('form', [at_an_index, transposed_behind_a_layer, in_a_branch])
def test_a_batch_may_say_which_layer_it_reads(form):
    params = {'w': jax.random.normal(jax.random.key(0), (3, 8, 8)), 'z': jax.random.normal(jax.random.key(1), (8, 8))}
    x = np.asarray(jax.random.normal(jax.random.key(2), (3, 9, 8)))
    batches = [{'x': x[i], 'i': jnp.int32(i)} for i in (2, 0, 1)]
    got = sl.prune(form, params, batches, PATTERN, method=sl.Wanda())
    hidden = []
    for i, (kernel, mask) in enumerate(zip(params['w'], got.masks['w'], strict=True)):
        np.testing.assert_array_equal(mask, half_of_wanda(kernel, x[i]))
        hidden.append(np.tanh(x[i] @ np.where(mask, kernel, 0.0)))
    # What comes after it reads the outputs of the pruned layers.
    np.testing.assert_array_equal(got.masks['z'], half_of_wanda(params['z'], np.concatenate(hidden)))


def test_a_kernel_may_say_which_layer_a_batch_reads():
    """A router is pruned first, and its pruned kernel picks the expert."""
    params = {'w': jax.random.normal(jax.random.key(0), (2, 8, 8)), 'r': jax.random.normal(jax.random.key(1), (8, 2))}
    x = np.asarray(jax.random.normal(jax.random.key(2), (6, 9, 8)))

    def forward(params, x):
        expert = jnp.argmax((x @ params['r']).sum(axis=0))
        # The layer that is read says something besides its product.
        return (x + params['w'][expert].sum()) @ params['w'][expert]

    got = sl.prune(forward, params, list(x), PATTERN, method=sl.Wanda())
    np.testing.assert_array_equal(got.masks['r'], half_of_wanda(params['r'], np.concatenate(x)))
    experts = [int(np.argmax((rows @ np.asarray(got.params['r'])).sum(axis=0))) for rows in x]
    assert set(experts) == {0, 1}
    for i, kernel in enumerate(np.asarray(params['w'])):
        read = [rows + kernel.sum() for rows, expert in zip(x, experts, strict=True) if expert == i]
        np.testing.assert_array_equal(got.masks['w'][i], half_of_wanda(kernel, np.concatenate(read)))


def test_layers_at_literal_and_at_traced_indices_are_named():
    def forward(params, x):
        x = jnp.tanh(x @ params['w'][0])
        return jax.lax.fori_loop(1, 3, lambda i, x: jnp.tanh(x @ params['w'][i]), x)

    with pytest.raises(CalibrationError, match=r'^w: .*number is known only when it runs; write all in one way'):
        sl.prune(forward, {'w': jnp.ones((3, 8, 8))}, [jnp.ones((4, 8))], PATTERN, method=sl.Wanda())


def test_a_layer_alone_and_the_others_in_a_scan():
    params = {'w': jax.random.normal(jax.random.key(0), (3, 8, 8))}
    x = np.asarray(jax.random.normal(jax.random.key(1), (9, 8)))

    def forward(params, x):
        x = jnp.tanh(x @ params['w'][0])
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params['w'][1:])[0]

    got = sl.prune(forward, params, [x], PATTERN, method=sl.Wanda())
    for kernel, mask in zip(params['w'], got.masks['w'], strict=True):
        np.testing.assert_array_equal(mask, half_of_wanda(kernel, x))
        x = np.tanh(x @ np.where(mask, kernel, 0.0))


def test_only_a_third_argument_that_is_a_runner_makes_a_forward_one_with_blocks():
    model = nn.Dense(4)
    x = jax.random.normal(jax.random.key(0), (8, 8))
    params = model.init(jax.random.key(1), x)

    def with_option(params, x, train=False):
        assert train is False
        return model.apply(params, x)

    want = sl.prune(lambda params, x: model.apply(params, x), params, [x], [('.*', '2:4')], method=sl.Wanda())
    # `apply` of Flax takes any number of arguments.
    for forward in (model.apply, with_option):
        got = sl.prune(forward, params, [x], [('.*', '2:4')], method=sl.Wanda())
        assert jax.tree.all(jax.tree.map(jnp.array_equal, got.masks, want.masks))
