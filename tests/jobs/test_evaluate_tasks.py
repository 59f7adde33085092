"""Tasks end to end: official files, a tiny random model, scores, the files that others read, resuming."""

import fcntl
import json
import math

import miniature_benchmarks as miniature
import numpy as np
import pytest
import tiny_models

import sparselora_jax as sl
from sparselora_jax.data.benchmarks import user_jsonl
from sparselora_jax.evaluation.tasks import TASKS, USER_METRICS, find_task
from sparselora_jax.jobs import evaluate_tasks
from sparselora_jax.jobs.evaluate_tasks import TaskRequest
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.runtime.files import StorageError


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    tiny_models.save('blip2-t5', folder)  # without a table of positions, which the longest prompts do not fit
    return folder


@pytest.fixture(scope='module')
def loaded(model_dir):
    model, params = sl.load_model(model_dir, dtype='float32')
    return model, params, sl.load_processor(model_dir)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    return folder, miniature.everything(folder)


DECODING = {'num_beams': 1, 'max_new_tokens': 3}


def run(root, output, tasks, loaded, files=None, **options):
    """Score as launch/evaluate.py does."""
    options = {'batch': 2, 'overrides': DECODING} | options
    request = TaskRequest(tasks=tasks, data_root=root[0], **options)
    known = evaluate_tasks.load_tasks(request)
    model, params, processor = loaded
    prepared = evaluate_tasks.prepare(request, known, model, processor)
    owner = evaluate_tasks.begin(output, files or {}, known)
    return evaluate_tasks.evaluate_tasks(
        request, prepared, model, params, processor, output=output, name='tiny', owner=owner
    )


