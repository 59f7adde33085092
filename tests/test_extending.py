"""The parts that docs/extending.md defines run through the main job, none of them known to the package."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_jobs import SMALL
from tiny_models import save

import sparselora_jax as sl
from configs import llava_both
from sparselora_jax import recipe
from sparselora_jax.jobs import report, stages
from sparselora_jax.jobs.job import Job
from sparselora_jax.sparse import rules

PAGE = Path(__file__).parents[1] / 'docs' / 'extending.md'
PARTS = {
    'prune.method': 'my_parts:SameNorm',
    'prune.allocation': 'my_parts:Ramp',
    'data': 'my_parts:PLAIN_COLOURS',
    'evaluate.metric': 'my_parts:FIRST_LETTER',
    'family': 'my_parts:UNIT_LLAVA',
}


@pytest.fixture(scope='module')
def my_parts(tmp_path_factory):
    """The page's module, importable under its name."""
    folder = tmp_path_factory.mktemp('parts')
    blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.S)
    (folder / 'my_parts.py').write_text('\n\n'.join(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module('my_parts')
        del sys.modules['my_parts']


@pytest.fixture(scope='module')
def job(my_parts, tmp_path_factory):
    """A finished run of the main job whose recipe names all five parts."""
    folder = tmp_path_factory.mktemp('llava')
    save('llava-default', folder)
    config = llava_both.get_config(f'model={folder},data=replaced,pattern=0.5,hardware=cpu')
    config.update_from_flattened_dict(SMALL | {'text.prompt': 'USER: <image>\n{} ASSISTANT:'} | PARTS)
    job = Job(config, tmp_path_factory.mktemp('run'))
    stages.run(job)
    report.write(job)
    return job


STEEP = """
from configs import llava_lang_only


def get_config(arg=None):
    config = llava_lang_only.get_config(arg)
    config.prune.allocation = 'my_parts:Ramp'
    config.prune.steepness = 0.3
    return config
"""


@pytest.fixture
def asked(script, monkeypatch):
    """`asked(*arguments)`: the recipe that a command line of `train.py` asks for, or the error."""

    def run(*arguments):
        configs = []

        def stop(self, config, workdir):
            configs.append(config)
            raise recipe.ConfigError('the recipe is known')

        monkeypatch.setattr(Job, '__init__', stop)
        code, _, err = script('train.py', *arguments)
        assert code == 1
        return configs[0] if configs else err

    return run


@pytest.mark.parametrize('way', ['command line', 'recipe', 'recipe and command line', 'config.json'])
def test_an_option_of_an_allocation_is_a_field(my_parts, asked, tmp_path, way):
    setting = '--config.prune.steepness=0.3'
    file = tmp_path / 'steep.py'
    file.write_text(STEEP if way == 'recipe' else STEEP.replace('0.3', '0.1'))
    if way == 'command line':
        name = '--config.prune.allocation=my_parts:Ramp'
        config = asked('--config=configs/llava_lang_only.py:pattern=0.5', name, setting)
    elif way == 'recipe and command line':
        config = asked(f'--config={file}:pattern=0.5', setting)
    else:
        config = asked(f'--config={file}:pattern=0.5')
    if way == 'config.json':
        stored = tmp_path / 'config.json'
        stored.write_text(config.to_json())
        config = asked(f'--config={stored}', setting)
    recipe.check_values(config)
    assert recipe.allocation_of(config) == my_parts.Ramp(steepness=0.3)


@pytest.mark.parametrize(
    ('argument', 'said'),
    [
        ('--config.prune.steepnes=0.3', "no field 'prune.steepnes'; did you mean 'prune.steepness'"),
        ('--config.prune.seed=3', "config has no field 'prune.seed'"),
    ],
)
def test_an_option_that_does_not_exist_is_named(my_parts, asked, argument, said):
    name = '--config.prune.allocation=my_parts:Ramp'
    assert said in asked('--config=configs/llava_lang_only.py', name, argument)


def test_the_page_sets_the_option_as_these_tests_do():
    page = PAGE.read_text()
    assert '--config.prune.allocation=my_parts:Ramp --config.prune.steepness=0.3' in page
    assert STEEP.partition('def get_config')[2].strip() in page


def read(job, name):
    return json.loads((job.workdir / f'{name}.json').read_text())


@pytest.mark.slow
def test_the_family_reads_the_model_and_the_loader_the_data(job, my_parts):
    assert job.model.family is my_parts.UNIT_LLAVA
    assert set(read(job, 'evaluate_dense')['true']) <= set(my_parts.COLOURS)


@pytest.mark.slow
def test_edits_of_kept_weights_reach_the_pruned_model(job):
    dense = rules.flatten(job.params)
    pruned = rules.flatten(job.pruned())
    masks = rules.flatten(job.masks)
    assert masks
    for path, mask in masks.items():
        mask = np.asarray(mask)
        kernel = np.asarray(pruned[path])
        assert not kernel[~mask].any()
        norms = np.linalg.norm(np.asarray(dense[path]), axis=-2)
        is_pruned_whole = ~mask.any(axis=-2)
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=-2), np.where(is_pruned_whole, 0, norms), rtol=1e-4)


@pytest.mark.slow
def test_late_layers_are_sparser_and_the_sum_is_that_of_uniform_pruning(job):
    for mask in rules.flatten(job.masks).values():
        kept = np.asarray(mask).mean(axis=(1, 2))
        assert len(kept) == 1 or kept[0] > kept[-1]
        np.testing.assert_allclose(kept.mean(), 0.5, atol=1 / mask[0].size)  # of a whole number of zeros
    masks = rules.flatten(job.masks).values()
    assert 2 * sum(int(np.sum(mask)) for mask in masks) == sum(mask.size for mask in masks)


@pytest.mark.slow
def test_the_export_is_sparse_and_read_by_the_same_family(job, my_parts):
    model, params = sl.load_model(job.workdir / 'exported', family=PARTS['family'])
    assert model.family is my_parts.UNIT_LLAVA
    sl.check_sparse(params, job.masks)


@pytest.mark.slow
def test_the_report_shows_the_metric(job):
    assert read(job, 'report')['metric'] == 'first letter right'
    assert 'First letter right' in (job.workdir / 'report.html').read_text()
