"""Sequential pruning: each block sees what the pruned blocks before it produce; one trace a block; pads excluded."""

import re
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sparselora_jax import pruning
from sparselora_jax.models import layers, llama
from sparselora_jax.models.init import init_params
from sparselora_jax.pruning import calibrate, targets
from sparselora_jax.sparse import masks as sparsity
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.linear import linear

CFG = llama.LlamaConfig(vocab=11, width=16, depth=3, heads=4, kv_heads=2, mlp_width=24)
RULES = [('language/blocks/.*/kernel', '2:4')]


def forward(w, batch, run):
    return llama.forward(w['language'], CFG, batch['x'], batch['valid'], run)


def setup():
    params = {'language': init_params(jax.random.key(0), llama.shapes(CFG))}
    valid = jnp.arange(6)[None] >= jnp.array([0, 3, 1, 2])[:, None]
    return params, {'x': jax.random.normal(jax.random.key(1), (4, 6, 16)), 'valid': valid}


@dataclass(frozen=True)
class OverOutputs(pruning.Wanda):
    """Scores are shares of a sum over all outputs."""

    edits_kept_weights: ClassVar[bool] = False
    outputs_are_independent: ClassVar[bool] = False

    def __call__(self, kernel, statistic, pattern, num_zeros=None):
        scores = jnp.abs(kernel) / jnp.abs(kernel).sum(axis=1, keepdims=True) * jnp.sqrt(statistic)[:, None]
        mask = sparsity.mask_from_scores(scores, pattern, group=self.group, num_zeros=num_zeros)
        return jnp.where(mask, kernel, 0.0), mask


@dataclass(frozen=True)
class SecretDoubling(pruning.Wanda):
    """Twice the kept weights, and not a word of it."""

    edits_kept_weights: ClassVar[bool] = False
    outputs_are_independent: ClassVar[bool] = True

    def __call__(self, kernel, statistic, pattern, num_zeros=None):
        pruned, mask = super().__call__(kernel, statistic, pattern, num_zeros)
        return 2 * pruned, mask


@pytest.mark.parametrize('method', [pruning.Wanda(), pruning.SparseGPT(block=8), pruning.Magnitude()])
@pytest.mark.parametrize(('sequential', 'blocks'), [('kernel', 1), pytest.param('layer', 2, marks=pytest.mark.slow)])
def test_sequential_pruning_gives_the_pattern_and_one_trace_a_block(method, sequential, blocks, monkeypatch):
    params, batch = setup()
    traces = []
    block = llama.block
    monkeypatch.setattr(llama, 'block', lambda *args: traces.append(1) or block(*args))
    result = pruning.prune(forward, params, [batch], RULES, method=method, sequential=sequential, chunk=2)
    assert len(traces) == blocks  # `layer` has an observing block and the pruned one, whatever the number of layers
    sparsity.check_masks(result.masks, RULES)
    sparsity.check_sparse(result.params, result.masks)
    assert set(result.tokens.values()) == {18}
    assert sparsity.density(result.masks)['total'] == 0.5


def test_a_block_is_calibrated_on_the_output_of_the_pruned_ones():
    params, batch = setup()
    result = pruning.prune(forward, params, [batch], RULES, method=pruning.Wanda())

    def statistics(params):
        return calibrate.collect(
            lambda w, b: llama.forward(w['language'], CFG, b['x'], b['valid']),
            params,
            [batch],
            weights='valid',
        )

    # Pruning the last block's kernels again, on the statistics of the finished model's earlier blocks, changes nothing.
    path = 'language/blocks/attn/q/kernel'
    stats = statistics(result.params)[path][0]
    original = rules.flatten(params)[path]
    _, mask = pruning.Wanda()(original[-1], stats[-1], sparsity.parse_pattern('2:4'))
    assert jnp.array_equal(mask, rules.flatten(result.masks)[path][-1])


