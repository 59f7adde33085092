"""What a sweep showed, as one table: a row for each point and model, means over seeds with 95 % intervals."""

import csv
import importlib.metadata
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from sparselora_jax.jobs import sweep, sweep_runs
from sparselora_jax.jobs.report import PACKAGES
from sparselora_jax.runtime.files import write_text

GIB = 2**30
FLOOR = 'image-blind floor'
STAGES = {'restored': 'restore', 'control': 'control'}  # the stage that trains a model


class Row(NamedTuple):
    """One model of one point: `values[column]` has a number a finished seed; `failed` says what is missing, and why."""

    labels: dict[str, Any]
    model: str
    steps: int  # of restoration, whatever this model had of it
    values: dict[str, list[float]]
    failed: str = ''


def mean_interval(values: list[float]) -> tuple[float, float | None]:
    """(mean, half width of its 95 % interval by Student's t; None: one value says nothing of its spread).

    >>> mean_interval([1.0, 2.0, 3.0])[0], round(mean_interval([1.0, 2.0, 3.0])[1], 3), mean_interval([2.0])
    (2.0, 2.484, (2.0, None))
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, None
    return mean, float(stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / count**0.5)


def rows(config: Any, workdir: str | Path) -> list[Row]:
    """The rows of a sweep, finished or not, in the order of its points; the dense model and the floor come first."""
    points: dict[str, list[sweep.Run]] = {}
    for run in sweep.runs(config):
        points.setdefault(run.point.name, []).append(run)
    found = []
    for of_point in points.values():
        point, config = of_point[0].point, of_point[0].config
        folders = [Path(workdir) / run.name for run in of_point]
        results = [_read(folder) for folder in folders if sweep_runs.finished(folder)]
        failed = _missing(folders)
        for model in (*point.models, *((FLOOR,) if 'dense' in point.models else ())):
            values: dict[str, list[float]] = {}
            for result in results:
                for column, value in _values(result, model).items():
                    values.setdefault(column, []).append(float(value))
            found.append(Row(point.labels, model, config.restore.steps, values, failed))
    return found


def _read(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob('*.json')}


def _missing(folders: list[Path]) -> str:
    """What is known of the runs that are not finished."""
    said = []
    for folder in folders:
        if not sweep_runs.finished(folder):
            failed = folder / sweep_runs.FAILED
            said.append(f'{folder.name}: {failed.read_text().strip() if failed.exists() else "not run yet"}')
    return '; '.join(said)


def _values(result: dict[str, dict], model: str) -> dict[str, float]:
    if model == FLOOR:
        return _accuracy(result['floor'])
    evaluation, measured = result[f'evaluate_{model}'], result[sweep_runs.LAST]
    values = _accuracy(evaluation)
    if 'perplexity' in evaluation:
        values['perplexity'] = evaluation['perplexity']
    pruned = model in ('pruned', 'restored')
    if pruned:
        values |= {f'density {tower}': found['density'] for tower, found in measured['sparsity'].items()}
        stages = [result[stage] for stage in ('zeros', 'prune') if stage in result]  # an allocation is found before
        values['prune s'] = sum(stage['seconds'] for stage in stages)
        values['prune GiB'] = max(stage['peak_memory_bytes'] for stage in stages) / GIB
    if model in STAGES:
        trained = result[STAGES[model]]
        values |= {'restore s': trained['steps_s'], 'step s': trained['step_s']}
        values |= {'restore GiB': trained['peak_memory_bytes'] / GIB}
        values |= {'trained parameters': measured['trained_parameters'], 'GFLOP a step': measured['step_flops'] / 1e9}
    if model == 'restored' and 'lora_merged_density' in measured:
        values['density if LoRA is merged'] = measured['lora_merged_density']
    values['GFLOP an answer'] = measured['answer_flops_sparse' if pruned else 'answer_flops'] / 1e9
    return values


def _accuracy(stage: dict) -> dict[str, float]:
    return {'accuracy' if kind == 'overall' else kind: share for kind, share in stage['accuracy'].items()}


def columns(table: list[Row]) -> tuple[list[str], list[str]]:
    """(labels, values) that any row has, in the order in which they appear."""
    labels = dict.fromkeys(name for row in table for name in row.labels)
    # The row with the most values says their order.
    fullest = sorted(table, key=lambda row: -len(row.values))
    return list(labels), list(dict.fromkeys(name for row in fullest for name in row.values))


def spreads(name: str) -> bool:
    """Whether a column has an interval: what is measured on the model, not counted, timed or given."""
    return not name.startswith(('density', 'prune ', 'restore ', 'step ', 'trained ', 'GFLOP'))


def to_csv(table: list[Row]) -> str:
    """The table for machines: shares as numbers of 0 to 1, an interval's half width behind each mean."""
    labels, values = columns(table)
    out = io.StringIO()
    head = [part for name in values for part in ((name, f'{name} ±') if spreads(name) else (name,))]
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow([*labels, 'model', 'steps', 'seeds', *head, 'failed'])
    for row in table:
        cells = []
        for name in values:
            mean, half = mean_interval(row.values[name]) if name in row.values else (None, None)
            cells += [_number(mean), _number(half)] if spreads(name) else [_number(mean)]
        seeds = len(row.values.get('accuracy', ()))
        given = [*(row.labels.get(name, '') for name in labels), row.model, _steps(row), seeds]
        writer.writerow([*given, *cells, row.failed])
    return out.getvalue()


