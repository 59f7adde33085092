r"""Compile a recipe's programs for TPUs or GPUs that you do not have, and estimate memory, time and cost.

pip install -r requirements-tpu.txt  # or requirements-gpu.txt
python launch/compile.py Salesforce/instructblip-vicuna-7b --topology=v5p:2x2x1 \
    --config=configs/instructblip_lang_only.py:hardware=gpu --config.restore.base=packed --config.restore.teacher=top_k

No program is run and no weights are read. MODEL, and the default recipe without --config, are as for `inspect.py`.
--program selects what to compile: one restoration step, or a calibration pass. A calibration pass is the pruner's
program for one block of each tower. It counts as often as it runs: layers times chunks.

The default mesh is that of the config, on the first chips of the topology. --mesh=best searches for a mesh of the whole
topology instead. Of the meshes that fit by shapes, it compiles up to --tries, in the order of their estimated time to
send and read. It stops at the first mesh that fits and is bound by matmuls, because matmuls take the same time on all
meshes. It reports the fastest mesh that it compiled.

The compiler counts the bytes on a chip. FLOPs are counted from the program's trace, and bytes sent from the compiled
program. The time is a roofline of these (`planning/plan.py`): a lower bound, not a measurement. The script also writes
all figures to --workdir as JSON.
"""

import os
import sys

# Nothing runs on this machine's own chips. Without these settings, the TPU compiler looks for the metadata of a TPU
# machine, and refuses to load in a second process. Several programs may compile at the same time.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cli
import jax
from absl import flags
from ml_collections import ConfigDict

from sparselora_jax import recipe
from sparselora_jax.planning import memory, meshes, plan, programs, topology
from sparselora_jax.planning.chips import Chip
from sparselora_jax.runtime import files
from sparselora_jax.sparse import sharding

GIB = 2**30
# The programs, and the function that estimates the memory of each from shapes.
STAGES = {'restore': memory.restore, 'calibrate': memory.prune}

CONFIG = cli.define_recipe(None)
TOPOLOGY = flags.DEFINE_string(
    'topology', 'v5e:2x2', 'TPU slice, e.g. v5e:4x4, v5p:2x2x1, v6e:2x2, or GPUs in one machine, e.g. h100:8'
)
PROGRAM = flags.DEFINE_enum('program', 'restore', list(STAGES), 'program to compile')
MESH = flags.DEFINE_enum(
    'mesh', 'config', ['config', 'best'], "the config's mesh, or the best one of the whole topology"
)
TRIES = flags.DEFINE_integer('tries', 3, 'with --mesh=best: maximum number of meshes to compile for', lower_bound=1)
PRICE = flags.DEFINE_float('price', None, 'dollars per chip and hour; default: the list price of a TPU (chips.py)')
EFFORT = flags.DEFINE_float(
    'effort',
    -1.0,
    'TPU compiler effort, from -1 (fastest to compile, default) to 1; 0 is what a real run uses: compiles about 5x '
    'longer and needs less temporary memory',
    -1.0,
    1.0,
)
WORKDIR = flags.DEFINE_string('workdir', 'runs/compile', 'folder that the figures are written to')

# The figures of one mesh, as written to JSON: those of `plan.restore` or `plan.calibrate`, and those of `compile_on`.
Figures = dict[str, Any]


def main(argv: list[str]) -> None:
    """Print the figures, and end with code 1 if the program does not fit."""
    config = CONFIG.value
    model = cli.find_model(argv, config)
    config = config or cli.family_recipe(model.cfg)
    if config is None:
        raise recipe.ConfigError(f'{model.name}: {cli.no_recipe(model.cfg)}')
    recipe.check_values(config)
    recipe.check_family(config, model.cfg)
    if PROGRAM.value == 'calibrate' and config.prune.samples == 0:
        raise recipe.ConfigError('prune.samples 0: nothing is calibrated; expected 1 or more for --program=calibrate')
    chip, devices = topology.find(TOPOLOGY.value)
    price = chip.dollars_hour if PRICE.value is None else PRICE.value
    print(f'{model.name} on {TOPOLOGY.value} ({chip.name}), {PROGRAM.value}:', flush=True)
    tried: list[Figures] = []
    for axes in find_meshes(model.cfg, config, chip, devices):
        config = config.copy_and_resolve_references()
        config.mesh.update(axes)
        figures = {'mesh': axes} | compile_on(memory.recipe(model.cfg, config), devices, chip, price)
        tried.append(figures)
        # Matmuls take the same time on all meshes, so no other mesh is faster.
        if figures.get('fits') and figures['roofline']['bound'] == 'matmuls':
            break
    best = min((figures for figures in tried if figures.get('fits')), key=seconds, default=None)
    # Written even if nothing fits: the file shows which meshes were tried, and how much too large they are.
    write(model.name, config, price, best, tried)
    if not tried:
        raise recipe.ConfigError(f'{TOPOLOGY.value}: by shapes, this fits on no mesh of its {len(devices)} chips')
    report(best or tried[0], chip, price)
    if not best:
        sys.exit(1)


def seconds(figures: Figures) -> float:
    """Return the time that meshes are compared by."""
    return figures['roofline']['seconds']


