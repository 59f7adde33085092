"""Names of exchangeable parts."""

import pytest

from sparselora_jax.runtime.registry import Registry, UnknownNameError


def registry():
    metrics = Registry('metric')
    metrics.register('exact', str.__eq__)
    return metrics


def test_a_name_and_an_import_are_found():
    metrics = registry()
    assert metrics.find('exact') is str.__eq__
    assert metrics.find('operator:eq')(1, 1)
    assert list(metrics) == ['exact']
    assert 'exact' in metrics
    assert len(metrics) == 1


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('exakt', r"metric 'exakt': expected one of exact, or package.module:Name \(did you mean 'exact'\?\)"),
        ('no.such.module:f', r"metric 'no.such.module:f' cannot be imported"),
        ('operator:nothing', r"metric 'operator:nothing' cannot be imported"),
        (':f', r"metric ':f' cannot be imported"),
    ],
)
def test_what_does_not_exist_is_named(name, message):
    with pytest.raises(UnknownNameError, match=message):
        registry().find(name)


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="metric 'exact' is registered already"):
        registry().register('exact', len)


def test_a_module_that_fails_when_it_is_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / 'failing.py').write_text("raise RuntimeError('no such device')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownNameError, match=r"metric 'failing:f' cannot be imported .RuntimeError: no such device"):
        registry().find('failing:f')
