"""A sweep finishes what it can, resumes, computes shared stages once; its table and plots say what its runs left."""

import csv
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_job import few, tiny_config

from configs.sweeps import grid
from sparselora_jax.checkpoints import embedded
from sparselora_jax.data import easy_vqa
from sparselora_jax.data.dataset import Dataset, Split
from sparselora_jax.jobs import names, plots, sweep, sweep_runs, table
from sparselora_jax.jobs.stored import Stored, owner_of
from sparselora_jax.jobs.sweep import Point
from sparselora_jax.recipe import ConfigError
from sparselora_jax.restoration.train import Interrupted
from sparselora_jax.runtime import files
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse.patterns import PatternError

KINDS = {'yes/no': 0.0, 'shape': 0.1}
LOAD_REAL = easy_vqa.load  # the fixture `tiny` replaces it in every test


def sweep_config(*points, name='sweep', seeds=1, plot=None, base=None):
    budget = {'seeds': seeds, 'restore': {'steps': 4}, 'evaluate': {'questions': 14}}
    config = ConfigDict({'name': name, 'budget': 'tiny', 'budgets': {'tiny': budget}})
    config.base = base or tiny_config()
    config.plot = plot or {'kind': 'bars', 'x': 'pattern', 'series': 'way', 'title': 'A sweep'}
    config.points = points
    return config


def point(name, pattern='2:4', way='SparseLoRA', models=('pruned', 'restored'), **fields):
    fields = {key.replace('__', '.'): value for key, value in fields.items()}
    return Point(name, {'pattern': pattern, 'way': way}, {'prune.pattern.language': pattern} | fields, models)


POINTS = (
    point('a'),
    point('b', way='plain', restore__gradient='plain'),
    point('c', '0.7'),
    Point('control', {'way': 'control'}, models=('control',)),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tiny_blip2):
    """The embedded model, made tiny, and a data set of one record, which is only checked."""
    one = Split([{}], lambda: [('never asked', 'never answered')])
    monkeypatch.setattr(easy_vqa, 'load', lambda data_dir: Dataset(one, one, (), str))
    monkeypatch.setattr(embedded, 'load', lambda *args, **kw: tiny_blip2)
    monkeypatch.setattr(embedded, 'load_config', lambda: tiny_blip2[0].cfg)


def score(run, model):
    """An accuracy that says which run and model it is of."""
    order = [p.name for p in POINTS].index(run.point.name) if run.point.name in 'abc' else 5
    return 0.3 + 0.05 * order + 0.2 * (model == 'restored') + 0.01 * (run.seed - 42)


def pretend(run, folder):
    """Writes what the stages of a run leave."""
    sizes = {'seconds': 3.0, 'peak_memory_bytes': 2**30}
    for model in run.point.models:
        overall = score(run, model)
        accuracy = {'overall': overall} | {kind: overall + more for kind, more in KINDS.items()}
        write(run, folder, f'evaluate_{model}', sizes | {'accuracy': accuracy, 'perplexity': 1000 * overall})
    for stage in ('prune', 'restore', 'control', 'floor'):
        write(run, folder, stage, sizes | {'steps_s': 8.0, 'step_s': 2.0, 'accuracy': {'overall': 0.25, 'shape': 0.1}})
    measured = {'sparsity': {'language': {'density': 0.5}}, 'lora_merged_density': 0.99}
    flops = {'step_flops': 2e9, 'answer_flops': 4e9, 'answer_flops_sparse': 3e9}
    write(run, folder, 'measured', measured | {'trained_parameters': 12345678} | flops)


def write(run, folder, stage, result):
    folder.mkdir(parents=True, exist_ok=True)
    Stored(folder, owner_of(folder, run.config)).write_result(stage, result)


def never(run, folder):
    pytest.fail(f'{run.name} was run')


# One real sweep, in this process.


