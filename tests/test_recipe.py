"""What a recipe says becomes arguments of the library; what it cannot mean is named before any work."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

import sparselora_jax as sl
from configs import blip2_lang_only
from sparselora_jax.jobs.job import check_fit
from sparselora_jax.recipe import (
    FIELDS,
    ConfigError,
    base_formats,
    check_values,
    fields_page,
    fields_text,
    lora_rules,
    override,
    split_alternatives,
    stores_masks,
)
from sparselora_jax.sparse.packing import FORMATS
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
        ('evaluate.qqqq', 3, r"config has no field 'evaluate.qqqq'; evaluate has batch, data_root, length_penalty, "),
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
        ({'evaluate.metric': 'rouge'}, "evaluate.metric 'rouge': expected one of exact_match"),
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
        ({'prune.reconstruct.passes': -1}, r'prune.reconstruct.passes -1: expected 0 \(off\) or more'),
        ({'prune.reconstruct.rate': 0.0}, 'prune.reconstruct.rate 0.0: expected a positive number'),
        ({'prune.reconstruct.target': 'sparse'}, "prune.reconstruct.target 'sparse': expected one of dense, pruned"),
        (
            {'prune.reconstruct.passes': 1, 'prune.reconstruct.batch': 64},
            'prune.reconstruct.batch 64: expected at most 32, the samples that are processed at a time; lower it, or',
        ),
        (
            {'prune.reconstruct.passes': 1, 'prune.method': 'magnitude', 'prune.samples': 0},
            'prune.samples 0: expected 1 or more, because prune.reconstruct.passes 1 needs them',
        ),
        ({'stream': True}, 'stream True: the embedded model is not read from disk'),
    ],
)
def test_a_value_that_cannot_work_is_named_with_its_field(fields, said):
    config = blip2_lang_only.get_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=said):
        check_values(config)


def values_of_wrong_type(field):
    """Values of other types than the field's own. A config turns a bool into a float where the field is one."""
    default = next(iter(field.default.values())) if field.is_by_tower else field.default
    values = [None, [None], {'a': 1}, object]
    if not isinstance(default, str):
        values += ['', 'many', '1']
    if not isinstance(default, bool | float):
        values += [True]
    if not isinstance(default, int | float) or isinstance(default, bool):
        values += [3, 0.5]
    return values


def values_out_of_range(field):
    """Numbers that no numeric field accepts, or that are below its range."""
    default = next(iter(field.default.values())) if field.is_by_tower else field.default
    if isinstance(default, bool | str | tuple):
        return []
    values = [float('nan'), float('inf'), -float('inf'), 1e300, 1e-300, -1e-300]
    # A config turns an int into a float where the field is one, which an int of 400 digits cannot be.
    values += [10**30, 10**400, -1, -(10**400)] if isinstance(default, int) else []
    # A length penalty may have either sign.
    return values if field.name == 'evaluate.length_penalty' else [*values, -0.5]


def with_value(field, value):
    config = blip2_lang_only.get_config()
    with config.ignore_type():
        part = config
        *parents, name = field.name.split('.')
        for parent in parents:
            part = part[parent]
        if field.is_by_tower:
            part[name]['language'] = value
        else:
            part[name] = value
    return config


@pytest.mark.parametrize('field', FIELDS, ids=lambda field: field.name)
def test_every_field_refuses_other_types_and_numbers_out_of_its_range(field):
    for value in values_of_wrong_type(field) + values_out_of_range(field):
        with pytest.raises(ConfigError) as raised:
            check_values(with_value(field, value))
        message = str(raised.value)
        tower = '.language' if field.is_by_tower else ''
        shown = '' if isinstance(value, dict | list) else ' '.join(repr(value).split())[:77]
        assert message.startswith(f'{field.name}{tower} {shown}'), (value, message)
        assert 'expected ' in message
        assert '\n' not in message


