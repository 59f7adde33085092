"""Published sizes without weights: parameters against torch's own count, recipes against real shapes, the script."""

import functools
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers

from sparselora_jax import pruning, recipe
from sparselora_jax.models.model import abstract_params
from sparselora_jax.planning import inspection, memory, published
from sparselora_jax.sparse import rules
from sparselora_jax.sparse.weights import init_lora

ROOT = Path(__file__).parents[2]
FAMILIES = ('blip2', 'instructblip', 'llava', 'paligemma')
OTHERS = ('meta', 'HuggingFaceTB', 'Salesforce/blip2-itm')  # without recipes: of language alone, or for retrieval
MULTIMODAL = [name for name in published.CONFIGS if '/' in name and not name.startswith(OTHERS)]

# Unique parameters; FlanT5 with a head of its own. A token of InstructBLIP's Q-Former (BERT's 30522 and one) is 768.
COUNTS = {
    'Salesforce/blip2-opt-2.7b': 3_744_761_856,
    'Salesforce/blip2-flan-t5-xl': 3_942_446_592,
    'Salesforce/instructblip-flan-t5-xl': 4_022_968_320 + 768,
    'Salesforce/instructblip-vicuna-7b': 7_913_209_856 + 768,
    'llava-hf/llava-1.5-7b-hf': 7_063_427_072,
    'llava-hf/llava-1.5-13b-hf': 13_351_494_656,
    'google/paligemma-3b-pt-224': 2_923_466_480,
    'meta-llama/Llama-2-7b-hf': 6_738_415_616,
    'HuggingFaceTB/SmolLM2-135M': 134_515_008,
}
# The same checkpoints with another vocabulary, or tied: (hub id, fields of the language model) -> unique parameters.
VARIANTS = [
    ('Salesforce/blip2-opt-2.7b', {'vocab': 50272}, 3_744_679_936),
    ('Salesforce/blip2-flan-t5-xl', {'tied': True}, 3_876_648_448),
    ('Salesforce/instructblip-flan-t5-xl', {'tied': True}, 3_957_170_176 + 768),
    ('Salesforce/instructblip-vicuna-7b', {'vocab': 32000}, 7_913_201_664 + 768),
    ('llava-hf/llava-1.5-7b-hf', {'vocab': 32000}, 7_062_902_784),
]


def torch_count(hf, kind):
    """Unique parameters of torch's model, which takes no memory."""
    tail = 'ForCausalLM' if kind == 'LlamaConfig' else 'ForConditionalGeneration'
    # Where classes share a config, it names its own.
    name = hf.architectures[0] if hf.architectures else kind.replace('Config', tail)
    with torch.device('meta'):
        model = getattr(transformers, name)(hf)
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def ours(hf, cfg):
    return inspection.count(abstract_params(cfg)) + sum(cfg.family.unread(hf, cfg).values())


@functools.cache
def loaded(name):
    hf = published.config_of(name)
    return hf, published.model_config(hf)


@pytest.mark.parametrize('name', published.CONFIGS)
def test_parameters_are_those_of_torch_and_those_published(name):
    hf, cfg = loaded(name)
    if 'flan-t5' in name:  # torch ties what the file does not
        assert not cfg.language.tied
        head = cfg.language.vocab * cfg.language.width
        assert ours(hf, replace(cfg, language=replace(cfg.language, tied=True))) == ours(hf, cfg) - head
        assert torch_count(hf, published.CONFIGS[name][0]) == ours(hf, cfg) - head
    else:
        assert torch_count(hf, published.CONFIGS[name][0]) == ours(hf, cfg)
    assert COUNTS.get(name, ours(hf, cfg)) == ours(hf, cfg)


@pytest.mark.parametrize(('name', 'fields', 'count'), VARIANTS)
def test_other_revisions_have_the_published_parameters_too(name, fields, count):
    hf, cfg = loaded(name)
    assert ours(hf, replace(cfg, language=replace(cfg.language, **fields))) == count


def test_parts_have_the_published_parameters():
    sizes = {}
    for name in ('Salesforce/blip2-opt-2.7b', 'Salesforce/instructblip-vicuna-7b'):
        _, cfg = loaded(name)
        rows = {row.name: row for row in inspection.towers(cfg, abstract_params(cfg))}
        queries = cfg.qformer.queries * cfg.qformer.width
        sizes[cfg.family.name] = (rows['vision'].parameters, rows['qformer'].parameters - queries)
        assert sum(row.share for row in rows.values()) == pytest.approx(1)
    assert sizes == {'blip2': (985_952_256, 105_137_664), 'instructblip': (985_952_256, 185_659_392 + 768)}