@pytest.mark.processes
def test_a_real_sweep_shares_pruning_and_leaves_results_but_no_weights(
    tmp_path, monkeypatch, easy_vqa_builder, tiny_blip2, compiled_once
):
    processor = embedded.load_processor(tiny_blip2[0].cfg)
    monkeypatch.setattr(embedded, 'load_processor', lambda cfg: processor)
    dataset = few(LOAD_REAL(Path(easy_vqa_builder.data_dir).parents[1]))
    monkeypatch.setattr(easy_vqa, 'load', lambda data_dir: dataset)
    points = point('exact', models=('restored',)), point('none', way='none', models=('pruned',), restore__kd=0.0)
    config = sweep_config(*points)
    ran = []

    def here(run, folder):
        ran.append(run.name)
        sweep_runs.run_here(run.config, folder, run.point.models)

    sweep.run(config, tmp_path, here)
    assert ran == ['dense-seed42', 'exact-seed42', 'none-seed42']
    planned = {run.name: run.config for run in sweep.runs(config)}
    pruned = [Stored(tmp_path / name, owner_of(tmp_path / name, planned[name])).result('prune') for name in ran[1:]]
    assert pruned[0] == pruned[1]  # its seconds too: it was done once
    assert not list(tmp_path.rglob('*.safetensors'))
    assert not list((tmp_path / 'shared').iterdir())
    sweep.run(config, tmp_path, never)

    rows = {(row.labels.get('way'), row.model): row for row in table.write(config, tmp_path)}
    assert len(rows) == 4  # dense, floor, restored, pruned
    for row in rows.values():
        accuracy = row.values['accuracy']
        assert len(accuracy) == 1
        assert 0 <= accuracy[0] <= 1
        assert not row.failed
    restored, dense = rows['SparseLoRA', 'restored'].values, rows[None, 'dense'].values
    assert restored['density language'] == [0.5]
    assert restored['density vision'] == [1.0]
    assert restored['GFLOP an answer'] < dense['GFLOP an answer']
    exact = json.loads((tmp_path / 'exact-seed42' / 'measured.json').read_text())
    layers = {tower: sum(map(len, found.values())) for tower, found in exact['layer_density'].items()}
    assert layers['language'] == 14  # 7 kernels of 2 layers
    assert exact['lora_merged_density'] > 0.9
    assert exact['step_flops'] > 0
    language = 8 * 2 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 32))
    assert language < exact['trained_parameters'] < 2 * language
    none = json.loads((tmp_path / 'none-seed42' / 'measured.json').read_text())
    assert none['layer_density'] == exact['layer_density']
    assert 'lora_merged_density' not in none


# Its order of things, on runs that only pretend.


@pytest.mark.slow
def test_a_failed_run_is_marked_the_others_finish_and_a_rerun_tries_it_alone(tmp_path):
    config, ran = sweep_config(*POINTS), []

    def run_one(run, folder):
        ran.append(run.name)
        if run.point.name == 'b':
            raise sweep_runs.PointError('MemoryError: 7 GiB')
        pretend(run, folder)

    with pytest.raises(sweep.SweepError, match='1 of 5 runs failed: b-seed42; '):
        sweep.run(config, tmp_path, run_one)
    assert ran == [run.name for run in sweep.runs(config)]
    assert (tmp_path / 'b-seed42' / 'failed.txt').read_text() == 'MemoryError: 7 GiB\n'
    rows = table.write(config, tmp_path)
    assert [row.labels['way'] for row in rows if row.failed] == ['plain', 'plain']
    assert 'b-seed42: MemoryError: 7 GiB' in (tmp_path / 'sweep.csv').read_text()
    assert 'b-seed42: MemoryError: 7 GiB' in (tmp_path / 'sweep.md').read_text()
    plots.write(config, rows, tmp_path)

    ran.clear()
    sweep.run(config, tmp_path, lambda run, folder: (ran.append(run.name), pretend(run, folder)))
    assert ran == ['b-seed42']
    assert not any(row.failed for row in table.rows(config, tmp_path))
    assert not (tmp_path / 'b-seed42' / 'failed.txt').exists()


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path):
    config, ran = sweep_config(*POINTS), []

    def stopped(run, folder):
        if run.point.name == 'b':
            write(run, folder, 'export', {'seconds': 1.0})
            raise Interrupted('saved')
        pretend(run, folder)

    with pytest.raises(Interrupted):
        sweep.run(config, tmp_path, stopped)
    assert [row.failed for row in table.rows(config, tmp_path)][-1] == 'control-seed42: not run yet'

    def resumed(run, folder):
        ran.append(run.name)
        if run.point.name == 'b':
            assert (folder / 'export.json').exists()
        pretend(run, folder)

    sweep.run(config, tmp_path, resumed)
    assert ran == ['b-seed42', 'c-seed42', 'control-seed42']


