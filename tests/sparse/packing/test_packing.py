"""Packed kernels hold what was packed, in the bytes that docs/formats.md promises, and refuse what contradicts them."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

import sparselora_jax as sl
from sparselora_jax.checkpoints import trees
from sparselora_jax.sparse import packing
from sparselora_jax.sparse.dense import dense_kernel
from sparselora_jax.sparse.packing import packed24

PAIRS = list(itertools.combinations(range(4), 2))


def kernel_and_mask(shape=(2, 24, 6), dtype=jnp.float32, pattern='2:4'):
    kernel = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    scores = jnp.abs(kernel.astype(jnp.float32)) if pattern != '0.6' else jax.random.uniform(jax.random.key(1), shape)
    return kernel, sl.mask_from_scores(scores, pattern)


def same(left, right):
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    np.testing.assert_array_equal(np.asarray(left, np.float64), np.asarray(right, np.float64))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('inputs', [4, 8, 12, 20, 64])
def test_2_of_4_comes_back_exactly_with_its_mask(dtype, inputs):
    kernel, mask = kernel_and_mask((3, inputs, 5))
    kernel = jnp.where(mask, (8 * kernel).astype(dtype), 0).astype(dtype)
    packed = packed24.pack24(kernel, mask)
    assert packed.shape == kernel.shape
    assert packed.dtype == dtype
    same(packed24.unpack24(packed), kernel)
    assert (packed24.mask24(packed) == mask).all()


def test_groups_that_keep_fewer_than_two_and_inputs_that_four_does_not_divide():
    for kept in itertools.product([False, True], repeat=6):
        mask = jnp.array(kept)[:, None]
        kernel = jnp.arange(1.0, 7.0)[:, None]
        if sum(kept[:4]) > 2:
            with pytest.raises(sl.PackingError, match=r'inputs 0 to 3 of output 0: [34] weights are kept'):
                packed24.pack24(kernel, mask)
        else:
            same(packed24.unpack24(packed24.pack24(kernel, mask)), jnp.where(mask, kernel, 0))


@pytest.mark.parametrize('shape', [(9, 3), (2, 8, 3)])
def test_a_kernel_that_keeps_nothing_comes_back(shape):
    kernel = jnp.zeros(shape, jnp.bfloat16)
    for name in ('packed24', 'bitmask'):
        packed = packing.FORMATS.find(name).pack(kernel, kernel != 0)
        same(dense_kernel(packed), kernel)


def test_positions_are_what_the_document_says():
    # docs/formats.md, "Test vector".
    kernel = jnp.zeros((8, 1)).at[jnp.array([1, 3, 4, 7]), 0].set(jnp.array([5.0, -6.0, 7.0, 1.0]))
    packed = packed24.pack24(kernel)
    assert packed.values[:, 0].tolist() == [5.0, -6.0, 7.0, 1.0]
    assert packed.positions.tolist() == [[0xCD]]
    four_bits = packed24.quantise24(packed)
    assert four_bits.values[:, 0].tolist() == [0xA5, 0x17]
    assert four_bits.scale.tolist() == [[1.0]]


def test_every_pair_of_positions_has_its_code():
    for first, second in PAIRS:
        packed = packed24.pack24(jnp.zeros((4, 1)).at[jnp.array([first, second])].set(1.0))
        assert packed.positions[0, 0] & 15 == first | second << 2


def test_bytes_are_those_promised():
    kernel, mask = kernel_and_mask((2, 256, 64), jnp.bfloat16)
    dense = kernel.nbytes
    assert packed24.pack24(kernel, mask).nbytes == 0.5625 * dense
    assert packed24.quantise24(packed24.pack24(kernel, mask)).nbytes <= 0.196 * dense
    for pattern in ('2:4', '0.75'):
        mask = sl.mask_from_scores(jnp.abs(kernel.astype(jnp.float32)), pattern)
        packed = packing.pack_bitmask(kernel, mask)
        kept = 1 - sl.parse_pattern(pattern).sparsity
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) == (kept + 1 / 16) * dense
        assert packing.pack_mask(mask).bits.nbytes == mask.size / 8


@pytest.mark.parametrize('pattern', ['2:4', '4:8', '0.6'])
def test_any_mask_comes_back_from_bits(pattern):
    kernel, mask = kernel_and_mask((2, 24, 6), pattern=pattern)
    same(packing.unpack_bitmask(packing.pack_bitmask(kernel, mask)), jnp.where(mask, kernel, 0))
    assert (packing.unpack_mask(packing.pack_mask(mask)) == mask).all()
    matrix = packing.pack_bitmask(kernel[0, :21], mask[0, :21])  # eight does not divide 21
    same(packing.unpack_bitmask(matrix), jnp.where(mask, kernel, 0)[0, :21])


def test_bits_are_what_the_document_says():
    packed = packing.pack_bitmask(jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))  # docs/formats.md, "Test vector"
    assert packed.values.tolist() == [1.0, 2.0, 3.0]
    assert packed.mask.bits.tolist() == [[0b101, 0b010]]


def test_layers_that_keep_different_numbers_of_weights():
    kernel = jnp.ones((2, 8, 2))
    mask = jnp.stack([jnp.ones((8, 2), bool), jnp.eye(8, 2, dtype=bool)])
    packed = packing.pack_bitmask(kernel, mask)
    assert packed.values.shape == (2, 16)
    same(packing.unpack_bitmask(packed), mask.astype(jnp.float32))


def test_four_bits_round_to_the_nearest_and_better_than_by_the_largest_value():
    kernel, mask = kernel_and_mask((2, 300, 16))
    four, kept = packed24.quantise24(packed24.pack24(kernel, mask)), np.where(mask, kernel, 0).astype(np.float64)
    error = np.asarray(packed24.unpack24(four, jnp.float32), np.float64) - kept
    scales = np.asarray(four.scale, np.float64)
    total, plain_total = 0.0, 0.0
    for layer, block, output in np.ndindex(scales.shape):
        w, scale = kept[layer, 128 * block : 128 * block + 128, output], scales[layer, block, output]
        of_block = error[layer, 128 * block : 128 * block + 128, output]
        cut_off = (w / scale > 7.5) | (w / scale < -8.5)
        assert (np.abs(of_block[~cut_off]) <= 0.5001 * abs(scale)).all()
        plain = np.abs(w).max() / 7
        plain_error = np.sum((np.round(w / plain) * plain - w) ** 2)
        # The scale is rounded to bf16, by 2**-9 at most, which moves the values by that share of themselves.
        assert np.sum(of_block**2) <= plain_error + 2**-7 * np.sqrt(plain_error * np.sum(w**2))
        total, plain_total = total + np.sum(of_block**2), plain_total + plain_error
    assert total < 0.75 * plain_total
    assert (packed24.mask24(four) == mask).all()
    assert packed24.quantise24(four) is four
    zeros = packed24.quantise24(packed24.pack24(jnp.zeros((8, 2))))
    assert (packed24.unpack24(zeros) == 0).all()


def tree():
    kernel, mask = kernel_and_mask()
    params = {'q': {'kernel': kernel, 'bias': jnp.ones((2, 6))}, 'k': {'kernel': kernel + 1}}
    return params, {'q': {'kernel': mask}, 'k': {'kernel': mask}}


@pytest.mark.parametrize('formats', ['packed24', 'bitmask', [('q/.*', 'packed24'), ('.*', 'bitmask')]])
def test_a_tree_is_packed_and_unpacked(formats):
    params, masks = tree()
    packed = sl.pack(params, masks, formats)
    assert packed['q']['bias'] is params['q']['bias']
    jax.tree.map(same, sl.unpack(packed), sl.merge(params, masks))
    assert sl.unpack(packed, jnp.bfloat16)['k']['kernel'].dtype == jnp.bfloat16


def test_what_cannot_be_packed_is_named():
    params, masks = tree()
    masks['k']['kernel'] = masks['k']['kernel'].at[1, 4:8, 3].set(True)
    with pytest.raises(sl.PackingError, match='k/kernel: layer 1, inputs 4 to 7 of output 3: 4 weights are kept'):
        sl.pack(params, masks)
    with pytest.raises(sl.PackingError, match="format 'int8': expected one of packed24"):
        sl.pack(params, masks, 'int8')
    with pytest.raises(sl.PackingError, match='v/kernel: has a mask'):
        sl.pack(params, {'v': masks['q']})
    with pytest.raises(sl.RuleError, match='matches none'):
        sl.pack(params, masks, [('v/.*', 'packed24'), ('.*', 'bitmask')])


def test_files_hold_packed_trees(tmp_path):
    params, masks = tree()
    for formats in ('packed24', 'packed24_int4', 'bitmask'):
        packed = sl.pack(params, masks, formats) | {'masks': sl.pack_masks(masks)}
        sl.save_safetensors(tmp_path / 'p.safetensors', packed, metadata={'note': 'x'})
        read, metadata = sl.load_safetensors(tmp_path / 'p.safetensors')
        jax.tree.map(same, read, packed)
        assert metadata == {'note': 'x'}


DAMAGE = {
    'two values of a group in one place': ('positions', lambda a: a.at[1, 0, 2].set(0), 'layer 1, group 0 of output 2'),
    'in the wrong order': ('positions', lambda a: a.at[0, 1, 0].set(0x1D), 'group 3 of output 0: .1, 0. are not'),
    'too few values': ('values', lambda a: a[:, :-1], r'values is float32 \(2, 11, 6\), expected float32 \(2, 12, 6\)'),
    'too many positions': ('positions', lambda a: jnp.pad(a, ((0, 0), (0, 1), (0, 0))), 'positions is uint8'),
    'another dtype': ('positions', lambda a: a.astype(jnp.int32), 'positions is int32'),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_files_that_contradict_the_format_are_refused(name, tmp_path):
    part, change, message = DAMAGE[name]
    params, masks = tree()
    path = tmp_path / 'p.safetensors'
    sl.save_safetensors(path, sl.pack(params, masks))
    from safetensors import safe_open

    with safe_open(path, framework='np') as file:
        metadata = file.metadata()
    # With checksums, any change is found before the format is looked at.
    del metadata[trees.CHECKSUMS]
    arrays = load_file(path)
    arrays[f'q/kernel/{part}'] = change(arrays[f'q/kernel/{part}'])
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(sl.PackingError, match=f'q/kernel: .*{message}'):
        sl.load_safetensors(path)
    del arrays[f'q/kernel/{part}']
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(sl.PackingError, match=f'q/kernel: {part} of its packed24 is missing'):
        sl.load_safetensors(path)


def test_bitmasks_that_contradict_themselves_are_refused():
    kernel, mask = kernel_and_mask((21, 3), pattern='0.6')
    packed = packing.pack_bitmask(kernel, mask)
    wrong = {
        'the masks keep': replace(packed, values=packed.values[:-1]),
        'expected uint8 for 21 inputs': replace(packed, mask=replace(packed.mask, bits=packed.mask.bits[:-1])),
        'set after the last': replace(packed, mask=replace(packed.mask, bits=packed.mask.bits.at[2, 0].set(255))),
    }
    for message, damaged in wrong.items():
        with pytest.raises(sl.PackingError, match=message):
            packing.bitmask.check_bitmask(damaged)
        with pytest.raises(sl.PackingError, match=message):
            packing.Bitmask.from_arrays(damaged.to_arrays(), damaged.inputs)


def factors(params):
    # Kernels with three axes are stacks, which only their place within `blocks` says.
    return sl.init_lora(jax.random.key(3), {'blocks': params}, [('.*', (2, 4))])['blocks']


@pytest.mark.parametrize('formats', ['packed24', 'bitmask'])
@pytest.mark.parametrize('gradient', ['exact', 'straight_through', 'plain'])
def test_lora_on_a_packed_base_is_lora_under_its_mask(formats, gradient):
    params, masks = tree()
    packed = sl.pack(params, masks, formats)
    lora = jax.tree.map(lambda leaf: leaf + 0.1, factors(params))
    x = jax.random.normal(jax.random.key(4), (5, 24))

    def loss(lora, x, params, masks):
        bound = sl.bind(params, masks, lora, gradient=gradient)
        return sum(jnp.sum(jnp.tanh(sl.linear(x, jax.tree.map(lambda a: a[1], bound[n]['kernel'])))) for n in 'qk')

    got = jax.value_and_grad(loss, argnums=(0, 1))(lora, x, packed, None)
    want = jax.value_and_grad(loss, argnums=(0, 1))(lora, x, params, masks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    jax.tree.map(same, sl.merge(packed, None, lora), sl.merge(params, masks, lora))


def test_masks_in_bits_are_masks():
    params, masks = tree()
    lora = factors(params)
    jax.tree.map(same, sl.merge(params, sl.pack_masks(masks), lora), sl.merge(params, masks, lora))
    x = jax.random.normal(jax.random.key(4), (5, 24))
    for of in (lora, None):
        one, other = (sl.bind(params, m, of)['q']['kernel'] for m in (sl.pack_masks(masks), masks))
        got, want = (sl.linear(x, jax.tree.map(lambda a: a[0], kernel)) for kernel in (one, other))
        same(got, want)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Halves(packing.PackedKernel):
    """A kernel that keeps all of its even inputs and none of its odd ones: a format of somebody else's."""

    stored_as: ClassVar[str] = 'halves'
    required_arrays: ClassVar[tuple[str, ...]] = ('even',)
    even: Any
    inputs: int = field(metadata={'static': True})

    @property
    def shape(self):
        return (*self.even.shape[:-2], self.inputs, self.even.shape[-1])

    @property
    def ndim(self):
        return self.even.ndim

    @property
    def dtype(self):
        return self.even.dtype

    def unpack(self, dtype=None):
        kernel = jnp.zeros(self.shape, self.dtype).at[..., ::2, :].set(self.even)
        return kernel if dtype is None else kernel.astype(dtype)

    def unpack_mask(self):
        return jnp.zeros(self.shape, bool).at[..., ::2, :].set(True)

    def to_arrays(self):
        return {'even': self.even}

    @classmethod
    def from_arrays(cls, arrays, inputs):
        if arrays['even'].shape[-2] != -(-inputs // 2):
            raise sl.PackingError(f'{arrays["even"].shape[-2]} rows for {inputs} inputs')
        return cls(arrays['even'], inputs)


class HalvesFormat:
    kernel_type = Halves
    brings_mask = True
    levels = None

    def takes(self, pattern):
        return False

    def pack(self, kernel, mask):
        if not (mask == (jnp.arange(mask.shape[-2]) % 2 == 0)[:, None]).all():
            raise sl.PackingError('odd inputs are kept')
        return Halves(kernel[..., ::2, :], kernel.shape[-2])

    def pack_shapes(self, kernel, density):
        *layers, inputs, outputs = kernel.shape
        return Halves(jax.ShapeDtypeStruct((*layers, -(-inputs // 2), outputs), kernel.dtype), inputs)


@pytest.fixture
def halves(monkeypatch):
    monkeypatch.setattr(packing.FORMATS, '_parts', dict(packing.FORMATS._parts))
    packing.FORMATS.register('halves', HalvesFormat())


def even_masks(params):
    rows = jnp.arange(params['q']['kernel'].shape[-2]) % 2 == 0
    return {name: {'kernel': jnp.broadcast_to(rows[:, None], leaf['kernel'].shape)} for name, leaf in params.items()}


@pytest.mark.parametrize('gradient', ['exact', 'straight_through', 'plain'])
def test_a_format_of_ones_own_is_packed_multiplied_and_merged(halves, gradient):
    params, _ = tree()
    masks = even_masks(params)
    packed = sl.pack(params, masks, 'halves')
    assert isinstance(packed['q']['kernel'], Halves)
    jax.tree.map(same, sl.unpack(packed), sl.merge(params, masks))
    lora = jax.tree.map(lambda leaf: leaf + 0.1, factors(params))
    x = jax.random.normal(jax.random.key(4), (5, 24))

    def loss(lora, x, params, masks):
        bound = sl.bind(params, masks, lora, gradient=gradient)
        return sum(jnp.sum(jnp.tanh(sl.linear(x, jax.tree.map(lambda a: a[1], bound[n]['kernel'])))) for n in 'qk')

    for adapted in (lora, None):
        got = jax.value_and_grad(loss, argnums=(0, 1))(adapted, x, packed, None)
        want = jax.value_and_grad(loss, argnums=(0, 1))(adapted, x, params, masks)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
    jax.tree.map(same, sl.merge(packed, None, lora), sl.merge(params, masks, lora))


def test_a_format_of_ones_own_is_stored_stacked_and_given_by_shapes(halves, tmp_path):
    params, _ = tree()
    masks = even_masks(params)
    packed, masks_beside = packing.reduce_kernels(params, masks, 'halves')
    assert masks_beside is None
    shapes, _ = packing.reduce_shapes(params, dict.fromkeys(('q/kernel', 'k/kernel'), 0.5), 'halves')
    assert jax.tree.structure(shapes) == jax.tree.structure(packed)
    jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(f'{a} {b}'), shapes, packed)
    layers = [packing.find_format('halves').pack(params['q']['kernel'][i], masks['q']['kernel'][i]) for i in (0, 1)]
    jax.tree.map(same, packing.stack(layers), packed['q']['kernel'])
    assert packed['q']['kernel'].nbytes == params['q']['kernel'].nbytes / 2
    path = tmp_path / 'p.safetensors'
    sl.save_safetensors(path, packed)
    jax.tree.map(same, sl.load_safetensors(path)[0], packed)
    arrays = {'even': packed['q']['kernel'].even}
    with pytest.raises(sl.PackingError, match='q/kernel: 12 rows for 30 inputs'):
        packing.stored.from_file('q/kernel', {'format': 'halves', 'inputs': 30}, arrays)


def test_a_format_may_be_named_where_it_is_defined():
    params, _ = tree()
    packed = sl.pack(params, even_masks(params), f'{__name__}:HALVES')
    assert isinstance(packed['k']['kernel'], Halves)
    with pytest.raises(sl.PackingError, match=r"format 'halves': expected one of .*, or package.module:Name"):
        sl.pack(params, even_masks(params), 'halves')


HALVES = HalvesFormat()


def test_the_format_says_which_pattern_it_takes():
    found = {
        (text, four_bits): packing.format_for(sl.parse_pattern(text), four_bits=four_bits)
        for text in ('2:4', '4:8', '0.5')
        for four_bits in (False, True)
    }
    others = {(text, four_bits): 'bitmask' for text in ('4:8', '0.5') for four_bits in (False, True)}
    assert found == {('2:4', False): 'packed24', ('2:4', True): 'packed24_int4'} | others
    with pytest.raises(sl.PackingError, match='no format takes pattern dense; there are packed24, '):
        packing.format_for(sl.Pattern())


def test_formats_without_masks_need_them_returned():
    params, masks = tree()
    with pytest.raises(sl.PackingError, match='k/kernel: its format does not store the mask; use `reduce_kernels`'):
        sl.pack(params, masks, 'nf4')
    formats = [('q/.*', 'int4'), ('.*', 'packed24')]
    reduced, masks_beside = packing.reduce_kernels(params, masks, formats)
    assert list(masks_beside) == ['q']
    jax.tree.map(same, sl.unpack(reduced)['k'], sl.merge(params, masks)['k'])