def find_meshes(cfg: Any, config: ConfigDict, chip: Chip, devices: list[Any]) -> list[dict[str, int]]:
    """Return the axes of the meshes to compile for.

    Raises:
      ConfigError: the config's mesh needs more chips than the topology has, or does not divide the batches.
    """
    if MESH.value == 'config':
        recipe.check_batches(config)
        axes = config.mesh.to_dict()
        needed = math.prod(axes.values())
        if needed > len(devices):
            raise recipe.ConfigError(
                f'the mesh of the config needs {needed} chips, {TOPOLOGY.value} has {len(devices)}'
            )
        return [axes]
    candidates = meshes.candidates(cfg, config, chip, len(devices), STAGES[PROGRAM.value])
    for candidate in candidates:
        size = f'{candidate.total / GIB:.2f} GiB by shapes'
        print(f'  {describe(candidate.axes)}: {size}, {candidate.seconds:.3f} s to send and read')
    return [candidate.axes for candidate in candidates[: TRIES.value]]


def describe(axes: Mapping[str, int]) -> str:
    """Return a mesh as text."""
    return ', '.join(f'{name}={count}' for name, count in axes.items())


def compile_on(trees: memory.Recipe, devices: list[Any], chip: Chip, price: float | None) -> Figures:
    """Compile the program for one mesh.

    Args:
      trees: the recipe, whose config names the mesh.
      devices: the devices of the topology; the mesh uses the first of them.
      chip: the kind of these devices.
      price: dollars per chip and hour.

    Returns:
      The figures of the program; only `error` if it does not compile.
    """
    config = trees.config
    mesh = sharding.make_mesh(**config.mesh, devices=devices[: math.prod(config.mesh.values())])
    options = topology.compiler_options(chip, EFFORT.value)
    # Tracing is timed too, because for large models it takes as long as some compilers.
    started = time.monotonic()
    try:
        if PROGRAM.value == 'restore':
            samples = config.restore.batch
            step, arguments = programs.restore_step(trees)
            arguments = programs.placed(arguments, mesh)
            compiled = step.lower(*arguments).compile(options)
            figures = plan.restore(trees, arguments, compiled, chip)
        else:
            samples = config.prune.samples
            passes = [
                (one, one.program.lower(*programs.placed_pass(trees, one, mesh)).compile(options))
                for one in programs.calibration(trees)
            ]
            figures = plan.calibrate(trees, passes, chip)
    except jax.errors.JaxRuntimeError as error:
        # Usually out of memory. A compiler may append its whole memory plan to the message.
        return {'error': str(error)[:2000]}
    figures['samples'] = samples
    figures['by_shapes'] = STAGES[PROGRAM.value](trees).total
    figures['compilation_s'] = time.monotonic() - started
    return figures | plan.throughput(trees, samples, seconds(figures), mesh.size, price)


def write(name: str, config: ConfigDict, price: float | None, best: Figures | None, tried: list[Figures]) -> None:
    """Write the figures of all meshes that were tried, and of the best one that fits, as JSON."""
    # Hub ids contain a slash and topologies a colon; neither is allowed in the file's name.
    stem = f'{name.replace("/", "--")}-{PROGRAM.value}-{TOPOLOGY.value.replace(":", "-")}'
    file = Path(WORKDIR.value) / f'{stem}.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        'model': name,
        'program': PROGRAM.value,
        'topology': TOPOLOGY.value,
        'price': price,
        'effort': EFFORT.value,
        'config': json.loads(config.to_json()),
        'best': best,
        'tried': tried,
    }
    files.write_text(file, json.dumps(content, indent=1))
    print(f'  written to {file}')


def report(figures: Figures, chip: Chip, price: float | None) -> None:
    """Print the figures of one mesh."""
    print(f'  mesh: {describe(figures["mesh"])}')
    if 'error' in figures:
        print(f'  does not fit, or does not compile: {figures["error"]}')
        return
    rows = {'bytes a chip, by shapes': f'{figures["by_shapes"] / GIB:.2f} GiB; by the compiler, GiB'}
    # Parts without bytes are left out: a dense base has no separate teacher, and a packed base no separate masks.
    rows |= {part: f'{size / GIB:.3f}' for part, size in figures['bytes'].items() if size}
    fits = 'fits' if figures['fits'] else 'does NOT fit'
    rows['together'] = f'{figures["total"] / GIB:.2f}, {fits} into {chip.memory / GIB:.1f}'
    rows['FLOPs a chip'] = f'{figures["flops"]:.3g}'
    for kind, sent in figures['collectives'].items():
        rows[kind] = f'{sent["runs"]} times, {sent["bytes"] / GIB:.3f} GiB sent by a chip'
    roofline = figures['roofline']
    terms = ', '.join(f'{name} {roofline[name]:.3f}' for name in plan.Roofline._fields)
    unit = 'a step' if PROGRAM.value == 'restore' else 'a pass'
    rows[f'seconds {unit} of {figures["samples"]}, at least'] = f'{roofline["seconds"]:.3f} ({terms})'
    if figures['compiler_s'] is not None:
        rows["seconds by the compiler's estimate, its loops counted once"] = f'{figures["compiler_s"]:.3f}'
    rows['samples a second, at most'] = f'{figures["samples_s"]:.1f} ({figures["tokens_s"]:.0f} tokens)'
    if price is not None:
        rows['25,000 samples, at least'] = f'{figures["dollars_25k"]:.2f} dollars, at {price:.2f} for a chip and hour'
    rows['compiled in'] = f'{figures["compilation_s"]:.0f} s'
    for title, value in rows.items():
        print(f'  {title}: {value}')


if __name__ == '__main__':
    cli.run(main, '[MODEL]')