@pytest.mark.slow
def test_chunks_and_batches_change_nothing():
    params, batch = setup()
    halves = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 2], batch) for i in (0, 2)]
    whole = pruning.prune(forward, params, [batch], RULES, method=pruning.Wanda(), chunk=4)
    parts = pruning.prune(forward, params, halves, RULES, method=pruning.Wanda(), chunk=1)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, whole.masks, parts.masks))


def test_pads_change_nothing():
    params, batch = setup()
    other = batch | {'x': jnp.where(batch['valid'][..., None], batch['x'], 7.0)}
    runs = [pruning.prune(forward, params, [b], RULES, method=pruning.Wanda()) for b in (batch, other)]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, runs[0].masks, runs[1].masks))


@pytest.mark.slow
def test_weights_in_numpy_arrays_may_be_written_over_as_they_are_pruned():
    params, batch = setup()
    want = pruning.prune(forward, params, [batch], RULES, method=pruning.SparseGPT(block=8))
    arrays = rules.flatten(params) | {p: np.array(w) for p, w in rules.kernels(params).items() if '/blocks/' in p}

    def keep(path, layer, kernel, mask):
        arrays[path][layer] = kernel

    pruning.prune(forward, rules.unflatten(arrays), [batch], RULES, method=pruning.SparseGPT(block=8), keep=keep)
    for path, kernel in rules.flatten(want.params).items():
        np.testing.assert_array_equal(arrays[path], kernel)


def test_one_shot_prunes_any_tree():
    stack = jax.random.normal(jax.random.key(0), (3, 8, 4))
    params = {'blocks': {'fc': {'kernel': stack}}, 'head': {'kernel': jnp.ones((8, 2))}}
    path = 'blocks/fc/kernel'
    stats = {path: calibrate.InputStatistic(jnp.ones((3, 8)), jnp.ones(3, jnp.int32))}
    pruned, masks = pruning.prune_tree(params, stats, [(path, 0.5), ('.*', 'dense')], method=pruning.Wanda())
    magnitude, _ = pruning.prune_tree(params, None, [(path, 0.5), ('.*', 'dense')], method=pruning.Magnitude())
    assert list(rules.flatten(masks)) == [path]
    assert jnp.array_equal(rules.flatten(pruned)[path], rules.flatten(magnitude)[path])


@pytest.mark.parametrize(
    ('method', 'pattern'),
    [
        pytest.param(pruning.Wanda(), '0.5', marks=pytest.mark.slow),
        (pruning.SparseGPT(block=8), '2:4'),
        pytest.param(pruning.ADMM(), '2:4', marks=pytest.mark.slow),
        pytest.param(pruning.ADMM(), '0.5', marks=pytest.mark.slow),
        (OverOutputs(), '2:4'),
        pytest.param(OverOutputs(), '0.5', marks=pytest.mark.slow),
        pytest.param(pruning.DSnoT(pruning.Random(3)), '0.5', marks=pytest.mark.slow),
        pytest.param(pruning.SparseGPT(block=8, group='block'), '0.5', marks=pytest.mark.slow),
        pytest.param(pruning.Wanda(), '2:4', marks=pytest.mark.slow),
        pytest.param(pruning.SparseGPT(block=8), '0.5', marks=pytest.mark.slow),
        pytest.param(pruning.SparseGPT(block=8, group='block'), '2:4', marks=pytest.mark.slow),
    ],
)
def test_kernels_that_share_an_input_are_pruned_as_if_alone(method, pattern):
    params, batch = setup()
    rules_of_first = [('language/blocks/.*', pattern)]
    together = pruning.prune(forward, params, [batch], rules_of_first, method=method, sequential='layer')
    first = jax.tree.map(lambda leaf: leaf[0], params['language']['blocks'])
    x, ctx = llama.embed({}, CFG, batch['x'], layers.causal_view(batch['valid']))
    stats = calibrate.collect(
        lambda w, x: llama.block(w, CFG, x, ctx, None),
        first,
        [x],
        stat=method.statistic,
        weights=lambda x: batch['valid'],
    )
    alone, masks = pruning.prune_tree(first, stats, [('.*', pattern)], method=method)
    for path, mask in rules.flatten(masks).items():
        assert jnp.array_equal(mask, rules.flatten(together.masks)[f'language/blocks/{path}'][0])
        joint = rules.flatten(together.params)[f'language/blocks/{path}'][0]
        assert jnp.allclose(joint, rules.flatten(alone)[path], atol=1e-5)


