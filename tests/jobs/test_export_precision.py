"""The main job in bfloat16 on a directory in another dtype: what nothing touched stays as it is."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_jobs import RECIPES, SMALL
from tiny_models import save, save_data

import sparselora_jax as sl
from sparselora_jax.checkpoints import layout, trees
from sparselora_jax.jobs import stages
from sparselora_jax.jobs.export import export_pruned
from sparselora_jax.jobs.job import Job
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.dense import dense_kernel

KIND = 'blip2-opt'


def make_job(folder, data, workdir, **fields):
    recipe, prompt = RECIPES[KIND]
    config = recipe.get_config(f'model={folder},data={data},pattern=2:4,hardware=gpu')
    config.update_from_flattened_dict(SMALL | {'text.prompt': prompt} | fields)
    return Job(config, workdir)


pytestmark = pytest.mark.slow  # in `make test` tests/checkpoints/test_source_precision.py has the export alone


@pytest.fixture(params=[torch.float16, torch.float32], ids=['float16', 'float32'])
def directories(request, tmp_path):
    """(the model's directory, the data's)."""
    model, data = tmp_path / 'model', tmp_path / 'data'
    data.mkdir()
    save(KIND, model).to(request.param).save_pretrained(model)
    save_data(data, 12)
    return model, data


@pytest.mark.parametrize(
    ('stream', 'method'),
    [(True, 'magnitude'), (False, 'magnitude'), (True, 'sparsegpt')],
)
def test_an_export_changes_pruned_and_adapted_kernels_alone(directories, stream, method, tmp_path):
    folder, data = directories
    job = make_job(folder, data, tmp_path / 'run', **{'stream': stream, 'prune.method': method})
    assert job.dtype == 'bfloat16'
    stages.prune(job)
    masks = rules.flatten(trees.load_safetensors(job.workdir / 'masks.safetensors')[0])
    adapted = {path: kernel for path, kernel in rules.flatten(job.params).items() if path in masks}
    rng = np.random.default_rng(0)
    lora = {
        path: sl.Lora(
            rng.normal(0, 0.1, (*kernel.shape[:-1], 2)).astype(np.float32),
            rng.normal(0, 0.1, (kernel.shape[0], 2, kernel.shape[2])).astype(np.float32),
            1.0,
        )
        for path, kernel in adapted.items()
        if 'language' in path
    }
    assert lora.keys() < masks.keys()
    trees.save_safetensors(job.workdir / 'restore.safetensors', rules.unflatten(lora))
    stages.export(job)
    export_pruned(job)

    source = load_file(folder / 'model.safetensors')
    exported = load_file(job.workdir / 'exported' / 'model.safetensors')
    pruned = load_file(job.workdir / 'pruned' / 'model.safetensors')
    kernels_file = job.workdir / 'kernels.safetensors'
    edited = rules.flatten(trees.load_safetensors(kernels_file)[0]) if kernels_file.exists() else {}
    touched = set()
    for name, places in layout.places(job.model.family, job.model.cfg).items():
        if not any(place.path in masks for place in places):
            continue
        touched.add(name)
        for place in places:
            want = np.split(source[name], place.of)[place.index].T
            if place.path in edited:
                want = np.asarray(edited[place.path][place.layer]).astype(source[name].dtype)
            mask = np.asarray(masks[place.path][place.layer])
            want = np.where(mask, want, np.zeros((), want.dtype))
            np.testing.assert_array_equal(np.split(pruned[name], place.of)[place.index].T, want)
            got = np.split(exported[name], place.of)[place.index].T
            np.testing.assert_array_equal(got != 0, want != 0)
            if place.path not in lora:
                np.testing.assert_array_equal(got, want)
                continue
            factors = lora[place.path]
            update = np.where(mask, factors.a[place.layer].astype(np.float64) @ factors.b[place.layer], 0)
            rounding = 2.0**-10 if want.dtype == np.float16 else 2.0**-20
            np.testing.assert_allclose(got, want + update, rtol=rounding, atol=1e-6)
    assert touched
    for name in source.keys() - touched:
        assert source[name].tobytes() == exported[name].tobytes(), name
        assert source[name].tobytes() == pruned[name].tobytes(), name


@pytest.mark.parametrize('base', ['packed_int4', 'nf4'])
def test_a_kernel_trained_on_a_rounded_base_is_merged_in_float32(directories, base, tmp_path):
    folder, data = directories
    job = make_job(folder, data, tmp_path / 'run', **{'restore.base': base, 'prune.method': 'magnitude'})
    stages.prune(job)
    stages.round_base(job)
    language = {path for path in rules.flatten(job.masks) if path.startswith('language')}
    base_params = rules.flatten(job.base.params)
    kernels = {path: np.asarray(dense_kernel(base_params[path], np.float32)) for path in language}
    rng = np.random.default_rng(0)
    factors = {
        path: (
            rng.normal(0, 0.1, (*kernel.shape[:-1], 2)).astype(np.float32),
            rng.normal(0, 0.1, (kernel.shape[0], 2, kernel.shape[2])).astype(np.float32),
        )
        for path, kernel in kernels.items()
    }
    lora = {path: sl.Lora(a, b, 1.0) for path, (a, b) in factors.items()}
    trees.save_safetensors(job.workdir / 'restore.safetensors', rules.unflatten(lora))
    stages.export(job)

    exported = load_file(job.workdir / 'exported' / 'model.safetensors')
    masks = rules.flatten(job.masks)
    checked = set()
    for name, places in layout.places(job.model.family, job.model.cfg).items():
        for place in places:
            if place.path not in factors:
                continue
            got = np.split(exported[name], place.of)[place.index].T
            a, b = factors[place.path]
            exact = (
                kernels[place.path][place.layer].astype(np.float64) + a[place.layer].astype(np.float64) @ b[place.layer]
            )
            want = np.where(masks[place.path][place.layer], exact, 0)
            # bfloat16, the compute dtype, would be off by up to 2**-9.
            rounding = 2.0**-10 if got.dtype == np.float16 else 2.0**-20
            np.testing.assert_allclose(got, want, rtol=rounding, atol=1e-6)
            checked.add(place.path)
    assert checked == language
