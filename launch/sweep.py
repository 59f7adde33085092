"""A grid of main jobs, one process each: results in one table (CSV, Markdown) and plots (PNG, SVG). Resumes.

python launch/sweep.py --config=configs/sweeps/modality.py --workdir=runs/modality [--config.budget=tiny|hour|full]

A run that failed is marked, the others are finished, and the same command tries it again.
"""

import os
import subprocess
import sys
from pathlib import Path

import cli
from absl import flags

from sparselora_jax import sweep
from sparselora_jax.evaluation import plots, table
from sparselora_jax.recipe import ConfigError
from sparselora_jax.train import Interrupted

CONFIG, WORKDIR = cli.define_config('configs/sweeps/modality.py', 'runs/sweep')
RUN = flags.DEFINE_string('run', None, 'do one run alone, in this process: what the sweep starts for each')


def main(argv):
    """Every run that is not finished yet, then the results."""
    del argv
    config, workdir = CONFIG.value, Path(WORKDIR.value)
    if not hasattr(config, 'points'):
        raise ConfigError('the config is a recipe, not a sweep: expected one of configs/sweeps/')
    if RUN.value is not None:
        return run_alone(config, workdir)
    try:
        sweep.run(config, workdir, run_apart, after=lambda: table.write(config, workdir))
    finally:
        if (workdir / 'config.json').exists():
            plots.write(config, table.write(config, workdir), workdir)
    print((workdir / f'{config.name}.md').read_text())
    print(f'complete: {workdir}/{config.name}.csv, .md, .png, .svg')


def run_alone(config, workdir):
    """The run that `--run` names."""
    planned = {run.name: run for run in sweep.runs(config)}
    if RUN.value not in planned:
        raise ConfigError(f'run {RUN.value!r}: expected one of {", ".join(planned)}')
    sweep.run_here(planned[RUN.value], workdir / RUN.value)


def run_apart(run, folder):
    """One run in a process of its own, so that its peak memory and its end are its own; programs are compiled once."""
    compiled = {
        'JAX_COMPILATION_CACHE_DIR': str((folder.parent / 'compiled').absolute()),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
    }
    command = [sys.executable, *sys.argv, f'--run={run.name}']
    output = folder / 'output.txt'
    with output.open('ab') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | compiled)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if code == 130:
        raise Interrupted(f'{run.name} was stopped; the same command goes on')
    if code:
        said = output.read_text(errors='replace').strip().splitlines()[-1:] if code > 0 else []
        raise sweep.PointError(said[0] if said else f'killed by signal {-code}')


if __name__ == '__main__':
    cli.run(main)