def test_what_a_checkpoint_holds_and_nothing_reads_is_counted():
    hf, cfg = loaded('llava-hf/llava-1.5-7b-hf')
    layer = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert cfg.family.unread(hf, cfg) == {'last 1 of 24 vision layers': layer, 'vision/norm': 2048}
    hf = published.config_of('google/paligemma-3b-pt-224')
    hf.vision_config.vision_use_head = True
    assert torch_count(hf, 'PaliGemmaConfig') == ours(hf, published.model_config(hf))


def test_an_encoder_decoder_has_a_row_for_each_stack():
    _, cfg = loaded('Salesforce/blip2-flan-t5-xl')
    rows = {row.name: row for row in inspection.towers(cfg, abstract_params(cfg))}
    assert [rows[name].blocks for name in ('language/encoder', 'language/decoder', 'language')] == [24, 24, 0]
    assert rows['language'].parameters == 2 * 32128 * 2048  # words and head


@functools.cache
def sparsegpt_fits(inputs, pattern, method):
    """Traces it on a kernel of so many inputs; how many outputs there are does not matter."""
    kernel, hessian = (jax.ShapeDtypeStruct((inputs, columns), jnp.float32) for columns in (8, inputs))
    jax.eval_shape(lambda kernel, hessian: method(kernel, hessian, pattern), kernel, hessian)


@pytest.mark.slow
@pytest.mark.parametrize('pruned', ['lang_only', 'vision_only', 'both'])
@pytest.mark.parametrize('name', MULTIMODAL)
def test_every_recipe_fits_the_real_shapes_of_its_family(name, pruned):
    _, cfg = loaded(name)
    params = abstract_params(cfg)
    kernels = rules.kernels(params)
    towers = {'lang_only': ['language'], 'vision_only': ['vision'], 'both': ['language', 'vision']}[pruned]
    config = importlib.import_module(f'configs.{cfg.family.name}_{pruned}')
    inside = re.compile(r'(?:(vision|qformer)|(language)(?:/(?:encoder|decoder))?)/blocks/.*')
    blocks = {path: match[1] or match[2] for path in kernels if (match := inside.fullmatch(path))}
    for pattern in ('2:4', '4:8', '0.5'):
        made = config.get_config(f'pattern={pattern}')
        recipe.check_values(made)
        patterns = pruning.patterns_of(params, recipe.prune_rules(made))
        assert patterns.keys() == {path for path, tower in blocks.items() if tower in towers}
        assert {str(found) for found in patterns.values()} == {pattern}
        made.prune.method = 'sparsegpt'
        for path, found in patterns.items():
            sparsegpt_fits(kernels[path].shape[-2], found, rules.first_match(recipe.prune_methods(made), path))
    lora = jax.eval_shape(lambda key: init_lora(key, params, recipe.lora_rules(made)), jax.random.key(0))
    assert rules.flatten(lora).keys() == blocks.keys()
    for path, factors in rules.flatten(lora).items():
        assert factors.a.shape[-1] == {'vision': 4, 'qformer': 2, 'language': 8}[blocks[path]]  # the paper's ranks
    # What is no kernel of a block is never named: heads, projections, patches.
    outside = kernels.keys() - blocks.keys()
    assert all(re.fullmatch(r'vision/patch/kernel|projection/.*|projector/.*|language/head/kernel', p) for p in outside)


def test_rules_say_what_they_match_and_what_stays_dense():
    _, cfg = loaded('llava-hf/llava-1.5-7b-hf')
    config = importlib.import_module('configs.llava_lang_only').get_config()
    params = abstract_params(cfg)
    found = {match.regex.split('/')[0]: match for match in inspection.matches(params, recipe.prune_rules(config))}
    assert (len(found['language'].paths), found['language'].matrices) == (7, 7 * 32)
    assert found['language'].parameters == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    dense = inspection.dense_groups(params, found['language'].paths)
    assert dense['language/head'] == 4096 * 32064
    assert sum(dense.values()) + found['language'].parameters == inspection.count(params)


def test_the_script_prints_towers_rules_and_memory(script):
    code, out, err = script('inspect.py', 'llava-hf/llava-1.5-13b-hf')
    assert code == 0, err
    for line in (r'total +63 +13,338,896,384', r'.*not read: last 1 of 24 vision layers, 12,596,224; .*'):
        assert re.search(f'^{line}', out, re.M), out
    for line in (r'language/\S+ +2:4 +7 +280 +12,687,769,600 .*', r'restore +\d+\.\d\d', r' +LoRA \(float32\) +0\.\d+'):
        assert re.search(f'^{line}$', out, re.M), out