@pytest.mark.slow
def test_rules_choose_a_method_for_each_kernel():
    params, batch = setup()
    methods = [('.*/attn/.*', pruning.Wanda()), ('.*/mlp/.*', pruning.SparseGPT(block=8)), ('.*', pruning.Magnitude())]
    mixed = pruning.prune(forward, params, [batch], RULES, method=methods)
    wanda = pruning.prune(forward, params, [batch], RULES, method=pruning.Wanda())
    q, down = (rules.flatten(mixed.masks)[f'language/blocks/{name}/kernel'] for name in ('attn/q', 'mlp/down'))
    assert jnp.array_equal(q[0], rules.flatten(wanda.masks)['language/blocks/attn/q/kernel'][0])
    assert not jnp.array_equal(down[0], rules.flatten(wanda.masks)['language/blocks/mlp/down/kernel'][0])
    # Only SparseGPT changes the weights that it keeps.
    kept = [
        jnp.where(mixed.masks['language']['blocks'][a][b]['kernel'], p['language']['blocks'][a][b]['kernel'], 0)
        for p in (params, mixed.params)
        for a, b in (('attn', 'q'), ('mlp', 'down'))
    ]
    assert jnp.array_equal(kept[0], kept[2])
    assert not jnp.array_equal(kept[1], kept[3])


def test_a_dense_tower_is_run_in_chunks_too(monkeypatch):
    params, batch = setup()
    params['vision'] = params['language']
    seen = []
    block = llama.block
    monkeypatch.setattr(llama, 'block', lambda w, cfg, x, *rest: seen.append(len(x)) or block(w, cfg, x, *rest))

    def both(w, batch, run):
        def as_vision(tower, *args):
            return run('vision', *args)

        x = llama.forward(w['vision'], CFG, batch['x'], batch['valid'], as_vision)
        return llama.forward(w['language'], CFG, x, batch['valid'], run)

    rules_of_both = [('language/blocks/.*', '2:4'), ('.*', 'dense')]
    pruning.prune(both, params, [batch], rules_of_both, method=pruning.Wanda(), chunk=2)
    assert set(seen) == {2}


def test_activations_that_are_not_finite_name_path_and_layer():
    params, batch = setup()
    down = params['language']['blocks']['mlp']['down']
    down['kernel'] = down['kernel'].at[0].set(jnp.nan)
    with pytest.raises(calibrate.CalibrationError, match=r'language/blocks/attn/[qkv]/kernel, layer 1: .* not finite'):
        pruning.prune(forward, params, [batch], [('.*/attn/.*', '2:4'), ('.*', 'dense')], method=pruning.Wanda())


def test_a_chunk_whose_activations_are_not_finite_is_named():
    params, batch = setup()
    batch['x'] = batch['x'].at[3, 5].set(jnp.nan)
    with pytest.raises(
        calibrate.CalibrationError,
        match=r'^language/blocks/attn/[qkv]/kernel, layer 0: activations are not finite .* in calibration chunk 1',
    ):
        pruning.prune(forward, params, [batch], RULES, method=pruning.Wanda(), chunk=2)


def test_edits_of_a_method_that_hides_them_are_an_error():
    params, batch = setup()
    match = 'kernel: SecretDoubling changed weights that its mask keeps, but says edits_kept_weights = False'
    with pytest.raises(
        pruning.MethodError,
        match=r'language/blocks/attn/[qkv]/kernel, layer 0: SecretDoubling changed weights that its mask',
    ):
        pruning.prune(forward, params, [batch], RULES, method=SecretDoubling())
    stats = {'fc/kernel': calibrate.InputStatistic(jnp.ones(8), jnp.ones((), jnp.int32))}
    with pytest.raises(pruning.MethodError, match=f'fc/{match}'):
        pruning.prune_tree({'fc': {'kernel': jnp.ones((8, 4))}}, stats, [('.*', '2:4')], method=SecretDoubling())


