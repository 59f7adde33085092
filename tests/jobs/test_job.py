"""The main job end to end on a tiny model: every stage leaves its file, nothing is computed twice, figures agree."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from transformers import Blip2ForConditionalGeneration

import sparselora_jax as sl
from configs import blip2_lang_only
from sparselora_jax import pruning
from sparselora_jax.checkpoints import embedded, trees
from sparselora_jax.data import easy_vqa
from sparselora_jax.data.dataset import Dataset, Split
from sparselora_jax.jobs import names, report, stages
from sparselora_jax.jobs.export import export_packed, export_pruned
from sparselora_jax.jobs.job import Job
from sparselora_jax.recipe import ConfigError, prune_methods, prune_rules
from sparselora_jax.runtime.errors import DataError
from sparselora_jax.sparse import masks as sparsity
from sparselora_jax.sparse import packing, rules
from sparselora_jax.sparse.dense import dense_kernel

STAGES = ('evaluate_dense', 'prune', 'evaluate_pruned', 'restore', 'evaluate_restored', 'export', 'floor')
MODELS = ('dense', 'pruned', 'restored')


class First:
    """The first records of others."""

    def __init__(self, records, count):
        self.records = records
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.records[index]


def few(dataset, count=200):
    """The data set's first questions: reading them all takes seconds, several times a job."""

    def first(split):
        return Split(First(split.source, count), lambda: split.read_texts()[:count])

    return dataset._replace(train=first(dataset.train), test=first(dataset.test))


def tiny_config(**fields):
    config = blip2_lang_only.get_config()
    config.data_dir = 'not read'
    small = {'prune.samples': 8, 'prune.chunk': 4, 'evaluate.questions': 14, 'evaluate.batch': 8}
    restore = {'restore.steps': 3, 'restore.batch': 4, 'restore.warmup': 1, 'restore.checkpoint_every': 2}
    config.update_from_flattened_dict(small | restore | fields)
    return config