@pytest.mark.slow
@pytest.mark.parametrize(
    ('overrides', 'line'),
    [
        ([], 'pruned: language; trained: LoRA in language, vision'),
        (['--config.lora.rank.vision=0'], 'pruned: language; trained: LoRA in language'),
        (['--config.restore.trained=weights'], 'pruned: language; trained: the pruned kernels'),
    ],
)
def test_the_script_says_which_towers_are_pruned_and_which_are_trained(script, overrides, line):
    """A recipe named `*_lang_only` trains LoRA in the vision tower too."""
    recipe = '--config=configs/llava_lang_only.py'
    code, out, err = script('inspect.py', 'llava-hf/llava-1.5-7b-hf', recipe, *overrides)
    assert code == 0, err
    assert line in out.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['configs/blip2_lang_only.py', 'blip2_lang_only', 'embedded'])
def test_the_script_takes_a_config_with_its_own_model(script, name):
    code, out, err = script('inspect.py', name)
    assert code == 0, err
    assert out.startswith('embedded: blip2\n')
    assert '139,955,136' in out


def test_the_script_takes_a_directory(script, tmp_path):
    published.config_of('HuggingFaceTB/SmolLM2-135M').save_pretrained(tmp_path)
    code, out, err = script('inspect.py', tmp_path)
    assert code == 0, err
    assert '134,515,008' in out
    assert 'no recipe for a language model alone' in out
    code, _, err = script('inspect.py', tmp_path.parent)
    assert code == 1
    assert 'holds no config.json' in err


@pytest.mark.slow
def test_a_directorys_own_files_say_whether_the_head_is_tied(script, tmp_path):
    """T5 1.1 is saved with a head of its own, or with none: transformers' config says the same of both."""
    vision = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2}
    bridge = {'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2}
    text = {'model_type': 't5', 'vocab_size': 64, 'd_model': 16, 'd_kv': 8, 'd_ff': 32, 'num_layers': 1, 'num_heads': 2}
    hf = transformers.Blip2Config(
        vision_config=vision | {'image_size': 28},
        qformer_config=bridge,
        text_config=text | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False},
        image_token_index=60,
    )
    model = transformers.Blip2ForConditionalGeneration(hf)
    model.save_pretrained(tmp_path)
    unique = sum({id(p): p.numel() for p in model.parameters()}.values())
    code, out, err = script('inspect.py', tmp_path)
    assert code == 0, err
    assert re.search(rf'^total +4 +{unique:,}$', out, re.M), out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['Salesforce/blip2-opt-27b'], 'did you mean Salesforce/blip2-opt-2.7b?'),
        (['blip2_lang_onyl'], 'did you mean blip2_lang_only?'),
        (['configs/blip2_lang_onyl.py'], 'did you mean configs/blip2_lang_only.py?'),
        ([], 'expected a model: python launch/inspect.py MODEL'),
        (
            ['google/paligemma-3b-pt-224', '--config=configs/blip2_both.py'],
            'use a recipe of the same family, such as configs/paligemma_lang_only.py',
        ),
        (
            ['google/paligemma-3b-pt-224', '--config.restore.batch=2'],
            '--config.restore.batch needs a recipe: add',
        ),
    ],
)
def test_wrong_names_give_one_line(script, monkeypatch, arguments, message):
    monkeypatch.setattr(published, '_from_hub', lambda name: None)
    code, _out, err = script('inspect.py', *arguments)
    assert code == 1
    assert err.startswith('error: '), err
    assert err.count('\n') == 1, err
    assert message in err, err


@pytest.mark.slow
def test_scripts_beside_it_get_pythons_own_inspect():
    command = [sys.executable, 'launch/inspect.py', 'no/such/model/at/all']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith('error: no/such/model/at/all: no such directory')
    assert done.stderr.count('\n') == 1


@pytest.mark.slow
def test_a_13b_model_takes_seconds_at_most():
    _, cfg = loaded('llava-hf/llava-1.5-13b-hf')
    made = memory.recipe(cfg, importlib.import_module('configs.llava_both').get_config('hardware=8gpu'))
    totals = {name: stage(made).total for name, stage in memory.STAGES.items()}
    assert totals['load'] < totals['merge and export']
    assert totals['load'] < totals['restore']
