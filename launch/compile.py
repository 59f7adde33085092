"""Compiles a recipe's restoration step for a TPU that is not there: bytes on a chip by the compiler's own count.

pip install -r requirements.txt 'jax[tpu]'
python launch/compile.py Salesforce/instructblip-vicuna-7b --topology=v5p:2x2x1 \
    --config=configs/instructblip_lang_only.py:hardware=gpu --config.restore.base=packed --config.restore.teacher=top_k

Nothing is run and no weights are read. MODEL, and the recipe without --config, as for `inspect.py`; the mesh is the
config's, on the first chips of the topology.
"""

import os
import sys

os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}

import time

import cli
import jax
from absl import flags
from jax.experimental import topologies

from sparselora_jax import memory, programs, recipe, sharding

GIB = 2**30
CONFIG = cli.define_recipe(None)
TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x2', 'of a TPU slice, e.g. v5e:4x4, v5p:2x2x1, v6e:2x2')


def main(argv):
    """Prints bytes, and ends with 1 where they do not fit."""
    config = CONFIG.value
    name, _, cfg = cli.find_model(argv, config)
    config = config or cli.family_recipe(cfg)
    if config is None:
        raise recipe.ConfigError(f'{name}: no recipe for a language model alone: give one with --config=...')
    recipe.check_values(config)
    made = memory.recipe(cfg, config)
    chips = made.mesh.size if made.mesh else 1
    try:
        devices = topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGY.value).devices
    except (RuntimeError, ValueError) as error:
        raise recipe.ConfigError(f'--topology={TOPOLOGY.value}: {error}; is jax[tpu] installed?') from None
    if chips > len(devices):
        raise recipe.ConfigError(f'the mesh of the config needs {chips} chips, {TOPOLOGY.value} has {len(devices)}')
    mesh = sharding.make_mesh(**config.mesh, devices=devices[:chips])
    step, arguments = programs.restore_step(made)
    state, frozen, batch = programs.placed(arguments, mesh)
    analytic = memory.restore(made).total / GIB
    print(f'{name} on {chips} of {TOPOLOGY.value}: {analytic:.2f} GiB a chip by shapes; by the compiler:', flush=True)
    started = time.monotonic()
    try:
        found = step.lower(state, frozen, batch).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        print(f'does not fit, or does not compile: {str(error)[:2000]}')
        sys.exit(1)
    held = {
        'arguments (params, masks, LoRA, Adam, batch)': found.argument_size_in_bytes,
        "outputs that take no argument's place": found.output_size_in_bytes - found.alias_size_in_bytes,
        'temporary': found.temp_size_in_bytes,
    }
    for what, size in held.items():
        print(f'  {what}: {size / GIB:.2f} GiB')
    print(f'  together: {sum(held.values()) / GIB:.2f} GiB; compiled in {time.monotonic() - started:.0f} s')


if __name__ == '__main__':
    cli.run(main)
