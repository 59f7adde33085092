"""What a recipe says becomes arguments of the library; what it cannot mean is named before any work."""

import jax
import jax.numpy as jnp
import pytest

import sparselora_jax as sl
from configs import blip2_lang_only
from sparselora_jax.jobs.job import check_fit
from sparselora_jax.recipe import ConfigError, check_values, lora_rules, override, split_alternatives
from sparselora_jax.sparse.rules import flatten

KERNELS = ('attn/q/kernel', 'attn/k/kernel', 'mlp/up/kernel')
SHAPES = {
    tower: {
        'blocks': {
            'attn': {'q': {'kernel': (2, 8, 8)}, 'k': {'kernel': (2, 8, 8)}},
            'mlp': {'up': {'kernel': (2, 8, 8)}},
        }
    }
    for tower in ('vision', 'qformer', 'language')
}


def recipe(**fields):
    config = blip2_lang_only.get_config()
    override(config, {name.replace('__', '.'): value for name, value in fields.items()})
    return config


def adapted(config):
    """The kernels that get factors, by tower."""
    paths = flatten(sl.init_lora(jax.random.key(0), zeros(SHAPES), lora_rules(config)))
    return {tower: {path.split('/blocks/')[1] for path in paths if path.startswith(f'{tower}/')} for tower in SHAPES}


def zeros(shapes):
    return {name: jnp.zeros(value) if isinstance(value, tuple) else zeros(value) for name, value in shapes.items()}


def test_every_alternative_of_a_regex_is_of_its_own_tower():
    config = recipe(
        lora__targets__language='attn/q/kernel|mlp/up/kernel', lora__targets__vision='attn/k/kernel|attn/q/kernel'
    )
    assert adapted(config) == {
        'vision': {'attn/k/kernel', 'attn/q/kernel'},
        'qformer': set(KERNELS),
        'language': {'attn/q/kernel', 'mlp/up/kernel'},
    }


def test_an_alternative_that_matches_nothing_is_named():
    config = recipe(lora__targets__language='attn/q/kernel|mlp/upp/kernel')
    with pytest.raises(ConfigError, match=r"lora.targets.language: 'mlp/upp/kernel' .*matches no kernel .*attn/k/ker"):
        check_fit(config, SHAPES)
    check_fit(recipe(lora__targets__language='attn/q/kernel|mlp/(up|down)/kernel'), SHAPES)


def test_a_target_that_is_no_regex_is_named():
    with pytest.raises(ConfigError, match=r"lora.targets.language 'attn/\(q': expected a regular expression"):
        check_values(recipe(lora__targets__language='attn/(q'))


@pytest.mark.parametrize(
    ('regex', 'alternatives'),
    [
        ('.*', ['.*']),
        ('a|b|c', ['a', 'b', 'c']),
        ('a/(q|k)/x|b', ['a/(q|k)/x', 'b']),
        (r'a\|b|c', [r'a\|b', 'c']),
        ('a[|]b|c', ['a[|]b', 'c']),
        ('a[]|]b|c', ['a[]|]b', 'c']),
        ('a[^]|(]b|c', ['a[^]|(]b', 'c']),
        (r'a[\]|]b|c', [r'a[\]|]b', 'c']),
        (r'\(a|b\)', [r'\(a', r'b\)']),
    ],
)
def test_a_regex_is_split_where_no_bracket_is_open(regex, alternatives):
    assert split_alternatives(regex) == alternatives


@pytest.mark.parametrize(
    ('name', 'value', 'said'),
    [
        ('restore.stepz', 3, r'config has no field \'restore.stepz\'; did you mean "steps" instead of "stepz"\?$'),
        ('restores.steps', 3, r'no field \'restores.steps\'; did you mean "restore" instead of "restores"\?$'),
        ('evaluate.qqqq', 3, r"config has no field 'evaluate.qqqq'; evaluate has batch, length_penalty, "),
        ('seed.x', 3, r"config has no field 'seed.x'; seed has no fields$"),
        ('restore.steps', 'many', r"config: restore.steps cannot be 'many'"),
    ],
)
def test_an_override_that_cannot_be_is_named_in_one_line(name, value, said):
    with pytest.raises(ConfigError, match=said) as raised:
        override(blip2_lang_only.get_config(), {name: value})
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ({'data': 'no_such_module:Data'}, "data: data set 'no_such_module:Data' cannot be imported"),
        ({'evaluate.metric': 'rouge'}, "evaluate.metric: metric 'rouge': expected one of exact_match"),
        ({'evaluate.metric': 'json:nothing'}, "evaluate.metric: metric 'json:nothing' cannot be imported"),
        ({'evaluate.metric': 'json:dumps'}, "evaluate.metric: metric 'json:dumps': expected an object with a `title`"),
        ({'restore.shares': (1, 2)}, r'restore.shares \(1, 2\): expected a share of each kind: yes/no, shape, colour'),
        ({'data': 'some/folder'}, r"restore.shares \(2, 1, 1\): expected \(\), because .* 'some/folder'"),
        ({'restore.spike': 0.5}, r'restore.spike 0.5: expected more than 1 \(times the usual loss\), or 0'),
        ({'prune.threshold': float('nan')}, 'prune.threshold nan: expected 0 or more, per token'),
        ({'lora.rank.vision': -1}, r'lora.rank.vision -1: expected 0 \(leave it alone\) or more'),
        ({'dtype': 'int8'}, "dtype 'int8': expected one of float32, bfloat16, float16"),
        ({'restore.accumulate': 3}, 'restore.accumulate 3: does not divide restore.batch, 8'),
        ({'evaluate.max_new_tokens': 1}, 'evaluate.max_new_tokens 1: answers of up to 2 tokens'),
        ({'stream': True}, 'stream True: the embedded model is not read from disk'),
    ],
)
def test_a_value_that_cannot_work_is_named_with_its_field(fields, said):
    config = blip2_lang_only.get_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=said):
        check_values(config)
