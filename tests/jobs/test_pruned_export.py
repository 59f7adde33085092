"""Pruning alone: `pruned/` is a directory that torch loads, zeros in place, and an adapter names it as its base."""

import json
import re

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load_file
from tiny_jobs import check_torch_agrees, load_torch, small_batch, small_config, torch_logits
from tiny_models import save, save_data

import sparselora_jax as sl
from sparselora_jax.checkpoints import layout, trees
from sparselora_jax.jobs import model_card, stages
from sparselora_jax.jobs.export import export_pruned, refuse_violations
from sparselora_jax.jobs.job import Job
from sparselora_jax.sparse import rules

BASE_CARD = b'---\nlicense: mit\n---\n# A base\n\nBytes \xff\xfe that are no UTF-8, and <b>HTML</b>.\n'


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
    """(the model's directory, the data's)."""
    model, data = tmp_path_factory.mktemp('model'), tmp_path_factory.mktemp('data')
    save('blip2-opt', model)
    (model / 'README.md').write_bytes(BASE_CARD)
    save_data(data, 12)
    return model, data


@pytest.fixture(scope='module')
def pruned(directories, tmp_path_factory):
    """A job that pruned alone, a block at a time from disk."""
    folder, data = directories
    config = small_config('blip2-opt', folder, data, **{'prune.method': 'magnitude', 'stream': True})
    job = Job(config, tmp_path_factory.mktemp('job') / 'run')
    stages.prune(job)
    export_pruned(job)
    return job


def save_factors(job):
    """Writes factors as restoration would, whose update is not zero."""
    rng = np.random.default_rng(0)
    lora = {}
    for path, kernel in rules.flatten(job.params).items():
        if path.startswith('language/blocks/') and path.endswith('kernel'):
            layers, inputs, outputs = kernel.shape
            a = rng.normal(0, 0.1, (layers, inputs, 2)).astype(np.float32)
            b = rng.normal(0, 0.1, (layers, 2, outputs)).astype(np.float32)
            lora[path] = sl.Lora(a, b, 2.0)
    trees.save_safetensors(job.workdir / 'restore.safetensors', rules.unflatten(lora))
    return rules.unflatten(lora)


@pytest.mark.slow
def test_torch_loads_the_pruned_model_with_our_logits_and_its_zeros(pruned, directories):
    folder = pruned.workdir / 'pruned'
    model, params = sl.load_model(folder)
    masks = trees.load_safetensors(pruned.workdir / 'masks.safetensors')[0]
    sl.check_sparse(params, masks)
    check_torch_agrees(folder, directories[0], model, params, pruned.text)
    weights, source = load_torch(folder).state_dict(), load_file(directories[0] / 'model.safetensors')
    flat = rules.flatten(masks)
    for name, places in layout.places(model.family, model.cfg).items():
        kept = [np.asarray(flat[place.path][place.layer]).T for place in places if place.path in flat]
        want = np.where(np.concatenate(kept), source[name], 0) if kept else source[name]
        np.testing.assert_array_equal(weights[name].numpy(), want)


@pytest.mark.slow
def test_the_result_counts_what_was_written(pruned):
    result = json.loads((pruned.workdir / 'export_pruned.json').read_text())
    assert {tower: counts['density'] for tower, counts in result['sparsity'].items()} == {
        'vision': 0.5,
        'qformer': 1.0,
        'language': 0.5,
    }
    assert result['bytes']['dense'] == result['bytes']['pruned']