def test_pruning_is_shared_by_equal_prunings_alone(tmp_path):
    """By what a run finds in its folder before it starts."""
    config, found = sweep_config(*POINTS, point('other', prune__samples=4), seeds=2), {}

    def run_one(run, folder):
        found[run.name] = (folder / 'prune.json').exists()
        if 'pruned' in run.point.models:
            (folder / 'masks.safetensors').write_text(f'{run.config.prune.pattern.language} {run.seed}')
            pretend(run, folder)
        else:
            write(run, folder, 'measured', {})

    sweep.run(config, tmp_path, run_one)
    assert {name for name, there in found.items() if there} == {'b-seed42', 'b-seed43'}


def test_the_workdir_of_another_sweep_is_refused(tmp_path):
    sweep.run(sweep_config(*POINTS), tmp_path, pretend)
    with pytest.raises(ConfigError, match=r"another run \('sweep', not 'other'\); use another workdir"):
        sweep.run(sweep_config(*POINTS, name='other'), tmp_path, never)
    changed = sweep_config(*POINTS)
    changed.budgets.tiny.restore.steps = 5
    with pytest.raises(ConfigError, match=r'budgets\.tiny\.restore\.steps is 5 here and 4 in the workdir'):
        sweep.run(changed, tmp_path, never)


@pytest.mark.parametrize(
    ('wrong', 'error', 'said'),
    [
        (
            point('x', restore__stepz=3),
            ConfigError,
            r'point x has no field \'restore.stepz\'; did you mean "steps" instead of "stepz"\?',
        ),
        (point('x', '1.5'), PatternError, r"point x: prune.pattern.language: pattern '1.5'"),
        (point('x', '2:7'), PatternError, 'point x: language/blocks/.*7 does not divide'),
        (point('x', restore__steps='many'), ConfigError, "point x: restore.steps cannot be 'many'"),
        (point('x', prune__method='wandas'), ConfigError, "point x: prune.method 'wandas'"),
        (point('x', models=('sparse',)), ConfigError, 'point x: models .*: expected some of dense, pruned'),
        (point('a'), ConfigError, 'a-seed42: two points of this name'),
        (point('x', model='no/such/model'), StorageError, 'point x: no/such/model: no such directory'),
        (
            point('x', data='no_such_folder', restore__shares=()),
            DataError,
            'point x: .*no_such_folder: no such folder',
        ),
        (point('x', restore__peak=True), ConfigError, 'point x: restore.peak cannot be True: expected a number'),
    ],
)
def test_a_point_that_cannot_work_is_named_before_anything_runs(tmp_path, wrong, error, said):
    with pytest.raises(error, match=said):
        sweep.run(sweep_config(*POINTS, wrong), tmp_path / 'run', never)
    assert not (tmp_path / 'run').exists()


def test_a_budget_that_does_not_exist_is_named(tmp_path):
    config = sweep_config(*POINTS)
    config.budget = 'day'
    with pytest.raises(ConfigError, match="budget 'day': expected one of tiny"):
        sweep.run(config, tmp_path / 'run', never)


def test_a_budget_sets_fields_and_a_point_wins_over_it():
    config = sweep_config(point('half')._replace(share=0.5), point('own', restore__steps=9), seeds=2)
    steps = {run.name: (run.config.restore.steps, run.config.seed) for run in sweep.runs(config)}
    assert steps == {
        'dense-seed42': (4, 42),
        'dense-seed43': (4, 43),
        'half-seed42': (2, 42),
        'half-seed43': (2, 43),
        'own-seed42': (9, 42),
        'own-seed43': (9, 43),
    }


def test_a_run_apart_ends_as_its_process_does(tmp_path):
    def apart(code):
        folder = tmp_path / 'runs' / 'one'
        folder.mkdir(parents=True, exist_ok=True)
        sweep_runs.run_apart([sys.executable, '-S', '-c', code], folder)
        return (folder / 'output.txt').read_text()

    assert apart("import os; print(os.environ['JAX_COMPILATION_CACHE_DIR'])") == f'{tmp_path}/runs/compiled\n'
    with pytest.raises(sweep_runs.PointError, match=r'^no such thing$'):
        apart("import sys; print('error: no such thing', file=sys.stderr); sys.exit(1)")
    with pytest.raises(sweep_runs.PointError, match=r'^ZeroDivisionError: division by zero$'):
        apart('1 / 0')
    with pytest.raises(sweep_runs.PointError, match='killed by signal 9'):
        apart('import os; os.kill(os.getpid(), 9)')
    with pytest.raises(Interrupted):
        apart('import sys; sys.exit(130)')


# What comes out.