@pytest.fixture(scope='module')
def world(tiny_blip2, easy_vqa_builder):
    """What a job loads, made tiny; counts how often the model is loaded."""
    loads = []
    dataset = few(easy_vqa.load(Path(easy_vqa_builder.data_dir).parents[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, 'load', lambda *args, **kw: loads.append(1) or tiny_blip2)
        patch.setattr(easy_vqa, 'load', lambda data_dir: dataset)
        yield loads


def run(workdir, **fields):
    config = tiny_config(**fields)
    job = Job(config, workdir)
    stages.run(job)
    report.write(job)
    return workdir


@pytest.fixture(scope='module')
def wanda(world, tmp_path_factory):
    """The workdir of the default recipe's run."""
    return run(tmp_path_factory.mktemp('wanda'))


@pytest.fixture(scope='module')
def sparsegpt(world, tmp_path_factory):
    """The workdir of a run that edits kept weights, prunes vision too, restores language alone, and has the control."""
    fields = {'prune.method': 'sparsegpt', 'prune.pattern.vision': '0.5', 'lora.rank.vision': 0, 'lora.rank.qformer': 0}
    return run(tmp_path_factory.mktemp('sparsegpt'), **fields, **{'restore.control': True, 'profile': True})


def read(workdir, name):
    return json.loads((workdir / f'{name}.json').read_text())


def test_every_stage_leaves_its_file(wanda):
    for name in STAGES:
        assert read(wanda, name)['seconds'] >= 0
    for name in (
        'masks.safetensors',
        'restore.safetensors',
        'exported/model.safetensors',
        'exported/config.json',
        'exported/tokenizer.json',
        'exported/text_format.json',
        'exported/README.md',
        'adapter/adapter_model.safetensors',
    ):
        assert (wanda / name).is_file()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['wanda', 'sparsegpt'])
def test_every_file_that_a_stage_leaves_is_under_a_digest(name, request):
    workdir = request.getfixturevalue(name)
    kept = {f'{stage}.json' for stage in names.STAGES}
    for stage in names.STAGES:
        if (workdir / f'{stage}.json').exists():
            kept |= read(workdir, stage)['files'].keys()
    # Files of the run itself: stamped, rewritten, or for people; checkpoints have manifests.
    own = {'config.json', names.INPUTS, names.ENVIRONMENTS, 'lock', 'log.jsonl', 'report.json', 'report.html'}
    files = {path.relative_to(workdir) for path in workdir.rglob('*') if path.is_file()}
    others = {str(path) for path in files if path.parts[0] not in (*own, names.CHECKPOINTS, 'plugins')} - kept
    assert {path for path in others if not path.startswith('events.')} == set()


@pytest.mark.slow
def test_pruning_alone_writes_the_embedded_model_for_torch(wanda, tmp_path):
    """In a finished run too, where the adapter waits for its base."""
    workdir = shutil.copytree(wanda, tmp_path / 'copy')
    adapter = workdir / 'adapter' / 'adapter_config.json'
    assert json.loads(adapter.read_text())['base_model_name_or_path'] is None
    job = Job(tiny_config(), workdir)
    got = export_pruned(job)
    assert got['sparsity']['language']['density'] == 0.5
    assert got['bytes']['pruned'] == (workdir / 'pruned' / 'model.safetensors').stat().st_size
    assert json.loads(adapter.read_text())['base_model_name_or_path'] == str(workdir / 'pruned')
    _, params = sl.load_model(workdir / 'pruned')
    jax.tree.map(np.testing.assert_array_equal, params, job.pruned())
    theirs, info = Blip2ForConditionalGeneration.from_pretrained(workdir / 'pruned', output_loading_info=True)
    assert not any(info.values()), info
    kernel = params['language']['blocks']['mlp']['up']['kernel'][1]
    np.testing.assert_array_equal(theirs.language_model.model.layers[1].mlp.up_proj.weight.detach().numpy().T, kernel)
    card = (workdir / 'pruned' / 'README.md').read_text()
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"' in card
    assert '| pruned |' in card
    assert '| restored |' not in card  # the scores of this model and of the dense one alone


@pytest.mark.slow
@pytest.mark.parametrize('four_bits', [False, True])
def test_a_packed_export_is_the_restored_model(wanda, four_bits, tmp_path):
    workdir = shutil.copytree(wanda, tmp_path / 'copy')
    job, kind = Job(tiny_config(), workdir), 'packed_int4' if four_bits else 'packed'
    got = export_packed(job, kind)
    folder = workdir / kind
    assert got['bytes'] == (folder / 'packed.safetensors').stat().st_size < read(wanda, 'export')['bytes']['exported']
    read_back, restored = sl.unpack(sl.load_model(folder)[1]), job.merged()
    if four_bits:
        assert 0 < got['largest_relative_error'] < 0.1
    else:
        assert got['largest_relative_error'] == 0
        jax.tree.map(np.testing.assert_array_equal, read_back, restored)
    sl.check_sparse(read_back, job.frozen.masks)


def test_a_second_run_computes_nothing(wanda, world):
    def state():
        files = [file for file in wanda.rglob('*') if file.suffix in ('.json', '.safetensors', '.jsonl')]
        return {file: file.read_bytes() for file in files}

    before, loaded = state(), len(world)
    run(wanda)
    assert state() == before
    assert len(world) == loaded  # not even the model was read


def test_the_report_holds_every_figure(wanda):
    got = read(wanda, 'report')
    assert got['scores'].keys() == got['perplexity'].keys() == set(MODELS)
    assert got['intervals'].keys() == {'pruned - dense', 'restored - dense', 'restored - pruned'}
    assert {'lora_merged_density', 'image_blind'} <= got['baselines'].keys()
    assert got['sparsity'].keys() == {'vision', 'qformer', 'language'}
    assert all(tower.keys() >= {'pattern', 'density', 'violations'} for tower in got['sparsity'].values())
    assert {'evaluate', 'prune', 'restore', 'export'} <= got['time_s'].keys()
    assert all(seconds >= 0 for seconds in got['time_s'].values())
    assert 0 < got['step_s'] <= got['time_s']['restore']
    assert got['peak_memory_bytes'] > 2**20
    assert got['bytes'].keys() >= {'dense', 'exported'}
    assert got['config']['prune']['pattern'] == {'vision': 'dense', 'qformer': 'dense', 'language': '2:4'}
    assert got['versions']['jax'] == jax.__version__


def test_scores_are_those_of_the_answers(wanda):
    got = read(wanda, 'report')
    assert got['questions'] == 14
    for name in MODELS:
        stage = read(wanda, f'evaluate_{name}')
        right = [said == true for said, true in zip(stage['predicted'], stage['true'], strict=True)]
        assert got['scores'][name] == np.mean(right)
        assert got['perplexity'][name] == stage['perplexity'] > 1
    assert len({tuple(read(wanda, f'evaluate_{name}')['true']) for name in MODELS}) == 1
    for name, (low, high) in got['intervals'].items():
        model, base = name.split(' - ')
        assert low <= got['scores'][model] - got['scores'][base] <= high


def test_the_exported_language_tower_is_exactly_half_zeros(wanda):
    got = read(wanda, 'report')
    _, params = sl.load_model(wanda / 'exported')
    masks, _ = trees.load_safetensors(wanda / 'masks.safetensors')
    sparsity.check_sparse(params, masks)
    kernels = {p: k for p, k in rules.kernels(params).items() if p.startswith('language/blocks/')}
    assert rules.flatten(masks).keys() == kernels.keys()
    for kernel in kernels.values():
        groups = np.moveaxis(np.asarray(kernel), 1, -1).reshape(-1, 4)
        assert (np.count_nonzero(groups, axis=1) == 2).all()
    pruned = sum(kernel.size for kernel in kernels.values())
    assert got['sparsity']['language'] == {'pattern': '2:4', 'weights': pruned, 'density': 0.5, 'violations': 0}
    for tower in ('vision', 'qformer'):
        counts = got['sparsity'][tower]
        assert (counts['pattern'], counts['density'], counts['violations']) == ('dense', 1.0, 0)
    assert got['baselines']['lora_merged_density'] > 0.9
    assert got['bytes']['exported'] == (wanda / 'exported' / 'model.safetensors').stat().st_size
    assert got['bytes']['dense'] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_the_base_is_untouched_and_restoring_changed_what_it_adapts(wanda, tiny_blip2, random_params):
    model, params = tiny_blip2
    fresh = rules.flatten(random_params(model.shapes()))
    assert all(np.array_equal(leaf, fresh[path]) for path, leaf in rules.flatten(params).items())
    masks = rules.flatten(trees.load_safetensors(wanda / 'masks.safetensors')[0])
    restored = rules.flatten(sl.load_model(wanda / 'exported')[1])
    for path, leaf in restored.items():
        changed = not np.array_equal(leaf, np.where(masks.get(path, True), fresh[path], 0))
        assert changed == ('/blocks/' in path and path.endswith('kernel')), path


@pytest.mark.slow
def test_the_control_is_reported_only_if_asked_for(wanda, sparsegpt):
    control, stage = read(sparsegpt, 'report')['baselines']['dense_control'], read(sparsegpt, 'evaluate_control')
    assert control['overall'] == stage['accuracy']['overall']
    assert control['perplexity'] == stage['perplexity']
    assert 'dense_control' not in read(wanda, 'report')['baselines']
    assert not (wanda / 'control.json').exists()


@pytest.mark.slow
def test_sparsegpt_edits_kept_weights_and_learns_from_the_dense_teacher(sparsegpt, tiny_blip2):
    dense = rules.flatten(tiny_blip2[1])
    masks = rules.flatten(trees.load_safetensors(sparsegpt / 'masks.safetensors')[0])
    pruned = rules.flatten(trees.load_safetensors(sparsegpt / 'kernels.safetensors')[0])
    assert {path.split('/')[0] for path in masks} == {'vision', 'language'}
    for path, mask in masks.items():
        assert not pruned[path][~mask].any()
        if '/o/' in path:
            assert not np.array_equal(pruned[path][mask], dense[path][mask])
    # Before the first update the student is the pruned model: a teacher of the same weights would be at distance 0.
    records = [json.loads(line) for line in (sparsegpt / 'log.jsonl').read_text().splitlines()]
    assert next(r['kl'] for r in records if r['stage'] == 'restore' and r['step'] == 1) > 1e-4
    sparse = read(sparsegpt, 'report')['sparsity']
    assert {tower: (s['density'], s['violations']) for tower, s in sparse.items()} == {
        'vision': (0.5, 0),
        'qformer': (1.0, 0),
        'language': (0.5, 0),
    }


@pytest.mark.slow
def test_restoring_on_four_bits_needs_no_dense_model_and_ends_exactly_sparse(world, tmp_path):
    """QSparseLoRA: the base packed in int4, the teacher's likeliest tokens on disk; both merges."""
    fields = {'restore.base': 'packed_int4', 'restore.teacher': 'top_k', 'restore.top_k': 5, 'lora.rank.language': 2}
    workdir = run(tmp_path, **fields)
    job = Job(tiny_config(**fields), workdir)
    assert read(workdir, 'teacher')['bytes'] == sum(file.stat().st_size for file in (workdir / 'teacher').iterdir())
    assert len(list((workdir / 'teacher').iterdir())) == 3
    assert all(record['kl'] > 0 for record in map(json.loads, (workdir / 'log.jsonl').open()) if 'kl' in record)
    held = rules.flatten(job.base.params)
    rounded = rules.flatten(trees.load_safetensors(workdir / 'rounded.safetensors')[0])
    assert not job.has_dense_weights
    assert all(
        isinstance(held[path], sl.Packed24) and held[path].scale is not None for path in rules.flatten(job.masks)
    )
    for path, kernel in rounded.items():  # what GPTQ has chosen is what is held
        np.testing.assert_array_equal(dense_kernel(held[path], np.float32), kernel)
    merged = job.merged()
    sl.check_sparse(merged, job.masks)
    _, exported = sl.load_model(workdir / 'exported')
    jax.tree.map(np.testing.assert_array_equal, exported, merged)
    assert not (workdir / 'adapter').exists()  # it would be beside weights that it was not trained on

    again, beside = export_packed(job, 'packed_int4'), export_packed(job, 'packed_lora')
    assert 0 < again['largest_relative_error'] < 0.15
    assert beside['largest_relative_error'] == 0
    assert again['bytes_of_dense_kernels'] < 0.2
    assert beside['bytes'] < read(workdir, 'export')['bytes']['exported']
    model, bound = sl.load_model(workdir / 'packed_lora')
    batch = job.batches(4, 0)[0]
    got, want = (model.answer_logits(weights, batch) for weights in (bound, merged))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    prompt = {name: batch[name] for name in ('pixel_values', 'input_ids', 'attention_mask')}
    np.testing.assert_array_equal(*(sl.generate(model, w, prompt, max_new_tokens=4) for w in (bound, merged)))
    assert {'round', 'teacher', 'restore'} <= read(workdir, 'report')['time_s'].keys()


@pytest.mark.slow
@pytest.mark.parametrize('base', packing.FOUR_BITS)
def test_any_pattern_is_held_in_four_bits_as_it_was_chosen(world, tmp_path, base):
    fields = {'prune.method': 'magnitude', 'prune.pattern.language': '0.5', 'restore.base': base}
    job = Job(tiny_config(**fields), tmp_path)
    stages.prune(job)
    stages.round_base(job)
    chosen = rules.flatten(trees.load_safetensors(tmp_path / 'rounded.safetensors')[0])
    held = rules.flatten(job.base.params)
    assert chosen.keys() == rules.flatten(job.masks).keys()
    for path, kernel in chosen.items():
        np.testing.assert_array_equal(dense_kernel(held[path], np.float32), kernel)
    sl.check_sparse(sl.unpack(job.base.params), job.masks)


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        (
            {'restore.base': 'int3'},
            "restore.base 'int3': expected one of dense, packed, packed_int4, int4, nf4, packed24, packed24_int4, bi",
        ),
        ({'restore.teacher': 'topk'}, "restore.teacher 'topk': expected one of model, top_k"),
        ({'restore.top_k': 0}, 'restore.top_k 0: expected 1 or more'),
        ({'restore.base': 'nf4', 'restore.trained': 'weights'}, "restore.base 'nf4' is frozen under LoRA"),
    ],
)
def test_a_base_or_a_teacher_that_cannot_be_is_named(tmp_path, fields, said):
    with pytest.raises(ConfigError, match=said):
        Job(tiny_config(**fields), tmp_path)


