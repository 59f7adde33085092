"""The main job scores the dense, the pruned and the restored model on tasks, and goes on after it was stopped."""

import json
import shutil

import miniature_benchmarks as miniature
import numpy as np
import pytest
from tiny_jobs import small_config
from tiny_models import save, save_data

from sparselora_jax.jobs import report, stages
from sparselora_jax.jobs.job import Job
from sparselora_jax.recipe import ConfigError, absolute_paths, check_values, task_names
from sparselora_jax.runtime.errors import DataError

MODELS = ('dense', 'pruned', 'restored')
FILES = ('answers_gqa.jsonl', 'results.json', 'samples_gqa.jsonl', 'submission_gqa.json')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A tiny model, data to prune with, the files of a benchmark, and a folder of a user's own."""
    folder = tmp_path_factory.mktemp('world')
    save('blip2-t5', folder / 'model')  # without a table of positions, which the longest prompts do not fit
    (folder / 'data').mkdir()
    save_data(folder / 'data', 12)
    miniature.gqa(folder / 'benchmarks')
    lines = [{'image': '0.png', 'question': 'Is it asleep?', 'references': ['yes']}]
    miniature.write(folder / 'cats' / '0.png', miniature.image(0, '.png'))
    miniature.write(folder / 'cats' / 'data.jsonl', lines)
    return folder


def config_of(world, **fields):
    tasks = {
        'evaluate.tasks': f'gqa,{world / "cats"}',
        'evaluate.data_root': str(world / 'benchmarks'),
        'prune.method': 'magnitude',
    }
    return small_config('blip2-t5', world / 'model', world / 'data', **tasks | fields)


@pytest.fixture(scope='module')
def workdir(world, tmp_path_factory):
    """The workdir of a finished run with two tasks."""
    job = Job(config_of(world), tmp_path_factory.mktemp('run'))
    stages.run(job)
    report.write(job)
    return job.workdir


def read(file):
    return json.loads(file.read_text())


@pytest.mark.slow
def test_each_model_is_scored_and_the_report_compares_them(workdir):
    got = read(workdir / 'report.json')
    assert got['tasks'].keys() == {'gqa', *(name for name in got['tasks'] if name.endswith('/cats'))}
    for model in MODELS:
        written = read(workdir / f'tasks_{model}' / 'results.json')
        assert written['config']['model'].endswith(f', {model}')
        score = read(workdir / f'tasks_{model}.json')['tasks']['gqa']['values']['accuracy']
        assert written['results']['gqa']['accuracy'] == round(score, 2)
        assert got['tasks']['gqa']['scores'][model] == score
        samples = (workdir / f'tasks_{model}' / 'samples_gqa.jsonl').read_text().splitlines()
        assert score == 100 * np.mean([json.loads(line)['score'] for line in samples])
        assert {file.name for file in (workdir / f'tasks_{model}').iterdir()} > set(FILES)
    assert got['tasks']['gqa']['intervals'].keys() == {'pruned - dense', 'restored - dense', 'restored - pruned'}
    assert got['time_s']['tasks'] > 0
    assert 'Scores on tasks' in (workdir / 'report.html').read_text()


@pytest.mark.slow
def test_a_run_that_was_stopped_in_a_task_goes_on_after_its_last_batch(workdir, world, tmp_path, monkeypatch):
    stopped = shutil.copytree(workdir, tmp_path / 'run')
    for name in ('tasks_restored.json', 'tasks_restored/results.json', 'export.json', 'floor.json', 'report.json'):
        (stopped / name).unlink()
    shutil.rmtree(stopped / 'exported')
    shutil.rmtree(stopped / 'adapter')
    (stopped / 'tasks_restored' / 'answers_cats.jsonl').unlink()
    answers = stopped / 'tasks_restored' / 'answers_gqa.jsonl'
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text(''.join(lines[:2]) + lines[2][:5])
    asked = []
    from sparselora_jax.evaluation import vqa

    answer = vqa.answer_examples

    def count(*args, **options):
        asked.append(args[3])
        return answer(*args, **options)

    monkeypatch.setattr(vqa, 'answer_examples', count)
    job = Job(config_of(world), stopped)
    stages.run(job)
    report.write(job)
    assert len(asked) == 2  # the second batch of gqa, and the one of cats: a batch has two questions
    for name in ('results.json', 'samples_gqa.jsonl', 'answers_gqa.jsonl'):
        assert (stopped / 'tasks_restored' / name).read_bytes() == (workdir / 'tasks_restored' / name).read_bytes()
    before, after = (read(folder / 'report.json')['tasks'] for folder in (workdir, stopped))
    assert after == before


