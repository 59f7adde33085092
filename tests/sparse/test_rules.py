"""Contract: first match wins, every path matches, every rule is used."""

import pytest

from sparselora_jax.sparse import rules

PATHS = ['vision/blocks/attn/q/kernel', 'language/blocks/attn/q/kernel', 'projection/kernel']


def test_first_match_wins():
    values = rules.match([('language/.*', 1), ('.*/q/kernel', 2), ('.*', 3)], PATHS)
    assert values == {PATHS[0]: 2, PATHS[1]: 1, PATHS[2]: 3}


def test_leaves_come_by_name_whatever_the_order_of_the_tree():
    flat = rules.flatten({'b': {'y': 1, 'x': 2}, 'a': 3})
    assert list(flat) == ['a', 'b/x', 'b/y']
    assert rules.unflatten(flat) == {'b': {'y': 1, 'x': 2}, 'a': 3}


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