@pytest.mark.parametrize(
    ('field', 'value', 'said'),
    [
        ('prune.damp', 0.0, 'prune.damp 0.0: expected a positive number'),
        ('prune.samples', 0, "prune.samples 0: expected 1 or more, because prune.method 'wanda' needs them"),
        ('prune.highest', 1.5, r'prune.highest 1.5: expected a sparsity in \(0, 1\]'),
        ('prune.group.language', 'row', "prune.group.language 'row': expected 'output' or 'matrix'"),
        ('lora.alpha.language', 0.0, 'lora.alpha.language 0.0: expected a positive number'),
        ('lora.dropout', 1.0, 'lora.dropout 1.0: expected a number from 0 to below 1'),
        ('restore.kd', 2.0, 'restore.kd 2.0: expected a number from 0 to 1'),
        ('restore.temperature', 0.0, 'restore.temperature 0.0: expected a positive number'),
        ('restore.peak', float('nan'), 'restore.peak nan: expected a positive number'),
        ('restore.clip', -1.0, r'restore.clip -1.0: expected 0 \(no limit\) or more'),
        ('restore.accumulate', 0, 'restore.accumulate 0: expected 1 or more'),
        ('restore.shares', (1, -2, 1), r'restore.shares \(1, -2, 1\): expected numbers of 0 or more'),
        ('seed', 99999999999999, 'seed 99999999999999: expected at most 2147483647'),
        ('seed', -1, 'seed -1: expected a whole number from 0 to 2147483647'),
        ('mesh.fsdp', 0, 'mesh.fsdp 0: expected 1 or more'),
        ('model', ' ', "model ' ': expected embedded, a directory or a hub id"),
        ('restore.steps', 10**12, 'restore.steps 1000000000000: expected at most 2147483647'),
        ('restore.temperature', 1e-300, 'restore.temperature 1e-300: expected a number that float32 can hold, from'),
    ],
)
def test_a_number_outside_its_range_is_named_with_the_range(field, value, said):
    config = blip2_lang_only.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=f'^{said}'):
        check_values(config)


def test_samples_are_only_needed_by_what_is_calibrated():
    check_values(recipe(prune__samples=0, prune__method='magnitude'))
    rounded = recipe(prune__samples=0, prune__method='magnitude', restore__base='int4')
    with pytest.raises(ConfigError, match=r"restore.base 'int4' needs them"):
        check_values(rounded)
    scored = recipe(
        prune__samples=0, prune__method='magnitude', prune__pattern__language='0.5', prune__allocation='owl'
    )
    with pytest.raises(ConfigError, match=r"prune.allocation 'owl' needs them"):
        check_values(scored)


def test_a_field_that_does_not_exist_or_is_missing_is_named():
    config = blip2_lang_only.get_config()
    config.restore.step = 3
    with pytest.raises(ConfigError, match=r"config has no field 'restore.step'; did you mean 'restore.steps'\?"):
        check_values(config)
    config = blip2_lang_only.get_config()
    del config.restore.clip
    with pytest.raises(
        ConfigError, match=r"config has no field 'restore.clip': expected 0 \(no limit\) or more; begin with b"
    ):
        check_values(config)
    config = blip2_lang_only.get_config()
    del config.restore
    with pytest.raises(ConfigError, match=r"config has no field 'restore.steps'"):
        check_values(config)


def test_an_option_of_a_method_of_ones_own_is_a_field():
    config = blip2_lang_only.get_config()
    config.prune.method = f'{__name__}:Steep'
    config.prune.steepness = 0.3
    check_values(config)
    config.prune.steepnes = 0.3
    with pytest.raises(ConfigError, match=r"config has no field 'prune.steepnes'; did you mean 'prune.steepness'\?"):
        check_values(config)


@dataclasses.dataclass(frozen=True)
class Steep(sl.Wanda):
    steepness: float = 0.1


def test_the_page_and_the_help_list_every_field_with_its_default_and_its_legal_values():
    page = fields_page()
    text = ' '.join(fields_text().split())
    for field in FIELDS:
        assert f'| `{field.name}` |' in page
        assert f'--config.{field.name}=' in text
        assert field.legal.expected.replace('|', '\\|') in page
        assert ' '.join(field.legal.expected.split()) in text
    # Every row of a table has four cells.
    assert {len(re.findall(r'(?<!\\)\|', line)) for line in page.splitlines() if line.startswith('|')} == {5}


@pytest.mark.parametrize('base', ['bitmask', 'packed24', 'packed24_int4', 'int4'])
def test_a_base_may_be_any_registered_format_by_its_name(base):
    config = blip2_lang_only.get_config()
    config.restore.base = base
    check_values(config)
    assert base_formats(config) == base
    assert stores_masks(config) == FORMATS.find(base).brings_mask


def test_a_format_that_does_not_take_the_pattern_is_refused_as_base():
    config = blip2_lang_only.get_config('pattern=0.5')
    config.restore.base = 'packed24'
    with pytest.raises(ConfigError, match=r"restore.base 'packed24' cannot hold prune.pattern.language '0.5'"):
        check_values(config)


def test_a_format_that_is_registered_later_may_be_a_base(monkeypatch):
    monkeypatch.setitem(FORMATS._parts, 'later', FORMATS.find('bitmask'))
    config = blip2_lang_only.get_config()
    config.restore.base = 'later'
    check_values(config)
