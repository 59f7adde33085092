"""A run refuses to go on with another model or other records, and names what has changed."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from test_job import tiny_config

from sparselora_jax.checkpoints import embedded
from sparselora_jax.data import folder as folders
from sparselora_jax.jobs import inputs, stages
from sparselora_jax.jobs.job import Job
from sparselora_jax.recipe import ConfigError
from sparselora_jax.runtime.files import StorageError


def write_data(path, lines):
    path.mkdir(exist_ok=True)
    for name in {image for image, *_ in lines}:
        Image.fromarray(np.full((8, 8, 3), len(name), np.uint8)).save(path / name)
    records = [dict(zip(('image', 'prompt', 'answer', 'split'), line, strict=True)) for line in lines]
    (path / 'data.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


LINES = [(f'{index}.png', f'what is {index}?', 'a cat', 'train') for index in range(4)] + [('t.png', 'q', 'a', 'test')]


@pytest.fixture
def split_of(tmp_path):
    def read(lines):
        return folders.load(write_data(tmp_path / 'data', lines)).train

    return read


def changed(lines, index, **fields):
    names = ('image', 'prompt', 'answer', 'split')
    line = dict(zip(names, lines[index], strict=True)) | fields
    return [*lines[:index], tuple(line.values()), *lines[index + 1 :]]


@pytest.mark.parametrize(
    ('lines', 'told'),
    [
        (changed(LINES, 2, answer='a dog'), '1 changed; .*/data.jsonl, line 3: its answer'),
        (changed(LINES, 0, image='t.png', prompt='why?'), '1 changed; .*, line 1: its question and image'),
        (LINES[:1] + LINES[2:], '3 instead of 4; one is gone after .*, line 1'),
        (LINES[1:], '3 instead of 4; one is gone before .*, line 1'),
        (LINES[:3] + LINES[4:], '3 instead of 4; one is gone after .*, line 3'),
        (
            [LINES[0], ('9.png', 'q', 'a', 'train'), *LINES[2:]],
            '1 changed; .*, line 2: its question and answer and image',
        ),
        ([*LINES, ('9.png', 'new', 'a', 'train')], '5 instead of 4; .*, line 6 is new'),
        ([LINES[0], LINES[2], LINES[1], *LINES[3:]], 'their order has changed, first at .*, line 2'),
    ],
)
def test_the_first_record_that_changed_is_named(split_of, lines, told):
    old = inputs.digest_records(split_of(LINES))
    split = split_of(lines)
    new = inputs.digest_records(split)
    assert new.sha256 != old.sha256
    described = inputs.describe_change(old.rows(), new.rows(), split.name_record)
    assert re.fullmatch(f'.*(?:{told}).*', described), described


def test_an_image_that_was_replaced_is_a_change(split_of, tmp_path):
    old = inputs.digest_records(split_of(LINES))
    split = split_of(LINES)
    assert inputs.digest_records(split) == old
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8)).save(tmp_path / 'data' / '1.png')
    new = inputs.digest_records(split)
    assert inputs.describe_change(old.rows(), new.rows(), split.name_record).endswith('line 2: its image')


def test_an_image_that_was_replaced_by_one_of_the_same_size_is_a_change(split_of, tmp_path):
    image = tmp_path / 'data' / '1.bmp'
    lines = changed(LINES, 1, image='1.bmp')
    old = inputs.digest_records(split_of(lines))
    split = split_of(lines)
    status = image.stat()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert image.stat().st_size == status.st_size
    new = inputs.digest_records(split)
    assert inputs.describe_change(old.rows(), new.rows(), split.name_record).endswith('line 2: its image')


@pytest.fixture
def job_on(tiny_blip2, tmp_path, monkeypatch):
    """`job_on(lines)`: a job on a folder with these lines and a model whose files are in `model/`."""
    monkeypatch.setattr(embedded, 'load', lambda **options: tiny_blip2)
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'weights').write_bytes(bytes(100))
    monkeypatch.setattr(embedded, 'files', lambda: sorted((tmp_path / 'model').iterdir()))

    def build(lines=LINES, **fields):
        data = str(write_data(tmp_path / 'data', lines))
        small = {'restore.shares': (), 'prune.method': 'magnitude', 'prune.samples': 4}
        return Job(tiny_config(data=data, **small, **fields), tmp_path / 'run')

    return build


@pytest.mark.slow
def test_a_resumed_run_refuses_other_records_and_other_weights_before_any_work(job_on, tmp_path):
    stages.prune(job_on())
    job_on().check()
    before = {file: file.read_bytes() for file in (tmp_path / 'run').iterdir()}
    with pytest.raises(ConfigError, match=r'run: the training records of .*data are not those .* \(3 instead of 4; '):
        stages.restore(job_on(LINES[1:]), 'restore', lambda: pytest.fail('work began'))
    with pytest.raises(ConfigError, match=r'the test questions of .* line 5: its answer\); use another workdir'):
        job_on(changed(LINES, 4, answer='b')).check()
    (tmp_path / 'model' / 'weights').write_bytes(bytes(99) + b'x')
    with pytest.raises(ConfigError, match=r'the files of embedded are not those .* \(weights has changed\); use'):
        job_on().check()
    (tmp_path / 'model' / 'weights').write_bytes(bytes(100))  # put back: another time, the same content
    job_on().check()
    (tmp_path / 'model' / 'adapter.json').write_text('{}')
    with pytest.raises(ConfigError, match=r'adapter.json is new'):
        job_on().check()
    assert {file: file.read_bytes() for file in (tmp_path / 'run').iterdir()} == before


def flip(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
def test_damaged_files_of_a_stage_are_named_with_the_remedy(job_on, tmp_path):
    job = job_on()
    stages.prune(job)
    run = tmp_path / 'run'
    backup = shutil.copytree(run, tmp_path / 'backup')
    flip(run / 'masks.safetensors')
    for use in (stages.prune, lambda job: job.masks, Job.pruned_on_disk, lambda job: job.frozen):
        with pytest.raises(
            StorageError, match=r'masks.safetensors is damaged.*; put back a copy; or delete prune.json'
        ):
            use(job_on())
    shutil.copy2(backup / 'masks.safetensors', run)
    assert stages.prune(job_on()).keys() == {'tokens', 'seconds', 'peak_memory_bytes'}
    (run / 'masks.safetensors').unlink()
    with pytest.raises(StorageError, match=r'masks.safetensors is missing'):
        stages.prune(job_on())
    shutil.copy2(backup / 'masks.safetensors', run)
    for damaged in ('{', '[]', '{"tokens": {}}', ''):
        (run / 'prune.json').write_text(damaged)
        with pytest.raises(StorageError, match=r'prune.json: .*delete prune.json, to run the stage again'):
            stages.prune(job_on())
    (run / 'prune.json').unlink()
    stages.prune(job_on())  # the remedy helps
    assert (run / 'masks.safetensors').read_bytes() == (backup / 'masks.safetensors').read_bytes()
    for name in ('inputs.json', 'config.json'):
        (run / 'prune.json').unlink(missing_ok=True)
        (run / name).write_text('{"model": ')
        with pytest.raises(StorageError, match=rf'{name}: not JSON .*; put back a copy, or use another workdir'):
            stages.prune(job_on())
        shutil.copy2(backup / name, run)


def test_records_that_repeat_within_a_batch_are_said_once_with_both_numbers(job_on, capsys):
    job = job_on()
    for _ in range(2):
        job.batches(64, 0)
        job.batches(3, 0)
    assert capsys.readouterr().out == '64 training samples are drawn from 4 records: records repeat\n'