def test_more_tokens_than_the_vocabulary_has_are_refused_before_any_work(world, tmp_path):
    with pytest.raises(ConfigError, match=r'restore.top_k 49152: expected fewer than the vocabulary, 49152'):
        Job(tiny_config(**{'restore.teacher': 'top_k', 'restore.top_k': 49152}), tmp_path / 'run').check()


def test_factors_are_kept_beside_a_packed_base_alone(wanda):
    with pytest.raises(
        ConfigError, match=r"restore.base is 'dense': expected packed, packed_int4, or a format that stores masks"
    ):
        export_packed(Job(tiny_config(), wanda), 'packed_lora')


ALLOCATED = {
    'prune.pattern.vision': '0.5',
    'prune.pattern.language': '0.6',
    'prune.method': 'magnitude',
    'prune.score_samples': 4,
    'prune.score_batch': 2,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    'allocation',
    [
        'global_magnitude',
        'ecoflap_first',
        'owl',
        'das',
        'ecoflap_zeroth',
    ],
)
def test_allocated_zeros_sum_to_those_of_uniform_pruning(world, tmp_path, tiny_blip2, allocation):
    job = Job(tiny_config(**ALLOCATED, **{'prune.allocation': allocation}), tmp_path)
    found = stages.allocate(job)
    uniform = pruning.uniform_zeros(tiny_blip2[1], prune_rules(job.config), method=prune_methods(job.config))
    assert sum(int(zeros.sum()) for zeros in found.values()) == sum(int(zeros.sum()) for zeros in uniform.values())
    assert {path.split('/')[0] for path in found} == {'vision', 'language'}
    assert found.keys() == uniform.keys()
    assert any(not np.array_equal(found[path], uniform[path]) for path in found)
    assert read(tmp_path, 'zeros')['zeros'] == {path: zeros.tolist() for path, zeros in found.items()}


