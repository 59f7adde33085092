"""Run a grid of main jobs, one process each, and write a table (CSV, Markdown) and plots (PNG, SVG).

python launch/sweep.py --config=configs/sweeps/modality.py --workdir=runs/modality [--config.budget=tiny|hour|full]

If a run fails, the table says so and the other runs go on. The same command resumes the sweep and repeats failed runs.
"""

import sys
from pathlib import Path

import cli
from absl import flags
from ml_collections import ConfigDict

from sparselora_jax.jobs import plots, resources, sweep, sweep_runs, table
from sparselora_jax.recipe import ConfigError
from sparselora_jax.restoration.train import Interrupted
from sparselora_jax.runtime import files

CONFIG, WORKDIR = cli.define_config('configs/sweeps/modality.py', 'runs/sweep', kind='sweep')
DRY_RUN = cli.define_dry_run()
RUN = flags.DEFINE_string(
    'run', None, 'name of the only run to do, in this process; the sweep starts itself with this flag for each run'
)


def main(argv: list[str]) -> None:
    """Run the unfinished runs, then write the results."""
    del argv
    config = CONFIG.value
    workdir = Path(WORKDIR.value)
    if DRY_RUN.value:
        dry_run(config, workdir)
        return
    if RUN.value is not None:
        run_alone(config, workdir)
        return
    try:
        sweep.run(config, workdir, run_apart, after=lambda: table.write(config, workdir))
    except (sweep.SweepError, Interrupted):
        # Write the results of the finished runs.
        plots.write(config, table.write(config, workdir), workdir)
        raise
    plots.write(config, table.write(config, workdir), workdir)
    print((workdir / f'{config.name}.md').read_text())
    print(f'complete: {workdir}/{config.name}.csv, .md, .png, .svg')


def dry_run(config: ConfigDict, workdir: Path) -> None:
    """Check all points of the sweep, and print which runs it consists of; nothing is written."""
    resources.check_workdir(workdir)
    sweep.refuse_other_sweep(workdir, config)
    files.refuse_held(workdir)
    planned = sweep.runs(config)
    with resources.without_data_dir([run.config for run in planned]):
        sweep.check(planned, workdir)
    for run in planned:
        state = 'done' if sweep_runs.is_finished(workdir / run.name) else f'{run.config.restore.steps} steps'
        print(f'{run.name}: evaluate {", ".join(run.point.models)}; {state}')
    print(f'dry run: {len(planned)} runs were checked, and nothing was written')


def run_alone(config: ConfigDict, workdir: Path) -> None:
    """Run the run that `--run` names, in this process."""
    planned = {run.name: run for run in sweep.runs(config)}
    if RUN.value not in planned:
        raise ConfigError(f'run {RUN.value!r}: expected one of {", ".join(planned)}')
    run = planned[RUN.value]
    sweep_runs.run_here(run.config, workdir / run.name, run.point.models)


def run_apart(run: sweep.Run, folder: Path) -> None:
    """Start this script again for one run, so that each run gets all memory and may fail alone."""
    # The arguments are the same, so the new process plans the same sweep and finds its run by name.
    sweep_runs.run_apart([sys.executable, *sys.argv, f'--run={run.name}'], folder)


if __name__ == '__main__':
    cli.run(main)
