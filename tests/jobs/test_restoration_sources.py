"""Each layout of data through pruning and restoration of a tiny model: to calibrate on, and to train on."""

import jax
import numpy as np
import pytest
from miniature_sources import LAYOUTS, tar_shards, text_folder
from tiny_jobs import small_config
from tiny_models import save, save_data

from sparselora_jax.jobs import stages
from sparselora_jax.jobs.job import Job
from sparselora_jax.recipe import ConfigError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A tiny directory of BLIP-2, and a folder of questions."""
    root = tmp_path_factory.mktemp('world')
    (root / 'model').mkdir()
    save('blip2-opt', root / 'model')
    (root / 'questions').mkdir()
    save_data(root / 'questions', 12)
    return root


def make_job(folder, workdir, data, **fields):
    texts = {'text.prompt': '{}', 'text.prompt_tokens': 64, 'text.answer_tokens': 50, 'evaluate.max_new_tokens': 49}
    fields = texts | {'data_dir': str(workdir.parent / 'prepared')} | fields
    # Several sources cannot be named in the argument of a recipe, which commas divide.
    config = small_config('blip2-opt', folder / 'model', 'replaced', **fields)
    config.data = data
    return Job(config, workdir)


@pytest.mark.slow
@pytest.mark.parametrize('layout', LAYOUTS)
def test_each_layout_calibrates_and_restores(layout, folder, tmp_path):
    name, expected = LAYOUTS[layout](tmp_path / 'data')
    # Few records have no test image among them, so the questions of another source are added.
    data = f'{name},{folder / "questions"}'
    fields = {'prune.data': name, 'prune.order': 'first', 'prune.samples': 2}
    fields |= {'mixture.augment': True, 'mixture.clean': False}
    job = make_job(folder, tmp_path / 'run', data, **fields)
    stages.prune(job)
    restored = stages.restore(job, 'restore', lambda: job.base)
    assert restored['step_s'] > 0
    calibrated = job.calibration.read_texts()
    for (question, answer), want in zip(calibrated, expected, strict=False):
        if want.question is None:
            assert question + answer == want.answer
        else:
            assert (question, answer) == (want.question, want.answer)
    assert len(calibrated) == 2
    losses = [value for _, value in job.log.curve('restore', 'loss')]
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_a_run_is_the_same_after_a_restart_and_refuses_other_samples(folder, tmp_path):
    name, _ = tar_shards(tmp_path / 'data', (20, 20))
    data = f'{name},{folder / "questions"}'
    fields = {'prune.data': name, 'mixture.samples': 10, 'mixture.weights': (1, 1), 'restore.checkpoint_every': 1}
    whole = make_job(folder, tmp_path / 'whole', data, **fields)
    stages.prune(whole)
    stages.restore(whole, 'restore', lambda: whole.base)

    parted = make_job(folder, tmp_path / 'parted', data, **fields)
    stages.prune(parted)

    class StopError(Exception):
        pass

    scalars = parted.log.scalars

    def stop(name, index, values):
        scalars(name, index, values)
        raise StopError

    parted.log.scalars = stop
    with pytest.raises(StopError):
        stages.restore(parted, 'restore', lambda: parted.base)
    again = make_job(folder, tmp_path / 'parted', data, **fields)
    stages.restore(again, 'restore', lambda: again.base)
    jax.tree.map(np.testing.assert_array_equal, whole.trained('restore'), again.trained('restore'))

    # The records of calibration belong to the inputs of a run.
    tar_shards(tmp_path / 'data', (21, 20))
    with pytest.raises(ConfigError, match='are not those that this run began with'):
        make_job(folder, tmp_path / 'parted', data, **fields).check()


@pytest.mark.slow
def test_a_text_calibrates_a_language_tower(folder, tmp_path):
    name, _ = text_folder(tmp_path / 'data')
    fields = {'prune.data': name, 'prune.samples': 2, 'prune.pattern.vision': 'dense'}
    job = make_job(folder, tmp_path / 'run', str(folder / 'questions'), **fields)
    tokens = stages.prune(job)['tokens']
    # Only the tokens of the two texts count, and not the positions of images.
    words = int(np.sum(job.calibration_batches(2)[0]['attention_mask']))
    assert {count for path, count in tokens.items() if path.startswith('language')} == {words}
