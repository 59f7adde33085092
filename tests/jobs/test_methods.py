"""A pruning method that edits kept weights, defined here, keeps its edits through the main job."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_jobs import RECIPES, SMALL
from tiny_models import save, save_data

import sparselora_jax as sl
from sparselora_jax.checkpoints import trees
from sparselora_jax.jobs import stages
from sparselora_jax.jobs.export import export_pruned
from sparselora_jax.jobs.job import Job
from sparselora_jax.pruning import MethodError
from sparselora_jax.sparse import rules


@dataclass(frozen=True)
class Doubling(sl.Wanda):
    """Wanda's mask, and twice the kept weights: exact in every dtype."""

    edits_kept_weights: ClassVar[bool] = True
    outputs_are_independent: ClassVar[bool] = True

    def __call__(self, kernel, statistic, pattern, num_zeros=None):
        pruned, mask = super().__call__(kernel, statistic, pattern, num_zeros)
        return 2 * pruned, mask


@dataclass(frozen=True)
class Rounding(sl.Wanda):
    """Expects kernels that are pruned already."""

    chooses_mask: ClassVar[bool] = False


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A directory of a tiny BLIP-2 and a folder of questions."""
    model, data = tmp_path_factory.mktemp('model'), tmp_path_factory.mktemp('images')
    save('blip2-opt', model)
    save_data(data, 12)
    return model, data


@pytest.fixture
def pruned(folders, tmp_path):
    """`pruned(**fields)`: the job after pruning, and the kernels of which it then holds twice the kept weights."""

    def run(**fields):
        model, data = folders
        recipe, prompt = RECIPES['blip2-opt']
        config = recipe.get_config(f'model={model},data={data},pattern=2:4,hardware=cpu')
        config.update_from_flattened_dict(
            SMALL | {'text.prompt': prompt, 'prune.method': 'test_methods:Doubling'} | fields
        )
        job = Job(config, tmp_path / 'run')
        stages.prune(job)
        return job, rules.flatten(sl.load_model(model)[1])

    return run


def check_doubled(params, dense, masks):
    """Checks that `params` hold twice the dense weights where a mask is True, zeros where it is False."""
    assert masks
    params = rules.flatten(params)
    for path, mask in masks.items():
        assert not np.asarray(mask).all()
        np.testing.assert_array_equal(params[path], np.where(mask, 2 * np.asarray(dense[path]), 0), err_msg=path)


def masks_of(job):
    return rules.flatten(trees.load_safetensors(job.workdir / 'masks.safetensors')[0])


@pytest.mark.slow
def test_edits_are_kept_in_memory_and_in_the_export(pruned):
    job, dense = pruned()
    masks = masks_of(job)
    check_doubled(job.frozen.params, dense, masks)
    check_doubled(job.pruned(), dense, masks)
    stages.restore(job, 'restore', lambda: job.base)
    stages.export(job)
    twice = dense | {path: jnp.where(mask, 2 * dense[path], 0) for path, mask in masks.items()}
    want = sl.merge(rules.unflatten(twice), job.masks, job.trained('restore'))
    _, exported = sl.load_model(job.workdir / 'exported')
    jax.tree.map(np.testing.assert_array_equal, exported, want)


def test_a_method_that_chooses_no_mask_is_refused_before_any_work(pruned, tmp_path):
    with pytest.raises(MethodError, match='Rounding says chooses_mask = False, so it cannot prune; name another'):
        pruned(**{'prune.method': 'test_methods:Rounding'})
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_edits_are_kept_from_disk(pruned):
    job, dense = pruned(stream=True)
    export_pruned(job)
    check_doubled(sl.load_model(job.workdir / 'pruned')[1], dense, masks_of(job))


@pytest.mark.slow
def test_edits_are_kept_on_a_mesh(pruned):
    job, dense = pruned(**{'mesh.data': 2, 'mesh.tensor': 2})
    check_doubled(job.pruned(), dense, masks_of(job))


@pytest.mark.slow
@pytest.mark.parametrize('stream', [True, False])
def test_kernels_that_reconstruction_trains_are_stored_and_exported(pruned, stream):
    job, dense = pruned(
        **{'prune.method': 'wanda', 'stream': stream},
        **{'prune.reconstruct.passes': 2, 'prune.reconstruct.batch': 2, 'prune.reconstruct.rate': 1e-2},
    )
    masks = masks_of(job)
    kernels = rules.flatten(trees.load_safetensors(job.workdir / 'kernels.safetensors')[0])
    assert kernels.keys() == masks.keys()
    for path, mask in masks.items():
        assert not kernels[path][~mask].any(), path
    assert any((kernels[path] != dense[path])[mask].any() for path, mask in masks.items())
    export_pruned(job)
    exported = rules.flatten(sl.load_model(job.workdir / 'pruned')[1])
    for path, kernel in kernels.items():
        np.testing.assert_array_equal(exported[path], kernel)
