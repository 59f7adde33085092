"""Chips that are not here: what JAX is asked for, and what is said without such a chip, or its compiler."""

import re
from types import SimpleNamespace

import pytest
from jax.experimental import topologies

from sparselora_jax.planning import chips, topology
from sparselora_jax.recipe import ConfigError


def test_gpus_are_described_to_their_compiler(monkeypatch):
    asked = []

    def describe(**what):
        asked.append(what)
        return SimpleNamespace(devices=['a', 'b', 'c', 'd'])

    monkeypatch.setattr(topologies, 'get_topology_desc', describe)
    chip, devices = topology.find('h200:4')
    assert chip == chips.GPUS['h200'].chip
    assert len(devices) == 4
    (what,) = asked
    assert (what['platform'], what['topology']) == ('cuda', '1x1x4')
    said = dict(re.findall(r'(\w+): (\d+)$', what['target_config'], re.M))
    assert said['device_memory_size'] == str(chip.memory)
    assert said['core_count'] == '132'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (
            'h300:8',
            'h300:8: expected one of v5e, v5p, v6e, then :4x4 or the like, or of a100, h100, h200, b200, then :8',
        ),
        ('h100', 'h100: expected 1 to 8 GPUs, of one machine'),
        ('h100:9', 'h100:9: expected 1 to 8 GPUs, of one machine'),
        ('a100:8', 'a100:8: topology not implemented for cuda; is requirements-gpu.txt installed?'),
        ('v5e:2x2', 'v5e:2x2: topology not implemented for tpu; is requirements-tpu.txt installed?'),
    ],
)
def test_what_is_not_there_is_named(name, message, monkeypatch):
    def missing(platform, **what):
        raise NotImplementedError(f'topology not implemented for {platform}')

    monkeypatch.setattr(topologies, 'get_topology_desc', missing)
    with pytest.raises(ConfigError, match=f'^--topology={re.escape(message)}'):
        topology.find(name)


def test_only_tpus_are_asked_for_effort():
    assert topology.compiler_options(chips.TPUS['v5e'], -1.0) == {'exec_time_optimization_effort': -1.0}
    assert topology.compiler_options(chips.TPUS['v5e'], 0.0) == {}
    assert 'exec_time_optimization_effort' not in topology.compiler_options(chips.GPUS['h100'].chip, -1.0)