@pytest.mark.slow
def test_an_adapter_names_the_pruned_model_and_peft_computes_plain_lora_on_it(pruned):
    lora = save_factors(pruned)
    stages.export(pruned)
    adapter = pruned.workdir / 'adapter'
    base = json.loads((adapter / 'adapter_config.json').read_text())['base_model_name_or_path']
    assert base == str(pruned.workdir / 'pruned')
    theirs = load_torch(base)
    batch, targets, answer = small_batch(base, pruned.text)
    before = torch_logits(theirs, pruned.model, batch, targets)
    # PEFT's modules pass arguments on to the model that they wrap.
    want = torch_logits(PeftModel.from_pretrained(theirs, adapter).eval(), pruned.model, batch, targets)
    model, params = sl.load_model(base)
    got = model.answer_logits(sl.bind(params, None, lora, gradient='plain'), batch | {'targets': targets[None]})
    assert np.abs(want - before).max() > 1e-2
    np.testing.assert_allclose(np.asarray(got)[:, answer], want[:, answer], atol=1e-4)


@pytest.mark.slow
def test_an_adapter_that_was_there_before_is_given_its_base(directories, tmp_path):
    folder, data = directories
    job = Job(small_config('blip2-opt', folder, data, **{'prune.method': 'magnitude'}), tmp_path / 'run')
    stages.prune(job)
    save_factors(job)
    stages.export(job)
    config = job.workdir / 'adapter' / 'adapter_config.json'
    assert json.loads(config.read_text())['base_model_name_or_path'] is None
    assert not (job.workdir / 'pruned').exists()  # the main job writes no second model
    export_pruned(job)
    assert json.loads(config.read_text())['base_model_name_or_path'] == str(job.workdir / 'pruned')
    # A licence that a user adds to a card, or the new base, is no damage to a finished stage.
    card = job.workdir / 'exported' / 'README.md'
    card.write_text(card.read_text(errors='replace').replace('---', '---\nlicense: mit', 1))
    for stage in (stages.export, export_pruned):
        stage(Job(job.config, job.workdir))


@pytest.mark.slow
def test_the_card_keeps_that_of_the_base_byte_for_byte(pruned):
    card = (pruned.workdir / 'pruned' / 'README.md').read_bytes()
    head, body = BASE_CARD.split(b'---\n')[1:]
    assert b'## Card of the base model\n\n```yaml\n' + head + b'```\n' + body in card
    assert card.count(b'\n---\n') == 1  # one head alone


def test_the_card_says_what_was_pruned_how_and_how_to_load_it(pruned):
    card = (pruned.workdir / 'pruned' / 'README.md').read_text(errors='replace')
    head = card.split('---\n')[1]
    assert head.startswith('library_name: transformers\n')
    assert '"dense"' not in head
    assert 'base_model' not in head  # a directory has no id on the hub
    for part in ('- "2:4"', 'Magnitude', '| language | 2:4 |', '50.00%', 'It was not restored', 'Question: {} Short'):
        assert part in card
    assert str(pruned.config.data) not in card
    for code in re.findall(r'```python\n(.*?)```', card, re.DOTALL):
        names = {}
        exec(code.replace('DIRECTORY', str(pruned.workdir / 'pruned')), names)
        assert {'model', 'processor'} <= names.keys()


@pytest.mark.parametrize('folder', ['exported', 'packed', 'packed_int4', 'packed_lora'])
def test_every_restored_format_has_a_card_with_the_restoration(pruned, folder):
    sparsity = {'language': {'pattern': '2:4', 'weights': 64, 'density': 0.5, 'violations': 0}}
    card = model_card.write_card(pruned, folder, sparsity)
    assert ('transformers\n' in card.split('---')[1]) == (folder == 'exported')
    assert ('only sparselora-jax reads' in card) == (folder != 'exported')
    assert '## How it was restored' in card
    assert 'LoRA under the masks, of rank language 8, qformer 2, vision 4' in card


def test_a_broken_pattern_ends_a_run(tmp_path):
    whole = {'pattern': 'dense', 'weights': 8, 'density': 1.0, 'violations': 0}
    refuse_violations(tmp_path, {'vision': whole})
    broken = {'pattern': '2:4', 'weights': 8, 'density': 0.5, 'violations': 7}
    with pytest.raises(sl.PatternError, match='7 groups of the language tower break pattern 2:4') as raised:
        refuse_violations(tmp_path, {'vision': whole, 'language': broken})
    assert 'vision' not in str(raised.value)
