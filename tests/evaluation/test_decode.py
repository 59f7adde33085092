"""A compiled decode step makes nothing as large as a cache or a kernel: it writes its caches in place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers as hf
from tiny_families import IMAGES, NEW

import sparselora_jax as sl
from sparselora_jax.evaluation import decode, search
from sparselora_jax.models.init import init_params
from sparselora_jax.models.model import Generation, Model, from_hf

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's4': 0.5, 'bf16': 2, 's32': 4, 'u32': 4, 'f32': 4}
NAMES = {'parameter', 'get-tuple-element', 'tuple', 'bitcast'}  # for values that are there


def token_loops(text):
    """Lines of the loops that end when their data says so: scans are left out."""
    return [line for line in text.splitlines() if ' while(' in line and 'known_trip_count' not in line]


def large_results(text, least):
    """What a compiled loop makes of `least` bytes or more, as (opcode, type); and how many writes in place there are.

    In place is a slice written into what the loop carries.
    """
    found = re.findall(r'^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}', text, re.S | re.M)
    bodies = {name: body.splitlines() for name, body in found}
    todo = [re.search(r'body=%?([\w.-]+)', line)[1] for line in token_loops(text)]
    results, writes, seen = [], 0, set()
    while todo:
        if (name := todo.pop()) in seen:
            continue
        seen.add(name)
        for line in bodies[name]:
            below = re.findall(r'(?:calls|to_apply|body|condition)=%?([\w.-]+)', line)
            todo += below
            match = re.match(r'\s*(ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(%?(\w*)', line)
            if match is None or match[3] in NAMES:
                continue
            shapes = [(BYTES[dtype], shape) for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', match[2])]
            if all(size * np.prod([int(n) for n in shape.split(',') if n]) < least for size, shape in shapes):
                continue
            roots = [root for inner in below for root in bodies[inner] if 'ROOT' in root]
            if match[3] == 'dynamic-update-slice' and match[4].startswith('param'):
                writes += 1
            elif not any('dynamic-update-slice(%param' in root for root in roots):
                results.append(match.group(3, 2))
    return results, writes


def llama_step():
    return hf.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )


def t5_step():
    sizes = {'d_model': 128, 'd_kv': 32, 'd_ff': 128, 'num_layers': 2, 'num_heads': 4}
    text = hf.T5Config(vocab_size=64, **sizes, feed_forward_proj='gated-gelu')
    return hf.Blip2Config(**IMAGES, text_config=text.to_dict())


@pytest.mark.parametrize(
    ('config', 'beams', 'bound'),
    [
        (llama_step, 1, False),
        pytest.param(llama_step, 5, True, marks=pytest.mark.slow),
        pytest.param(t5_step, 5, False, marks=pytest.mark.slow),
    ],
    ids=['llama', 'llama, 5 beams, masked', 't5, 5 beams'],
)
def test_a_step_copies_neither_caches_nor_weights(config, beams, bound):
    """Nothing it makes is as large as the keys of a layer or its smallest kernel, 64 KiB; it writes four in place."""
    model = Model(from_hf(config()), Generation(eos=(2,), pad=1, start=0))
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), model.shapes(), is_leaf=lambda n: isinstance(n, tuple)
    )
    if bound:
        mask = jax.ShapeDtypeStruct((2, 128, 128), bool)
        params = sl.bind(params, {'language': {'blocks': {'attn': {'q': {'kernel': mask}}}}})
    ids = np.zeros((2, 64), np.int32)
    batch = {'input_ids': ids, 'attention_mask': ids, 'pixel_values': np.zeros((2, 3, 8, 8), np.float32)}
    batch |= {'decoder_input_ids': ids, 'decoder_attention_mask': ids}
    settings = search.make_settings(NEW, length_penalty=1.0, early_stopping=False, min_new=0, eos=(2,), pad=1)
    text = decode.decode.lower(model, params, batch, settings, beams=beams).compile().as_text()
    assert large_results(text, 2**16) == ([], 4)


def carried(compiled):
    """Bytes of what the loop over tokens carries, the weights that it reads among them."""
    (loop,) = token_loops(compiled.as_text())
    shapes = re.findall(r'(\w+)\[([\d,]*)\]', re.search(r'= (\(.*\)) while\(', loop)[1])
    return sum(BYTES[dtype] * np.prod([int(n) for n in shape.split(',') if n]) for dtype, shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('base', 'rows'),
    [
        pytest.param('packed24', 2, marks=pytest.mark.slow),
        ('packed24', 12),
        pytest.param('packed24_int4', 12, marks=pytest.mark.slow),
        ('int4', 2),
    ],
)
def test_the_loop_holds_reduced_kernels_as_they_are(base, rows):
    config = llama_step()
    config.num_hidden_layers = 4
    model = Model(from_hf(config), Generation(eos=(2,), pad=1))
    dense = init_params(jax.random.key(0), model.shapes())
    _, masks = sl.prune_tree(dense, None, [('.*/blocks/.*', '2:4'), ('.*', 'dense')], method=sl.Magnitude())
    reduced, masks, _ = sl.reduce_base(sl.Frozen(dense, masks), base)
    settings = search.make_settings(NEW, length_penalty=1.0, early_stopping=False, min_new=0, eos=(2,), pad=1)
    ids = np.zeros((rows, 16), np.int32)
    batch = {'input_ids': ids, 'attention_mask': ids}
    programs = [
        decode.decode.lower(model, weights, batch, settings, beams=1).compile()
        for weights in (dense, sl.bind(reduced, masks))
    ]
    saved = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (dense, (reduced, masks))]
    saved = saved[0] - saved[1]
    assert saved > 2**18
    first, second = (carried(one) for one in programs)
    assert first - second > 0.95 * saved
    if base == 'packed24':  # few rows are multiplied as they are; else what is unpacked is one block's
        first, second = (one.memory_analysis().temp_size_in_bytes for one in programs)
        assert first - second > 0.5 * saved


def test_a_copy_would_be_seen():
    """What `large_results` finds in a loop that reorders what it writes to, and in one that does not."""

    def written(cache):
        return jax.lax.dynamic_update_slice(cache, jnp.ones((1, 1, 64)), (0, cache[0, 0, 0].astype(int), 0))

    def compiled(change):
        def loop(cache):
            return jax.lax.while_loop(lambda cache: cache[3, 3, 3] < 9.0, change, cache)

        return jax.jit(loop, donate_argnums=0).lower(jnp.zeros((4, 64, 64))).compile().as_text()

    assert large_results(compiled(written), 2**16) == ([], 1)
    for change in (
        lambda c: written(c)[jnp.array([1, 0, 2, 3])],
        lambda c: written(c.swapaxes(1, 2)),
        lambda c: written(c) * 2,
    ):
        assert large_results(compiled(change), 2**16)[0]
