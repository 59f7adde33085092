"""The data set made from a Debian package of stamps, and the tasks on it, on a miniature of the package."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_jobs import small_config
from tiny_models import save

import sparselora_jax as sl
from sparselora_jax.data.caption_forms import clean_caption
from sparselora_jax.data.folder import read_folder
from sparselora_jax.jobs import report, stages
from sparselora_jax.jobs.job import Job

ROOT = Path(__file__).parents[1]
# Folder -> names of its stamps, which are their captions too.
STAMPS = {
    'animals/mammals': ('badger', 'otter', 'yak', 'zebra', 'goat', 'wolf'),
    'food/fruit': ('apple', 'pear', 'plum', 'fig', 'kiwi', 'lemon'),
    'space': ('moon', 'comet', 'rocket'),
}


def write_stamp(folder, name, caption, value, encoding='utf-8'):
    """Write a stamp as the package has it: a picture with transparency, a caption with translations, sounds."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((9, 12, 4), value, np.uint8)
    pixels[..., 3] = 255
    pixels[0, 0] = (1, 2, 3, 0)
    Image.fromarray(pixels).save(folder / f'{name}.png')
    text = f'{caption}\nde.utf8=Übersetzt {name}.\nfr.utf8=Traduit.\n'
    (folder / f'{name}.txt').write_bytes(text.encode(encoding))
    (folder / f'{name}.dat').write_text('colorable')
    (folder / f'{name}.ogg').write_bytes(b'OggS')


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    """An unpacked package."""
    package = tmp_path_factory.mktemp('package')
    root = package / 'usr' / 'share' / 'tuxpaint' / 'stamps'
    value = 0
    for folder, names in STAMPS.items():
        for name in names:
            value += 10
            write_stamp(root / folder, name, f'A {name}.', value)
    write_stamp(root / 'symbols' / 'alphabets' / 'latin', 'a', 'The letter a.', 201)
    # The same caption but for its case, the same picture, and a picture for another direction, without a caption.
    write_stamp(root / 'animals', 'zz_badger', 'a Badger!', 202)
    write_stamp(root / 'vehicles', 'zz_rocket', 'A big rocket.', value)
    write_stamp(root / 'vehicles', 'tug_mirror', '', 203)
    (root / 'vehicles' / 'tug_mirror.txt').unlink()
    (root / 'vehicles' / 'car.svg').write_text('<svg/>')
    (root / 'vehicles' / 'car.txt').write_text('A car.\n')
    return package


@pytest.fixture
def benchmark_script(monkeypatch, capsys):
    """`benchmark_script(name, *arguments)` runs a script of benchmarks/ in this process, and returns what it prints."""
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')

    def run(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / 'benchmarks' / name), run_name='__main__')
        return capsys.readouterr().out

    return run


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_splits_share_nothing_and_questions_are_balanced(package, tmp_path, benchmark_script):
    out = benchmark_script('stamps.py', package, tmp_path / 'data', '--test_share=0.4')
    assert '9 stamps to train on, 6 to test with' in out
    left_out = out.split('left out: ')[1].strip().split(', ')
    expected = ('1 letters', '1 equal captions', '1 equal pictures', '1 without a caption', '1 SVG')
    assert sorted(left_out) == sorted(expected)
    data = tmp_path / 'data'
    records = lines_of(data / 'data.jsonl')
    by_split = {name: [record for record in records if record['split'] == name] for name in ('train', 'test')}
    images = {name: {record['image'] for record in members} for name, members in by_split.items()}
    assert not images['train'] & images['test']
    captions = {
        name: {clean_caption(record['answer']) for record in members if record['answer'] not in ('yes', 'no')}
        for name, members in by_split.items()
    }
    assert not captions['train'] & captions['test']
    assert captions['train'] | captions['test'] == {f'a {name}' for names in STAMPS.values() for name in names}
    for members in by_split.values():
        asked = [(record['prompt'], record['answer']) for record in members]
        for question in {prompt for prompt, answer in asked if answer in ('yes', 'no')}:
            assert asked.count((question, 'yes')) == asked.count((question, 'no')) > 0
    # The folder tells the answer; a stamp of a folder without a question is asked nothing.
    for record in records:
        if record['prompt'] == 'is this an animal?':
            assert record['answer'] == ('yes' if '/animals/' in record['image'] else 'no')
        assert record['prompt'] == 'what is this?' or '/space/' not in record['image']
    # The tasks are the test split.
    tested = lines_of(data / 'captions.jsonl')
    assert {record['image'] for record in tested} == images['test']
    assert [record['references'] for record in tested] == [
        record['references'] for record in lines_of(data / 'retrieval.jsonl')
    ]
    assert {record['image'] for record in lines_of(data / 'questions.jsonl')} <= images['test']
    # Transparent pixels are white, and the others are as they were.
    pixels = np.asarray(Image.open(data / 'pictures' / 'animals' / 'mammals' / 'badger.png'))
    assert pixels.shape == (9, 12, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [10, 10, 10]
    assert not read_folder(data).problems


def test_the_seed_decides_the_split(package, tmp_path, benchmark_script):
    files = []
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        benchmark_script('stamps.py', package, tmp_path / name, f'--seed={seed}')
        files.append((tmp_path / name / 'data.jsonl').read_bytes())
    assert files[0] == files[1] != files[2]


def test_what_cannot_be_read_is_one_line(package, tmp_path, benchmark_script):
    with pytest.raises(SystemExit, match=r'error: .*stamps: no such folder; unpack the package: dpkg-deb -x'):
        benchmark_script('stamps.py', tmp_path, tmp_path / 'data')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'mine.txt').write_text('')
    with pytest.raises(SystemExit, match=r'error: .*full: not empty; name another folder'):
        benchmark_script('stamps.py', package, tmp_path / 'full')
    root = tmp_path / 'usr' / 'share' / 'tuxpaint' / 'stamps'
    write_stamp(root, 'badger', 'A badger.', 10)
    with pytest.raises(SystemExit, match=r'error: .*stamps: 1 stamps with captions, too few for two splits'):
        benchmark_script('stamps.py', tmp_path, tmp_path / 'data')
    write_stamp(root, 'otter', 'A loutré.', 20, encoding='latin-1')
    with pytest.raises(SystemExit, match=r'error: .*otter\.txt: not UTF-8; unpack the package again'):
        benchmark_script('stamps.py', tmp_path, tmp_path / 'data')
    assert not (tmp_path / 'data').exists()


