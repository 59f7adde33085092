"""Write a sweep's results as one table: a row for each point and model, means over seeds with 95 % intervals."""

import csv
import importlib.metadata
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sparselora_jax import recipe
from sparselora_jax.evaluation.intervals import mean_interval
from sparselora_jax.jobs import names, sweep, sweep_runs
from sparselora_jax.jobs.environment import PACKAGES
from sparselora_jax.jobs.names import FLOOR_TITLE
from sparselora_jax.jobs.stored import Stored, owner_of
from sparselora_jax.runtime.files import write_text

GIB = 2**30
# Prefixes of the names of columns that are counted, timed or given, rather than measured on the model.
WITHOUT_INTERVAL = ('density', 'prune ', 'restore ', 'step ', 'trained ', 'GFLOP')


class Row(NamedTuple):
    """One model of one point.

    Attributes:
      labels: column -> label of the point.
      model: one of `names.ALL_MODELS`, or the floor.
      steps: restoration steps of the point, even if this model was not restored.
      values: column -> one number for each finished seed.
      failed: the missing runs and the reasons; '' if none is missing.
      tasks: which of the columns are scores in tasks.
    """

    labels: dict[str, Any]
    model: str
    steps: int
    values: dict[str, list[float]]
    failed: str = ''
    tasks: tuple[str, ...] = ()

    @property
    def seeds(self) -> int:
        """Return the number of finished seeds."""
        return max((len(values) for values in self.values.values()), default=0)


def rows(config: ConfigDict, workdir: str | Path) -> list[Row]:
    """Return the rows of a sweep, finished or not, in the order of its points; the dense model and the floor are first.

    Args:
      config: a sweep.
      workdir: its folder.
    """
    # Runs are planned again from the config, so that runs that have not started have rows too.
    runs_by_point: dict[str, list[sweep.Run]] = {}
    for run in sweep.runs(config):
        runs_by_point.setdefault(run.point.name, []).append(run)
    table = []
    for runs in runs_by_point.values():
        # The recipes of a point differ only in the seed.
        point = runs[0].point
        point_recipe = runs[0].config
        title = recipe.metric(point_recipe).title
        folders = [Path(workdir) / run.name for run in runs]
        results = [
            Stored(folder, owner_of(folder, run.config)).results()
            for folder, run in zip(folders, runs, strict=True)
            if sweep_runs.is_finished(folder)
        ]
        failed = _missing(folders)
        models = [*point.models, FLOOR_TITLE] if 'dense' in point.models else point.models
        for model in models:
            values: dict[str, list[float]] = {}
            for result in results:
                for column, value in _values(result, model, title).items():
                    values.setdefault(column, []).append(float(value))
            tasks = tuple(dict.fromkeys(column for result in results for column in _task_scores(result, model)))
            table.append(Row(point.labels, model, point_recipe.restore.steps, values, failed, tasks))
    return table


def _missing(folders: list[Path]) -> str:
    """Return the unfinished runs, with the reasons if they are known."""
    reasons = []
    for folder in folders:
        if not sweep_runs.is_finished(folder):
            failed = folder / names.FAILED
            reason = failed.read_text().strip() if failed.exists() else 'not run yet'
            reasons.append(f'{folder.name}: {reason}')
    return '; '.join(reasons)


def _values(result: dict[str, dict], model: str, title: str) -> dict[str, float]:
    """Return the columns of one model of one run.

    Args:
      result: result of each stage.
      model: see `Row`.
      title: title of the metric.
    """
    if model == FLOOR_TITLE:
        return _scores(result[names.FLOOR], title)
    # Columns are added in the order of the table.
    evaluation = result[names.evaluation_stage(model)]
    measured = result[names.MEASURE]
    values = _scores(evaluation, title)
    values |= _task_scores(result, model)
    if 'perplexity' in evaluation:
        values['perplexity'] = evaluation['perplexity']
    is_pruned = model in ('pruned', 'restored')
    if is_pruned:
        for tower, counts in measured['sparsity'].items():
            values[f'density {tower}'] = counts['density']
        # The allocation is part of the cost of pruning.
        pruning_stages = [result[stage] for stage in (names.ZEROS, names.PRUNE) if stage in result]
        values['prune s'] = sum(stage['seconds'] for stage in pruning_stages)
        values['prune GiB'] = max(stage['peak_memory_bytes'] for stage in pruning_stages) / GIB
    if model in names.TRAINING:
        # Seconds of all steps rather than of the stage, because an interrupted run has had earlier processes.
        trained = result[names.TRAINING[model]]
        values['restore s'] = trained['steps_s']
        values['step s'] = trained['step_s']
        values['restore GiB'] = trained['peak_memory_bytes'] / GIB
        values['trained parameters'] = measured['trained_parameters']
        values['GFLOP a step'] = measured['step_flops'] / 1e9
    if model == 'restored' and 'lora_merged_density' in measured:
        values['density if LoRA is merged'] = measured['lora_merged_density']
    # Nominal: the FLOPs of kernels that skip every zero.
    values['GFLOP an answer'] = measured['answer_flops_sparse' if is_pruned else 'answer_flops'] / 1e9
    return values


def _scores(stage: dict, title: str) -> dict[str, float]:
    """Return the scores of an evaluation by column: the metric's title, then the kinds of answers."""
    return {title if kind == 'overall' else kind: score for kind, score in stage['accuracy'].items()}