def _steps(row: Row) -> int | str:
    return row.steps if row.model in STAGES else ''


def _number(value: float | None) -> str:
    if value is None:
        return ''
    return f'{value:.0f}' if value.is_integer() else f'{value:.6g}'


def to_markdown(config: Any, table: list[Row]) -> str:
    """The table for people, with what it was made by."""
    labels, values = columns(table)
    failed = any(row.failed for row in table)
    head = [*labels, 'model', 'steps', *values, *(['failed'] if failed else [])]
    lines = [f'# {config.plot.title}', '', _conditions(config, table), '']
    lines += ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    for row in table:
        cells = [str(row.labels.get(name, '')) for name in labels] + [row.model]
        cells += [str(_steps(row))]
        cells += [_cell(name, row.values[name]) if name in row.values else '' for name in values]
        cells += [row.failed.replace('|', '/')] if failed else []
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def _conditions(config: Any, table: list[Row]) -> str:
    recipe, seeds = sweep.runs(config)[0].config, config.budgets[config.budget].seeds
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in PACKAGES)
    interval = f'means of {seeds} seeds with 95 % intervals (t)' if seeds > 1 else 'one seed'
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB
    return (
        f'Sweep `{config.name}`, budget `{config.budget}`: model {recipe.model}, data {recipe.data}, '
        f'{recipe.evaluate.questions} questions, {recipe.prune.samples} calibration samples, restoration in batches of '
        f'{recipe.restore.batch}; {interval}. FLOPs count matmuls; those of an answer are nominal: each pruned kernel '
        'at its density. Seconds hold what was compiled; memory is the peak of the process up to the end of that '
        f'stage. {cores} CPU cores, {memory:.0f} GiB; {versions}.'
    )


def _cell(name: str, values: list[float]) -> str:
    mean, half = mean_interval(values)
    if name.startswith('density'):
        return f'{mean:.4f}'
    if name == 'trained parameters':
        return f'{mean:,.0f}'
    if not spreads(name):
        return f'{mean:.2f}'
    if name == 'perplexity':
        return f'{mean:.1f}' + (f' ± {half:.1f}' if half is not None else '')
    return f'{mean:.1%}' + (f' ± {100 * half:.1f}' if half is not None else '')


def write(config: Any, workdir: str | Path) -> list[Row]:
    """Writes `<name>.csv` and `<name>.md` into the workdir."""
    table = rows(config, workdir)
    write_text(Path(workdir) / f'{config.name}.csv', to_csv(table))
    write_text(Path(workdir) / f'{config.name}.md', to_markdown(config, table))
    return table
