"""Four devices equal one: the train step and the pruner under data, fsdp and tensor sharding."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import sparselora_jax as sl
from sparselora_jax.models import causal, llama
from sparselora_jax.models.init import init_params
from sparselora_jax.models.model import Generation, Model
from sparselora_jax.models.runners import scan_blocks
from sparselora_jax.planning.collectives import collectives
from sparselora_jax.pruning import calibrate
from sparselora_jax.restoration import restore
from sparselora_jax.sparse import sharding
from sparselora_jax.sparse.linear import linear

CFG = llama.LlamaConfig(vocab=16, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)


def logits(w, batch, run=scan_blocks):
    x = llama.embed_tokens(w['language'], CFG, batch['tokens'])
    valid = jnp.ones(batch['tokens'].shape, bool)
    return llama.head(w['language'], CFG, llama.forward(w['language'], CFG, x, valid, run))


def setup():
    params = init_params(jax.random.key(0), {'language': llama.shapes(CFG)}, std=1.0)
    _, masks = sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())
    lora = sl.init_lora(jax.random.key(1), params, [('.*', sl.LoraSpec(4, 8))])
    lora = jax.tree.map(lambda leaf: leaf + 0.01, lora)
    tokens = jax.random.randint(jax.random.key(2), (8, 6), 0, 16)
    return params, masks, lora, {'tokens': tokens, 'targets': tokens, 'answer': jnp.ones((8, 6), bool)}


AXES = {'data': 4}, {'fsdp': 4}, {'data': 2, 'tensor': 2}, {'fsdp': 2, 'tensor': 2}
QUICK = [({'fsdp': 2, 'tensor': 2}, True)]


@pytest.mark.parametrize(
    ('axes', 'gathering'),
    [
        pytest.param(axes, gathering, marks=[] if (axes, gathering) in QUICK else [pytest.mark.slow])
        for axes in AXES
        for gathering in (False, True)
    ],
)
def test_the_train_step_equals_one_device(axes, gathering):
    params, masks, lora, batch = setup()
    tx = optax.sgd(0.1)
    step = restore.make_train_step(logits, tx)
    want, metrics = step(sl.init_state(jax.tree.map(jnp.copy, lora), tx), restore.Frozen(params, masks), batch)
    mesh = sharding.make_mesh(**axes)
    frozen = restore.Frozen(sharding.shard(params, mesh), sharding.shard(masks, mesh))
    state = sl.init_state(sharding.shard(lora, mesh), tx)
    if gathering:
        parts = axes.get('data', 1) * axes.get('fsdp', 1)
        step = restore.make_train_step(
            lambda w, batch: logits(w, batch, sharding.gathering(scan_blocks, mesh)), tx, parts=parts
        )
    got, sharded = step(state, frozen, sharding.shard_batch(batch, mesh))
    np.testing.assert_allclose(sharded['loss'], metrics['loss'], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.trained, want.trained)
    if 'fsdp' in axes or 'tensor' in axes:
        kernel = frozen.params['language']['blocks']['mlp']['up']['kernel']
        assert kernel.addressable_shards[0].data.size == kernel.size // (axes.get('fsdp', 1) * axes.get('tensor', 1))


def test_lora_begins_alike_on_a_mesh():
    params, rules = {'language': init_params(jax.random.key(0), llama.shapes(CFG))}, [('.*', (2, 4))]
    params['language']['blocks'] = dict(reversed(params['language']['blocks'].items()))
    sharded = sharding.shard(params, sharding.make_mesh(fsdp=4))
    assert list(sharded['language']['blocks']) != list(params['language']['blocks'])  # JAX has sorted the keys
    made = [sl.init_lora(jax.random.key(1), tree, rules) for tree in (params, sharded)]
    jax.tree.map(np.testing.assert_array_equal, *made)


@pytest.mark.slow
@pytest.mark.parametrize('base', ['packed24', pytest.param('int4', marks=pytest.mark.slow)])
def test_a_base_in_fewer_bytes_is_split_too(base):
    params, masks, lora, batch = setup()
    reduced, tx = restore.reduce_base(restore.Frozen(params, masks), base), optax.sgd(0.1)
    step = restore.make_train_step(logits, tx, kd=0.0)
    want, _ = step(sl.init_state(jax.tree.map(jnp.copy, lora), tx), reduced, batch)
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    frozen = restore.Frozen(*(None if tree is None else sharding.shard(tree, mesh) for tree in reduced))
    got, _ = step(sl.init_state(sharding.shard(lora, mesh), tx), frozen, sharding.shard_batch(batch, mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got.trained, want.trained)
    arrays = jax.tree.leaves(frozen.params['language']['blocks']['mlp']['up']['kernel'])
    assert arrays[0].addressable_shards[0].data.size == arrays[0].size // 4


METHODS = [('.*/fc2/.*', sl.SparseGPT(block=8)), ('.*', sl.Wanda())]
PATTERNS = [('.*/fc2/.*', '0.5'), ('.*', '2:4')]
KERNELS = {'o': (32, 32), 'fc1': (32, 64), 'fc2': (64, 32)}  # of each of two layers


def mlp_tower(w, batch, run=scan_blocks):
    """fc1 reads what devices along tensor add up."""

    def block(w, x, ctx, cache):
        o, fc1, fc2 = (w['mlp'][name]['kernel'] for name in KERNELS)
        x = x + linear(x, o)
        return x + ctx['gain'] * linear(jax.nn.relu(linear(x, fc1)), fc2), cache

    ctx = {'valid': batch['valid'], 'gain': jnp.full((1, 1, 1), 0.5)}
    return run('language', block, w['language']['blocks'], batch['x'], ctx)[0]


def draw_mlp():
    """(params, batch)."""
    rng = np.random.default_rng(0)
    mlp = {name: {'kernel': rng.normal(size=(2, *shape)).astype(np.float32)} for name, shape in KERNELS.items()}
    batch = {'x': rng.normal(size=(16, 6, 32)).astype(np.float32), 'valid': rng.random((16, 6)) < 0.8}
    return {'language': {'blocks': {'mlp': mlp}}}, batch


@pytest.fixture(scope='module')
def pruned_alone():
    """(params, batch, Wanda's scores in the first block, what one device makes of them).

    Of every second output all scores of a group of four are the same but for rounding: the slightest change of a
    statistic changes the mask.
    """
    (params, batch), scores = draw_mlp(), {}
    mlp = params['language']['blocks']['mlp']
    for name in ('o', 'fc1'):  # in the order in which they run
        path = f'language/blocks/mlp/{name}/kernel'
        found = calibrate.collect(mlp_tower, params, [batch], weights='valid', select=path.__eq__)
        kernel, norms = mlp[name]['kernel'][0], np.sqrt(np.asarray(found[path][0][0]))[:, None]
        kernel[:, ::2] = np.repeat(kernel[::4, ::2], 4, axis=0) / norms
        scores[name] = np.abs(kernel) * norms
    knobs = {'method': METHODS, 'chunk': 2, 'sequential': 'layer'}
    return params, batch, scores, sl.prune(mlp_tower, params, [batch], PATTERNS, **knobs)


MESHES = [pytest.param(4, 1, 1, marks=pytest.mark.slow), (1, 2, 2)]


@pytest.fixture(scope='module')
def random_mlp():
    return draw_mlp()


@pytest.fixture(scope='module')
def swapped_alone(random_mlp):
    return swapped(*random_mlp)


def swapped(params, batch):
    """DSnoT's masks, unstructured and within groups of four."""
    knobs = {'method': sl.DSnoT(), 'chunk': 2}
    return [sl.prune(mlp_tower, params, [batch], [('.*', pattern)], **knobs).masks for pattern in ('0.5', '2:4')]


@pytest.fixture(scope='module')
def one_pass_alone(random_mlp):
    params, batch = random_mlp
    return sl.prune(mlp_tower, params, [batch], PATTERNS, method=METHODS, chunk=2)


@pytest.mark.parametrize(
    ('data', 'fsdp', 'tensor'),
    [*MESHES, *(pytest.param(*axes, marks=pytest.mark.slow) for axes in ((1, 1, 4), (2, 2, 1), (2, 1, 2)))],
)
def test_one_pass_equals_one_device(data, fsdp, tensor, random_mlp, one_pass_alone):
    params, batch = random_mlp
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    client = jax.devices()[0].client
    before = client.live_executables()
    programs = []

    def progress(tower, layer, layers):  # after the first block, while its programs are alive
        programs.extend(m for e in client.live_executables() if layer and e not in before for m in e.hlo_modules())

    split = sharding.shard(params, mesh)
    rows = [sharding.shard_batch(batch, mesh)]
    got = sl.prune(mlp_tower, split, rows, PATTERNS, method=METHODS, chunk=2, progress=progress)
    assert got.tokens == one_pass_alone.tokens
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, 3), got.params, split))
    if data == 4:
        jax.tree.map(np.testing.assert_array_equal, got[:2], one_pass_alone[:2])
    masks = [np.concatenate([np.ravel(mask) for mask in jax.tree.leaves(one.masks)]) for one in (got, one_pass_alone)]
    assert np.mean(masks[0] != masks[1]) <= 1e-3  # near-ties
    # Kernels are gathered a layer at a time, where fsdp keeps parts of them.
    segments = [program for program in programs if program.name == 'jit_run_segment']
    assert segments
    sent = [c.size * c.times for program in segments for c in collectives(program.to_string(), 4)]
    assert max(sent, default=0) <= bytes_of([(64, 64)])[0]


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'fsdp', 'tensor'), MESHES)
def test_dsnot_equals_one_device(data, fsdp, tensor, random_mlp, swapped_alone):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    params, batch = random_mlp
    got = swapped(sharding.shard(params, mesh), sharding.shard_batch(batch, mesh))
    jax.tree.map(np.testing.assert_array_equal, got, swapped_alone)  # nothing here is a near-tie


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'fsdp', 'tensor'), MESHES)
@pytest.mark.parametrize('pattern', ['0.5', '2:4'])
def test_admm_equals_one_device(data, fsdp, tensor, pattern, random_mlp):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    params, batch = random_mlp
    knobs = {'method': sl.ADMM(), 'chunk': 2}
    alone = sl.prune(mlp_tower, params, [batch], [('.*', pattern)], **knobs)
    params, batch = sharding.shard(params, mesh), sharding.shard_batch(batch, mesh)
    got = sl.prune(mlp_tower, params, [batch], [('.*', pattern)], **knobs)
    jax.tree.map(np.testing.assert_array_equal, got.masks, alone.masks)  # nothing here is a near-tie
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got.params, alone.params)