@pytest.mark.slow
def test_items_that_changed_since_the_run_began_are_named(workdir, world, tmp_path):
    stopped = shutil.copytree(workdir, tmp_path / 'run')
    moved = shutil.copytree(world / 'cats', tmp_path / 'cats')
    record = read(world / 'cats' / 'data.jsonl')
    try:
        miniature.write(world / 'cats' / 'data.jsonl', [record | {'question': 'Is it awake?'}])
        with pytest.raises(
            ConfigError, match=r'the items of .*cats are not those that this run .*item 0: its question'
        ):
            Job(config_of(world), stopped).check()
    finally:
        shutil.rmtree(world / 'cats')
        shutil.copytree(moved, world / 'cats')


@pytest.mark.slow
def test_pruning_alone_scores_the_dense_and_the_pruned_model(world, tmp_path, script):
    config = config_of(world)
    (tmp_path / 'recipe.json').write_text(config.to_json())
    code, out, err = script('prune.py', f'--config={tmp_path / "recipe.json"}', f'--workdir={tmp_path / "run"}')
    assert code == 0, err
    assert any(line.startswith('gqa') and 'dense' in line and 'pruned' in line for line in out.splitlines()), out
    assert not (tmp_path / 'run' / 'tasks_restored.json').exists()
    assert (tmp_path / 'run' / 'tasks_pruned' / 'submission_gqa.json').is_file()
    code, out, err = script(
        'train.py', f'--config={tmp_path / "recipe.json"}', f'--workdir={tmp_path / "other"}', '--dry_run'
    )
    assert code == 0, err
    assert 'task: gqa, ' in out
    assert 'memory, tasks: ' in out


def test_missing_files_of_a_task_end_a_run_before_any_work(world, tmp_path):
    job = Job(config_of(world, **{'evaluate.tasks': 'gqa,vqav2_val'}), tmp_path / 'run')
    with pytest.raises(DataError, match='vqav2_val: no files of VQAv2, validation'):
        job.check()
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('tasks', 'root', 'told'),
    [
        ('gqaa', 'data', "evaluate.tasks: .*'gqaa'.*gqa"),
        ('gqa', '', 'evaluate.tasks: gqa needs evaluate.data_root'),
        ('gqa,gqa', 'data', 'a name occurs twice'),
        ('gqa,', 'data', "evaluate.tasks: .*''"),
        ('json:loads', 'data', 'evaluate.tasks: task .*json:loads'),
    ],
)
def test_illegal_tasks_are_refused(world, tasks, root, told):
    config = config_of(world, **{'evaluate.tasks': tasks, 'evaluate.data_root': root})
    with pytest.raises(ConfigError, match=told):
        check_values(config)


def test_folders_among_the_tasks_become_absolute(world, monkeypatch):
    monkeypatch.chdir(world)
    config = config_of(world, **{'evaluate.tasks': 'gqa, cats', 'evaluate.data_root': 'benchmarks'})
    assert task_names(config) == ('gqa', 'cats')
    absolute = absolute_paths(config)
    assert absolute.evaluate.data_root == str(world / 'benchmarks')
    assert task_names(absolute) == ('gqa', str(world / 'cats'))
    assert config.evaluate.tasks == 'gqa, cats'