@pytest.mark.slow
def test_masks_have_the_zeros_that_were_allocated(world, tmp_path):
    stages.prune(Job(tiny_config(**ALLOCATED, **{'prune.allocation': 'global_magnitude'}), tmp_path))
    masks = rules.flatten(trees.load_safetensors(tmp_path / 'masks.safetensors')[0])
    made = {path: (~np.asarray(mask)).sum(axis=(1, 2)).tolist() for path, mask in masks.items()}
    assert made == read(tmp_path, 'zeros')['zeros']


@pytest.mark.slow
def test_a_recipe_chooses_the_order_in_which_kernels_are_calibrated(world, tmp_path):
    masks = {}
    for order in ('layer', 'kernel'):
        stages.prune(Job(tiny_config(**{'prune.sequential': order}), tmp_path / order))
        masks[order] = rules.flatten(trees.load_safetensors(tmp_path / order / 'masks.safetensors')[0])
    first = [of_order['language/blocks/attn/q/kernel'][0] for of_order in masks.values()]
    np.testing.assert_array_equal(*first)  # no pruned kernel comes before it
    last = [of_order['language/blocks/mlp/down/kernel'][-1] for of_order in masks.values()]
    assert (last[0] != last[1]).any()


@pytest.mark.slow
def test_the_report_believes_the_zeros_that_were_allocated(world, tmp_path):
    got = read(run(tmp_path, **ALLOCATED, **{'prune.allocation': 'owl'}), 'report')
    assert [got['sparsity'][tower]['violations'] for tower in ('vision', 'qformer', 'language')] == [0, 0, 0]
    assert {'zeros', 'prune'} <= got['time_s'].keys()


