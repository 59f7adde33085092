"""Compiles a recipe's restoration step for a TPU slice that is not there: does it fit, how fast, for how much?

pip install -r requirements.txt 'jax[tpu]'
python launch/compile.py Salesforce/instructblip-vicuna-7b --topology=v5p:2x2x1 \
    --config=configs/instructblip_lang_only.py:hardware=gpu --config.restore.base=packed --config.restore.teacher=top_k

Nothing is run and no weights are read. MODEL, and the recipe without --config, as for `inspect.py`; the mesh is the
config's, on the first chips of the topology. Bytes on a chip are the compiler's own count, FLOPs are counted from the
program's trace, what is sent is read from the compiled program, and time is a roofline of these (`plan.py`): a bound,
no measurement. All of it is also written to --workdir as JSON.
"""

import os
import sys

os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # nothing is run, so several may compile side by side

import json
import time
from pathlib import Path

import cli
import jax
from absl import flags
from jax.experimental import topologies

from sparselora_jax import chips, memory, plan, programs, recipe, sharding, storage

GIB = 2**30
CONFIG = cli.define_recipe(None)
TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x2', 'of a TPU slice, e.g. v5e:4x4, v5p:2x2x1, v6e:2x2')
PRICE = flags.DEFINE_float('price', None, 'dollars for a chip and hour; by default a list price (chips.py)')
WORKDIR = flags.DEFINE_string('workdir', 'runs/compile', 'where the figures are written')


def main(argv):
    """Prints the figures, and ends with 1 where the step does not fit."""
    config = CONFIG.value
    name, _, cfg = cli.find_model(argv, config)
    config = config or cli.family_recipe(cfg)
    if config is None:
        raise recipe.ConfigError(f'{name}: no recipe for a language model alone: give one with --config=...')
    recipe.check_values(config)
    recipe.check_batches(config)
    chip = find_chip(TOPOLOGY.value)
    made = memory.recipe(cfg, config)
    mesh = find_mesh(config, TOPOLOGY.value)
    step, arguments = programs.restore_step(made)
    arguments = programs.placed(arguments, mesh)
    print(f'{name} on {mesh.size} of {TOPOLOGY.value} ({chip.name}), a restoration step of {config.restore.batch}:')
    print(f'  by shapes {memory.restore(made).total / GIB:.2f} GiB a chip; by the compiler, GiB a chip:', flush=True)
    started = time.monotonic()
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        print(f'  does not fit, or does not compile: {str(error)[:2000]}')
        sys.exit(1)
    took = {'compilation_s': time.monotonic() - started}
    found = took | plan.restore(made, arguments, compiled, chip)
    price = chip.dollars_hour if PRICE.value is None else PRICE.value
    found |= plan.throughput(made, found['roofline']['seconds'], mesh.size, price)
    report(found, chip, price)
    file = Path(WORKDIR.value) / f'{name.replace("/", "--")}-{TOPOLOGY.value.replace(":", "-")}.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    conditions = {'model': name, 'topology': TOPOLOGY.value, 'price': price, 'config': json.loads(config.to_json())}
    storage.write_text(file, json.dumps(conditions | found, indent=1))
    print(f'  written to {file}')
    if not found['fits']:
        sys.exit(1)


def find_chip(topology):
    """What is known of the chips of a topology."""
    kind = topology.split(':')[0]
    if kind not in chips.TPUS:
        raise recipe.ConfigError(
            f'--topology={topology}: expected one of {", ".join(chips.TPUS)}, then :4x4 or the like'
        )
    return chips.TPUS[kind]


def find_mesh(config, topology):
    """The config's mesh on the first chips of a topology."""
    count = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    try:
        devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except (RuntimeError, ValueError) as error:
        raise recipe.ConfigError(f'--topology={topology}: {error}; is jax[tpu] installed?') from None
    if count > len(devices):
        raise recipe.ConfigError(f'the mesh of the config needs {count} chips, {topology} has {len(devices)}')
    return sharding.make_mesh(**config.mesh, devices=devices[:count])


def report(found, chip, price):
    """The figures, for people."""
    rows = {what: f'{size / GIB:.3f}' for what, size in found['bytes'].items() if size}
    fits = 'fits' if found['fits'] else 'does NOT fit'
    rows['together'] = f'{found["total"] / GIB:.2f}, {fits} into {chip.memory / GIB:.1f}'
    rows['FLOPs a chip'] = f'{found["flops"]:.3g}'
    for kind, sent in found['collectives'].items():
        rows[kind] = f'{sent["runs"]} times, {sent["bytes"] / GIB:.3f} GiB sent by a chip'
    line = found['roofline']
    terms = ', '.join(f'{name} {line[name]:.3f}' for name in plan.Roofline._fields)
    rows['seconds a step, at least'] = f'{line["seconds"]:.3f} ({terms})'
    if found['compiler_s'] is not None:
        rows["seconds by the compiler's estimate, loops counted once"] = f'{found["compiler_s"]:.3f}'
    rows['samples a second, at most'] = f'{found["samples_s"]:.1f} ({found["tokens_s"]:.0f} tokens)'
    rows['25,000 samples, at least'] = f'{found["dollars_25k"]:.2f} dollars, at {price:.2f} for a chip and hour'
    rows['compiled in'] = f'{found["compilation_s"]:.0f} s'
    for what, value in rows.items():
        print(f'  {what}: {value}')


if __name__ == '__main__':
    cli.run(main)
