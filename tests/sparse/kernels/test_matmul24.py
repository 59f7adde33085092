"""x @ packed weights: every lowering computes what the plain product does, at every edge; so does the gradient."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import sparselora_jax as sl
from sparselora_jax.checkpoints import embedded
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.dense import dense_kernel
from sparselora_jax.sparse.kernels import cpu, gpu, matmul24, tpu
from sparselora_jax.sparse.packing import packed24

PAIRS = list(itertools.combinations(range(4), 2))
TILE = gpu.Tile(rows=16, outputs=32, octets=16)
SPLIT = TILE._replace(splits=2)
INTERPRET = jax.default_backend() != 'gpu'  # JAX_PLATFORMS=cuda where there is one: compiled, and run there


def masks(inputs, outputs):
    """Each pair of places for all groups, random ones, and one that leaves groups empty; [9, inputs, outputs]."""
    shape = -(-inputs // 4), 4, outputs
    found = [jnp.zeros(shape, bool).at[:, jnp.array(pair)].set(True) for pair in PAIRS]
    scores = (jax.random.uniform(jax.random.key(seed), (shape[0] * 4, outputs)) for seed in range(2))
    found.extend(sl.mask_from_scores(drawn, '2:4') for drawn in scores)
    found.append(found[-1].reshape(shape) & (jnp.arange(shape[0], dtype=jnp.int32) % 3 > 0)[:, None, None])
    return jnp.stack([mask.reshape(-1, outputs)[:inputs] for mask in found])


def packed_and_x(rows, inputs, outputs, dtype, four_bits):
    kernels = jax.random.normal(jax.random.key(3), (9, inputs, outputs)).astype(dtype)
    packed = packed24.pack24(kernels, masks(inputs, outputs))
    packed = packed24.quantise24(packed) if four_bits else packed
    x, g = (jax.random.normal(jax.random.key(k), (rows, n)).astype(dtype) for k, n in ((4, inputs), (5, outputs)))
    return packed, x, g


def of_mask(packed, index):
    return jax.tree.map(lambda leaf: leaf[index], packed)


def check_both(both, packed, x, g):
    """`both(packed)` is x @ W and g @ W.T, with every mask."""
    for index in range(9):
        one = of_mask(packed, index)
        weights = packed24.unpack24(one, jnp.float32)
        y, dx = both(one)
        check(y, x, weights)
        check(dx, g, weights.T)


def check(got, x, weights):
    """Against numpy in float64; the bound is the rounding of fp32 sums, and of the result."""
    want = np.asarray(x, np.float64) @ np.asarray(weights, np.float64)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(weights, np.float64))
    eps = {'float32': 2e-6, 'bfloat16': 2**-8, 'float16': 2**-11}[str(x.dtype)]
    assert got.dtype == x.dtype
    np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - want), eps * np.maximum(size, 1e-6))


# Rows x inputs x outputs: below, at and beyond a tile; inputs that neither eight nor 128 divide.
SHAPES = [(1, 8, 2), (3, 128, 32), (16, 132, 34), (17, 256, 64), (5, 300, 30), (33, 20, 6)]
KINDS = [(jnp.float32, False), (jnp.bfloat16, False), (jnp.float32, True), (jnp.bfloat16, True)]
FEW = {((5, 300, 30), 3)}


def grid():
    for shape, index in itertools.product(SHAPES, range(len(KINDS))):
        few = (shape, index) in FEW
        marks = [] if few else [pytest.mark.slow]
        yield pytest.param(
            *shape, *KINDS[index], marks=marks, id=f'{shape}-{KINDS[index][0].__name__}-{KINDS[index][1]}'
        )


@pytest.mark.parametrize(('rows', 'inputs', 'outputs', 'dtype', 'four_bits'), list(grid()))
def test_the_gpu_kernels_are_the_product(rows, inputs, outputs, dtype, four_bits):
    # 6 shapes x 4 kinds x 9 masks = 216.
    packed, x, g = packed_and_x(rows, inputs, outputs, dtype, four_bits)

    tile = SPLIT if rows == 5 else TILE

    @jax.jit
    def both(packed):
        y = gpu.matmul(x, packed, tile, interpret=INTERPRET)
        return y, gpu.matmul_transposed(g, packed, tile, interpret=INTERPRET)

    check_both(both, packed, x, g)


FEW_ROWS = [
    (*shape, *kind)
    for shape, kind in [*itertools.product([(3, 132, 34)], KINDS), ((1, 8, 2), KINDS[0]), ((4, 384, 64), KINDS[1])]
]


@pytest.mark.slow
@pytest.mark.parametrize(('rows', 'inputs', 'outputs', 'dtype', 'four_bits'), FEW_ROWS)
def test_the_gpu_kernels_for_few_rows_and_for_weights(rows, inputs, outputs, dtype, four_bits):
    packed, x, _ = packed_and_x(rows, inputs, outputs, dtype, four_bits)

    @jax.jit
    def both(packed):
        y = gpu.matmul_few(x, packed, SPLIT, interpret=INTERPRET)
        return y, gpu.unpack(packed, dtype, TILE, interpret=INTERPRET)

    for index in range(9):
        one = of_mask(packed, index)
        y, weights = both(one)
        check(y, x, packed24.unpack24(one, jnp.float32))
        assert (weights == packed24.unpack24(one, dtype)).all()


# Rows and outputs that a tile does not divide, and sums of several steps; one row, and one step; more rows than a few.
TPU_SHAPES = [(40, 768, 384, 16), (1, 256, 128, 16), (16, 512, 384, 16), (40, 256, 128, tpu.FEW + 8)]
QUICK_TPU = [(TPU_SHAPES[3], False), (TPU_SHAPES[3], True)]
TPU_GRID = [
    pytest.param(*shape, four_bits, marks=[] if (shape, four_bits) in QUICK_TPU else pytest.mark.slow)
    for shape, four_bits in itertools.product(TPU_SHAPES, [False, True])
]


@pytest.mark.parametrize(('rows', 'inputs', 'outputs', 'tile', 'four_bits'), TPU_GRID)
def test_the_tpu_kernels_are_the_product(rows, inputs, outputs, tile, four_bits):
    packed, x, g = packed_and_x(rows, inputs, outputs, jnp.bfloat16, four_bits)

    @jax.jit
    def both(packed):
        y = tpu.matmul(x, packed, tpu.Tile(tile, inputs, 256), interpret=True)
        return y, tpu.matmul_transposed(g, packed, tpu.Tile(tile, 256, 128), interpret=True)

    check_both(both, packed, x, g)


@functools.cache
def trained():
    return rules.flatten(embedded.load(dtype=jnp.bfloat16)[1])


REAL = [
    ('language/blocks/attn/k/kernel', 12),
    ('language/blocks/mlp/down/kernel', 12),
    ('vision/blocks/mlp/fc2/kernel', 3),
]
FOR_TPU = 'qformer/blocks/first/mlp/fc1/kernel', 1  # sizes that its kernels take


@pytest.mark.slow
@pytest.mark.parametrize('four_bits', [False, True])
@pytest.mark.parametrize('rows', [1, 16])
@pytest.mark.parametrize(('chip', 'layer'), [*itertools.product(['gpu'], [*REAL, FOR_TPU]), ('tpu', FOR_TPU)])
def test_layers_of_a_trained_model_by_the_tiles_that_are_used(chip, layer, rows, four_bits):
    path, index = layer
    kernel = {'kernel': trained()[path][index]}
    pruned, masks = sl.prune_tree(kernel, None, [('kernel', '2:4')], method=sl.Magnitude())
    packed = packed24.pack24(pruned['kernel'], masks['kernel'])
    packed = packed24.quantise24(packed) if four_bits else packed
    sizes = zip((4, 5), packed.shape, strict=True)
    x, g = (jax.random.normal(jax.random.key(key), (rows, size), jnp.bfloat16) for key, size in sizes)
    weights = packed24.unpack24(packed, jnp.float32)
    assert four_bits or (weights == pruned['kernel'].astype(jnp.float32)).all()
    for of, want, transposed in ((x, weights, False), (g, weights.T, True)):
        if chip == 'gpu':
            got = gpu.product(of, packed, transposed=transposed, interpret=INTERPRET)
        else:
            multiply = tpu.matmul_transposed if transposed else tpu.matmul
            got = multiply(of, packed, tpu.choose_tile(rows, packed, transposed), interpret=True)
        check(got, of, want)


@pytest.mark.parametrize(('dtype', 'four_bits'), [*KINDS, (jnp.float16, False)])
@pytest.mark.parametrize(('rows', 'inputs'), [(1, 300), (3, 20)])
def test_few_rows_are_multiplied_as_packed(rows, inputs, dtype, four_bits):
    packed, x, _ = packed_and_x(rows, inputs, 10, dtype, four_bits)
    for index in range(9):
        one = of_mask(packed, index)
        check(cpu.matmul(x, one), x, packed24.unpack24(one, jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_few_rows_make_neither_kernels_nor_wider_values(dtype):
    packed, x, _ = packed_and_x(1, 256, 256, dtype, False)
    kernels = [of_mask(packed, index) for index in range(4)]
    chain = jax.jit(lambda x, kernels: functools.reduce(matmul24.matmul24, kernels, x))
    temporary = chain.lower(x, kernels).compile().memory_analysis().temp_size_in_bytes
    assert temporary < kernels[0].nbytes


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('four_bits', [False, True])
def test_this_platform_multiplies_and_differentiates(dtype, four_bits):
    packed, x, _ = packed_and_x(6, 24, 10, dtype, four_bits)
    one = of_mask(packed, 7)
    weights = packed24.unpack24(one, jnp.float32)
    check(matmul24.matmul24(x, one), x, weights)
    batched = matmul24.matmul24(x.reshape(2, 3, 24), one)
    assert (batched.reshape(6, 10) == matmul24.matmul24(x, one)).all()
    dx = jax.grad(lambda x: jnp.sum(matmul24.matmul24(x, one)).astype(jnp.float32))(x)
    check(dx, jnp.ones((6, 10), dtype), weights.T)


def test_the_backward_keeps_packed_kernels_only():
    packed, x, _ = packed_and_x(4, 64, 64, jnp.float32, False)

    def loss(x):
        return jnp.sum(jax.lax.scan(lambda x, kernel: (jnp.tanh(sl.linear(x, kernel)), None), x, packed)[0])

    dense = packed24.unpack24(packed)
    temporary = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * dense[0].nbytes < dense.nbytes


@pytest.mark.parametrize(('platform', 'name'), [('cuda', 'matmul24_few'), ('tpu', 'matmul24')])
@pytest.mark.parametrize('four_bits', [False, True])
def test_programs_for_accelerators_hold_the_kernels(four_bits, platform, name):
    packed, x, _ = packed_and_x(1, 256, 128, jnp.bfloat16, four_bits)
    one = of_mask(packed, 7)
    step = jax.jit(jax.grad(lambda x: jnp.sum(matmul24.matmul24(x, one).astype(jnp.float32) ** 2)))
    text = step.trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert all(f'"{of}"' in text for of in (name, 'matmul24_transposed'))
    here = step.trace(x).lower(lowering_platforms=('cpu',)).as_text()
    assert 'custom_call' not in here
    many = jnp.zeros((4096, 256), jnp.bfloat16)
    text = jax.jit(matmul24.matmul24).trace(many, one).lower(lowering_platforms=('cuda',)).as_text()
    assert '"unpack24"' in text
    assert '"matmul24' not in text


def checked(monkeypatch):
    """Has every load and store of the GPU kernels say whether all that its mask leaves lies within its array.

    Pallas' interpreters check bounds of kernels for TPUs and Mosaic GPU only: for Triton's they pad, and cut off.
    """
    outside = []

    def check(ref, mask):
        (*_, index) = ref.transforms
        within = jnp.ones((), bool)
        for at, size in zip(index.indices, ref.ref.shape, strict=True):
            where = at.start + jnp.arange(at.size, dtype=jnp.int32) if isinstance(at, pl.Slice) else at
            within = within[..., None] & (where < size) & (where >= 0) if jnp.ndim(where) else within & (where < size)
        jax.debug.callback(outside.append, jnp.sum(~within if mask is None else mask & ~within, dtype=jnp.int32))

    def load(ref, mask=None, other=None, real=gpu.plgpu.load):
        check(ref, mask)
        return real(ref, mask=mask, other=other)

    def store(ref, value, mask=None, real=gpu.plgpu.store):
        check(ref, mask)
        return real(ref, value, mask=mask)

    monkeypatch.setattr(gpu.plgpu, 'load', load)
    monkeypatch.setattr(gpu.plgpu, 'store', store)
    return outside


ODD = [
    (*shape, *kind)
    for shape, kind in [
        ((17, 132, 34), KINDS[3]),
        ((3, 20, 6), KINDS[1]),
        *itertools.product([(5, 300, 30)], KINDS),
    ]
]


@pytest.mark.slow
@pytest.mark.parametrize(('rows', 'inputs', 'outputs', 'dtype', 'four_bits'), ODD)
def test_the_gpu_kernels_stay_within_their_arrays(monkeypatch, rows, inputs, outputs, dtype, four_bits):
    packed, x, g = packed_and_x(rows, inputs, outputs, dtype, four_bits)
    one = of_mask(packed, 7)
    outside = checked(monkeypatch)
    products = (gpu.matmul, x, SPLIT), (gpu.matmul_transposed, g, SPLIT), (gpu.matmul_few, x[:3], SPLIT)
    calls = [functools.partial(product, by, one, tile) for product, by, tile in products]
    for call in [*calls, functools.partial(gpu.unpack, one, dtype, TILE)]:
        outside.clear()
        jax.block_until_ready(call(interpret=True))
        jax.effects_barrier()
        assert outside
        assert sum(map(int, outside)) == 0


@pytest.mark.slow
@pytest.mark.parametrize('four_bits', [False, True])
def test_the_tpu_kernels_stay_within_their_arrays(four_bits):
    packed, x, g = packed_and_x(3, 768, 384, jnp.bfloat16, four_bits)
    one = of_mask(packed, 7)
    weights = packed24.unpack24(one, jnp.float32)
    strict = pltpu.InterpretParams(out_of_bounds_reads='raise', uninitialized_memory='nan')
    with pltpu.force_tpu_interpret_mode(strict):
        y, dx = tpu.matmul(x, one, tpu.Tile(8, 768, 256)), tpu.matmul_transposed(g, one, tpu.Tile(8, 256, 128))
    check(y, x, weights)
    check(dx, g, weights.T)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('platform', 'dtype'), [('cuda', 'float16'), ('tpu', 'float16'), ('rocm', 'float32'), ('metal', 'float32')]
)
def test_what_no_kernel_takes_is_said_once(monkeypatch, caplog, platform, dtype):
    packed, x, _ = packed_and_x(2, 16, 6, jnp.dtype(dtype), False)
    one = of_mask(packed, 7)
    monkeypatch.setattr(matmul24, '_platform', lambda: platform)
    matmul24._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger=matmul24.__name__)  # absl's scripts set the root's
    for _ in range(2):
        check(matmul24.matmul24(x, one), x, packed24.unpack24(one, jnp.float32))
    said = [record.getMessage() for record in caplog.records if 'matmul24' in record.getMessage()]
    assert said == [
        f'matmul24: no kernel on {platform} for x {dtype} and values {dtype} [16, 6]: '
        'weights are unpacked where they are used'
    ]


@pytest.mark.parametrize('four_bits', [False, True])
def test_one_gpu_unpacks_by_the_kernel(monkeypatch, four_bits):
    packed, _, _ = packed_and_x(1, 24, 10, jnp.bfloat16, four_bits)
    one = of_mask(packed, 7)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    for dtype in (None, jnp.float32):
        weights = dense_kernel(one, dtype)
        assert weights.dtype == (dtype or one.dtype)
        assert (weights == packed24.unpack24(one, dtype)).all()
    lowered = jax.jit(dense_kernel).trace(one).lower(lowering_platforms=('cuda',))
    assert '"unpack24"' in lowered.as_text()