@pytest.fixture
def done(tmp_path):
    """(config, workdir) of a finished sweep of three seeds."""
    config = sweep_config(*POINTS, seeds=3)
    sweep.run(config, tmp_path, pretend)
    return config, tmp_path


def test_the_table_holds_means_and_intervals_of_the_seeds(done):
    config, workdir = done
    table.write(config, workdir)
    with (workdir / 'sweep.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [(row['way'], row['model']) for row in rows] == [
        ('', 'dense'),
        ('', names.FLOOR_TITLE),
        ('SparseLoRA', 'pruned'),
        ('SparseLoRA', 'restored'),
        ('plain', 'pruned'),
        ('plain', 'restored'),
        ('SparseLoRA', 'pruned'),
        ('SparseLoRA', 'restored'),
        ('control', 'control'),
    ]
    seeds = [score(run, 'restored') for run in sweep.runs(config) if run.point.name == 'b']
    mean, half = np.mean(seeds), 4.302653 * np.std(seeds, ddof=1) / np.sqrt(3)
    row = rows[5]
    assert float(row['accuracy']) == pytest.approx(mean)
    assert float(row['accuracy ±']) == pytest.approx(half, rel=1e-4)
    assert float(row['shape']) == pytest.approx(mean + 0.1)
    assert float(row['perplexity']) == pytest.approx(1000 * mean)
    want = {'seeds': '3', 'steps': '4', 'density language': '0.5', 'density if LoRA is merged': '0.99'}
    want |= {'prune s': '3', 'restore s': '8', 'step s': '2', 'prune GiB': '1', 'trained parameters': '12345678'}
    want |= {'GFLOP a step': '2', 'GFLOP an answer': '3', 'failed': ''}
    assert {name: row[name] for name in want} == want
    assert rows[0]['GFLOP an answer'] == '4'
    assert rows[0]['density language'] == ''
    assert rows[2]['restore s'] == ''
    assert rows[1]['accuracy'] == '0.25'
    assert rows[1]['perplexity'] == ''


@pytest.mark.slow
def test_pruning_costs_what_its_allocation_costs_too(done):
    config, workdir = done
    for run in sweep.runs(config):
        write(run, workdir / run.name, 'zeros', {'seconds': 5.0, 'peak_memory_bytes': 2**31})
    row = next(row for row in table.rows(config, workdir) if row.model == 'pruned')
    assert row.values['prune s'] == [8.0] * 3
    assert row.values['prune GiB'] == [2.0] * 3


def test_the_markdown_table_is_one_and_says_what_made_it(done):
    config, workdir = done
    table.write(config, workdir)
    lines = (workdir / 'sweep.md').read_text().splitlines()
    assert lines[0] == '# A sweep'
    assert 'budget `tiny`' in lines[2]
    assert 'means of 3 seeds' in lines[2]
    assert re.search(r'\d+ CPU cores, \d+ GiB; jax ', lines[2])
    cells = [line.split('|') for line in lines[4:]]
    assert len({len(row) for row in cells}) == 1
    assert len(cells) == 2 + 9
    assert '| 56.0% ± 2.5 |' in lines[4 + 2 + 5]


@pytest.mark.slow
def test_the_same_results_make_the_same_files(done):
    config, workdir = done
    results = [f'sweep.{kind}' for kind in ('csv', 'md', 'png', 'svg')]

    def files():
        plots.write(config, table.write(config, workdir), workdir)
        return [(workdir / name).read_bytes() for name in results]

    assert files() == files()


def test_bars_are_as_high_as_the_table_says(done):
    config, workdir = done
    rows = table.rows(config, workdir)
    accuracy, perplexity = plots.figure(config, rows).axes
    heights = sorted(bar.get_height() for bar in accuracy.patches)
    drawn = [row for row in rows if row.model in ('pruned', 'restored')]
    assert heights == pytest.approx(sorted(100 * np.mean(row.values['accuracy']) for row in drawn))
    assert [text.get_text() for text in accuracy.get_xticklabels()] == ['2:4', '0.7']
    lines = {line.get_label(): line.get_ydata()[0] for line in accuracy.lines if line.get_label()[0] != '_'}
    dense, control = (np.mean(row.values['accuracy']) for row in rows if row.model in ('dense', 'control'))
    assert lines == pytest.approx(
        {'dense': 100 * dense, names.FLOOR_TITLE: 25.0, 'dense, same LoRA budget': 100 * control}
    )
    assert perplexity.get_yscale() == 'log'


