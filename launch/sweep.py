"""A grid of main jobs, one process each: results in one table (CSV, Markdown) and plots (PNG, SVG). Resumes.

python launch/sweep.py --config=configs/sweeps/modality.py --workdir=runs/modality [--config.budget=tiny|hour|full]

A run that failed is marked, the others are finished, and the same command tries it again.
"""

import sys
from pathlib import Path

import cli
from absl import flags

from sparselora_jax.jobs import plots, sweep, sweep_runs, table
from sparselora_jax.recipe import ConfigError
from sparselora_jax.restoration.train import Interrupted

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
    except (sweep.SweepError, Interrupted):  # what there is, is shown
        plots.write(config, table.write(config, workdir), workdir)
        raise
    plots.write(config, table.write(config, workdir), workdir)
    print((workdir / f'{config.name}.md').read_text())
    print(f'complete: {workdir}/{config.name}.csv, .md, .png, .svg')
    return None


def run_alone(config, workdir):
    """The run that `--run` names."""
    planned = {run.name: run for run in sweep.runs(config)}
    if RUN.value not in planned:
        raise ConfigError(f'run {RUN.value!r}: expected one of {", ".join(planned)}')
    run = planned[RUN.value]
    sweep_runs.run_here(run.config, workdir / run.name, run.point.models)


def run_apart(run, folder):
    """This script again, for one run."""
    sweep_runs.run_apart([sys.executable, *sys.argv, f'--run={run.name}'], folder)


if __name__ == '__main__':
    cli.run(main)
