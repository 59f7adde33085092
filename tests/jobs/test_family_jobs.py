"""The main job on a tiny directory of every family, by every pruner; what it exports, torch reads back."""

import functools
import itertools
import os
import shutil

import pytest
from tiny_jobs import RECIPES, check_torch_agrees, small_config
from tiny_models import save, save_data

import sparselora_jax as sl
from sparselora_jax.checkpoints import export as hf_export
from sparselora_jax.checkpoints import trees
from sparselora_jax.jobs import report, stages
from sparselora_jax.jobs.export import export_pruned
from sparselora_jax.jobs.job import Job
from sparselora_jax.recipe import ConfigError
from sparselora_jax.sparse import rules

METHODS = ('random', 'magnitude', 'wanda', 'sparsegpt', 'admm', 'dsnot')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder of images with questions."""
    folder = tmp_path_factory.mktemp('images')
    save_data(folder, 12)
    return folder


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    """`directory(kind)`: that of a tiny model, made once."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        save(kind, folder)
        return folder

    return make


@pytest.mark.slow  # in `make test` tests/jobs/test_job.py has the embedded model's
@pytest.mark.parametrize(('kind', 'method'), list(itertools.product(RECIPES, METHODS)))
def test_the_main_job_ends_with_a_sparse_directory_that_torch_reads(directory, data, tmp_path, kind, method):
    folder = directory(kind)
    job = Job(small_config(kind, folder, data, **{'prune.method': method}), tmp_path / 'run')
    stages.run(job)
    got = report.build(job)
    for tower, found in got['sparsity'].items():
        density = 1.0 if tower == 'qformer' else 0.5
        assert (found['density'], found['violations']) == (density, 0), tower

    exported = tmp_path / 'run' / 'exported'
    model, params = sl.load_model(exported)
    masks, _ = trees.load_safetensors(tmp_path / 'run' / 'masks.safetensors')
    sl.check_sparse(params, masks)
    assert set(rules.kernels(params)) > set(rules.flatten(masks))
    assert {path.split('/')[0] for path in rules.flatten(masks)} == {'vision', 'language'}
    check_torch_agrees(exported, folder, model, params, job.text)


@pytest.mark.slow
# A decoder alone, and an encoder-decoder.
@pytest.mark.parametrize('kind', ['blip2-opt', pytest.param('instructblip-t5', marks=pytest.mark.slow)])
def test_pruning_from_disk_equals_pruning_in_memory(directory, data, tmp_path, kind):
    folder = directory(kind)
    jobs = [
        Job(small_config(kind, folder, data, **{'prune.method': 'sparsegpt', 'stream': stream}), tmp_path / str(stream))
        for stream in (False, True)
    ]
    for job in jobs:
        stages.prune(job)
        export_pruned(job)
    for name in ('masks.safetensors', 'kernels.safetensors', 'pruned/model.safetensors'):
        assert (jobs[0].workdir / name).read_bytes() == (jobs[1].workdir / name).read_bytes()
    model, params = sl.load_model(jobs[1].workdir / 'pruned')
    merged = sl.merge(jobs[0].frozen.params, jobs[0].frozen.masks)
    hf_export.check_export(jobs[1].workdir / 'pruned', model, merged)
    sl.check_sparse(params, jobs[0].frozen.masks)


@pytest.mark.slow
def test_pruning_from_disk_on_a_mesh_is_pruning_in_memory_on_one_device(directory, data, tmp_path):
    fields = {'prune.method': 'sparsegpt', 'prune.samples': 8, 'restore.batch': 4, 'restore.base': 'nf4'}
    jobs = [
        Job(small_config('blip2-opt', directory('blip2-opt'), data, **fields, **more), tmp_path / str(len(more)))
        for more in ({}, {'stream': True, 'mesh.data': 4})
    ]
    for job in jobs:
        stages.prune(job)
        stages.round_base(job)
    for name in ('masks.safetensors', 'kernels.safetensors', 'rounded.safetensors'):
        assert (jobs[0].workdir / name).read_bytes() == (jobs[1].workdir / name).read_bytes()


@pytest.mark.slow
def test_a_directory_whose_files_change_is_refused_on_resume(directory, data, tmp_path):
    folder = shutil.copytree(directory('blip2-opt'), tmp_path / 'model')

    def job():
        return Job(small_config('blip2-opt', folder, data, **{'prune.method': 'magnitude'}), tmp_path / 'run')

    stages.prune(job())
    (folder / 'README.md').write_text('A note changes nothing.')
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))  # as after a copy
    job().check()
    weights = bytearray((folder / 'model.safetensors').read_bytes())
    weights[-9] ^= 1
    settings = (folder / 'generation_config.json').read_bytes()
    for name, content, told in (
        ('model.safetensors', bytes(weights), 'model.safetensors has changed'),
        (
            'generation_config.json',
            settings.replace(b'{', b'{"min_length": 3,', 1),
            'generation_config.json has changed',
        ),
        ('chat_template.jinja', b'{{ text }}', 'chat_template.jinja is new'),
    ):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf'run: the files of .*model are not those .* \({told}\); use another'):
            job().check()
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)
    job().check()
