"""Which meshes are worth compiling for, by shapes alone; test_programs.py compares what they send with programs."""

from dataclasses import replace

import pytest
from test_memory import CFG, config

from sparselora_jax.planning import chips, memory, meshes

assert config  # a fixture
CHIP = chips.TPUS['v5e']
ODD = replace(CFG, language=replace(CFG.language, heads=3, kv_heads=3))  # tensor would cut heads


def axes(config, chip=CHIP):
    return [tuple(one.axes.values()) for one in meshes.candidates(ODD, config, chip, 4, memory.load)]


@pytest.mark.slow
def test_a_base_is_gathered_only_where_it_does_not_fit_whole(config):
    whole = memory.load(memory.recipe(ODD, config)).total
    assert axes(config, CHIP._replace(memory=whole - 1)) == [(2, 2, 1), (1, 4, 1)]
    config.restore.batch = 2  # no four devices have a row each
    assert not axes(config)


@pytest.mark.slow
def test_what_is_gathered_follows_micro_batches(config):
    config.mesh.fsdp = 4
    made = memory.recipe(CFG, config)
    factors, once = 2 * memory.on_device(made.lora, None) * 3 / 4, meshes.sent(made)
    config.restore.accumulate = 2
    assert meshes.sent(made) - factors == 2 * (once - factors)