@pytest.mark.parametrize('layers', [(), (3,)])
def test_the_statistic_of_another_method_is_an_error(layers):
    path = 'blocks/fc/kernel' if layers else 'fc/kernel'
    params = rules.unflatten({path: jnp.ones((*layers, 8, 8))})
    of_vectors = {path: calibrate.InputStatistic(jnp.ones((*layers, 8)), jnp.ones(layers, jnp.int32))}
    of_matrices = {path: calibrate.InputStatistic(jnp.ones((*layers, 8, 8)), jnp.ones(layers, jnp.int32))}

    def match(method, expected, found):
        shapes = {'squares': [*layers, 8], 'hessian': [*layers, 8, 8]}
        text = f'{path}: {method} expects the statistic {expected} of shape {shapes[expected]} and found {found}'
        return re.escape(f'{text} of shape {shapes[found]}; run collect with stat={method}().statistic')

    with pytest.raises(calibrate.CalibrationError, match=match('Wanda', 'squares', 'hessian')):
        pruning.prune_tree(params, of_matrices, [('.*', '2:4')], method=pruning.Wanda())
    with pytest.raises(calibrate.CalibrationError, match=match('SparseGPT', 'hessian', 'squares')):
        pruning.prune_tree(params, of_vectors, [('.*', '2:4')], method=pruning.SparseGPT())
    with pytest.raises(calibrate.CalibrationError, match=r'DSnoT expects the statistic .* and found squares of shape'):
        pruning.prune_tree(params, of_vectors, [('.*', '2:4')], method=pruning.DSnoT())


def test_kernels_whose_inputs_are_all_zero_are_named_with_tower_and_layer(caplog):
    params, batch = setup()
    result = pruning.prune(forward, params, [batch | {'x': jnp.zeros((4, 6, 16))}], RULES, method=pruning.Wanda())
    sparsity.check_masks(result.masks, RULES)
    lines = [record.message for record in caplog.records]
    names = '; '.join(f'language/blocks/attn/{name}/kernel, layer 2' for name in 'kqv')
    assert any(line.startswith(f'{names}: all 16 inputs are zero on every calibration token') for line in lines)
    assert len(lines) == len(set(lines)) == CFG.depth * 4  # once for each input of each layer


def test_a_singular_hessian_is_named():
    kernel = {'fc': {'kernel': jnp.ones((8, 4))}}
    x = jnp.ones((1, 8))
    stats = {'fc/kernel': calibrate.InputStatistic(x.T @ x, jnp.ones((), jnp.int32))}
    with pytest.raises(calibrate.CalibrationError, match='fc/kernel: pruned weights are not finite'):
        pruning.prune_tree(kernel, stats, [('.*', '2:4')], method=pruning.SparseGPT(damp=0.0))


def test_what_does_not_fit_is_named_before_any_work():
    params, batch = setup()
    with pytest.raises(sparsity.PatternError, match='language/blocks/attn/k/kernel: pattern 3:5'):
        pruning.prune(forward, params, [batch], [('.*/k/kernel', '3:5'), ('.*', 'dense')], method=pruning.Wanda())
    with pytest.raises(calibrate.CalibrationError, match='empty'):
        pruning.prune(forward, params, [], RULES, method=pruning.Wanda())
    with pytest.raises(calibrate.CalibrationError, match='no statistic'):
        pruning.prune_tree(params, None, RULES, method=pruning.Wanda())
    params['other'] = {'kernel': jnp.ones((4, 4))}
    with pytest.raises(rules.RuleError, match='other/kernel: not inside the blocks'):
        pruning.prune(forward, params, [batch], [('.*', '2:4')], method=pruning.Wanda())