@pytest.fixture(scope='module')
def scored_alone(random_mlp):
    return scored(*random_mlp)


def mean_square(w, batch, run):
    return jnp.mean(jnp.square(mlp_tower(w, batch, run)))


EPS = 1e-2  # of the zeroth order


def scored(params, batch):
    """What each allocation decides by: (first order, zeroth order, OWL's shares, zeros by magnitude)."""
    uniform = sl.pruning.uniform_zeros(params, [('.*', '0.5')], method=sl.Wanda())
    paths, of_noise = tuple(uniform), {'key': jax.random.key(0), 'eps': EPS}
    return (
        sl.pruning.first_order_scores(mean_square, params, [batch], paths),
        sl.pruning.zeroth_order_scores(mean_square, params, [batch], paths, **of_noise),
        sl.pruning.outlier_shares(mlp_tower, params, [batch], paths, threshold=2.0, chunk=2),
        sl.pruning.global_magnitude_zeros(params, uniform, highest=0.9),
    )


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'fsdp', 'tensor'), MESHES)
def test_allocations_decide_as_on_one_device(data, fsdp, tensor, random_mlp, scored_alone):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    params, batch = random_mlp
    got = scored(sharding.shard(params, mesh), sharding.shard_batch(batch, mesh))
    loss = np.float32(mean_square(params, batch, scan_blocks))
    rounding = 16 * np.spacing(loss) / EPS  # of losses, over their distance
    bounds = {'rtol': 1e-5}, {'atol': rounding, 'rtol': 0}, {'rtol': 0}, {'rtol': 0}
    for one, other, bound in zip(got, scored_alone, bounds, strict=True):
        jax.tree.map(lambda a, b, bound=bound: np.testing.assert_allclose(a, b, **bound), one, other)


