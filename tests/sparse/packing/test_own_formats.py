"""A format of one's own must give back what it packs: its first layer is compared when a base is made."""

import jax
import jax.numpy as jnp
import pytest

import sparselora_jax as sl
from sparselora_jax.sparse import packing

OWN = packing.find_format('bitmask')


class Wrapped:
    """A format that packs as `bitmask` does, from what `change` makes of kernel and mask."""

    kernel_type = OWN.kernel_type
    brings_mask = True
    levels = None

    def __init__(self, change):
        self.change = change

    def takes(self, pattern):
        return True

    def pack(self, kernel, mask):
        return OWN.pack(*self.change(kernel, mask))

    def pack_shapes(self, kernel, density):
        return OWN.pack_shapes(kernel, density)


class PacksNothing(Wrapped):
    def pack(self, kernel, mask):
        return jnp.where(mask, kernel, 0)


SOUND = Wrapped(lambda kernel, mask: (kernel, mask))
DOUBLES = Wrapped(lambda kernel, mask: (2 * kernel, mask))
SHIFTS = Wrapped(lambda kernel, mask: (kernel, jnp.roll(mask, 1, -2)))
FAILS = Wrapped(lambda kernel, mask: kernel.no_such_thing)
PACKS_NOTHING = PacksNothing(None)


@pytest.fixture(params=[(), (3,)])
def pruned(request):
    kernel = jax.random.normal(jax.random.key(0), (*request.param, 8, 4))
    params = {'blocks': {'q': {'kernel': kernel}}}
    return sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())


def test_a_sound_format_packs(pruned):
    packed = packing.pack(*pruned, f'{__name__}:SOUND')
    assert packing.is_packed(packed['blocks']['q']['kernel'])


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('DOUBLES', r'format Wrapped says that it is lossless \(levels = None\), and does not give back the kernel'),
        ('SHIFTS', 'format Wrapped does not give back the mask that it packed'),
        ('FAILS', 'format Wrapped fails: AttributeError'),
        ('PACKS_NOTHING', r'format PacksNothing packed a kernel into a \w+, expected .*Bitmask'),
    ],
)
def test_a_format_that_stores_something_else_is_named(pruned, name, message):
    with pytest.raises(packing.PackingError, match=f'blocks/q/kernel: {message}'):
        packing.pack(*pruned, f'{__name__}:{name}')