def test_bars_are_centred_on_their_label_and_the_last_label_is_not_at_the_edge():
    config = sweep_config(plot={'kind': 'bars', 'x': 'base', 'series': 'teacher', 'title': 'Bases'})
    points = [('dense', 'model'), ('dense', 'top-k'), ('dense', 'none'), ('packed', 'model'), ('packed', 'none')]
    points += [('int4', 'model'), ('nf4', 'model')]
    rows = [
        table.Row({'base': base, 'teacher': teacher}, 'restored', 1, {'accuracy': [0.5]}) for base, teacher in points
    ]
    (axes,) = plots.figure(config, rows).axes
    middles = {}
    for bar in axes.patches:
        middle = bar.get_x() + bar.get_width() / 2
        middles.setdefault(round(middle), []).append(middle)
    assert {place: len(bars) for place, bars in middles.items()} == {0: 3, 1: 2, 2: 1, 3: 1}
    for place, bars in middles.items():
        assert np.mean(bars) == pytest.approx(place)
        assert len({round(bar, 6) for bar in bars}) == len(bars)
    assert axes.get_xlim() == (-0.5, 3.5)


class Letters:
    """A metric of one's own."""

    title = 'letters'

    def __call__(self, predicted, reference):
        return 0.0


LETTERS = Letters()


def test_the_title_of_a_metric_is_shown(tmp_path):
    base = tiny_config(**{'evaluate.metric': f'{__name__}:LETTERS'})
    config = sweep_config(*POINTS, base=base)
    sweep.run(config, tmp_path, pretend)
    rows = table.write(config, tmp_path)
    assert all('letters' in row.values and 'accuracy' not in row.values for row in rows)
    assert '| letters |' in (tmp_path / 'sweep.md').read_text()
    assert plots.figure(config, rows).axes[0].get_ylabel() == 'letters, %'
    with (tmp_path / 'sweep.csv').open() as file:
        assert {row['seeds'] for row in csv.DictReader(file)} == {'1'}


def scored_on_tasks(run, folder):
    """Writes what the stages of a run with tasks leave: the score of each model, and of a task without references."""
    pretend(run, folder)
    for model in run.point.models:
        value = {'headline': 'CIDEr', 'values': {'CIDEr': 100 * score(run, model) + 60}}
        tasks = {'nocaps_val': value, '/data/cats': value, 'vqav2_test': {'headline': 'accuracy', 'values': {}}}
        write(run, folder, f'tasks_{model}', {'seconds': 1.0, 'peak_memory_bytes': 1, 'tasks': tasks})


def test_a_task_has_a_column_and_a_panel(tmp_path):
    config = sweep_config(*POINTS)
    sweep.run(config, tmp_path, scored_on_tasks)
    rows = table.write(config, tmp_path)
    scored = {(row.labels.get('way'), row.model): row.values.get('nocaps_val CIDEr') for row in rows}
    assert scored[None, 'dense'] == [pytest.approx(0.55 + 0.6)]
    assert scored['plain', 'restored'] == [pytest.approx(0.55 + 0.6)]
    assert scored[None, 'image-blind floor'] is None
    figure = plots.figure(config, rows)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        *('accuracy, %', 'nocaps_val CIDEr, %', 'cats CIDEr, %', 'perplexity')
    ]
    # CIDEr may be above 100.
    assert max(bar.get_height() for bar in figure.axes[1].patches) < figure.axes[1].get_ylim()[1]
    with (tmp_path / 'sweep.csv').open() as file:
        assert {'nocaps_val CIDEr', 'nocaps_val CIDEr ±', 'cats CIDEr'} <= set(csv.DictReader(file).fieldnames)


def test_scores_of_the_pruned_model_on_tasks_are_shared_with_their_files(tmp_path):
    config = sweep_config(*POINTS)
    giver, taker = (run for run in sweep.runs(config) if run.point.name in 'ab')
    shared = tmp_path / 'shared'
    (tmp_path / 'a' / 'tasks_pruned').mkdir(parents=True)
    stored = Stored(tmp_path / 'a', owner_of(tmp_path / 'a', giver.config))
    files.write_text(stored.writes('tasks_pruned') / 'results.json', '{}')
    stored.write_result('tasks_pruned', {'tasks': {}})
    for run, folder, move in ((giver, 'a', sweep_runs.give_shared), (taker, 'b', sweep_runs.take_shared)):
        move(run.shared_stages, run.config, tmp_path / folder, shared)
    assert (tmp_path / 'b' / 'tasks_pruned' / 'results.json').read_text() == '{}'
    assert Stored(tmp_path / 'b', owner_of(tmp_path / 'b', taker.config)).result('tasks_pruned') == {'tasks': {}}