def test_the_tokenizer_knows_the_words_of_captions_and_spells_others(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    make_tokenizer = runpy.run_path(str(ROOT / 'benchmarks' / 'stamps_retrieval.py'))['make_tokenizer']
    captions = ['a badger', 'a red fig, and a pear']
    tokenizer = make_tokenizer(captions)
    assert tokenizer.tokenize('A badger, a fig') == ['a', 'badger', ',', 'a', 'fig']
    assert tokenizer.tokenize('bread') == ['b', '##r', '##e', '##a', '##d']
    assert tokenizer.convert_ids_to_tokens(tokenizer('a pear')['input_ids']) == ['[CLS]', 'a', 'pear', '[SEP]']
    # Ties are not broken at random, nor by the order of the captions.
    assert make_tokenizer(captions[::-1]).get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
def test_each_model_of_a_job_is_scored_on_captions_and_questions(package, tmp_path, benchmark_script):
    data = tmp_path / 'data'
    benchmark_script('stamps.py', package, data, '--test_share=0.4')
    save('blip2-t5', tmp_path / 'model')
    tasks = f'{data / "captions.jsonl"},{data / "questions.jsonl"}'
    fields = {'evaluate.tasks': tasks, 'prune.method': 'magnitude'}
    job = Job(small_config('blip2-t5', tmp_path / 'model', data, **fields), tmp_path / 'run')
    stages.run(job)
    scores = report.write(job)['tasks']
    captions, questions = scores.values()
    for model in ('dense', 'pruned', 'restored'):
        assert captions['scores'][model] >= 0
        assert 0 <= questions['scores'][model] <= 100
        results = json.loads((job.workdir / f'tasks_{model}' / 'results.json').read_text())['results']
        assert {'CIDEr', 'BLEU-4', 'ROUGE-L'} <= results[str(data / 'captions.jsonl')].keys()
        assert 'accuracy/question/is this an animal?' in results[str(data / 'questions.jsonl')]


@pytest.mark.slow
def test_a_retrieval_model_is_trained_pruned_restored_and_scored(package, tmp_path, benchmark_script, script):
    data = tmp_path / 'data'
    benchmark_script('stamps.py', package, data, '--test_share=0.4')
    models = tmp_path / 'models'
    benchmark_script('stamps_retrieval.py', data, models, '--steps=2', '--restore_steps=1', '--batch=4')
    for name in ('dense', 'pruned', 'restored'):
        _, params = sl.load_model(models / name, dtype='float32')
        share = np.mean(np.asarray(params['vision']['blocks']['mlp']['fc1']['kernel']) != 0)
        assert share == (1.0 if name == 'dense' else 0.5)
    code, out, err = script(
        'evaluate.py',
        f'--model={models / "restored"}',
        f'--tasks={data / "retrieval.jsonl"}',
        f'--output={tmp_path / "scores"}',
        '--batch=4',
    )
    assert code == 0, err
    assert 'text_R@1' in out
    (results,) = json.loads((tmp_path / 'scores' / 'results.json').read_text())['results'].values()
    # Six pictures: all are among the best ten.
    assert results['text_R@10'] == results['image_R@10'] == 100.0