def test_an_impossible_allocation_is_named_before_any_work(world, tmp_path):
    def check(**fields):
        fields = {name.replace('__', '.'): value for name, value in fields.items()}
        Job(tiny_config(**{'prune.pattern.language': '0.7'} | fields), tmp_path / 'never').check()

    with pytest.raises(ConfigError, match=r"prune.allocation 'evenly': expected one of uniform, global_magnitude, owl"):
        check(prune__allocation='evenly')
    with pytest.raises(sparsity.PatternError, match=r"prune.pattern.language '2:4' .* N:M leaves nothing to allocate"):
        check(**{'prune.pattern.language': '2:4'}, prune__allocation='owl')
    with pytest.raises(
        sparsity.PatternError, match=r'language/.*: sparsity 0.01 of 16 weights is less than one: ask for'
    ):
        check(**{'prune.pattern.language': '0.01'})
    with pytest.raises(sparsity.PatternError, match='no zeros to allocate'):
        check(**{'prune.pattern.language': 'dense'}, prune__allocation='owl')
    with pytest.raises(
        sparsity.PatternError, match=r"prune.allocation 'ecoflap_first': highest: .* highest sparsity of 0.6 allows"
    ):
        check(prune__allocation='ecoflap_first', prune__highest=0.6)
    with pytest.raises(
        sparsity.PatternError,
        match=r"prune.allocation 'owl': language/.*: sparsity 0.* with spread 0.4: .* smaller spread",
    ):
        check(prune__allocation='owl', prune__spread=0.4)
    with pytest.raises(ConfigError, match=r'prune.score_batch 3: does not divide score_samples, 4'):
        check(prune__allocation='ecoflap_first', prune__score_batch=3, prune__score_samples=4)
    with pytest.raises(
        ConfigError, match=r"stream with prune.allocation 'ecoflap_zeroth', whose scores need the model"
    ):
        check(prune__allocation='ecoflap_zeroth', stream=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_pruned_kernels_themselves_may_be_trained(world, tmp_path, tiny_blip2):
    """The zeros stay, everything without a mask stays too, and there is no adapter to export."""
    fields = {'restore.trained': 'weights', 'prune.pattern.vision': '0.5', 'restore.peak': 1e-2}
    workdir = run(tmp_path / 'weights', **fields)
    masks = rules.flatten(trees.load_safetensors(workdir / 'masks.safetensors')[0])
    dense, exported = rules.flatten(tiny_blip2[1]), rules.flatten(sl.load_model(workdir / 'exported')[1])
    for path, leaf in exported.items():
        pruned = np.where(masks.get(path, True), dense[path], 0)
        assert np.array_equal(leaf, pruned) != (path in masks), path
        assert path not in masks or not leaf[~masks[path]].any(), path
    got = read(workdir, 'report')
    assert not any(tower['violations'] for tower in got['sparsity'].values())
    assert 'lora_merged_density' not in got['baselines']
    assert not (workdir / 'adapter').exists()


@pytest.mark.parametrize('field', ['restore.control', 'prune.pattern.language'])
def test_training_kernels_needs_pruned_ones_and_has_no_lora_control(tmp_path, field):
    value = {'restore.control': True, 'prune.pattern.language': 'dense'}[field]
    with pytest.raises(ConfigError, match=field.rpartition('.')[0]):
        Job(tiny_config(**{'restore.trained': 'weights', field: value}), tmp_path)


def test_the_workdir_of_another_config_is_refused_and_the_field_named(wanda):
    before = (wanda / 'config.json').read_bytes()
    Job(tiny_config(**{'mesh.data': 4}), wanda)  # more devices go on with what fewer began
    with pytest.raises(ConfigError, match=r'restore\.steps is 4 here and 3 in the workdir'):
        Job(tiny_config(**{'restore.steps': 4}), wanda)
    assert (wanda / 'config.json').read_bytes() == before


@pytest.mark.slow
def test_a_trace_of_each_training_lies_in_the_workdir_which_is_no_other_configs_for_it(sparsegpt):
    assert len(list(sparsegpt.glob('plugins/profile/*/*.xplane.pb'))) == 2
    config = ConfigDict(json.loads((sparsegpt / 'config.json').read_text()))
    config.profile = False
    Job(config, sparsegpt)


def test_a_method_or_a_model_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"prune.method 'wandas': expected one of random, magnitude, wanda, sparsegpt, dsnot"
    ):
        Job(tiny_config(**{'prune.method': 'wandas'}), tmp_path / 'a')
    with pytest.raises(sl.StorageError, match='no/such/directory: no such directory'):
        Job(tiny_config(model='no/such/directory'), tmp_path / 'b').check()
    assert not list(tmp_path.iterdir())  # nothing is claimed for a config that cannot run


