"""Methods and allocations of a recipe: what is registered, what is not, and what cannot be one."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import pytest

import sparselora_jax as sl
from configs import blip2_lang_only
from sparselora_jax import pruning
from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.method import MethodError, check_method
from sparselora_jax.recipe import ConfigError, allocation_of, check_allocation, metric, prune_methods


@dataclass(frozen=True)
class Own(pruning.Wanda):
    """A method with an option of the config, and one of its own."""

    damp: float = 0.5
    shift: int = 3


@dataclass(frozen=True, kw_only=True)
class Needy(pruning.Wanda):
    """An option that nothing gives a value."""

    strength: float


@dataclass(frozen=True)
class OwnAllocation(pruning.Uniform):
    """An allocation with an option of the config, and one of its own."""

    highest: float = 0.1
    own: str = 'default'


@dataclass(frozen=True)
class OneGroup(pruning.Method):
    """A method without the option `group`."""

    statistic: ClassVar[None] = None
    group: ClassVar[str] = 'output'
    edits_kept_weights: ClassVar[bool] = False
    outputs_are_independent: ClassVar[bool] = True

    def __call__(self, kernel, statistic, pattern, num_zeros=None):
        raise NotImplementedError


class Silent:
    """Callable, and says nothing of itself."""

    def __call__(self, kernel, statistic, pattern, num_zeros=None):
        raise NotImplementedError


@dataclass
class Unhashable(pruning.Method):
    """Not frozen."""

    group: str = 'output'
    statistic: ClassVar[None] = None
    edits_kept_weights: ClassVar[bool] = False
    outputs_are_independent: ClassVar[bool] = True

    def __call__(self, kernel, statistic, pattern, num_zeros=None):
        raise NotImplementedError


def config_with(**fields):
    config = blip2_lang_only.get_config()
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in fields.items()})
    return config


def methods_of(**fields):
    return dict(prune_methods(config_with(**fields)))


def test_options_are_filled_in_by_their_names():
    got = methods_of(prune__method='sparsegpt', prune__damp=0.2, prune__block=32)
    assert got['vision/(.*/)?blocks/.*'] == pruning.SparseGPT(damp=0.2, block=32, group='block')
    assert got['.*'] == pruning.SparseGPT(damp=0.2, block=32)
    assert methods_of(prune__method='random', seed=9)['.*'] == pruning.Random(seed=9)
    got = methods_of(prune__method='dsnot', prune__initial='sparsegpt', prune__cycles=7, prune__threshold=0.5)
    initial = pruning.SparseGPT(damp=0.01, block=64, group='block')
    assert got['vision/(.*/)?blocks/.*'] == pruning.DSnoT(initial, cycles=7, threshold=0.5)


def test_a_class_that_is_registered_nowhere_is_found_by_its_module():
    got = methods_of(prune__method='test_method:Own', prune__damp=0.2)
    assert got['vision/(.*/)?blocks/.*'] == Own(group='matrix', damp=0.2, shift=3)
    assert allocation_of(config_with(prune__allocation='test_method:OwnAllocation')) == OwnAllocation(0.8, 'default')


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'method': 'wandas'}, r"prune.method 'wandas': expected one of random, .* \(did you mean 'wanda'\?\)"),
        ({'initial': 'wandas'}, "prune.initial 'wandas': expected one of random, "),
        ({'initial': 'dsnot'}, "prune.initial 'dsnot': expected one of random, magnitude, wanda, sparsegpt"),
        ({'method': 'no.module:Name'}, "prune.method 'no.module:Name' cannot be imported"),
        ({'method': 'test_method:methods_of'}, "prune.method 'test_method:methods_of': expected a dataclass"),
        ({'method': 'test_method:Unhashable'}, 'Unhashable cannot be hashed: make it a frozen dataclass'),
        (
            {'method': 'test_method:Needy'},
            'prune.method Needy: its option strength has no default, and config.prune has',
        ),
        ({'group.vision': 'block'}, "prune.group.vision 'block': expected 'output' or 'matrix'"),
        (
            {'method': 'test_method:OneGroup', 'pattern.vision': '0.5'},
            "prune.group.vision 'matrix': method 'test_method:OneGroup' compares the weights of each output only",
        ),
    ],
)
def test_what_is_no_method_is_named(fields, match):
    config = blip2_lang_only.get_config()
    config.update_from_flattened_dict({f'prune.{name}': value for name, value in fields.items()})
    with pytest.raises(ConfigError, match=match):
        prune_methods(config)


def test_what_is_given_in_a_methods_place_is_named():
    for wrong, name in (('wanda', 'wanda'), (sl.Wanda, 'Wanda')):
        with pytest.raises(pruning.MethodError, match=f'pruning method {name}: expected an instance such as sl.Wanda'):
            check_method(wrong)
    with pytest.raises(pruning.MethodError, match='Silent does not say statistic, group, edits_kept_weights, outputs_'):
        check_method(Silent())


@pytest.mark.parametrize('name', list(pruning.METHODS))
def test_every_registered_method_says_all_that_a_method_must_say(name):
    check_method(pruning.METHODS.find(name)())
    assert isinstance(pruning.METHODS.find(name)(), pruning.Method)


@pytest.mark.parametrize(
    ('fields', 'match'),
    [
        ({'allocation': 'global_magnitude', 'highest': 0.0}, r'prune.highest 0.0: expected a sparsity in \(0, 1\]'),
        ({'allocation': 'ecoflap_first', 'highest': 1.5}, r'prune.highest 1.5: expected a sparsity in \(0, 1\]'),
        ({'allocation': 'ecoflap_zeroth', 'noise': 0.0}, 'prune.noise 0.0: expected more than 0'),
        ({'allocation': 'owl', 'outlier': 0.0}, 'prune.outlier 0.0: expected more than 0'),
        ({'allocation': 'owl', 'spread': -0.1}, 'prune.spread -0.1: expected more than 0'),
        ({'allocation': 'das', 'margin': 0.0}, 'prune.margin 0.0: expected more than 0 and less than 1'),
        ({'allocation': 'evenly'}, "prune.allocation 'evenly': expected one of uniform, global_magnitude, owl"),
        ({'allocation': 'test_method:Own'}, "'test_method:Own': expected a subclass of .*Allocation"),
    ],
)
def test_options_of_an_allocation_that_cannot_work_are_named(fields, match):
    config = blip2_lang_only.get_config()
    config.update_from_flattened_dict({f'prune.{name}': value for name, value in fields.items()})
    with pytest.raises(ConfigError, match=match):
        allocation_of(config)


def test_a_statistic_that_python_binds_to_the_method_is_refused():
    @dataclass(frozen=True)
    class Bound(pruning.Wanda):
        statistic: ClassVar = calibrate.squares

    with pytest.raises(pruning.MethodError, match=r'write statistic = staticmethod\(squares\)'):
        pruning.prune_tree({'q': {'kernel': jnp.ones((4, 2))}}, {}, [('.*', '2:4')], method=Bound())


def changed(**members):
    """A method of one's own with other members."""
    return dataclass(frozen=True)(type('Changed', (pruning.Wanda,), {'__annotations__': {}} | members))()


