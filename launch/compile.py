"""Compiles a recipe's programs for a TPU slice, or GPUs, that are not there: do they fit, how fast, for how much?

pip install -r requirements-tpu.txt  # or requirements-gpu.txt
python launch/compile.py Salesforce/instructblip-vicuna-7b --topology=v5p:2x2x1 \
    --config=configs/instructblip_lang_only.py:hardware=gpu --config.restore.base=packed --config.restore.teacher=top_k

Nothing is run and no weights are read. MODEL, and the recipe without --config, as for `inspect.py`. --program says what
is compiled: a restoration step, or a calibration pass, the pruner's program for a block of each tower, times layers and
chunks.

The mesh is the config's, on the first chips of the topology; with --mesh=best it is found: of all meshes of the whole
topology that fit by shapes, up to --tries are compiled, those first that send and read least by shapes, until one fits
that is bound by its matmuls, which are as many on all; the fastest is kept.

Bytes on a chip are the compiler's own count, FLOPs are counted from the program's trace, what is sent is read from the
compiled program, and time is a roofline of these (`plan.py`): a bound, no measurement. All of it is also written to
--workdir as JSON.
"""

import os
import sys

os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # nothing is run, so several may compile side by side

import json
import math
import time
from pathlib import Path

import cli
import jax
from absl import flags

from sparselora_jax import recipe
from sparselora_jax.planning import memory, meshes, plan, programs, topology
from sparselora_jax.runtime import files
from sparselora_jax.sparse import sharding

GIB = 2**30
CONFIG = cli.define_recipe(None)
TOPOLOGY = flags.DEFINE_string(
    'topology', 'v5e:2x2', 'of a TPU slice, e.g. v5e:4x4, v5p:2x2x1, v6e:2x2, or of GPUs, e.g. h100:8'
)
STAGES = {'restore': memory.restore, 'calibrate': memory.prune}
PROGRAM = flags.DEFINE_enum('program', 'restore', list(STAGES), 'what is compiled')
MESH = flags.DEFINE_enum(
    'mesh', 'config', ['config', 'best'], "the config's mesh, or the best one of the whole topology"
)
TRIES = flags.DEFINE_integer('tries', 3, 'with --mesh=best: meshes that are compiled', lower_bound=1)
PRICE = flags.DEFINE_float('price', None, "dollars for a chip and hour; a TPU's by default a list price (chips.py)")
EFFORT = flags.DEFINE_float(
    'effort', -1.0, "a TPU's compiler's, to 0, a run's own: five times as long, and less temporary memory", -1.0, 1.0
)
WORKDIR = flags.DEFINE_string('workdir', 'runs/compile', 'where the figures are written')


def main(argv):
    """Prints the figures, and ends with 1 where the program does not fit."""
    config = CONFIG.value
    name, _, cfg = cli.find_model(argv, config)
    config = config or cli.family_recipe(cfg)
    if config is None:
        raise recipe.ConfigError(f'{name}: no recipe for a language model alone: give one with --config=...')
    recipe.check_values(config)
    chip, devices = topology.find(TOPOLOGY.value)
    price = chip.dollars_hour if PRICE.value is None else PRICE.value
    print(f'{name} on {TOPOLOGY.value} ({chip.name}), {PROGRAM.value}:', flush=True)
    tried = []
    for axes in find_meshes(cfg, config, chip, devices):
        config = config.copy_and_resolve_references()
        config.mesh.update(axes)
        tried.append({'mesh': axes} | compile_on(memory.recipe(cfg, config), devices, chip, price))
        if tried[-1].get('fits') and tried[-1]['roofline']['bound'] == 'matmuls':
            break
    best = min((found for found in tried if found.get('fits')), key=seconds, default=None)
    keep(name, config, price, {'best': best, 'tried': tried})
    if not tried:
        raise recipe.ConfigError(f'{TOPOLOGY.value}: no mesh of its {len(devices)} chips holds this, by shapes alone')
    report(best or tried[0], chip, price)
    if not best:
        sys.exit(1)


def seconds(found):
    """What meshes are compared by."""
    return found['roofline']['seconds']


