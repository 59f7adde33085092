"""What a run takes is compared with what the machine has before the first stage; a dry run writes nothing."""

import fcntl
import os
from pathlib import Path

import pytest

from configs import blip2_lang_only, llava_both
from configs.base import base_config
from sparselora_jax.checkpoints import embedded
from sparselora_jax.evaluation import decode
from sparselora_jax.jobs import resources
from sparselora_jax.jobs.job import Job
from sparselora_jax.models.causal import CausalConfig
from sparselora_jax.models.llama import LlamaConfig
from sparselora_jax.models.model import abstract_model, abstract_params
from sparselora_jax.planning import memory
from sparselora_jax.planning.tracing import batch_of, nbytes
from sparselora_jax.recipe import ConfigError, check_family, check_ranks, override
from sparselora_jax.runtime import files, machine


@pytest.fixture
def job(tiny_blip2, easy_vqa_builder, tmp_path, monkeypatch):
    """`job(**fields)`: a run of the tiny model that has not begun."""
    monkeypatch.setattr(embedded, 'load', lambda *args, **kw: tiny_blip2)

    def make(**fields):
        config = blip2_lang_only.get_config()
        override(config, {name.replace('__', '.'): value for name, value in fields.items()})
        config.data_dir = str(easy_vqa_builder.data_path.parents[1])
        return Job(config, tmp_path / 'run')

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        (
            {'evaluate__num_beams': 100_000},
            'evaluate: takes at least .* GiB of memory, .*; lower evaluate.batch, evalua',
        ),
        ({'evaluate__max_new_tokens': 10**9}, 'evaluate: takes at least .*; lower evaluate.batch'),
        ({'prune__samples': 10**8}, 'prune: takes at least .*; lower prune.samples'),
        ({'restore__batch': 10**8}, 'restore: takes at least .*; lower restore.batch'),
        ({'text__prompt_tokens': 10**8}, '(prune|restore|evaluate): takes at least'),
        (
            {
                'prune__allocation': 'ecoflap_first',
                'prune__pattern__language': '0.5',
                'prune__score_samples': 10**8,
            },
            'prune.score_samples 100000000: expected at most the training records, 38575',
        ),
    ],
)
def test_a_run_that_cannot_fit_is_refused_with_both_numbers_before_it_begins(job, fields, said):
    run = job(**fields)
    with pytest.raises(ConfigError, match=said):
        resources.check_job(run)
    assert not run.workdir.exists()


@pytest.mark.slow
def test_a_disk_without_room_is_refused_with_both_numbers(job, monkeypatch):
    monkeypatch.setattr(machine, 'free_disk', lambda folder: 1000)
    with pytest.raises(ConfigError, match=r'run: the run writes about .* GiB .* free; make room'):
        resources.check_job(job())


@pytest.mark.slow
def test_a_run_that_fits_is_described_and_writes_nothing(job):
    run = job()
    taken = resources.check_job(run)
    text = resources.describe(run, taken)
    assert 'prune: language by wanda, 128 samples' in text
    assert 'restore: LoRA in language, qformer, vision, 100 steps of 8' in text
    assert 'easy_vqa, 38,575 training and 9,673 test records' in text
    assert not run.workdir.exists()


@pytest.mark.slow
def test_pruning_alone_needs_no_memory_for_training(job):
    run = job(restore__batch=10**8)
    taken = resources.check_job(run, resources.PRUNING_ALONE)
    assert taken.memory.keys() == {'prune'}
    assert 'restore' not in resources.describe(run, taken)


def test_the_caches_are_counted_by_beams_and_new_tokens(tiny_blip2):
    cfg = tiny_blip2[0].cfg
    config = blip2_lang_only.get_config()
    batch = batch_of(cfg, config.text, 3)
    caches = decode.cache_shapes(abstract_model(cfg), abstract_params(cfg), batch, slots=20)
    prompt = batch['input_ids'].shape[1]
    # Two layers of keys and values: 3 rows, 2 heads, and 4 float32 numbers for each token; and an index of int32.
    assert nbytes(caches) == 2 * (2 * 3 * 2 * (prompt + 20) * 4 * 4 + 4)
    config.evaluate.update({'num_beams': 4, 'max_new_tokens': 5, 'batch': 3})
    terms = memory.evaluate(memory.recipe(cfg, config)).moments['choosing the next tokens']
    assert terms['keys and values'] == nbytes(caches)


def test_a_recipe_of_another_family_names_the_family_and_its_recipe(tiny_blip2):
    cfg = tiny_blip2[0].cfg
    check_family(blip2_lang_only.get_config(), cfg)
    other = llava_both.get_config()
    with pytest.raises(
        ConfigError, match=r'of the family blip2, not llava: use a recipe .* configs/blip2_lang_only\.py'
    ):
        check_family(other, cfg)
    other.family = ''  # a recipe that names no family may still name other towers
    said = (
        'a blip2 model, with the towers vision, qformer, language; this recipe is for language, vision: use .*/blip2_l'
    )
    with pytest.raises(ConfigError, match=said):
        check_family(other, cfg)