def test_a_workdir_that_was_evaluated_on_other_questions_is_refused(wanda, tmp_path, monkeypatch):
    shutil.copytree(wanda, tmp_path / 'run')
    (tmp_path / 'run' / 'evaluate_restored.json').unlink()
    fewer = few(easy_vqa.load('not read'), 199)
    monkeypatch.setattr(easy_vqa, 'load', lambda data_dir: fewer)
    with pytest.raises(ConfigError, match='the test questions of easy_vqa are not those'):
        run(tmp_path / 'run')


@pytest.mark.parametrize(('kd', 'stays'), [(0.0, False), (0.1, True)])
def test_the_dense_weights_are_in_memory_until_nobody_needs_them(world, tmp_path, kd, stays):
    job = Job(tiny_config(**{'restore.kd': kd}), tmp_path)
    assert not job.has_dense_weights
    assert job.params is job.params
    assert job.has_dense_weights
    job.release_dense()
    assert job.has_dense_weights == stays


class Squares:
    """A data set of one's own, which leaves out what the model cannot take."""

    kinds = ('small', 'large')

    def __call__(self, request):
        sizes = {'small': 8, 'large': 48, 'far too large for these few tokens of an answer': 60}
        records = [
            {'image': np.full((64, 64, 3), size, np.uint8), 'question': 'how large?', 'answer': answer}
            for answer, size in sizes.items()
            if not request.misfit('how large?', answer)
        ]
        split = Split(records, lambda: [(record['question'], record['answer']) for record in records])
        return Dataset(split, split, self.kinds, str)