def find_meshes(cfg, config, chip, devices):
    """The axes of the meshes to compile for."""
    if MESH.value == 'config':
        recipe.check_batches(config)
        axes = config.mesh.to_dict()
        if (count := math.prod(axes.values())) > len(devices):
            raise recipe.ConfigError(f'the mesh of the config needs {count} chips, {TOPOLOGY.value} has {len(devices)}')
        return [axes]
    found = meshes.candidates(cfg, config, chip, len(devices), STAGES[PROGRAM.value])
    for one in found:
        print(f'  {describe(one.axes)}: {one.total / GIB:.2f} GiB by shapes, {one.seconds:.3f} s to send and read')
    return [one.axes for one in found[: TRIES.value]]


def describe(axes):
    """Of a mesh, in a line."""
    return ', '.join(f'{name}={count}' for name, count in axes.items())


def compile_on(made, devices, chip, price):
    """The figures of the program on one mesh; `error`, where it does not compile."""
    config = made.config
    mesh = sharding.make_mesh(**config.mesh, devices=devices[: math.prod(config.mesh.values())])
    started, options = time.monotonic(), topology.compiler_options(chip, EFFORT.value)
    try:
        if PROGRAM.value == 'restore':
            samples = config.restore.batch
            step, arguments = programs.restore_step(made)
            arguments = programs.placed(arguments, mesh)
            compiled = step.lower(*arguments).compile(options)
            found = plan.restore(made, arguments, compiled, chip)
        else:
            samples = config.prune.samples
            passes = programs.calibration(made)
            compiled = [one.program.lower(*programs.placed_pass(made, one, mesh)).compile(options) for one in passes]
            found = plan.calibrate(made, list(zip(passes, compiled, strict=True)), chip)
    except jax.errors.JaxRuntimeError as error:
        return {'error': str(error)[:2000]}
    found |= {'samples': samples, 'by_shapes': STAGES[PROGRAM.value](made).total}
    found |= {'compilation_s': time.monotonic() - started}
    return found | plan.throughput(made, samples, seconds(found), mesh.size, price)


def keep(name, config, price, found):
    """Writes what was found: of all meshes that were tried, and of the best that fits."""
    file = Path(WORKDIR.value) / f'{name.replace("/", "--")}-{PROGRAM.value}-{TOPOLOGY.value.replace(":", "-")}.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    said = {'model': name, 'program': PROGRAM.value, 'topology': TOPOLOGY.value, 'price': price}
    said |= {'effort': EFFORT.value, 'config': json.loads(config.to_json())}
    files.write_text(file, json.dumps(said | found, indent=1))
    print(f'  written to {file}')


def report(found, chip, price):
    """The figures of one mesh, for people."""
    print(f'  mesh: {describe(found["mesh"])}')
    if 'error' in found:
        print(f'  does not fit, or does not compile: {found["error"]}')
        return
    of = 'a step' if PROGRAM.value == 'restore' else 'a pass'
    rows = {'bytes a chip, by shapes': f'{found["by_shapes"] / GIB:.2f} GiB; by the compiler, GiB'}
    rows |= {what: f'{size / GIB:.3f}' for what, size in found['bytes'].items() if size}
    fits = 'fits' if found['fits'] else 'does NOT fit'
    rows['together'] = f'{found["total"] / GIB:.2f}, {fits} into {chip.memory / GIB:.1f}'
    rows['FLOPs a chip'] = f'{found["flops"]:.3g}'
    for kind, sent in found['collectives'].items():
        rows[kind] = f'{sent["runs"]} times, {sent["bytes"] / GIB:.3f} GiB sent by a chip'
    line = found['roofline']
    terms = ', '.join(f'{name} {line[name]:.3f}' for name in plan.Roofline._fields)
    rows[f'seconds {of} of {found["samples"]}, at least'] = f'{line["seconds"]:.3f} ({terms})'
    if found['compiler_s'] is not None:
        rows["seconds by the compiler's estimate, its loops counted once"] = f'{found["compiler_s"]:.3f}'
    rows['samples a second, at most'] = f'{found["samples_s"]:.1f} ({found["tokens_s"]:.0f} tokens)'
    if price is not None:
        rows['25,000 samples, at least'] = f'{found["dollars_25k"]:.2f} dollars, at {price:.2f} for a chip and hour'
    rows['compiled in'] = f'{found["compilation_s"]:.0f} s'
    for what, value in rows.items():
        print(f'  {what}: {value}')


if __name__ == '__main__':
    cli.run(main)