def call_of_own(self, kernel, statistic, pattern, num_zeros=None):
    raise NotImplementedError


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        (
            {'__call__': call_of_own},
            r'has its own __call__ and inherits edits_kept_weights and outputs_are_independent, .* add: '
            r'edits_kept_weights: ClassVar\[bool\] = False .*; outputs_are_independent: ClassVar\[bool\] = False',
        ),
        (
            {'__call__': call_of_own, 'edits_kept_weights': True},
            'has its own __call__ and inherits outputs_are_independent, which may not be true of it',
        ),
        ({'edits_kept_weights': 'no'}, "edits_kept_weights is 'no': expected True or False"),
        ({'outputs_are_independent': None}, 'outputs_are_independent is None: expected True or False'),
        ({'groups': None}, 'groups is None: expected a dict'),
        ({'statistic': 'squares'}, "statistic is 'squares': expected None or a function such as staticmethod"),
    ],
)
def test_what_a_method_must_say_itself_is_named(members, message):
    with pytest.raises(pruning.MethodError, match=f'pruning method Changed.* {message}'):
        check_method(changed(**members))


def test_a_subclass_that_keeps_the_call_inherits_what_is_said_of_it():
    check_method(changed())
    check_method(changed(edits_kept_weights=True))


def test_a_check_that_fails_names_its_method():
    def check(self, pattern, inputs):
        return pattern.no_such_field

    params = {'q': {'kernel': jnp.ones((4, 2))}}
    with pytest.raises(pruning.MethodError, match='check of pruning method Changed fails: AttributeError'):
        pruning.prune_tree(params, {}, [('.*', '2:4')], method=changed(check=check))