def _task_scores(result: dict[str, dict], model: str) -> dict[str, float]:
    """Return the headline of each task by column, as a share; {} if the model was scored on no task."""
    scores = {}
    stage = result.get(names.task_stage(model), {'tasks': {}})
    for name, values in stage['tasks'].items():
        headline = values['headline']
        value = values['values'].get(headline)
        # Test splits are scored by a server.
        if value is not None:
            scores[f'{names.task_title(name)} {headline}'] = value / 100
    return scores


def columns(table: list[Row]) -> tuple[list[str], list[str]]:
    """Return the names of all labels and of all values, in the order in which they appear.

    Args:
      table: see `rows`.
    """
    labels = dict.fromkeys(name for row in table for name in row.labels)
    # The row with the most values decides the order of columns.
    fullest_first = sorted(table, key=lambda row: -len(row.values))
    values = dict.fromkeys(name for row in fullest_first for name in row.values)
    return list(labels), list(values)


def has_interval(name: str) -> bool:
    """Return whether a column has an interval, because it is measured on the model and not counted, timed or given.

    Args:
      name: name of the column.
    """
    return not name.startswith(WITHOUT_INTERVAL)


def to_csv(table: list[Row]) -> str:
    """Return the table for machines: shares as numbers from 0 to 1, and after each mean the half width of its interval.

    Args:
      table: see `rows`.
    """
    labels, values = columns(table)
    value_head = []
    for name in values:
        value_head += [name, f'{name} ±'] if has_interval(name) else [name]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow([*labels, 'model', 'steps', 'seeds', *value_head, 'failed'])
    for row in table:
        cells = []
        for name in values:
            mean, half = mean_interval(row.values[name]) if name in row.values else (None, None)
            cells += [_number(mean), _number(half)] if has_interval(name) else [_number(mean)]
        label_cells = [row.labels.get(name, '') for name in labels]
        writer.writerow([*label_cells, row.model, _steps(row), row.seeds, *cells, row.failed])
    return out.getvalue()


def _steps(row: Row) -> int | str:
    return row.steps if row.model in names.TRAINING else ''


def _number(value: float | None) -> str:
    if value is None:
        return ''
    # Counts are whole and may have more than six digits.
    return f'{value:.0f}' if value.is_integer() else f'{value:.6g}'


def to_markdown(config: ConfigDict, table: list[Row]) -> str:
    """Return the table for people, below a line on how its figures were measured.

    Args:
      config: a sweep.
      table: see `rows`.
    """
    labels, values = columns(table)
    # The column of failures is added only if needed, since most tables are already wide.
    has_failed = any(row.failed for row in table)
    head = [*labels, 'model', 'steps', *values]
    if has_failed:
        head.append('failed')
    lines = [
        f'# {config.plot.title}',
        '',
        _conditions(config),
        '',
        '| ' + ' | '.join(head) + ' |',
        '|' + '---|' * len(head),
    ]
    for row in table:
        cells = [str(row.labels.get(name, '')) for name in labels]
        cells += [row.model, str(_steps(row))]
        cells += [_cell(name, row.values[name]) if name in row.values else '' for name in values]
        if has_failed:
            cells.append(row.failed.replace('|', '/'))  # a bar would end the cell
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def _conditions(config: ConfigDict) -> str:
    """Return how a sweep's figures were measured: budget, recipe, machine, versions."""
    run_recipe = sweep.runs(config)[0].config
    seeds = config.budgets[config.budget].seeds
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in PACKAGES)
    interval = f'means of {seeds} seeds with 95 % intervals (t)' if seeds > 1 else 'one seed'
    # The cores that this process may use; in a container these are fewer than the machine has.
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB
    return (
        f'Sweep `{config.name}`, budget `{config.budget}`: model {run_recipe.model}, data {run_recipe.data}, '
        f'{run_recipe.evaluate.questions} questions, {run_recipe.prune.samples} calibration samples, restoration in '
        f'batches of {run_recipe.restore.batch}; {interval}. FLOPs count matmuls; those of an answer are nominal: each '
        'pruned kernel at its density. Seconds include compilation; memory is the peak of the process up to the end of '
        f'that stage. {cores} CPU cores, {memory:.0f} GiB; {versions}.'
    )


def _cell(name: str, values: list[float]) -> str:
    """Return a cell of the Markdown table."""
    mean, half = mean_interval(values)
    if name.startswith('density'):
        return f'{mean:.4f}'
    if name == 'trained parameters':
        return f'{mean:,.0f}'
    if not has_interval(name):
        return f'{mean:.2f}'
    if name == 'perplexity':
        return f'{mean:.1f}' if half is None else f'{mean:.1f} ± {half:.1f}'
    return f'{mean:.1%}' if half is None else f'{mean:.1%} ± {100 * half:.1f}'


def write(config: ConfigDict, workdir: str | Path) -> list[Row]:
    """Write `<name>.csv` and `<name>.md` into the workdir, and return the rows.

    Args:
      config: a sweep.
      workdir: its folder.
    """
    table = rows(config, workdir)
    write_text(Path(workdir) / f'{config.name}.csv', to_csv(table))
    write_text(Path(workdir) / f'{config.name}.md', to_markdown(config, table))
    return table