def samples_of(folder, task):
    return [json.loads(line) for line in (folder / f'samples_{task}.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_every_task_runs_on_its_official_files(root, tmp_path, loaded):
    tasks = tuple(name for name in TASKS if find_task(name).kind != 'retrieval')
    results = run(root, tmp_path, tasks, loaded)
    written = json.loads((tmp_path / 'results.json').read_text())
    for name in tasks:
        expected = root[1][name]
        has_references = all(item.references for item in expected)
        samples = samples_of(tmp_path, name)
        assert [sample['id'] for sample in samples] == [item.id for item in expected]
        assert [tuple(sample['references']) for sample in samples] == [item.references for item in expected]
        assert (find_task(name).headline in written['results'][name]) == has_references
        assert written['n'][name]['scored'] == (len(expected) if has_references else 0)
        assert written['n'][name]['expected'] > len(expected)
        assert any('but the benchmark has' in note for note in results[name].notes)
        if find_task(name).entry is not None:
            submitted = json.loads((tmp_path / f'submission_{name}.json').read_text())
            assert len(submitted) == len(expected)


@pytest.mark.slow
def test_scores_are_those_of_the_samples_and_the_answers_fit_the_server(root, tmp_path, loaded):
    results = run(root, tmp_path, ('vqav2_val',), loaded)
    samples = samples_of(tmp_path, 'vqav2_val')
    mean = 100 * np.mean([sample['score'] for sample in samples])
    assert results['vqav2_val'].values['accuracy'] == pytest.approx(mean)
    assert json.loads((tmp_path / 'results.json').read_text())['results']['vqav2_val']['accuracy'] == round(mean, 2)
    submitted = json.loads((tmp_path / 'submission_vqav2_val.json').read_text())
    assert submitted == [{'question_id': s['id'], 'answer': s['prediction']} for s in samples]
    assert all(sample['prompt'].startswith('Question: ') for sample in samples)


@pytest.mark.slow
def test_a_run_that_was_stopped_continues_and_gives_the_same(root, tmp_path, loaded, monkeypatch):
    whole = tmp_path / 'whole'
    run(root, whole, ('gqa',), loaded)
    stopped = tmp_path / 'stopped'
    stopped.mkdir()
    first = (whole / 'answers_gqa.jsonl').read_text().splitlines(keepends=True)[:2]
    # Half a line, as a kill leaves it.
    (stopped / 'answers_gqa.jsonl').write_text(''.join(first) + '["ye')
    asked = []
    monkeypatch.setattr(
        'sparselora_jax.evaluation.vqa.answer_examples',
        lambda model, weights, processor, examples, **options: asked.extend(examples) or ['x'] * 2,
    )
    run(root, stopped, ('gqa',), loaded)
    assert len(asked) == len(root[1]['gqa']) - 2
    assert [s['prediction'] for s in samples_of(stopped, 'gqa')][:2] == [
        s['prediction'] for s in samples_of(whole, 'gqa')
    ][:2]
    # Answers to another prompt are no answers to this one.
    with pytest.raises(StorageError, match='answer of another run'):
        run(root, whole, ('gqa',), loaded, prompt='{}?')


def test_a_folder_that_another_run_writes_into_is_refused(tmp_path):
    with (tmp_path / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match='another run is in it'):
            evaluate_tasks.begin(tmp_path, {}, {})
    evaluate_tasks.begin(tmp_path, {}, {})


@pytest.mark.slow
def test_a_limit_and_an_offset_choose_items_in_their_order(root, tmp_path, loaded):
    run(root, tmp_path, ('gqa',), loaded, limit=2, offset=1)
    assert [s['id'] for s in samples_of(tmp_path, 'gqa')] == [item.id for item in root[1]['gqa'][1:3]]
    with pytest.raises(DataError, match='offset 99 leaves none of'):
        run(root, tmp_path / 'none', ('gqa',), loaded, offset=99)


@pytest.fixture
def spoken(monkeypatch):
    """A model that answers 'yes' to each question; returns the examples that it was asked."""
    asked = []

    def answer(model, weights, processor, examples, **options):
        asked.extend(examples)
        return ['yes'] * len(examples)

    monkeypatch.setattr('sparselora_jax.evaluation.vqa.answer_examples', answer)
    return asked


def own_data(folder, questions, **fields):
    """A folder of a user's own with these questions."""
    lines = [{'image': '0.png', 'question': each, 'references': ['yes']} | fields for each in questions]
    miniature.write(folder / '0.png', miniature.image(0, '.png'))
    miniature.write(folder / 'data.jsonl', lines)
    return (str(folder),)


QUESTIONS = ('a?', 'b?', 'c?', 'd?', 'e ' * 30 + '?', 'f?')


def test_weights_that_changed_at_the_same_path_are_noticed_before_any_question(tmp_path, loaded, root, spoken):
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(b'weights')
    tasks = own_data(tmp_path / 'cats', QUESTIONS)
    out = tmp_path / 'out'
    run(root, out, tasks, loaded, {'model.safetensors': weights}, limit=2)
    before = (out / 'results.json').read_bytes()
    weights.write_bytes(b'WEIGHTS')
    with pytest.raises(
        DataError, match=r'out: the files of the model .* \(model.safetensors has changed\); put them back'
    ):
        run(root, out, tasks, loaded, {'model.safetensors': weights})
    assert len(spoken) == 2
    assert (out / 'results.json').read_bytes() == before
    # A copy with another time is the same model.
    weights.write_bytes(b'weights')
    run(root, out, tasks, loaded, {'model.safetensors': weights})
    assert len(spoken) == len(QUESTIONS)


def test_an_image_of_a_user_that_changed_is_noticed(tmp_path, loaded, root, spoken):
    tasks = own_data(tmp_path / 'cats', QUESTIONS)
    run(root, tmp_path / 'out', tasks, loaded)
    picture = next((tmp_path / 'cats').rglob('*.png'))
    picture.write_bytes(miniature.image(77, '.png'))
    with pytest.raises(DataError, match=r'the items of .*cats are not those .*its image'):
        run(root, tmp_path / 'out', tasks, loaded)


def test_items_that_changed_are_noticed_and_the_first_is_named(tmp_path, loaded, root, spoken):
    tasks = own_data(tmp_path / 'cats', QUESTIONS)
    run(root, tmp_path / 'out', tasks, loaded)
    own_data(tmp_path / 'cats', ['a?', 'another?', *QUESTIONS[2:]])
    with pytest.raises(DataError, match=r'the items of .*cats are not those .*\(1 changed; item 1: its question\)'):
        run(root, tmp_path / 'out', tasks, loaded)


def test_a_limit_may_be_raised_to_a_longer_prompt_and_lowered_again(tmp_path, loaded, root, spoken):
    tasks = own_data(tmp_path / 'cats', QUESTIONS)
    run(root, tmp_path / 'out', tasks, loaded, limit=4)
    assert len(spoken) == 4
    run(root, tmp_path / 'out', tasks, loaded)
    assert len(spoken) == len(QUESTIONS)  # the four answers are not asked for again
    assert len(samples_of(tmp_path / 'out', 'cats')) == len(QUESTIONS)
    run(root, tmp_path / 'out', tasks, loaded, limit=3)
    assert len(samples_of(tmp_path / 'out', 'cats')) == 3
    assert len(spoken) == len(QUESTIONS)


def test_answers_of_half_a_batch_are_computed_again_and_a_line_says_so(tmp_path, loaded, root, spoken, capsys):
    tasks = own_data(tmp_path / 'cats', QUESTIONS)
    run(root, tmp_path / 'out', tasks, loaded, limit=3)
    run(root, tmp_path / 'out', tasks, loaded)
    assert '1 answers after the last whole batch are computed again' in capsys.readouterr().err


def test_a_file_of_ones_own_is_read_once(tmp_path, loaded, root, spoken, monkeypatch):
    reads = []
    fill = user_jsonl.fill
    monkeypatch.setattr(user_jsonl, 'fill', lambda builder, path: reads.append(path) or fill(builder, path))
    run(root, tmp_path / 'out', own_data(tmp_path / 'cats', QUESTIONS), loaded)
    assert len(reads) == 1


def test_results_of_a_file_of_ones_own_have_its_name_without_the_suffix(tmp_path, loaded, root, spoken):
    own_data(tmp_path / 'cats', QUESTIONS)
    file = (tmp_path / 'cats' / 'data.jsonl').rename(tmp_path / 'cats' / 'asleep.jsonl')
    run(root, tmp_path / 'out', (str(file),), loaded)
    names = {path.name for path in (tmp_path / 'out').glob('*asleep*')}
    assert names == {'answers_asleep.jsonl', 'samples_asleep.jsonl'}


def test_two_folders_of_one_name_are_refused(tmp_path):
    names = own_data(tmp_path / 'a' / 'cats', QUESTIONS) + own_data(tmp_path / 'b' / 'cats', QUESTIONS)
    with pytest.raises(DataError, match=r'both write answers_cats\.jsonl; rename one'):
        evaluate_tasks.load_tasks(TaskRequest(tasks=names, data_root=None))


class Nothing:
    """A metric without any value."""

    notes = ()
    per_item = np.array([math.nan, 0.5])

    def aggregate(self, indices=None):
        del indices
        return {'overall': math.nan, 'kind/cats': 50.0, 'kind/dogs': math.inf}


def test_a_value_that_is_not_a_number_is_null_and_a_note_says_why(tmp_path, loaded, root, spoken, monkeypatch):
    known = ('answer', 'accuracy', lambda predictions, items: Nothing())
    monkeypatch.setitem(USER_METRICS, 'exact_match', known)
    tasks = own_data(tmp_path / 'cats', QUESTIONS[:2])
    results = run(root, tmp_path / 'out', tasks, loaded)

    def refuse(constant):
        raise ValueError(constant)

    written = json.loads((tmp_path / 'out' / 'results.json').read_text(), parse_constant=refuse)
    values = written['results'][tasks[0]]
    assert values['accuracy'] is None
    assert values['accuracy/kind/cats'] == 50.0
    assert values['accuracy_stderr'] is None
    note = 'no value, because no scored item has one: accuracy, accuracy/kind/dogs'
    assert note in written['notes'][tasks[0]]
    assert [line['score'] for line in samples_of(tmp_path / 'out', 'cats')] == [None, 0.5]
    assert evaluate_tasks.table(results)[0].endswith(f'not scored: {note}')


@pytest.mark.slow
def test_an_unknown_task_is_named_with_the_nearest_before_anything_is_read(tmp_path):
    with pytest.raises(DataError, match='vqav2_val'):
        evaluate_tasks.load_tasks(TaskRequest(tasks=('vqav2_vall',), data_root=tmp_path / 'absent'))


@pytest.mark.slow
def test_a_folder_of_ones_own_is_scored_by_the_metric_that_it_names(root, tmp_path, loaded, monkeypatch):
    folder = tmp_path / 'cats'
    lines = [
        {'image': '0.png', 'question': 'Is it asleep?', 'references': ['Yes', 'yeah'], 'groups': {'kind': 'yes/no'}},
        {'image': '0.png', 'question': 'What colour is it?', 'references': ['teal'], 'groups': {'kind': 'colour'}},
    ]
    miniature.write(folder / '0.png', miniature.image(0, '.png'))
    miniature.write(folder / 'data.jsonl', lines)
    monkeypatch.setattr('sparselora_jax.evaluation.vqa.answer_examples', lambda *args, **options: ['yeah', 'blue'])
    results = run(root, tmp_path / 'out', (str(folder),), loaded)
    values = results[str(folder)].values
    assert values == {'accuracy': 50.0, 'accuracy/kind/yes/no': 100.0, 'accuracy/kind/colour': 0.0}
    assert [s['score'] for s in samples_of(tmp_path / 'out', 'cats')] == [1.0, 0.0]
    miniature.write(folder / 'data.jsonl', [lines[0] | {'metric': 'vqa'}, lines[1] | {'metric': 'beauty'}])
    with pytest.raises(DataError, match='metric'):
        run(root, tmp_path / 'out', (str(folder),), loaded)
    miniature.write(folder / 'data.jsonl', [lines[0] | {'metric': 'beauty'}])
    with pytest.raises(DataError, match="metric 'beauty': expected one of exact_match, vqa"):
        run(root, tmp_path / 'out', (str(folder),), loaded)


@pytest.mark.slow
def test_a_prompt_that_the_model_cannot_read_is_named_before_any_question(root, tmp_path):
    tiny_models.save('blip2-opt', tmp_path / 'model')
    model, params = sl.load_model(tmp_path / 'model', dtype='float32')
    short = model, params, sl.load_processor(tmp_path / 'model')
    with pytest.raises(DataError, match=r'scienceqa_img: \d+ tokens and 3 more: the model reads at most 128'):
        run(root, tmp_path / 'out', ('gqa', 'scienceqa_img'), short)
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_a_minimum_length_replaces_that_of_the_family(tmp_path):
    tiny_models.save('blip2-opt', tmp_path / 'model')
    model, _ = sl.load_model(tmp_path / 'model', dtype='float32')
    processor = sl.load_processor(tmp_path / 'model')
    tasks = own_data(tmp_path / 'cats', ('what is this?',), metric='captions')

    def decoding(**overrides):
        request = TaskRequest(tasks=tasks, data_root=None, overrides=overrides)
        loaded_tasks = evaluate_tasks.load_tasks(request)
        (prepared,) = evaluate_tasks.prepare(request, loaded_tasks, model, processor).values()
        return prepared.asked.text.decoding

    assert decoding(num_beams=1)['min_new_tokens'] == 7
    # `generate` would prefer the family's `min_new_tokens`, and captions of three words could not be given.
    without = decoding(min_length=0)
    assert 'min_new_tokens' not in without
    assert without['min_length'] == 0


@pytest.mark.slow
def test_the_script_prints_a_table(root, tmp_path, model_dir, script):
    options = [f'--{name}={value}' for name, value in {'num_beams': 1, 'max_new_tokens': 3}.items()]
    code, out, err = script(
        'evaluate.py',
        f'--model={model_dir}',
        '--tasks=pope',
        f'--data_root={root[0]}',
        f'--output={tmp_path}',
        *options,
    )
    assert code == 0, err
    assert 'mean_f1' in out
    assert (tmp_path / 'results.json').is_file()
    code, out, err = script('evaluate.py', '--tasks=list', f'--data_root={root[0]}')
    assert code == 0, err
    assert all(f'{name}: ' in out for name in TASKS)


@pytest.mark.slow
def test_the_script_scores_the_embedded_model_by_its_name(tmp_path, script):
    (folder,) = own_data(tmp_path / 'cats', QUESTIONS[:1])
    options = (f'--tasks={folder}', f'--output={tmp_path / "out"}', '--num_beams=1', '--max_new_tokens=2')
    code, out, err = script('evaluate.py', '--model=embedded', *options)
    assert code == 0, err
    assert 'accuracy' in out
    assert json.loads((tmp_path / 'out' / 'results.json').read_text())['config']['model'] == 'embedded'


@pytest.mark.slow
def test_the_script_asks_for_the_folders(script):
    code, _, err = script('evaluate.py', '--tasks=gqa')
    assert code == 1
    assert 'add --data_root=DIR' in err
    code, _, err = script('evaluate.py', '--tasks=gqa', '--data_root=.')
    assert code == 1
    assert 'add --output=DIR' in err