def no_sum(x):
    return x


def failing(x):
    return x.no_such_thing


@pytest.mark.parametrize(
    ('stat', 'message'),
    [
        (no_sum, 'statistic no_sum of 3 tokens has other shapes than of one token: expected a sum'),
        (failing, 'statistic failing fails: AttributeError'),
    ],
)
def test_a_statistic_that_is_no_sum_is_named(stat, message):
    params = {'q': {'kernel': jnp.ones((4, 2))}}
    with pytest.raises(calibrate.CalibrationError, match=message):
        calibrate.collect(lambda w, x: sl.linear(x, w['q']['kernel']), params, [jnp.ones((3, 4))], stat=stat)


@dataclass(frozen=True)
class Refusing(pruning.Wanda):
    """An option that the method itself refuses, by an error of Python."""

    def __post_init__(self):
        raise ValueError('my option is bad')


@dataclass(frozen=True)
class RefusingAllocation(pruning.Uniform):
    """As `Refusing`, but an allocation that also fails to check."""

    moves_zeros: ClassVar[bool] = True

    def check(self, uniform, sizes):
        raise ValueError('not these sizes')


def test_a_part_that_fails_while_the_recipe_is_read_is_named():
    with pytest.raises(ConfigError, match=r'prune\.method Refusing fails: ValueError: my option is bad'):
        prune_methods(config_with(prune__method='test_method:Refusing'))
    config = config_with(prune__allocation='test_method:RefusingAllocation')
    config.prune.pattern = dict.fromkeys(config.prune.pattern, '0.5')
    kernel = {'blocks': {'q': {'kernel': jnp.ones((2, 8, 8))}}}
    params = dict.fromkeys(config.prune.pattern, kernel)
    with pytest.raises(pruning.AllocationError, match='check of RefusingAllocation fails: ValueError: not these sizes'):
        check_allocation(config, params)


def titled(title):
    return type('Titled', (), {'title': title, '__call__': lambda self, predicted, reference: 1.0})()


UNTITLED = titled(None)
EMPTY = titled(' ')


@pytest.mark.parametrize('name', ['UNTITLED', 'EMPTY'])
def test_a_metric_without_a_title_is_named(name):
    config = blip2_lang_only.get_config()
    config.evaluate.metric = f'test_method:{name}'
    with pytest.raises(ConfigError, match=f"metric 'test_method:{name}' has the title .*: expected a text"):
        metric(config)


def test_numbers_that_a_method_cannot_return_are_refused():
    params = {'w': {'kernel': jnp.ones((8, 8), jnp.complex64)}}
    with pytest.raises(MethodError, match=r'^w/kernel: Magnitude cannot prune an array of complex64: expected real'):
        sl.prune_tree(params, None, [('.*', 0.5)], method=sl.Magnitude())
    integers = {'w': jnp.arange(64, dtype=jnp.int8).reshape(8, 8)}
    batches = [jnp.eye(8)]
    with pytest.raises(
        MethodError, match=r'^w: SparseGPT changes the weights that it keeps, and would cut them to int8'
    ):
        sl.prune(dequantised, integers, batches, [('.*', 0.5)], method=sl.SparseGPT())


def dequantised(params, x):
    return x @ (params['w'].astype(jnp.float32) * 0.01)