@pytest.mark.parametrize(
    ('method', 'statistic', 'found'),
    [
        (pruning.Wanda(), jnp.ones((8, 8)), 'expects the statistic squares of shape [8] and found hessian'),
        (pruning.RIA(), jnp.ones((8, 8)), 'expects the statistic squares of shape [8] and found hessian'),
        (pruning.SparseGPT(), jnp.ones(8), 'expects the statistic hessian of shape [8, 8] and found squares'),
        (pruning.ADMM(), jnp.ones(8), 'expects the statistic hessian of shape [8, 8] and found squares'),
        (pruning.GPTQ(), jnp.ones(8), 'expects the statistic hessian of shape [8, 8] and found squares'),
        (pruning.DSnoT(), jnp.ones(8), 'and found squares of shape [8]'),
    ],
)
def test_a_method_called_by_itself_refuses_the_statistic_of_another(method, statistic, found, monkeypatch):
    # Users do not run with the type checker of the tests, which would refuse the call first.
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    with pytest.raises(calibrate.CalibrationError, match=re.escape(found)):
        method(jnp.ones((8, 8)), statistic, sparsity.parse_pattern('2:4'))


@pytest.mark.slow
@pytest.mark.parametrize('method', [pruning.Wanda(), pruning.SparseGPT(block=8), pruning.DSnoT()])
def test_inputs_that_are_zero_on_every_token_are_counted(method, caplog):
    params, batch = setup()
    # The first norm's scale is zero for three inputs of layer 1, so attention reads zeros there.
    flat = rules.flatten(params)
    path = 'language/blocks/norm1/scale'
    flat[path] = flat[path].at[1, :3].set(0)
    pruning.prune(forward, rules.unflatten(flat), [batch], RULES, method=method)
    lines = [record.message for record in caplog.records]
    expected = 'language/blocks/attn/q/kernel, 1 of 3 layers: 3 of 16 inputs are zero on every calibration token'
    assert any(line.startswith(expected) for line in lines)
    assert len(lines) == 3  # q, k and v


def test_dead_inputs_are_counted_by_collect_too(caplog):
    x = jnp.ones((4, 8)).at[:, 2].set(0)
    calibrate.collect(lambda w, x: linear(x, w['q']['kernel']), {'q': {'kernel': jnp.ones((8, 4))}}, [x])
    assert [record.message.split(',')[0] for record in caplog.records] == [
        'q/kernel: 1 of 8 inputs are zero on every calibration token'
    ]


@pytest.mark.parametrize('chunk', [0, -1, 1.5, None])
def test_a_chunk_that_is_no_number_of_samples_is_refused(chunk, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    params, batch = setup()
    with pytest.raises(calibrate.CalibrationError, match=f'chunk {chunk}: expected a number of samples, 1 or more'):
        pruning.prune(forward, params, [batch], RULES, method=pruning.Wanda(), chunk=chunk)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda batch: batch | {'x': batch['x'][:, :3]}, 'batch 1 has arrays of the shapes .*, and batch 0 of'),
        (lambda batch: {'x': batch['x']}, 'batch 1 has arrays of the shapes .*, and batch 0 of'),
        (lambda batch: batch | {'x': 3.0}, r'batch 1 has .*: expected arrays, samples first'),
    ],
)
def test_batches_that_differ_are_named(change, message):
    params, batch = setup()
    with pytest.raises(calibrate.CalibrationError, match=message):
        pruning.prune(forward, params, [batch, change(batch)], RULES, method=pruning.Wanda())


def test_zeros_that_are_no_integers_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
    params = {'q': {'kernel': jnp.ones((4, 4))}}
    for zeros, message in ((np.array(2.5), 'q/kernel: zeros are float64, expected integers'), ([[1], [2, 3]], 'zeros')):
        with pytest.raises(sparsity.PatternError, match=message):
            targets.pattern_zeros(
                rules.flatten(params),
                targets.patterns_of(params, [('.*', 0.5)]),
                targets.methods_of(params, pruning.Magnitude()),
                {'q/kernel': zeros},
            )


def test_options_that_cannot_work_are_refused():
    with pytest.raises(sparsity.PatternError, match='SparseGPT block 0: expected a number of inputs, 1 or more'):
        pruning.SparseGPT(block=0).check(sparsity.parse_pattern('2:4'), 8)
