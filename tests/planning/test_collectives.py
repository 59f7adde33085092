"""What a program sends between devices, against programs whose collectives are written out by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sparselora_jax.planning.collectives import Collective, by_kind, collectives
from sparselora_jax.sparse import sharding


def compiled(function, *shapes, in_specs, out_specs, **axes):
    mesh = sharding.make_mesh(**axes)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def test_each_kind_with_its_bytes_and_group():
    along = functools.partial(compiled, in_specs=P('data'), data=2, tensor=2)
    cases = {
        'all-gather': (lambda x: jax.lax.all_gather(x, 'data', tiled=True), P(), 8 * 16 * 4, 0.5),
        'all-reduce': (lambda x: jax.lax.psum(x, 'data'), P(), 4 * 16 * 4, 1.0),
        'reduce-scatter': (lambda x: jax.lax.psum_scatter(x, 'data', tiled=True), P('data'), 2 * 16 * 4, 1.0),
        'collective-permute': (lambda x: jax.lax.ppermute(x, 'data', [(0, 1), (1, 0)]), P('data'), 4 * 16 * 4, 1.0),
    }
    for kind, (function, out, size, share) in cases.items():
        found = collectives(along(function, (8, 16), out_specs=out), 4)
        assert found == [Collective(kind, size, 2, 1)], kind
        assert found[0].sent == share * size


def test_a_loop_counts_as_often_as_it_runs():
    def layers(x, stack):
        def outer(x, pair):
            return jax.lax.scan(lambda x, w: (jax.lax.psum(x @ w, 'tensor'), None), x, pair)[0], None

        return jax.lax.scan(outer, x, stack)[0]

    text = compiled(layers, (8, 16), (3, 5, 16, 16), in_specs=(P(), P()), out_specs=P(), tensor=4)
    found = collectives(text, 4)
    assert found == [Collective('all-reduce', 8 * 16 * 4, 4, 15)]
    assert by_kind(found) == {'all-reduce': (15, 15 * 1.5 * 8 * 16 * 4)}


def test_a_program_of_one_device_sends_nothing():
    text = jax.jit(lambda x: jnp.sort(x @ x)).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    assert collectives(text, 1) == []


def test_a_loop_of_unknown_length_is_named():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: jax.lax.psum(x, 'data') / 8, x)

    text = compiled(halve, (8, 16), in_specs=P(), out_specs=P(), data=4)
    with pytest.raises(ValueError, match=r'all-reduce in a loop .* whose number of rounds is not known'):
        collectives(text, 4)


def test_what_is_started_and_done_counts_once_by_its_result():
    text = """HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %d = bf16[16,8]{1,0} all-gather-done(%s)
  %r = (f32[8]{0}, f32[2]{0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %a = ((bf16[2]{0}, bf16[4]{0}), (bf16[4]{0}, bf16[8]{0})) all-gather-start(%x, %y), replica_groups={}
}
"""
    assert collectives(text, 8) == [
        Collective('all-gather', 16 * 8 * 2, 4, 1),
        Collective('all-reduce', 40, 2, 1),
        Collective('all-gather', 24, 8, 1),
    ]


def test_the_text_of_a_tpus_compiler():
    text = """HloModule m

%start (p: bf16[2,8]) -> bf16[8,8] {
  ROOT %g = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%end (p: bf16[2,8]) -> bf16[8,8] {
  ROOT %g = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%body (p: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %s = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%x), kind=kCustom, calls=%start
  %e = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%s), kind=kCustom, calls=%end
  %r = (f32[4]{0:T(128)S(1)}, /*index=1*/f32[4]{0}) all-reduce(%x, %y), replica_groups=mesh['a'=2,'b'=4] {'a','b'}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)}) tuple(%next, /*index=1*/%z)
}

%condition (p: (s32[], bf16[2,8])) -> pred[] {
  %c = s32[]{:T(128)} constant(24)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0, metadata={}
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}

ENTRY %main (p: bf16[4,8]) -> bf16[16,8] {
  %w = (s32[]{:T(128)}, bf16[2,8]{1,0:T(8,128)}) while(%t), condition=%condition, body=%body, metadata={op_name="while"}
}
"""
    assert collectives(text, 8) == [Collective('all-gather', 128, 4, 24), Collective('all-reduce', 32, 8, 24)]
    by_threes = text.replace('constant(1)', 'constant(3)').replace('s32', 'u32')  # as a product in a ring counts
    assert [found.times for found in collectives(by_threes, 8)] == [8, 8]
