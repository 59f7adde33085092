"""Contract: first match wins, every path matches, every rule is used; a tree without known kernels is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import sparselora_jax as sl
from sparselora_jax.sparse import rules

PATHS = ['vision/blocks/attn/q/kernel', 'language/blocks/attn/q/kernel', 'projection/kernel']


def test_first_match_wins():
    values = rules.match([('language/.*', 1), ('.*/q/kernel', 2), ('.*', 3)], PATHS)
    assert values == {PATHS[0]: 2, PATHS[1]: 1, PATHS[2]: 3}


def test_leaves_come_by_name_whatever_the_order_of_the_tree():
    flat = rules.flatten({'b': {'y': 1, 'x': 2}, 'a': 3})
    assert list(flat) == ['a', 'b/x', 'b/y']
    assert rules.unflatten(flat) == {'b': {'y': 1, 'x': 2}, 'a': 3}


@pytest.mark.parametrize(
    ('path', 'stack', 'name'),
    [
        ('language/blocks/attn/q/kernel', 'language', 'attn/q/kernel'),
        ('language/encoder/blocks/norm/scale', 'language/encoder', 'norm/scale'),
        ('blocks/q/kernel', '', 'q/kernel'),
    ],
)
def test_a_path_into_blocks_is_a_stack_and_a_name(path, stack, name):
    assert rules.is_in_block(path)
    assert rules.stack_of(path) == stack
    assert rules.name_in_block(path) == name
    assert rules.block_path(stack, name) == path


@pytest.mark.parametrize('path', ['language/head/kernel', 'myblocks/kernel', 'blocks'])
def test_a_path_outside_of_blocks_stays_as_it_is(path):
    assert not rules.is_in_block(path)
    assert rules.stack_of(path) == path
    assert rules.name_in_block(path) == path


def test_path_without_a_rule_is_an_error():
    with pytest.raises(rules.RuleError, match="no rule matches kernel 'projection/kernel'"):
        rules.match([('.*/blocks/.*', 1)], PATHS)


def test_rule_without_a_path_is_an_error():
    with pytest.raises(rules.RuleError, match=r"'langauge/.*' matches none"):
        rules.match([('langauge/.*', 1), ('.*', None)], PATHS)


def test_rule_that_does_not_compile_is_an_error():
    with pytest.raises(rules.RuleError, match='not a regular expression'):
        rules.match([('(', 1)], PATHS)


def test_a_part_of_a_path_does_not_match():
    with pytest.raises(rules.RuleError):
        rules.match([('vision', 1), ('.*', 2)], PATHS)


MATRIX = jnp.arange(16.0).reshape(8, 2)
WITHOUT_KERNELS = {
    'another name': ({'fc': {'w': MATRIX, 'b': jnp.ones(2)}}, r'no kernel among fc/b \(2,\), fc/w \(8, 2\): expected'),
    'many names': ({f'w{i}': MATRIX for i in range(9)}, r'w4 \(8, 2\) and 4 more: expected'),
    'no leaves': ({}, 'no kernel among no leaves: expected'),
    'a list': ([{'kernel': MATRIX}], 'the tree is a list: expected'),
    'a list within': ({'layers': [{'kernel': MATRIX}], 'head': {'kernel': MATRIX}}, 'layers is a list, whose kernels'),
    'int keys': ({'layers': {0: {'kernel': MATRIX}}}, r'layers/0/kernel: key 0 is a int, expected a string'),
    'an array': (MATRIX, 'the tree is a ArrayImpl: expected'),
    'NNX': (
        nnx.state(nnx.Linear(8, 2, rngs=nnx.Rngs(0))),
        r'the tree is a State \(.*nnx.to_pure_dict\(state\) makes a dict\): expected',
    ),
}


def prune(params):
    sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())


def adapt(params):
    sl.init_lora(jax.random.key(0), params, [('.*', (2, 4))])


@pytest.mark.parametrize('act', [prune, adapt])
@pytest.mark.parametrize('kind', WITHOUT_KERNELS)
def test_a_tree_without_kernels_is_refused_with_its_leaves(kind, act):
    params, message = WITHOUT_KERNELS[kind]
    with pytest.raises(sl.RuleError, match=message + ".*nested dicts.*'kernel'"):
        act(params)


def test_a_tree_of_which_all_stays_dense_has_no_masks():
    _, masks = sl.prune_tree({'q': {'kernel': MATRIX}}, None, [('.*', 'dense')], method=sl.Magnitude())
    assert masks == {}


@pytest.mark.parametrize('act', [prune, adapt])
@pytest.mark.parametrize('use_bias', [True, False])
def test_kernels_of_flax_attention_are_refused(act, use_bias):
    layer = nn.MultiHeadDotProductAttention(num_heads=4, use_bias=use_bias)
    params = layer.init(jax.random.key(0), jnp.ones((1, 3, 8)))['params']
    for name in ('query', 'key', 'value', 'out'):
        with pytest.raises(sl.RuleError, match=rf'{name}/kernel \[.*\]: which axes .* \[in, heads \* head_dim\]'):
            act({'attention': {name: params[name]}})


def shapes(kernel, bias=None):
    layer = {'kernel': jnp.arange(float(jnp.prod(jnp.array(kernel)))).reshape(kernel)}
    return layer if bias is None else layer | {'bias': jnp.ones(bias)}


@pytest.mark.parametrize('act', [prune, adapt])
@pytest.mark.parametrize(
    'params',
    [
        {'fc': shapes((8, 4, 2), bias=(4, 2))},  # DenseGeneral: [in, heads, head_dim]
        {'fc': shapes((4, 8, 2), bias=(2,))},  # DenseGeneral: [heads, head_dim, out]
        {'fc': shapes((8, 4, 2))},  # a stack, or DenseGeneral without a bias
        {'fc': shapes((4, 4, 2), bias=(4, 2))},  # the bias fits both
        {'fc': shapes((2, 3, 8, 4))},
        {'blocks': {'fc': shapes((2, 3, 8, 4))}},
    ],
)
def test_kernels_whose_axes_are_not_known_are_refused(act, params):
    with pytest.raises(sl.RuleError, match=r'fc/kernel \[.*\]: which axes'):
        act(params)


@pytest.mark.parametrize('act', [prune, adapt])
@pytest.mark.parametrize(
    'params',
    [
        {'fc': shapes((2, 8, 4), bias=(2, 4))},
        {'query': shapes((2, 8, 4), bias=(2, 4))},  # the bias says that it is a stack
        {'blocks': {'query': shapes((2, 8, 4))}},
    ],
)
def test_stacks_are_accepted(act, params):
    act(params)


def test_a_kernel_that_stays_as_it_is_may_have_any_axes():
    params = {'conv': shapes((3, 3, 4, 2)), 'fc': shapes((8, 2))}
    _, masks = sl.prune_tree(params, None, [('conv/.*', 'dense'), ('.*', '2:4')], method=sl.Magnitude())
    lora = sl.init_lora(jax.random.key(0), params, [('conv/.*', None), ('.*', (2, 4))])
    assert list(masks) == list(lora) == ['fc']


def stack_of_zeros(layers):
    return {'kernel': jnp.zeros((layers, 4, 4))}


@pytest.mark.parametrize(
    ('params', 'message'),
    [
        (
            {'blocks': {'k': stack_of_zeros(3), 'q': stack_of_zeros(2)}},
            r'blocks/q/kernel \[2, 4, 4\] and blocks/k/kernel \[3, 4, 4\] differ in their first axis',
        ),
        ({'blocks': {'0': {'q': stack_of_zeros(2)}}}, "blocks/0/q/kernel .*the key '0' numbers layers that are not"),
    ],
)
def test_what_cannot_be_a_stack_of_layers_is_refused(params, message):
    with pytest.raises(rules.RuleError, match=message):
        sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())


def test_stacks_of_two_towers_may_differ_in_their_layers():
    params = {'a': {'blocks': {'q': stack_of_zeros(3)}}, 'b': {'blocks': {'q': stack_of_zeros(2)}}}
    sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())


def test_a_key_with_a_slash_is_refused():
    with pytest.raises(rules.RuleError, match="key 'a/b' contains a slash"):
        rules.flatten({'a/b': {'kernel': jnp.zeros((4, 4))}})


@pytest.mark.parametrize(
    ('leaf', 'kind'),
    [
        ({'kernel': nn.Partitioned(jnp.ones((4, 4)), (None, None))}, 'hidden/kernel is a Partitioned'),
        (nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(0))), 'hidden is a State'),
        ({'kernel': object()}, 'hidden/kernel is a object'),
    ],
)
def test_a_matrix_that_is_no_plain_array_is_named_unless_it_stays_dense(leaf, kind):
    params = {'hidden': leaf, 'q': {'kernel': jnp.ones((4, 4))}}
    with pytest.raises(rules.RuleError, match=f'{kind}, and rules prune it: expected a plain array'):
        sl.prune_tree(params, None, [('.*', '2:4')], method=sl.Magnitude())
    sl.prune_tree(params, None, [('q/kernel', '2:4'), ('.*', 'dense')], method=sl.Magnitude())