SQUARES = Squares()


def test_a_data_set_of_ones_own_is_drawn_from_by_its_kinds(world, tmp_path):
    job = Job(tiny_config(data=f'{__name__}:SQUARES', **{'restore.shares': (3, 1)}), tmp_path)
    assert [answer for _, answer in job.dataset.test.read_texts()] == ['small', 'large']
    pixels = job.batches(4, 0)[0]['pixel_values']
    assert sorted(np.unique(pixels[:, 0, 0, 0], return_counts=True)[1]) == [1, 3]
    with pytest.raises(ConfigError, match=r'restore.shares \(1, 1, 1\): expected a share of each kind: small, large'):
        Job(tiny_config(data=f'{__name__}:SQUARES', **{'restore.shares': (1, 1, 1)}), tmp_path / 'other')


class Unanswered(Squares):
    """A data set without answers."""

    def __call__(self, request):
        dataset = super().__call__(request)
        records = [record | {'answer': ' '} for record in dataset.train.source]
        train = Split(records, lambda: [(record['question'], record['answer']) for record in records])
        return dataset._replace(train=train)


UNANSWERED = Unanswered()


def test_records_without_answers_are_refused(world, tmp_path):
    job = Job(tiny_config(data=f'{__name__}:UNANSWERED', **{'restore.shares': ()}), tmp_path)
    with pytest.raises(DataError, match=':UNANSWERED: the answers of all 2 training records are empty'):
        job.check()


def test_nothing_is_claimed_before_the_data_were_found(world, tmp_path):
    with pytest.raises(DataError, match='no such folder'):
        run(tmp_path / 'run', data=str(tmp_path / 'absent'), **{'restore.shares': ()})
    assert not (tmp_path / 'run').exists()


def test_what_pruning_did_not_lose_is_not_won_back(wanda, tmp_path):
    job = Job(tiny_config(), shutil.copytree(wanda, tmp_path / 'run'))
    for name, score in {'dense': 0.5, 'pruned': 0.6, 'restored': 0.7}.items():
        result = job.read_result(f'evaluate_{name}')
        result['accuracy']['overall'] = score
        job.stored.write_result(f'evaluate_{name}', result)
    assert report.build(job)['won_back'] is None


def test_the_page_shows_scores_and_examples_and_loads_nothing_from_elsewhere(wanda):
    page, got = (wanda / 'report.html').read_text(), read(wanda, 'report')
    for name in MODELS:
        assert f'{got["scores"][name]:.1%}' in re.sub(r'<[^>]*>', ' ', page)
    assert len(re.findall(r'class="example"', page)) == 12
    linked = re.findall(r'\b(?:src|href|srcset|action|data)\s*=\s*["\']?([^"\'\s>]*)', page)
    assert linked
    assert all(target.startswith(('data:', '#')) for target in linked)
    assert not re.search(r'@import|url\(\s*["\']?(?!#)|<script|<link|<iframe', page)
    assert page.count('<svg') == 1  # the losses; every layer has the same density