def test_a_language_model_alone_is_told_that_it_has_no_recipe():
    language = abstract_model(CausalConfig(LlamaConfig(64, 16, 2, 2, 2, 32))).cfg
    with pytest.raises(ConfigError, match=r'a causal model, .* use a recipe of the same family, and .* have none$'):
        check_family(base_config(), language)


def test_a_rank_above_that_of_every_kernel_is_named(tiny_blip2):
    params = abstract_params(tiny_blip2[0].cfg)
    config = blip2_lang_only.get_config()
    config.lora.rank.language = 16
    check_ranks(config, params)
    config.lora.rank.language = 17
    with pytest.raises(ConfigError, match=r'lora.rank.language 17: expected at most 16'):
        check_ranks(config, params)


@pytest.mark.parametrize('kind', ['file', 'below a file', 'loop', 'dangling', 'read-only'])
def test_a_workdir_that_cannot_be_made_is_named(job, tmp_path, kind, monkeypatch):
    run = job()
    blocking = tmp_path / 'blocking'
    run.workdir = blocking / 'run'
    if kind == 'file':
        blocking.write_text('')
        run.workdir = blocking
    elif kind == 'below a file':
        blocking.write_text('')
    elif kind == 'loop':
        blocking.symlink_to(blocking)
    elif kind == 'dangling':
        blocking.symlink_to(tmp_path / 'absent')
    else:
        blocking.mkdir()
        # The superuser may write anywhere.
        monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(
        ConfigError, match=f'--workdir={run.workdir}: {blocking} (is no folder|cannot be written to); use'
    ):
        resources.check_job(run)


@pytest.mark.slow
def test_a_dry_run_of_a_sweep_lists_its_runs_and_writes_nothing(script, job, tmp_path):
    job()  # the tiny model
    arguments = ['--config=configs/sweeps/steps.py', '--config.budget=tiny', f'--workdir={tmp_path / "sweep"}']
    code, out, err = script('sweep.py', *arguments, '--dry_run')
    assert code == 0, err
    assert 'one-16th-2-4-seed42: evaluate pruned, restored; 1 steps\n' in out
    assert 'one-1th-70-seed42: evaluate pruned, restored; 16 steps\n' in out
    assert out.endswith('dry run: 11 runs were checked, and nothing was written\n')
    assert not (tmp_path / 'sweep').exists()


@pytest.mark.slow
def test_a_dry_run_of_a_job_checks_and_writes_nothing(script, job, tmp_path):
    data_dir = job().config.data_dir
    workdir = tmp_path / 'new'
    arguments = [f'--config.data_dir={data_dir}', f'--workdir={workdir}', '--dry_run']
    code, out, err = script('train.py', *arguments)
    assert code == 0, err
    assert out.endswith('dry run: everything was checked, and nothing was written\n')
    code, out, err = script('prune.py', *arguments, '--config.lora.rank.language=100')
    assert code == 1
    assert err == "error: lora.rank.language 100: expected at most 16, the shorter side of the tower's largest kernel\n"
    assert not workdir.exists()


@pytest.mark.slow
def test_a_dry_run_says_what_a_run_would_warn_of(job):
    small = job(prune__samples=100_000, restore__batch=8)
    description = resources.describe(small, resources.check_job(small, ('prune',)))
    repeated = small.repeated_records(100_000)
    assert repeated
    assert all(line in description.splitlines() for line in repeated)
    assert not small.repeated_records(8)


@pytest.mark.slow
def test_a_dry_run_refuses_a_workdir_that_another_run_uses(script, job, tmp_path):
    data_dir = job().config.data_dir
    workdir = tmp_path / 'run'
    workdir.mkdir()
    with (workdir / files.LOCK).open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = script('prune.py', f'--config.data_dir={data_dir}', f'--workdir={workdir}', '--dry_run')
    assert code == 1
    assert err.startswith(f'error: {workdir}: another run is in it')


@pytest.mark.slow
def test_a_dry_run_checks_the_files_of_finished_stages(script, job, tmp_path):
    run = job()
    workdir = tmp_path / 'run'
    workdir.mkdir()
    (workdir / 'prune.json').write_text('{')
    code, _, err = script('prune.py', f'--config.data_dir={run.config.data_dir}', f'--workdir={workdir}', '--dry_run')
    assert code == 1
    assert err.startswith(f'error: {workdir}/prune.json: not JSON')


def test_data_that_are_not_prepared_go_into_a_folder_that_is_removed(tmp_path):
    config = blip2_lang_only.get_config()
    config.data_dir = str(tmp_path / 'data')
    with resources.without_data_dir([config]):
        scratch = config.data_dir
        (Path(scratch) / 'prepared').touch()
    assert not Path(scratch).exists()
    assert not any(tmp_path.iterdir())


def test_a_folder_for_data_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').touch()
    config = blip2_lang_only.get_config()
    config.data_dir = str(tmp_path / 'file/data')
    with (
        pytest.raises(ConfigError, match=f'--config.data_dir={tmp_path}/file/data: {tmp_path}/file is no folder'),
        resources.without_data_dir([config]),
    ):
        (Path(config.data_dir) / 'prepared').touch()