def bytes_of(shapes):
    return sorted(4 * rows * columns for rows, columns in shapes)


@pytest.mark.parametrize(
    ('data', 'fsdp', 'tensor'),
    [
        (4, 1, 1),
        pytest.param(1, 4, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, 4, marks=pytest.mark.slow),
        pytest.param(2, 2, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 2, marks=pytest.mark.slow),
        (1, 2, 2),
    ],
)
def test_the_pruner_equals_one_device(data, fsdp, tensor, pruned_alone):
    params, batch, scores, want = pruned_alone
    mesh, programs = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor), []
    client = jax.devices()[0].client
    before = client.live_executables()

    def progress(tower, layer, layers):  # after the first block, while its programs are alive
        programs.extend(m for e in client.live_executables() if layer and e not in before for m in e.hlo_modules())

    params = sharding.shard(params, mesh)
    knobs = {'method': METHODS, 'chunk': 2, 'sequential': 'layer', 'progress': progress}
    got = sl.prune(mlp_tower, params, [sharding.shard_batch(batch, mesh)], PATTERNS, **knobs)
    assert got.tokens == want.tokens
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, 3), got.params, params))
    if data == 4:
        jax.tree.map(np.testing.assert_array_equal, (got.params, got.masks), (want.params, want.masks))
    for name in KERNELS:
        mask, other = (np.asarray(tree.masks['language']['blocks']['mlp'][name]['kernel'][0]) for tree in (want, got))
        assert np.mean((mask != other)[:, 1::2]) <= 1e-4
        if name in scores:  # what differs is a near-tie with the third of its four
            groups = scores[name].reshape(-1, 4, mask.shape[1])
            third = np.sort(groups, axis=1)[:, 2:3]
            assert (np.abs(groups - third) <= 1e-5 * third)[(mask != other).reshape(groups.shape)].all()

    (block,), (observed,), *pruning = (
        [collectives(program.to_string(), 4) for program in programs if program.name == f'jit_{name}']
        for name in ('run_block', 'add_statistics', '_prune_joined')  # the first two are compiled once
    )
    if tensor == 1:  # a layer's kernels, where fsdp keeps parts of them; of a Hessian as much as a sum sends
        gathered = bytes_of(KERNELS.values()) if fsdp > 1 else []
        assert sorted((c.kind, c.size) for c in block) == [('all-gather', size) for size in gathered]
        assert [c.size for c in observed if c.kind == 'all-to-all'] == bytes_of([(64, 64)])
        vectors = 4 * bytes_of([(1, 32)])[0]
        assert sum(c.size for c in observed if c.kind != 'all-to-all') <= sum(gathered) + 2 * vectors + 64
    every = [c for program in (block, observed, *pruning[0]) for c in program]
    assert max((c.size * c.times for c in every), default=0) <= bytes_of([(64, 64)])[0]  # no stack of kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    ('data', 'fsdp', 'tensor'),
    [pytest.param(4, 1, 1, marks=pytest.mark.slow), (2, 1, 2), pytest.param(1, 4, 1, marks=pytest.mark.slow)],
)
def test_decoding_equals_one_device_and_its_caches_are_split(data, fsdp, tensor):
    model = Model(causal.CausalConfig(CFG), Generation(eos=(15,), pad=0))
    tokens = np.asarray(jax.random.randint(jax.random.key(2), (4, 5), 1, 15))
    params = init_params(jax.random.key(0), {'language': llama.shapes(CFG)}, std=1.0)
    knobs = {'num_beams': 2, 'max_new_tokens': 7, 'length_penalty': 1.0}
    want = sl.generate(model, params, {'input_ids': tokens}, **knobs)
    mesh, client = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[0].client
    before = client.live_executables()
    got = sl.generate(model, sharding.shard(params, mesh), {'input_ids': tokens}, **knobs)
    np.testing.assert_array_equal(got, want)
    (program,) = [
        m for e in client.live_executables() if e not in before for m in e.hlo_modules() if 'decode' in m.name
    ]
    heads, slots = CFG.kv_heads // tensor, 5 + 2 * 7
    if tensor == 1:  # along fsdp activations are added up, no weights gathered; along data, no scores of others' beams
        assert not re.search(r'= f32\S* all-gather', program.to_string())
    loop = re.findall(r'= \((.*)\) while\(', program.to_string())[-1]
    assert loop.count(f'f32[{4 // data},{heads},{slots},{CFG.width // CFG.heads}]') == 2 * CFG.depth