def test_lines_go_through_the_table_in_order(tmp_path):
    plot = {'kind': 'lines', 'x': 'steps', 'series': 'pattern', 'title': 'Steps'}
    shares = {'c': 1.0, 'b': 0.5, 'a': 0.25}
    points = [Point(name, {'pattern': '2:4'}, share=share) for name, share in shares.items()]
    config = sweep_config(*points, plot=plot)
    sweep.run(config, tmp_path, pretend)
    rows = table.rows(config, tmp_path)
    assert [row.steps for row in rows if row.model == 'restored'] == [4, 2, 1]
    (axes, _) = plots.figure(config, rows).axes
    restored = axes.containers[1].lines[0]
    assert list(restored.get_xdata()) == [1, 2, 4]
    assert restored.get_ydata() == pytest.approx([50.0, 55.0, 60.0])


# The sweeps of the paper.

SWEEPS = {'modality': 15, 'split': 16, 'restore': 15, 'methods': 34, 'rank': 12, 'steps': 10, 'base': 10}


@pytest.mark.slow
@pytest.mark.parametrize('name', SWEEPS)
@pytest.mark.parametrize('recipe', ['blip2_lang_only', 'llava_both'])
def test_the_sweeps_fit_their_recipes(name, recipe):
    config = importlib.import_module(f'configs.sweeps.{name}').get_config(f'recipe={recipe}')
    assert len(config.points) == SWEEPS[name]
    assert config.name == name
    towers = set(config.base.prune.pattern)
    for point in config.points:
        pruned = {field for field in point.fields if field.startswith('prune.pattern.')}
        assert point.models == ('control',) or pruned == {f'prune.pattern.{tower}' for tower in towers}
        assert config.plot.series in point.labels
        assert config.plot.x in point.labels or config.plot.x == 'steps' or point.models == ('control',)
    for budget in ('tiny', 'hour', 'full'):
        config.budget = budget
        assert len(sweep.runs(config)) == (SWEEPS[name] + 1) * config.budgets[budget].seeds


def test_the_splits_add_up():
    from configs.sweeps import split

    sums = {}
    for point in split.get_config().points:
        parts = [float(point.fields[f'prune.pattern.{tower}']) for tower in ('vision', 'language')]
        sums.setdefault(point.labels['budget'], []).append(round(sum(parts), 6))
    assert {name: set(found) for name, found in sums.items()} == {'100 %': {1.0}, '120 %': {1.2}}
    assert [len(found) for found in sums.values()] == [9, 7]


def test_a_recipe_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="recipe 'blip3': expected a recipe of configs/"):
        grid.base('recipe=blip3')


def test_the_script_names_a_sweep_that_does_not_exist_and_a_recipe_that_is_none(script, tmp_path):
    code, _, err = script('sweep.py', '--config=configs/sweeps/modalities.py', f'--workdir={tmp_path / "run"}')
    assert code == 1
    assert err == ('error: configs/sweeps/modalities.py: no such config; did you mean configs/sweeps/modality.py?\n')
    code, _, err = script('sweep.py', '--config=configs/blip2_both.py', f'--workdir={tmp_path / "run"}')
    assert code == 1
    assert 'configs/blip2_both.py is a recipe, and this script needs a sweep' in err
    code, _, err = script(
        'sweep.py', '--config=configs/sweeps/modality.py', '--config.budget=day', f'--workdir={tmp_path / "run"}'
    )
    assert code == 1
    assert "budget 'day': expected one of full, hour, tiny" in err
    code, _, err = script(
        'sweep.py',
        '--config=configs/sweeps/modality.py',
        '--config.base.restore.stepz=3',
        f'--workdir={tmp_path / "r"}',
    )
    assert code == 1
    assert "no field 'base.restore.stepz'; did you mean 'base.restore.steps'?" in err
    assert not (tmp_path / 'run').exists()
    (tmp_path / 'run').mkdir()
    files.write_text(tmp_path / 'run' / 'config.json', json.dumps({'name': 'split'}))
    code, _, err = script('sweep.py', '--config=configs/sweeps/modality.py', f'--workdir={tmp_path / "run"}')
    assert code == 1
    assert "holds another run ('split', not 'modality')" in err
    assert [file.name for file in (tmp_path / 'run').iterdir()] == ['config.json']