def test_an_untied_head_is_split_over_both_axes():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    shapes = llama.shapes(replace(CFG, tied=False))['head']
    params = {'language': {'head': {'kernel': jnp.ones(shapes['kernel'])}}}
    placed = sharding.shard(params, mesh)['language']['head']['kernel']
    assert {shard.data.shape for shard in placed.addressable_shards} == {(CFG.width // 2, CFG.vocab // 2)}


def test_factors_of_several_axes_are_split_like_the_first_axis_of_each_role():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    axes = {
        'q': sl.KernelAxes(layers=(0,), inputs=(1,), outputs=(2, 3)),
        'o': sl.KernelAxes(layers=(), inputs=(0, 1), outputs=(2,)),
    }
    params = {'q': jnp.ones((3, 16, 4, 2)), 'o': jnp.ones((4, 2, 16))}
    lora = sl.init_lora(jax.random.key(0), params, [('.*', (2, 4))], axes=axes)
    split = {'q': PartitionSpec(None, 'fsdp', 'tensor'), 'o': PartitionSpec('tensor', None, 'fsdp')}
    placed = sharding.shardings(lora, mesh, list(split.items()))
    assert jax.tree.structure(placed) == jax.tree.structure(lora)
    assert placed['q'].a.spec == PartitionSpec(None, 'fsdp', None)
    assert placed['q'].b.spec == PartitionSpec(None, None, 'tensor')
    assert placed['o'].a.spec == PartitionSpec('tensor', None)
    assert placed['o'].b.spec == PartitionSpec(None, 'fsdp')


def test_a_dimension_over_two_axes_is_split_by_both_or_by_none():
    mesh = sharding.make_mesh(data=2, tensor=2)
    rules = [('.*', jax.sharding.PartitionSpec(None, ('data', 'tensor')))]
    tree = {'fits': jnp.ones((2, 8)), 'does_not': jnp.ones((2, 6))}
    placed = sharding.shard(tree, mesh, rules)
    assert placed['fits'].addressable_shards[0].data.shape == (2, 2)
    assert placed['does_not'].addressable_shards[0].data.shape == (2, 6)


def test_what_a_mesh_does_not_divide_is_said_with_the_nearest_that_does():
    shapes = {'language': llama.shapes(replace(CFG, heads=6, kv_heads=3, head_dim=2))}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, 'float32'), shapes, is_leaf=lambda s: isinstance(s, tuple))
    (line,) = sharding.undivided(shapes, sharding.make_mesh(tensor=4))
    assert line == (
        'tensor=4 does not divide 2 of 7 kernels, e.g. the 6 of language/blocks/attn/k/kernel: they are replicated on '
        'every device; data=2, fsdp=1, tensor=2 divides all'
    )
    assert not sharding.undivided(shapes, sharding.make_mesh(data=2, fsdp=2))


def test_a_mesh_that_does_not_fit_is_named():
    with pytest.raises(sharding.MeshError, match='needs 3 devices, there are 4'):
        sharding.make_mesh(data=3)


def test_kernels_that_no_rule_splits_are_named_once(capsys, monkeypatch):
    monkeypatch.setattr(sharding, '_TOLD', set())
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    tree = {f'Dense_{index}': {'kernel': jnp.ones((8, 8)), 'bias': jnp.ones(8)} for index in range(7)}
    for _ in range(2):
        sharding.shard(tree, mesh)
    (line,) = capsys.readouterr().err.splitlines()
    assert 'no rule splits 7 of 7 kernels' in line
    assert 'Dense_0/kernel' in line
    assert 'and 2 more; pass shard(tree, mesh, rules=' in line
    sharding.shard(tree, mesh, [('.*kernel', PartitionSpec('fsdp')), ('.*', PartitionSpec())])
    sharding.shard(tree, sharding.make_mesh(data=4))
    sharding.shard(init_params(jax.random.key(0), {'language': llama.shapes(CFG)}, std=1.0), mesh)
    assert capsys.readouterr().err == ''
